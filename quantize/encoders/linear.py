"""weight = scale * level: the search for the scale, in each group and then in superblocks of integers.

In: groups lane by lane (search.py). Out: what `pack` reads.
"""

from llamacli.cpu.kernels.jit.simd import f32
from quantize.encoders.grid import linear_grid
from quantize.encoders.levels import LANES, Uniform, splat
from quantize.encoders.parts import (
    CLOSED,
    EXACT,
    HALVES,
    SLIGHT,
    SPANS,
    any_of,
    better,
    clearly_better,
    exact_levels,
    extremes,
    finish,
    grid_at,
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


def linear(s, fmt, room):
    """The scale of each lane, of either sign."""
    b, levels = s.b, fmt.LEVELS
    zero = s.zeros(f32, LANES)
    low, high, _, _, sxx = extremes(s, fmt, room, room.x)
    further = lambda low, high: b.select(b.fcmp_ordered(">", b.fneg(low), high), low, high)
    furthest = further(low, high)

    def solve(inverse):
        _, sl2, sxl = pass_over(s, fmt, room, inverse, zero)
        scale = ratio_of(s, sxl, sl2)
        return scale, b.fneg(b.fmul(scale, sxl)), sl2

    def try_grid(furthest, side, count, best):
        """The furthest weight at, or some way beyond, the level at one end."""
        inverse = inverse_of(s, furthest)

        def one(i, best):
            scale, error, _ = solve(b.fmul(grid_at(s, i, side * (1 + fmt.GRID[0]), side * fmt.GRID[1]), inverse))
            (scale,), error = clearly_better(s, [scale], best[:1], error, best[1], zero)
            return [scale, error]

        return s.loop(count, best, one)

    if room.w is None and isinstance(levels, Uniform):
        best = [linear_grid(s, fmt, room, furthest)]
    else:
        best = [b.fmul(furthest, splat(s, 1 / levels.low)), splat(s, 3e38)]
        for side in (levels.low, levels.high):
            best = try_grid(furthest, side, fmt.GRID[2], best)
    if room.w is not None:
        near = further(*extremes(s, fmt, room, room.x, b.fmul(sxx, splat(s, SLIGHT / levels.low**2)))[:2])
        narrower = b.fcmp_ordered("<", s.fabs(near), b.fmul(s.fabs(furthest), splat(s, 0.9)))
        for side in (levels.low, levels.high):
            best = try_grid(near, side, any_of(s, narrower, fmt.GRID[2]), best)

    def polish(i, best):
        scale, _, sl2 = solve(inverse_of(s, best[0]))
        return [scale, sl2]

    scale, sl2 = s.loop(fmt.POLISH, [best[0], zero], polish)
    if fmt.INTEGERS is None:
        _linear_halves(s, fmt, room, scale, furthest, sxx)
    else:
        one_sided = b.or_(b.fcmp_ordered(">", low, zero), b.fcmp_ordered("<", high, zero))

        def least(inverse):
            """No scale leaves a smaller error than this with the levels that this inverse chooses."""
            return b.fadd(solve(inverse)[1], sxx)

        _linear_superblock(s, fmt, room, scale, sl2, furthest, least, one_sided, sxx)


def _linear_halves(s, fmt, room, scale, furthest, sxx):
    """The half floats near the scale."""
    zero = s.zeros(f32, LANES)

    def attempt(d, best):
        (d,), error = better(s, [d], best[:1], left_over(s, fmt, room, d, zero).e2, best[1])
        return [d, error]

    d = unit_of(s, scale)
    best = [zero, sxx]
    for one in (d, *steps_of(s, d)):
        best = attempt(one, best)
    d, _ = exact_levels(s, fmt, furthest, best[1], sxx, best, attempt)
    finish(s, room, d, zero, d, zero, zero, zero)


def _linear_superblock(s, fmt, room, scale, sl2, reach, least, one_sided, sxx):
    b, integers = s.b, fmt.INTEGERS
    per_block = fmt.BLOCK // fmt.GROUP
    total = lambda v: over_block(s, v, b.fadd, per_block)
    zero = s.zeros(f32, LANES)

    def neighbours(d, sc, around):
        def one(i, best):
            candidate = b.fadd(sc, grid_at(s, i, around[0], 1.0))
            candidate = s.fmin(s.fmax(candidate, splat(s, integers.low)), splat(s, integers.high))
            left = left_over(s, fmt, room, b.fmul(d, candidate), zero)
            new, error = better(s, [candidate, left.l2, left.el], [best[0], *best[2:]], left.e2, best[1])
            return [new[0], error, *new[1:]]

        return s.loop(around[1], [zero, sxx, zero, zero], one)  # zeros, before any

    def descend(scale, sl2, rounds, count, best):
        """From the half float nearest to the groups' own scales down, for some rounds."""

        def refit(i, state):
            d, sc, least, new_d = state
            guess = whole_of(s, b.fmul(scale, inverse_of(s, new_d)), integers)
            for around in fmt.AROUND:
                guess, error, l2, el = neighbours(new_d, guess, around)
            (d, sc), least = better(s, [new_d, guess], [d, sc], total(error), least)
            more = ratio_of(s, total(b.fmul(guess, el)), total(b.fmul(b.fmul(guess, guess), l2)))
            return [d, sc, least, unit_of(s, b.fadd(new_d, more))]

        top, bottom = (over_block(s, v, s.fmax, per_block) for v in (scale, b.fneg(scale)))
        furthest = b.select(b.fcmp_ordered(">", bottom, top), b.fneg(bottom), top)
        d = nearest_half(s, scale, sl2, furthest, fmt, total, count)
        return s.loop(rounds, [*best, d], refit)[:3]

    def exactly(i, best):
        """The furthest weight at level low + i."""
        scale = b.fdiv(reach, grid_at(s, i, fmt.LEVELS.low, 1.0))
        inverse = inverse_of(s, scale)
        promising = b.and_(exact, b.fcmp_ordered("<", total(least(inverse)), b.fadd(best[2], rounding)))

        def attempt(_, best):
            found = descend(scale, b.fmul(sxx, b.fmul(inverse, inverse)), 1, 2 * HALVES, best)
            return [b.select(exact, new, old) for new, old in zip(found, best, strict=True)]

        return s.loop(any_of(s, promising, 1), best, attempt)

    everything = total(sxx)
    rounding = b.fmul(everything, splat(s, CLOSED))
    best = descend(scale, sl2, fmt.REFITS, HALVES, [zero, zero, everything])
    exact = b.fcmp_ordered("<", best[2], b.fmul(everything, splat(s, EXACT / len(fmt.LEVELS.values) ** 2)))
    d, sc, _ = s.loop(any_of(s, exact, min(-fmt.LEVELS.low, SPANS)), best, exactly)
    if integers.high <= 31:  # with few levels, of which one side is used, the best integer may be far from the nearest
        one_sided = over_block(s, one_sided, b.and_, per_block)
        other = neighbours(d, splat(s, integers.low), (0, any_of(s, one_sided, integers.high + 1 - integers.low)))[0]
        sc = b.select(one_sided, other, sc)
    stored = b.fadd(sc, splat(s, fmt.BIAS))
    finish(s, room, b.fmul(d, sc), zero, d, zero, stored, zero)
