"""F16: IEEE half precision, rounded to nearest, ties to even, subnormals kept."""

import numpy as np

from llamacli.cpu.kernels.jit.intrinsics import compiled

LIMIT = float(np.nextafter(np.float32(65520), np.float32(0)))  # what still rounds to 65504


@compiled()
def _encode(bits, magnitudes, out):
    for i in range(bits.shape[0]):
        b = np.int32(bits[i])
        a = b & np.int32(0x7FFFFFFF)
        normal = (a + np.int32(0xFFF) + ((a >> np.int32(13)) & np.int32(1)) - np.int32(0x38000000)) >> np.int32(13)
        # Adding 1/2 leaves a sum whose last bit is worth 2^-24, as a half's subnormal's is: the processor does the rounding.
        shifted = np.float32(abs(magnitudes[i]) + np.float32(0.5)).view(np.int32)
        small = shifted - np.int32(0x3F000000)
        h = small if a < np.int32(0x38800000) else normal
        out[i] = np.uint16(h | ((b >> np.int32(16)) & np.int32(0x8000)))


def encode(x: np.ndarray) -> np.ndarray:
    """float32 (rows, cols) -> uint8 (rows, 2 cols)."""
    out = np.empty(x.shape, np.uint16)
    flat = x.reshape(-1)
    _encode(flat.view(np.int32), flat, out.reshape(-1))
    return out.view(np.uint8)
