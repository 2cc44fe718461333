"""Microkernels for one row of activations: rows of block-quantized weights times int8 codes, and rows as float32.

    dot = sum over groups of  d * scale * sum(u * x)  -  min * (d * sum(x))

in the terms of layout.py. `matvec` reads the weights once, front to back, at memory speed; `acc` nonzero adds to what stands
in out. All microkernels take int64 addresses and sizes.

Each row takes two loops. The first computes the factor of every group (weight scale times activation scale) and adds up the
minimums. The second only multiplies codes. In one loop the scales' long chain of small steps fills the core's window and the
products wait for it: on Zen 4 a single loop, in registers of 64 bytes, reached 20 GB/s where this one reads 33. For the same
reason registers have 32 bytes where the CPU has wider ones too.
"""

from llvmlite import ir

from llamacli.cpu.kernels.formats import layout as formats
from llamacli.cpu.kernels.formats import tiles
from llamacli.cpu.kernels.formats.layout import ACT_BYTES, QUANTIZED, S16, S32, D
from llamacli.cpu.kernels.jit.simd import Simd, f32, i8, i64, vec

AHEAD = 4096  # bytes that are prefetched ahead
CHUNK = 16  # superblocks in each of the two loops: fewer bytes than AHEAD, so that the first loop reads what is prefetched
SUMS = 4  # accumulators, so that a sum need not wait for the one before
SYMBOLS = ("dequantize", "matvec", "matvecs", "prepare", "pack", "tile", "pack_short", "tile_short")


def quantized(name, target):
    """The module of microkernels for one block format."""
    fmt, module = QUANTIZED[name], ir.Module(name)
    _dequantize(module, target, fmt)
    narrow = target._replace(width=32)
    _matvec(module, narrow, _multiplied(narrow, fmt), 0)
    _matvec(module, narrow, _multiplied(narrow, fmt), side(target))
    fmt = _multiplied(target, fmt)
    tiles.prepare(module, target, fmt)
    tiles.pack(module, target, fmt)
    tiles.tile(module, target, fmt)
    short = target._replace(tile=tiles.short(target))
    tiles.pack(module, short, fmt, "pack_short")
    tiles.tile(module, short, fmt, "tile_short")
    return module


def _multiplied(target, fmt):
    """The format as the target multiplies it: with signed codes where it has no product of large unsigned ones."""
    needs_signed = target.dot == "sdot" or (target.dot == "maddubs" and target.width == 32)
    return formats.signed(fmt) if fmt.largest > 127 and needs_signed else fmt


def _dequantize(module, target, fmt):
    """dequantize(w, n_cols, out): one row as float32."""
    s = Simd(module, target, "dequantize", 3)
    w0, n_cols, out0 = s.args
    pieces = fmt.block // 32

    def one_block(i, _):
        w, out = s.add(w0, s.mul(i, fmt.nbytes)), s.add(out0, s.mul(i, 4 * fmt.block))
        scale, least = formats.scales_and_mins(s, fmt, w, 1)
        for j in range(pieces):
            pick = [(32 * j + lane) // fmt.group for lane in range(32)]
            q = s.to_float(s.unsigned(fmt.piece(s, w, j)))
            s.store(s.b.fsub(s.b.fmul(q, s.shuffle(scale, pick)), s.shuffle(least, pick)), out, 128 * j)
        return []

    s.loop(s.b.sdiv(n_cols, i64(fmt.block)), [], one_block)
    s.done()


def reordered_bytes(fmt):
    """Bytes of a superblock of reordered activations: 256 codes, then scales, sums and factors of each group."""
    return 256 + 12 * (256 // fmt.group)


def side(target):
    """Tokens that matvecs takes side by side: as many as have registers for all their sums."""
    return 4 if target.width == 64 else 2


def _matvec(module, target, fmt, side):
    """matvec(w, row_bytes, n_rows, n_cols, x, out, acc, reordered): out[r] = row r . x for int8 activations x; n_cols a
    multiple of the block. reordered: scratch of `reordered_bytes` for each superblock, 64-byte aligned.

    With `side`, matvecs(w, row_bytes, n_rows, n_cols, xs, outs, acc, reordered, offset, n): xs and outs are the addresses of n
    rows, a multiple of `side`, of which outs' begin at `offset` bytes; reordered is scratch for all. Each token's sums are
    those of matvec. A row is multiplied with all tokens before the next one, so that it is read from memory meanwhile.
    """
    each = range(side or 1)
    s = Simd(module, target, "matvecs" if side else "matvec", 10 if side else 8)
    w0, row_bytes, n_rows, n_cols, x, out, acc, reordered = s.args[:8]
    supers, size = s.b.lshr(n_cols, i64(8)), reordered_bytes(fmt)
    of_one = s.mul(supers, size)
    keep = s.b.icmp_signed("!=", acc, i64(0))

    def reorder(t, _):
        _reorder_activations(s, fmt, supers, s.load(i64, s.add(x, s.mul(t, 8))), s.add(reordered, s.mul(t, of_one)), size)
        return []

    def row(r, _):
        start = s.add(w0, s.mul(row_bytes, r))

        def tokens(i, _):
            first = s.mul(i, len(each))
            xs, to = [x], [out]
            if side:
                xs = [s.load(i64, s.add(x, s.mul(first, 8)), 8 * t) for t in each]
                to = [s.add(s.load(i64, s.add(out, s.mul(first, 8)), 8 * t), s.args[8]) for t in each]
            scratch = [s.add(reordered, s.mul(s.add(first, t), of_one)) for t in each]
            for value, address in zip(_row(s, fmt, start, supers, n_cols, xs, scratch), to, strict=True):
                at = s.add(address, s.mul(r, 4))
                s.store(s.b.fadd(value, s.b.select(keep, s.load(f32, at), f32(0.0))), at)
            return []

        if side:
            s.loop(s.b.udiv(s.args[9], i64(side)), [], tokens)
        else:
            tokens(i64(0), [])
        return []

    if side:
        s.loop(s.args[9], [], reorder)
    else:
        _reorder_activations(s, fmt, supers, x, reordered, size)
    s.loop(n_rows, [], row)
    s.done()


def _row(s, fmt, start, supers, n_cols, xs, scratch):
    """The products of the row at `start` with activations: of each token at xs[t], reordered at scratch[t]."""
    each, groups, span, size = range(len(xs)), 256 // fmt.group, formats.span(fmt), reordered_bytes(fmt)
    scale_at, sum_at, factor_at = (256 + 4 * groups * k for k in range(3))
    is_signed = hasattr(fmt, "signed")

    def factors(k, lows):
        w, lows = s.add(start, s.mul(k, span)), list(lows)
        scale, least = fmt.scales(s, w, 8)
        for t in each:
            at = s.add(scratch[t], s.mul(k, size))
            s.store(s.b.fmul(scale, s.load(vec(f32, groups), at, scale_at)), at, factor_at)
            if fmt.offset != 0:
                lows[t] = s.fma(scale if least is None else least, s.load(vec(f32, groups), at, sum_at), lows[t])
        return lows

    def products(k, values):
        w, values = s.add(start, s.mul(k, span)), list(values)
        ats = [s.add(scratch[t], s.mul(k, size)) for t in each]
        s.prefetch(w, AHEAD, span)
        shared = {}  # registers of the same groups
        for n, (at, codes) in enumerate(zip(formats.registers(s, fmt), formats.codes(s, fmt, w), strict=True)):
            shared.setdefault(at, []).append((codes, n * s.width))
        for n, (at, both) in enumerate(shared.items()):
            codes, places = zip(*both, strict=True)
            for t in each:
                dots = s.products(codes, [s.load(vec(i8, s.width), ats[t], p) for p in places], fmt.largest, is_signed)
                factor, sum_of = _spread(s, ats[t], factor_at, at), t * SUMS + n % SUMS
                values[sum_of] = s.fma(s.to_float(dots), factor, values[sum_of])
        return values

    def chunk(c, values):
        first, n = s.mul(c, CHUNK), len(each)
        last = s.add(first, CHUNK)
        last = s.b.select(s.b.icmp_signed("<", last, supers), last, supers)
        lows = s.loop(last, values[:n], factors, first)
        return [*lows, *s.loop(last, values[n:], products, first)]

    chunks = s.b.lshr(s.add(supers, CHUNK - 1), i64(CHUNK.bit_length() - 1))
    found = s.loop(chunks, [s.zeros(f32, groups)] * len(each) + [s.zeros()] * (SUMS * len(each)), chunk)
    results = []
    for t in each:
        low, values = found[t], found[len(each) + SUMS * t : len(each) + SUMS * (t + 1)]
        while len(values) > 1:
            values = [s.b.fadd(a, b) for a, b in zip(values[::2], values[1::2], strict=True)]
        value = s.sum(values[0])
        if fmt.offset != 0:
            value = s.b.fsub(value, s.sum(low))
        if fmt.block == 32:
            (value,) = formats.odd_blocks(s, fmt, [start], supers, n_cols, xs[t], [value])
        results.append(value)
    return results


def _spread(s, xs, factor_at, at):
    """The factors of the groups `at`, each in the lanes of its 16 weights."""
    first, last = at[0], at[-1]
    if first == last:
        return s.splat(s.load(f32, xs, factor_at + 4 * first))
    eight = factor_at + 4 * (first // 8 * 8)
    return s.shuffle(s.load(vec(f32, 8), xs, eight), [first % 8] * 4 + [last % 8] * 4)


def _reorder_activations(s, fmt, supers, x0, reordered, size):
    """Activation superblocks in the order of the weights: 256 codes, a scale and a sum times the format's offset per group."""
    offset, groups = 1 if fmt.offset is None else fmt.offset, 256 // fmt.group
    side = s.width // 16

    def superblock(i, _):
        x, out = s.add(x0, s.mul(i, ACT_BYTES)), s.add(reordered, s.mul(i, size))
        order = formats.order(s, fmt)
        for k in range(0, 16, side):
            parts = [s.load(vec(i8, 16), x, 16 * piece) for piece in order[k : k + side]]
            s.store(s.concat(*parts), out, 16 * k)
        d = s.load(vec(f32, 8), x, D)
        s.store(d if groups == 8 else s.shuffle(d, [k // 2 for k in range(16)]), out, 256)
        total = s.load(vec(f32, groups), x, S32 if groups == 8 else S16)
        s.store(s.b.fmul(total, ir.Constant(total.type, [float(offset)] * groups)), out, 256 + 4 * groups)
        return []

    s.loop(supers, [], superblock)
