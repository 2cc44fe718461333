"""Q4_K: 256 weights in 144 bytes, 8 groups of 32 with 6-bit scales and mins; weight = d * scale * q - dmin * min.

Layout: half d, half dmin, 12 bytes of packed scales and mins, 128 bytes of nibbles; of each 32 bytes the low nibbles are group
2k, the high ones group 2k + 1. Source: ggml-common.h, block_q4_K.
"""

from llvmlite import ir

from llamacli.kernels.halves import splat_half
from llamacli.kernels.simd import f16, i8, i32, i64, vec

block, nbytes, group, offset, wide = 256, 144, 32, None, False


def piece(s, w, j):
    """Weights 32j..32j+31 as unsigned bytes."""
    q = s.load(vec(i8, 32), w, 16 + 32 * (j // 2))
    return s.b.lshr(q, s.fill(i8, 32, 4)) if j % 2 else s.b.and_(q, s.fill(i8, 32, 15))


def scales(s, w, n):
    """(scales, mins) of the 8 groups."""
    packed = six_bits(s, w)
    side = lambda k, at: s.b.fmul(  # noqa: E731
        s.to_float(s.unsigned(s.shuffle(packed, list(range(k, k + 8))))), splat_half(s, w, at, 8)
    )
    return side(0, 0), side(8, 2)


def chunk(s, w, c):
    """Weights 64c..64c+63: both nibbles of 32 bytes, by a load that fills the register twice and a shift of one half."""
    q = s.load(vec(i8, 32), w, 16 + 32 * c)
    twice = s.bits(s.shuffle(q, [k % 32 for k in range(64)]), i64)
    return s.b.and_(s.bits(s.b.lshr(twice, ir.Constant(vec(i64, 8), [0] * 4 + [4] * 4)), i8), s.fill(i8, 64, 15))


def both(s, w):
    """Scales and mins of the 8 groups in one register of 16 floats."""
    d = s.from_half(s.load(vec(f16, 2), w))
    return s.b.fmul(s.to_float(s.unsigned(six_bits(s, w))), s.shuffle(d, [0] * 8 + [1] * 8))


def six_bits(s, w):
    """8 scales, then 8 mins, as 16 bytes. A load of 16 takes four of the nibbles along."""
    v = s.load(vec(i32, 4), w, 4)
    low, wide = [0x3F3F3F3F, 0x0F0F0F0F] * 2, [0, 0x30303030] * 2
    four = s.b.and_(s.b.lshr(s.shuffle(v, [0, 2, 1, 2]), ir.Constant(v.type, [0, 0, 0, 4])), ir.Constant(v.type, low))
    two = s.b.and_(s.b.lshr(s.shuffle(v, [0, 0, 1, 1]), s.fill(i32, 4, 2)), ir.Constant(v.type, wide))
    return s.bits(s.b.or_(four, two), i8)
