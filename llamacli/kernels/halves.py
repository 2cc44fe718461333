"""What the 32-weight formats share: half-float heads, nibbles with the low ones first, a fifth bit for each weight."""

from llvmlite import ir

from llamacli.kernels.simd import f16, i1, i8, i32, vec


def half_scales(s, w, n, stride, at=0):
    """n half floats, `stride` bytes apart from w + at on, as a float32 vector."""
    v = ir.Constant(vec(f16, n), ir.Undefined)
    for k in range(n):
        v = s.b.insert_element(v, s.load(f16, w, k * stride + at), i32(k))
    return s.from_half(v)


def splat_half(s, w, at, n):
    """One half float at w + at in n float32 lanes."""
    return s.splat(s.from_half(s.load(f16, w, at)), n)


def nibbles(s, w, at):
    """16 bytes at w + at as 32 values: the low nibbles, then the high ones."""
    q = s.load(vec(i8, 16), w, at)
    return s.concat(s.b.and_(q, s.fill(i8, 16, 15)), s.b.lshr(q, s.fill(i8, 16, 4)))


def with_fifth_bits(s, low, w, at):
    """`low` with bit k of the word at w + at as bit 4 of value k."""
    bits = s.b.bitcast(s.load(i32, w, at), vec(i1, 32))
    return s.b.select(bits, s.b.or_(low, s.fill(i8, 32, 16)), low)
