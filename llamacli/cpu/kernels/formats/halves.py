"""What the 32-weight formats share: half-float heads, nibbles with the low ones first, a fifth bit for each weight."""

from llvmlite import ir

from llamacli.cpu.kernels.jit.simd import f16, i1, i8, i16, i32, vec


def half_scales(s, w, n, stride, at=0):
    """n half floats, `stride` bytes apart from w + at on, as a float32 vector."""
    v = s.undefined_or_zeros(f16, n)
    for k in range(n):
        v = s.b.insert_element(v, s.load(f16, w, k * stride + at), i32(k))
    return s.from_half(v)


def splat_half(s, w, at, n):
    """One half float at w + at in n float32 lanes."""
    if s.width == 64 or not s.target.half:
        return s.splat(s.from_half(s.load(f16, w, at)), n)
    eight = s.from_half(s.bits(s.splat(s.load(i16, w, at), 8), f16))
    return s.shuffle(eight, [0] * n)


def nibbles(s, w, at):
    """16 bytes at w + at as 32 values: the low nibbles, then the high ones."""
    q = s.load(vec(i8, 16), w, at)
    return s.concat(s.b.and_(q, s.fill(i8, 16, 15)), s.b.lshr(q, s.fill(i8, 16, 4)))


def with_fifth_bits(s, low, w, at):
    """`low` with bit k of the word at w + at as bit 4 of value k."""
    bits = s.b.bitcast(s.load(i32, w, at), vec(i1, 32))
    return s.b.select(bits, s.b.or_(low, s.fill(i8, 32, 16)), low)


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


NIBBLE_ORDER = (0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15)  # of the pieces of 16 weights in `nibble_codes`


def nibble_codes(s, w, at, stride):
    """A superblock of nibbles, 16 bytes of each 32 weights `stride` bytes apart, as 4 registers of 64 in NIBBLE_ORDER."""
    codes = []
    for half in range(2):
        if stride == 16:
            q = s.load(vec(i8, 64), w, at + 64 * half)
        else:
            a, b, c, d = (s.load(vec(i8, 16), w, at + stride * (4 * half + k)) for k in range(4))
            q = s.concat(s.concat(a, b), s.concat(c, d))
        codes += [s.b.and_(q, s.fill(i8, 64, 15)), s.b.lshr(q, s.fill(i8, 64, 4))]
    return codes
