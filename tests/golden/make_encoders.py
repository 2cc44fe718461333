"""Golden errors of ggml's encoders, for those formats where ours searches by itself.

    python tests/golden/make_encoders.py       needs llama-cpp-python

Stores in encoders.npz `x`, float16 [rows, 512] of three distributions, `weights`, float32 [512], and for each format
`NAME` and `NAME.weighted`: the squared error of ggml's bytes for each row, without and with weights, as float64.
"""

import ctypes
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from llama_cpp import llama_cpp as lib

from llamacli.ggml import BY_NAME

TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")


def samples():
    """Rows as models have them, rows with longer tails, and columns that matter unequally."""
    rng = np.random.default_rng(11)
    x = np.concatenate([rng.standard_normal((6, 512)), rng.laplace(size=(6, 512)), rng.standard_t(4, (6, 512))]) * 0.02
    return x.astype(np.float16), np.exp(1.5 * rng.standard_normal(512)).astype(np.float32)


def ggml_bytes(quantize, type_name, x, weights):
    """What ggml makes of float32 rows."""
    kind = BY_NAME[type_name]
    out = np.zeros((len(x), kind.row_bytes(x.shape[1])), np.uint8)
    factors = None if weights is None else weights.ctypes.data
    quantize(kind.id, x.ctypes.data, out.ctypes.data, 0, len(x), x.shape[1], factors)
    return out


def main():
    quantize = lib._lib.ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    half, weights = samples()
    x = half.astype(np.float32)
    found = {"x": half, "weights": weights}
    for name in TYPES:
        for key, w in ((name, None), (f"{name}.weighted", weights)):
            back = dequantize(ggml_bytes(quantize, name, x, w), GGMLQuantizationType[name])
            found[key] = (np.square(back - x, dtype=np.float64) * (1 if w is None else w)).sum(1)
    np.savez_compressed(Path(__file__).parent / "encoders.npz", **found)


if __name__ == "__main__":
    main()
