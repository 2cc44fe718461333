"""The table of sampling settings: default and range of each, and the order of the steps.

It imports no NumPy, because the options of `run` and `chat` are made from it (cli/sampling.py).
"""

from numbers import Integral, Real

from llamacli.errors import UsageError

# Keyword of Sampler: default, least, most. An integer default takes integers only.
SETTINGS: dict[str, tuple[float, float, float]] = {
    "temp": (0.6, 0.0, float("inf")),
    "dynatemp_range": (0.0, 0.0, 100.0),
    "dynatemp_exponent": (1.0, 0.0, 100.0),
    "top_k": (0, 0, 1 << 31),
    "top_p": (0.9, 0.0, 1.0),
    "min_p": (0.0, 0.0, 1.0),
    "typical_p": (1.0, 0.0, 1.0),
    "top_n_sigma": (0.0, 0.0, 1000.0),
    "repeat_penalty": (1.0, 0.01, 100.0),
    "presence_penalty": (0.0, -100.0, 100.0),
    "frequency_penalty": (0.0, -100.0, 100.0),
    "repeat_last_n": (64, -1, 1 << 31),
    "dry_multiplier": (0.0, 0.0, 100.0),
    "dry_base": (1.75, 1.0, 100.0),
    "dry_allowed_length": (2, 1, 1 << 20),
    "dry_penalty_last_n": (-1, -1, 1 << 31),
    "xtc_probability": (0.0, 0.0, 1.0),
    "xtc_threshold": (0.1, 0.0, 1.0),
    "mirostat_tau": (5.0, 0.0, 100.0),
    "mirostat_eta": (0.1, 0.0, 1.0),
}
DEFAULT_ORDER = ("penalties", "dry", "temperature", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc")


def checked(name: str, value) -> float:
    """Check that a setting is within its range. UsageError that names the range."""
    default, least, most = SETTINGS[name]
    kinds = Integral if isinstance(default, int) else Real
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most or value == float("inf"):
        wanted = "a whole number" if isinstance(default, int) else "a number"
        above = "up" if most == float("inf") else f"to {most:g}"
        raise UsageError(f"{name}: expected {wanted} from {least:g} {above}, found {value!r:.40}")
    return value
