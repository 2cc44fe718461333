"""Q5_1: 32 weights in 24 bytes, half scale, half minimum, 32 fifth bits, 32 nibbles; weight = d * q + m."""

from quantize.encoders.blocks import fifth_bits, nibbles
from quantize.encoders.levels import Uniform

BLOCK, NBYTES, GROUP, SIDES = 32, 24, 32, 2
LEVELS, INTEGERS = Uniform(0, 31), None
GRID, POLISH = (-2.0, 0.25, 14), 2
LIMIT = 65504.0


def pack(s, out, p):
    """One block to its bytes."""
    s.store(p.d(s), out)
    s.store(p.m(s), out, 2)
    s.store(fifth_bits(s, p), out, 4)
    s.store(nibbles(s, p), out, 8)
