"""Reads the config.json of a Llama 4 checkpoint: the model's Config, and the divisors of its rotary frequencies.

In: the folder. Out: `HFConfig`. CheckpointError: another architecture, impossible numbers, or a layout that a GGUF of this
architecture cannot express.

llama.cpp assumes Meta's chunk size, temperature and period of layers without rotation, and guesses QK norm from the number of
experts. Where a model differs, the GGUF says so under keys that llama.cpp ignores and this engine reads.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llamacli.errors import CheckpointError
from llamacli.llama4.config import (
    BOUNDS,
    CHUNK,
    META,
    NO_ROPE_STEP,
    TEMPERATURE_LENGTH,
    TEMPERATURE_SCALE,
    WITHOUT_QK_NORM,
    Config,
)
from quantize.folder import read_json

ARCHITECTURES = ("Llama4ForCausalLM", "Llama4ForConditionalGeneration")
VOCABULARY, CONTEXT = 1 << 24, 1 << 31  # tokens at most


class HFConfig(NamedTuple):
    """What a conversion needs to know. `rope_freqs` is float32 [head_dim / 2], None where frequencies are not scaled."""

    model: Config
    rope_freqs: np.ndarray | None
    raw: dict  # of the text model
    notices: list[str]


class _Reader:
    """Reads typed values within bounds from one JSON object."""

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

    def real(self, key: str, default: float | None = None, field: str | None = None) -> float:
        """A positive number, within the BOUNDS of a field of Config."""
        value = self.values.get(key)
        value = default if value is None else value
        least, most = BOUNDS[field] if field else (0, 1e30)
        if type(value) not in (int, float) or not least <= value <= most or value <= 0:  # NaN fails the comparison
            raise self.refuse(key, f"a positive number from {least:g} to {most:g}" if field else "a positive number")
        return float(value)


def read_config(folder: Path) -> HFConfig:
    """Read, check and translate config.json."""
    path = folder / "config.json"
    outer = read_json(path)
    names = outer.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: expected architecture {' or '.join(ARCHITECTURES)}, found {name!r:.60}; only Llama 4 can be converted"
        )
    raw = outer.get("text_config", outer) if name == ARCHITECTURES[1] else outer
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: expected text_config to be an object, found {type(raw).__name__}; download it again")
    if "tie_word_embeddings" not in raw and "tie_word_embeddings" in outer:
        raw = raw | {"tie_word_embeddings": outer["tie_word_embeddings"]}
    return _translate(_Reader(str(path), raw))


def _translate(c: _Reader) -> HFConfig:
    hidden, n_heads = c.count("hidden_size", BOUNDS["n_embd"][1]), c.count("num_attention_heads", BOUNDS["n_heads"][1])
    n_kv_heads = c.count("num_key_value_heads", n_heads, n_heads)
    head_dim = c.count("head_dim", BOUNDS["head_dim"][1], hidden // n_heads)
    if head_dim % 2:
        raise c.refuse("head_dim", "an even number")
    if n_heads % n_kv_heads:
        raise c.refuse("num_key_value_heads", f"a divisor of {n_heads} heads")
    n_layers = c.count("num_hidden_layers", BOUNDS["n_layers"][1])
    n_experts, moe_step = _experts(c, n_layers)
    n_ff = c.count("intermediate_size", BOUNDS["n_ff"][1])
    if c.values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise c.refuse("hidden_act", "silu")
    theta, freqs = _rope(c, head_dim)
    notices: list[str] = []
    config = Config(
        n_layers=n_layers,
        n_embd=hidden,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        n_ff=c.count("intermediate_size_mlp", BOUNDS["n_ff"][1], n_ff),
        n_ff_exp=n_ff if n_experts else 0,
        n_experts=n_experts,
        n_experts_used=c.count("num_experts_per_tok", n_experts, 1) if n_experts else 0,
        moe_step=moe_step,
        n_vocab=c.count("vocab_size", VOCABULARY),
        context_length=c.count("max_position_embeddings", CONTEXT, CHUNK),
        rope_theta=theta,
        rms_eps=c.real("rms_norm_eps", 1e-5, "rms_eps"),
        use_qk_norm=c.flag("use_qk_norm", True),
        tied=c.flag("tie_word_embeddings", False),
        **_attention(c, n_layers, notices),
    )
    if config.use_qk_norm is (n_experts == WITHOUT_QK_NORM):
        notices.append(f"llama.cpp guesses QK norm wrong from {n_experts} experts; this engine reads llama4.use_qk_norm")
    return HFConfig(config, freqs, c.values, notices)


def _experts(c: _Reader, n_layers: int) -> tuple[int, int]:
    """How many experts a mixture has, and the period of mixture layers; both 0 for a dense model (Llama Guard 4, MobileLLM).

    `moe_layers`, where config.json has it, must agree with the period.
    """
    n_experts = c.count("num_local_experts", BOUNDS["n_experts"][1], least=0)
    step = c.count("interleave_moe_layer_step", BOUNDS["moe_step"][1], 1, least=0)
    layers = c.values.get("moe_layers")
    if not n_experts or not step or layers == []:
        if layers:
            raise c.refuse("moe_layers", "none without experts")
        return 0, 0
    if layers is not None and layers != list(range(step - 1, n_layers, step)):
        raise c.refuse("moe_layers", f"every layer number {step}, {2 * step}, ... counted from 1")
    return n_experts, step


def _attention(c: _Reader, n_layers: int, notices: list[str]) -> dict[str, float]:
    """Fields of Config for chunks, rotation and temperature; CheckpointError for a pattern that no GGUF can express."""
    period = c.count("no_rope_layer_interval", 1 << 12, NO_ROPE_STEP)
    uses_rope = c.values.get("no_rope_layers") or [int((i + 1) % period != 0) for i in range(n_layers)]
    if not isinstance(uses_rope, list):
        raise c.refuse("no_rope_layers", "a list of 0 and 1")
    kinds = c.values.get("layer_types") or ["chunked_attention" if rope else "full_attention" for rope in uses_rope]
    if uses_rope == [1] * n_layers and kinds == ["full_attention"] * n_layers:
        return {"chunk_size": 0, "no_rope_step": 0, "temperature_length": 0.0, "temperature_scale": TEMPERATURE_SCALE}
    rule = [int((i + 1) % NO_ROPE_STEP != 0) for i in range(n_layers)]
    if uses_rope != rule:
        raise c.refuse("no_rope_layers", "0 for every 4th layer and 1 for the others")
    if kinds != ["chunked_attention" if rope else "full_attention" for rope in rule]:
        raise c.refuse("layer_types", "full_attention for every 4th layer and chunked_attention for the others")
    chunk = c.count("attention_chunk_size", BOUNDS["chunk_size"][1], CHUNK)
    length = c.real("floor_scale", TEMPERATURE_LENGTH, "temperature_length")
    if length < 1:
        raise c.refuse("floor_scale", "a number from 1")
    scale = c.real("attn_scale", TEMPERATURE_SCALE, "temperature_scale")
    if not c.values.get("attn_temperature_tuning", True):
        length = 0.0
    found = {"chunk_size": chunk, "temperature_length": length, "temperature_scale": scale}
    if odd := [f"attention.{key}" for key, value in found.items() if value != META[key]]:
        notices.append(f"llama.cpp does not read {', '.join(odd)} and will differ past a chunk; this engine does")
    return found | {"no_rope_step": NO_ROPE_STEP}


def _rope(c: _Reader, head_dim: int) -> tuple[float, np.ndarray | None]:
    """The base, and the divisors of the frequencies for rope type llama3."""
    scaling = c.values.get("rope_parameters") or c.values.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise c.refuse("rope_scaling", "an object")
    where = _Reader(c.where, scaling) if "rope_theta" in scaling else c
    theta = where.real("rope_theta", 500000.0, "rope_theta")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise CheckpointError(
            f"{c.where}: expected rope_type llama3 or default, found {str(kind)[:40]}; a GGUF cannot express it"
        )
    r = _Reader(c.where, scaling)
    with np.errstate(all="ignore"):  # overflow of float32 is refused below
        divisors = rope_divisors(
            theta,
            head_dim,
            r.real("factor", 8.0),
            r.real("low_freq_factor", 1.0),
            r.real("high_freq_factor", 4.0),
            r.real("original_max_position_embeddings", 8192),
        )
    if not (np.isfinite(divisors) & (divisors > 0)).all():
        raise c.refuse("rope_scaling", "factors that divide frequencies")
    return theta, divisors


def rope_divisors(theta: float, head_dim: int, factor: float, low: float, high: float, original: float) -> np.ndarray:
    """The divisors of the rotary frequencies, float32 [head_dim / 2].

    1 for wavelengths up to `original / high`, `factor` beyond `original / low`, and a smooth transition between the two. With
    low == high (Scout) it is a step.
    """
    frequency = np.float32(1) / np.float32(theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    wavelength = np.float32(2 * math.pi) / frequency
    divisors = np.where(wavelength > np.float32(original / low), np.float32(factor), np.float32(1))
    if high > low:
        between = (wavelength >= np.float32(original / high)) & (wavelength <= np.float32(original / low))
        smooth = (np.float32(original) / wavelength - np.float32(low)) / np.float32(high - low)
        divisors = np.where(between, 1 / ((1 - smooth) / np.float32(factor) + smooth), divisors)
    return divisors.astype(np.float32)
