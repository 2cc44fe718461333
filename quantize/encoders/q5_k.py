"""Q5_K: 256 weights in 176 bytes, 8 groups of 32 with 6-bit scales and minimums; weight = d * scale * q - dmin * min.

Layout: llamacli/cpu/kernels/formats/q5_k.py.
"""

from llamacli.cpu.kernels.jit.simd import i8
from quantize.encoders.levels import Integers, Uniform
from quantize.encoders.q4_k import six_bits

BLOCK, NBYTES, GROUP, SIDES = 256, 176, 32, 2
LEVELS, INTEGERS = Uniform(0, 31), Integers(0, 63)
GRID, POLISH, AROUND, REFITS = (-2.0, 0.25, 14), 2, ((-1, 3),), 2
LIMIT = 65504.0 * 63


def pack(s, out, p):
    """One block to its bytes."""
    c = lambda value: s.fill(i8, 32, value)
    s.store(p.d(s), out)
    s.store(p.m(s), out, 2)
    six_bits(s, out, p)
    fifth = c(0)
    for k in range(8):
        fifth = s.b.or_(fifth, s.b.shl(s.b.lshr(p.codes(s, 32 * k), c(4)), c(k)))
    s.store(fifth, out, 16)
    for k in range(4):
        low, high = p.codes(s, 64 * k), p.codes(s, 64 * k + 32)
        s.store(s.b.or_(s.b.and_(low, c(15)), s.b.shl(high, c(4))), out, 48 + 32 * k)
