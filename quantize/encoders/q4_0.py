"""Q4_0: blocks of 32 weights, a half-precision scale and 32 nibbles from -8 to 7; the weight of largest magnitude becomes -8.

Byte j holds weight j in its low nibble and weight 16 + j in its high one. Of two weights of the same magnitude the first
decides the scale's sign. A block so small that the scale's reciprocal overflows has a scale that is zero in half precision; its
nibbles are zero. That is ggml's encoding without weights; with weights the scale is searched for.
"""

from llvmlite import ir

from llamacli.cpu.kernels.jit.simd import f32, i8, i32, i64, vec
from quantize.encoders.blocks import interleaved, nibbles
from quantize.encoders.levels import Uniform

BLOCK, NBYTES, GROUP, SIDES = 32, 18, 32, 1
LEVELS, INTEGERS = Uniform(-8, 7), None
GRID, POLISH = (-0.3, 0.05, 16), 2
LIMIT = 65504.0 * 8


def exact(s, x0, n_blocks, out0):
    """Blocks by ggml's rule, without a search."""
    b = s.b

    def one(i, _):
        x, out = s.add(x0, s.mul(i, 4 * BLOCK)), s.add(out0, s.mul(i, NBYTES))
        v = s.load(vec(f32, BLOCK), x)
        size = s.fabs(v)
        furthest = b.bitcast(b.fcmp_ordered("==", size, s.splat(s.reduce_max(size), BLOCK)), i32)
        first = b.zext(b.cttz(furthest, ir.IntType(1)(0)), i64)
        d = b.fdiv(s.load(f32, s.add(x, s.mul(first, 4))), f32(-8.0))
        some = b.fcmp_ordered("!=", d, f32(0.0))
        inverse = b.select(some, b.fdiv(f32(1.0), b.select(some, d, f32(1.0))), f32(0.0))
        finite = b.fcmp_ordered("<", s.fabs(inverse), f32(float("inf")))
        t = b.fadd(b.fmul(v, s.splat(b.select(finite, inverse, f32(0.0)), BLOCK)), s.fill(f32, BLOCK, 8.5))
        q = b.fptosi(t, vec(i32, BLOCK))
        top = s.fill(i32, BLOCK, 15)
        q = b.trunc(b.select(b.icmp_signed("<", q, top), q, top), vec(i8, BLOCK))
        q = b.and_(q, s.splat(b.select(finite, i8(-1), i8(0)), BLOCK))
        s.store(b.extract_element(s.to_half(s.splat(d, 4)), i32(0)), out)
        s.store(interleaved(s, *(s.shuffle(q, list(range(k, k + 16))) for k in (0, 16))), out, 2)
        return []

    s.loop(n_blocks, [], one)


def pack(s, out, p):
    """One block, as found by the search, to its bytes."""
    s.store(p.d(s), out)
    s.store(nibbles(s, p), out, 2)
