"""Q4_1: 32 weights in 20 bytes, half d and half m, then nibbles as in Q4_0; weight = d * q + m. Source: ggml-common.h,
block_q4_1.
"""

from llamacli.cpu.kernels.formats.halves import crossed_nibbles, half_scales, nibbles

block, nbytes, group, offset, largest = 32, 20, 32, None, 15


def piece(s, w, j):
    """Weights 32j..32j+31 as unsigned bytes."""
    return nibbles(s, w, 20 * j + 4)


def crossed(s, w, j):
    """Weights of groups j and j + 4."""
    return crossed_nibbles(s, w, 4, nbytes, j)


def scales(s, w, n):
    """(scales, mins) of n blocks."""
    return half_scales(s, w, n, nbytes), s.b.fneg(half_scales(s, w, n, nbytes, 2))
