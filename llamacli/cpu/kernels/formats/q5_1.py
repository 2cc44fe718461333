"""Q5_1: 32 weights in 24 bytes, half d, half m, 32 high bits, nibbles; weight = d * q + m. Source: ggml-common.h."""

from llamacli.cpu.kernels.formats.halves import crossed_fifth_bits, crossed_nibbles, half_scales, nibbles, with_fifth_bits

block, nbytes, group, offset, largest = 32, 24, 32, None, 31


def piece(s, w, j):
    """Weights 32j..32j+31 as unsigned bytes."""
    return with_fifth_bits(s, nibbles(s, w, 24 * j + 8), w, 24 * j + 4)


def crossed(s, w, j):
    """Weights of groups j and j + 4."""
    return crossed_fifth_bits(s, crossed_nibbles(s, w, 8, nbytes, j), w, 4, nbytes, j)


def scales(s, w, n):
    """(scales, mins) of n blocks."""
    return half_scales(s, w, n, nbytes), s.b.fneg(half_scales(s, w, n, nbytes, 2))
