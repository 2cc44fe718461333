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
from quantize.encoders.levels import LANES, Uniform, splat

UNROLL = 4
SHIFT = 0.6  # levels between the minimums to begin from: the lowest weight may be worth giving up
SHIFTS, WEIGHTED_SHIFTS = 2, 4  # how many; the lowest one may matter little
SPREADS = (1.0, 0.5, 7)  # deviations of the weighted weights to begin from too: first, step, how many
ROUNDING = 4e-7  # of what a scale takes off the error: among equals the first stays, so that neighbouring groups agree
HALF_MAX = 65504.0
SYMBOLS = ("encode", "encode_weighted")


class Room(NamedTuple):
    """Addresses on the stack: the groups lane by lane, and what `pack` reads: a lane's inverse and offset, codes, factors."""

    x: ir.Value  # float32 [group][LANES]
    w: ir.Value | None  # the same, or None
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
        s.room(f32, unit), s.room(f32, unit) if weighted else None, lanes(), lanes(), s.room(i8, unit),
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


def _pass(s, fmt, room, inverse, offset):
    """Sums of w l, w l^2 and w x l for the levels l nearest to x * inverse + offset."""

    def some(i, sums):
        total, square, product = sums
        for j in range(UNROLL):
            at = s.mul(s.add(s.mul(i, UNROLL), j), 4 * LANES)
            x = s.load(vec(f32, LANES), s.add(room.x, at))
            level = fmt.LEVELS.level(s, s.fma(x, inverse, offset))
            part = level if room.w is None else s.b.fmul(level, s.load(vec(f32, LANES), s.add(room.w, at)))
            total = s.b.fadd(total, part)
            square, product = s.fma(part, level, square), s.fma(part, x, product)
        return [total, square, product]

    return s.loop(fmt.GROUP // UNROLL, [s.zeros(f32, LANES)] * 3, some)


def _extremes(s, fmt, room):
    """Least and largest weight, and the sums of w, w x and w x^2."""

    def some(j, found):
        low, high, total, product, square = found
        x = s.load(vec(f32, LANES), s.add(room.x, s.mul(j, 4 * LANES)))
        w = splat(s, 1.0) if room.w is None else s.load(vec(f32, LANES), s.add(room.w, s.mul(j, 4 * LANES)))
        wx = s.b.fmul(w, x)
        return [s.fmin(low, x), s.fmax(high, x), s.b.fadd(total, w), s.b.fadd(product, wx), s.fma(wx, x, square)]

    start = [splat(s, 3e38), splat(s, -3e38), *[s.zeros(f32, LANES)] * 3]
    return s.loop(fmt.GROUP, start, some)


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


def _root(s, v):
    """Square root, 0 of what is below 0."""
    return s.b.call(s._intrinsic(f"llvm.sqrt.v{LANES}f32", v.type, v.type), [s.fmax(v, s.zeros(f32, LANES))])


def _whole(s, v, integers):
    return Uniform(*integers).level(s, v)


def _better(s, new, old, error, least, margin=0.0):
    """Lane by lane the candidate of smaller error: (values, error); smaller by `margin` of the error, which is rounding."""
    bar = s.b.fmul(least, splat(s, 1.0 + margin)) if margin else least
    wins = s.b.fcmp_ordered("<", error, bar)
    return [s.b.select(wins, a, b) for a, b in zip(new, old, strict=True)], s.b.select(wins, error, least)


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
    low, high, sw, sx, sxx = _extremes(s, fmt, room)
    unsigned = fmt.INTEGERS is not None
    if unsigned:
        low = s.fmin(low, zero)
    span = b.fsub(high, low)
    bound = (lambda v: s.fmin(v, zero)) if unsigned else (lambda v: v)

    def solve(inverse, minimum):
        """The best line through the codes that this inverse and minimum give, and minus what it takes off the error."""
        sl, sl2, sxl = _pass(s, fmt, room, inverse, b.fneg(b.fmul(minimum, inverse)))
        det = s.fma(sw, sl2, b.fneg(b.fmul(sl, sl)))
        varied = b.fcmp_ordered(">", det, b.fmul(splat(s, 1e-5), b.fmul(sw, sl2)))  # else rounding is all there is
        scale = b.select(varied, _ratio(s, b.fsub(b.fmul(sw, sxl), b.fmul(sl, sx)), det), zero)
        free = _ratio(s, b.fsub(sx, b.fmul(scale, sl)), sw)
        if unsigned:
            above = b.fcmp_ordered(">", free, zero)
            scale, free = b.select(above, _ratio(s, sxl, sl2), scale), bound(free)
        return scale, free, b.fneg(s.fma(scale, sxl, b.fmul(free, sx)))

    def try_grid(i, best):
        shift, step = b.udiv(i, i64(fmt.GRID[2])), b.urem(i, i64(fmt.GRID[2]))
        inverse = b.fmul(_grid(s, step, top + fmt.GRID[0], fmt.GRID[1]), _inverse(s, span))
        scale, minimum, error = solve(inverse, s.fma(_grid(s, shift, 0.0, SHIFT / top), span, low))
        new, error = _better(s, [scale, minimum], best[:2], error, best[2], ROUNDING)
        return [*new, error]

    def polish(i, best):
        scale, minimum, error = solve(_inverse(s, best[0]), best[1])
        new, error = _better(s, [scale, minimum], best[:2], error, best[2], ROUNDING)
        return [*new, error]

    rounds = fmt.GRID[2] * (SHIFTS if room.w is None else WEIGHTED_SHIFTS)
    best = s.loop(rounds, [b.fmul(span, splat(s, 1 / top)), low, splat(s, 3e38)], try_grid)
    if room.w is not None:  # a weight far out may matter little
        mean = _ratio(s, sx, sw)
        deviation = _root(s, s.fma(b.fneg(mean), mean, _ratio(s, sxx, sw)))

        def try_spread(i, best):
            reach = b.fmul(_grid(s, i, *SPREADS[:2]), deviation)
            inverse = b.fmul(splat(s, top / 2), _inverse(s, reach))
            scale, minimum, error = solve(inverse, bound(b.fsub(mean, reach)))
            new, error = _better(s, [scale, minimum], best[:2], error, best[2], ROUNDING)
            return [*new, error]

        best = s.loop(SPREADS[2], best, try_spread)
    scale, minimum, _ = s.loop(fmt.POLISH, best, polish)
    if fmt.INTEGERS is None:
        d, m = _half(s, scale), _half(s, minimum)
        inverse = _inverse(s, d)  # what half precision cannot hold may be further off than zeros
        sl, sl2, sxl = _pass(s, fmt, room, inverse, b.fneg(b.fmul(m, inverse)))
        linear_part = b.fadd(b.fmul(d, sxl), b.fmul(m, sx))
        square = s.fma(b.fmul(d, d), sl2, s.fma(b.fmul(m, m), sw, b.fmul(b.fmul(splat(s, 2.0), b.fmul(d, m)), sl)))
        gains = b.fcmp_ordered("<", square, b.fmul(splat(s, 2.0), linear_part))
        d, m = b.select(gains, d, zero), b.select(gains, m, zero)
        _finish(s, room, d, m, d, m, zero, zero)
        return
    _affine_superblock(s, fmt, room, scale, minimum, sw, sx)


def _affine_superblock(s, fmt, room, scale, minimum, sw, sx):
    b, most = s.b, float(fmt.INTEGERS.high)
    per_block = fmt.BLOCK // fmt.GROUP
    total = lambda v: _over_block(s, v, b.fadd, per_block)  # noqa: E731
    largest = lambda v: _over_block(s, v, s.fmax, per_block)  # noqa: E731
    zero = s.zeros(f32, LANES)
    minus = b.fneg(minimum)

    def error_of(a, m, sl, sl2, sxl):
        """Squared error of x ~ a l - m less the sum of x^2."""
        linear = b.fsub(b.fmul(m, sx), b.fmul(a, sxl))
        cross = b.fsub(b.fmul(b.fmul(m, m), sw), b.fmul(b.fmul(splat(s, 2.0), b.fmul(a, m)), sl))
        return s.fma(b.fmul(a, a), sl2, s.fma(splat(s, 2.0), linear, cross))

    def neighbours(d, m, sc, mc, around):
        """Integers near sc with their best mc: (sc, mc, error, sl, sl2, sxl) per lane; `around` (first, count) shifts sc."""
        inverse_m = _inverse(s, m)

        def one(i, best):
            candidate = s.fmin(s.fmax(b.fadd(sc, _grid(s, i, around[0], 1.0)), zero), splat(s, most))
            a = b.fmul(d, candidate)
            inverse = _inverse(s, a)
            sums = _pass(s, fmt, room, inverse, b.fmul(b.fmul(m, mc), inverse))
            wanted = b.fmul(_ratio(s, b.fsub(b.fmul(a, sums[0]), sx), sw), inverse_m)
            other = _whole(s, wanted, fmt.INTEGERS)
            error = error_of(a, b.fmul(m, other), *sums)
            new, error = _better(s, [candidate, other, *sums], [best[0], best[1], *best[3:]], error, best[2])
            return [new[0], new[1], error, *new[2:]]

        return s.loop(around[1], [sc, mc, splat(s, 3e38), zero, zero, zero], one)

    def refit(i, state):
        """Another half float pair for the integers found, integers again; kept where the whole superblock gains."""
        d, m, sc, mc, least, new_d, new_m = state
        guess = _whole(s, b.fmul(scale, _inverse(s, new_d)), fmt.INTEGERS)
        guess_m = _whole(s, b.fmul(minus, _inverse(s, new_m)), fmt.INTEGERS)
        for around in fmt.AROUND:
            guess, guess_m, error, sl, sl2, sxl = neighbours(new_d, new_m, guess, guess_m, around)
        block_error = total(error)
        (d, m, sc, mc), least = _better(s, [new_d, new_m, guess, guess_m], [d, m, sc, mc], block_error, least)
        aa, ab = total(b.fmul(b.fmul(guess, guess), sl2)), total(b.fmul(b.fmul(guess, guess_m), sl))
        bb = total(b.fmul(b.fmul(guess_m, guess_m), sw))
        ax, bx = total(b.fmul(guess, sxl)), total(b.fmul(guess_m, sx))
        det = b.fsub(b.fmul(aa, bb), b.fmul(ab, ab))
        both = b.fcmp_ordered(">", det, b.fmul(splat(s, 1e-6), b.fmul(aa, bb)))
        next_d = b.select(both, _ratio(s, b.fsub(b.fmul(ax, bb), b.fmul(bx, ab)), det), _ratio(s, ax, aa))
        next_m = b.select(both, _ratio(s, b.fsub(b.fmul(ax, ab), b.fmul(bx, aa)), det), zero)
        return [d, m, sc, mc, least, _half(s, s.fmax(next_d, zero)), _half(s, s.fmax(next_m, zero))]

    d = _half(s, b.fmul(largest(scale), splat(s, 1 / most)))
    m = _half(s, b.fmul(largest(minus), splat(s, 1 / most)))
    state = s.loop(fmt.REFITS, [d, m, zero, zero, splat(s, 3e38), d, m], refit)
    d, m, sc, mc = state[:4]
    _finish(s, room, b.fmul(d, sc), b.fneg(b.fmul(m, mc)), d, m, sc, mc)


# weight = scale * level


def linear(s, fmt, room):
    """The scale of each lane, of either sign."""
    b, levels = s.b, fmt.LEVELS
    zero = s.zeros(f32, LANES)
    low, high, sw, _, sxx = _extremes(s, fmt, room)
    furthest = b.select(b.fcmp_ordered(">", b.fneg(low), high), low, high)

    def solve(inverse):
        _, sl2, sxl = _pass(s, fmt, room, inverse, zero)
        scale = _ratio(s, sxl, sl2)
        return scale, b.fneg(b.fmul(scale, sxl))

    def try_grid(side):
        """The furthest weight at, or some way beyond, the level at one end."""

        def one(i, best):
            scale, error = solve(b.fmul(_grid(s, i, side * (1 + fmt.GRID[0]), side * fmt.GRID[1]), _inverse(s, furthest)))
            (scale,), error = _better(s, [scale], best[:1], error, best[1], ROUNDING)
            return [scale, error]

        return one

    def polish(i, best):
        scale, error = solve(_inverse(s, best[0]))
        (scale,), error = _better(s, [scale], best[:1], error, best[1], ROUNDING)
        return [scale, error]

    best = [b.fmul(furthest, splat(s, 1 / levels.low)), splat(s, 3e38)]
    for side in (levels.low, levels.high):
        best = s.loop(fmt.GRID[2], best, try_grid(side))
    if room.w is not None:  # a weight far out may matter little
        deviation = _root(s, _ratio(s, sxx, sw))
        for side in (levels.low, levels.high):

            def try_spread(i, best, side=side):
                reach = b.fmul(_grid(s, i, *SPREADS[:2]), deviation)
                scale, error = solve(b.fmul(splat(s, side), _inverse(s, reach)))
                (scale,), error = _better(s, [scale], best[:1], error, best[1], ROUNDING)
                return [scale, error]

            best = s.loop(SPREADS[2], best, try_spread)
    scale, _ = s.loop(fmt.POLISH, best, polish)
    if fmt.INTEGERS is None:
        d = _half(s, scale)
        _, sl2, sxl = _pass(s, fmt, room, _inverse(s, d), zero)  # what half precision cannot hold may be further off than zeros
        d = b.select(b.fcmp_ordered("<", b.fmul(b.fmul(d, d), sl2), b.fmul(splat(s, 2.0), b.fmul(d, sxl))), d, zero)
        _finish(s, room, d, zero, d, zero, zero, zero)
        return
    _linear_superblock(s, fmt, room, scale)


def _linear_superblock(s, fmt, room, scale):
    b, integers = s.b, fmt.INTEGERS
    per_block = fmt.BLOCK // fmt.GROUP
    total = lambda v: _over_block(s, v, b.fadd, per_block)  # noqa: E731
    zero = s.zeros(f32, LANES)

    def neighbours(d, sc, around):
        def one(i, best):
            candidate = b.fadd(sc, _grid(s, i, around[0], 1.0))
            candidate = s.fmin(s.fmax(candidate, splat(s, integers.low)), splat(s, integers.high))
            a = b.fmul(d, candidate)
            _, sl2, sxl = _pass(s, fmt, room, _inverse(s, a), zero)
            error = b.fmul(a, b.fsub(b.fmul(a, sl2), b.fmul(splat(s, 2.0), sxl)))
            new, error = _better(s, [candidate, sl2, sxl], [best[0], *best[2:]], error, best[1])
            return [new[0], error, *new[1:]]

        return s.loop(around[1], [sc, splat(s, 3e38), zero, zero], one)

    def refit(i, state):
        d, sc, least, new_d = state
        guess = _whole(s, b.fmul(scale, _inverse(s, new_d)), integers)
        for around in fmt.AROUND:
            guess, error, sl2, sxl = neighbours(new_d, guess, around)
        (d, sc), least = _better(s, [new_d, guess], [d, sc], total(error), least)
        next_d = _ratio(s, total(b.fmul(guess, sxl)), total(b.fmul(b.fmul(guess, guess), sl2)))
        return [d, sc, least, _half(s, next_d)]

    top, bottom = (_over_block(s, v, s.fmax, per_block) for v in (scale, b.fneg(scale)))
    furthest = b.select(b.fcmp_ordered(">", bottom, top), b.fneg(bottom), top)
    d = _half(s, b.fmul(furthest, splat(s, 1 / integers.low)))
    d, sc, _, _ = s.loop(fmt.REFITS, [d, zero, splat(s, 3e38), d], refit)
    stored = b.fadd(sc, splat(s, fmt.BIAS))
    _finish(s, room, b.fmul(d, sc), zero, d, zero, stored, zero)
