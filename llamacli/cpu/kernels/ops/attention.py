"""Rotary positions, QK norm, temperature, the KV cache's writes, and attention over it with an online softmax.

q, k, v are float32 rows of heads side by side. The cache holds halves, head-major: [n_kv_heads][capacity][head_dim], and is
found through a table of (key address, value address, capacity) for each layer. A layer with chunks sees positions from the
start of the query's chunk on and keeps one chunk (slot = position mod chunk); a run never crosses a chunk's edge, so slots of
one run are contiguous. Decode splits its work by key-value heads, so more threads than those do not help there. Knows nothing
of weights.

`prepare_heads` and `attend` are separate steps because every thread reads keys that another may have written.
"""

import math

from numpy import float32, float64, int64

from llamacli.cpu.kernels.jit.intrinsics import call, kernel, pointer, unpack
from llamacli.cpu.kernels.ops.elementwise import CACHE, POS, N

KEYS = 256  # keys scored at a time
QUERY_ROWS = 96  # most query rows (tokens x heads of one group) of one work item
MANY = 16  # query rows from which on it pays to lay keys and values out anew
FILL = 6  # rows that may be needed to fill up a tile
ONE, EPS, ATTN_SCALE, TEMP_LENGTH, TEMP_SCALE = range(5)  # slots of the float constants


def scratch_bytes(head_dim: int) -> int:
    """Scratch that one thread needs."""
    rows = QUERY_ROWS + FILL
    return 4 * rows * (KEYS + 2 * head_dim + 3) + 4 * head_dim + 8 * KEYS * head_dim + 16 * 8 * 2 + 1024


@kernel
def angles(at, thread, threads):
    """(cos, sin) of each token's position times each pair's frequency, as float32 [n][head_dim / 2][2], computed in float64."""
    frequencies, pairs, table, state_at = unpack(at, 4)
    state, frequency = pointer(state_at, int64), pointer(frequencies, float64)
    n = state[N]
    for t in range(n * thread // threads, n * (thread + 1) // threads):
        to = pointer(table + 8 * pairs * t, float32)
        for j in range(pairs):
            angle = float64(state[POS] + t) * frequency[j]
            to[2 * j], to[2 * j + 1] = math.cos(angle), math.sin(angle)


@kernel
def prepare_heads(at, thread, threads):
    """Rotate (interleaved pairs) and norm q and k, scale q by the temperature, and write k and v to the cache."""
    q, q_stride, k, v, kv_stride, n_heads, n_kv, dim, rope, use_norm = unpack(at, 10)
    use_temp, chunk, layer, to_half, floats_at, state_at = unpack(at + 8 * 10, 6)
    state, floats = pointer(state_at, int64), pointer(floats_at, float32)
    n, pos = state[N], state[POS]
    cache = pointer(state[CACHE] + 24 * layer, int64)
    keys, values, capacity = cache[0], cache[1], cache[2]
    rotary = rope != 0
    heads = n_heads + n_kv
    for item in range(n * heads * thread // threads, n * heads * (thread + 1) // threads):
        t, h = item // heads, item % heads
        is_query = h < n_heads
        where = q + t * q_stride + 4 * dim * h if is_query else k + t * kv_stride + 4 * dim * (h - n_heads)
        x = pointer(where, float32)
        if rotary:
            turn = pointer(rope + 4 * dim * t, float32)
            for j in range(dim // 2):
                c, s, even, odd = turn[2 * j], turn[2 * j + 1], x[2 * j], x[2 * j + 1]
                x[2 * j], x[2 * j + 1] = even * c - odd * s, even * s + odd * c
            if use_norm:
                total = float32(0.0)
                for j in range(dim):
                    total += x[j] * x[j]
                scale = float32(1.0) / math.sqrt(total / float32(dim) + floats[EPS])
                for j in range(dim):
                    x[j] *= scale
        elif use_temp and is_query:
            steps = math.floor(float64(pos + t + 1) / float64(floats[TEMP_LENGTH]))
            factor = float32(1.0 + float64(floats[TEMP_SCALE]) * math.log(1.0 + steps))
            for j in range(dim):
                x[j] *= factor
        if not is_query:
            slot = (pos + t) % chunk if chunk > 0 else pos + t
            at_cache = 2 * dim * ((h - n_heads) * capacity + slot)
            call(to_half, (where, dim, keys + at_cache))
            call(to_half, (v + t * kv_stride + 4 * dim * (h - n_heads), dim, values + at_cache))


@kernel
def attend(at, thread, threads):
    """out[t] = softmax(scale * q k^T) v over the keys that token t may see; work items are (key-value head, some tokens).

    Few rows are multiplied with keys and values as they lie in the cache, at memory speed; for many, a block of both is laid
    out anew as float32.
    """
    q, q_stride, out, out_stride, n_heads, n_kv, dim, chunk, layer = unpack(at, 9)
    dots, softmax, weigh, keys_aside, widen, product, span, tall = unpack(at + 8 * 9, 8)
    floats_at, state_at, scratch, scratch_stride = unpack(at + 8 * 17, 4)
    scratch += thread * scratch_stride
    state = pointer(state_at, int64)
    n, pos = state[N], state[POS]
    cache = pointer(state[CACHE] + 24 * layer, int64)
    group = n_heads // n_kv
    per_item = max(1, QUERY_ROWS // group)
    blocks = (n + per_item - 1) // per_item
    first_slot = pos % chunk if chunk > 0 else pos

    wide_keys = (scratch + 63) // 64 * 64
    wide_values = wide_keys + 4 * KEYS * dim
    queries = wide_values + 4 * KEYS * dim
    scores = queries + 4 * (QUERY_ROWS + FILL) * dim
    sums = scores + 4 * (QUERY_ROWS + FILL) * KEYS
    states = sums + 4 * (QUERY_ROWS + FILL) * dim
    pointers = (states + 12 * (QUERY_ROWS + FILL) + 7) // 8 * 8
    xs, outs = pointer(pointers, int64), pointer(pointers + 64, int64)

    for item in range(thread, n_kv * blocks, threads):
        kv, block = item // blocks, item % blocks
        start = block * per_item
        tokens = min(per_item, n - start)
        for head in range(0, group, QUERY_ROWS):  # a group larger than the scratch goes in parts
            in_part = min(group - head, QUERY_ROWS)
            rows = tokens * in_part
            unit = tall if rows >= MANY else 4
            padded = (rows + unit - 1) // unit * unit
            keys = cache[0] + 2 * dim * kv * cache[2]
            values = cache[1] + 2 * dim * kv * cache[2]
            f, total, asked = pointer(states, float32), pointer(sums, float32), pointer(queries, float32)
            for r in range(padded):
                f[3 * r], f[3 * r + 1], f[3 * r + 2] = float32(-3.0e38), float32(0.0), float32(0.0)
                t, h = r // in_part, r % in_part
                row = pointer(q + (start + t) * q_stride + 4 * dim * (kv * group + head + h), float32)
                for j in range(dim):
                    total[r * dim + j] = float32(0.0)
                    asked[r * dim + j] = row[j] if r < rows else float32(0.0)
            last_key = first_slot + start + tokens
            for key in range(0, last_key, KEYS):
                n_keys = min(KEYS, last_key - key)
                if rows >= MANY:
                    call(keys_aside, (keys + 2 * dim * key, n_keys, wide_keys))
                    for k in range(0, n_keys, span):
                        where = scores + 4 * k
                        call(product, (queries, 4 * dim, padded, wide_keys + 4 * dim * k, 4 * span, dim, where, 4 * KEYS, 0))
                else:
                    for r in range(0, padded, 4):
                        for j in range(4):
                            xs[j], outs[j] = queries + 4 * dim * (r + j), scores + 4 * KEYS * (r + j)
                        call(dots, (keys + 2 * dim * key, 2 * dim, n_keys, dim, pointers, pointers + 64, 0, 0))
                for r in range(padded):
                    seen = min(n_keys, max(0, first_slot + start + r // in_part + 1 - key)) if r < rows else 0
                    call(softmax, (scores + 4 * KEYS * r, seen, n_keys, states + 12 * r, floats_at + 4 * ATTN_SCALE))
                if rows >= MANY:
                    call(widen, (values + 2 * dim * key, n_keys * dim, wide_values))
                    for c in range(0, dim, span):
                        where = sums + 4 * c
                        call(product, (scores, 4 * KEYS, padded, wide_values + 4 * c, 4 * dim, n_keys, where, 4 * dim, states))
                else:
                    call(weigh, (scores, 4 * KEYS, padded, values + 2 * dim * key, n_keys, sums, states))
            for r in range(rows):
                t, h = r // in_part, r % in_part
                to = pointer(out + (start + t) * out_stride + 4 * dim * (kv * group + head + h), float32)
                whole = float32(1.0) / f[3 * r + 1]
                for j in range(dim):
                    to[j] = total[r * dim + j] * whole
