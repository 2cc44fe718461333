"""IQ4_NL: 32 weights in 18 bytes, a half and nibbles that index a table of 16 levels; weight = d * level."""

from llamacli.cpu.kernels.formats.iq4_nl import LEVELS as TABLE
from quantize.encoders.blocks import nibbles
from quantize.encoders.levels import Table

BLOCK, NBYTES, GROUP, SIDES = 32, 18, 32, 1
LEVELS, INTEGERS = Table(TABLE), None
GRID, POLISH = (-0.2, 0.03, 15), 2
LIMIT = 65504.0 * 113


def pack(s, out, p):
    """One block to its bytes."""
    s.store(p.d(s), out)
    s.store(nibbles(s, p), out, 2)
