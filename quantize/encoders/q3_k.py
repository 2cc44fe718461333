"""Q3_K: 256 weights in 110 bytes, 16 groups of 16 with 6-bit signed scales; weight = d * scale * (q - 4).

Layout: llamacli/cpu/kernels/formats/q3_k.py.
"""

from llamacli.cpu.kernels.jit.simd import i8
from quantize.encoders.levels import Integers, Uniform
from quantize.encoders.q2_k import bit_pairs

BLOCK, NBYTES, GROUP, SIDES = 256, 110, 16, 1
LEVELS, INTEGERS, BIAS = Uniform(-4, 3), Integers(-32, 31), 32
GRID, POLISH, AROUND, REFITS = (-0.3, 0.05, 16), 2, ((-1, 3),), 2
LIMIT = 65504.0 * 32


def pack(s, out, p):
    """One block to its bytes."""
    c = lambda value, n: s.fill(i8, n, value)
    third = c(0, 32)
    for k in range(8):
        third = s.b.or_(third, s.b.shl(s.b.lshr(p.codes(s, 32 * k), c(2, 32)), c(k, 32)))
    s.store(third, out)
    bit_pairs(s, out, 32, p)
    low, high = p.scales(s, 0, 8), p.scales(s, 8, 8)
    s.store(s.b.or_(s.b.and_(low, c(15, 8)), s.b.shl(high, c(4, 8))), out, 96)
    tops = c(0, 4)
    for k in range(4):
        tops = s.b.or_(tops, s.b.shl(s.b.lshr(p.scales(s, 4 * k, 4), c(4, 4)), c(2 * k, 4)))
    s.store(tops, out, 104)
    s.store(p.d(s), out, 108)
