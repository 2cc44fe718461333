"""Q5_1: 32 weights in 24 bytes, half d, half m, 32 high bits, nibbles; weight = d * q + m. Source: ggml-common.h."""

from llamacli.cpu.kernels.formats.halves import half_scales, nibbles, with_fifth_bits

block, nbytes, group, offset, wide = 32, 24, 32, None, False


def piece(s, w, j):
    """Weights 32j..32j+31 as unsigned bytes."""
    return with_fifth_bits(s, nibbles(s, w, 24 * j + 8), w, 24 * j + 4)


def scales(s, w, n):
    """(scales, mins) of n blocks."""
    return half_scales(s, w, n, nbytes), s.b.fneg(half_scales(s, w, n, nbytes, 2))
