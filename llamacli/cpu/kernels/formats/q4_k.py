"""Q4_K: 256 weights in 144 bytes, 8 groups of 32 with 6-bit scales and mins; weight = d * scale * q - dmin * min.

Layout: half d, half dmin, 12 bytes of packed scales and mins, 128 bytes of nibbles; of each 32 bytes the low nibbles are group
2k, the high ones group 2k + 1. Source: ggml-common.h, block_q4_K.
"""

from llvmlite import ir

from llamacli.cpu.kernels.formats.halves import splat_half
from llamacli.cpu.kernels.jit.simd import i8, i32, vec

block, nbytes, group, offset, largest = 256, 144, 32, None, 15
order = (0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)  # of the pieces of 16 weights in `codes`


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
    side = lambda k, at: s.b.fmul(s.to_float(s.unsigned(s.shuffle(packed, list(range(k, k + 8))))), splat_half(s, w, at, 8))
    return side(0, 0), side(8, 2)


def codes(s, w):
    """The nibbles as 4 registers in `order`: two hold the two halves of the same 4 groups, so that their products add up before
    they are scaled. High nibbles stay where they are, as 16 times the value, if the CPU multiplies such bytes.
    """
    halves = [s.load(vec(i8, 64), w, 16 + 64 * h) for h in range(2)]
    quarters = [[k for q in (0, 2, 4, 6) for k in range(16 * (q + p), 16 * (q + p) + 16)] for p in range(2)]
    q = [s.shuffle(halves[0], pick, halves[1]) for pick in quarters]
    low = [s.b.and_(v, s.fill(i8, 64, 15)) for v in q]
    high = [s.b.and_(v, s.fill(i8, 64, 0xF0)) if _in_place(s) else s.b.lshr(v, s.fill(i8, 64, 4)) for v in q]
    return [*low, *high]


def factors(s):
    """What the sums of each group of `codes` are to be multiplied with."""
    return [1.0, 1 / 16 if _in_place(s) else 1.0] * 4


def _in_place(s):
    return s.target.dot == "vnni"


def six_bits(s, v):
    """8 scales, then 8 mins, as bytes, for each 4 words: the 12 bytes of the scales and four of the nibbles."""
    n = v.type.count // 4
    rows = lambda lanes: [4 * r + lane for r in range(n) for lane in lanes]
    low, wide = [0x3F3F3F3F, 0x0F0F0F0F] * (2 * n), [0, 0x30303030] * (2 * n)
    four = s.b.lshr(s.shuffle(v, rows([0, 2, 1, 2])), ir.Constant(v.type, [0, 0, 0, 4] * n))
    four = s.b.and_(four, ir.Constant(v.type, low))
    two = s.b.and_(s.b.lshr(s.shuffle(v, rows([0, 0, 1, 1])), s.fill(i32, 4 * n, 2)), ir.Constant(v.type, wide))
    return s.bits(s.b.or_(four, two), i8)
