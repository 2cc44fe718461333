"""Q6_K: 256 weights in 210 bytes, 16 groups of 16 with signed 8-bit scales; weight = d * scale * (q - 32).

Layout: llamacli/cpu/kernels/formats/q6_k.py.
"""

from llamacli.cpu.kernels.jit.simd import i8
from quantize.encoders.levels import Integers, Uniform

BLOCK, NBYTES, GROUP, SIDES = 256, 210, 16, 1
LEVELS, INTEGERS, BIAS = Uniform(-32, 31), Integers(-128, 127), 0
GRID, POLISH, AROUND, REFITS = (-0.06, 0.006, 20), 2, ((-1, 3),), 2
LIMIT = 65504.0 * 128


def pack(s, out, p):
    """One block to its bytes."""
    c = lambda value: s.fill(i8, 32, value)
    for half in range(2):
        q = [p.codes(s, 128 * half + 32 * k) for k in range(4)]
        for k in range(2):
            s.store(s.b.or_(s.b.and_(q[k], c(15)), s.b.shl(q[k + 2], c(4))), out, 64 * half + 32 * k)
        top = c(0)
        for k in range(4):
            top = s.b.or_(top, s.b.shl(s.b.lshr(q[k], c(4)), c(2 * k)))
        s.store(top, out, 128 + 32 * half)
    s.store(p.scales(s, 0, 16), out, 192)
    s.store(p.d(s), out, 208)
