"""Q6_K: 256 weights in 210 bytes, 16 groups of 16 with signed 8-bit scales; weight = d * scale * (q - 32).

Layout: 128 bytes of low nibbles, 64 bytes of high bit pairs, 16 scales, half d. Each half of 128 weights keeps its four
quarters of 32 in the low and high nibbles of 64 bytes, and their high bits in the four bit pairs of 32 bytes. Source: ggml-
common.h, block_q6_K.
"""

from llvmlite import ir

from llamacli.cpu.kernels.formats.halves import splat_half
from llamacli.cpu.kernels.jit.simd import i8, i16, i32, i64, vec

block, nbytes, group, offset, largest = 256, 210, 16, 32, 63


def piece(s, w, j):
    """Weights 32j..32j+31 as unsigned bytes."""
    c = lambda value: s.fill(i8, 32, value)
    half, quarter = divmod(j, 4)
    q = s.load(vec(i8, 32), w, 64 * half + 32 * (quarter % 2))
    low = s.b.lshr(q, c(4)) if quarter > 1 else s.b.and_(q, c(15))
    high = s.b.and_(s.b.lshr(s.load(vec(i8, 32), w, 128 + 32 * half), c(2 * quarter)), c(3))
    return s.b.or_(low, s.b.shl(high, c(4)))


def codes(s, w):
    """Weights as 4 registers: 64 nibbles as they lie, and the bit pairs of 32 bytes loaded twice and shifted apart."""
    found = []
    for c in range(4):
        half, high = divmod(c, 2)
        q = s.load(vec(i8, 64), w, 64 * half)
        low = s.b.and_(s.bits(s.b.lshr(s.bits(q, i64), s.fill(i64, 8, 4)), i8) if high else q, s.fill(i8, 64, 15))
        pairs = s.load(vec(i8, 32), w, 128 + 32 * half)
        twice = s.bits(s.shuffle(pairs, [k % 32 for k in range(64)]), i64)
        to_bit_4 = s.b.lshr if high else s.b.shl
        apart = to_bit_4(twice, ir.Constant(vec(i64, 8), [0] * 4 + [2] * 4 if high else [4] * 4 + [2] * 4))
        found.append(s.b.or_(low, s.b.and_(s.bits(apart, i8), s.fill(i8, 64, 0x30))))
    return found


def whole_scales(s, w):
    """The 16 scales as pairs of equal 16-bit integers, and what they are to be multiplied with."""
    pairs = s.shuffle(s.signed(s.load(vec(i8, 16), w, 192), i16), [k // 2 for k in range(32)])
    return s.bits(pairs, i32), splat_half(s, w, 208, 16)


def scales(s, w, n):
    """The 16 scales; the mins follow from `offset`."""
    return s.b.fmul(s.to_float(s.signed(s.load(vec(i8, 16), w, 192))), splat_half(s, w, 208, 16)), None
