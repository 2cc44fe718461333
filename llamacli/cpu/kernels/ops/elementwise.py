"""The steps between matrix products: norms, quantizing activations, SwiGLU, routing tokens to experts, sums of squares.

Drivers; each unpacks its int64 arguments in its first line, and model.py packs them. `state` is the block that all steps of
a run share. Rows are float32 with a stride in bytes; `codes` are the int8 side of the same rows (formats.py). Know
nothing of layers.
"""

import math

from numpy import float32, float64, int64

from llamacli.cpu.kernels.formats.layout import ACT_BYTES
from llamacli.cpu.kernels.jit.intrinsics import call, kernel, pointer, unpack

N, POS, ROW, COUNT, CACHE = range(5)  # slots of the state block


@kernel
def norm(at, thread, threads):
    """out[t] = x[t] * rsqrt(mean(x[t]**2) + eps) * w, and its codes, for the COUNT rows from ROW on (Zhang and Sennrich,
    RMSNorm).
    """
    x, x_stride, weight_at, n, out, out_stride, codes, codes_stride, quantize, eps_at, state_at = unpack(at, 11)
    state = pointer(state_at, int64)
    first, count, eps = state[ROW], state[COUNT], pointer(eps_at, float32)[0]
    weight = pointer(weight_at, float32)
    for t in range(count * thread // threads, count * (thread + 1) // threads):
        row, to = pointer(x + (first + t) * x_stride, float32), pointer(out + t * out_stride, float32)
        total = float32(0.0)
        for i in range(n):
            total += row[i] * row[i]
        scale = float32(1.0) / math.sqrt(total / float32(n) + eps)
        for i in range(n):
            to[i] = row[i] * scale * weight[i]
        if codes != 0:
            call(quantize, (out + t * out_stride, (n + 255) // 256, codes + t * codes_stride))


@kernel
def quantize_rows(at, thread, threads):
    """codes of x for all rows of this run; the threads share the superblocks."""
    x, x_stride, n, codes, codes_stride, quantize, state_at = unpack(at, 7)
    supers = (n + 255) // 256
    total = pointer(state_at, int64)[N] * supers
    for k in range(total * thread // threads, total * (thread + 1) // threads):
        t, b = k // supers, k % supers
        call(quantize, (x + t * x_stride + 1024 * b, 1, codes + t * codes_stride + ACT_BYTES * b))


@kernel
def gate_up(at, thread, threads):
    """gate = silu(s * gate) * s * up, in place, and its codes; s is the pair's router score, or 1 where scores is 0."""
    gate, up, stride, n, codes, codes_stride, quantize, swiglu, scores, one, per_token, state_at = unpack(at, 12)
    supers = (n + 255) // 256
    total = pointer(state_at, int64)[N] * per_token * supers
    for k in range(total * thread // threads, total * (thread + 1) // threads):
        pair, b = k // supers, k % supers
        here = pair * stride + 1024 * b
        score = scores + 4 * pair if scores != 0 else one
        call(swiglu, (gate + here, up + here, score, min(256, (n - 256 * b + 15) // 16 * 16)))
        if codes != 0:
            call(quantize, (gate + here, 1, codes + pair * codes_stride + ACT_BYTES * b))


@kernel
def route(at, thread, threads):
    """Choose experts by the largest raw logits, score them with a sigmoid, and sort the pairs by expert into the matmul table.

    Llama 4 neither softmaxes nor renormalizes. Ties go to the lower expert, as in torch.topk on CPU.
    """
    if thread != 0:
        return
    logits, stride, n_experts, n_used, scores_at, chosen_at, table_at, state_at = unpack(at, 8)
    n = pointer(state_at, int64)[N]
    scores, chosen, table = pointer(scores_at, float32), pointer(chosen_at, int64), pointer(table_at, int64)
    pairs = pointer(table_at + 8 * (n_experts + 1), int64)
    for e in range(n_experts + 1):
        table[e] = 0
    for t in range(n):
        row = pointer(logits + t * stride, float32)
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


@kernel
def square_sums(at, thread, threads):
    """sums[group] += (s * x[pair])**2 by column, in float64, for the pairs of each group of a matmul table; counts[group] +=
    their number. s is the pair's router score, or 1 where scores is 0. The threads share the columns.
    """
    x, x_stride, n_cols, n_groups, table_at, x_div, scores, sums, counts_at = unpack(at, 9)
    table, counts = pointer(table_at, int64), pointer(counts_at, int64)
    pairs = pointer(table_at + 8 * (n_groups + 1), int64)
    first, end = n_cols * thread // threads, n_cols * (thread + 1) // threads
    for group in range(n_groups):
        total = pointer(sums + 8 * group * n_cols, float64)
        for j in range(table[group], table[group + 1]):
            row = pointer(x + pairs[j] // x_div * x_stride, float32)
            score = pointer(scores, float32)[pairs[j]] if scores != 0 else float32(1.0)
            for i in range(first, end):
                value = float64(score * row[i])
                total[i] += value * value
        if thread == 0:
            counts[group] += table[group + 1] - table[group]
