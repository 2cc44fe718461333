"""Microkernels for rows of float weights, F32, F16 or BF16, times float32 rows: one row of these (`matvec`) or some (`tile`).

All microkernels take int64 addresses and sizes; `acc` nonzero adds to what stands in out.
"""

from llvmlite import ir

from llamacli.cpu.kernels.formats.dots import AHEAD
from llamacli.cpu.kernels.jit.simd import Simd, f16, f32, i16, i32, i64, vec

ROWS, TOKENS = 4, 4
SYMBOLS = ("dequantize", "matvec", "tile")


def floats(name, target):
    """The module of microkernels for one float type."""
    module = ir.Module(name)
    _dequantize(module, target, name)
    _dots(module, target, name, "matvec", ROWS, 1)
    # sums of a tile are twice as many registers where a vector takes two of them
    _dots(module, target, name, "tile", ROWS // 2 if target.neon else ROWS, TOKENS)
    return module


def _type(s, name):
    """(bytes, IR element, how a vector of it becomes float32)."""
    if name == "F32":
        return 4, f32, lambda raw: raw
    if name == "F16":
        return 2, f16, s.from_half
    return 2, i16, lambda raw: s.bits(s.b.shl(s.unsigned(raw), s.fill(i32, raw.type.count, 16)), f32)


def _dequantize(module, target, name):
    """dequantize(w, n_cols, out): one row as float32."""
    s = Simd(module, target, "dequantize", 3)
    w, n_cols, out = s.args
    size, element, widen = _type(s, name)

    def some(lanes):
        def step(i, _):
            s.store(widen(s.load(vec(element, lanes), s.add(w, s.mul(i, lanes * size)))), s.add(out, s.mul(i, lanes * 4)))
            return []

        return step

    whole = s.b.sdiv(n_cols, i64(s.lanes))
    s.loop(whole, [], some(s.lanes))
    s.loop(n_cols, [], some(1), start=s.mul(whole, s.lanes))
    s.done()


def _dots(module, target, name, symbol, n_rows_block, n_tokens):
    """matvec(w, row_bytes, n_rows, n_cols, x, out, acc, unused) or tile(w, row_bytes, n_rows, n_cols, xs, outs, offset, acc).

    x rows are float32.
    """
    tiled = symbol == "tile"
    s = Simd(module, target, symbol, 8)
    w0, row_bytes, n_rows, n_cols = s.args[:4]
    xs = [s.load(i64, s.args[4], 8 * t) for t in range(n_tokens)] if tiled else [s.args[4]]
    outs = [s.add(s.load(i64, s.args[5], 8 * t), s.args[6]) for t in range(n_tokens)] if tiled else [s.args[5]]
    keep = s.b.icmp_signed("!=", s.args[7 if tiled else 6], i64(0))
    size, element, widen = _type(s, name)
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
