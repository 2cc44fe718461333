"""Microkernels for many rows of activations: block-quantized weights unpacked once and multiplied with all of them.

`prepare` turns `lanes` rows of weights into a panel whose words of `target.step` bytes stand column by column, `pack` does the
same to `target.tile` activation rows, and `tile` multiplies the two, one lane a row of weights, so that products of a whole
group add up in integers before one conversion. `pack_short` and `tile_short` do the same with `short(target)` activation rows.
Panel superblock: [256 / step][lanes] words of weights, [groups][lanes] scales, [groups][lanes] mins, [lanes] factors of whole
scales. All microkernels take int64 addresses and sizes; `acc` nonzero adds to what stands in out.
"""

from llvmlite import ir

from llamacli.cpu.kernels.formats import layout as formats
from llamacli.cpu.kernels.formats.layout import ACT_BYTES, FLOATS, QUANTIZED, S16, S32, D
from llamacli.cpu.kernels.formats.rows import Rows
from llamacli.cpu.kernels.jit.simd import Simd, f32, i8, i16, i32, i64, vec

LINE = 64  # bytes of a cache line
UNROLL = 2  # steps of `_short_products` in one round of its loop


def panel_bytes(name, lanes):
    """Bytes of one panel superblock (0 for the float types, whose tiles read the weights themselves)."""
    return 0 if name in FLOATS else _panel_size(QUANTIZED[name]) * lanes


def _panel_size(fmt):
    """Of one row: codes, scales, mins and a factor."""
    return 256 + 8 * (256 // fmt.group) + 4


def packed_bytes(name, tokens, target):
    """Bytes of one superblock of `tokens` activation rows as `pack` leaves them (0 for the float types)."""
    return 0 if name in FLOATS else _packed_size(QUANTIZED[name], target) * tokens


def _packed_size(fmt, target):
    """Of one token: codes, scales, and for each group a sum or a start of the integer sums, or both."""
    return 256 + 32 + 4 * (256 // fmt.group) * (2 if fmt.offset is None and centre(target, fmt) else 1)


def short(target):
    """Tokens of a short tile. The last tokens of a batch take short tiles, so that less padding is multiplied."""
    return target.tile - 2


def centre(target, fmt):
    """What a tile subtracts from every code, by starting the integer sums of products below zero.

    It is the format's offset, which then needs no term of its own; or half the largest code, where a group's sum fits 16 bits
    only with it. 16-bit addition wraps, so it is enough that the final sum fits.
    """
    if target.step == 8:
        return 0
    if fmt.offset is not None:
        return fmt.offset
    return (fmt.largest + 1) // 2 if adds_in_16_bits(target) and Simd.fits(fmt.largest) < fmt.group // 4 else 0


def adds_in_16_bits(target):
    """Whether a tile adds the products of a group in 16 bits. Registers of 64 bytes have room for sums of 32 bits."""
    return target.dot == "maddubs" and target.width == 32


def has_sums(target, fmt):
    """Whether a tile needs the sum of every group's activations, for the mins."""
    return fmt.offset is None or (fmt.offset != 0 and centre(target, fmt) == 0)


def has_whole_scales(target, fmt):
    """Whether a panel holds scales as integers, which widen the 16-bit sums, and one float for each superblock of a row."""
    return adds_in_16_bits(target) and fmt.group == 16 and fmt.offset is not None and hasattr(fmt, "whole_scales")


def prepare(module, target, fmt):
    """prepare(w, row_bytes, n_supers, panel): `lanes` rows into a panel."""
    s = Simd(module, target, "prepare", 4)
    w0, row_bytes, supers, panel0 = s.args
    rows, lanes, groups = Rows(s, row_bytes), s.lanes, 256 // fmt.group
    whole, middle = has_whole_scales(target, fmt), centre(target, fmt)

    def superblock(i, _):
        w, panel = s.add(w0, s.mul(i, formats.span(fmt))), s.add(panel0, s.mul(i, _panel_size(fmt) * lanes))
        for j in range(8):
            s.store(_in_steps(s, fmt.piece(rows, w, j)), panel, 32 * lanes * j)
        scale, least = fmt.scales(rows, w, 8)
        if middle and least is not None:
            least = s.b.fsub(least, s.b.fmul(scale, rows.fill(f32, groups, float(middle))))
        if whole:
            scale, factor = fmt.whole_scales(rows, w)
            if least is not None:  # in units of the factor; where that is 0, the scales become 0 and the factor 1
                none = s.b.fcmp_ordered("==", factor, rows.fill(f32, groups, 0.0))
                scale = s.b.select(none, rows.fill(i32, groups, 0), scale)
                factor = s.b.select(none, rows.fill(f32, groups, 1.0), factor)
                least = s.b.fdiv(least, factor)
            s.store(s.shuffle(factor, list(range(lanes))), panel, (256 + 8 * groups) * lanes)
            if adds_in_16_bits(target):  # as pairs of 16 bits
                upper = s.b.shl(scale, rows.fill(i32, groups, 16))
                scale = s.b.or_(upper, s.b.and_(scale, rows.fill(i32, groups, 0xFFFF)))
        s.store(scale, panel, 256 * lanes)
        if least is not None:
            s.store(least, panel, (256 + 4 * groups) * lanes)
        return []

    s.loop(supers, [], superblock)
    s.done()


def _in_steps(s, codes):
    """Words of 4 bytes of each row, regrouped as words of `step` bytes."""
    if s.target.step == 4:
        return codes
    words, n = s.bits(codes, i32), s.lanes
    return s.shuffle(words, [k + half * n + r for k in range(0, words.type.count, 2 * n) for r in range(n) for half in (0, 1)])


def pack(module, target, fmt, name="pack"):
    """pack(xs, n_supers, out): the activation rows at the target.tile addresses xs, side by side: [256 / step][tile] words,
    [8][tile] scales, then, where the tile needs them, [groups][tile] sums, negated (and times the format's offset), and
    [groups][tile] starts of the integer sums, so that `tile` walks through memory in one line.
    """
    s = Simd(module, target, name, 3)
    xs0, supers, out0 = s.args
    tokens, groups, step = target.tile, 256 // fmt.group, target.step
    factor, middle, size = (
        f32(-1.0 if fmt.offset is None else -float(fmt.offset)),
        centre(target, fmt),
        _packed_size(fmt, target),
    )
    starts_at = 72 + (groups if has_sums(target, fmt) else 0)

    def token(t, _):
        x0 = s.load(i64, s.add(xs0, s.mul(t, 8)))

        def superblock(i, _):
            x, start = s.add(x0, s.mul(i, ACT_BYTES)), s.add(out0, s.mul(i, size * tokens))
            words, out = s.add(start, s.mul(t, step)), s.add(start, s.mul(t, 4))
            for k in range(256 // step):
                s.store(s.load(ir.IntType(8 * step), x, step * k), words, step * tokens * k)
            for k in range(8):
                s.store(s.load(i32, x, D + 4 * k), out, 4 * tokens * (64 + k))
            for g in range(groups):
                if has_sums(target, fmt):
                    total = s.load(f32, x, (S32 if groups == 8 else S16) + 4 * g)
                    s.store(s.b.fmul(total, factor), out, 4 * tokens * (72 + g))
                if middle:
                    s.store(_start(s, fmt, middle, x, g), out, 4 * tokens * (starts_at + g))
            return []

        return s.loop(supers, [], superblock)

    s.loop(tokens, [], token)
    s.done()


def _start(s, fmt, middle, x, g):
    """What the integer sums of group g start at: -middle times the activations that each lane meets. Where sums have 16 bits, a
    lane of 32 has two: one meets the first half of every word of codes, the other the second.
    """
    wide = s.signed(s.load(vec(i8, fmt.group), x, fmt.group * g), i16)
    while wide.type.count > 4:
        n = wide.type.count // 2
        wide = s.b.add(s.shuffle(wide, list(range(n))), s.shuffle(wide, list(range(n, 2 * n))))
    pairs = s.b.add(s.shuffle(wide, [0, 2]), s.shuffle(wide, [1, 3]))
    if adds_in_16_bits(s.target):
        return s.b.bitcast(s.b.mul(pairs, s.fill(i16, 2, -middle)), i32)
    halves = [s.b.sext(s.b.extract_element(pairs, i32(k)), i32) for k in range(2)]
    return s.b.mul(s.b.add(*halves), i32(-middle))


def tile(module, target, fmt, name="tile"):
    """tile(panel, n_supers, packed, outs, offset, acc, ahead, lines): target.tile_vectors panels, one after the other, times
    target.tile tokens. Meanwhile it prefetches what will be needed next: `lines` cache lines in each superblock, from `ahead`
    on.

    Token t gets `lanes` products of each panel at outs[t] + offset. A broadcast activation is loaded once for two panels, so
    that the load ports do not limit the products.
    """
    s = Simd(module, target, name, 8)
    panel0, supers, packed0, outs0, offset, acc, ahead, lines = s.args
    lanes, groups, tokens, vectors = s.lanes, 256 // fmt.group, target.tile, target.tile_vectors
    size, packed_size, line = _panel_size(fmt) * lanes, _packed_size(fmt, target) * tokens, lanes * 4
    per_scale = groups // 8  # groups that share one activation scale
    sums_too, whole = has_sums(target, fmt), has_whole_scales(target, fmt)
    starts_at = 72 + (groups if sums_too else 0)
    panels = [s.add(panel0, s.mul(s.mul(supers, v), size)) for v in range(vectors)]
    each = [(v, t) for v in range(vectors) for t in range(tokens)]
    multiply = _products_of_pairs if target.step == 8 else _short_products if adds_in_16_bits(target) else _products

    def superblock(i, sums):
        here, packed = [s.add(panel, s.mul(i, size)) for panel in panels], s.add(packed0, s.mul(i, packed_size))
        next_at = s.add(ahead, s.mul(s.mul(i, lines), LINE))
        s.loop(lines, [], lambda k, _: s.prefetch(s.add(next_at, s.mul(k, LINE)), 0, LINE, 2) or [])

        def thirty_two(g, flat):
            sums = dict(zip(each, flat, strict=True))
            w, x = [s.add(panel, s.mul(g, 8 * line)) for panel in here], s.add(packed, s.mul(g, 8 * 4 * tokens))
            d_at, together = s.add(packed, s.mul(g, 4 * tokens)), {}  # what the groups with one activation scale add up to
            for part in range(per_scale):
                at = [s.add(panel, s.mul(s.add(s.mul(g, per_scale), part), line)) for panel in here]
                total_at = s.add(packed, s.mul(s.add(s.mul(g, per_scale), part), 4 * tokens))
                start = lambda t, at=total_at: s.splat(s.load(i32, at, 4 * (starts_at * tokens + t)))
                starts = [start(t) for t in range(tokens)] if centre(target, fmt) else None
                scales = lambda element, n, at=at: [s.load(vec(element, n), a, 256 * lanes) for a in at]
                dots = multiply(s, fmt, w, x, part, tokens, starts, scales(i16, 2 * lanes) if whole else None)
                by = None if whole else scales(f32, lanes)  # after the products, which need the registers
                for t, v in [(t, v) for t in range(tokens) for v in range(vectors)]:
                    d = s.splat(s.load(f32, d_at, 4 * (64 * tokens + t)))
                    total = s.splat(s.load(f32, total_at, 4 * (72 * tokens + t))) if sums_too else None
                    if sums_too and fmt.offset is not None:  # scale * (d * dot - offset * sum)
                        sums[v, t] = s.fma(s.fma(s.to_float(dots[v, t]), d, total), by[v], sums[v, t])
                        continue
                    if whole:
                        value = s.b.add(together[v, t], dots[v, t]) if part else dots[v, t]
                    else:
                        value = s.to_float(dots[v, t])
                        value = s.fma(value, by[v], together[v, t]) if part else s.b.fmul(value, by[v])
                    together[v, t] = value
                    if part == per_scale - 1:
                        sums[v, t] = s.fma(s.to_float(value) if whole else value, d, sums[v, t])
                    if sums_too:
                        least = s.load(vec(f32, lanes), at[v], (256 + 4 * groups) * lanes)
                        sums[v, t] = s.fma(least, total, sums[v, t])
            return [sums[key] for key in each]

        if not whole:
            return s.loop(8, sums, thirty_two)
        inner = s.loop(8, [s.zeros()] * len(each), thirty_two)
        ds = [s.load(vec(f32, lanes), panel, (256 + 8 * groups) * lanes) for panel in here]
        return [s.fma(value, ds[v], total) for (v, _), value, total in zip(each, inner, sums, strict=True)]

    sums = s.loop(supers, [s.zeros()] * len(each), superblock)
    keep = s.b.icmp_signed("!=", acc, i64(0))
    for (v, t), value in zip(each, sums, strict=True):
        at = s.add(s.load(i64, outs0, 8 * t), offset)
        old = s.b.select(keep, s.load(vec(f32, lanes), at, v * s.width), s.zeros())
        s.store(s.b.fadd(value, old), at, v * s.width)
    s.done()


def _products(s, fmt, w, x, part, tokens, starts, _):
    """{(panel, token): int32 lanes} of group `part` of the panels w and the packed tokens x; `starts`: of each token's sums."""
    steps = fmt.group // 4
    dots = {(v, t): s.bits(starts[t], i32) if starts else s.zeros(i32) for v in range(len(w)) for t in range(tokens)}
    for k in range(part * steps, (part + 1) * steps):
        columns = [s.load(vec(i8, s.width), at, k * s.width) for at in w]
        side = s.load(vec(i32, tokens), x, 4 * tokens * k) if s.target.dot == "sdot" else None  # it can read any one lane
        for t in range(tokens):
            codes = s.shuffle(side, [t] * s.lanes) if side else s.splat(s.load(i32, x, 4 * (tokens * k + t)))
            for v, column in enumerate(columns):
                dots[v, t] = s.dot4(dots[v, t], column, s.bits(codes, i8), fmt.largest)
    return dots


def _short_products(s, fmt, w, x, part, tokens, starts, by):
    """`_products` with sums in 16 bits, which are widened only before they would overflow. Widening multiplies by `by`, pairs
    of 16-bit factors of each panel, or by ones. Two products of signed codes do not fit 16 bits, so each is widened.

    The steps are a loop, UNROLL at a time. In straight-line code LLVM would load so far ahead that registers run out.
    """
    steps, signed = fmt.group // 4, hasattr(fmt, "signed")
    run = steps if signed or starts else min(steps, s.fits(fmt.largest))
    each, total = [(v, t) for v in range(len(w)) for t in range(tokens)], {}
    element, n = (i32, s.lanes) if signed else (i16, 2 * s.lanes)
    ones = s.fill(i16, 2 * s.lanes, 1)
    for first in range(part * steps, (part + 1) * steps, run):

        def some(i, sums, first=first):
            sums = dict(zip(each, sums, strict=True))
            k = s.add(s.mul(i, UNROLL), first)
            columns_at, words_at = [s.add(at, s.mul(k, s.width)) for at in w], s.add(x, s.mul(k, 4 * tokens))
            for step in range(UNROLL):
                columns = [s.load(vec(i8, s.width), at, step * s.width) for at in columns_at]
                for t in range(tokens):
                    codes = s.bits(s.splat(s.load(i32, words_at, 4 * (tokens * step + t))), i8)
                    for v, column in enumerate(columns):
                        product = s.widen_pairs(s.signed_pairs(column, codes), ones) if signed else s.pairs(column, codes)
                        sums[v, t] = s.b.add(sums[v, t], product)
            return [sums[key] for key in each]

        before = [s.bits(starts[t], element) if starts else s.fill(element, n, 0) for _, t in each]
        sums = dict(zip(each, s.loop(run // UNROLL, before, some), strict=True))
        for v, t in each:
            wide = sums[v, t] if signed else s.widen_pairs(sums[v, t], ones if by is None else by[v])
            total[v, t] = s.b.add(total[v, t], wide) if (v, t) in total else wide
    return total


def _products_of_pairs(s, fmt, w, x, part, tokens, *_):
    """The same by products of two rows with two tokens, put in the order of rows at the group's end."""
    steps, evens, panels, halves = fmt.group // 8, list(range(0, 2 * s.lanes, 2)), range(len(w)), (0, 1)
    each = [(v, t) for v in panels for t in range(0, tokens, 2)]
    squares = {(v, t, half): s.zeros(i32) for v, t in each for half in halves}
    for k in range(part * steps, (part + 1) * steps):
        columns = {(v, half): s.load(vec(i8, s.width), w[v], (2 * k + half) * s.width) for v in panels for half in halves}
        for t in range(0, tokens, 2):
            pair = s.load(vec(i8, 16), x, 8 * (tokens * k + t))
            codes = s.concat(pair, pair)
            for (v, half), column in columns.items():
                squares[v, t, half] = s.dot8(squares[v, t, half], column, codes)
    dots = {}
    for v, t in each:
        low, high = (squares[v, t, half] for half in halves)
        dots[v, t], dots[v, t + 1] = (s.shuffle(low, [k + odd for k in evens], high) for odd in (0, 1))
    return dots
