"""Kernels over raw GGUF blocks: rows of activations times a matrix, and a matrix widened to float16.

In: MLX arrays: the bytes of a window, `place` (where in it the matrix begins, and its sizes), the number of an expert, rows.
Out: MLX arrays, not yet evaluated. One text serves Metal and CUDA; a `Dialect` holds what differs. Tests compile it as C++.

A group of 32 threads (Metal's simdgroup, CUDA's warp) multiplies a few rows of the matrix with a few rows of activations;
each thread reads every 32nd piece of 32 weights, so neighbours read neighbouring bytes. What may be many is counted along x:
CUDA's grids end at 65535 along y.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

import mlx.core as mx

from llamacli.mlx import runtime
from llamacli.mlx.blocks import FORMATS, HELPERS, PIECE

LANES = 32  # threads of a simdgroup or warp
GROUP = 64  # threads of a threadgroup or block
ROWS = {1: 4, 2: 4, 4: 2, 8: 2}  # rows of the matrix for each group of lanes, by rows of activations: what registers hold
SMALL = 8  # arrays of fewer elements are in Metal's constant address space, which changes the kernel's signature


class Dialect(NamedTuple):
    """A language that the kernels are written in: definitions, the beginning of each body, and what compiles it."""

    header: str
    prologue: str
    make: Callable


METAL = """
#include <metal_stdlib>
using namespace metal;
typedef uchar u8; typedef ushort u16; typedef uint u32; typedef ulong u64; typedef half f16;
#define INLINE inline
#define GLOBAL device
#define LOCAL thread
#define TABLE constant constexpr
#define UNROLL _Pragma("clang loop unroll(full)")
INLINE float half_of(u16 v) { return (float)as_type<half>(v); }
INLINE float float_of(u32 v) { return as_type<float>(v); }
INLINE float lane_sum(float v) { return simd_sum(v); }
INLINE float exp_of(float v) { return exp(v); }
INLINE float root_of(float v) { return sqrt(v); }
"""
METAL_PROLOGUE = "const u32 at_x = thread_position_in_grid.x, at_y = thread_position_in_grid.y;"
CUDA = """
#include <cuda_fp16.h>
typedef unsigned char u8; typedef unsigned short u16; typedef unsigned int u32;
typedef unsigned long long u64; typedef __half f16;
#define INLINE static __device__ __forceinline__
#define GLOBAL
#define LOCAL
#define TABLE static __device__ const
#define UNROLL _Pragma("unroll")
INLINE float half_of(u16 v) { return __half2float(__ushort_as_half(v)); }
INLINE float float_of(u32 v) { return __uint_as_float(v); }
INLINE float exp_of(float v) { return expf(v); }
INLINE float root_of(float v) { return sqrtf(v); }
INLINE float lane_sum(float v) {
  for (int other = 16; other; other >>= 1) v += __shfl_xor_sync(0xffffffffu, v, other);
  return v;
}
"""
CUDA_PROLOGUE = "const u32 at_x = blockIdx.x * blockDim.x + threadIdx.x, at_y = blockIdx.y * blockDim.y + threadIdx.y;"

_GROUPS = """
  // y[group, token, row]: TOKENS rows of x go through the matrices of expert experts[group]
  const u32 lane = at_x % 32, first = at_x / 32 * ROWS, group_no = at_y;
  const u32 n_rows = (u32)place[1], n_cols = (u32)place[2];
  if (first >= n_rows) return;
  const u64 row_bytes = (u64)(n_cols / BLOCK) * NBYTES;
  const GLOBAL float* rows = x + (u64)group_no * TOKENS * n_cols;
"""
_SUMS = """
  float SUMS[ROWS * TOKENS];
  UNROLL for (u32 i = 0; i < ROWS * TOKENS; i++) SUMS[i] = 0.0f;
  for (u32 s = lane; s < n_cols / 32; s += 32) {
    const GLOBAL u8* matrix = (const GLOBAL u8*)WEIGHTS + PLACE[0] + (u64)experts[group_no] * PLACE[3];
    const u32 p = s % (BLOCK / 32), block = s / (BLOCK / 32);
    const u32 c0 = block * BLOCK + run(p, 0), c1 = block * BLOCK + run(p, 1);
    float totals[2 * TOKENS];  // of the activations of each run, which minima are multiplied with
    UNROLL for (u32 t = 0; t < TOKENS; t++) {
      const GLOBAL float* v = rows + (u64)t * n_cols;
      totals[2 * t] = totals[2 * t + 1] = 0.0f;
      UNROLL for (u32 i = 0; i < 16; i++) {
        totals[2 * t] += v[c0 + i];
        totals[2 * t + 1] += v[c1 + i];
      }
    }
    UNROLL for (u32 r = 0; r < ROWS; r++) {
      const u32 row = first + r < n_rows ? first + r : n_rows - 1;
      float q[32], d[2], m[2];
      piece(matrix + row * row_bytes + (u64)block * NBYTES, p, q, d, m);
      UNROLL for (u32 t = 0; t < TOKENS; t++) {
        const GLOBAL float* v = rows + (u64)t * n_cols;
        float even[2] = {0.0f, 0.0f}, odd[2] = {0.0f, 0.0f};
        UNROLL for (u32 i = 0; i < 16; i += 2) {
          even[0] += q[i] * v[c0 + i];
          odd[0] += q[i + 1] * v[c0 + i + 1];
          even[1] += q[i + 16] * v[c1 + i];
          odd[1] += q[i + 17] * v[c1 + i + 1];
        }
        UNROLL for (u32 h = 0; h < 2; h++)
          SUMS[r * TOKENS + t] += d[h] * (even[h] + ODD * odd[h]) - m[h] * totals[2 * t + h];
      }
    }
  }
"""
_ENDS = """
  UNROLL for (u32 r = 0; r < ROWS; r++)
    UNROLL for (u32 t = 0; t < TOKENS; t++) {
      const u64 token = (u64)group_no * TOKENS + t, at = token * n_rows + first + r;
      RESULT
    }
"""


def _sums(weights: str, place: str, sums: str) -> str:
    """The text that multiplies with one matrix."""
    return _SUMS.replace("WEIGHTS", weights).replace("PLACE", place).replace("SUMS", sums)


def _ends(result: str) -> str:
    """The text that writes element `at` of y."""
    return _ENDS.replace("RESULT", result)


INPUTS = {
    "matvec": ["w", "place", "experts", "x"],
    "added": ["w", "place", "experts", "x", "base"],
    "gated": ["w", "place", "experts", "x", "up", "up_place", "scores"],
    "widen": ["w", "place", "experts"],
    "heads": ["x", "cosines", "sines", "scales", "sizes", "eps"],
}
BODIES = {
    "matvec": _GROUPS
    + _sums("w", "place", "sums")
    + _ends("""const float sum = lane_sum(sums[r * TOKENS + t]);
      if (lane == 0 && first + r < n_rows) y[at] = sum;"""),
    "added": _GROUPS
    + _sums("w", "place", "sums")
    + _ends("""const float sum = lane_sum(sums[r * TOKENS + t]);
      if (lane == 0 && first + r < n_rows) y[at] = base[at] + sum;"""),
    "gated": _GROUPS
    + _sums("w", "place", "gates")
    + _sums("up", "up_place", "ups")
    + _ends("""const float gate = scores[token] * lane_sum(gates[r * TOKENS + t]);
      const float raised = scores[token] * lane_sum(ups[r * TOKENS + t]);
      if (lane == 0 && first + r < n_rows) y[at] = gate / (1.0f + exp_of(-gate)) * raised;"""),
    "heads": """
  // y[head, token, element]: each head rotated, normed, scaled; rotation does not change its norm
  const u32 n_heads = (u32)sizes[0], dim = (u32)sizes[1], n = (u32)sizes[2], rotates = (u32)sizes[3], norms = (u32)sizes[4];
  const u32 lane = at_x % 32, row = at_x / 32, token = row / n_heads, head = row % n_heads;
  if (token >= n) return;
  const u64 from = (u64)row * dim, to = ((u64)head * n + token) * dim, turn = (u64)token * (dim / 2);
  float squares = 0.0f;
  for (u32 i = lane; i < dim; i += 32) squares += x[from + i] * x[from + i];
  const float sum = lane_sum(squares);
  const float factor = norms ? scales[token] / root_of(sum / (float)dim + eps[0]) : scales[token];
  for (u32 j = lane; j < dim / 2; j += 32) {
    const float a = x[from + 2 * j] * factor, b = x[from + 2 * j + 1] * factor;
    const float c = rotates ? cosines[turn + j] : 1.0f, s = rotates ? sines[turn + j] : 0.0f;
    y[to + 2 * j] = (T)(a * c - b * s);
    y[to + 2 * j + 1] = (T)(a * s + b * c);
  }
""",
    "widen": """
  // y[row, column] of expert experts[0]; a thread a piece
  const u32 n_rows = (u32)place[1], n_cols = (u32)place[2], row = at_x / (n_cols / 32), s = at_x % (n_cols / 32);
  if (row >= n_rows) return;
  const u64 row_bytes = (u64)(n_cols / BLOCK) * NBYTES;
  const u32 p = s % (BLOCK / 32), block = s / (BLOCK / 32);
  const GLOBAL u8* base = (const GLOBAL u8*)w + place[0] + (u64)experts[0] * place[3] + row * row_bytes;
  float q[32], d[2], m[2];
  piece(base + (u64)block * NBYTES, p, q, d, m);
  UNROLL for (u32 r = 0; r < 2; r++) {
    const u64 first = (u64)row * n_cols + block * BLOCK + run(p, r);
    UNROLL for (u32 i = 0; i < 16; i++) y[first + i] = (f16)((i % 2 ? ODD * d[r] : d[r]) * q[16 * r + i] - m[r]);
  }
""",
}


def fits(type_name: str, n_cols: int) -> bool:
    """Whether the kernels read rows of `n_cols` weights of a type."""
    return type_name in FORMATS and n_cols % PIECE == 0


def place(offset: int, n_rows: int, n_cols: int, stride: int = 0) -> mx.array:
    """Where matrices are: the byte in the window at which the first begins; their sizes; bytes from one expert to the next."""
    return mx.array([offset, n_rows, n_cols, stride], mx.int64)


@cache
def number(expert: int) -> mx.array:
    """The number of an expert as kernels are given it, int32 [1]."""
    return mx.array([expert], mx.int32)


class Matrices(NamedTuple):
    """Experts' matrices as arguments of kernels: their bytes, and their `place`."""

    type_name: str
    w: mx.array
    place: mx.array
    n_rows: int


def matvec(m: Matrices, experts: mx.array, x: mx.array, tokens: int) -> mx.array:
    """Rows of x, float32 [n, n_cols], times matrices: float32 [n, n_rows].

    `experts`, int32 [n / tokens]: which expert's matrix each group of `tokens` rows goes through.
    """
    return _products("matvec", m, experts, x, tokens, [])


def added(m: Matrices, experts: mx.array, x: mx.array, tokens: int, base: mx.array) -> mx.array:
    """base + `matvec`; `tokens` is a key of ROWS."""
    return _products("added", m, experts, x, tokens, [base])


def gated(m: Matrices, up: Matrices, experts: mx.array, x: mx.array, tokens: int, scores: mx.array | None) -> mx.array:
    """silu(s g) * s u, g and u being `matvec` of `m` and `up`, which are alike, and s a row's score (None: 1)."""
    scores = mx.ones(len(x)) if scores is None else scores.reshape(-1)
    return _products("gated", m, experts, x, tokens, [up.w, up.place, scores])


def _products(kind: str, m: Matrices, experts: mx.array, x: mx.array, tokens: int, more: list[mx.array]) -> mx.array:
    n, padded = len(x), 1 << (tokens - 1).bit_length()
    if padded != tokens:  # of one group
        x = mx.pad(x, ((0, padded - tokens), (0, 0)))
        more = [*more[:-1], mx.pad(more[-1], (0, padded - tokens))] if kind == "gated" else more
    rows, groups = ROWS[padded], len(x) // padded
    (y,) = _kernel(kind, m.type_name, groups < SMALL, len(x) < SMALL)(
        inputs=[m.w, m.place, experts, x, *more],
        template=[("ROWS", rows), ("TOKENS", padded)],
        grid=(LANES * -(-m.n_rows // rows), groups, 1),
        threadgroup=(GROUP, 1, 1),
        output_shapes=[(len(x), m.n_rows)],
        output_dtypes=[mx.float32],
    )
    return y if len(x) == n else y[:n]


def widen(type_name: str, w: mx.array, where: mx.array, expert: mx.array, n_rows: int, n_cols: int) -> mx.array:
    """One expert's matrix as float16 [n_rows, n_cols]; `expert`: int32 [1]."""
    (y,) = _kernel("widen", type_name, True)(
        inputs=[w, where, expert],
        grid=(n_cols // PIECE * n_rows, 1, 1),
        threadgroup=(GROUP, 1, 1),
        output_shapes=[(n_rows, n_cols)],
        output_dtypes=[mx.float16],
    )
    return y


def heads(
    x: mx.array,
    turns: tuple[mx.array, mx.array],
    scales: mx.array,
    n_heads: int,
    eps: float,
    dtype: mx.Dtype,
    *,
    rotate: bool,
    norm: bool,
) -> mx.array:
    """Heads of x, float32 [n, n_heads * head_dim], rotated, normed and scaled as asked: [n_heads, n, head_dim] in `dtype`.

    `turns`: cosines and sines of each pair, [n, head_dim / 2]. `scales`: float32 [n].
    """
    n, dim = len(x), x.shape[1] // n_heads
    (y,) = _heads_kernel(scales.size < SMALL, turns[0].size < SMALL, x.size < SMALL)(
        inputs=[x, *turns, scales, _numbers(n_heads, dim, n, int(rotate), int(norm)), _number(eps)],
        template=[("T", dtype)],
        grid=(LANES * n * n_heads, 1, 1),
        threadgroup=(LANES, 1, 1),
        output_shapes=[(n_heads, n, dim)],
        output_dtypes=[dtype],
    )
    return y


@lru_cache(256)
def _numbers(*numbers: int) -> mx.array:
    return mx.array(numbers, mx.int32)


@cache
def _number(value: float) -> mx.array:
    return mx.array([value], mx.float32)


def dialect() -> Dialect | None:
    """The language of the GPU that is here; None without one."""
    return {
        "Metal": Dialect(METAL, METAL_PROLOGUE, mx.fast.metal_kernel),
        "CUDA": Dialect(CUDA, CUDA_PROLOGUE, mx.fast.cuda_kernel),
    }.get(runtime.start().gpu)


@cache
def _kernel(kind: str, type_name: str, few: bool, small: bool = True) -> Callable:
    """A compiled kernel. `few`, `small`: its numbers of experts, and of rows, are below SMALL. Names are unique: MLX finds
    compiled code by its name.
    """
    block, nbytes, text = FORMATS[type_name]
    sizes = f"#define BLOCK {block}\n#define NBYTES {nbytes}\n"
    name = f"{kind}_{type_name.lower()}_{'few' if few else 'many'}_{'small' if small else 'large'}"
    return _made(kind, name, sizes + HELPERS + text)


@cache
def _heads_kernel(*small: bool) -> Callable:
    """The kernel of `heads`; `small`: which inputs are below SMALL."""
    return _made("heads", "heads" + "".join("_small" if one else "_large" for one in small))


def _made(kind: str, name: str, header: str = "") -> Callable:
    language = dialect()
    return language.make(
        name=f"llamacli_{name}",
        input_names=INPUTS[kind],
        output_names=["y"],
        source=language.prologue + BODIES[kind],
        header=language.header + header,
    )
