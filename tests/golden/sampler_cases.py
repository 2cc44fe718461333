"""Logits, histories and chains of samplers that llama.cpp and the sampler are compared on. make_samplers.py asks llama.cpp.

Logits stand far enough apart that rounding decides nothing. No chain has typical sampling or dynamic temperature behind
top-n-sigma: llama.cpp leaves what that step drops in its list as minus infinity, whose share of the entropy is then no number.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

STORED = Path(__file__).resolve().parent / "samplers.npz"
N = 300  # tokens
PEER_ORDER = ("penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature")  # llama.cpp's own
STEPS = {
    "penalties": [
        {"repeat_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2, "repeat_last_n": 16},
        {"repeat_penalty": 0.8, "presence_penalty": -0.3, "frequency_penalty": 0.0, "repeat_last_n": 64},
    ],
    "dry": [
        {"dry_multiplier": 0.8, "dry_base": 1.75, "dry_allowed_length": 2, "dry_penalty_last_n": 64},
        {"dry_multiplier": 2.0, "dry_base": 1.2, "dry_allowed_length": 3, "dry_penalty_last_n": 24},
    ],
    "temperature": [
        {"temp": 0.7},
        {"temp": 1.8},
        {"temp": 0.9, "dynatemp_range": 0.6, "dynatemp_exponent": 1.3},
    ],
    "top_n_sigma": [{"top_n_sigma": 1.1}, {"top_n_sigma": 2.5}],
    "top_k": [{"top_k": 4}, {"top_k": 120}],
    "typ_p": [{"typical_p": 0.8}, {"typical_p": 0.3}],
    "top_p": [{"top_p": 0.85}, {"top_p": 0.2}],
    "min_p": [{"min_p": 0.1}, {"min_p": 0.6}],
    "xtc": [{"xtc_probability": 1.0, "xtc_threshold": 0.02}, {"xtc_probability": 1.0, "xtc_threshold": 0.3}],
}


class Case(NamedTuple):
    """One chain: the steps that are in use in their order, and their settings; `mirostat` is the tau of mirostat 2, or None."""

    seed: int
    order: tuple[str, ...]
    settings: dict
    mirostat: float | None = None

    @property
    def logits(self):
        random = np.random.RandomState(self.seed)
        return (random.permutation(np.cumsum(random.uniform(0.02, 0.1, N))) - 12).astype(np.float32)

    @property
    def history(self):
        """Tokens of a small alphabet, the likeliest of which repeat."""
        random = np.random.RandomState(self.seed + 1)
        alphabet = np.argsort(-self.logits)[:5]
        return [int(alphabet[i]) for i in random.randint(0, 5, 40)]


def cases():
    """Each step alone, llama.cpp's own order with all of them, and steps drawn at random in any order."""
    found = [Case(seed, (name,), chosen) for name, choices in STEPS.items() for seed, chosen in enumerate(choices)]
    found += [Case(90 + n, (), {}, tau) for n, tau in enumerate((1.0, 3.0, 5.0))]
    random = np.random.RandomState(0)
    orders = [PEER_ORDER] * 6 + [tuple(random.permutation(PEER_ORDER)[: random.randint(2, 10)]) for _ in range(60)]
    for seed, order in enumerate(orders, 100):
        chosen = {}
        for name in order:
            choices = [each for each in STEPS[name] if "dynatemp_range" not in each or "top_n_sigma" not in order]
            chosen |= choices[random.randint(len(choices))]
        if "top_n_sigma" in order and "typ_p" in order[order.index("top_n_sigma") :]:
            order = tuple(name for name in order if name != "typ_p")
        found.append(Case(seed, tuple(map(str, order)), chosen))
    return found
