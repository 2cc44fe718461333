"""Q8_0: blocks of 32 weights, a half-precision scale and 32 signed bytes; the largest magnitude becomes 127 or -127.

A block so small that the scale's reciprocal overflows has a scale that is zero in half precision; its bytes are zero.
"""

import numpy as np

from llamacli.cpu.kernels.jit.intrinsics import compiled

BLOCK, NBYTES = 32, 34
LIMIT = 65504.0 * 127


@compiled(error_model="numpy")
def _encode(x, bits, scales, out):
    for i in range(x.shape[0]):
        top = np.int32(0)
        for j in range(32):
            top = max(top, bits[i, j] & np.int32(0x7FFFFFFF))
        d = np.int32(top).view(np.float32) / np.float32(127)
        inverse = np.float32(1) / d if d != np.float32(0) else np.float32(0)
        if inverse == np.float32(np.inf):
            inverse = np.float32(0)
        scales[i] = d
        for j in range(32):
            v = x[i, j] * inverse
            whole = np.int32(v)
            rest = v - np.float32(whole)  # exact; C's roundf: halves go away from zero
            out[i, 2 + j] = np.uint8(whole + np.int32(rest >= np.float32(0.5)) - np.int32(rest <= np.float32(-0.5)))


def encode(x: np.ndarray) -> np.ndarray:
    """float32 (rows, cols), cols a multiple of 32 -> uint8 (rows, cols / 32 * 34)."""
    blocks = x.reshape(-1, BLOCK)
    out, scales = np.empty((len(blocks), NBYTES), np.uint8), np.empty(len(blocks), np.float32)
    _encode(blocks, blocks.view(np.int32), scales, out)
    out[:, :2].view(np.float16)[:, 0] = scales
    return out.reshape(len(x), -1)
