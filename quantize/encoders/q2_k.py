"""Q2_K: 256 weights in 84 bytes, 16 groups of 16 with 4-bit scales and minimums; weight = d * scale * q - dmin * min.

Layout: llamacli/cpu/kernels/formats/q2_k.py.
"""

from llamacli.cpu.kernels.jit.simd import i8
from quantize.encoders.levels import Integers, Uniform

BLOCK, NBYTES, GROUP, SIDES = 256, 84, 16, 2
LEVELS, INTEGERS = Uniform(0, 3), Integers(0, 15)
GRID, POLISH, AROUND, REFITS = (-0.9, 0.15, 14), 2, ((-2, 5), (-1, 3)), 3
LIMIT = 65504.0 * 15


def pack(s, out, p):
    """One block to its bytes."""
    s.store(s.b.or_(p.scales(s, 0, 16), s.b.shl(p.mins(s, 0, 16), s.fill(i8, 16, 4))), out)
    bit_pairs(s, out, 16, p)
    s.store(p.d(s), out, 80)
    s.store(p.m(s), out, 82)


def bit_pairs(s, out, at, p):
    """The two low bits of all codes in the 64 bytes at out + at."""
    c = lambda value: s.fill(i8, 32, value)
    for half in range(2):
        byte = c(0)
        for j in range(4):
            byte = s.b.or_(byte, s.b.shl(s.b.and_(p.codes(s, 128 * half + 32 * j), c(3)), c(2 * j)))
        s.store(byte, out, at + 32 * half)
