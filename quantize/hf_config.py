"""config.json of a Llama 4 checkpoint to checked sizes, GGUF metadata and the rotary frequencies' divisors.

In: the folder. Out: `HFConfig`, or a CheckpointError for another architecture, for numbers that make no sense and for layouts
that a GGUF of this architecture cannot say. Knows nothing of tensors or of the tokenizer.

llama.cpp takes chunk size, temperature and NoPE period as given (8192, 8192 and 0.1, every 4th layer) and guesses QK norm from
the expert count; what differs is written under keys of its own, which it passes over and this engine honours.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llamacli.errors import CheckpointError
from quantize.folder import read_json

ARCHITECTURES = ("Llama4ForCausalLM", "Llama4ForConditionalGeneration")
NO_ROPE_STEP, CHUNK, TEMPERATURE_LENGTH, TEMPERATURE_SCALE = 4, 8192, 8192, 0.1  # Meta's, built into llama.cpp
UNGUESSED_EXPERTS = 128  # llama.cpp: this many experts and no other mean "no QK norm"


class HFConfig(NamedTuple):
    """What the conversion must know. `metadata` is everything under `llama4.`, `rope_freqs` float32 [head_dim / 2] or None."""

    n_layers: int
    n_experts: int
    moe_step: int
    tied: bool
    sizes: dict[str, int]  # the words of names.py's table
    metadata: dict[str, object]
    rope_freqs: np.ndarray | None
    raw: dict  # of the text model
    notices: list[str]

    def is_moe(self, i: int) -> bool:
        """Whether layer i has experts."""
        return (i + 1) % self.moe_step == 0


class _Reader:
    """Typed, bounded access to one JSON object."""

    def __init__(self, where: str, values: dict):
        self.where, self.values = where, values

    def refuse(self, key: str, expected: str) -> CheckpointError:
        found = str(self.values.get(key))[:60]
        return CheckpointError(f"{self.where}: expected {expected} as {key}, found {found}; it cannot be converted")

    def count(self, key: str, most: int, default: int | None = None, least: int = 1) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not int or not least <= value <= most:
            raise self.refuse(key, f"a count from {least} to {most}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not bool:
            raise self.refuse(key, "true or false")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) not in (int, float) or not math.isfinite(value) or not 0 < value < 1e30:
            raise self.refuse(key, "a positive number")
        return float(value)


def read_config(folder: Path) -> HFConfig:
    """Read, check and translate config.json."""
    path = folder / "config.json"
    outer = read_json(path)
    names = outer.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: expected architecture {' or '.join(ARCHITECTURES)}, found {str(name)[:60]}; only Llama 4 can be converted"
        )
    raw = outer.get("text_config", outer) if name == ARCHITECTURES[1] else outer
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: expected text_config to be an object, found {type(raw).__name__}; download it again")
    if "tie_word_embeddings" not in raw and "tie_word_embeddings" in outer:
        raw = raw | {"tie_word_embeddings": outer["tie_word_embeddings"]}
    return _translate(_Reader(str(path), raw))


def _translate(c: _Reader) -> HFConfig:
    hidden, n_heads = c.count("hidden_size", 1 << 20), c.count("num_attention_heads", 1 << 12)
    n_kv_heads = c.count("num_key_value_heads", n_heads, n_heads)
    head_dim = c.count("head_dim", 1 << 12, hidden // n_heads)
    if head_dim % 2:
        raise c.refuse("head_dim", "an even number")
    if n_heads % n_kv_heads:
        raise c.refuse("num_key_value_heads", f"a divisor of {n_heads} heads")
    n_layers, n_experts = c.count("num_hidden_layers", 1 << 12), c.count("num_local_experts", 1 << 12)
    expert, vocab = c.count("intermediate_size", 1 << 22), c.count("vocab_size", 1 << 24)
    dense = c.count("intermediate_size_mlp", 1 << 22, expert)
    step = _moe_step(c, n_layers)
    theta, freqs = _rope(c, head_dim)
    metadata: dict[str, object] = {
        "block_count": n_layers,
        "context_length": c.count("max_position_embeddings", 1 << 31, CHUNK),
        "embedding_length": hidden,
        "feed_forward_length": dense,
        "attention.head_count": n_heads,
        "attention.head_count_kv": n_kv_heads,
        "rope.freq_base": theta,
        "attention.layer_norm_rms_epsilon": c.real("rms_norm_eps", 1e-5),
        "expert_count": n_experts,
        "expert_used_count": c.count("num_experts_per_tok", n_experts, 1),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "vocab_size": vocab,
        "rope.dimension_count": head_dim,
        "interleave_moe_layer_step": step,
        "expert_feed_forward_length": expert,
        "use_qk_norm": c.flag("use_qk_norm", True),
    }
    notices: list[str] = []
    metadata |= _attention(c, n_layers, notices)
    if metadata["use_qk_norm"] is (n_experts == UNGUESSED_EXPERTS):
        notices.append(f"llama.cpp guesses QK norm wrong from {n_experts} experts; this engine reads llama4.use_qk_norm")
    sizes = {
        "vocab": vocab,
        "hidden": hidden,
        "q": n_heads * head_dim,
        "kv": n_kv_heads * head_dim,
        "dense": dense,
        "experts": n_experts,
        "expert": expert,
        "two expert": 2 * expert,
    }
    tied = c.flag("tie_word_embeddings", False)
    return HFConfig(
        n_layers, n_experts, step, tied, sizes, {f"llama4.{k}": v for k, v in metadata.items()}, freqs, c.values, notices
    )


def _moe_step(c: _Reader, n_layers: int) -> int:
    """The period of mixture layers, held against the list of them where there is one."""
    step = c.count("interleave_moe_layer_step", 1 << 12, 1)
    layers = c.values.get("moe_layers")
    if layers is not None and layers != list(range(step - 1, n_layers, step)):
        raise c.refuse("moe_layers", f"every layer number {step}, {2 * step}, ... counted from 1")
    return step


def _attention(c: _Reader, n_layers: int, notices: list[str]) -> dict[str, object]:
    """The keys of chunks and temperature that are not Meta's; CheckpointError for a pattern that a GGUF cannot say."""
    period = c.count("no_rope_layer_interval", 1 << 12, NO_ROPE_STEP)
    uses_rope = c.values.get("no_rope_layers") or [int((i + 1) % period != 0) for i in range(n_layers)]
    if not isinstance(uses_rope, list):
        raise c.refuse("no_rope_layers", "a list of 0 and 1")
    kinds = c.values.get("layer_types") or ["chunked_attention" if rope else "full_attention" for rope in uses_rope]
    if uses_rope == [1] * n_layers and kinds == ["full_attention"] * n_layers:
        return {"attention.sliding_window": 0}  # llama.cpp's word for: rotate everywhere, see everything, no temperature
    rule = [int((i + 1) % NO_ROPE_STEP != 0) for i in range(n_layers)]
    if uses_rope != rule:
        raise c.refuse("no_rope_layers", "0 for every 4th layer and 1 for the others")
    if kinds != ["chunked_attention" if rope else "full_attention" for rope in rule]:
        raise c.refuse("layer_types", "full_attention for every 4th layer and chunked_attention for the others")
    chunk = c.count("attention_chunk_size", 1 << 31, CHUNK)
    length, scale = c.real("floor_scale", TEMPERATURE_LENGTH), c.real("attn_scale", TEMPERATURE_SCALE)
    if not c.values.get("attn_temperature_tuning", True):
        length = 0.0  # this engine's word for: no temperature
    found: dict[str, object] = {}
    if chunk != CHUNK:
        found["attention.chunk_size"] = chunk
    if length != TEMPERATURE_LENGTH:
        found["attention.temperature_length"] = length
    if scale != TEMPERATURE_SCALE:
        found["attention.temperature_scale"] = scale
    if found:
        notices.append(f"llama.cpp does not read {', '.join(found)} and will differ past a chunk; this engine does")
    return found


def _rope(c: _Reader, head_dim: int) -> tuple[float, np.ndarray | None]:
    """The base, and the divisors of the frequencies for rope type llama3."""
    scaling = c.values.get("rope_parameters") or c.values.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise c.refuse("rope_scaling", "an object")
    theta = c.real("rope_theta", 500000.0) if "rope_theta" not in scaling else _Reader(c.where, scaling).real("rope_theta")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise CheckpointError(f"{c.where}: expected rope_type llama3 or default, found {str(kind)[:40]}; no GGUF can say that")
    r = _Reader(c.where, scaling)
    return theta, rope_divisors(
        theta,
        head_dim,
        r.real("factor", 8.0),
        r.real("low_freq_factor", 1.0),
        r.real("high_freq_factor", 4.0),
        r.real("original_max_position_embeddings", 8192),
    )


def rope_divisors(theta: float, head_dim: int, factor: float, low: float, high: float, original: float) -> np.ndarray:
    """The divisors of the rotary frequencies, float32 [head_dim / 2].

    1 for wavelengths within `original / high`, `factor` for those beyond `original / low`, between them a smooth passage; with
    low == high (Scout) a step.
    """
    frequency = np.float32(1) / np.float32(theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    wavelength = np.float32(2 * math.pi) / frequency
    divisors = np.where(wavelength > np.float32(original / low), np.float32(factor), np.float32(1))
    if high > low:
        between = (wavelength >= np.float32(original / high)) & (wavelength <= np.float32(original / low))
        smooth = (np.float32(original) / wavelength - np.float32(low)) / np.float32(high - low)
        divisors = np.where(between, 1 / ((1 - smooth) / np.float32(factor) + smooth), divisors)
    return divisors.astype(np.float32)
