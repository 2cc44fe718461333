"""What the 32-weight formats share: half-float heads, nibbles with the low ones first, a fifth bit for each weight."""

from llvmlite import ir

from llamacli.cpu.kernels.jit.simd import f16, i8, i32, vec


def half_scales(s, w, n, stride, at=0):
    """n half floats, `stride` bytes apart from w + at on, as a float32 vector."""
    return s.from_half(s.vector([s.load(f16, w, k * stride + at) for k in range(n)]))


def nibbles(s, w, at):
    """16 bytes at w + at as 32 values: the low nibbles, then the high ones."""
    q = s.load(vec(i8, 16), w, at)
    return s.concat(s.b.and_(q, s.fill(i8, 16, 15)), s.b.lshr(q, s.fill(i8, 16, 4)))


def with_fifth_bits(s, low, w, at):
    """`low` with bit k of the word at w + at as bit 4 of value k."""
    spread = s.shuffle(s.load(vec(i8, 4), w, at), [k // 8 for k in range(32)])
    mask = s.each(i8, [1 << k % 8 for k in range(32)])
    is_set = s.b.icmp_unsigned("==", s.b.and_(spread, mask), mask)
    return s.b.select(is_set, s.b.or_(low, s.fill(i8, 32, 16)), low)


def crossed_nibbles(s, w, at, stride, j):
    """`crossed` of 16 bytes of nibbles for each 32 weights, `stride` bytes apart from w + at on."""
    q = s.concat(*(s.load(vec(i8, 16), w, at + stride * k) for k in (j, j + 4)))
    return [s.b.and_(q, s.fill(i8, 32, 15)), s.b.lshr(q, s.fill(i8, 32, 4))]


def crossed_fifth_bits(s, low, w, at, stride, j):
    """The registers `low` of `crossed`, with bit k of each 32 weights' word as bit 4 of value k."""
    words = s.concat(*(s.splat(s.load(i32, w, at + stride * k), 4) for k in (j, j + 4)))
    mask, found = ir.Constant(vec(i8, 32), [1 << k % 8 for k in range(32)]), []
    for half, q in enumerate(low):
        spread = s.shuffle(s.bits(words, i8), [16 * lane + 2 * half + k // 8 for lane in range(2) for k in range(16)])
        is_set = s.b.sext(s.b.icmp_unsigned("==", s.b.and_(spread, mask), mask), vec(i8, 32))
        found.append(s.b.or_(q, s.b.and_(is_set, s.fill(i8, 32, 16))))
    return found
