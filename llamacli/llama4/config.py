"""The sizes and switches of a Llama 4 model: `Config`, read from a GGUF's metadata or built by a converter.

In: the metadata of a GGUF in llama.cpp's or Ollama's dialect. Out: a frozen `Config` within `BOUNDS`, or an
UnsupportedModelError for another architecture and a ModelFileError for impossible numbers. `Config.metadata` is the way back.

Chunk size, temperature and QK norm default to Meta's values. A chunk size of 0 (MobileLLM) turns off chunks, layers without
rotation and temperature together. llama.cpp means the same by `sliding_window` 0, but at the time of writing it leaves the last
layer unrotated and then stops at an assertion.
"""

import math
from dataclasses import dataclass

import numpy as np

from llamacli.errors import ModelFileError, UnsupportedModelError
from llamacli.files.ggml import BY_NAME
from llamacli.files.gguf import GGUF, text_of
from llamacli.llama4.tensors import OUTPUT, TOKEN_EMBD

CHUNK, NO_ROPE_STEP, TEMPERATURE_LENGTH, TEMPERATURE_SCALE = 8192, 4, 8192.0, 0.1  # Meta's, built into llama.cpp
META = {"chunk_size": CHUNK, "temperature_length": TEMPERATURE_LENGTH, "temperature_scale": TEMPERATURE_SCALE}
WITHOUT_QK_NORM = 128  # llama.cpp assumes that models of this many experts, and only those, have no QK norm (Maverick)
BOUNDS = {  # smallest and largest value accepted, from a GGUF or a config.json
    "n_layers": (1, 1 << 10),
    "n_embd": (1, 1 << 17),
    "n_heads": (1, 1 << 10),
    "head_dim": (2, 1 << 10),
    "n_ff": (1, 1 << 20),
    "n_experts": (0, 1 << 12),
    "moe_step": (0, 1 << 10),
    "chunk_size": (0, 1 << 31),
    "rope_theta": (1.0, 1e12),
    "rms_eps": (1e-12, 0.1),
    "temperature_length": (0.0, 1e12),  # and not between 0 and 1: positions are divided by it
    "temperature_scale": (0.0, 100.0),
}


@dataclass(frozen=True)
class Config:
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
    moe_step: int  # every moe_step-th layer is a mixture; 0: none is
    n_vocab: int
    context_length: int  # what the file claims; nothing is sized from it
    rope_theta: float
    rms_eps: float
    chunk_size: int  # 0: no chunks
    no_rope_step: int  # every no_rope_step-th layer has no rotation and sees everything; 0: all layers rotate
    temperature_length: float  # 0: no temperature
    temperature_scale: float
    use_qk_norm: bool
    tied: bool = False  # the embedding is the output matrix, too
    kv_type: str = "F16"  # tensor type of a cache's keys and values; chosen at load, no property of the file

    @property
    def kv_row_bytes(self) -> int:
        """Bytes of a head's key, or value, of one position in a cache."""
        kind = BY_NAME[self.kv_type]
        return self.head_dim // kind.block * kind.nbytes

    @property
    def n_q(self) -> int:
        """Rows of the query projection: all query heads together."""
        return self.n_heads * self.head_dim

    @property
    def n_kv(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.n_kv_heads * self.head_dim

    @property
    def n_rot(self) -> int:
        """Rotary frequencies: one for each pair of a head's elements."""
        return self.head_dim // 2

    def frequencies(self, divisors: np.ndarray | None = None) -> np.ndarray:
        """Radians that each pair of a head turns by per position, float64 [n_rot]; `divisors` are the file's rope_freqs."""
        plain = self.rope_theta ** (-np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim)
        return plain if divisors is None else plain / divisors.astype(np.float64)

    def is_moe(self, i: int) -> bool:
        """Whether layer i has experts."""
        return self.n_experts > 0 and self.moe_step > 0 and (i + 1) % self.moe_step == 0

    def uses_rope(self, i: int) -> bool:
        """Whether layer i rotates q and k (and is chunked)."""
        return self.no_rope_step == 0 or (i + 1) % self.no_rope_step != 0

    @property
    def metadata(self) -> dict[str, object]:
        """The fields under `llama4.` that a GGUF of this model needs; `from_gguf` of them is this Config again.

        Chunk size and temperature are written only where they are not Meta's: llama.cpp does not read those keys.
        """
        found: dict[str, object] = {
            "block_count": self.n_layers,
            "context_length": self.context_length,
            "embedding_length": self.n_embd,
            "feed_forward_length": self.n_ff,
            "attention.head_count": self.n_heads,
            "attention.head_count_kv": self.n_kv_heads,
            "rope.freq_base": self.rope_theta,
            "attention.layer_norm_rms_epsilon": self.rms_eps,
            "expert_count": self.n_experts,
            "expert_used_count": self.n_experts_used,
            "attention.key_length": self.head_dim,
            "attention.value_length": self.head_dim,
            "vocab_size": self.n_vocab,
            "rope.dimension_count": self.head_dim,
            "interleave_moe_layer_step": self.moe_step,
            "expert_feed_forward_length": self.n_ff_exp,
            "use_qk_norm": self.use_qk_norm,
        }
        if not self.chunk_size:
            found["attention.sliding_window"] = 0  # llama.cpp's key: every layer rotates and sees everything, no temperature
        else:
            found |= {f"attention.{key}": getattr(self, key) for key, value in META.items() if getattr(self, key) != value}
        return {f"llama4.{key}": value for key, value in found.items()}

    @classmethod
    def from_gguf(cls, gguf: GGUF) -> "Config":
        """Read and check the metadata; raises UnsupportedModelError or ModelFileError."""
        arch = gguf.metadata.get("general.architecture")
        if text_of(gguf.metadata, "general.architecture") != "llama4":
            found = f"{str(arch)[:40]!r}" if arch is not None else "none"
            raise UnsupportedModelError(f"{gguf.path}: expected architecture llama4, found {found}; use a Llama 4 file")
        read = _Reader(gguf)
        n_embd = read.count("embedding_length", *BOUNDS["n_embd"])
        n_heads = read.count("attention.head_count", *BOUNDS["n_heads"])
        head_dim = read.count("attention.key_length", *BOUNDS["head_dim"], default=n_embd // n_heads)
        n_experts = read.count("expert_count", *BOUNDS["n_experts"], default=0)
        n_ff = read.count("feed_forward_length", *BOUNDS["n_ff"])
        needed = None if n_experts else 0
        chunk = read.count("attention.sliding_window", "attention.chunk_size", *BOUNDS["chunk_size"], default=CHUNK)
        config = cls(
            n_layers=read.count("block_count", *BOUNDS["n_layers"]),
            n_embd=n_embd,
            n_heads=n_heads,
            n_kv_heads=read.count("attention.head_count_kv", 1, n_heads, default=n_heads),
            head_dim=head_dim,
            n_ff=n_ff,
            n_ff_exp=read.count("expert_feed_forward_length", min(1, n_experts), BOUNDS["n_ff"][1], default=needed),
            n_experts=n_experts,
            n_experts_used=read.count("expert_used_count", min(1, n_experts), n_experts, default=min(1, n_experts)),
            moe_step=read.count("interleave_moe_layer_step", *BOUNDS["moe_step"], default=needed),
            n_vocab=_vocabulary(gguf, read),
            context_length=read.count("context_length", 1, 1 << 40, default=CHUNK),
            rope_theta=read.real("rope.freq_base", *BOUNDS["rope_theta"], default=500_000.0),
            rms_eps=read.real("attention.layer_norm_rms_epsilon", *BOUNDS["rms_eps"]),
            chunk_size=chunk,
            no_rope_step=NO_ROPE_STEP if chunk else 0,
            temperature_length=_temperature(read, "length", TEMPERATURE_LENGTH) if chunk else 0.0,
            temperature_scale=_temperature(read, "scale", TEMPERATURE_SCALE),
            use_qk_norm=read.flag("use_qk_norm", "attention.use_qk_norm", default=n_experts != WITHOUT_QK_NORM),
            tied=OUTPUT not in gguf.tensors,
        )
        read.same("attention.value_length", head_dim, "key_length")
        read.same("rope.dimension_count", head_dim, "key_length")
        if n_heads % config.n_kv_heads:
            raise read.wrong("attention.head_count", f"a multiple of head_count_kv ({config.n_kv_heads})", n_heads)
        if head_dim % 2:
            raise read.wrong("attention.key_length", "even", head_dim)
        return config


def _temperature(read: "_Reader", what: str, default: float) -> float:
    name = f"temperature_{what}"
    value = read.real(f"attention.{name}", name, *BOUNDS[name], default=default)
    if what == "length" and 0.0 < value < 1.0:
        raise read.wrong("attention.temperature_length", "0 or a number from 1", value)
    return value


def _vocabulary(gguf: GGUF, read: "_Reader") -> int:
    """The rows of the embedding; `vocab_size`, where the file has it, must be the same."""
    embedding = gguf.tensors.get(TOKEN_EMBD)
    if embedding is None or len(embedding.shape) != 2:
        raise ModelFileError(f"{gguf.path}: expected a matrix {TOKEN_EMBD}, found none; the file holds no model")
    read.same("vocab_size", embedding.shape[0], f"the height of {TOKEN_EMBD}")
    return embedding.shape[0]


class _Reader:
    """Checked values under `llama4.`. Of several keys the first that the file has counts."""

    def __init__(self, gguf: GGUF):
        self._gguf = gguf

    def count(self, *keys_least_most, default: int | None = None) -> int:
        """`count(key, ..., least, most)`: a whole number in bounds, or a list (one entry a layer) that repeats one."""
        *keys, least, most = keys_least_most
        key, value = self._find(keys, default)
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and len(value) and (value == value[0]).all():
            value = int(value[0])
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(key, f"a whole number from {least} to {most}", value)
        return value

    def real(self, *keys_least_most, default: float | None = None) -> float:
        """`real(key, ..., least, most)`: a finite number in bounds."""
        *keys, least, most = keys_least_most
        key, value = self._find(keys, default)
        if type(value) not in (int, float) or not math.isfinite(value) or not least <= value <= most:
            raise self.wrong(key, f"a number from {least:g} to {most:g}", value)
        return float(value)

    def flag(self, *keys, default: bool) -> bool:
        """A boolean, or a number that stands for one."""
        key, value = self._find(keys, default)
        if not isinstance(value, (bool, int)) or value not in (0, 1):
            raise self.wrong(key, "true or false", value)
        return bool(value)

    def same(self, key: str, value: int, what: str) -> None:
        """ModelFileError if the file has the key with another value."""
        found = self._gguf.metadata.get("llama4." + key, value)
        if type(found) is not int or found != value:
            raise self.wrong(key, f"equal to {what} ({value})", found)

    def _find(self, keys: list[str], default) -> tuple[str, object]:
        for key in keys:
            if (value := self._gguf.metadata.get("llama4." + key)) is not None:
                return key, value
        if default is None:
            raise self.wrong(keys[0], "there", None)
        return keys[0], default

    def wrong(self, key: str, expected: str, found: object) -> ModelFileError:
        shown = "no such key" if found is None else repr(found)[:60]
        return ModelFileError(f"{self._gguf.path}: expected llama4.{key} to be {expected}, found {shown}; the file is damaged")
