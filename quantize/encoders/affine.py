"""weight = scale * code + minimum: the search for both, in each group and then in superblocks of integers.

In: groups lane by lane (search.py). Out: what `pack` reads.
"""

from typing import NamedTuple

from llvmlite import ir

from llamacli.cpu.kernels.jit.simd import f32, i64
from quantize.encoders.grid import affine_grid
from quantize.encoders.levels import LANES, ROUND, splat
from quantize.encoders.parts import (
    CLOSED,
    EXACT,
    HALVES,
    SHIFT,
    SLIGHT,
    SPANS,
    WEIGHTED_SHIFTS,
    any_of,
    better,
    centre,
    clearly_better,
    exact_levels,
    extremes,
    finish,
    grid_at,
    half_of,
    inverse_of,
    left_over,
    nearest_half,
    over_block,
    pass_over,
    ratio_of,
    steps_of,
    unit_of,
    whole_of,
)


def affine(s, fmt, room):
    """Find scale and minimum of each lane.

    Minimums are at most 0 where a superblock stores their negatives as unsigned integers.
    """
    b, top = s.b, float(fmt.LEVELS.high)
    zero = s.zeros(f32, LANES)
    low, high, sw, sx, sxx = extremes(s, fmt, room, room.x)
    mean = ratio_of(s, sx, sw)
    # From here on weights are taken around their mean: otherwise det would cancel out where a few weights are much heavier.
    rest, spread = centre(s, fmt, room, mean)
    unsigned = fmt.INTEGERS is not None
    if unsigned:
        low = s.fmin(low, zero)
    low, high = b.fsub(low, mean), b.fsub(high, mean)
    most, slight = b.fneg(mean), b.fmul(sxx, splat(s, 1e-12))

    def solve(inverse, minimum):
        """The best line through the codes of this inverse and minimum; its error less that of 0; the mean level, curvature."""
        offset = b.fneg(b.fmul(minimum, inverse))
        origin = fmt.LEVELS.level(s, offset)
        sl, sl2, sxl = pass_over(s, fmt, room, inverse, offset, b.fadd(origin, splat(s, ROUND)))
        det = s.fma(sw, sl2, b.fneg(b.fmul(sl, sl)))
        varied = b.fcmp_ordered(">", det, b.fmul(splat(s, 1e-6), b.fmul(sw, sl2)))  # otherwise det is only rounding error
        scale = b.select(varied, ratio_of(s, b.fsub(b.fmul(sw, sxl), b.fmul(sl, rest)), det), zero)
        at_origin = ratio_of(s, b.fsub(rest, b.fmul(scale, sl)), sw)
        free = b.fsub(at_origin, b.fmul(scale, origin))
        mean_level, curve = b.fadd(origin, ratio_of(s, sl, sw)), ratio_of(s, det, sw)
        if unsigned:
            above = b.fcmp_ordered(">", free, most)
            two = b.fadd(sl, sl)
            l2 = s.fma(origin, s.fma(origin, sw, two), sl2)
            xl = b.fadd(s.fma(mean, sl, sxl), b.fmul(origin, s.fma(mean, sw, rest)))
            scale, free = b.select(above, ratio_of(s, xl, l2), scale), b.select(above, most, free)
            at_origin = s.fma(scale, origin, free)
            mean_level, curve = b.select(above, zero, mean_level), b.select(above, l2, curve)
        ahead = b.fsub(b.fmul(scale, sl2), b.fsub(b.fadd(sxl, sxl), b.fmul(b.fadd(at_origin, at_origin), sl)))
        error = s.fma(scale, ahead, b.fmul(at_origin, b.fsub(b.fmul(at_origin, sw), b.fadd(rest, rest))))
        return scale, free, error, mean_level, curve

    def try_grid(low, span, shifts, best):
        inverse_span = inverse_of(s, span)

        def one(i, best):
            shift, step = b.udiv(i, i64(fmt.GRID[2])), b.urem(i, i64(fmt.GRID[2]))
            inverse = b.fmul(grid_at(s, step, top + fmt.GRID[0], fmt.GRID[1]), inverse_span)
            scale, minimum, error, _, _ = solve(inverse, s.fma(grid_at(s, shift, 0.0, SHIFT / top), span, low))
            new, error = clearly_better(s, [scale, minimum], best[:2], error, best[2], slight)
            return [*new, error]

        return s.loop(shifts if isinstance(shifts, ir.Value) else fmt.GRID[2] * shifts, best, one)

    span = b.fsub(high, low)
    if room.w is None:
        best = affine_grid(s, fmt, room, low, span, most if unsigned else None)
    else:
        best = [b.fmul(span, splat(s, 1 / top)), low, splat(s, 3e38)]
        best = try_grid(low, span, WEIGHTED_SHIFTS, best)
        near, far = extremes(s, fmt, room, room.centred, b.fmul(spread, splat(s, SLIGHT / top**2)))[:2]
        if unsigned:
            near = s.fmin(near, most)
        narrower = b.fcmp_ordered("<", b.fsub(far, near), b.fmul(span, splat(s, 0.9)))
        best = try_grid(near, b.fsub(far, near), any_of(s, narrower, fmt.GRID[2]), best)

    def polish(i, best):
        scale, minimum, _, mean_level, curve = solve(inverse_of(s, best[0]), best[1])
        return [scale, minimum, mean_level, curve]

    scale, minimum, mean_level, curve = s.loop(fmt.POLISH, [*best[:2], zero, zero], polish)
    minus = b.fneg(b.fadd(minimum, mean))
    if fmt.INTEGERS is None:
        _affine_halves(s, fmt, room, scale, minus, b.fadd(low, mean), b.fadd(high, mean), sw, sxx)
    else:
        found = Line(scale, s.fmax(minus, zero), mean_level, curve)
        pinned = b.fcmp_ordered(">=", low, most)  # groups without negative weights: the minimum is 0
        level, curve = b.select(pinned, zero, b.fneg(low)), b.select(pinned, sxx, spread)
        whole = Line(span, s.fmax(b.fneg(b.fadd(low, mean)), zero), level, curve)

        def least(scale):
            """No codes that go from the lowest weight up in steps of `scale` leave a smaller error than this."""
            return b.fadd(solve(inverse_of(s, scale), low)[2], spread)

        _affine_superblock(s, fmt, room, found, whole, least, sw, sxx)


def _affine_halves(s, fmt, room, scale, minus, low, high, sw, sxx):
    """The half floats near the scale and the minimum."""
    b, zero = s.b, s.zeros(f32, LANES)

    def attempt(d, m, best):
        """Try this d with the best half float m for its codes."""
        left = left_over(s, fmt, room, d, m)
        other = half_of(s, b.fsub(m, ratio_of(s, left.e, sw)))
        by = b.fsub(other, m)
        error = s.fma(by, s.fma(by, sw, b.fadd(left.e, left.e)), left.e2)
        new, error = better(s, [d, other], best[:2], error, best[2])
        return [*new, error]

    d, m = unit_of(s, scale), half_of(s, minus)
    best = [zero, zero, sxx]
    for one in (d, *steps_of(s, d)):
        best = attempt(one, m, best)
    floor = s.fmax(half_of(s, b.fneg(low)), steps_of(s, b.fneg(low))[0])
    reach = b.fmul(b.fadd(high, floor), splat(s, 1 / fmt.LEVELS.high))
    best = attempt(zero, m, best)
    best = attempt(unit_of(s, reach), floor, best)
    d, m, _ = exact_levels(s, fmt, b.fsub(high, low), best[2], sxx, best, lambda d, best: attempt(d, b.fneg(low), best))
    finish(s, room, d, b.fneg(m), d, b.fneg(m), zero, zero)


class Line(NamedTuple):
    """A group's own optimum, and how the error grows around it."""

    scale: ir.Value
    minus: ir.Value
    level: ir.Value  # mean of the levels
    curve: ir.Value  # sum of w (level - mean)^2


def _affine_superblock(s, fmt, room, found, whole_span, least, sw, sxx):
    b, most = s.b, float(fmt.INTEGERS.high)
    per_block = fmt.BLOCK // fmt.GROUP
    total = lambda v: over_block(s, v, b.fadd, per_block)
    largest = lambda v: over_block(s, v, s.fmax, per_block)
    zero = s.zeros(f32, LANES)

    def follow(line, sc, d):
        """The best minimum for this integer scale."""
        return s.fmax(s.fma(line.level, s.fma(d, sc, b.fneg(line.scale)), line.minus), zero)

    def neighbours(line, d, m, sc, mc, around):
        """Integers near sc with their best mc: (sc, mc, error, sums) per lane; `around` (first, count) shifts sc."""
        inverse_m = inverse_of(s, m)

        def one(i, best):
            candidate = s.fmin(s.fmax(b.fadd(sc, grid_at(s, i, around[0], 1.0)), zero), splat(s, most))
            a = b.fmul(d, candidate)
            moved = b.fmul(line.level, b.fmul(d, b.fsub(candidate, sc)))
            now = b.fmul(m, whole_of(s, b.fmul(s.fma(m, mc, moved), inverse_m), fmt.INTEGERS))
            left = left_over(s, fmt, room, a, now)
            other = whole_of(s, b.fmul(b.fsub(now, ratio_of(s, left.e, sw)), inverse_m), fmt.INTEGERS)
            by = s.fma(m, other, b.fneg(now))
            error = s.fma(by, s.fma(by, sw, b.fadd(left.e, left.e)), left.e2)
            sums = left.level, left.l2, s.fma(by, left.level, left.el), s.fma(by, sw, left.e)
            new, error = better(s, [candidate, other, *sums], [best[0], best[1], *best[3:]], error, best[2])
            return [new[0], new[1], error, *new[2:]]

        return s.loop(around[1], [zero, zero, sxx, zero, zero, zero, zero], one)  # zeros, before any

    def descend(line, rounds, count, best):
        """From the half floats nearest to the groups' own scales and minimums down, for some rounds."""

        def refit(i, state):
            """Integers for a half float pair, kept where the whole superblock gains; another pair that suits these integers."""
            d, m, sc, mc, least, new_d, new_m = state
            guess = whole_of(s, b.fmul(line.scale, inverse_of(s, new_d)), fmt.INTEGERS)
            guess_m = whole_of(s, b.fmul(follow(line, guess, new_d), inverse_of(s, new_m)), fmt.INTEGERS)
            for around in fmt.AROUND:
                guess, guess_m, error, sl, sl2, sel, se = neighbours(line, new_d, new_m, guess, guess_m, around)
            (d, m, sc, mc), least = better(s, [new_d, new_m, guess, guess_m], [d, m, sc, mc], total(error), least)
            aa, ab = total(b.fmul(b.fmul(guess, guess), sl2)), total(b.fmul(b.fmul(guess, guess_m), sl))
            bb = total(b.fmul(b.fmul(guess_m, guess_m), sw))
            ax, bx = total(b.fmul(guess, sel)), total(b.fmul(guess_m, se))
            det = b.fsub(b.fmul(aa, bb), b.fmul(ab, ab))
            both = b.fcmp_ordered(">", det, b.fmul(splat(s, 1e-6), b.fmul(aa, bb)))
            more_d = b.select(both, ratio_of(s, b.fsub(b.fmul(ax, bb), b.fmul(bx, ab)), det), ratio_of(s, ax, aa))
            more_m = b.select(both, ratio_of(s, b.fsub(b.fmul(ax, ab), b.fmul(bx, aa)), det), zero)
            next_d, next_m = (unit_of(s, s.fmax(b.fadd(v, more), zero)) for v, more in ((new_d, more_d), (new_m, more_m)))
            return [d, m, sc, mc, least, next_d, next_m]

        d = nearest_half(s, line.scale, line.curve, largest(line.scale), fmt, total, count)
        wanted = follow(line, whole_of(s, b.fmul(line.scale, inverse_of(s, d)), fmt.INTEGERS), d)
        m = nearest_half(s, wanted, sw, largest(wanted), fmt, total, count)
        return s.loop(rounds, [*best, d, m], refit)[:5]

    def exactly(i, best):
        """All codes from 0 to top - i."""
        scale = b.fmul(whole_span.scale, s.b.fdiv(splat(s, 1.0), grid_at(s, i, most_level, -1.0)))
        inverse = inverse_of(s, scale)
        level, curve = b.fmul(whole_span.level, inverse), b.fmul(whole_span.curve, b.fmul(inverse, inverse))
        line = Line(scale, whole_span.minus, level, curve)
        promising = b.and_(exact, b.fcmp_ordered("<", total(least(scale)), b.fadd(best[4], rounding)))

        def attempt(_, best):
            return [b.select(exact, new, old) for new, old in zip(descend(line, 1, 2 * HALVES, best), best, strict=True)]

        return s.loop(any_of(s, promising, 1), best, attempt)

    everything, most_level = total(sxx), fmt.LEVELS.high
    rounding = b.fmul(everything, splat(s, CLOSED))
    best = descend(found, fmt.REFITS, HALVES, [zero, zero, zero, zero, everything])
    exact = b.fcmp_ordered("<", best[4], b.fmul(everything, splat(s, EXACT / len(fmt.LEVELS.values) ** 2)))
    d, m, sc, mc, _ = s.loop(any_of(s, exact, min(most_level, SPANS)), best, exactly)
    finish(s, room, b.fmul(d, sc), b.fneg(b.fmul(m, mc)), d, m, sc, mc)
