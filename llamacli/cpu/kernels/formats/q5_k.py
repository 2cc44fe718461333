"""Q5_K: Q4_K with a fifth bit; 256 weights in 176 bytes, weight = d * scale * q - dmin * min.

Layout: half d, half dmin, 12 bytes of scales as in Q4_K, 32 bytes of high bits (bit g of byte l belongs to weight l of group
g), 128 bytes of nibbles. Source: ggml-common.h, block_q5_K.
"""

from llamacli.cpu.kernels.formats.q4_k import scales, whole_scales
from llamacli.cpu.kernels.jit.simd import i8, vec

block, nbytes, group, offset, largest = 256, 176, 32, None, 31


def piece(s, w, j):
    """Weights 32j..32j+31 as unsigned bytes."""
    c = lambda value: s.fill(i8, 32, value)
    q = s.load(vec(i8, 32), w, 48 + 32 * (j // 2))
    low = s.b.lshr(q, c(4)) if j % 2 else s.b.and_(q, c(15))
    high = s.b.and_(s.b.lshr(s.load(vec(i8, 32), w, 16), c(j)), c(1))
    return s.b.or_(low, s.b.shl(high, c(4)))


def crossed(s, w, j):
    """Weights of groups j and j + 4. Their fifth bits lie four apart in the same bytes, so one shift serves both."""
    at, found = 48 + 32 * (j // 2), []
    for half in (0, 16):
        q = s.concat(*(s.load(vec(i8, 16), w, at + half + k) for k in (0, 64)))
        low = s.b.lshr(q, s.fill(i8, 32, 4)) if j % 2 else s.b.and_(q, s.fill(i8, 32, 15))
        high = s.load(vec(i8, 16), w, 16 + half)
        high = s.b.lshr(s.concat(s.b.shl(high, s.fill(i8, 16, 4)), high), s.fill(i8, 32, j))
        found.append(s.b.or_(low, s.b.and_(high, s.fill(i8, 32, 16))))
    return found


__all__ = ["block", "crossed", "group", "largest", "nbytes", "offset", "piece", "scales", "whole_scales"]
