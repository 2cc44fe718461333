"""Q4_0: 32 weights in 18 bytes, a half scale and 16 bytes of nibbles (low nibbles first); weight = d * (q - 8).

`piece` and `scales` are the two questions dots.py asks of every block format. Source: ggml-common.h, block_q4_0.
"""

from llamacli.kernels.halves import half_scales
from llamacli.kernels.simd import i8, vec

block, nbytes, group, offset, wide = 32, 18, 32, 8, False


def piece(s, w, j):
    """Weights 32j..32j+31 as unsigned bytes."""
    q = s.load(vec(i8, 16), w, 18 * j + 2)
    return s.concat(s.b.and_(q, s.fill(i8, 16, 15)), s.b.lshr(q, s.fill(i8, 16, 4)))


def scales(s, w, n):
    """The scales of n blocks; the mins follow from `offset`."""
    return half_scales(s, w, n, nbytes), None
