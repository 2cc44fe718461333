"""Q5_0: 32 weights in 22 bytes, half scale, 32 fifth bits, 32 nibbles; weight = d * (q - 16)."""

from quantize.encoders.blocks import fifth_bits, nibbles
from quantize.encoders.levels import Uniform

BLOCK, NBYTES, GROUP, SIDES = 32, 22, 32, 1
LEVELS, INTEGERS = Uniform(-16, 15), None
GRID, POLISH = (-0.12, 0.012, 20), 2
PLAIN_GRID = (-0.12, 0.024, 10)  # where all weights count alike: 0.04 % more error, a third of the time less
LIMIT = 65504.0 * 16


def pack(s, out, p):
    """One block to its bytes."""
    s.store(p.d(s), out)
    s.store(fifth_bits(s, p), out, 2)
    s.store(nibbles(s, p), out, 6)
