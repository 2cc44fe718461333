"""Microkernel for a few rows of activations: rows of block-quantized weights unpacked once and multiplied with all of them.

`matvecs` gives every token the bits that `matvec` (dots.py) gives it alone: sums of a group's products are integers, and floats
are added in the same order, 8 sums for each row of weights and token.

Some rows of weights are unpacked at a time, a few superblocks of each, and stay in the first-level cache while all tokens pass
by. They are laid out in columns: each 32-bit lane of a register holds 4 weights of one group of one row, so that the products
of a group add up in that lane. A register of 64 bytes holds two rows. Activations are laid out in the same order, once for all
rows.
"""

from itertools import chain

from llamacli.cpu.kernels.formats import layout as formats
from llamacli.cpu.kernels.formats.layout import ACT_BYTES
from llamacli.cpu.kernels.formats.tiles import UNROLL
from llamacli.cpu.kernels.jit.simd import Simd, f32, i8, i16, i32, i64, vec

MOST = 16  # tokens of a call
PAD = 4  # xs and outs are padded to a multiple of it
SUPERS = 8  # superblocks that are unpacked at a time
VECTORS = 2  # registers of weights side by side


def rows(target):
    """Rows of weights that are unpacked together."""
    return VECTORS * target.width // 32


def scratch_bytes(fmt, supers, tokens, target):
    """Bytes of scratch that `matvecs` needs."""
    of_token = supers * _activation_bytes(fmt) + _state_bytes(target)
    return -(-tokens // PAD) * PAD * of_token + SUPERS * rows(target) * _activation_bytes(fmt)


def _activation_bytes(fmt):
    """Of a superblock of a token: 256 codes, then a scale and a sum for each group; of a row of weights as many, unpacked."""
    return 256 + 8 * (256 // fmt.group)


def _state_bytes(target):
    """Of a token's sums between two pieces of a row: those of products, those of minimums."""
    return 2 * VECTORS * target.width


def matvecs(module, target, fmt):
    """matvecs(w, row_bytes, n_rows, n_cols, xs, outs, acc, scratch, offset, n, ready): `matvec` for n tokens; xs and outs are
    the addresses of their rows, of which outs' begin at `offset` bytes. Both are padded to a multiple of PAD, and rows that the
    padding points to may be computed, too. `ready` nonzero: the call before was for the same tokens and for whole blocks of
    rows, so that its activations are laid out already.
    """
    s = Simd(module, target._replace(width=32), "matvecs", 11)
    w0, row_bytes, n_rows, n_cols, xs, outs, acc, scratch, offset, n, ready = s.args
    supers, block, of_state = s.b.lshr(n_cols, i64(8)), rows(target), _state_bytes(target)
    of_one, padded = s.mul(supers, _activation_bytes(fmt)), i64(0)
    sides, passes = [], i64(0)  # tokens side by side, how often; the first of them, and how often others passed before
    for size, count in _sides(s, target, n):
        sides.append((size, count, padded, passes))
        padded, passes = s.add(padded, s.mul(count, size)), s.add(passes, count)
    states = s.add(scratch, s.mul(padded, of_one))
    unpacked = s.add(states, s.mul(padded, of_state))
    keep = s.b.icmp_signed("!=", acc, i64(0))
    # While all tokens pass by an unpacked superblock, as many bytes of the next rows are prefetched, some of them each time.
    # They go into the second-level cache: the first level tracks only a few misses at a time, and further prefetches are
    # dropped.
    share = s.b.udiv(s.add(passes, block * formats.span(fmt) - 1), passes)

    def lay_out(t, _):
        _lay_out(s, fmt, supers, s.load(i64, s.add(xs, s.mul(t, 8))), s.add(scratch, s.mul(t, of_one)))
        return []

    def some_rows(r, _):
        first_row = s.mul(r, block)
        starts = [s.add(w0, s.mul(s.add(first_row, k), row_bytes)) for k in range(block)]
        following = s.add(starts[0], s.mul(row_bytes, block))

        def clear(t, _):
            for k in range(0, of_state, target.width):
                s.store(s.zeros(f32, target.lanes), s.add(states, s.mul(t, of_state)), k)
            return []

        def piece(c, _):
            first = s.mul(c, SUPERS)
            left = s.b.sub(supers, first)
            here = s.b.select(s.b.icmp_signed("<", left, i64(SUPERS)), left, i64(SUPERS))
            for k, start in enumerate(starts):
                _unpack(s, fmt, s.add(start, s.mul(first, formats.span(fmt))), here, unpacked, k, block)
            for size, count, before, passed in sides:

                def some_tokens(i, _, size=size, before=before, passed=passed):
                    t = s.add(before, s.mul(i, size))
                    turn = s.add(s.mul(first, passes), s.mul(s.add(passed, i), here))
                    ahead = s.add(following, s.mul(turn, share))
                    x = s.add(s.add(scratch, s.mul(t, of_one)), s.mul(first, _activation_bytes(fmt)))
                    at = [s.add(x, s.mul(of_one, k)) for k in range(size)]
                    _multiply(s, fmt, target, here, unpacked, at, s.add(states, s.mul(t, of_state)), ahead, share)
                    return []

                s.loop(count, [], some_tokens)
            return []

        def finish(t, _):
            state, x = s.add(states, s.mul(t, of_state)), s.load(i64, s.add(xs, s.mul(t, 8)))
            values = [s.load(vec(f32, 8), state, 32 * k) for k in range(block)]
            if fmt.offset is None:
                values = [s.b.fadd(value, s.load(vec(f32, 8), state, 32 * (block + k))) for k, value in enumerate(values)]
            value = formats.totals(s, values)
            if fmt.block == 32:
                of_row = [s.b.extract_element(value, i32(k)) for k in range(block)]
                for k, one in enumerate(formats.odd_blocks(s, fmt, starts, supers, n_cols, x, of_row)):
                    value = s.b.insert_element(value, one, i32(k))
            at = s.add(s.add(s.load(i64, s.add(outs, s.mul(t, 8))), offset), s.mul(first_row, 4))
            s.store(s.b.fadd(value, s.b.select(keep, s.load(value.type, at), s.zeros(f32, block))), at)
            return []

        s.loop(padded, [], clear)
        s.loop(s.b.lshr(s.add(supers, SUPERS - 1), i64(SUPERS.bit_length() - 1)), [], piece)
        s.loop(padded, [], finish)
        return []

    def last_rows(t, _):
        done = s.b.sub(n_rows, left)
        x, out = (s.load(i64, s.add(table, s.mul(t, 8))) for table in (xs, outs))
        to = s.add(s.add(out, offset), s.mul(done, 4))
        w = s.add(w0, s.mul(done, row_bytes))
        s.b.call(module.get_global("matvec"), [w, row_bytes, left, n_cols, x, to, acc, scratch])
        return []

    s.loop(s.b.select(s.b.icmp_signed("!=", ready, i64(0)), i64(0), padded), [], lay_out)
    s.loop(s.b.udiv(n_rows, i64(block)), [], some_rows)
    left = s.b.and_(n_rows, i64(block - 1))
    s.loop(s.b.select(s.b.icmp_signed(">", left, i64(0)), n, i64(0)), [], last_rows)
    s.done()


def _sides(s, target, n):
    """(tokens side by side, how often): 4 where there are registers for all their sums, and 2.

    A token left over is multiplied beside padding, whose result is not used.
    """
    if target.width == 32:
        return [(2, s.b.lshr(s.add(n, 1), i64(1)))]
    fours = s.b.lshr(s.add(n, 1), i64(2))
    return [(4, fours), (2, s.b.select(s.b.icmp_signed(">", n, s.mul(fours, 4)), i64(1), i64(0)))]


def _columns(s, fmt, registers):
    """Registers of a superblock, in the order of `codes`, as columns: for each 8 `lanes` the registers that hold 4 bytes of
    each of their groups.
    """
    if fmt.group == 32 and formats.order(s, fmt) != formats.CROSSED:
        pick = [[k + lane for k in (0, 32) for lane in range(h, h + 16)] for h in (0, 16)]
        registers = [s.shuffle(registers[j], both, registers[j + 4]) for j in range(4) for both in pick]
    fours = [registers[0::2], registers[1::2]] if fmt.group == 32 else [registers[:4], registers[4:]]
    columns = [[s.bits(v, i8) for v in _across(s, [s.bits(v, i32) for v in four])] for four in fours]
    return [columns[0] + columns[1]] if fmt.group == 32 else columns


def _across(s, four):
    """Each 16 bytes of four registers, as 4 rows of 4 lanes, turned into columns."""
    halves = [[k for q in (0, 4) for k in (q + h, q + h + 8, q + h + 1, q + h + 9)] for h in (0, 2)]
    pairs = [[s.shuffle(a, half, b) for half in halves] for a, b in (four[:2], four[2:])]
    ends = [[k for q in (0, 4) for k in (q + h, q + h + 1, q + h + 8, q + h + 9)] for h in (0, 2)]
    return [s.shuffle(pairs[0][half], end, pairs[1][half]) for half in (0, 1) for end in ends]


def _lay_out(s, fmt, supers, x0, to):
    """A row of activations: of each superblock codes in columns, then `formats.store_scales_and_sums`."""
    size, order = _activation_bytes(fmt), formats.order(s, fmt)

    def superblock(i, _):
        x, out = s.add(x0, s.mul(i, ACT_BYTES)), s.add(to, s.mul(i, size))
        registers = [s.concat(*(s.load(vec(i8, 16), x, 16 * p) for p in order[k : k + 2])) for k in range(0, 16, 2)]
        columns = _columns(s, fmt, registers)
        for k, column in enumerate(chain(*columns)):
            s.store(column, out, 32 * k)
        sums = [s.products([s.fill(i8, 32, 1)] * len(part), part, 1) for part in columns]
        formats.store_scales_and_sums(s, fmt, x, sums, out)
        return []

    s.loop(supers, [], superblock)


def _unpack(s, fmt, w0, count, to, row, rows):
    """`count` superblocks of the row at w0, which is number `row` of `rows`: codes in columns, scales and minimums, those of
    rows side by side.
    """
    groups, span = 256 // fmt.group, formats.span(fmt)

    def superblock(k, _):
        w, out = s.add(w0, s.mul(k, span)), s.add(to, s.mul(k, rows * _activation_bytes(fmt)))
        columns = _columns(s, fmt, formats.codes(s, fmt, w))
        for n, column in enumerate(chain(*columns)):
            s.store(column, out, 32 * (n * rows + row))
        for k, values in enumerate(fmt.scales(s, w, 8)):
            for p, at in enumerate(formats.lanes(s, fmt)):
                if values is not None:
                    s.store(s.shuffle(values, at), out, rows * (256 + 4 * groups * k) + 32 * (p * rows + row))
        return []

    s.loop(count, [], superblock)


def _multiply(s, fmt, target, count, unpacked, xs, states, ahead, share):
    """Add to `states` the products of `count` superblocks of unpacked rows with the tokens laid out at `xs`. At each, `share`
    bytes are prefetched, from `ahead` on.
    """
    width, lanes, groups, n = target.width, target.lanes, 256 // fmt.group, rows(target)
    size, parts = _activation_bytes(fmt), groups // 8
    each = [(v, t) for t in range(len(xs)) for v in range(VECTORS)]
    wide = lambda v: s.concat(v, v) if width == 64 else v  # for two rows side by side
    state_at = {(v, t): _state_bytes(target) * t + width * v for v, t in each}

    def at_super(k):
        return s.add(unpacked, s.mul(k, n * size)), [s.add(x, s.mul(k, size)) for x in xs]

    def minimums(k, lows):
        w, x = at_super(k)
        lows = dict(zip(each, lows, strict=True))
        for p in range(parts):
            least = [s.load(vec(f32, lanes), w, n * (256 + 4 * groups) + 32 * p * n + width * v) for v in range(VECTORS)]
            for t, at in enumerate(x):
                total = wide(s.load(vec(f32, 8), at, 256 + 4 * groups + 32 * p))
                for v in range(VECTORS):
                    lows[v, t] = s.fma(least[v], total, lows[v, t])
        return [lows[key] for key in each]

    def products(k, sums):
        w, x = at_super(k)
        line = s.add(ahead, s.mul(k, share))
        s.loop(s.b.lshr(s.add(share, 63), i64(6)), [], lambda n, _: s.prefetch(line, s.mul(n, 64), 1, level=2) or [])
        sums = dict(zip(each, sums, strict=True))
        columns = 8 // parts
        for p in range(parts):
            codes = [s.add(w, 32 * n * p * columns + width * v) for v in range(VECTORS)]
            given = [s.add(at, 32 * p * columns) for at in x]
            starts = [wide(s.load(vec(i32, 8), at, 256 + 4 * groups + 32 * p)) for at in x] if fmt.offset else None
            dots = _dots(s, fmt, codes, 32 * n, given, columns, lanes, starts)
            scale = [s.load(vec(f32, lanes), w, 256 * n + 32 * p * n + width * v) for v in range(VECTORS)]
            for t, at in enumerate(x):
                d = wide(s.load(vec(f32, 8), at, 256 + 32 * p))
                for v in range(VECTORS):
                    sums[v, t] = s.fma(s.to_float(dots[v, t]), s.b.fmul(scale[v], d), sums[v, t])
        return [sums[key] for key in each]

    bodies = [(products, 0)] + ([(minimums, VECTORS * width)] if fmt.offset is None else [])
    for body, shift in bodies:
        before = [s.load(vec(f32, lanes), states, state_at[key] + shift) for key in each]
        for key, value in zip(each, s.loop(count, before, body), strict=True):
            s.store(value, states, state_at[key] + shift)


def _dots(s, fmt, codes, stride, given, columns, lanes, starts):
    """{(register of weights, token): int32 lanes} of the products of columns, on top of `starts` of each token. Columns of
    weights stand `stride` bytes apart, those of tokens 32.
    """
    each = [(v, t) for t in range(len(given)) for v in range(len(codes))]
    dots = [starts[t] if starts else s.zeros(i32, lanes) for v, t in each]
    if s.target.dot == "maddubs":
        return dict(zip(each, _short_dots(s, fmt, codes, stride, given, columns, dots), strict=True))
    for k in range(columns):
        factors = _factors(s, codes, stride, given, k, 4 * lanes)
        dots = [s.dot4(total, *both, fmt.largest) for total, both in zip(dots, factors, strict=True)]
    return dict(zip(each, dots, strict=True))


def _factors(s, codes, stride, given, k, width):
    """(weights, activations) of each product of column k, the tokens in turn."""
    us = [s.load(vec(i8, width), at, k * stride) for at in codes]
    xs = [s.load(vec(i8, 32), at, 32 * k) for at in given]
    return [(u, x if width == 32 else s.concat(x, x)) for x in xs for u in us]


def _short_dots(s, fmt, codes, stride, given, columns, dots):
    """The same where products come in 16 bits: they are added there as long as they fit.

    The columns are a loop, UNROLL at a time. In straight-line code LLVM would reorder the sums, and registers would run out.
    """
    is_signed, width = hasattr(fmt, "signed"), 4 * dots[0].type.count
    run, ones = columns if is_signed else min(columns, s.fits(fmt.largest)), s.fill(i16, width // 2, 1)
    for first in range(0, columns, run):

        def some(i, sums, first=first):
            k = s.add(s.mul(i, UNROLL), first)
            us, xs = [s.add(at, s.mul(k, stride)) for at in codes], [s.add(at, s.mul(k, 32)) for at in given]
            for step in range(UNROLL):
                both = _factors(s, us, stride, xs, step, width)
                products = [s.widen_pairs(s.signed_pairs(u, x), ones) if is_signed else s.pairs(u, x) for u, x in both]
                sums = [s.b.add(total, product) for total, product in zip(sums, products, strict=True)]
            return sums

        if is_signed:
            dots = s.loop(columns // UNROLL, dots, some)
        else:
            sums = s.loop(run // UNROLL, [s.fill(i16, width // 2, 0)] * len(dots), some)
            dots = [s.b.add(total, s.widen_pairs(short, ones)) for total, short in zip(dots, sums, strict=True)]
    return dots
