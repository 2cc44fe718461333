"""The search for scales: sixteen groups of weights side by side, one in each lane, every candidate tried on all of them.

In: float32 weights, and perhaps how much each column matters. Out: machine code that turns them into blocks. A group of 16 or
32 weights has one scale, or a scale and a minimum; the K formats store these as small integers times a half float for the
whole superblock of 8 or 16 groups, so a search has two floors:

    each group    scales on a grid -> codes -> the scale (and minimum) of least squared error for these codes, a few times over
    superblock    a half float -> integers near each group's scale, each tried with codes of its own -> the half float of least
                  squared error for these integers, and once more

The error is the plain squared one, or with weights the weighted one; nothing is guessed from magnitudes. `affine` is for
weight = scale * code + minimum, `linear` for weight = scale * level. What differs between formats, levels and layout of
bytes, is in the formats' own modules. Knows nothing of rows or threads.

The closed forms are least squares: for codes l, weight factors w and x ~ a l + b, the sums of w, w x, w l, w l^2 and w x l
say the best a and b, and the error without another look at the weights.
"""

from typing import NamedTuple

from llvmlite import ir

from llamacli.kernels.simd import Simd, f16, f32, i8, i32, i64, vec
from quantize.encoders.levels import LANES, ROUND, Uniform, splat

UNROLL = 4
SHIFT = 0.6  # levels between the minimums to begin from: the lowest weight may be worth giving up
SHIFTS, WEIGHTED_SHIFTS = 2, 4  # how many; the lowest one may matter little
SLIGHT = 0.01  # share of w x^2, times levels squared, below which a weight may be given up whatever the span
TIE = 2e-7  # of the error taken off: less is rounding
EXACT = 0.1  # share of w x^2, times levels squared: ten times closer than usual, the half floats' rounding is what is left
SPANS = 16  # of levels, tried where the fit is all but exact
HALVES = 12  # half floats to begin a superblock from
HALF_MAX, HALF_MIN = 65504.0, 2.0**-24
SYMBOLS = ("encode", "encode_weighted")


class Room(NamedTuple):
    """Addresses on the stack: the groups lane by lane, and what `pack` reads: a lane's inverse and offset, codes, factors."""

    x: ir.Value  # float32 [group][LANES]
    centred: ir.Value  # the same less each lane's mean
    w: ir.Value | None  # the same as x, or None
    inverse: ir.Value  # float32 [LANES]
    offset: ir.Value
    codes: ir.Value  # uint8 [LANES * group], in the order of the weights
    d: ir.Value  # half [LANES]
    m: ir.Value
    scales: ir.Value  # uint8 [LANES]
    mins: ir.Value


def build(fmt):
    """The builder of a format's module: encode(x, n_units, w, n_cols, out) and the same with weights.

    A unit is LANES groups: x float32, w float32 per column, repeated past n_cols by one unit; out `fmt.NBYTES` a block.
    """

    def module_for(target):
        module = ir.Module("encode")
        for name in SYMBOLS:
            _encoder(module, target, fmt, name)
        return module

    return module_for


def _encoder(module, target, fmt, name):
    s = Simd(module, target, name, 5)
    x0, n_units, w0, n_cols, out0 = s.args
    unit = LANES * fmt.GROUP
    weighted = name == "encode_weighted"
    if hasattr(fmt, "exact") and not weighted:
        fmt.exact(s, x0, s.mul(n_units, unit // fmt.BLOCK), out0)
        s.done()
        return
    lanes = lambda: s.room(f32, LANES)  # noqa: E731
    room = Room(
        s.room(f32, unit), s.room(f32, unit), s.room(f32, unit) if weighted else None, lanes(), lanes(), s.room(i8, unit),
        s.room(f16, LANES), s.room(f16, LANES), s.room(i8, LANES), s.room(i8, LANES),
    )  # fmt: skip
    per_block = fmt.BLOCK // fmt.GROUP

    def one(i, _):
        x = s.add(x0, s.mul(i, 4 * unit))
        _lane_by_lane(s, x, room.x, fmt.GROUP)
        if weighted:
            column = s.b.urem(s.mul(i, unit), n_cols)
            _lane_by_lane(s, s.add(w0, s.mul(column, 4)), room.w, fmt.GROUP)
        (affine if fmt.SIDES == 2 else linear)(s, fmt, room)
        _codes(s, fmt, x, room)
        for block in range(LANES // per_block):
            lane = block * per_block
            out = s.add(out0, s.mul(s.add(s.mul(i, LANES // per_block), block), fmt.NBYTES))
            fmt.pack(s, out, Packed(room, lane, fmt.GROUP))
        return []

    s.loop(n_units, [], one)
    s.done()


class Packed(NamedTuple):
    """What one block is packed from: the groups from `lane` on."""

    room: Room
    lane: int
    group: int

    def codes(self, s, at, n=32):
        """Codes `at` and following, one byte each."""
        return s.load(vec(i8, n), self.room.codes, self.lane * self.group + at)

    def scales(self, s, at, n):
        """Integer scales of groups `at` and following."""
        return s.load(vec(i8, n), self.room.scales, self.lane + at)

    def mins(self, s, at, n):
        """Integer minimums of groups `at` and following."""
        return s.load(vec(i8, n), self.room.mins, self.lane + at)

    def d(self, s):
        """The half float that scales are multiplied with."""
        return s.load(f16, self.room.d, 2 * self.lane)

    def m(self, s):
        """The half float of the minimums."""
        return s.load(f16, self.room.m, 2 * self.lane)


def _lane_by_lane(s, x, to, group):
    """LANES groups, one after the other, to [group][LANES]."""
    for half in range(group // LANES):
        rows = [s.load(vec(f32, LANES), x, 4 * (g * group + half * LANES)) for g in range(LANES)]
        for j, column in enumerate(s.transpose(rows)):
            s.store(column, to, 4 * LANES * (half * LANES + j))


def _codes(s, fmt, x, room):
    """The codes in the order of the weights, with the same arithmetic as the search's."""

    def one(g, _):
        inverse, offset = (s.splat(s.load(f32, s.add(at, s.mul(g, 4))), LANES) for at in (room.inverse, room.offset))
        for half in range(fmt.GROUP // LANES):
            at = s.add(s.mul(g, fmt.GROUP), half * LANES)
            t = s.fma(s.load(vec(f32, LANES), s.add(x, s.mul(at, 4))), inverse, offset)
            s.store(s.b.trunc(fmt.LEVELS.code(s, t), vec(i8, LANES)), s.add(room.codes, at))
        return []

    s.loop(LANES, [], one)


# parts of both searches


def _pass(s, fmt, room, inverse, offset, origin=None):
    """Sums of w l, w l^2 and w x l for the levels l nearest to x * inverse + offset; affine's count from `origin`."""
    values = room.x if origin is None else room.centred

    def some(i, sums):
        total, square, product = sums
        for j in range(UNROLL):
            at = s.mul(s.add(s.mul(i, UNROLL), j), 4 * LANES)
            x = s.load(vec(f32, LANES), s.add(values, at))
            t = s.fma(x, inverse, offset)
            level = fmt.LEVELS.level(s, t) if origin is None else fmt.LEVELS.level(s, t, origin)
            part = level if room.w is None else s.b.fmul(level, s.load(vec(f32, LANES), s.add(room.w, at)))
            total = s.b.fadd(total, part)
            square, product = s.fma(part, level, square), s.fma(part, x, product)
        return [total, square, product]

    return s.loop(fmt.GROUP // UNROLL, [s.zeros(f32, LANES)] * 3, some)


class Left(NamedTuple):
    """What is left, e = x - a l + m, for the levels l that `_codes` would choose for a and m: sums."""

    level: ir.Value  # w l
    l2: ir.Value  # w l^2
    el: ir.Value  # w e l
    e: ir.Value  # w e
    e2: ir.Value  # w e^2, the error


def _left(s, fmt, room, a, m):
    """The error itself, weight by weight: where the fit is all but exact, the closed form is all rounding."""
    inverse = _inverse(s, a)
    offset, minus = s.b.fmul(m, inverse), s.b.fneg(a)

    def some(i, sums):
        total, square, product, rest, error = sums
        for j in range(UNROLL):
            at = s.mul(s.add(s.mul(i, UNROLL), j), 4 * LANES)
            x = s.load(vec(f32, LANES), s.add(room.x, at))
            level = fmt.LEVELS.level(s, s.fma(x, inverse, offset))
            e = s.fma(level, minus, s.b.fadd(x, m))
            part, left = level, e
            if room.w is not None:
                w = s.load(vec(f32, LANES), s.add(room.w, at))
                part, left = s.b.fmul(level, w), s.b.fmul(e, w)
            total, square, product = s.b.fadd(total, part), s.fma(part, level, square), s.fma(part, e, product)
            rest, error = s.b.fadd(rest, left), s.fma(left, e, error)
        return [total, square, product, rest, error]

    return Left(*s.loop(fmt.GROUP // UNROLL, [s.zeros(f32, LANES)] * 5, some))


def _extremes(s, fmt, room, values, least=None):
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


def _centre(s, fmt, room, mean):
    """The weights less their mean, to room.centred; the sum of w x of these, and of w x^2."""

    def some(j, sums):
        at = s.mul(j, 4 * LANES)
        x = s.b.fsub(s.load(vec(f32, LANES), s.add(room.x, at)), mean)
        s.store(x, s.add(room.centred, at))
        wx = x if room.w is None else s.b.fmul(x, s.load(vec(f32, LANES), s.add(room.w, at)))
        return [s.b.fadd(sums[0], wx), s.fma(wx, x, sums[1])]

    return s.loop(fmt.GROUP, [s.zeros(f32, LANES)] * 2, some)


def _over_block(s, v, op, span):
    """`op` over every `span` neighbouring lanes, the result in each of them."""
    step = 1
    while step < span:
        v = op(v, s.shuffle(v, [lane ^ step for lane in range(LANES)]))
        step *= 2
    return v


def _ratio(s, a, b):
    """a / b, or 0 where b is not above 0."""
    above = s.b.fcmp_ordered(">", b, s.zeros(f32, LANES))
    return s.b.select(above, s.b.fdiv(a, s.b.select(above, b, splat(s, 1.0))), s.zeros(f32, LANES))


def _inverse(s, a):
    """1 / a, or 0 where that would not be a sane number."""
    sane = s.b.fcmp_ordered(">", s.fabs(a), splat(s, 1e-30))
    return s.b.select(sane, s.b.fdiv(splat(s, 1.0), s.b.select(sane, a, splat(s, 1.0))), s.zeros(f32, LANES))


def _half(s, v):
    """Rounded to half precision, finite, as float32."""
    bounded = s.fmin(s.fmax(v, splat(s, -HALF_MAX)), splat(s, HALF_MAX))
    return s.from_half(s.to_half(bounded))


def _unit(s, v):
    """The same, but only zero becomes zero: that is a candidate by itself."""
    zero = s.zeros(f32, LANES)
    above, below = (
        s.b.select(s.b.fcmp_ordered(op, v, zero), splat(s, at), zero) for op, at in ((">", HALF_MIN), ("<", -HALF_MIN))
    )
    return s.b.select(s.b.fcmp_ordered("<", s.fabs(v), splat(s, HALF_MIN)), s.b.fadd(above, below), _half(s, v))


def _steps(s, h):
    """A half float's neighbours, next to zero also zero's."""
    step = s.fmax(s.b.fmul(s.fabs(h), splat(s, 0.75 * 2.0**-10)), splat(s, HALF_MIN))
    return _half(s, s.b.fadd(h, step)), _half(s, s.b.fsub(h, step))


def _any(s, lanes, count):
    """`count` rounds if any of these lanes is true, else none."""
    found = s.reduce_max(s.b.select(lanes, splat(s, 1.0), s.zeros(f32, LANES)))
    return s.b.select(s.b.fcmp_ordered(">", found, f32(0.0)), i64(count), i64(0))


def _whole(s, v, integers):
    return Uniform(*integers).level(s, v)


def _better(s, new, old, error, least):
    """Lane by lane the candidate of smaller error: (values, error)."""
    wins = s.b.fcmp_ordered("<", error, least)
    return [s.b.select(wins, a, b) for a, b in zip(new, old, strict=True)], s.b.select(wins, error, least)


def _clearly_better(s, new, old, error, least, slight):
    """The same, but of equals the first stays, by more than rounding: groups that are alike get scales that are alike."""
    margin = s.fma(s.fabs(least), splat(s, TIE), slight)
    values, _ = _better(s, [*new, error], [*old, least], error, s.b.fsub(least, margin))
    return values[:-1], values[-1]


def _exact_levels(s, fmt, span, least, most, best, attempt):
    """Where the fit is all but exact, the half float decides: every level that `span` could be, for these lanes alone."""
    exact = s.b.fcmp_ordered("<", least, s.b.fmul(most, splat(s, EXACT / len(fmt.LEVELS.values) ** 2)))
    levels = [v for v in fmt.LEVELS.values if v]
    inverses = ir.Constant(vec(f32, len(levels)), [1 / v for v in levels])

    def one(i, best):
        found = attempt(_unit(s, s.b.fmul(span, s.splat(s.b.extract_element(inverses, i), LANES))), best)
        return [s.b.select(exact, new, old) for new, old in zip(found, best, strict=True)]

    return s.loop(_any(s, exact, len(levels)), best, one)


def _nearest_half(s, values, cost, furthest, fmt, total, count):
    """The half float of which integers come nearest to `values` over a superblock, `furthest` at or near the integers' end."""
    end = fmt.INTEGERS.low or fmt.INTEGERS.high
    step = (0.5 if abs(end) <= 32 else 1.0) * (-1 if end > 0 else 1)
    ends = [end + step * (i - 1) for i in range(count)]
    inverses = ir.Constant(vec(f32, count), [1 / v for v in ends])
    share, minus = s.b.fmul(values, _inverse(s, furthest)), s.b.fneg(values)

    def one(i, best):
        d = _unit(s, s.b.fmul(furthest, s.splat(s.b.extract_element(inverses, i), LANES)))
        integer = _whole(s, s.b.fmul(share, _grid(s, i, ends[0], step)), fmt.INTEGERS)
        off = s.fma(d, integer, minus)
        (d,), error = _better(s, [d], best[:1], total(s.b.fmul(s.b.fmul(off, off), cost)), best[1])
        return [d, error]

    return s.loop(count, [s.zeros(f32, LANES), splat(s, 3e38)], one)[0]


def _grid(s, i, first, step):
    """first + i * step in every lane."""
    return s.splat(s.b.fadd(s.b.fmul(s.b.sitofp(i, f32), f32(step)), f32(first)), LANES)


def _finish(s, room, scale, minimum, d, m, scales, mins):
    inverse = _inverse(s, scale)
    s.store(inverse, room.inverse)
    s.store(s.b.fneg(s.b.fmul(minimum, inverse)), room.offset)
    s.store(s.to_half(d), room.d)
    s.store(s.to_half(m), room.m)
    for v, to in ((scales, room.scales), (mins, room.mins)):
        s.store(s.b.trunc(s.b.fptosi(v, vec(i32, LANES)), vec(i8, LANES)), to)


# weight = scale * code + minimum


def affine(s, fmt, room):
    """Scale and minimum of each lane; minimums at most 0 where a superblock stores their negatives as unsigned integers."""
    b, top = s.b, float(fmt.LEVELS.high)
    zero = s.zeros(f32, LANES)
    low, high, sw, sx, sxx = _extremes(s, fmt, room, room.x)
    mean = _ratio(s, sx, sw)
    rest, spread = _centre(
        s, fmt, room, mean
    )  # from here on around the mean: a few heavy weights leave nothing of det otherwise
    unsigned = fmt.INTEGERS is not None
    if unsigned:
        low = s.fmin(low, zero)
    low, high = b.fsub(low, mean), b.fsub(high, mean)
    most, slight = b.fneg(mean), b.fmul(sxx, splat(s, 1e-12))

    def solve(inverse, minimum):
        """The best line through the codes of this inverse and minimum; its error less that of 0; the mean level, curvature."""
        offset = b.fneg(b.fmul(minimum, inverse))
        origin = fmt.LEVELS.level(s, offset)
        sl, sl2, sxl = _pass(s, fmt, room, inverse, offset, b.fadd(origin, splat(s, ROUND)))
        det = s.fma(sw, sl2, b.fneg(b.fmul(sl, sl)))
        varied = b.fcmp_ordered(">", det, b.fmul(splat(s, 1e-6), b.fmul(sw, sl2)))  # else rounding is all there is
        scale = b.select(varied, _ratio(s, b.fsub(b.fmul(sw, sxl), b.fmul(sl, rest)), det), zero)
        at_origin = _ratio(s, b.fsub(rest, b.fmul(scale, sl)), sw)
        free = b.fsub(at_origin, b.fmul(scale, origin))
        mean_level, curve = b.fadd(origin, _ratio(s, sl, sw)), _ratio(s, det, sw)
        if unsigned:
            above = b.fcmp_ordered(">", free, most)
            two = b.fadd(sl, sl)
            l2 = s.fma(origin, s.fma(origin, sw, two), sl2)
            xl = b.fadd(s.fma(mean, sl, sxl), b.fmul(origin, s.fma(mean, sw, rest)))
            scale, free = b.select(above, _ratio(s, xl, l2), scale), b.select(above, most, free)
            at_origin = s.fma(scale, origin, free)
            mean_level, curve = b.select(above, zero, mean_level), b.select(above, l2, curve)
        ahead = b.fsub(b.fmul(scale, sl2), b.fsub(b.fadd(sxl, sxl), b.fmul(b.fadd(at_origin, at_origin), sl)))
        error = s.fma(scale, ahead, b.fmul(at_origin, b.fsub(b.fmul(at_origin, sw), b.fadd(rest, rest))))
        return scale, free, error, mean_level, curve

    def try_grid(low, span, shifts, best):
        inverse_span = _inverse(s, span)

        def one(i, best):
            shift, step = b.udiv(i, i64(fmt.GRID[2])), b.urem(i, i64(fmt.GRID[2]))
            inverse = b.fmul(_grid(s, step, top + fmt.GRID[0], fmt.GRID[1]), inverse_span)
            scale, minimum, error, _, _ = solve(inverse, s.fma(_grid(s, shift, 0.0, SHIFT / top), span, low))
            new, error = _clearly_better(s, [scale, minimum], best[:2], error, best[2], slight)
            return [*new, error]

        return s.loop(shifts if isinstance(shifts, ir.Value) else fmt.GRID[2] * shifts, best, one)

    span = b.fsub(high, low)
    best = [b.fmul(span, splat(s, 1 / top)), low, splat(s, 3e38)]
    best = try_grid(low, span, SHIFTS if room.w is None else WEIGHTED_SHIFTS, best)
    if room.w is not None:
        near, far = _extremes(s, fmt, room, room.centred, b.fmul(spread, splat(s, SLIGHT / top**2)))[:2]
        if unsigned:
            near = s.fmin(near, most)
        narrower = b.fcmp_ordered("<", b.fsub(far, near), b.fmul(span, splat(s, 0.9)))
        best = try_grid(near, b.fsub(far, near), _any(s, narrower, fmt.GRID[2]), best)

    def polish(i, best):
        scale, minimum, _, mean_level, curve = solve(_inverse(s, best[0]), best[1])
        return [scale, minimum, mean_level, curve]

    scale, minimum, mean_level, curve = s.loop(fmt.POLISH, [*best[:2], zero, zero], polish)
    minus = b.fneg(b.fadd(minimum, mean))
    if fmt.INTEGERS is None:
        _affine_halves(s, fmt, room, scale, minus, b.fadd(low, mean), b.fadd(high, mean), sw, sxx)
    else:
        found = Line(scale, s.fmax(minus, zero), mean_level, curve)
        pinned = b.fcmp_ordered(">=", low, most)  # the minimum is 0 and stays it
        level, curve = b.select(pinned, zero, b.fneg(low)), b.select(pinned, sxx, spread)
        _affine_superblock(s, fmt, room, found, Line(span, s.fmax(b.fneg(b.fadd(low, mean)), zero), level, curve), sw, sxx)


def _affine_halves(s, fmt, room, scale, minus, low, high, sw, sxx):
    """The half floats near the scale and the minimum."""
    b, zero = s.b, s.zeros(f32, LANES)

    def attempt(d, m, best):
        """This d with the half float that suits its codes best."""
        left = _left(s, fmt, room, d, m)
        other = _half(s, b.fsub(m, _ratio(s, left.e, sw)))
        by = b.fsub(other, m)
        error = s.fma(by, s.fma(by, sw, b.fadd(left.e, left.e)), left.e2)
        new, error = _better(s, [d, other], best[:2], error, best[2])
        return [*new, error]

    d, m = _unit(s, scale), _half(s, minus)
    best = [zero, zero, sxx]
    for one in (d, *_steps(s, d)):
        best = attempt(one, m, best)
    floor = s.fmax(_half(s, b.fneg(low)), _steps(s, b.fneg(low))[0])
    reach = b.fmul(b.fadd(high, floor), splat(s, 1 / fmt.LEVELS.high))
    best = attempt(zero, m, best)
    best = attempt(_unit(s, reach), floor, best)
    d, m, _ = _exact_levels(s, fmt, b.fsub(high, low), best[2], sxx, best, lambda d, best: attempt(d, b.fneg(low), best))
    _finish(s, room, d, b.fneg(m), d, b.fneg(m), zero, zero)


class Line(NamedTuple):
    """A group's own optimum, and how the error grows around it."""

    scale: ir.Value
    minus: ir.Value
    level: ir.Value  # mean of the levels
    curve: ir.Value  # sum of w (level - mean)^2


def _affine_superblock(s, fmt, room, found, whole_span, sw, sxx):
    b, most = s.b, float(fmt.INTEGERS.high)
    per_block = fmt.BLOCK // fmt.GROUP
    total = lambda v: _over_block(s, v, b.fadd, per_block)  # noqa: E731
    largest = lambda v: _over_block(s, v, s.fmax, per_block)  # noqa: E731
    zero = s.zeros(f32, LANES)

    def follow(line, sc, d):
        """The minimum that suits this integer scale."""
        return s.fmax(s.fma(line.level, s.fma(d, sc, b.fneg(line.scale)), line.minus), zero)

    def neighbours(line, d, m, sc, mc, around):
        """Integers near sc with their best mc: (sc, mc, error, sums) per lane; `around` (first, count) shifts sc."""
        inverse_m = _inverse(s, m)

        def one(i, best):
            candidate = s.fmin(s.fmax(b.fadd(sc, _grid(s, i, around[0], 1.0)), zero), splat(s, most))
            a = b.fmul(d, candidate)
            moved = b.fmul(line.level, b.fmul(d, b.fsub(candidate, sc)))
            now = b.fmul(m, _whole(s, b.fmul(s.fma(m, mc, moved), inverse_m), fmt.INTEGERS))
            left = _left(s, fmt, room, a, now)
            other = _whole(s, b.fmul(b.fsub(now, _ratio(s, left.e, sw)), inverse_m), fmt.INTEGERS)
            by = s.fma(m, other, b.fneg(now))
            error = s.fma(by, s.fma(by, sw, b.fadd(left.e, left.e)), left.e2)
            sums = left.level, left.l2, s.fma(by, left.level, left.el), s.fma(by, sw, left.e)
            new, error = _better(s, [candidate, other, *sums], [best[0], best[1], *best[3:]], error, best[2])
            return [new[0], new[1], error, *new[2:]]

        return s.loop(around[1], [zero, zero, sxx, zero, zero, zero, zero], one)  # zeros, before any

    def descend(line, rounds, count, best):
        """From the half floats nearest to the groups' own scales and minimums down, for some rounds."""

        def refit(i, state):
            """Integers for a half float pair, kept where the whole superblock gains; another pair that suits these integers."""
            d, m, sc, mc, least, new_d, new_m = state
            guess = _whole(s, b.fmul(line.scale, _inverse(s, new_d)), fmt.INTEGERS)
            guess_m = _whole(s, b.fmul(follow(line, guess, new_d), _inverse(s, new_m)), fmt.INTEGERS)
            for around in fmt.AROUND:
                guess, guess_m, error, sl, sl2, sel, se = neighbours(line, new_d, new_m, guess, guess_m, around)
            (d, m, sc, mc), least = _better(s, [new_d, new_m, guess, guess_m], [d, m, sc, mc], total(error), least)
            aa, ab = total(b.fmul(b.fmul(guess, guess), sl2)), total(b.fmul(b.fmul(guess, guess_m), sl))
            bb = total(b.fmul(b.fmul(guess_m, guess_m), sw))
            ax, bx = total(b.fmul(guess, sel)), total(b.fmul(guess_m, se))
            det = b.fsub(b.fmul(aa, bb), b.fmul(ab, ab))
            both = b.fcmp_ordered(">", det, b.fmul(splat(s, 1e-6), b.fmul(aa, bb)))
            more_d = b.select(both, _ratio(s, b.fsub(b.fmul(ax, bb), b.fmul(bx, ab)), det), _ratio(s, ax, aa))
            more_m = b.select(both, _ratio(s, b.fsub(b.fmul(ax, ab), b.fmul(bx, aa)), det), zero)
            next_d, next_m = (_unit(s, s.fmax(b.fadd(v, more), zero)) for v, more in ((new_d, more_d), (new_m, more_m)))
            return [d, m, sc, mc, least, next_d, next_m]

        d = _nearest_half(s, line.scale, line.curve, largest(line.scale), fmt, total, count)
        wanted = follow(line, _whole(s, b.fmul(line.scale, _inverse(s, d)), fmt.INTEGERS), d)
        m = _nearest_half(s, wanted, sw, largest(wanted), fmt, total, count)
        return s.loop(rounds, [*best, d, m], refit)[:5]

    def exactly(i, best):
        """All codes from 0 to top - i."""
        scale = b.fmul(whole_span.scale, s.b.fdiv(splat(s, 1.0), _grid(s, i, most_level, -1.0)))
        inverse = _inverse(s, scale)
        level, curve = b.fmul(whole_span.level, inverse), b.fmul(whole_span.curve, b.fmul(inverse, inverse))
        line = Line(scale, whole_span.minus, level, curve)
        return [b.select(exact, new, old) for new, old in zip(descend(line, 1, 2 * HALVES, best), best, strict=True)]

    everything, most_level = total(sxx), fmt.LEVELS.high
    best = descend(found, fmt.REFITS, HALVES, [zero, zero, zero, zero, everything])
    exact = b.fcmp_ordered("<", best[4], b.fmul(everything, splat(s, EXACT / len(fmt.LEVELS.values) ** 2)))
    d, m, sc, mc, _ = s.loop(_any(s, exact, min(most_level, SPANS)), best, exactly)
    _finish(s, room, b.fmul(d, sc), b.fneg(b.fmul(m, mc)), d, m, sc, mc)


# weight = scale * level


def linear(s, fmt, room):
    """The scale of each lane, of either sign."""
    b, levels = s.b, fmt.LEVELS
    zero = s.zeros(f32, LANES)
    low, high, _, _, sxx = _extremes(s, fmt, room, room.x)
    further = lambda low, high: b.select(b.fcmp_ordered(">", b.fneg(low), high), low, high)  # noqa: E731
    furthest = further(low, high)

    def solve(inverse):
        _, sl2, sxl = _pass(s, fmt, room, inverse, zero)
        scale = _ratio(s, sxl, sl2)
        return scale, b.fneg(b.fmul(scale, sxl)), sl2

    def try_grid(furthest, side, count, best):
        """The furthest weight at, or some way beyond, the level at one end."""
        inverse = _inverse(s, furthest)

        def one(i, best):
            scale, error, _ = solve(b.fmul(_grid(s, i, side * (1 + fmt.GRID[0]), side * fmt.GRID[1]), inverse))
            (scale,), error = _clearly_better(s, [scale], best[:1], error, best[1], zero)
            return [scale, error]

        return s.loop(count, best, one)

    best = [b.fmul(furthest, splat(s, 1 / levels.low)), splat(s, 3e38)]
    for side in (levels.low, levels.high):
        best = try_grid(furthest, side, fmt.GRID[2], best)
    if room.w is not None:
        near = further(*_extremes(s, fmt, room, room.x, b.fmul(sxx, splat(s, SLIGHT / levels.low**2)))[:2])
        narrower = b.fcmp_ordered("<", s.fabs(near), b.fmul(s.fabs(furthest), splat(s, 0.9)))
        for side in (levels.low, levels.high):
            best = try_grid(near, side, _any(s, narrower, fmt.GRID[2]), best)

    def polish(i, best):
        scale, _, sl2 = solve(_inverse(s, best[0]))
        return [scale, sl2]

    scale, sl2 = s.loop(fmt.POLISH, [best[0], zero], polish)
    if fmt.INTEGERS is None:
        _linear_halves(s, fmt, room, scale, furthest, sxx)
    else:
        one_sided = b.or_(b.fcmp_ordered(">", low, zero), b.fcmp_ordered("<", high, zero))
        _linear_superblock(s, fmt, room, scale, sl2, furthest, one_sided, sxx)


def _linear_halves(s, fmt, room, scale, furthest, sxx):
    """The half floats near the scale."""
    zero = s.zeros(f32, LANES)

    def attempt(d, best):
        (d,), error = _better(s, [d], best[:1], _left(s, fmt, room, d, zero).e2, best[1])
        return [d, error]

    d = _unit(s, scale)
    best = [zero, sxx]
    for one in (d, *_steps(s, d)):
        best = attempt(one, best)
    d, _ = _exact_levels(s, fmt, furthest, best[1], sxx, best, attempt)
    _finish(s, room, d, zero, d, zero, zero, zero)


def _linear_superblock(s, fmt, room, scale, sl2, reach, one_sided, sxx):
    b, integers = s.b, fmt.INTEGERS
    per_block = fmt.BLOCK // fmt.GROUP
    total = lambda v: _over_block(s, v, b.fadd, per_block)  # noqa: E731
    zero = s.zeros(f32, LANES)

    def neighbours(d, sc, around):
        def one(i, best):
            candidate = b.fadd(sc, _grid(s, i, around[0], 1.0))
            candidate = s.fmin(s.fmax(candidate, splat(s, integers.low)), splat(s, integers.high))
            left = _left(s, fmt, room, b.fmul(d, candidate), zero)
            new, error = _better(s, [candidate, left.l2, left.el], [best[0], *best[2:]], left.e2, best[1])
            return [new[0], error, *new[1:]]

        return s.loop(around[1], [zero, sxx, zero, zero], one)  # zeros, before any

    def descend(scale, sl2, rounds, count, best):
        """From the half float nearest to the groups' own scales down, for some rounds."""

        def refit(i, state):
            d, sc, least, new_d = state
            guess = _whole(s, b.fmul(scale, _inverse(s, new_d)), integers)
            for around in fmt.AROUND:
                guess, error, l2, el = neighbours(new_d, guess, around)
            (d, sc), least = _better(s, [new_d, guess], [d, sc], total(error), least)
            more = _ratio(s, total(b.fmul(guess, el)), total(b.fmul(b.fmul(guess, guess), l2)))
            return [d, sc, least, _unit(s, b.fadd(new_d, more))]

        top, bottom = (_over_block(s, v, s.fmax, per_block) for v in (scale, b.fneg(scale)))
        furthest = b.select(b.fcmp_ordered(">", bottom, top), b.fneg(bottom), top)
        d = _nearest_half(s, scale, sl2, furthest, fmt, total, count)
        return s.loop(rounds, [*best, d], refit)[:3]

    def exactly(i, best):
        """The furthest weight at level low + i."""
        scale = b.fdiv(reach, _grid(s, i, fmt.LEVELS.low, 1.0))
        inverse = _inverse(s, scale)
        found = descend(scale, b.fmul(sxx, b.fmul(inverse, inverse)), 1, 2 * HALVES, best)
        return [b.select(exact, new, old) for new, old in zip(found, best, strict=True)]

    everything = total(sxx)
    best = descend(scale, sl2, fmt.REFITS, HALVES, [zero, zero, everything])
    exact = b.fcmp_ordered("<", best[2], b.fmul(everything, splat(s, EXACT / len(fmt.LEVELS.values) ** 2)))
    d, sc, _ = s.loop(_any(s, exact, min(-fmt.LEVELS.low, SPANS)), best, exactly)
    if integers.high <= 31:  # where few of few levels are in use, the best integers may lie far apart
        one_sided = _over_block(s, one_sided, b.and_, per_block)
        other = neighbours(d, splat(s, integers.low), (0, _any(s, one_sided, integers.high + 1 - integers.low)))[0]
        sc = b.select(one_sided, other, sc)
    stored = b.fadd(sc, splat(s, fmt.BIAS))
    _finish(s, room, b.fmul(d, sc), zero, d, zero, stored, zero)
