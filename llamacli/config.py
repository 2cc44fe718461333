"""Metadata to a frozen, bounds-checked Config: what kind of Llama 4 this file holds.

In: a GGUF of llama.cpp's or of Ollama's dialect. Out: `Config`, or an UnsupportedModelError for another architecture and a
ModelFileError for numbers that make no sense. Knows nothing of weights beyond the embedding's height.

Chunk size, temperature and QK norm come from the file where it says so, else they are Meta's. As in llama.cpp, a
`llama4.attention.sliding_window` of 0 turns chunks, NoPE layers and temperature off together (MobileLLM files do that).
"""

import math
from typing import NamedTuple

from llamacli.errors import ModelFileError, UnsupportedModelError
from llamacli.gguf import GGUF


class Config(NamedTuple):
    """Sizes and switches of one model."""

    n_layers: int
    n_embd: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    n_ff: int  # of dense layers
    n_ff_exp: int  # of routed and shared experts
    n_experts: int
    n_experts_used: int
    moe_step: int  # every moe_step-th layer is a mixture
    n_vocab: int
    context_length: int  # what the file claims; nothing is sized from it
    rope_theta: float
    rms_eps: float
    chunk_size: int  # 0: no chunks
    no_rope_step: int  # every no_rope_step-th layer has no rotation and sees everything; 0: all layers rotate
    temperature_length: float  # 0: no temperature
    temperature_scale: float
    use_qk_norm: bool

    def is_moe(self, i: int) -> bool:
        """Whether layer i has experts."""
        return self.n_experts > 0 and (i + 1) % self.moe_step == 0

    def uses_rope(self, i: int) -> bool:
        """Whether layer i rotates q and k (and is chunked)."""
        return self.no_rope_step == 0 or (i + 1) % self.no_rope_step != 0

    @classmethod
    def from_gguf(cls, gguf: GGUF) -> "Config":
        """Read and check the metadata."""
        arch = gguf.metadata.get("general.architecture")
        if arch != "llama4":
            raise UnsupportedModelError(
                f"{gguf.path}: expected architecture llama4, found {arch!r}; this engine runs Llama 4 only"
            )
        read = _Reader(gguf)
        n_heads, n_embd = read.count("attention.head_count", 1, 1 << 12), read.count("embedding_length", 1, 1 << 20)
        head_dim = read.count("attention.key_length", 2, 1 << 12, n_embd // n_heads)
        n_experts = read.count("expert_count", 0, 1 << 12, 0)
        n_ff = read.count("feed_forward_length", 1, 1 << 22)
        window = read.count("attention.sliding_window", 0, 1 << 31, read.count("attention.chunk_size", 0, 1 << 31, 8192))
        config = cls(
            n_layers=read.count("block_count", 1, 1 << 12),
            n_embd=n_embd,
            n_heads=n_heads,
            n_kv_heads=read.count("attention.head_count_kv", 1, n_heads, n_heads),
            head_dim=head_dim,
            n_ff=n_ff,
            n_ff_exp=read.count("expert_feed_forward_length", 1, 1 << 22, n_ff),
            n_experts=n_experts,
            n_experts_used=read.count("expert_used_count", min(1, n_experts), n_experts, min(1, n_experts)),
            moe_step=read.count("interleave_moe_layer_step", 1, 1 << 12, 1),
            n_vocab=_vocabulary(gguf, read),
            context_length=read.count("context_length", 1, 1 << 40, 8192),
            rope_theta=read.real("rope.freq_base", 500000.0),
            rms_eps=read.real("attention.layer_norm_rms_epsilon", 1e-5),
            chunk_size=window,
            no_rope_step=4 if window else 0,
            temperature_length=read.real("attention.temperature_length", read.real("temperature_length", 8192.0))
            if window
            else 0.0,
            temperature_scale=read.real("attention.temperature_scale", read.real("temperature_scale", 0.1)),
            use_qk_norm=bool(read.count("use_qk_norm", 0, 1, int(n_experts != 128))),
        )
        for wrong, message in (
            (n_heads % config.n_kv_heads, f"head_count {n_heads} to be a multiple of head_count_kv {config.n_kv_heads}"),
            (head_dim % 2, f"an even head size, found {head_dim}"),
            (read.count("attention.value_length", 1, 1 << 12, head_dim) != head_dim, "value_length to equal key_length"),
            (read.count("rope.dimension_count", 1, 1 << 12, head_dim) != head_dim, "rope.dimension_count to equal key_length"),
        ):
            if wrong:
                raise ModelFileError(f"{gguf.path}: expected {message}; the metadata are damaged or of another model")
        return config


def _vocabulary(gguf: GGUF, read: "_Reader") -> int:
    """The embedding's height: what the weights say wins over `vocab_size`."""
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelFileError(f"{gguf.path}: expected a matrix token_embd.weight, found none; the file holds no model")
    return embedding.shape[0]


class _Reader:
    def __init__(self, gguf: GGUF):
        self._gguf = gguf

    def _value(self, key: str, default):
        value = self._gguf.metadata.get("llama4." + key, default)
        if value is None:
            raise ModelFileError(f"{self._gguf.path}: expected metadata llama4.{key}, found none; the file is incomplete")
        return value

    def count(self, key: str, least: int, most: int, default: int | None = None) -> int:
        value = self._value(key, default)
        if not isinstance(value, int) or not least <= value <= most:
            raise ModelFileError(
                f"{self._gguf.path}: expected llama4.{key} from {least} to {most}, found {value!r}; the file is damaged"
            )
        return int(value)

    def real(self, key: str, default: float) -> float:
        value = self._value(key, default)
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
            raise ModelFileError(f"{self._gguf.path}: expected a positive llama4.{key}, found {value!r}; the file is damaged")
        return float(value)
