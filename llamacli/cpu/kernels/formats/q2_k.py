"""Q2_K: 256 weights in 84 bytes, 16 groups of 16; weight = d * scale * q - dmin * min.

Layout: 16 bytes with a 4-bit scale (low) and min (high) each, 64 bytes of bit pairs, half d, half dmin. Each 32 bytes hold 128
weights: bit pair j of byte l is weight 32j + l. Source: ggml-common.h, block_q2_K.
"""

from llamacli.cpu.kernels.jit.simd import i8, vec

block, nbytes, group, offset, largest = 256, 84, 16, None, 3


def piece(s, w, j):
    """Weights 32j..32j+31 as unsigned bytes."""
    return bit_pairs(s, w, 16, j)


def bit_pairs(s, w, at, j):
    """The two bits of weights 32j..32j+31, from the 64 bytes at w + at."""
    q = s.load(vec(i8, 32), w, at + 32 * (j // 4))
    return s.b.and_(s.b.lshr(q, s.fill(i8, 32, 2 * (j % 4))), s.fill(i8, 32, 3))


def scales(s, w, n):
    """(scales, mins) of the 16 groups."""
    (whole, d), high = whole_scales(s, w), s.b.lshr(s.load(vec(i8, 16), w), s.fill(i8, 16, 4))
    return s.b.fmul(s.to_float(whole), d), s.b.fmul(s.to_float(s.unsigned(high)), s.splat_half(w, 82, 16))


def whole_scales(s, w):
    """The 16 scales as integers, and what they are to be multiplied with."""
    return s.unsigned(s.b.and_(s.load(vec(i8, 16), w), s.fill(i8, 16, 15))), s.splat_half(w, 80, 16)
