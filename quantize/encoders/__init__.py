"""Encoders: float32 rows to the bytes of one GGUF type. One file a format.

Where the algorithm leaves no choice (F32, F16, BF16, Q8_0) a module has `encode(x)` and makes bit for bit what ggml's
reference code makes, and so does Q4_0's `exact` where there are no weights. The others describe levels and layout for `search`,
which looks for the scales of least squared error. `LIMIT` is the largest magnitude a format can hold. Everything is compiled
and runs without the interpreter's lock, so that threads encode ranges of rows side by side.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llamacli.cpu.kernels import sources_digest  # the package decides where compiled code is cached, before Numba is imported
from llamacli.cpu.kernels.jit.loader import load

LEAST_WEIGHT = 1e-12  # of the mean weight: columns of weight 0 still count a little


class Encoder(NamedTuple):
    """`encode(x, weights)`: float32 (rows, row length), finite, at most `limit` -> uint8 (rows, bytes of a row).

    `weights`, float32 (row length,) or None, says how much each column's squared error counts; float types and Q8_0 ignore it.
    """

    encode: Callable[[np.ndarray, np.ndarray | None], np.ndarray]
    limit: float


@cache
def encoder(type_name: str) -> Encoder:
    """The encoder of a tensor type; compiled, or read from the cache, when first asked for."""
    fmt = import_module(f"quantize.encoders.{type_name.lower()}")
    if hasattr(fmt, "LEVELS"):
        return Encoder(_searched(fmt, type_name), fmt.LIMIT)
    return Encoder(lambda x, weights: fmt.encode(x), fmt.LIMIT)


def _searched(fmt, type_name: str) -> Callable[[np.ndarray, np.ndarray | None], np.ndarray]:
    from quantize.encoders.levels import LANES
    from quantize.encoders.search import SYMBOLS, build

    function = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 5)  # ctypes releases the interpreter's lock during the call
    name = f"encode-{type_name}-{sources_digest(Path(__file__).parent)}"
    plain, weighted = (function(address) for address in load(name, build(fmt), SYMBOLS).values())
    unit = LANES * fmt.GROUP

    def encode(x: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
        n_units, left = divmod(x.size, unit)
        out = np.empty((-(-x.size // unit) * unit // fmt.BLOCK, fmt.NBYTES), np.uint8)
        flat, n_cols = x.reshape(-1), x.shape[1]
        call, factors = plain, np.empty(0, np.float32)
        if weights is not None:
            call = weighted
            mean = weights.mean(dtype=np.float64) or 1.0
            factors = np.resize(np.maximum(weights / mean, LEAST_WEIGHT).astype(np.float32), n_cols + unit)
        call(flat.ctypes.data, n_units, factors.ctypes.data, n_cols, out.ctypes.data)
        if left:  # the last groups, padded with zeros to a whole unit
            rest = np.zeros(unit, np.float32)
            rest[:left] = flat[-left:]
            column = n_units * unit % n_cols
            at = n_units * (unit // fmt.BLOCK)
            call(rest.ctypes.data, 1, factors[column:].ctypes.data if weights is not None else 0, n_cols, out[at:].ctypes.data)
        return out[: x.size // fmt.BLOCK].reshape(len(x), -1)

    return encode
