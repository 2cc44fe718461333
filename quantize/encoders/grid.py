"""The grid of scales where all weights count alike, in 16-bit integers: half the instructions of a grid in float32.

In: groups lane by lane (search.py), the ends of each group. Out: for each group the scale, and for affine formats the minimum,
that suit the codes of the best candidate; the search goes on from there in float32.

Weights become whole numbers of 15 bits, which moves a weight by 1/4000 of a step at most (of 16 levels). A candidate is a
factor, the same for all lanes, whose products' upper bits are the levels. The sums over a group are exact. Two weights of a
group are neighbours, so that one instruction multiplies and adds both.
"""

from llamacli.cpu.kernels.jit.simd import f32, i16, i32, vec
from quantize.encoders.levels import LANES, splat
from quantize.encoders.parts import SHIFT, SHIFTS, clearly_better, inverse_of

MOST = 32767
PAIRS = 4  # pairs of weights in a round of the loop


def affine_grid(s, fmt, room, low, span, to_zero):
    """(scale, minimum) of each lane for weights from `low` on; `to_zero` is the number 0 on the same axis, as a bound of the
    minimum, or None.
    """
    b, n = s.b, fmt.GROUP
    top = fmt.LEVELS.high
    bits = 15 - top.bit_length()  # of a level's fraction: what is beyond the last level saturates
    unit = b.fmul(span, splat(s, 1 / MOST))
    per_unit = inverse_of(s, unit)
    total = _to_pairs(s, fmt, room, room.centred, per_unit, b.fneg(b.fmul(low, per_unit)))
    sum_x = s.to_float(total)
    if to_zero is not None:
        zero_at = b.fmul(b.fsub(to_zero, low), per_unit)
        beyond = s.fma(zero_at, splat(s, -n), sum_x)
        beyond2 = b.fmul(beyond, beyond)

    def attempt(shift):
        def one(i, best):
            levels = b.fadd(b.fmul(b.sitofp(i, f32), f32(fmt.GRID[1])), f32(top + fmt.GRID[0]))
            factor = _word(s, b.fmul(levels, f32(2.0 ** (bits + 1))), 65535.0)
            moved = b.fmul(levels, f32(shift * SHIFT / top * 2.0**bits))
            half = f32(2.0 ** (bits - 1))
            offset = _word(s, b.fsub(moved, half) if shift else half, 65535.0)
            level = lambda x: b.lshr(
                _saturating(s, "usub" if shift else "sadd", _high(s, x, factor), offset), s.fill(i16, 2 * LANES, bits)
            )
            sums, sum_l2, sum_xl = _sums(s, fmt, room, level, True)
            product = s.to_float(b.sub(b.mul(sum_xl, s.fill(i32, LANES, n)), b.mul(sums, total)))
            spread = s.to_float(b.sub(b.mul(sum_l2, s.fill(i32, LANES, n)), b.mul(sums, sums)))
            spread = s.fmax(spread, splat(s, 1.0))  # 0 where all levels are equal: the scale is 0 then
            sum_l, against, more = s.to_float(sums), product, s.zeros(f32, LANES)
            if to_zero is not None:  # where the best minimum would be above 0, the best line through 0
                above = b.fcmp_ordered(">", b.fmul(beyond, spread), b.fmul(product, sum_l))
                through = s.fma(b.fneg(zero_at), sum_l, s.to_float(sum_xl))
                product = b.select(above, through, product)
                spread = b.select(above, s.fmax(s.to_float(sum_l2), splat(s, 1.0)), spread)
                against = b.select(above, b.fmul(through, splat(s, n)), against)
                more = b.select(above, beyond2, more)
            scale = b.fdiv(product, spread)
            minimum = b.fmul(s.fma(b.fneg(scale), sum_l, sum_x), splat(s, 1 / n))
            if to_zero is not None:
                minimum = b.select(above, zero_at, minimum)
            error = b.fsub(more, b.fmul(scale, against))
            new, error = clearly_better(s, [scale, minimum], best[:2], error, best[2], s.zeros(f32, LANES))
            return [*new, error]

        return one

    best = [splat(s, MOST / top), s.zeros(f32, LANES), splat(s, 3e38)]
    for shift in range(SHIFTS):
        best = s.loop(fmt.GRID[2], best, attempt(shift))
    return b.fmul(best[0], unit), s.fma(best[1], unit, low)


def linear_grid(s, fmt, room, furthest):
    """The scale of each lane; the furthest weight is at, or some way beyond, the level at one end."""
    b, levels, grid = s.b, fmt.LEVELS, getattr(fmt, "PLAIN_GRID", fmt.GRID)
    bits = 15 - (levels.high - levels.low).bit_length()
    unit = b.fmul(furthest, splat(s, 1 / MOST))
    _to_pairs(s, fmt, room, room.x, inverse_of(s, unit), s.zeros(f32, LANES))

    def attempt(side):
        def one(i, best):
            g = b.fadd(b.fmul(b.sitofp(i, f32), f32(side * grid[1])), f32(side * (1 + grid[0])))
            factor = _word(s, b.fmul(g, f32(2.0**bits)), MOST)

            def level(x):
                t = b.add(_rounded_high(s, x, factor), s.fill(i16, 2 * LANES, 1 << (bits - 1)))
                return b.ashr(_saturating(s, "sadd", t, t), s.fill(i16, 2 * LANES, bits + 1))

            _, sum_l2, sum_xl = _sums(s, fmt, room, level, False)
            product = s.to_float(sum_xl)
            scale = b.fdiv(product, s.fmax(s.to_float(sum_l2), splat(s, 1.0)))
            (scale,), error = clearly_better(s, [scale], best[:1], b.fneg(b.fmul(scale, product)), best[1], s.zeros(f32, LANES))
            return [scale, error]

        return one

    best = [splat(s, MOST / levels.low), splat(s, 3e38)]
    for side in (levels.low, levels.high):
        best = s.loop(grid[2], best, attempt(side))
    return b.fmul(best[0], unit)


def _to_pairs(s, fmt, room, values, factor, offset):
    """value * factor + offset, rounded, to room.pairs: two of a group in each of LANES int32; their sums."""

    def one(j, total):
        pair = []
        for k in range(2):
            x = s.load(vec(f32, LANES), s.add(values, s.mul(s.add(s.mul(j, 2), k), 4 * LANES)))
            pair.append(s.round(s.fmin(s.fmax(s.fma(x, factor, offset), splat(s, -MOST)), splat(s, MOST))))
        low = s.b.and_(pair[0], s.fill(i32, LANES, 0xFFFF))
        s.store(s.b.or_(low, s.b.shl(pair[1], s.fill(i32, LANES, 16))), s.add(room.pairs, s.mul(j, 4 * LANES)))
        return [s.b.add(total[0], s.b.add(*pair))]

    return s.loop(fmt.GROUP // 2, [s.zeros(i32, LANES)], one)[0]


def _sums(s, fmt, room, level, plain):
    """Sums of l (where `plain`), l^2 and x l over each group, int32."""
    b, words = s.b, vec(i16, 2 * LANES)

    def some(i, sums):
        total, square, product = sums
        for j in range(PAIRS):
            x = s.load(words, s.add(room.pairs, s.mul(s.add(s.mul(i, PAIRS), j), 4 * LANES)))
            found = level(x)
            total = b.add(total, found) if plain else total
            square, product = b.add(square, _dot2(s, found, found)), b.add(product, _dot2(s, found, x))
        return [total, square, product]

    start = [s.zeros(i16, 2 * LANES), s.zeros(i32, LANES), s.zeros(i32, LANES)]
    total, square, product = s.loop(fmt.GROUP // (2 * PAIRS), start, some)
    return _dot2(s, total, s.fill(i16, 2 * LANES, 1)), square, product


def _word(s, value, most):
    """A float as 16-bit whole number, at most `most`, in all lanes."""
    bounded = s.b.select(s.b.fcmp_ordered("<", value, f32(most)), value, f32(most))
    return s.splat(s.b.trunc(s.b.fptosi(s.b.fadd(bounded, f32(0.0)), i32), i16), 2 * LANES)


def _dot2(s, a, b):
    """a[2l] * b[2l] + a[2l+1] * b[2l+1] of int16 in int32 lanes."""
    if found := _by_register(s, ("pmadd.wd", "pmaddw.d"), i32, a, b):
        return found
    n = a.type.count
    even, odd = ([s.signed(s.shuffle(v, list(range(k, n, 2)))) for v in (a, b)] for k in range(2))
    return s.b.add(s.b.mul(*even), s.b.mul(*odd))


def _high(s, a, b):
    """The upper 16 bits of the products of unsigned words."""
    if found := _by_register(s, ("pmulhu.w", "pmulhu.w"), i16, a, b):
        return found
    n = a.type.count
    product = s.b.mul(s.unsigned(a), s.unsigned(b))
    return s.b.trunc(s.b.lshr(product, s.fill(i32, n, 16)), vec(i16, n))


def _rounded_high(s, a, b):
    """a * b / 2**15 of signed words, rounded."""
    if found := _by_register(s, ("pmul.hr.sw", "pmul.hr.sw"), i16, a, b):
        return found
    n = a.type.count
    product = s.b.add(s.b.mul(s.signed(a), s.signed(b)), s.fill(i32, n, 1 << 14))
    return s.b.trunc(s.b.ashr(product, s.fill(i32, n, 15)), vec(i16, n))


def _by_register(s, names, element, a, b):
    """x86's instruction on each register of the words, by its names of AVX2 and AVX-512; None on other processors.

    LLVM also recognizes these instructions in patterns of plain operations, but not in every place.
    """
    if not s.target.triple.startswith("x86") or s.target.dot == "plain":
        return None
    n = s.width // 2
    name = f"llvm.x86.avx512.{names[1]}.512" if s.width == 64 else f"llvm.x86.avx2.{names[0]}"
    fn = s._intrinsic(name, vec(element, s.width * 8 // element.width), vec(i16, n), vec(i16, n))
    parts = []
    for k in range(0, a.type.count, n):
        pick = list(range(k, k + n))
        parts.append(s.b.call(fn, [s.shuffle(a, pick), s.shuffle(b, pick)]))
    return parts[0] if len(parts) == 1 else s.concat(*parts)


def _saturating(s, op, a, b):
    """`op`: sadd or usub."""
    return s.b.call(s._intrinsic(f"llvm.{op}.sat.v{a.type.count}i16", *[a.type] * 3), [a, b])
