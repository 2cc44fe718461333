"""Q8_0: 32 weights in 34 bytes, a half scale and 32 signed bytes; weight = d * q.

The bytes are read as q + 128, since dot4 wants them unsigned. Source: ggml-common.h, block_q8_0.
"""

from llamacli.cpu.kernels.formats.halves import half_scales
from llamacli.cpu.kernels.jit.simd import i8, vec

block, nbytes, group, offset, largest = 32, 34, 32, 128, 255


def piece(s, w, j):
    """Weights 32j..32j+31 as unsigned bytes."""
    return s.b.xor(s.load(vec(i8, 32), w, 34 * j + 2), s.fill(i8, 32, -128))


def signed_piece(s, w, j):
    """Weights 32j..32j+31 as signed bytes."""
    return s.load(vec(i8, 32), w, 34 * j + 2)


def scales(s, w, n):
    """The scales of n blocks; the mins follow from `offset`."""
    return half_scales(s, w, n, nbytes), None
