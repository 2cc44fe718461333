"""Microkernels for one row of activations: rows of block-quantized weights times int8 codes, and rows as float32.

    dot = sum over groups of  d * scale * sum(u * x)  -  min * (d * sum(x))

in the terms of layout.py. `matvec` reads the weights once, front to back, at memory speed; `acc` nonzero adds to what stands
in out. All microkernels take int64 addresses and sizes.
"""

from llvmlite import ir

from llamacli.cpu.kernels.formats import layout as formats
from llamacli.cpu.kernels.formats import narrow, tiles
from llamacli.cpu.kernels.formats.layout import ACT_BYTES, QUANTIZED, S16, S32, D
from llamacli.cpu.kernels.jit.simd import Simd, f32, i8, i32, i64, vec

ROWS = 2  # rows that matvec takes side by side
AHEAD = 4096  # bytes that matvec prefetches ahead
SYMBOLS = ("dequantize", "matvec", "prepare", "pack", "tile")


def quantized(name, target):
    """The module of microkernels for one block format."""
    fmt, module = QUANTIZED[name], ir.Module(name)
    _dequantize(module, target, fmt)
    if fmt.largest > 127 and (target.dot == "sdot" or (target.dot == "maddubs" and target.width == 32)):
        fmt = formats.signed(fmt)
    (_matvec if target.width == 64 else narrow.matvec)(module, target, fmt)
    tiles.prepare(module, target, fmt)
    tiles.pack(module, target, fmt)
    tiles.tile(module, target, fmt)
    return module


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


def _matvec(module, target, fmt):
    """For registers of 64 bytes (narrow.py has the others):
    matvec(w, row_bytes, n_rows, n_cols, x, out, acc, reordered): out[r] = row r . x for int8 activations x; n_cols a multiple
    of the block. reordered: scratch for a copy of the activations, 64-byte aligned.

    Rows are taken two at a time, so that their scales fill a register; of an odd number the last one twice.
    """
    s = Simd(module, target, "matvec", 8)
    w0, row_bytes, n_rows, n_cols, x, out, acc, reordered = s.args
    supers = s.b.lshr(n_cols, i64(8))
    keep = s.b.icmp_signed("!=", acc, i64(0))
    groups, registers = 256 // fmt.group, formats.registers(s, fmt)
    _reorder_activations(s, fmt, formats.order(s, fmt), supers, x, reordered)

    def two(i, _):
        first = s.mul(i, ROWS)
        last = s.add(first, 1)
        numbers = [first, s.b.select(s.b.icmp_signed("<", last, n_rows), last, first)]
        starts = [s.add(w0, s.mul(row_bytes, r)) for r in numbers]

        def superblock(k, sums):
            xs, ws = s.add(reordered, s.mul(k, ACT_BYTES)), [s.add(start, s.mul(k, formats.span(fmt))) for start in starts]
            values, lows = list(sums[:ROWS]), list(sums[ROWS:])
            for w in ws:
                s.prefetch(w, AHEAD, formats.span(fmt))
            scales, leasts = formats.pair(s, fmt, ws)
            d, total = s.load(vec(f32, 16), xs, D), s.load(vec(f32, 16), xs, D + 64)
            lows = [s.fma(least, total, low) for least, low in zip(leasts or scales, lows, strict=True)]
            scales = [s.b.fmul(scale, d) for scale in scales]
            for r, w in enumerate(ws):
                dots = {}  # of the groups that share a register
                for n, (at, codes) in enumerate(zip(registers, formats.codes(s, fmt, w), strict=True)):
                    before = dots.get(at, s.zeros(i32))
                    dots[at] = s.dot4(before, codes, s.load(vec(i8, s.width), xs, n * s.width), fmt.largest)
                for at, products in dots.items():
                    lanes = [r * groups + g for g in at for _ in range(4)]
                    spread = s.shuffle(scales[lanes[0] // 16], [lane % 16 for lane in lanes])
                    values[r] = s.fma(s.to_float(products), spread, values[r])
            return [*values, *lows]

        sums = s.loop(supers, [s.zeros()] * ROWS + [s.zeros(f32, 16)] * (groups // 8), superblock)
        lows, values = sums[ROWS:], []
        for r in range(ROWS):
            low = s.shuffle(lows[0], list(range(8 * r, 8 * r + 8))) if groups == 8 else lows[r]
            values.append(s.b.fsub(s.sum(sums[r]), s.sum(low)))
        if fmt.block == 32:
            values = formats.odd_blocks(s, fmt, starts, supers, n_cols, x, values)
        ats = [s.add(out, s.mul(r, 4)) for r in numbers]
        olds = [s.b.select(keep, s.load(f32, at), f32(0.0)) for at in ats]
        for at, old, value in zip(ats, olds, values, strict=True):
            s.store(s.b.fadd(value, old), at)
        return []

    s.loop(s.b.lshr(s.add(n_rows, 1), i64(1)), [], two)
    s.done()


def _reorder_activations(s, fmt, order, supers, x0, reordered):
    """Activation superblocks in the order of the weights: 256 codes, 16 scales, 16 sums times the format's offset."""
    offset = 1 if fmt.offset is None else fmt.offset
    factors = ir.Constant(vec(f32, 8), formats.factors(s, fmt))

    def superblock(i, _):
        x, out = s.add(x0, s.mul(i, ACT_BYTES)), s.add(reordered, s.mul(i, ACT_BYTES))
        for k, piece in enumerate(order):
            s.store(s.load(vec(i8, 16), x, 16 * piece), out, 16 * k)
        eight = fmt.group == 32
        d = s.b.fmul(s.load(vec(f32, 8), x, D), factors)
        s.store(s.shuffle(d, [k % 8 if eight else k // 2 for k in range(16)]), out, D)
        total = s.load(vec(f32, 8), x, S32) if eight else s.load(vec(f32, 16), x, S16)
        total = s.b.fmul(total, s.fill(f32, total.type.count, float(offset)))
        s.store(s.concat(total, total) if eight else total, out, D + 64)
        return []

    s.loop(supers, [], superblock)
