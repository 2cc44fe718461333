"""Q6_K: 256 weights in 210 bytes, 16 groups of 16 with signed 8-bit scales; weight = d * scale * (q - 32).

Layout: 128 bytes of low nibbles, 64 bytes of high bit pairs, 16 scales, half d. Each half of 128 weights keeps its four
quarters of 32 in the low and high nibbles of 64 bytes, and their high bits in the four bit pairs of 32 bytes. Source: ggml-
common.h, block_q6_K.
"""

from llamacli.cpu.kernels.jit.simd import i8, vec

block, nbytes, group, offset, largest = 256, 210, 16, 32, 63


def piece(s, w, j):
    """Weights 32j..32j+31 as unsigned bytes."""
    c = lambda value: s.fill(i8, 32, value)
    half, quarter = divmod(j, 4)
    q = s.load(vec(i8, 32), w, 64 * half + 32 * (quarter % 2))
    low = s.b.lshr(q, c(4)) if quarter > 1 else s.b.and_(q, c(15))
    high = s.b.and_(s.b.lshr(s.load(vec(i8, 32), w, 128 + 32 * half), c(2 * quarter)), c(3))
    return s.b.or_(low, s.b.shl(high, c(4)))


def scales(s, w, n):
    """The 16 scales; the mins follow from `offset`."""
    whole, d = whole_scales(s, w)
    return s.b.fmul(s.to_float(whole), d), None


def whole_scales(s, w):
    """The 16 scales as integers, and what they are to be multiplied with."""
    return s.signed(s.load(vec(i8, 16), w, 192)), s.splat_half(w, 208, 16)
