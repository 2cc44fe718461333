"""IQ4_XS: 256 weights in 136 bytes, 8 groups of 32 with 6-bit scales; weight = d * (scale - 32) * level of IQ4_NL's table.

Layout: half d, 16 bits with the high two bits of each scale, 4 bytes of low nibbles, 8 times 16 bytes of nibbles.
Source: ggml-common.h, block_iq4_xs.
"""

from llvmlite import ir

from llamacli.cpu.kernels.formats.halves import NIBBLE_ORDER, crossed_nibbles, nibble_codes, nibbles, splat_half
from llamacli.cpu.kernels.formats.iq4_nl import LEVELS, SHIFTED
from llamacli.cpu.kernels.jit.simd import i8, i16, vec

block, nbytes, group, offset, largest = 256, 136, 32, 128, 255
order = NIBBLE_ORDER


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
    low = s.unsigned(s.shuffle(s.load(vec(i8, 4), w, 4), [i // 2 for i in range(8)]), i16)
    low = s.b.and_(s.b.lshr(low, ir.Constant(vec(i16, 8), [4 * (i % 2) for i in range(8)])), s.fill(i16, 8, 15))
    high = s.b.lshr(s.splat(s.load(i16, w, 2), 8), ir.Constant(vec(i16, 8), [2 * i for i in range(8)]))
    high = s.b.shl(s.b.and_(high, s.fill(i16, 8, 3)), s.fill(i16, 8, 4))
    six = s.b.sub(s.b.or_(low, high), s.fill(i16, 8, 32))
    return s.b.fmul(s.to_float(s.signed(six)), splat_half(s, w, 0, 8)), None


def codes(s, w):
    """Weights as 4 registers in `order`."""
    return [s.lookup(SHIFTED, q) for q in nibble_codes(s, w, 8, 16)]
