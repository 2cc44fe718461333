"""Microkernels for one row of activations: rows of block-quantized weights times int8 codes, and rows as float32.

    dot = sum over groups of  d * scale * (sum(u * x) - offset * sum(x))  -  min * (d * sum(x))

in the terms of layout.py; the sums in brackets are integers. Floats add up in 8 sums, to which groups are assigned in turn.
`matvec` reads the weights once, front to back, at memory speed; `acc` nonzero adds to what stands in out. All microkernels take
int64 addresses and sizes.

Each row takes two loops. The first computes the factor of every group (weight scale times activation scale) and adds up the
minimums. The second only multiplies codes. In one loop the long chain of instructions for the scales fills the core's reorder
buffer and the products wait: on Zen 4 a single loop, in registers of 64 bytes, reached 20 GB/s where two read 33. For the same
reason registers have 32 bytes where the CPU has wider ones too.

Q4_K, Q5_K and Q6_K are prefetched twice: far ahead into the second-level cache, which can wait for more lines of memory at a
time than the first level, and from there, nearly a chunk ahead, into the first. Blocks of 32 have scales in every line, which
the first loop reads anyway. docs/performance-kernels.md has the measurements.
"""

from llvmlite import ir

from llamacli.cpu.kernels.formats import layout as formats
from llamacli.cpu.kernels.formats import several, tiles
from llamacli.cpu.kernels.formats.layout import ACT_BYTES, QUANTIZED
from llamacli.cpu.kernels.jit.simd import Simd, f32, i8, i32, i64, vec

CHUNK = 16  # at most so many superblocks in each of the two loops
AHEAD = 4096  # bytes that are prefetched ahead
TWICE = 144  # bytes of a superblock from which on it is prefetched twice; below, instructions count more
FAR = 6144  # bytes ahead of the products that are prefetched into the second-level cache
LEFT = 704  # bytes of the next chunk that are not prefetched into the first level
SYMBOLS = ("dequantize", "matvec", "matvecs", "prepare", "pack", "tile", "pack_short", "tile_short")


def quantized(name, target):
    """The module of microkernels for one block format."""
    fmt, module = QUANTIZED[name], ir.Module(name)
    _dequantize(module, target, fmt)
    narrow = target._replace(width=32)
    of_row = _multiplied(narrow, fmt)
    _matvec(module, narrow, of_row)
    several.matvecs(module, narrow if hasattr(of_row, "signed") else target, of_row)
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


def _matvec(module, target, fmt):
    """matvec(w, row_bytes, n_rows, n_cols, x, out, acc, reordered): out[r] = row r . x for int8 activations x; n_cols a
    multiple of the block. reordered: scratch of `reordered_bytes` for each superblock, 64-byte aligned.
    """
    s = Simd(module, target, "matvec", 8)
    w0, row_bytes, n_rows, n_cols, x, out, acc, reordered = s.args
    supers = s.b.lshr(n_cols, i64(8))
    chunks = s.b.lshr(s.add(supers, CHUNK - 1), i64(CHUNK.bit_length() - 1))
    chunks = s.b.select(s.b.icmp_signed(">", chunks, i64(0)), chunks, i64(1))
    in_chunk = s.b.udiv(s.add(supers, s.add(chunks, -1)), chunks)
    near = s.add(s.mul(in_chunk, formats.span(fmt)), -LEFT)
    near = s.b.select(s.b.icmp_signed(">", near, i64(0)), near, i64(0))
    keep = s.b.icmp_signed("!=", acc, i64(0))

    def row(r, _):
        start, at = s.add(w0, s.mul(row_bytes, r)), s.add(out, s.mul(r, 4))
        value = formats.totals(s, [_row(s, fmt, start, supers, (chunks, in_chunk), near, reordered)])
        if fmt.block == 32:
            (value,) = formats.odd_blocks(s, fmt, [start], supers, n_cols, x, [value])
        s.store(s.b.fadd(value, s.b.select(keep, s.load(f32, at), f32(0.0))), at)
        return []

    _reorder_activations(s, fmt, supers, x, reordered)
    s.loop(n_rows, [], row)
    s.done()


def _row(s, fmt, start, supers, pieces, near, reordered):
    """The product of the row at `start` with the activations `reordered`, as 8 sums that are still to be added.

    `pieces`: the number of chunks, and superblocks of each but the last. What is `near` bytes ahead is prefetched into the
    first-level cache.
    """
    parts, span, size = formats.lanes(s, fmt), formats.span(fmt), reordered_bytes(fmt)
    chunks, in_chunk = pieces
    scale_at, sum_at, factor_at = (256 + 4 * k * (256 // fmt.group) for k in range(3))
    is_signed, eight, ordered = hasattr(fmt, "signed"), vec(f32, 8), [group for groups in parts for group in groups]

    def factors(k, lows):
        w, x = s.add(start, s.mul(k, span)), s.add(reordered, s.mul(k, size))
        scale, least = fmt.scales(s, w, 8)
        s.store(s.b.fmul(s.shuffle(scale, ordered), s.load(vec(f32, len(ordered)), x, scale_at)), x, factor_at)
        if least is not None:
            least = s.shuffle(least, ordered)
            for k in range(0, len(ordered), 8):
                lows = [s.fma(s.shuffle(least, list(range(k, k + 8))), s.load(eight, x, sum_at + 4 * k), lows[0])]
        return lows

    def products(k, sums):
        w, x = s.add(start, s.mul(k, span)), s.add(reordered, s.mul(k, size))
        if fmt.block == 256 and span >= TWICE:
            s.prefetch(w, FAR, span, level=2)
            s.prefetch(w, near, span)
        else:
            s.prefetch(w, AHEAD, span)
        given = [s.load(vec(i8, s.width), x, place) for place in range(0, 256, s.width)]
        for p, dots in enumerate(formats.by_group(s, fmt, formats.codes(s, fmt, w), given, fmt.largest, is_signed)):
            if fmt.offset:
                dots = s.b.add(dots, s.load(vec(i32, 8), x, sum_at + 32 * p))
            sums = [s.fma(s.to_float(dots), s.load(eight, x, factor_at + 32 * p), sums[0])]
        return sums

    def chunk(c, both):
        first = s.mul(c, in_chunk)
        last = s.add(first, in_chunk)
        last = s.b.select(s.b.icmp_signed("<", last, supers), last, supers)
        return [*s.loop(last, both[1:], factors, first), *s.loop(last, both[:1], products, first)][::-1]

    both = s.loop(chunks, [s.zeros(f32, 8)] * (2 if fmt.offset is None else 1), chunk)
    return s.b.fadd(*both) if fmt.offset is None else both[0]


def _reorder_activations(s, fmt, supers, x0, reordered):
    """Activation superblocks in the order of the weights: 256 codes, then `formats.store_scales_and_sums`."""
    size, side = reordered_bytes(fmt), s.width // 16

    def superblock(i, _):
        x, out = s.add(x0, s.mul(i, ACT_BYTES)), s.add(reordered, s.mul(i, size))
        order = formats.order(s, fmt)
        registers = [s.concat(*(s.load(vec(i8, 16), x, 16 * p) for p in order[k : k + side])) for k in range(0, 16, side)]
        for k, register in enumerate(registers):
            s.store(register, out, s.width * k)
        ones = [s.fill(i8, s.width, 1)] * len(registers)
        formats.store_scales_and_sums(s, fmt, x, formats.by_group(s, fmt, ones, registers, 1, False), out)
        return []

    s.loop(supers, [], superblock)
