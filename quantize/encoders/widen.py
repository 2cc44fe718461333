"""Half floats and bfloat16s to float32, these also with the axes changed, and the largest magnitude of a block of floats.

In and out: bits, as unsigned integers. A bfloat16 is the upper half of a float32. Knows nothing of formats or files.
"""

import numpy as np
from numba import njit

LINE = 32  # bfloat16s of a cache line: transposed reads of whole lines waste none
_TILE = 16  # source rows of a tile: its 16 x 32 values stay in the nearest cache


@njit(nogil=True, cache=True)
def bf16(x, out):
    """uint16 (rows, cols) -> uint32 (rows, cols)."""
    for r in range(x.shape[0]):
        for c in range(x.shape[1]):
            out[r, c] = np.uint32(x[r, c]) << np.uint32(16)


@njit(nogil=True, cache=True)
def bf16_transposed(x, out):
    """uint16 (rows, cols), rows far apart -> uint32 (cols, rows)."""
    n_rows, n_cols = x.shape
    for r0 in range(0, n_rows, _TILE):
        for c0 in range(0, n_cols, LINE):
            for c in range(c0, min(c0 + LINE, n_cols)):
                for r in range(r0, min(r0 + _TILE, n_rows)):
                    out[c, r] = np.uint32(x[r, c]) << np.uint32(16)


@njit(nogil=True, cache=True)
def f16(x, out):
    """int16 (rows, cols) -> float32 (rows, cols), exact; what is not finite becomes infinite or NaN."""
    for r in range(x.shape[0]):
        for c in range(x.shape[1]):
            h = np.int32(x[r, c])
            # With the exponent in place but 112 too low, one multiplication puts normals and subnormals right.
            v = np.int32((h & np.int32(0x7FFF)) << np.int32(13)).view(np.float32) * np.float32(2.0**112)
            v = v if v < np.float32(65536) else np.float32(np.inf) if v == np.float32(65536) else np.float32(np.nan)
            out[r, c] = -v if h < 0 else v


@njit(nogil=True, cache=True)
def _largest_bits(bits):
    top = np.uint32(0)
    for i in range(bits.shape[0]):
        top = max(top, bits[i] & np.uint32(0x7FFFFFFF))
    return np.uint32(top)


def largest(bits: np.ndarray) -> np.float32:
    """The largest magnitude among floats given as uint32 bits; NaN counts as larger than infinity."""
    return np.uint32(_largest_bits(bits)).view(np.float32)
