"""IQ4_XS: 256 weights in 136 bytes, 8 groups of 32 with 6-bit signed scales; weight = d * scale * level of IQ4_NL's table.

Layout: llamacli/cpu/kernels/formats/iq4_xs.py.
"""

from llvmlite import ir

from llamacli.cpu.kernels.formats.iq4_nl import LEVELS as TABLE
from llamacli.cpu.kernels.jit.simd import i8, i16, vec
from quantize.encoders.blocks import nibbles
from quantize.encoders.levels import Integers, Table

BLOCK, NBYTES, GROUP, SIDES = 256, 136, 32, 1
LEVELS, INTEGERS, BIAS = Table(TABLE), Integers(-32, 31), 32
GRID, POLISH, AROUND, REFITS = (-0.2, 0.03, 15), 1, ((-1, 3),), 2
LIMIT = 65504.0 * 32


def pack(s, out, p):
    """One block to its bytes."""
    scales = p.scales(s, 0, 8)
    s.store(p.d(s), out)
    high = s.b.shl(s.unsigned(s.b.lshr(scales, s.fill(i8, 8, 4)), i16), ir.Constant(vec(i16, 8), [2 * k for k in range(8)]))
    word = s.b.extract_element(high, ir.IntType(32)(0))
    for k in range(1, 8):
        word = s.b.or_(word, s.b.extract_element(high, ir.IntType(32)(k)))
    s.store(word, out, 2)
    low = s.b.and_(scales, s.fill(i8, 8, 15))
    even, odd = s.shuffle(low, [0, 2, 4, 6]), s.shuffle(low, [1, 3, 5, 7])
    s.store(s.b.or_(even, s.b.shl(odd, s.fill(i8, 4, 4))), out, 4)
    for k in range(8):
        s.store(nibbles(s, p, 32 * k), out, 8 + 16 * k)
