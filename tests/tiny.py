"""Tiny random Llama 4 models as GGUF, of Scout's and Maverick's shapes, for tests.

In: sizes, a function from a tensor's name to its type, a seed. Out: a file written by gguf-py, which shares no code with the
engine. The same seed gives the same weights everywhere: NumPy's policy freezes RandomState's stream.
"""

from typing import NamedTuple

import gguf
import numpy as np
from gguf.quants import quantize

SPECIALS = ("begin_of_text", "end_of_text", "header_start", "header_end", "eom", "eot", "finetune_right_pad")
# random blocks: offset of the scale, offset of the minimum's scale, spread of a block of scale 1, its mean in minima
_BLOCKS = {
    "Q2_K": (80, 82, 11.0, 1.5),
    "Q3_K": (108, None, 42.0, 0.0),
    "Q4_K": (0, 2, 190.0, 7.5),
    "Q5_K": (0, 2, 390.0, 15.5),
    "Q6_K": (208, None, 1350.0, 0.0),
    "IQ4_NL": (0, None, 70.0, 0.0),
    "IQ4_XS": (0, None, 1270.0, 0.0),
    "IQ3_S": (0, None, 130.0, 0.0),
}


class Shape(NamedTuple):
    """A model's sizes. The default has Scout's pattern."""

    n_layers: int = 4
    n_embd: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    n_ff: int = 96  # of dense layers
    n_ff_exp: int = 48
    experts: int = 4
    used: int = 1
    moe_step: int = 1
    vocab: int = 288
    chunk: int = 8
    use_qk_norm: bool = True
    rope_freqs: bool = True  # Scout's factors of 16 for wavelengths over 8192
    temperature_length: float = 4.0
    temperature_scale: float = 0.1
    rope_theta: float = 500000.0
    rms_eps: float = 1e-5

    def is_moe(self, i):
        return (i + 1) % self.moe_step == 0


SCOUT = {}
MAVERICK = {"experts": 8, "moe_step": 2, "use_qk_norm": False, "rope_freqs": False}


def tensors(seed=0, **shape):
    """Every tensor of the model: dict from GGUF name to float32 array, row length last."""
    s, random = Shape(**shape), np.random.RandomState(seed)

    def matrix(*dims):
        return (random.standard_normal(dims) / np.sqrt(dims[-1])).astype(np.float32)

    def norm():
        return (1 + 0.2 * random.standard_normal(s.n_embd)).astype(np.float32)

    def ffn(prefix, suffix, n_ff, *groups):
        return {
            f"{prefix}ffn_gate{suffix}.weight": matrix(*groups, n_ff, s.n_embd),
            f"{prefix}ffn_up{suffix}.weight": matrix(*groups, n_ff, s.n_embd),
            f"{prefix}ffn_down{suffix}.weight": matrix(*groups, s.n_embd, n_ff),
        }

    found = {"token_embd.weight": matrix(s.vocab, s.n_embd) * np.float32(np.sqrt(s.n_embd))}
    for i in range(s.n_layers):
        p, q, kv = f"blk.{i}.", s.heads * s.head_dim, s.kv_heads * s.head_dim
        found[p + "attn_norm.weight"], found[p + "ffn_norm.weight"] = norm(), norm()
        found |= {p + f"attn_{w}.weight": matrix(n, s.n_embd) for w, n in (("q", q), ("k", kv), ("v", kv))}
        found[p + "attn_output.weight"] = matrix(s.n_embd, q)
        if s.is_moe(i):
            found[p + "ffn_gate_inp.weight"] = 2 * matrix(s.experts, s.n_embd)
            found |= ffn(p, "_exps", s.n_ff_exp, s.experts) | ffn(p, "_shexp", s.n_ff_exp)
        else:
            found |= ffn(p, "", s.n_ff)
    found |= {"output_norm.weight": norm(), "output.weight": 2 * matrix(s.vocab, s.n_embd)}
    if s.rope_freqs:
        wavelengths = 2 * np.pi * s.rope_theta ** (np.arange(0, s.head_dim, 2) / s.head_dim)
        found["rope_freqs.weight"] = np.where(wavelengths > 8192, 16, 1).astype(np.float32)
    return found


def blocks(values, type_name, random):
    """`values` as bytes of a type; for the types that gguf-py cannot write, sane random blocks of the same spread instead."""
    kind = gguf.GGMLQuantizationType[type_name]
    if type_name not in _BLOCKS:
        return quantize(values, kind)
    weights, nbytes = gguf.GGML_QUANT_SIZES[kind]
    scale_at, min_at, spread, mean = _BLOCKS[type_name]
    raw = random.randint(0, 256, (values.size // weights, nbytes), np.uint8)
    scales = (values.std(dtype=np.float64) / spread * random.uniform(0.5, 1.5, len(raw))).astype(np.float16)
    raw[:, scale_at : scale_at + 2] = scales.view(np.uint8).reshape(-1, 2)
    if min_at is not None:
        raw[:, min_at : min_at + 2] = (scales * np.float16(mean)).view(np.uint8).reshape(-1, 2)
    return raw.reshape(*values.shape[:-1], -1)


def tiny_gguf(path, *, types=lambda name: "F32", seed=0, edit=None, **shape):
    """Write a model and return its path. Vectors and routers are F32 whatever `types` says; `edit` may change the tensors."""
    s, random = Shape(**shape), np.random.RandomState(seed + 1)
    writer = gguf.GGUFWriter(path, "llama4")
    for key, value in {
        **{"block_count": s.n_layers, "context_length": 1 << 20, "embedding_length": s.n_embd, "vocab_size": s.vocab},
        **{"feed_forward_length": s.n_ff, "expert_feed_forward_length": s.n_ff_exp, "interleave_moe_layer_step": s.moe_step},
        **{"expert_count": s.experts, "expert_used_count": s.used, "rope.dimension_count": s.head_dim},
        **{"attention.head_count": s.heads, "attention.head_count_kv": s.kv_heads},
        **{"attention.key_length": s.head_dim, "attention.value_length": s.head_dim},
        "attention.chunk_size" if s.chunk else "attention.sliding_window": s.chunk,
    }.items():
        writer.add_uint32("llama4." + key, value)
    for key, value in {
        **{"attention.layer_norm_rms_epsilon": s.rms_eps, "rope.freq_base": s.rope_theta},
        **{"attention.temperature_length": s.temperature_length, "attention.temperature_scale": s.temperature_scale},
    }.items():
        writer.add_float32("llama4." + key, value)
    writer.add_bool("llama4.use_qk_norm", s.use_qk_norm)
    _vocabulary(writer, s.vocab)
    found = tensors(seed, **shape)
    if edit:
        edit(found)
    for name, values in found.items():
        plain = values.ndim == 1 or "ffn_gate_inp" in name
        kind = "F32" if plain else types(name)
        data = values if kind == "F32" else blocks(values, kind, random)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _vocabulary(writer, n_vocab):
    """Bytes, one merge, Llama 4's special tokens, and reserved ones up to `n_vocab`."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    letters = [chr(b) if b in printable else chr(next(others)) for b in range(256)]
    specials = [f"<|{name}|>" for name in SPECIALS]
    tokens = [*letters, "th", *specials]
    tokens += [f"<|reserved_special_token_{i}|>" for i in range(n_vocab - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama4")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 257 + [3] * (n_vocab - 257))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(262)
    writer.add_add_bos_token(True)
