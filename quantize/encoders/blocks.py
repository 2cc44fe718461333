"""Bytes that the formats of 32 weights share: nibbles, and a word of fifth bits."""

from llamacli.cpu.kernels.jit.simd import i8, i32


def nibbles(s, p, at=0):
    """The low nibbles of 32 codes: byte j holds code j and, above it, code 16 + j."""
    return interleaved(s, p.codes(s, at, 16), p.codes(s, at + 16, 16))


def interleaved(s, low, high):
    """Two nibbles to a byte."""
    return s.b.or_(s.b.and_(low, s.fill(i8, 16, 15)), s.b.shl(high, s.fill(i8, 16, 4)))


def fifth_bits(s, p):
    """Bit j is the fifth bit of code j."""
    above = s.b.icmp_unsigned(">", p.codes(s, 0), s.fill(i8, 32, 15))
    return s.b.bitcast(above, i32)
