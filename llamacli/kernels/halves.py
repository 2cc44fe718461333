"""Scales that stand as one half float at the head of each 32-weight block: what the `_0` and `_1` formats share."""

from llvmlite import ir

from llamacli.kernels.simd import f16, i32, vec


def half_scales(s, w, n, stride, at=0):
    """n half floats, `stride` bytes apart from w + at on, as a float32 vector."""
    v = ir.Constant(vec(f16, n), ir.Undefined)
    for k in range(n):
        v = s.b.insert_element(v, s.load(f16, w, k * stride + at), i32(k))
    return s.from_half(v)


def splat_half(s, w, at, n):
    """One half float at w + at in n float32 lanes."""
    return s.splat(s.from_half(s.load(f16, w, at)), n)


