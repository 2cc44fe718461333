"""Q4_K: 256 weights in 144 bytes, 8 groups of 32 with 6-bit scales and mins; weight = d * scale * q - dmin * min.

Layout: half d, half dmin, 12 bytes of packed scales and mins, 128 bytes of nibbles; of each 32 bytes the low nibbles are group
2k, the high ones group 2k + 1. Source: ggml-common.h, block_q4_K.
"""

from llvmlite import ir

from llamacli.kernels.halves import splat_half
from llamacli.kernels.simd import i8, i32, vec

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


def six_bits(s, w):
    """8 scales, then 8 mins, as 16 bytes, unpacked in four 32-bit words at a time."""
    b = s.b
    u0, u1, u2 = (s.load(i32, w, at) for at in (4, 8, 12))
    top = lambda u: b.shl(b.and_(b.lshr(u, i32(6)), i32(0x03030303)), i32(4))  # noqa: E731
    words = (
        b.and_(u0, i32(0x3F3F3F3F)),
        b.or_(b.and_(u2, i32(0x0F0F0F0F)), top(u0)),
        b.and_(u1, i32(0x3F3F3F3F)),
        b.or_(b.and_(b.lshr(u2, i32(4)), i32(0x0F0F0F0F)), top(u1)),
    )
    v = ir.Constant(vec(i32, 4), ir.Undefined)
    for k, word in enumerate(words):
        v = b.insert_element(v, word, i32(k))
    return s.bits(v, i8)
