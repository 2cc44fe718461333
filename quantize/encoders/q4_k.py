"""Q4_K: 256 weights in 144 bytes, 8 groups of 32 with 6-bit scales and minimums; weight = d * scale * q - dmin * min.

Layout: llamacli/cpu/kernels/formats/q4_k.py.
"""

from llamacli.cpu.kernels.jit.simd import i8
from quantize.encoders.levels import Integers, Uniform

BLOCK, NBYTES, GROUP, SIDES = 256, 144, 32, 2
LEVELS, INTEGERS = Uniform(0, 15), Integers(0, 63)
GRID, POLISH, AROUND, REFITS = (-2.0, 0.2, 16), 2, ((-1, 3),), 2
LIMIT = 65504.0 * 63


def pack(s, out, p):
    """One block to its bytes."""
    s.store(p.d(s), out)
    s.store(p.m(s), out, 2)
    six_bits(s, out, p)
    for k in range(4):
        low, high = p.codes(s, 64 * k), p.codes(s, 64 * k + 32)
        s.store(s.b.or_(low, s.b.shl(high, s.fill(i8, 32, 4))), out, 16 + 32 * k)


def six_bits(s, out, p):
    """8 scales and 8 minimums in bytes 4 to 15."""
    c = lambda value: s.fill(i8, 4, value)
    tops = []
    for at, values in ((4, p.scales), (8, p.mins)):
        first, second = values(s, 0, 4), values(s, 4, 4)
        s.store(s.b.or_(first, s.b.shl(s.b.lshr(second, c(4)), c(6))), out, at)
        tops.append(s.b.and_(second, c(15)))
    s.store(s.b.or_(tops[0], s.b.shl(tops[1], c(4))), out, 12)
