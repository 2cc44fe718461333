"""Microkernels on keys and values as the cache holds them: write a row, multiply rows, give them as float32.

A row is one head of one position, in half precision (F16) or in blocks of 32 values (Q8_0, Q4_0, laid out as in a file).
`build(type_name, head_dim, unit)` gives the module builder for loader.load; `unit` is the number of rows of queries side by
side. Heads in blocks are rotated first: a Hadamard transform spreads an outlier over all values of a head. It keeps products,
so queries are rotated alike, and results back.
"""

from math import gcd
from types import SimpleNamespace

from llvmlite import ir

from llamacli.cpu.kernels.jit.simd import Simd, f16, f32, i8, i16, i32, i64, vec

SYMBOLS = ("write", "rotate", "dots", "weigh", "transpose_keys", "widen")
MOST_ROWS = 8  # of queries side by side
FITS = 2  # rounds of refinement of a Q4_0 block


def unit_of(group):
    """Rows of queries that go side by side, of `group` heads that share keys and values."""
    return group if group <= MOST_ROWS else 4


def build(type_name, head_dim, unit):
    """The builder of the module for this type, head size and unit."""

    def module_for(target):
        module = ir.Module(f"kv-{type_name}")
        kv = _KINDS[type_name](target)
        kv.write(module, target)
        _rotate(module, target, head_dim)
        _dots(module, target, kv, head_dim, unit)
        _weigh(module, target, kv, head_dim, unit)
        _transpose_keys(module, target, kv, head_dim)
        _widen(module, target, kv)
        return module

    return module_for


def span(head_dim, target):
    """Keys that transpose_keys lays side by side, and columns that vectors.product makes at a time: as many registers as leave
    room for all sums, and whole ones of a head.
    """
    return gcd(head_dim // target.lanes, 4 if target.width == 64 else 2) * target.lanes


# types: `unit` values take `nbytes`; `read` gives a register of them, from value c of the unit on


def _f16(target):
    return SimpleNamespace(unit=target.lanes, nbytes=2 * target.lanes, read=_read_f16, write=_write_f16)


def _q8_0(target):
    return SimpleNamespace(unit=32, nbytes=34, read=_read_q8_0, write=_write_q8_0)


def _q4_0(target):
    return SimpleNamespace(unit=32, nbytes=18, read=_read_q4_0, write=_write_q4_0)


_KINDS = {"F16": _f16, "Q8_0": _q8_0, "Q4_0": _q4_0}
TYPES = tuple(_KINDS)


def _read_f16(s, at, c):
    return s.from_half(s.load(vec(f16, s.lanes), at, 2 * c))


def _read_q8_0(s, at, c):
    codes = s.signed(s.load(vec(i8, s.lanes), at, 2 + c))
    return s.b.fmul(s.to_float(codes), s.splat_half(at, 0, s.lanes))


def _read_q4_0(s, at, c):
    both = s.load(vec(i8, s.lanes), at, 2 + c % 16)
    codes = s.b.lshr(both, s.fill(i8, s.lanes, 4)) if c >= 16 else s.b.and_(both, s.fill(i8, s.lanes, 15))
    codes = s.b.sub(s.unsigned(codes), s.fill(i32, s.lanes, 8))
    return s.b.fmul(s.to_float(codes), s.splat_half(at, 0, s.lanes))


def _write_f16(module, target):
    """write(x, n, out): n float32 values as a row of the cache."""
    s = Simd(module, target, "write", 3)
    x, n, out = s.args

    def step(i, _):
        s.store(s.to_half(s.load(vec(f32, s.lanes), s.add(x, s.mul(i, s.width)))), s.add(out, s.mul(i, s.width // 2)))
        return []

    s.loop(s.b.sdiv(n, i64(s.lanes)), [], step)
    s.done()


def _write_q8_0(module, target):
    """write(x, n, out): d is the largest magnitude / 127, in half precision."""
    s = Simd(module, target, "write", 3)
    x, n, out = s.args

    def block(i, _):
        v, at = s.load(vec(f32, 32), s.add(x, s.mul(i, 128))), s.add(out, s.mul(i, 34))
        inverse = _store_scale(s, s.b.fmul(s.reduce_max(s.fabs(v)), f32(1 / 127)), at)
        q = s.fmin(s.fmax(s.b.fmul(v, s.splat(inverse, 32)), s.fill(f32, 32, -127.0)), s.fill(f32, 32, 127.0))
        s.store(s.b.trunc(s.round(q), vec(i8, 32)), at, 2)
        return []

    s.loop(s.b.sdiv(n, i64(32)), [], block)
    s.done()


def _write_q4_0(module, target):
    """write(x, n, out): codes 0 to 15 mean -8 to 7 times d. The value of largest magnitude gives the first codes; then d is the
    factor of least squared error for the codes, and codes are those nearest with that d.
    """
    s = Simd(module, target, "write", 3)
    x, n, out = s.args

    def codes_for(v, d):
        q = s.b.fmul(v, s.splat(_inverse(s, d), 32))
        return s.round(s.fmin(s.fmax(q, s.fill(f32, 32, -8.0)), s.fill(f32, 32, 7.0)))

    def fitted(v, codes):
        q = s.to_float(codes)
        squares = s.sum(s.b.fmul(q, q))
        return s.b.fdiv(s.sum(s.b.fmul(v, q)), s.b.select(s.b.fcmp_ordered(">", squares, f32(0.0)), squares, f32(1.0)))

    def block(i, _):
        v, at = s.load(vec(f32, 32), s.add(x, s.mul(i, 128))), s.add(out, s.mul(i, 18))
        high, low = s.reduce_max(v), s.b.fneg(s.reduce_max(s.b.fneg(v)))
        largest = s.b.select(s.b.fcmp_ordered(">", high, s.b.fneg(low)), high, low)
        codes = codes_for(v, s.b.fmul(largest, f32(-1 / 8)))
        for _ in range(FITS):
            codes = codes_for(v, fitted(v, codes))
        _store_scale(s, fitted(v, codes), at)
        u = s.b.trunc(s.b.add(codes, s.fill(i32, 32, 8)), vec(i8, 32))
        low, high = (s.shuffle(u, list(range(k, k + 16))) for k in (0, 16))
        s.store(s.b.or_(low, s.b.shl(high, s.fill(i8, 16, 4))), at, 2)
        return []

    s.loop(s.b.sdiv(n, i64(32)), [], block)
    s.done()


def _store_scale(s, d, at):
    """Store d as half; returns the inverse of what was stored, 0 for 0."""
    half = s.to_half(s.splat(d))
    s.store(s.b.extract_element(s.bits(half, i16), i32(0)), at)
    return _inverse(s, s.b.extract_element(s.from_half(half), i32(0)))


def _inverse(s, d):
    zero = s.b.fcmp_ordered("==", d, f32(0.0))
    return s.b.select(zero, f32(0.0), s.b.fdiv(f32(1.0), s.b.select(zero, f32(1.0), d)))


# microkernels of all types


def _column(s, kv, row, c):
    """A register of a row, from value c on."""
    return kv.read(s, s.add(row, c // kv.unit * kv.nbytes), c % kv.unit)


def _rotate(module, target, head_dim):
    """rotate(x): head_dim float32 values times a normalized Hadamard matrix, in place; it is its own inverse.

    Of a head size that is no power of two, parts of the largest power that divides it.
    """
    s = Simd(module, target, "rotate", 1)
    (x,) = s.args
    size = head_dim & -head_dim
    rows = [s.load(vec(f32, s.lanes), x, s.width * k) for k in range(head_dim // s.lanes)]
    step = 1
    while step < min(size, s.lanes):
        signs = ir.Constant(vec(f32, s.lanes), [-1.0 if lane & step else 1.0 for lane in range(s.lanes)])
        rows = [s.fma(row, signs, s.shuffle(row, [lane ^ step for lane in range(s.lanes)])) for row in rows]
        step *= 2
    step = 1
    while step < size // s.lanes:
        for k in range(len(rows)):
            if not k & step:
                a, b = rows[k], rows[k + step]
                rows[k], rows[k + step] = s.b.fadd(a, b), s.b.fsub(a, b)
        step *= 2
    for k, row in enumerate(rows):
        s.store(s.b.fmul(row, s.fill(f32, s.lanes, size**-0.5)), x, s.width * k)
    s.done()


def _dots(module, target, kv, head_dim, unit):
    """dots(keys, n_keys, queries, scores, scores_stride): the products of n_keys rows of the cache with `unit` rows of queries,
    float32 [unit, head_dim]; those of query t go to scores + t * scores_stride.

    So many keys at a time that all sums fill one register when they are added up.
    """
    s = Simd(module, target, "dots", 5)
    keys, n_keys, queries, scores, stride = s.args
    row_bytes, side = head_dim // kv.unit * kv.nbytes, max(1, s.lanes // unit)
    starts = [s.add(scores, s.mul(stride, t)) for t in range(unit)]

    def some(first, count):
        rows = [s.add(keys, s.mul(s.add(first, k), row_bytes)) for k in range(count)]
        sums = [s.zeros() for _ in range(unit * count)]
        for c in range(0, head_dim, s.lanes):
            values = [_column(s, kv, row, c) for row in rows]
            for t in range(unit):
                x = s.load(vec(f32, s.lanes), queries, 4 * (head_dim * t + c))
                for k in range(count):
                    sums[t * count + k] = s.fma(values[k], x, sums[t * count + k])
        total = _add_up(s, sums)
        for t in range(unit):
            s.store(s.shuffle(total, list(range(t * count, (t + 1) * count))), s.add(starts[t], s.mul(first, 4)))
        return []

    whole = s.b.sdiv(n_keys, i64(side))
    s.loop(whole, [], lambda i, _: some(s.mul(i, side), side))
    if side > 1:
        s.loop(n_keys, [], lambda i, _: some(i, 1), start=s.mul(whole, side))
    s.done()


def _add_up(s, vectors):
    """A register with the sum of each of up to `lanes` vectors, each in the same order of additions."""
    vectors, size = vectors + [vectors[-1]] * (s.lanes - len(vectors)), s.lanes
    while len(vectors) > 1:  # groups of `size` lanes belong to one vector
        half, found = size // 2, []
        for a, b in zip(vectors[::2], vectors[1::2], strict=True):
            starts = [group * size for group in range(2 * s.lanes // size)]
            low = [start + lane for start in starts for lane in range(half)]
            found.append(s.b.fadd(s.shuffle(a, low, b), s.shuffle(a, [lane + half for lane in low], b)))
        vectors, size = found, half
    return vectors[0]


def _weigh(module, target, kv, head_dim, unit):
    """weigh(p, p_stride, n_rows, v, n_keys, out, state): out[r] = factor[r] * out[r] + sum over keys of p[r, k] * v[k].

    p and out rows are float32, v are n_keys rows of the cache; out is [n_rows, head_dim], state [n_rows, 3] as in softmax;
    n_rows is a multiple of `unit`.
    """
    s = Simd(module, target, "weigh", 7)
    p0, p_stride, n_rows, v0, n_keys, out0, state0 = s.args
    fit = (28 if s.width == 64 else 14) // (unit + 1)  # registers beside those for weights
    columns = max(n for n in (1, 2, 4, 8) if n == 1 or (n <= fit and head_dim // s.lanes % n == 0))
    block_values, row_bytes = columns * s.lanes, head_dim // kv.unit * kv.nbytes

    def some(i, _):
        first = s.mul(i, unit)
        ps = [s.add(p0, s.mul(p_stride, s.add(first, r))) for r in range(unit)]
        states = [s.add(state0, s.mul(s.add(first, r), 12)) for r in range(unit)]
        factors = [s.splat(s.load(f32, at, 8)) for at in states]
        for block in range(head_dim // block_values):
            outs = [s.add(s.add(out0, s.mul(s.add(first, r), 4 * head_dim)), 4 * block_values * block) for r in range(unit)]
            sums = [
                s.b.fmul(s.load(vec(f32, s.lanes), outs[r], s.width * c), factors[r])
                for r in range(unit)
                for c in range(columns)
            ]

            def key(k, sums, block=block):
                v = s.add(v0, s.mul(k, row_bytes))
                row = [_column(s, kv, v, block_values * block + s.lanes * c) for c in range(columns)]
                new = []
                for r in range(unit):
                    p = s.splat(s.load(f32, s.add(ps[r], s.mul(k, 4))))
                    new += [s.fma(p, row[c], sums[r * columns + c]) for c in range(columns)]
                return new

            sums = s.loop(n_keys, sums, key)
            for r in range(unit):
                for c in range(columns):
                    s.store(sums[r * columns + c], outs[r], s.width * c)
        return []

    s.loop(s.b.sdiv(n_rows, i64(unit)), [], some)
    s.done()


def _transpose_keys(module, target, kv, head_dim):
    """transpose_keys(keys, n_keys, out): rows of the cache as float32 [ceil(n_keys / span)][head_dim][span], so that `product`
    takes `span` keys at a time; the last key pads the last block.
    """
    s = Simd(module, target, "transpose_keys", 3)
    keys, n_keys, out = s.args
    wide, row_bytes = span(head_dim, target), head_dim // kv.unit * kv.nbytes
    last = s.b.sub(n_keys, i64(1))

    def some(i, _):
        first = s.mul(i, wide)
        for part in range(0, wide, s.lanes):
            numbers = [s.add(first, part + k) for k in range(s.lanes)]
            rows = [s.add(keys, s.mul(s.b.select(s.b.icmp_signed("<", n, last), n, last), row_bytes)) for n in numbers]
            to = s.add(s.add(out, s.mul(first, 4 * head_dim)), 4 * part)

            def unit(d, _, rows=rows, to=to):
                at, here = s.mul(d, kv.nbytes), s.add(to, s.mul(d, 4 * kv.unit * wide))
                for c in range(0, kv.unit, s.lanes):
                    columns = s.transpose([kv.read(s, s.add(r, at), c) for r in rows])
                    for k, column in enumerate(columns):
                        s.store(column, here, 4 * wide * (c + k))
                return []

            s.loop(i64(head_dim // kv.unit), [], unit)
        return []

    s.loop(s.b.sdiv(s.add(n_keys, wide - 1), i64(wide)), [], some)
    s.done()


def _widen(module, target, kv):
    """widen(x, n, out): n values, whole rows of the cache, as float32."""
    s = Simd(module, target, "widen", 3)
    x, n, out = s.args

    def unit(i, _):
        at, to = s.add(x, s.mul(i, kv.nbytes)), s.add(out, s.mul(i, 4 * kv.unit))
        for c in range(0, kv.unit, s.lanes):
            s.store(kv.read(s, at, c), to, 4 * c)
        return []

    s.loop(s.b.sdiv(n, i64(kv.unit)), [], unit)
    s.done()
