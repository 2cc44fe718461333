"""Half floats, bfloat16s and FP8 to float32, some also with the axes changed; rows of blocks; a block's largest magnitude.

In and out: bits, as unsigned integers. A bfloat16 is the upper half of a float32. FP8 comes with a float32 scale for each row.
Quantized rows go through the engine's microkernels.
"""

import numpy as np

from llamacli.cpu.kernels.jit.intrinsics import call, compiled
from llamacli.cpu.kernels.ops.matmul import microkernels

LINE = 32  # bfloat16s of a cache line: transposed reads of whole lines waste none
_TILE = 16  # source rows of a tile: its 16 x 32 values stay in the first-level cache


@compiled()
def bf16(x, out):
    """uint16 (rows, cols) -> uint32 (rows, cols)."""
    for r in range(x.shape[0]):
        for c in range(x.shape[1]):
            out[r, c] = np.uint32(x[r, c]) << np.uint32(16)


@compiled()
def bf16_transposed(x, out):
    """uint16 (rows, cols), rows far apart -> uint32 (cols, rows)."""
    n_rows, n_cols = x.shape
    for r0 in range(0, n_rows, _TILE):
        for c0 in range(0, n_cols, LINE):
            for c in range(c0, min(c0 + LINE, n_cols)):
                for r in range(r0, min(r0 + _TILE, n_rows)):
                    out[c, r] = np.uint32(x[r, c]) << np.uint32(16)


@compiled()
def f16(x, out):
    """int16 (rows, cols) -> float32 (rows, cols), exact; what is not finite becomes infinite or NaN."""
    for r in range(x.shape[0]):
        for c in range(x.shape[1]):
            h = np.int32(x[r, c])
            # With the exponent in place but 112 too low, one multiplication puts normals and subnormals right.
            v = np.int32((h & np.int32(0x7FFF)) << np.int32(13)).view(np.float32) * np.float32(2.0**112)
            v = v if v < np.float32(65536) else np.float32(np.inf) if v == np.float32(65536) else np.float32(np.nan)
            out[r, c] = -v if h < 0 else v


# Shift that brings sign-less bits to a float32's place, the factor that then puts the exponent right, the largest finite value.
FP8 = {
    "F8_E4M3": (np.int32(20), np.float32(2.0**120), np.float32(448)),
    "F8_E5M2": (np.int32(21), np.float32(2.0**112), np.float32(57344)),
}


@compiled()
def fp8(x, shift, factor, top, scales, out):
    """uint8 (rows, cols), float32 (rows) -> float32 (rows, cols), each row times its scale; what is no number becomes NaN."""
    for r in range(x.shape[0]):
        for c in range(x.shape[1]):
            b = np.int32(x[r, c])
            v = np.int32((b & np.int32(0x7F)) << shift).view(np.float32) * factor
            v = (v if v <= top else np.float32(np.nan)) * scales[r]
            out[r, c] = -v if b > 127 else v


@compiled()
def fp8_transposed(x, shift, factor, top, scales, out):
    """uint8 (rows, cols), rows far apart, float32 (cols) -> float32 (cols, rows), each row of `out` times its scale."""
    n_rows, n_cols = x.shape
    for r0 in range(0, n_rows, _TILE):
        for c0 in range(0, n_cols, LINE):
            for c in range(c0, min(c0 + LINE, n_cols)):
                for r in range(r0, min(r0 + _TILE, n_rows)):
                    b = np.int32(x[r, c])
                    v = np.int32((b & np.int32(0x7F)) << shift).view(np.float32) * factor
                    v = (v if v <= top else np.float32(np.nan)) * scales[c]
                    out[c, r] = -v if b > 127 else v


@compiled()
def _rows(microkernel, start, row_bytes, n_cols, out, n_rows):
    for r in range(n_rows):
        call(microkernel, (start + r * row_bytes, n_cols, out + 4 * r * n_cols))


def blocks(type_name: str, x: np.ndarray, out: np.ndarray) -> bool:
    """uint8 (rows, bytes of a row), contiguous -> float32 (rows, cols); False for a type without a microkernel."""
    try:
        microkernel = microkernels(type_name).dequantize
    except KeyError:
        return False
    _rows(microkernel, x.ctypes.data, x.shape[1], out.shape[1], out.ctypes.data, len(x))
    return True


@compiled()
def _largest_bits(bits):
    top = np.uint32(0)
    for i in range(bits.shape[0]):
        top = max(top, bits[i] & np.uint32(0x7FFFFFFF))
    return np.uint32(top)


def largest(bits: np.ndarray) -> np.float32:
    """The largest magnitude among floats given as uint32 bits; NaN counts as larger than infinity."""
    return np.uint32(_largest_bits(bits)).view(np.float32)


@compiled(fastmath=True)
def _squares(x, y):
    wrong, whole = 0.0, 0.0
    for r in range(x.shape[0]):
        a, b = np.float32(0), np.float32(0)
        for c in range(x.shape[1]):
            d = x[r, c] - y[r, c]
            a += d * d
            b += x[r, c] * x[r, c]
        wrong += a
        whole += b
    return wrong, whole


def error(type_name: str, encoded: np.ndarray, x: np.ndarray, scratch: np.ndarray) -> tuple[float, float]:
    """The squared error of encoded rows against float32 rows `x`, and the sum of x^2; `scratch` is of the shape of x."""
    blocks(type_name, encoded, scratch)
    return squares(x, scratch)


def squares(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """The sums of (x - y)^2 and of x^2 over float32 (rows, cols); in float64 where a square leaves float32."""
    wrong, whole = _squares(x, y)
    if 0 < whole < np.inf and wrong < np.inf:
        return wrong, whole
    wide = x.astype(np.float64)
    return float(np.square(wide - y).sum()), float(np.square(wide).sum())
