"""Microkernels on float rows: quantize activations, SwiGLU, GELU, one block of a softmax, products of queries with keys as
float32.

`build(head_dim)` gives the module builder for jit.load; `product` is compiled for one head size. Rows that `quantize` reads are
padded to whole superblocks of 256.
"""

from llvmlite import ir

from llamacli.cpu.kernels.formats.layout import ACT_BYTES, S16, S32, D
from llamacli.cpu.kernels.jit.simd import Simd, f32, i8, i32, i64, vec
from llamacli.cpu.kernels.ops.kv import span

SYMBOLS = ("quantize", "swiglu", "gelu", "softmax", "product")
RAISE = 2.0**64  # smaller values than its reciprocal are raised: 127 / 2**-149 is beyond float32


def build(head_dim):
    """The builder of the module for this head size."""

    def module_for(target):
        module = ir.Module("vectors")
        _quantize(module, target)
        _swiglu(module, target)
        _gelu(module, target)
        _softmax(module, target)
        _product(module, target, head_dim)
        return module

    return module_for


def _quantize(module, target):
    """quantize(x, n_supers, out): float32 to activation superblocks (layout.py), each 32 values with d = max|x| / 127.

    Values whose reciprocal would overflow float32 are first multiplied by RAISE, a power of two, which is exact.
    """
    s = Simd(module, target, "quantize", 3)
    x0, supers, out0 = s.args

    def group(i, _):
        x, out, g = s.add(x0, s.mul(i, 128)), s.add(out0, s.mul(s.b.lshr(i, i64(3)), ACT_BYTES)), s.b.and_(i, i64(7))
        v = s.load(vec(f32, 32), x)
        largest = s.reduce_max(s.fabs(v))
        factor = s.b.select(s.b.fcmp_ordered("<", largest, f32(1 / RAISE)), f32(RAISE), f32(1.0))
        some = s.b.fcmp_ordered(">", largest, f32(0.0))
        inverse = s.b.select(some, s.b.fdiv(f32(127.0), s.b.fmul(largest, factor)), f32(0.0))
        d = s.b.fmul(largest, f32(1 / 127))
        q = s.round(s.b.fmul(s.b.fmul(v, s.splat(factor, 32)), s.splat(inverse, 32)))
        s.store(s.b.trunc(q, vec(i8, 32)), s.add(out, s.mul(g, 32)))
        total = s.to_float(q)
        low, high = (s.b.fmul(s.sum(s.shuffle(total, list(range(k, k + 16)))), d) for k in (0, 16))
        at = s.add(out, s.mul(g, 4))
        s.store(d, at, D)
        s.store(s.b.fadd(low, high), at, S32)
        at = s.add(out, s.mul(g, 8))
        s.store(low, at, S16)
        s.store(high, at, S16 + 4)
        return []

    s.loop(s.mul(supers, 8), [], group)
    s.done()


def _swiglu(module, target):
    """swiglu(gate, up, factor, n): gate = silu(factor * gate) * factor * up for n values, a multiple of the lanes; factor:
    float32.
    """
    s = Simd(module, target, "swiglu", 4)
    gate, up, factor_at, n = s.args
    factor = s.splat(s.load(f32, factor_at))

    def step(i, _):
        at = s.mul(i, s.width)
        g = s.b.fmul(s.load(vec(f32, s.lanes), s.add(gate, at)), factor)
        u = s.b.fmul(s.load(vec(f32, s.lanes), s.add(up, at)), factor)
        # past 80 the sigmoid is 0 or 1 in float32; beyond 88 the exponential would overflow
        bounded = s.b.select(s.b.fcmp_ordered("<", g, s.fill(f32, s.lanes, -80.0)), s.fill(f32, s.lanes, -80.0), g)
        one = s.fill(f32, s.lanes, 1.0)
        sigmoid = s.b.fdiv(one, s.b.fadd(one, s.exp(s.b.fneg(bounded))))
        s.store(s.b.fmul(s.b.fmul(g, sigmoid), u), s.add(gate, at))
        return []

    s.loop(s.b.sdiv(n, i64(s.lanes)), [], step)
    s.done()


def _gelu(module, target):
    """gelu(x, bias, n): x = v * P(a normal variable is below v), v = x + bias, for n values, a multiple of the lanes.

    P by the complementary error function, which Numerical Recipes (6.2) approximates to 1.2e-7 of its value.
    """
    s = Simd(module, target, "gelu", 3)
    x, bias, n = s.args
    terms = (0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418, 0.37409196, 1.00002368)

    def step(i, _):
        at = s.mul(i, s.width)
        v = s.b.fadd(s.load(vec(f32, s.lanes), s.add(x, at)), s.load(vec(f32, s.lanes), s.add(bias, at)))
        c = lambda value: s.fill(f32, s.lanes, value)
        z = s.b.fmul(s.fabs(v), c(0.7071067811865476))
        t = s.b.fdiv(c(1.0), s.fma(z, c(0.5), c(1.0)))
        p = c(terms[0])
        for term in (*terms[1:], -1.26551223):
            p = s.fma(p, t, c(term))
        tail = s.b.fmul(s.b.fmul(t, c(0.5)), s.exp(s.b.fsub(p, s.b.fmul(z, z))))
        below = s.b.select(s.b.fcmp_ordered("<", v, c(0.0)), tail, s.b.fsub(c(1.0), tail))
        s.store(s.b.fmul(v, below), s.add(x, at))
        return []

    s.loop(s.b.sdiv(n, i64(s.lanes)), [], step)
    s.done()


def _softmax(module, target):
    """softmax(scores, n_valid, n, state, scale): one block of an online softmax (Milakov and Gimelshein, arXiv 1805.02867).

    scores[:n_valid] become exp(scale * score - max so far), the rest up to n (rounded up to a register) 0. state is float32
    [max, sum, factor]: factor is what earlier sums and outputs must be multiplied with. scale: address of a float32.
    """
    s = Simd(module, target, "softmax", 5)
    scores, n_valid, n, state, scale_at = s.args
    lowest = s.fill(f32, s.lanes, -3.0e38)
    scale = s.splat(s.load(f32, scale_at))
    rounds = s.b.sdiv(s.add(n, s.lanes - 1), i64(s.lanes))
    lane = ir.Constant(vec(i32, s.lanes), list(range(s.lanes)))

    def valid(i):
        left = s.b.trunc(s.b.sub(n_valid, s.mul(i, s.lanes)), i32)
        return s.b.icmp_signed("<", lane, s.splat(left))

    def scaled(i):
        v = s.b.fmul(s.load(vec(f32, s.lanes), s.add(scores, s.mul(i, s.width))), scale)
        return s.b.select(valid(i), v, lowest)

    (top,) = s.loop(rounds, [lowest], lambda i, v: [s.fmax(v[0], scaled(i))])
    before = s.load(f32, state)
    now = s.b.select(s.b.fcmp_ordered(">", s.reduce_max(top), before), s.reduce_max(top), before)
    factor = s.b.extract_element(s.exp(s.splat(s.b.fsub(before, now))), i32(0))
    spread = s.splat(now)

    def weights(i, total):
        v = s.b.select(valid(i), s.exp(s.b.fsub(scaled(i), spread)), s.zeros())
        s.store(v, s.add(scores, s.mul(i, s.width)))
        return [s.b.fadd(total[0], v)]

    (total,) = s.loop(rounds, [s.zeros()], weights)
    s.store(now, state)
    s.store(s.b.fadd(s.b.fmul(s.load(f32, state, 4), factor), s.sum(total)), state, 4)
    s.store(factor, state, 8)
    s.done()


def _product(module, target, head_dim):
    """product(a, a_stride, n_rows, b, b_stride, depth, c, c_stride, state): c[r] = a[r] . b, `span` columns of it, all float32.

    n_rows is a multiple of target.tile; a's columns and b's rows are `depth` many. With a state (as in softmax) for each row, c
    times the state's factor is added; state 0: nothing is added.
    """
    s = Simd(module, target, "product", 9)
    a0, a_stride, n_rows, b0, b_stride, depth, c0, c_stride, state0 = s.args
    columns, tall = span(head_dim, target) // s.lanes, target.tile
    keep = s.b.icmp_signed("!=", state0, i64(0))

    def block(i, _):
        first = s.mul(i, tall)
        rows = [s.add(first, r) for r in range(tall)]
        left = [s.add(a0, s.mul(a_stride, r)) for r in rows]
        outs = [s.add(c0, s.mul(c_stride, r)) for r in rows]
        sums = []
        for r, out in zip(rows, outs, strict=True):
            factor = s.splat(s.load(f32, s.b.select(keep, s.add(state0, s.mul(r, 12)), out), 8))
            before = [s.b.fmul(s.load(vec(f32, s.lanes), out, s.width * c), factor) for c in range(columns)]
            sums += [s.b.select(keep, v, s.zeros()) for v in before]

        def step(k, sums):
            right = s.add(b0, s.mul(b_stride, k))
            row = [s.load(vec(f32, s.lanes), right, s.width * c) for c in range(columns)]
            new = []
            for r in range(tall):
                value = s.splat(s.load(f32, s.add(left[r], s.mul(k, 4))))
                new += [s.fma(value, row[c], sums[r * columns + c]) for c in range(columns)]
            return new

        sums = s.loop(depth, sums, step)
        for r, out in enumerate(outs):
            for c in range(columns):
                s.store(sums[r * columns + c], out, s.width * c)
        return []

    s.loop(s.b.sdiv(n_rows, i64(tall)), [], block)
    s.done()
