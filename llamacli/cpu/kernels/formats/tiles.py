"""Leaves for many rows of activations: block-quantized weights unpacked once and multiplied with all of them.

`prepare` turns `lanes` rows of weights into a panel whose words of `target.step` bytes stand column by column, `pack` does the
same to `target.tile` activation rows, and `tile` multiplies the two, one lane a row of weights, so that products of a whole
group add up in integers before one conversion. Panel superblock: [256 / step][lanes] words of weights, [groups][lanes] scales,
[groups][lanes] mins. All leaves take int64 addresses and sizes; `acc` nonzero adds to what stands in out. They know nothing of
threads, experts or tokens' order.
"""

from llvmlite import ir

from llamacli.cpu.kernels.formats import layout as formats
from llamacli.cpu.kernels.formats.layout import ACT_BYTES, FLOATS, QUANTIZED, S16, S32, D
from llamacli.cpu.kernels.jit.simd import Simd, f32, i8, i32, i64, vec


def panel_bytes(name, lanes):
    """Bytes of one panel superblock (0 for the float types, whose tiles read the weights themselves)."""
    return 0 if name in FLOATS else (256 + 8 * (256 // QUANTIZED[name].group)) * lanes


def packed_bytes(name, tokens):
    """Bytes of one superblock of `tokens` activation rows as `pack` leaves them (0 for the float types)."""
    return 0 if name in FLOATS else (256 + 32 + 4 * (256 // QUANTIZED[name].group)) * tokens


def prepare(module, target, fmt):
    """prepare(w, row_bytes, n_supers, panel): `lanes` rows into a panel."""
    s = Simd(module, target, "prepare", 4)
    w0, row_bytes, supers, panel0 = s.args
    lanes, groups, word = s.lanes, 256 // fmt.group, ir.IntType(8 * target.step)
    size, across = (256 + 8 * groups) * lanes, s.width // target.step
    order, factors = formats.order(s, fmt), formats.factors(s, fmt)
    factors = ir.Constant(vec(f32, groups), [factors[g * 8 // groups] for g in range(groups)])

    def superblock(i, _):
        panel = s.add(panel0, s.mul(i, size))
        rows = [s.add(s.add(w0, s.mul(row_bytes, r)), s.mul(i, formats.span(fmt))) for r in range(lanes)]
        of_row = [formats.codes(s, fmt, w) for w in rows]
        for c, registers in enumerate(zip(*of_row, strict=True)):
            words = [s.bits(register, word) for register in registers]
            for r in range(0, lanes, across):
                for k, column in enumerate(s.transpose(words[r : r + across])):
                    piece, left = divmod(c * across + k, 16 // target.step)
                    s.store(column, panel, ((order[piece] * 16 // target.step + left) * lanes + r) * target.step)
        both = [formats.scales_and_mins(s, fmt, w, 8) for w in rows]
        both = [s.concat(s.b.fmul(scale, factors), least) for scale, least in both]
        for part in range(2 * groups // lanes):
            pick = list(range(part * lanes, (part + 1) * lanes))
            for k, column in enumerate(s.transpose([s.shuffle(v, pick) for v in both])):
                s.store(column, panel, 256 * lanes + (part * lanes + k) * lanes * 4)
        return []

    s.loop(supers, [], superblock)
    s.done()


def pack(module, target, fmt):
    """pack(xs, n_supers, out): the activation rows at the target.tile addresses xs, side by side: [256 / step][tile] words,
    [8][tile] scales, [groups][tile] sums, negated (and times the format's offset), so that `tile` walks through memory in one
    line.
    """
    s = Simd(module, target, "pack", 3)
    xs0, supers, out0 = s.args
    tokens, groups, step = target.tile, 256 // fmt.group, target.step
    factor = f32(-1.0 if fmt.offset is None else -float(fmt.offset))

    def token(t, _):
        x0 = s.load(i64, s.add(xs0, s.mul(t, 8)))

        def superblock(i, _):
            x, start = s.add(x0, s.mul(i, ACT_BYTES)), s.add(out0, s.mul(i, (288 + 4 * groups) * tokens))
            words, out = s.add(start, s.mul(t, step)), s.add(start, s.mul(t, 4))
            for k in range(256 // step):
                s.store(s.load(ir.IntType(8 * step), x, step * k), words, step * tokens * k)
            for k in range(8):
                s.store(s.load(i32, x, D + 4 * k), out, 4 * tokens * (64 + k))
            for g in range(groups):
                total = s.load(f32, x, (S32 if groups == 8 else S16) + 4 * g)
                s.store(s.b.fmul(total, factor), out, 4 * tokens * (72 + g))
            return []

        return s.loop(supers, [], superblock)

    s.loop(tokens, [], token)
    s.done()


def tile(module, target, fmt):
    """tile(panel, n_supers, packed, outs, offset, acc): target.tile_vectors panels, one after the other, times target.tile
    tokens.

    Token t gets `lanes` products of each panel at outs[t] + offset. Loading a broadcast activation once for two panels is what
    keeps the load ports out of the way of the multipliers.
    """
    s = Simd(module, target, "tile", 6)
    panel0, supers, packed0, outs0, offset, acc = s.args
    lanes, groups, tokens, vectors = s.lanes, 256 // fmt.group, target.tile, target.tile_vectors
    size, packed_size, line = (256 + 8 * groups) * lanes, (288 + 4 * groups) * tokens, lanes * 4
    per_scale = groups // 8  # groups that share one activation scale
    panels = [s.add(panel0, s.mul(s.mul(supers, v), size)) for v in range(vectors)]
    each = [(v, t) for v in range(vectors) for t in range(tokens)]

    def superblock(i, sums):
        here, packed = [s.add(panel, s.mul(i, size)) for panel in panels], s.add(packed0, s.mul(i, packed_size))

        def thirty_two(g, flat):
            sums = dict(zip(each, flat, strict=True))
            w, x = [s.add(panel, s.mul(g, 8 * line)) for panel in here], s.add(packed, s.mul(g, 8 * 4 * tokens))
            d_at = s.add(packed, s.mul(g, 4 * tokens))
            for part in range(per_scale):
                dots = (_products if target.step == 4 else _products_of_pairs)(s, fmt, w, x, part, tokens)
                at = [s.add(panel, s.mul(s.add(s.mul(g, per_scale), part), line)) for panel in here]
                total_at = s.add(packed, s.mul(s.add(s.mul(g, per_scale), part), 4 * tokens))
                for t in range(tokens):
                    d = s.splat(s.load(f32, d_at, 4 * (64 * tokens + t)))
                    total = s.splat(s.load(f32, total_at, 4 * (72 * tokens + t)))
                    for v in range(vectors):
                        scale, value = s.load(vec(f32, lanes), at[v], 256 * lanes), s.to_float(dots[v, t])
                        if fmt.offset is not None:  # scale * (d * dot - offset * sum)
                            sums[v, t] = s.fma(s.fma(value, d, total), scale, sums[v, t])
                        else:
                            least = s.load(vec(f32, lanes), at[v], (256 + 4 * groups) * lanes)
                            sums[v, t] = s.fma(least, total, s.fma(s.b.fmul(value, scale), d, sums[v, t]))
            return [sums[key] for key in each]

        return s.loop(8, sums, thirty_two)

    sums = s.loop(supers, [s.zeros()] * len(each), superblock)
    keep = s.b.icmp_signed("!=", acc, i64(0))
    for (v, t), value in zip(each, sums, strict=True):
        at = s.add(s.load(i64, outs0, 8 * t), offset)
        old = s.b.select(keep, s.load(vec(f32, lanes), at, v * s.width), s.zeros())
        s.store(s.b.fadd(value, old), at, v * s.width)
    s.done()


def _products(s, fmt, w, x, part, tokens):
    """{(panel, token): int32 lanes} of group `part` of the panels w and the packed tokens x."""
    steps, dots = fmt.group // 4, {(v, t): s.zeros(i32) for v in range(len(w)) for t in range(tokens)}
    for k in range(part * steps, (part + 1) * steps):
        columns = [s.load(vec(i8, s.width), at, k * s.width) for at in w]
        side = s.load(vec(i32, tokens), x, 4 * tokens * k) if s.target.dot == "sdot" else None  # it can read any one lane
        for t in range(tokens):
            codes = s.shuffle(side, [t] * s.lanes) if side else s.splat(s.load(i32, x, 4 * (tokens * k + t)))
            for v, column in enumerate(columns):
                dots[v, t] = s.dot4(dots[v, t], column, s.bits(codes, i8), fmt.wide)
    return dots


def _products_of_pairs(s, fmt, w, x, part, tokens):
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
