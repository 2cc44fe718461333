"""Operations between matrix products: embedding, norms, quantizing activations, SwiGLU, routing, sums of squares.

Drivers over rows of float32 with a stride in bytes. `codes` are the int8 form of the same rows (formats/layout.py); 0 where
no quantized product follows. `state` is an int64 block that all steps of a run share.
"""

import math
from typing import NamedTuple

from numpy import float32, float64, int64

from llamacli.cpu.kernels.formats.layout import ACT_BYTES
from llamacli.cpu.kernels.jit.intrinsics import (
    Address,
    Count,
    Microkernel,
    OptionalAddress,
    call,
    kernel,
    pointer,
)

# of the state block: tokens of the run; first and number of the rows that norms work on; attention's blocks of tokens
N, ROW, COUNT, BLOCKS, ALONE = range(5)


class EmbedArguments(NamedTuple):
    weights: Address
    row_bytes: Count
    n_cols: Count
    dequantize: Microkernel
    out: Address
    out_stride: Count
    ids: Address  # int64 [n]
    rows: Address  # int64 [n]: the address of a float32 row that stands in for the token's embedding, or 0
    state: Address


@kernel(EmbedArguments)
def embed(a, thread, threads):
    """out[t] = row ids[t] of the embedding, or the given row, as float32."""
    n = pointer(a.state, int64)[N]
    ids, rows = pointer(a.ids, int64), pointer(a.rows, int64)
    for t in range(n * thread // threads, n * (thread + 1) // threads):
        if rows[t] != 0:
            given, to = pointer(rows[t], float32), pointer(a.out + t * a.out_stride, float32)
            for i in range(a.n_cols):
                to[i] = given[i]
        else:
            call(a.dequantize, (a.weights + ids[t] * a.row_bytes, a.n_cols, a.out + t * a.out_stride))


class NormArguments(NamedTuple):
    x: Address
    x_stride: Count
    weight: Address  # float32 [n_cols]
    n_cols: Count
    out: Address
    out_stride: Count
    codes: OptionalAddress
    codes_stride: Count
    quantize: Microkernel
    eps: Address  # float32
    state: Address


@kernel(NormArguments)
def norm(a, thread, threads):
    """out[t] = x[r] * rsqrt(mean(x[r]**2) + eps) * weight, r = ROW + t, for COUNT rows, and codes (Zhang, Sennrich 2019)."""
    state = pointer(a.state, int64)
    n, first, count, eps = a.n_cols, state[ROW], state[COUNT], pointer(a.eps, float32)[0]
    weight = pointer(a.weight, float32)
    for t in range(count * thread // threads, count * (thread + 1) // threads):
        row, to = pointer(a.x + (first + t) * a.x_stride, float32), pointer(a.out + t * a.out_stride, float32)
        total = float32(0.0)
        for i in range(n):
            total += row[i] * row[i]
        scale = float32(1.0) / math.sqrt(total / float32(n) + eps)
        for i in range(n):
            to[i] = row[i] * scale * weight[i]
        if a.codes != 0:
            call(a.quantize, (a.out + t * a.out_stride, (n + 255) // 256, a.codes + t * a.codes_stride))


class QuantizeArguments(NamedTuple):
    x: Address
    x_stride: Count
    n_cols: Count
    codes: Address
    codes_stride: Count
    quantize: Microkernel
    state: Address


@kernel(QuantizeArguments)
def quantize_rows(a, thread, threads):
    """codes of x for all rows of the run; the threads share the superblocks."""
    supers = (a.n_cols + 255) // 256
    total = pointer(a.state, int64)[N] * supers
    for k in range(total * thread // threads, total * (thread + 1) // threads):
        t, b = k // supers, k % supers
        call(a.quantize, (a.x + t * a.x_stride + 1024 * b, 1, a.codes + t * a.codes_stride + ACT_BYTES * b))


class SwigluArguments(NamedTuple):
    gate: Address
    up: Address
    stride: Count
    n_cols: Count
    codes: OptionalAddress
    codes_stride: Count
    quantize: Microkernel
    swiglu: Microkernel
    scores: OptionalAddress  # float32, one a row
    one: Address  # float32 1.0, in place of absent scores
    per_token: Count  # rows of each token
    state: Address


@kernel(SwigluArguments)
def swiglu(a, thread, threads):
    """gate = silu(s * gate) * s * up in place, and its codes; s is the row's router score, or 1."""
    supers = (a.n_cols + 255) // 256
    total = pointer(a.state, int64)[N] * a.per_token * supers
    for k in range(total * thread // threads, total * (thread + 1) // threads):
        row, b = k // supers, k % supers
        offset = row * a.stride + 1024 * b
        score = a.scores + 4 * row if a.scores != 0 else a.one
        call(a.swiglu, (a.gate + offset, a.up + offset, score, min(256, (a.n_cols - 256 * b + 15) // 16 * 16)))
        if a.codes != 0:
            call(a.quantize, (a.gate + offset, 1, a.codes + row * a.codes_stride + ACT_BYTES * b))


class RouteArguments(NamedTuple):
    logits: Address
    stride: Count
    n_experts: Count
    n_used: Count
    scores: Address  # float32 [n * n_used]
    chosen: Address  # int64 [n * n_used]
    table: Address  # int64 [n_experts + 1 + n * n_used]: the matmul table (matmul.py)
    state: Address


@kernel(RouteArguments)
def route(a, thread, threads):
    """Choose experts by the largest raw logits, score them with a sigmoid, and sort the pairs by expert into the matmul table.

    Llama 4 neither softmaxes nor renormalizes. Ties go to the lower expert, as in torch.topk on CPU.
    """
    if thread != 0:
        return
    n, n_experts, n_used = pointer(a.state, int64)[N], a.n_experts, a.n_used
    scores, chosen, table = pointer(a.scores, float32), pointer(a.chosen, int64), pointer(a.table, int64)
    pairs = pointer(a.table + 8 * (n_experts + 1), int64)
    for e in range(n_experts + 1):
        table[e] = 0
    for t in range(n):
        row = pointer(a.logits + t * a.stride, float32)
        for j in range(n_used):
            best = -1
            for e in range(n_experts):
                taken = False
                for before in range(j):
                    taken = taken or chosen[t * n_used + before] == e
                if not taken and (best < 0 or row[e] > row[best]):
                    best = e
            chosen[t * n_used + j] = best
            scores[t * n_used + j] = float32(1.0) / (float32(1.0) + math.exp(-row[best]))
            table[best + 1] += 1
    for e in range(n_experts):
        table[e + 1] += table[e]
    for pair in range(n * n_used - 1, -1, -1):  # from the back, so that pairs of one expert stand in token order
        expert = chosen[pair]
        table[expert + 1] -= 1
        pairs[table[expert + 1]] = pair
    for e in range(n_experts):  # the ends have become starts: shift them back
        table[e] = table[e + 1]
    table[n_experts] = n * n_used


class SquareSumsArguments(NamedTuple):
    x: Address
    x_stride: Count
    n_cols: Count
    n_groups: Count
    table: Address  # of the matmul that follows
    x_div: Count
    scores: OptionalAddress
    sums: Address  # float64 [n_groups, n_cols]
    counts: Address  # int64 [n_groups]


@kernel(SquareSumsArguments)
def square_sums(a, thread, threads):
    """sums[group] += (s * x[pair])**2 by column, in float64, for the pairs of each group of a matmul table; counts[group] +=
    their number. s is the pair's router score, or 1. The threads share the columns.
    """
    table, counts = pointer(a.table, int64), pointer(a.counts, int64)
    pairs = pointer(a.table + 8 * (a.n_groups + 1), int64)
    first, end = a.n_cols * thread // threads, a.n_cols * (thread + 1) // threads
    for group in range(a.n_groups):
        total = pointer(a.sums + 8 * group * a.n_cols, float64)
        for j in range(table[group], table[group + 1]):
            row = pointer(a.x + pairs[j] // a.x_div * a.x_stride, float32)
            score = pointer(a.scores, float32)[pairs[j]] if a.scores != 0 else float32(1.0)
            for i in range(first, end):
                value = float64(score * row[i])
                total[i] += value * value
        if thread == 0:
            counts[group] += table[group + 1] - table[group]
