"""Q4_1: 32 weights in 20 bytes, half scale, half minimum, 32 nibbles; weight = d * q + m."""

from quantize.encoders.blocks import nibbles
from quantize.encoders.levels import Uniform

BLOCK, NBYTES, GROUP, SIDES = 32, 20, 32, 2
LEVELS, INTEGERS = Uniform(0, 15), None
GRID, POLISH = (-2.0, 0.2, 16), 2
LIMIT = 65504.0


def pack(s, out, p):
    """One block to its bytes."""
    s.store(p.d(s), out)
    s.store(p.m(s), out, 2)
    s.store(nibbles(s, p), out, 4)
