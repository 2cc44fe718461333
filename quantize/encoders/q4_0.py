"""Q4_0: blocks of 32 weights, a half-precision scale and 32 nibbles from -8 to 7; the weight of largest magnitude becomes -8.

Byte j holds weight j in its low nibble and weight 16 + j in its high one. Of two weights of the same magnitude the first
decides the scale's sign. A block so small that the scale's reciprocal overflows has a scale that is zero in half precision; its
nibbles are zero. That is ggml's encoding without weights; with weights the scale is searched for.
"""

import numpy as np
from numba import njit

from quantize.encoders.blocks import nibbles
from quantize.encoders.levels import Uniform

BLOCK, NBYTES, GROUP, SIDES = 32, 18, 32, 1
LEVELS, INTEGERS = Uniform(-8, 7), None
GRID, POLISH = (-0.3, 0.05, 16), 2
LIMIT = 65504.0 * 8


@njit(nogil=True, cache=True, error_model="numpy")
def _encode(x, bits, scales, out):
    for i in range(x.shape[0]):
        top = np.int32(0)
        for j in range(32):
            top = max(top, bits[i, j] & np.int32(0x7FFFFFFF))
        first = 0
        while bits[i, first] & np.int32(0x7FFFFFFF) != top:
            first += 1
        d = x[i, first] / np.float32(-8)
        inverse = np.float32(1) / d if d != np.float32(0) else np.float32(0)
        scales[i] = d
        if abs(inverse) == np.float32(np.inf):
            out[i, 2:] = 0
            continue
        for j in range(16):
            low = min(np.int32(x[i, j] * inverse + np.float32(8.5)), np.int32(15))
            high = min(np.int32(x[i, 16 + j] * inverse + np.float32(8.5)), np.int32(15))
            out[i, 2 + j] = np.uint8(low | (high << np.int32(4)))


def encode(x: np.ndarray) -> np.ndarray:
    """float32 (rows, cols), cols a multiple of 32 -> uint8 (rows, cols / 32 * 18)."""
    blocks = x.reshape(-1, BLOCK)
    out, scales = np.empty((len(blocks), NBYTES), np.uint8), np.empty(len(blocks), np.float32)
    _encode(blocks, blocks.view(np.int32), scales, out)
    out[:, :2].view(np.float16)[:, 0] = scales
    return out.reshape(len(x), -1)


def pack(s, out, p):
    """One block, as found by the search, to its bytes."""
    s.store(p.d(s), out)
    s.store(nibbles(s, p), out, 2)
