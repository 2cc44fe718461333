"""Q5_K: Q4_K with a fifth bit; 256 weights in 176 bytes, weight = d * scale * q - dmin * min.

Layout: half d, half dmin, 12 bytes of scales as in Q4_K, 32 bytes of high bits (bit g of byte l belongs to weight l of group
g), 128 bytes of nibbles. Source: ggml-common.h, block_q5_K.
"""

from llamacli.cpu.kernels.formats.q4_k import pair, scales
from llamacli.cpu.kernels.jit.simd import i8, vec

block, nbytes, group, offset, wide = 256, 176, 32, None, False


def piece(s, w, j):
    """Weights 32j..32j+31 as unsigned bytes."""
    c = lambda value: s.fill(i8, 32, value)  # noqa: E731
    q = s.load(vec(i8, 32), w, 48 + 32 * (j // 2))
    low = s.b.lshr(q, c(4)) if j % 2 else s.b.and_(q, c(15))
    high = s.b.and_(s.b.lshr(s.load(vec(i8, 32), w, 16), c(j)), c(1))
    return s.b.or_(low, s.b.shl(high, c(4)))


__all__ = ["block", "group", "nbytes", "offset", "pair", "piece", "scales", "wide"]
