"""Random files of a real model's shape with few of its layers: for speed and memory, not for sense.

In: a shape and a number of layers. Out: a GGUF that every Llama 4 engine runs, or, without writing it, its size. Routed experts
are Q4_K, all other matrices Q6_K. Blocks are random bytes under scales that give weights of the usual spread (1 over the root
of the row's length), so that activations and logits stay finite. Knows nothing of speed.

Sizes: the config.json of meta-llama/Llama-4-Scout-17B-16E and Llama-4-Maverick-17B-128E.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llamacli.errors import UsageError
from llamacli.files.ggml import BY_NAME, TensorType
from quantize.writer import ALIGNMENT, check_output, header, write_file

CHUNK = 16 << 20  # bytes made at a time
# of a block of scale 1: where its scale stands, where that of its minima, the spread of its weights, their mean in minima
_SCALES = {"Q4_K": (0, 2, 190.0, 7.5), "Q6_K": (208, None, 1350.0, 0.0)}


class Shape(NamedTuple):
    """Sizes of a model."""

    name: str
    n_layers: int
    n_embd: int
    heads: int
    kv_heads: int
    head_dim: int
    n_ff: int  # of dense layers
    n_ff_exp: int  # of experts
    experts: int
    moe_step: int  # every moe_step-th layer has experts
    vocab: int
    use_qk_norm: bool


SHAPES = {
    "scout": Shape("scout", 48, 5120, 40, 8, 128, 16384, 8192, 16, 1, 202048, True),
    "maverick": Shape("maverick", 48, 5120, 40, 8, 128, 16384, 8192, 128, 2, 202048, False),
}


class _Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    type: TensorType

    @property
    def nbytes(self) -> int:
        *rows, cols = self.shape
        return int(np.prod(rows, dtype=np.int64)) * self.type.row_bytes(cols)


def nbytes(shape: Shape, layers: int) -> int:
    """Bytes of the weights of a file of `layers` layers."""
    return sum(t.nbytes for t in _tensors(shape, layers))


def write(
    shape: Shape, layers: int, path: Path, seed: int = 0, progress: Callable[[int, int, str], None] = lambda *_: None
) -> None:
    """Write the file, streamed; the same seed makes the same bytes.

    UsageError for layers that do not hold whole periods of the shape, OutputError if there is no room for the file.
    """
    if layers < 1 or layers % shape.moe_step:
        raise UsageError(f"expected a multiple of {shape.moe_step} as the number of {shape.name}'s layers, found {layers}")
    tensors, rows, offset = _tensors(shape, layers), [], 0
    for t in tensors:
        rows.append((t.name, t.type, t.shape, offset))
        offset += -(-t.nbytes // ALIGNMENT) * ALIGNMENT
    head = header(_metadata(shape, layers), rows)
    check_output(path, len(head) + offset, force=True)
    random = np.random.Generator(np.random.SFC64(seed))

    def contents():
        done = 0
        for t in tensors:
            progress(done, offset, "")
            yield t.name, t.nbytes, _values(t, random)
            done += t.nbytes

    write_file(path, head, contents(), force=True)


def _tensors(shape: Shape, layers: int) -> list[_Tensor]:
    s, small, large, plain = shape, BY_NAME["Q4_K"], BY_NAME["Q6_K"], BY_NAME["F32"]
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    found = [_Tensor("token_embd.weight", (s.vocab, s.n_embd), large)]
    for i in range(layers):
        p = f"blk.{i}."
        found += [_Tensor(p + f"{name}_norm.weight", (s.n_embd,), plain) for name in ("attn", "ffn")]
        found += [_Tensor(p + f"attn_{w}.weight", (n, s.n_embd), large) for w, n in (("q", q), ("k", kv), ("v", kv))]
        found.append(_Tensor(p + "attn_output.weight", (s.n_embd, q), large))
        mixture = (i + 1) % s.moe_step == 0
        if mixture:
            found.append(_Tensor(p + "ffn_gate_inp.weight", (s.experts, s.n_embd), plain))
        for suffix, n, groups, kind in (
            (("_exps", s.n_ff_exp, (s.experts,), small), ("_shexp", s.n_ff_exp, (), large))
            if mixture
            else (("", s.n_ff, (), large),)
        ):
            found += [_Tensor(p + f"ffn_{w}{suffix}.weight", (*groups, n, s.n_embd), kind) for w in ("gate", "up")]
            found.append(_Tensor(p + f"ffn_down{suffix}.weight", (*groups, s.n_embd, n), kind))
    return [*found, _Tensor("output_norm.weight", (s.n_embd,), plain), _Tensor("output.weight", (s.vocab, s.n_embd), large)]


def _values(t: _Tensor, random: np.random.Generator) -> Iterator[np.ndarray]:
    """The tensor's bytes, some whole blocks at a time. Norms are 1, embeddings have a spread of 1."""
    std = 1.0 if t.name == "token_embd.weight" else t.shape[-1] ** -0.5
    if t.type.name == "F32":
        ones = len(t.shape) == 1
        yield (
            np.ones(t.shape, np.float32) if ones else random.standard_normal(t.shape, np.float32) * np.float32(std)
        ).tobytes()
        return
    scale_at, min_at, spread, mean = _SCALES[t.type.name]
    left, size = t.nbytes // t.type.nbytes, t.type.nbytes
    d = np.float16(std / spread)
    while left:
        n = min(left, CHUNK // size)
        blocks = random.integers(0, 1 << 64, -(-n * size // 8), np.uint64).view(np.uint8)[: n * size].reshape(n, size)
        blocks[:, scale_at : scale_at + 2] = np.frombuffer(d.tobytes(), np.uint8)
        if min_at is not None:
            blocks[:, min_at : min_at + 2] = np.frombuffer(np.float16(d * np.float16(mean)).tobytes(), np.uint8)
        yield blocks.tobytes()
        left -= n


def _metadata(shape: Shape, layers: int) -> dict[str, object]:
    s = shape
    sizes = {
        **{"block_count": layers, "context_length": 10485760, "embedding_length": s.n_embd, "vocab_size": s.vocab},
        **{"feed_forward_length": s.n_ff, "expert_feed_forward_length": s.n_ff_exp, "interleave_moe_layer_step": s.moe_step},
        **{"expert_count": s.experts, "expert_used_count": 1, "rope.dimension_count": s.head_dim},
        **{"attention.head_count": s.heads, "attention.head_count_kv": s.kv_heads},
        **{"attention.key_length": s.head_dim, "attention.value_length": s.head_dim},
        **{"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 500000.0, "use_qk_norm": s.use_qk_norm},
    }
    # bytes as text, one merge, and names for all the other ids: a vocabulary that loads, and no text
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    words = [chr(b) if b in printable else chr(next(others)) for b in range(256)]
    words += ["th", "<|begin_of_text|>", "<|eot|>"]
    words += [f"random{i}" for i in range(len(words), s.vocab)]
    types = np.ones(len(words), np.int32)
    types[257:259] = 3
    return {
        "general.architecture": "llama4",
        "general.name": f"random weights, {s.name}'s shape, {layers} layers",
        **{"llama4." + key: value for key, value in sizes.items()},
        **{"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama4", "tokenizer.ggml.tokens": words},
        **{"tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": ["t h"]},
        **{"tokenizer.ggml.bos_token_id": 257, "tokenizer.ggml.eos_token_id": 258},
    }
