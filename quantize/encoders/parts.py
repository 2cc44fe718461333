"""Building blocks of both searches for scales: passes over a group's weights, comparison of candidates, half floats and
integers near a value.

In and out: vectors of LANES numbers, one for each group; `room` is where search.py keeps the groups.
"""

from typing import NamedTuple

from llvmlite import ir

from llamacli.cpu.kernels.jit.simd import f32, i8, i32, i64, vec
from quantize.encoders.levels import LANES, Uniform, splat

UNROLL = 4
SHIFT = 0.6  # levels between the minimums to begin from: the lowest weight may be worth giving up
SHIFTS, WEIGHTED_SHIFTS = 2, 4  # how many; with weights the lowest one may matter little
SLIGHT = 0.01  # share of w x^2, times levels squared, below which a weight may be given up whatever the span
TIE = 2e-7  # of the error taken off: less is rounding
EXACT = 0.1  # the same share: a fit with less error is exact but for the rounding of half floats
CLOSED = 5e-7  # of the energy: how far the closed form of the error may be off by rounding
SPANS = 16  # of levels, tried where the fit is all but exact
HALVES = 12  # half floats to begin a superblock from
HALF_MAX, HALF_MIN = 65504.0, 2.0**-24


def by_register(s, split, part, *vectors):
    """`part(first, *halves)` for as many lanes as a register has, from lane `first` on; its results with all lanes again.

    Without `split`, or where a register holds LANES numbers, that is one call. A loop over all LANES keeps two registers of
    every sum and constant where a register has 32 bytes. Where these are more than there are registers, what does not fit is
    stored and loaded again for every weight.
    """
    n = min(s.lanes, LANES) if split else LANES
    found = []
    for first in range(0, LANES, n):
        lanes = list(range(first, first + n))
        found.append(part(first, *(v and s.shuffle(v, lanes) for v in vectors)))
    while len(found) > 1:
        found = [[s.concat(a, b) for a, b in zip(*two, strict=True)] for two in zip(found[::2], found[1::2], strict=True)]
    return found[0]


def pass_over(s, fmt, room, inverse, offset, origin=None):
    """Sums of w l, w l^2 and w x l for the levels l nearest to x * inverse + offset; affine's count from `origin`."""
    values = room.x if origin is None else room.centred

    def part(first, inverse, offset, origin):
        n = inverse.type.count

        def some(i, sums):
            total, square, product = sums
            for j in range(UNROLL):
                at = s.add(s.mul(s.add(s.mul(i, UNROLL), j), 4 * LANES), 4 * first)
                x = s.load(vec(f32, n), s.add(values, at))
                t = s.fma(x, inverse, offset)
                level = fmt.LEVELS.level(s, t) if origin is None else fmt.LEVELS.level(s, t, origin)
                part = level if room.w is None else s.b.fmul(level, s.load(vec(f32, n), s.add(room.w, at)))
                total = s.b.fadd(total, part)
                square, product = s.fma(part, level, square), s.fma(part, x, product)
            return [total, square, product]

        return s.loop(fmt.GROUP // UNROLL, [s.zeros(f32, n)] * 3, some)

    return by_register(s, origin is not None, part, inverse, offset, origin)


class Left(NamedTuple):
    """Sums over the residuals e = x - a l + m, for the levels l that `_codes` would choose for a and m."""

    level: ir.Value  # w l
    l2: ir.Value  # w l^2
    el: ir.Value  # w e l
    e: ir.Value  # w e
    e2: ir.Value  # w e^2, the error


def left_over(s, fmt, room, a, m):
    """The error, summed weight by weight: where the fit is almost exact, the closed form is only rounding error."""
    inverse = inverse_of(s, a)

    def part(first, a, m, inverse, offset, minus):
        n = a.type.count

        def some(i, sums):
            total, square, product, rest, error = sums
            for j in range(UNROLL):
                at = s.add(s.mul(s.add(s.mul(i, UNROLL), j), 4 * LANES), 4 * first)
                x = s.load(vec(f32, n), s.add(room.x, at))
                level = fmt.LEVELS.level(s, s.fma(x, inverse, offset))
                e = s.fma(level, minus, s.b.fadd(x, m))
                part, left = level, e
                if room.w is not None:
                    w = s.load(vec(f32, n), s.add(room.w, at))
                    part, left = s.b.fmul(level, w), s.b.fmul(e, w)
                total, square, product = s.b.fadd(total, part), s.fma(part, level, square), s.fma(part, e, product)
                rest, error = s.b.fadd(rest, left), s.fma(left, e, error)
            return [total, square, product, rest, error]

        return s.loop(fmt.GROUP // UNROLL, [s.zeros(f32, n)] * 5, some)

    return Left(*by_register(s, True, part, a, m, inverse, s.b.fmul(m, inverse), s.b.fneg(a)))


def extremes(s, fmt, room, values, least=None):
    """Least and largest weight, and the sums of w, w x and w x^2; weights with w x^2 below `least` count as 0."""

    def some(j, found):
        low, high, total, product, square = found
        at = s.mul(j, 4 * LANES)
        x = s.load(vec(f32, LANES), s.add(values, at))
        w = splat(s, 1.0) if room.w is None else s.load(vec(f32, LANES), s.add(room.w, at))
        wx = s.b.fmul(w, x)
        size = s.b.fmul(wx, x)
        if least is not None:
            x = s.b.select(s.b.fcmp_ordered("<", size, least), s.zeros(f32, LANES), x)
        return [s.fmin(low, x), s.fmax(high, x), s.b.fadd(total, w), s.b.fadd(product, wx), s.b.fadd(square, size)]

    return s.loop(fmt.GROUP, [splat(s, 3e38), splat(s, -3e38), *[s.zeros(f32, LANES)] * 3], some)


def centre(s, fmt, room, mean):
    """The weights less their mean, to room.centred; the sum of w x of these, and of w x^2."""

    def some(j, sums):
        at = s.mul(j, 4 * LANES)
        x = s.b.fsub(s.load(vec(f32, LANES), s.add(room.x, at)), mean)
        s.store(x, s.add(room.centred, at))
        wx = x if room.w is None else s.b.fmul(x, s.load(vec(f32, LANES), s.add(room.w, at)))
        return [s.b.fadd(sums[0], wx), s.fma(wx, x, sums[1])]

    return s.loop(fmt.GROUP, [s.zeros(f32, LANES)] * 2, some)


def over_block(s, v, op, span):
    """`op` over every `span` neighbouring lanes, the result in each of them."""
    step = 1
    while step < span:
        v = op(v, s.shuffle(v, [lane ^ step for lane in range(LANES)]))
        step *= 2
    return v


def ratio_of(s, a, b):
    """a / b, or 0 where b is not above 0."""
    above = s.b.fcmp_ordered(">", b, s.zeros(f32, LANES))
    return s.b.select(above, s.b.fdiv(a, s.b.select(above, b, splat(s, 1.0))), s.zeros(f32, LANES))


def inverse_of(s, a):
    """1 / a, or 0 where |a| is at most 1e-30."""
    sane = s.b.fcmp_ordered(">", s.fabs(a), splat(s, 1e-30))
    return s.b.select(sane, s.b.fdiv(splat(s, 1.0), s.b.select(sane, a, splat(s, 1.0))), s.zeros(f32, LANES))


def half_of(s, v):
    """v rounded to half precision, bounded to finite values, as float32."""
    bounded = s.fmin(s.fmax(v, splat(s, -HALF_MAX)), splat(s, HALF_MAX))
    return s.from_half(s.to_half(bounded))


def unit_of(s, v):
    """As `half_of`, but only zero becomes zero: smaller values become the smallest half float. Zero is tried as a candidate of
    its own.
    """
    zero = s.zeros(f32, LANES)
    above, below = (
        s.b.select(s.b.fcmp_ordered(op, v, zero), splat(s, at), zero) for op, at in ((">", HALF_MIN), ("<", -HALF_MIN))
    )
    return s.b.select(s.b.fcmp_ordered("<", s.fabs(v), splat(s, HALF_MIN)), s.b.fadd(above, below), half_of(s, v))


def steps_of(s, h):
    """The half floats above and below h; of zero, the smallest ones of both signs."""
    step = s.fmax(s.b.fmul(s.fabs(h), splat(s, 0.75 * 2.0**-10)), splat(s, HALF_MIN))
    return half_of(s, s.b.fadd(h, step)), half_of(s, s.b.fsub(h, step))


def any_of(s, lanes, count):
    """`count` rounds if any of these lanes is true, else none."""
    found = s.reduce_max(s.b.select(lanes, splat(s, 1.0), s.zeros(f32, LANES)))
    return s.b.select(s.b.fcmp_ordered(">", found, f32(0.0)), i64(count), i64(0))


def whole_of(s, v, integers):
    return Uniform(*integers).level(s, v)


def better(s, new, old, error, least):
    """Lane by lane the candidate of smaller error: (values, error)."""
    wins = s.b.fcmp_ordered("<", error, least)
    return [s.b.select(wins, a, b) for a, b in zip(new, old, strict=True)], s.b.select(wins, error, least)


def clearly_better(s, new, old, error, least, slight):
    """As `better`, but the new candidate must win by more than rounding error, so that similar groups get similar scales."""
    margin = s.fma(s.fabs(least), splat(s, TIE), slight)
    values, _ = better(s, [*new, error], [*old, least], error, s.b.fsub(least, margin))
    return values[:-1], values[-1]


def exact_levels(s, fmt, span, least, most, best, attempt):
    """Where the fit is almost exact, the rounding of the half float decides.

    For those lanes try a scale for each level that `span` could be.
    """
    exact = s.b.fcmp_ordered("<", least, s.b.fmul(most, splat(s, EXACT / len(fmt.LEVELS.values) ** 2)))
    levels = [v for v in fmt.LEVELS.values if v]
    inverses = ir.Constant(vec(f32, len(levels)), [1 / v for v in levels])

    def one(i, best):
        found = attempt(unit_of(s, s.b.fmul(span, s.splat(s.b.extract_element(inverses, i), LANES))), best)
        return [s.b.select(exact, new, old) for new, old in zip(found, best, strict=True)]

    return s.loop(any_of(s, exact, len(levels)), best, one)


def nearest_half(s, values, cost, furthest, fmt, total, count):
    """The half float of which integers come nearest to `values` over a superblock, `furthest` at or near the integers' end."""
    end = fmt.INTEGERS.low or fmt.INTEGERS.high
    step = (0.5 if abs(end) <= 32 else 1.0) * (-1 if end > 0 else 1)
    ends = [end + step * (i - 1) for i in range(count)]
    inverses = ir.Constant(vec(f32, count), [1 / v for v in ends])
    share, minus = s.b.fmul(values, inverse_of(s, furthest)), s.b.fneg(values)

    def one(i, best):
        d = unit_of(s, s.b.fmul(furthest, s.splat(s.b.extract_element(inverses, i), LANES)))
        integer = whole_of(s, s.b.fmul(share, grid_at(s, i, ends[0], step)), fmt.INTEGERS)
        off = s.fma(d, integer, minus)
        (d,), error = better(s, [d], best[:1], total(s.b.fmul(s.b.fmul(off, off), cost)), best[1])
        return [d, error]

    return s.loop(count, [s.zeros(f32, LANES), splat(s, 3e38)], one)[0]


def grid_at(s, i, first, step):
    """first + i * step in every lane."""
    return s.splat(s.b.fadd(s.b.fmul(s.b.sitofp(i, f32), f32(step)), f32(first)), LANES)


def finish(s, room, scale, minimum, d, m, scales, mins):
    inverse = inverse_of(s, scale)
    s.store(inverse, room.inverse)
    s.store(s.b.fneg(s.b.fmul(minimum, inverse)), room.offset)
    s.store(s.to_half(d), room.d)
    s.store(s.to_half(m), room.m)
    for v, to in ((scales, room.scales), (mins, room.mins)):
        s.store(s.b.trunc(s.b.fptosi(v, vec(i32, LANES)), vec(i8, LANES)), to)
