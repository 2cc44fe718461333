"""IQ4_XS: 256 weights in 136 bytes, 8 groups of 32 with 6-bit scales; weight = d * (scale - 32) * level of IQ4_NL's table.

Layout: half d, 16 bits with the high two bits of each scale, 4 bytes of low nibbles, 8 times 16 bytes of nibbles.
Source: ggml-common.h, block_iq4_xs.
"""

from llamacli.cpu.kernels.formats.halves import crossed_nibbles, nibbles
from llamacli.cpu.kernels.formats.iq4_nl import LEVELS, SHIFTED
from llamacli.cpu.kernels.jit.simd import i32

block, nbytes, group, offset, largest = 256, 136, 32, 128, 255


def piece(s, w, j):
    """Weights 32j..32j+31 as unsigned bytes."""
    return s.lookup(SHIFTED, nibbles(s, w, 8 + 16 * j))


def crossed(s, w, j):
    """Weights of groups j and j + 4."""
    return [s.lookup(SHIFTED, q) for q in crossed_nibbles(s, w, 8, 16, j)]


def signed_piece(s, w, j):
    """Weights 32j..32j+31 as signed bytes."""
    return s.lookup(LEVELS, nibbles(s, w, 8 + 16 * j))


def signed_crossed(s, w, j):
    """Weights of groups j and j + 4 as signed bytes."""
    return [s.lookup(LEVELS, q) for q in crossed_nibbles(s, w, 8, 16, j)]


def scales(s, w, n):
    """The 8 scales; the mins follow from `offset`."""
    whole, d = whole_scales(s, w)
    return s.b.fmul(s.to_float(whole), d), None


def whole_scales(s, w):
    """The 8 scales as integers, and what they are to be multiplied with."""
    low, high = (s.splat(s.load(i32, w, at), 8) for at in (4, 0))
    low = s.b.and_(s.b.lshr(low, s.each(i32, [4 * i for i in range(8)])), s.fill(i32, 8, 15))
    high = s.b.and_(s.b.lshr(high, s.each(i32, [16 + 2 * i for i in range(8)])), s.fill(i32, 8, 3))
    six = s.b.sub(s.b.or_(low, s.b.shl(high, s.fill(i32, 8, 4))), s.fill(i32, 8, 32))
    return six, s.splat_half(w, 0, 8)
