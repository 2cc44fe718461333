"""Golden errors of ggml's encoders, for the formats whose scales llamacli's encoders search for.

    python tests/golden/make_encoders.py       needs llama-cpp-python

Stores in encoders.npz `x`, float16 [rows, 512] of three distributions, `weights`, float32 [512], and for each format
`NAME` and `NAME.weighted`: the squared error of ggml's bytes for each row, without and with weights, as float64; and
`NAME.odd`, float64 [kind of weights, family]: the same for the rows of each family of `odd`, added up.
"""

import ctypes
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from llamacli.files.ggml import BY_NAME

TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")


def samples():
    """Rows as models have them, rows with longer tails, and columns that matter unequally."""
    rng = np.random.default_rng(11)
    x = np.concatenate([rng.standard_normal((6, 512)), rng.laplace(size=(6, 512)), rng.standard_t(4, (6, 512))]) * 0.02
    return x.astype(np.float16), np.exp(1.5 * rng.standard_normal(512)).astype(np.float32)


def odd(half, weights):
    """Rows as models rarely have them, made of `x` by products and comparisons alone, and four kinds of weights."""
    n, other = (half[i : i + 6].astype(np.float32) * np.float32(50) for i in (0, 6))
    column = np.arange(512)
    families = {
        "one in twenty": n * (np.abs(other) > 3),
        "an outlier in 256": n * np.where(column % 256 == 7, 1000, 1),
        "an outlier in 32": n * np.where(column % 32 == 5, 30, 1),
        "ternary": np.sign(n) * (np.abs(n) > 0.5) * np.float32(0.02),
        "whole numbers": np.floor(n * 3).clip(-8, 7) * np.float32(0.01),
        "above zero": np.abs(n) + 5,
        "below zero": -np.abs(n) - 5,
        "all alike": np.abs(n[:, :1]) + np.zeros_like(n),
        "all alike, below zero": -np.abs(n[:, 1:2]) + np.zeros_like(n),
        "cubes": n * n * n,
        "a loud and many soft": n * np.where(column // 32 == 3, 1, np.float32(1e-4)),
    }
    families |= {f"times {scale:g}": n * np.float32(scale) for scale in (1000, 1e-4, 1e-5, 3e-6, 1e-6, 3e-7, 1e-7, 1e-8)}
    kinds = {"": None, "uneven": weights, "heavy tails": weights**3, "0 or 1": np.float32(weights > 2)}
    return {name: np.float32(x) for name, x in families.items()}, kinds


def ggml_bytes(quantize, type_name, x, weights):
    """What ggml makes of float32 rows."""
    kind = BY_NAME[type_name]
    out = np.zeros((len(x), kind.row_bytes(x.shape[1])), np.uint8)
    factors = None if weights is None else weights.ctypes.data
    quantize(kind.id, x.ctypes.data, out.ctypes.data, 0, len(x), x.shape[1], factors)
    return out


def main():
    from llama_cpp import llama_cpp as lib  # here, as the tests read `odd` without it

    quantize = lib._lib.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    half, weights = samples()
    x = half.astype(np.float32)
    found = {"x": half, "weights": weights}

    def errors(name, x, w):
        back = dequantize(ggml_bytes(quantize, name, x, w), GGMLQuantizationType[name])
        return (np.square(back - x, dtype=np.float64) * (1 if w is None else w)).sum(1)

    families, kinds = odd(half, weights)
    for name in TYPES:
        found[name], found[f"{name}.weighted"] = errors(name, x, None), errors(name, x, weights)
        found[f"{name}.odd"] = np.array([[errors(name, rows, w).sum() for rows in families.values()] for w in kinds.values()])
    np.savez_compressed(Path(__file__).parent / "encoders.npz", **found)


if __name__ == "__main__":
    main()
