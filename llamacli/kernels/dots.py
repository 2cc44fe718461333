"""Leaves for matrix products: block-quantized rows against int8 activations, and float rows against float activations.

Quantized. An activation row is a sequence of superblocks of ACT_BYTES: 256 int8, then 8 scales, 8 scaled sums of 32 and 16
scaled sums of 16, float32. A format module answers `piece` (32 weights as unsigned bytes u) and `scales` (a factor and a
minimum for each group), so that weight = scale * u - min, and

    dot = sum over groups of  d * scale * sum(u * x)  -  min * (d * sum(x)).

`matvec` does rows against one activation row, reading the weights once, front to back, at memory speed. `prepare` turns
`lanes` rows into a panel whose words of `target.step` bytes stand column by column, `pack` does the same to `target.tile`
activation rows, and `tile` multiplies the two, one lane a row of weights, so that products of a whole group add up in integers
before one conversion: the unpacking is paid once for all tokens. Panel superblock: [256 / step][lanes] words of weights,
[groups][lanes] scales, [groups][lanes] mins.

Float. `matvec` and `tile` read F32, F16 or BF16 rows as they are.

All leaves take int64 addresses and sizes; `acc` nonzero adds to what stands in out. They know nothing of threads, experts or
tokens.
"""

from types import SimpleNamespace

from llvmlite import ir

from llamacli.kernels import iq4_nl, iq4_xs, q2_k, q3_k, q4_0, q4_1, q4_k, q5_0, q5_1, q5_k, q6_k, q8_0
from llamacli.kernels.simd import Simd, f16, f32, i8, i16, i32, i64, vec

ACT_BYTES = 384
D, S32, S16 = 256, 288, 320  # where scales and sums stand in an activation superblock
ROWS = 2  # rows that matvec takes side by side
AHEAD = 4096  # bytes that matvec prefetches ahead
FLOAT_ROWS, FLOAT_TOKENS = 4, 4

QUANTIZED = {
    **{"Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1, "Q8_0": q8_0, "IQ4_NL": iq4_nl},
    **{"Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k, "IQ4_XS": iq4_xs},
}
FLOATS = ("F32", "F16", "BF16")
SYMBOLS = ("dequantize", "matvec", "prepare", "pack", "tile")
FLOAT_SYMBOLS = ("dequantize", "matvec", "tile")


def panel_bytes(name, lanes):
    """Bytes of one panel superblock (0 for the float types, whose tiles read the weights themselves)."""
    return 0 if name in FLOATS else (256 + 8 * (256 // QUANTIZED[name].group)) * lanes


def quantized(name, target):
    """The module of leaves for one block format."""
    fmt, module = QUANTIZED[name], ir.Module(name)
    _dequantize(module, target, fmt)
    if fmt.wide and target.dot == "sdot":
        fmt = _signed(fmt)
    _matvec(module, target, fmt)
    _prepare(module, target, fmt)
    _pack(module, target, fmt)
    _tile(module, target, fmt)
    return module


def floats(name, target):
    """The module of leaves for one float type."""
    module = ir.Module(name)
    _float_dequantize(module, target, name)
    _float_dots(module, target, name, "matvec", FLOAT_ROWS, 1)
    # sums of a tile are twice as many registers where a vector takes two of them
    _float_dots(module, target, name, "tile", FLOAT_ROWS // 2 if target.neon else FLOAT_ROWS, FLOAT_TOKENS)
    return module


# quantized


def _signed(fmt):
    """The format with codes 128 lower, so that they are signed bytes: some CPUs multiply no others."""
    piece = lambda s, w, j: s.b.xor(fmt.piece(s, w, j), s.fill(i8, 32, -128))  # noqa: E731
    return SimpleNamespace(**{**vars(fmt), "piece": piece, "offset": fmt.offset - 128, "wide": False})


def _span(fmt, n=8):
    return n * fmt.nbytes if fmt.block == 32 else fmt.nbytes


def _chunk(s, fmt, w, c):
    """Weights c * width onwards, one register of them."""
    if s.width == 64 and hasattr(fmt, "chunk"):
        return fmt.chunk(s, w, c)
    return fmt.piece(s, w, c) if s.width == 32 else s.concat(fmt.piece(s, w, 2 * c), fmt.piece(s, w, 2 * c + 1))


def _scales_and_mins(s, fmt, w, n):
    scale, least = fmt.scales(s, w, n)
    return scale, least if least is not None else s.b.fmul(scale, s.fill(f32, scale.type.count, float(fmt.offset)))


def _dequantize(module, target, fmt):
    """dequantize(w, n_cols, out): one row as float32."""
    s = Simd(module, target, "dequantize", 3)
    w0, n_cols, out0 = s.args
    pieces = fmt.block // 32

    def one_block(i, _):
        w, out = s.add(w0, s.mul(i, fmt.nbytes)), s.add(out0, s.mul(i, 4 * fmt.block))
        scale, least = _scales_and_mins(s, fmt, w, 1)
        for j in range(pieces):
            pick = [(32 * j + lane) // fmt.group for lane in range(32)]
            q = s.to_float(s.unsigned(fmt.piece(s, w, j)))
            s.store(s.b.fsub(s.b.fmul(q, s.shuffle(scale, pick)), s.shuffle(least, pick)), out, 128 * j)
        return []

    s.loop(s.b.sdiv(n_cols, i64(fmt.block)), [], one_block)
    s.done()


def _matvec(module, target, fmt):
    """matvec(w, row_bytes, n_rows, n_cols, x, out, acc): out[r] = row r . x for int8 activations x; n_cols a multiple of the
    block.
    """
    s = Simd(module, target, "matvec", 7)
    w0, row_bytes, n_rows, n_cols, x, out, acc = s.args
    supers = s.b.lshr(n_cols, i64(8))
    keep = s.b.icmp_signed("!=", acc, i64(0))

    groups = 256 // fmt.group
    joined = s.lanes == 2 * groups and hasattr(fmt, "both")  # scales and mins share a register, as d and sums of x do

    def rows(first, count):
        starts = [s.add(w0, s.mul(row_bytes, s.add(first, r))) for r in range(count)]

        def superblock(i, sums):
            xs, new = s.add(x, s.mul(i, ACT_BYTES)), []
            d = s.load(vec(f32, 8), xs, D)
            if groups == 16:
                d = s.shuffle(d, [g // 2 for g in range(16)])
            total = s.load(vec(f32, groups), xs, S32 if groups == 8 else S16)
            for r, start in enumerate(starts):
                w = s.add(start, s.mul(i, _span(fmt)))
                s.prefetch(w, AHEAD, _span(fmt))
                value, low = sums[2 * r : 2 * r + 2]
                if joined:
                    scale = s.b.fmul(fmt.both(s, w), s.load(vec(f32, s.lanes), xs, D))
                    low = s.b.fadd(low, scale)  # of its upper half
                else:
                    scale, least = _scales_and_mins(s, fmt, w, 8)
                    scale = s.b.fmul(scale, d)
                    low = s.fma(least, total, low)
                for c in range(256 // s.width):
                    dots = s.dot4(s.zeros(i32), _chunk(s, fmt, w, c), s.load(vec(i8, s.width), xs, c * s.width), fmt.wide)
                    spread = s.shuffle(scale, [(c * s.width + 4 * lane) // fmt.group for lane in range(s.lanes)])
                    value = s.fma(s.to_float(dots), spread, value)
                new += [value, low]
            return new

        sums = s.loop(supers, [s.zeros(), s.zeros(f32, s.lanes if joined else groups)] * count, superblock)
        lows = [s.shuffle(low, list(range(groups, s.lanes))) if joined else low for low in sums[1::2]]
        values = [s.b.fsub(s.sum(value), s.sum(low)) for value, low in zip(sums[::2], lows, strict=True)]
        if fmt.block == 32:
            values = _odd_blocks(s, fmt, starts, supers, n_cols, x, values)
        for r, value in enumerate(values):
            at = s.add(out, s.mul(s.add(first, r), 4))
            old = s.b.select(keep, s.load(f32, at), f32(0.0))
            s.store(s.b.fadd(value, old), at)

    pairs = s.b.sdiv(n_rows, i64(ROWS))
    s.loop(pairs, [], lambda i, _: rows(s.mul(i, ROWS), ROWS) or [])
    s.loop(n_rows, [], lambda i, _: rows(i, 1) or [], start=s.mul(pairs, ROWS))
    s.done()


def _odd_blocks(s, fmt, starts, supers, n_cols, x, values):
    """The 32-weight blocks after the last whole superblock, one at a time."""
    xs, base = s.add(x, s.mul(supers, ACT_BYTES)), s.mul(supers, 8)

    def one(k, sums):
        new = []
        d = s.load(f32, s.add(xs, s.mul(k, 4)), D)
        total = s.load(f32, s.add(xs, s.mul(k, 4)), S32)
        codes = s.load(vec(i8, 32), s.add(xs, s.mul(k, 32)))
        for start, value in zip(starts, sums, strict=True):
            w = s.add(start, s.mul(s.add(base, k), fmt.nbytes))
            scale, least = (s.b.extract_element(v, i32(0)) for v in _scales_and_mins(s, fmt, w, 1))
            dots = s.sum(s.to_float(s.dot4(s.zeros(i32, 8), fmt.piece(s, w, 0), codes, fmt.wide)))
            part = s.b.fsub(s.b.fmul(s.b.fmul(dots, scale), d), s.b.fmul(least, total))
            new.append(s.b.fadd(value, part))
        return new

    return s.loop(s.b.and_(s.b.lshr(n_cols, i64(5)), i64(7)), values, one)


def _prepare(module, target, fmt):
    """prepare(w, row_bytes, n_supers, panel): `lanes` rows into a panel."""
    s = Simd(module, target, "prepare", 4)
    w0, row_bytes, supers, panel0 = s.args
    lanes, groups, word = s.lanes, 256 // fmt.group, ir.IntType(8 * target.step)
    size, across = (256 + 8 * groups) * lanes, s.width // target.step

    def superblock(i, _):
        panel = s.add(panel0, s.mul(i, size))
        rows = [s.add(s.add(w0, s.mul(row_bytes, r)), s.mul(i, _span(fmt))) for r in range(lanes)]
        for c in range(256 // s.width):
            pieces = [s.bits(_chunk(s, fmt, w, c), word) for w in rows]
            for r in range(0, lanes, across):
                for k, column in enumerate(s.transpose(pieces[r : r + across])):
                    s.store(column, panel, ((c * across + k) * lanes + r) * target.step)
        both = [_scales_and_mins(s, fmt, w, 8) for w in rows]
        both = [s.concat(scale, least) for scale, least in both]
        for part in range(2 * groups // lanes):
            pick = list(range(part * lanes, (part + 1) * lanes))
            for k, column in enumerate(s.transpose([s.shuffle(v, pick) for v in both])):
                s.store(column, panel, 256 * lanes + (part * lanes + k) * lanes * 4)
        return []

    s.loop(supers, [], superblock)
    s.done()


def packed_bytes(name, tokens):
    """Bytes of one superblock of `tokens` activation rows as `pack` leaves them (0 for the float types)."""
    return 0 if name in FLOATS else (256 + 32 + 4 * (256 // QUANTIZED[name].group)) * tokens


def _pack(module, target, fmt):
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


def _tile(module, target, fmt):
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


# float


def _float_type(s, name):
    """(bytes, IR element, how a vector of it becomes float32)."""
    if name == "F32":
        return 4, f32, lambda raw: raw
    if name == "F16":
        return 2, f16, s.from_half
    return 2, i16, lambda raw: s.bits(s.b.shl(s.unsigned(raw), s.fill(i32, raw.type.count, 16)), f32)


def _float_dequantize(module, target, name):
    """dequantize(w, n_cols, out): one row as float32."""
    s = Simd(module, target, "dequantize", 3)
    w, n_cols, out = s.args
    size, element, widen = _float_type(s, name)

    def some(lanes):
        def step(i, _):
            s.store(widen(s.load(vec(element, lanes), s.add(w, s.mul(i, lanes * size)))), s.add(out, s.mul(i, lanes * 4)))
            return []

        return step

    whole = s.b.sdiv(n_cols, i64(s.lanes))
    s.loop(whole, [], some(s.lanes))
    s.loop(n_cols, [], some(1), start=s.mul(whole, s.lanes))
    s.done()


def _float_dots(module, target, name, symbol, n_rows_block, n_tokens):
    """matvec(w, row_bytes, n_rows, n_cols, x, out, acc) or tile(w, row_bytes, n_rows, n_cols, xs, outs, offset, acc).

    x rows are float32.
    """
    tiled = symbol == "tile"
    s = Simd(module, target, symbol, 8 if tiled else 7)
    w0, row_bytes, n_rows, n_cols = s.args[:4]
    xs = [s.load(i64, s.args[4], 8 * t) for t in range(n_tokens)] if tiled else [s.args[4]]
    outs = [s.add(s.load(i64, s.args[5], 8 * t), s.args[6]) for t in range(n_tokens)] if tiled else [s.args[5]]
    keep = s.b.icmp_signed("!=", s.args[-1], i64(0))
    size, element, widen = _float_type(s, name)
    lanes = s.lanes
    whole, odd = s.b.sdiv(n_cols, i64(lanes)), s.b.srem(n_cols, i64(lanes))

    def rows(first, count):
        starts = [s.add(w0, s.mul(row_bytes, s.add(first, r))) for r in range(count)]

        def step(i, sums):
            x = [s.load(vec(f32, lanes), s.add(x, s.mul(i, lanes * 4))) for x in xs]
            new = []
            for r, start in enumerate(starts):
                at = s.add(start, s.mul(i, lanes * size))
                if not tiled:
                    s.prefetch(at, AHEAD, lanes * size)
                w = widen(s.load(vec(element, lanes), at))
                new += [s.fma(w, x[t], sums[r * n_tokens + t]) for t in range(n_tokens)]
            return new

        def last(k, sums):
            i, new = s.add(s.mul(whole, lanes), k), []
            x = [s.load(f32, s.add(x, s.mul(i, 4))) for x in xs]
            for r, start in enumerate(starts):
                w = s.b.extract_element(widen(s.load(vec(element, 1), s.add(start, s.mul(i, size)))), i32(0))
                new += [s.b.fadd(sums[r * n_tokens + t], s.b.fmul(w, x[t])) for t in range(n_tokens)]
            return new

        sums = [s.sum(v) for v in s.loop(whole, [s.zeros()] * (count * n_tokens), step)]
        sums = s.loop(odd, sums, last)
        for r in range(count):
            for t in range(n_tokens):
                at = s.add(outs[t], s.mul(s.add(first, r), 4))
                s.store(s.b.fadd(sums[r * n_tokens + t], s.b.select(keep, s.load(f32, at), f32(0.0))), at)

    blocks = s.b.sdiv(n_rows, i64(n_rows_block))
    s.loop(blocks, [], lambda i, _: rows(s.mul(i, n_rows_block), n_rows_block) or [])
    s.loop(n_rows, [], lambda i, _: rows(i, 1) or [], start=s.mul(blocks, n_rows_block))
    s.done()
