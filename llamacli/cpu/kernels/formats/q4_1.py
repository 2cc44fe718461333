"""Q4_1: 32 weights in 20 bytes, half d and half m, then nibbles as in Q4_0; weight = d * q + m. Source: ggml-common.h,
block_q4_1.
"""

from llamacli.cpu.kernels.formats.halves import half_scales, nibbles

block, nbytes, group, offset, wide = 32, 20, 32, None, False


def piece(s, w, j):
    """Weights 32j..32j+31 as unsigned bytes."""
    return nibbles(s, w, 20 * j + 4)


def scales(s, w, n):
    """(scales, mins) of n blocks."""
    return half_scales(s, w, n, nbytes), s.b.fneg(half_scales(s, w, n, nbytes, 2))
