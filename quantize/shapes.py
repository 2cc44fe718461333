"""Random files of a real model's shape with few of its layers, to measure speed and memory.

In: a Config and a number of layers. Out: a GGUF that every Llama 4 engine runs, or, without writing it, its size. Routed
experts are Q4_K, all other matrices Q6_K; the tensors are those of llama4/tensors.py. Blocks are random bytes under scales that
give weights of the usual spread (1 over the root of the row's length), so that activations and logits stay finite.

Sizes: the config.json of meta-llama/Llama-4-Scout-17B-16E and Llama-4-Maverick-17B-128E.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llamacli.errors import UsageError
from llamacli.files.ggml import BY_NAME, TensorType
from llamacli.llama4.config import CHUNK, NO_ROPE_STEP, TEMPERATURE_LENGTH, TEMPERATURE_SCALE, Config
from llamacli.llama4.tensors import Role, Spec, tensors
from llamacli.llama4.vocabulary import BYTE_LETTERS
from quantize.writer import ALIGNMENT, check_output, header, write_file

PIECE = 16 << 20  # bytes made at a time
# Of a block whose scale is 1: the byte of its scale, the byte of the scale of its minimums, the spread of its weights, and
# their mean in units of a minimum.
_SCALES = {"Q4_K": (0, 2, 190.0, 7.5), "Q6_K": (208, None, 1350.0, 0.0)}

SCOUT = Config(
    n_layers=48,
    n_embd=5120,
    n_heads=40,
    n_kv_heads=8,
    head_dim=128,
    n_ff=16384,
    n_ff_exp=8192,
    n_experts=16,
    n_experts_used=1,
    moe_step=1,
    n_vocab=202048,
    context_length=10485760,
    rope_theta=500000.0,
    rms_eps=1e-5,
    chunk_size=CHUNK,
    no_rope_step=NO_ROPE_STEP,
    temperature_length=TEMPERATURE_LENGTH,
    temperature_scale=TEMPERATURE_SCALE,
    use_qk_norm=True,
)
SHAPES = {
    "scout": SCOUT,
    "maverick": replace(SCOUT, n_experts=128, moe_step=2, context_length=1048576, use_qk_norm=False),
}


class _Tensor(NamedTuple):
    spec: Spec
    type: TensorType

    @property
    def nbytes(self) -> int:
        *rows, cols = self.spec.shape
        return math.prod(rows) * self.type.row_bytes(cols)


def nbytes(shape: Config, layers: int) -> int:
    """Bytes of the weights of a file of `layers` layers."""
    return sum(t.nbytes for t in _tensors(shape, layers))


def sizes(shape: Config) -> list[tuple[str, int]]:
    """Name and bytes of every tensor of the whole model in the types that a random file has."""
    return [(t.spec.name, t.nbytes) for t in _tensors(shape, shape.n_layers)]


def write(
    shape: Config, layers: int, path: Path, seed: int = 0, progress: Callable[[int, int, str], None] = lambda *_: None
) -> None:
    """Write the file, streamed; the same seed makes the same bytes.

    UsageError for layers that do not hold whole periods of the shape, OutputError if there is no room for the file.
    """
    if layers < 1 or layers % shape.moe_step:
        raise UsageError(f"expected a multiple of {shape.moe_step} as the number of this shape's layers, found {layers}")
    tensors, rows, offset = _tensors(shape, layers), [], 0
    for t in tensors:
        rows.append((t.spec.name, t.type, t.spec.shape, offset))
        offset += -(-t.nbytes // ALIGNMENT) * ALIGNMENT
    head = header(_metadata(replace(shape, n_layers=layers)), rows)
    check_output(path, len(head) + offset, force=True)
    random = np.random.Generator(np.random.SFC64(seed))

    def contents():
        done = 0
        for t in tensors:
            progress(done, offset, "")
            yield t.spec.name, t.nbytes, _values(t, random)
            done += t.nbytes

    write_file(path, head, contents(), force=True)


def _tensors(shape: Config, layers: int) -> list[_Tensor]:
    def kind(spec: Spec) -> TensorType:
        if spec.role in (Role.NORM, Role.ROUTER):
            return BY_NAME["F32"]
        return BY_NAME["Q4_K" if spec.role is Role.EXPERTS else "Q6_K"]

    return [_Tensor(spec, kind(spec)) for spec in tensors(replace(shape, n_layers=layers)) if spec.required]


def _values(t: _Tensor, random: np.random.Generator) -> Iterator[np.ndarray]:
    """The tensor's bytes, some whole blocks at a time. Norms are 1, embeddings have a spread of 1."""
    shape = t.spec.shape
    std = 1.0 if t.spec.role is Role.EMBEDDING else shape[-1] ** -0.5
    if t.spec.role is Role.NORM:
        yield np.ones(shape, np.float32).tobytes()
        return
    if t.type.name == "F32":
        yield (random.standard_normal(shape, np.float32) * np.float32(std)).tobytes()
        return
    scale_at, min_at, spread, mean = _SCALES[t.type.name]
    left, size = t.nbytes // t.type.nbytes, t.type.nbytes
    d = np.float16(std / spread)
    while left:
        n = min(left, PIECE // size)
        blocks = random.integers(0, 1 << 64, -(-n * size // 8), np.uint64).view(np.uint8)[: n * size].reshape(n, size)
        blocks[:, scale_at : scale_at + 2] = np.frombuffer(d.tobytes(), np.uint8)
        if min_at is not None:
            blocks[:, min_at : min_at + 2] = np.frombuffer(np.float16(d * np.float16(mean)).tobytes(), np.uint8)
        yield blocks.tobytes()
        left -= n


def _metadata(shape: Config) -> dict[str, object]:
    # bytes as text, one merge, and names for all the other ids: a vocabulary that loads, but that holds no text
    words = [*BYTE_LETTERS, "th", "<|begin_of_text|>", "<|eot|>"]
    words += [f"random{i}" for i in range(len(words), shape.n_vocab)]
    types = np.ones(len(words), np.int32)
    types[257:259] = 3
    return {
        "general.architecture": "llama4",
        "general.name": f"random weights, {shape.n_layers} layers, {shape.n_experts} experts",
        **shape.metadata,
        **{"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama4", "tokenizer.ggml.tokens": words},
        **{"tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": ["t h"]},
        **{"tokenizer.ggml.bos_token_id": 257, "tokenizer.ggml.eos_token_id": 258},
    }
