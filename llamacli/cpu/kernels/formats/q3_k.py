"""Q3_K: 256 weights in 110 bytes, 16 groups of 16 with 6-bit scales; weight = d * (scale - 32) * (q - 4).

Layout: 32 bytes of third bits (bit g of byte l belongs to weight 32g + l), 64 bytes of bit pairs as in Q2_K, 12 bytes of
scales, half d. Scale i has its low nibble in byte i mod 8 and its high two bits in byte 8 + i mod 4. Source: ggml-common.h,
block_q3_K.
"""

from llamacli.cpu.kernels.formats.q2_k import bit_pairs
from llamacli.cpu.kernels.jit.simd import i8, vec

block, nbytes, group, offset, largest = 256, 110, 16, 4, 7


def piece(s, w, j):
    """Weights 32j..32j+31 as unsigned bytes."""
    third = s.b.and_(s.b.lshr(s.load(vec(i8, 32), w), s.fill(i8, 32, j)), s.fill(i8, 32, 1))
    return s.b.or_(bit_pairs(s, w, 32, j), s.b.shl(third, s.fill(i8, 32, 2)))


def scales(s, w, n):
    """The 16 scales; the mins follow from `offset`."""
    whole, d = whole_scales(s, w)
    return s.b.fmul(s.to_float(whole), d), None


def whole_scales(s, w):
    """The 16 scales as integers, and what they are to be multiplied with."""
    c = lambda value, n: s.fill(i8, n, value)
    low, high = s.load(vec(i8, 8), w, 96), s.load(vec(i8, 4), w, 104)
    low = s.concat(s.b.and_(low, c(15, 8)), s.b.lshr(low, c(4, 8)))
    shifts = s.each(i8, [2 * (i // 4) for i in range(16)])
    high = s.b.and_(s.b.lshr(s.shuffle(high, [i % 4 for i in range(16)]), shifts), c(3, 16))
    return s.signed(s.b.sub(s.b.or_(low, s.b.shl(high, c(4, 16))), c(32, 16))), s.splat_half(w, 108, 16)
