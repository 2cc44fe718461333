"""Q4_K: 256 weights in 144 bytes, 8 groups of 32 with 6-bit scales and mins; weight = d * scale * q - dmin * min.

Layout: half d, half dmin, 12 bytes of packed scales and mins, 128 bytes of nibbles; of each 32 bytes the low nibbles are group
2k, the high ones group 2k + 1. Source: ggml-common.h, block_q4_K.
"""

from llamacli.cpu.kernels.jit.simd import i8, i32, vec

block, nbytes, group, offset, largest = 256, 144, 32, None, 15


def piece(s, w, j):
    """Weights 32j..32j+31 as unsigned bytes."""
    q = s.load(vec(i8, 32), w, 16 + 32 * (j // 2))
    return s.b.lshr(q, s.fill(i8, 32, 4)) if j % 2 else s.b.and_(q, s.fill(i8, 32, 15))


def crossed(s, w, j):
    """Weights of groups j and j + 4."""
    at = 16 + 32 * (j // 2)
    q = [s.concat(*(s.load(vec(i8, 16), w, at + 16 * half + k) for k in (0, 64))) for half in range(2)]
    return [s.b.lshr(v, s.fill(i8, 32, 4)) if j % 2 else s.b.and_(v, s.fill(i8, 32, 15)) for v in q]


def scales(s, w, n):
    """(scales, mins) of the 8 groups."""
    packed = six_bits(s, s.load(vec(i32, 4), w, 4))
    side = lambda k, at: s.b.fmul(s.to_float(s.unsigned(s.shuffle(packed, list(range(k, k + 8))))), s.splat_half(w, at, 8))
    return side(0, 0), side(8, 2)


def whole_scales(s, w):
    """The 8 scales as integers, and what they are to be multiplied with."""
    packed = six_bits(s, s.load(vec(i32, 4), w, 4))
    return s.unsigned(s.shuffle(packed, list(range(8)))), s.splat_half(w, 0, 8)


def six_bits(s, v):
    """8 scales, then 8 mins, as bytes, from the 12 bytes of the scales and four more."""
    low, wide = [0x3F3F3F3F, 0x0F0F0F0F] * 2, [0, 0x30303030] * 2
    four = s.b.and_(s.b.lshr(s.shuffle(v, [0, 2, 1, 2]), s.each(i32, [0, 0, 0, 4])), s.each(i32, low))
    two = s.b.and_(s.b.lshr(s.shuffle(v, [0, 0, 1, 1]), s.fill(i32, 4, 2)), s.each(i32, wide))
    return s.bits(s.b.or_(four, two), i8)
