"""BF16: the upper half of a float32, rounded to nearest, ties to even."""

import numpy as np

from llamacli.cpu.kernels.jit.intrinsics import compiled

LIMIT = float(np.uint32(0x7F7F7FFF).view(np.float32))  # what still rounds to the largest bfloat16


@compiled()
def _encode(bits, out):
    for i in range(bits.shape[0]):
        b = bits[i]
        out[i] = np.uint16((b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


def encode(x: np.ndarray) -> np.ndarray:
    """float32 (rows, cols) -> uint8 (rows, 2 cols)."""
    out = np.empty(x.shape, np.uint16)
    _encode(x.reshape(-1).view(np.uint32), out.reshape(-1))
    return out.view(np.uint8)
