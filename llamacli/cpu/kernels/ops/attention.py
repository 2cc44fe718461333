"""Rotary positions, QK norm, temperature, writes to the KV cache, and attention over it with an online softmax.

q, k, v are float32 rows of heads side by side. Tokens of one run may belong to several sequences: `positions`, int64 [n], and
`tables`, int64 [n], give each token's position and the address of its sequence's cache table, int64 [layers, 4]: key address,
value address, capacity, newest segments. The cache holds rows of `row_bytes` (kv.py), head-major: [n_kv_heads][capacity]. A
chunked layer sees positions from the start of the query's chunk on and keeps one chunk (slot = position mod chunk).

Where positions have segments (llamacli/positions.py), a token sees keys and values of its own segment in half precision:
`attend` takes those of its batch from k and v, older ones from the cache's newest segments, float16 [keys and values,
n_kv_heads, 2 * segment, head_dim] (slot = position mod 2 segments), which `keep_segments` writes when all have been read.

Work items of `attend` are (key-value head, block of tokens); `blocks`, int64 [BLOCKS, 4], holds the first token and the number
of tokens of each block, which are neighbours in one sequence, one chunk and one segment, and the first token and the end of
their run. A token decodes with one item a key-value head, so more threads than those do not help there. `prepare_heads` and
`attend` are separate steps because every thread reads keys that another may have written.

Where keys and values do not fit into memory (cpu/kvfile.py), `attend` is called several times over the same queries, each time
with more of the blocks of positions that are in memory by then. Between two calls, `out` holds the weighted sums and `carried`
the maxima and the sums of weights. The order of operations, and so every bit, is that of one call over all keys.
"""

import math
from typing import NamedTuple

from numpy import float32, float64, int64

from llamacli.cpu.kernels.jit.intrinsics import (
    Address,
    Count,
    Flag,
    Microkernel,
    OptionalAddress,
    OptionalMicrokernel,
    atomic_load,
    call,
    kernel,
    pointer,
)
from llamacli.cpu.kernels.ops.elementwise import ALONE, BLOCKS, N

KEYS = 256  # keys scored at a time
QUERY_ROWS = 96  # most query rows (tokens x heads of one group) of one work item
MANY = 16  # query rows from which on it pays to copy keys and values to float32
FILL = 8  # rows that may be needed to fill up a tile
ONE, EPS, ATTN_SCALE, TEMP_LENGTH, TEMP_SCALE = range(5)  # slots of the float constants
# of AttendArguments.reach: items of `blocks` from FIRST to END see blocks of SIZE positions from NEXT to STOP; TABLE is the
# address of int64 [n_blocks, 2], where keys and values of a block begin, less the bytes of the positions before it
FIRST, END, NEXT, STOP, SIZE, TABLE = range(6)


class Scratch(NamedTuple):
    """Byte offsets into one thread's scratch, each a multiple of 64."""

    keys: int  # float32 [head_dim, KEYS]: a block of keys, transposed
    values: int  # float32 [KEYS, head_dim]
    queries: int  # float32 [rows, head_dim]
    scores: int  # float32 [rows, KEYS]
    sums: int  # float32 [rows, head_dim]
    states: int  # float32 [rows, 3]: maximum, sum of weights, factor of the last block
    newest: int  # float16 [keys and values, segment, head_dim]
    end: int

    @classmethod
    def of(cls, head_dim: int, segment: int) -> "Scratch":
        rows = QUERY_ROWS + FILL
        sizes = (*[4 * KEYS * head_dim] * 2, 4 * rows * head_dim, 4 * rows * KEYS, 4 * rows * head_dim, 12 * rows)
        sizes += (4 * segment * head_dim,)
        offsets = [0]
        for size in sizes:
            offsets.append(offsets[-1] + -(-size // 64) * 64)
        return cls(*offsets)


def tokens_per_block(n_heads: int, n_kv_heads: int) -> int:
    """Most tokens of one of `attend`'s blocks."""
    return max(1, QUERY_ROWS // (n_heads // n_kv_heads))


class AnglesArguments(NamedTuple):
    frequencies: Address  # float64 [pairs]
    pairs: Count
    angles: Address
    positions: Address
    state: Address


@kernel(AnglesArguments)
def angles(a, thread, threads):
    """(cos, sin) of each token's position times each pair's frequency, float32 [n][head_dim / 2][2], computed in float64."""
    frequency, positions = pointer(a.frequencies, float64), pointer(a.positions, int64)
    n = pointer(a.state, int64)[N]
    for t in range(n * thread // threads, n * (thread + 1) // threads):
        to = pointer(a.angles + 8 * a.pairs * t, float32)
        for j in range(a.pairs):
            angle = float64(positions[t]) * frequency[j]
            to[2 * j], to[2 * j + 1] = math.cos(angle), math.sin(angle)


class PrepareHeadsArguments(NamedTuple):
    q: Address
    q_stride: Count
    k: Address
    v: Address
    kv_stride: Count
    n_heads: Count
    n_kv_heads: Count
    head_dim: Count
    angles: OptionalAddress  # 0: no rotation
    use_norm: Flag  # after rotation
    use_temperature: Flag  # of queries, where nothing is rotated
    chunk: Count  # 0: the layer keeps every position
    layer: Count  # row of the cache table
    row_bytes: Count  # of a head of one position in the cache
    write: Microkernel
    rotate: OptionalMicrokernel  # of queries, keys and values, where the cache is quantized
    floats: Address
    positions: Address
    tables: Address
    state: Address


@kernel(PrepareHeadsArguments)
def prepare_heads(a, thread, threads):
    """Rotate (interleaved pairs) and norm q and k, scale q by the temperature, and write k and v to the cache."""
    floats, positions, tables = pointer(a.floats, float32), pointer(a.positions, int64), pointer(a.tables, int64)
    n, dim, n_heads = pointer(a.state, int64)[N], a.head_dim, a.n_heads
    heads = n_heads + a.n_kv_heads
    for item in range(n * heads * thread // threads, n * heads * (thread + 1) // threads):
        t, h = item // heads, item % heads
        is_query = h < n_heads
        at = a.q + t * a.q_stride + 4 * dim * h if is_query else a.k + t * a.kv_stride + 4 * dim * (h - n_heads)
        x = pointer(at, float32)
        if a.angles != 0:
            turn = pointer(a.angles + 4 * dim * t, float32)
            for j in range(dim // 2):
                c, s, even, odd = turn[2 * j], turn[2 * j + 1], x[2 * j], x[2 * j + 1]
                x[2 * j], x[2 * j + 1] = even * c - odd * s, even * s + odd * c
            if a.use_norm:
                total = float32(0.0)
                for j in range(dim):
                    total += x[j] * x[j]
                scale = float32(1.0) / math.sqrt(total / float32(dim) + floats[EPS])
                for j in range(dim):
                    x[j] *= scale
        elif a.use_temperature and is_query:
            steps = math.floor(float64(positions[t] + 1) / float64(floats[TEMP_LENGTH]))
            factor = float32(1.0 + float64(floats[TEMP_SCALE]) * math.log(1.0 + steps))
            for j in range(dim):
                x[j] *= factor
        if a.rotate != 0:
            call(a.rotate, (at,))
        if not is_query:
            cache, value = pointer(tables[t] + 32 * a.layer, int64), a.v + t * a.kv_stride + 4 * dim * (h - n_heads)
            slot = positions[t] % a.chunk if a.chunk > 0 else positions[t]
            offset = a.row_bytes * ((h - n_heads) * cache[2] + slot)
            if a.rotate != 0:
                call(a.rotate, (value,))
            call(a.write, (at, dim, cache[0] + offset))
            call(a.write, (value, dim, cache[1] + offset))


class AttendArguments(NamedTuple):
    q: Address
    q_stride: Count
    k: Address
    v: Address
    kv_stride: Count
    out: Address
    out_stride: Count
    n_heads: Count
    n_kv_heads: Count
    head_dim: Count
    chunk: Count
    layer: Count
    row_bytes: Count
    rotate: OptionalMicrokernel  # of the result, back
    unit: Count  # rows of queries that `dots` and `weigh` take side by side
    dots: Microkernel
    softmax: Microkernel
    weigh: Microkernel
    transpose_keys: Microkernel
    widen: Microkernel
    segment: Count  # positions; 0: all keys and values are as the cache holds them
    write_half: OptionalMicrokernel  # with `segment`, for rows in half precision
    dots_half: OptionalMicrokernel
    weigh_half: OptionalMicrokernel
    transpose_keys_half: OptionalMicrokernel
    widen_half: OptionalMicrokernel
    product: Microkernel
    span: Count  # columns that `product` makes at a time
    tall: Count  # rows that it takes at a time
    floats: Address
    positions: Address
    tables: Address
    blocks: Address
    stop: Address  # int64: not 0 when the run is to end early; results are discarded then
    state: Address
    scratch: Address  # aligned to 64 bytes
    scratch_stride: Count
    keys_offset: Count  # Scratch's
    values_offset: Count
    queries_offset: Count
    scores_offset: Count
    sums_offset: Count
    states_offset: Count
    newest_offset: Count
    reach: OptionalAddress  # int64 [6]: which blocks of positions this call sees; 0: all that the cache table's memory holds
    carried: OptionalAddress  # float32 [n, n_heads, 2], with `reach`: maximum and sum of weights of a row so far


@kernel(AttendArguments)
def attend(a, thread, threads):
    """out[t] = softmax(scale * q k^T) v over the keys that token t may see.

    Few query rows are multiplied with keys and values as they lie in the cache, at memory speed; for many, a block of both is
    copied to float32. With `reach`, a call takes a multiple of KEYS positions, in order from position 0.
    """
    scratch, dim, span = a.scratch + thread * a.scratch_stride, a.head_dim, a.span
    wide_keys, wide_values, queries = scratch + a.keys_offset, scratch + a.values_offset, scratch + a.queries_offset
    scores, sums, states = scratch + a.scores_offset, scratch + a.sums_offset, scratch + a.states_offset
    positions, tables, block_table = pointer(a.positions, int64), pointer(a.tables, int64), pointer(a.blocks, int64)
    group, first_item, items = a.n_heads // a.n_kv_heads, 0, pointer(a.state, int64)[BLOCKS]
    next_part, stop_part, size, table = 0, 1, 0, tables
    if a.reach != 0:
        reach = pointer(a.reach, int64)
        first_item, items, next_part, stop_part = reach[FIRST], reach[END] - reach[FIRST], reach[NEXT], reach[STOP]
        size, table = reach[SIZE], pointer(reach[TABLE], int64)
    alone = pointer(a.state, int64)[ALONE] != 0
    new_keys, new_values = scratch + a.newest_offset, scratch + a.newest_offset + 2 * a.segment * dim

    for item in range(thread, a.n_kv_heads * items, threads):
        if atomic_load(a.stop) != 0:
            return
        kv, block = item // items, first_item + item % items
        start, tokens = block_table[4 * block], block_table[4 * block + 1]
        run, in_run = block_table[4 * block + 2], block_table[4 * block + 3] - block_table[4 * block + 2]
        cache = pointer(tables[start] + 32 * a.layer, int64)
        keys = cache[0] + a.row_bytes * kv * cache[2]
        values = cache[1] + a.row_bytes * kv * cache[2]
        first_slot = positions[start] % a.chunk if a.chunk > 0 else positions[start]
        last_key = first_slot + tokens
        if size > 0 and last_key <= next_part * size:
            continue  # an earlier call has seen all keys of these tokens
        whole = size == 0 or last_key <= stop_part * size
        edge = last_key  # keys from it on are in half precision
        if a.segment > 0:
            edge = first_slot // a.segment * a.segment
            for key in range(edge, last_key if whole else edge):
                t, row = start + key - first_slot, 2 * dim * (key - edge)
                if t >= run:
                    call(a.write_half, (a.k + t * a.kv_stride + 4 * dim * kv, dim, new_keys + row))
                    call(a.write_half, (a.v + t * a.kv_stride + 4 * dim * kv, dim, new_values + row))
                else:
                    slots = 2 * a.segment
                    held = cache[3] + 2 * dim * (kv * slots + (positions[start] + key - first_slot) % slots)
                    old, new = pointer(held, int64), pointer(new_keys + row, int64)
                    for j in range(dim // 4):
                        new[j] = old[j]
                    old, new = pointer(held + 2 * dim * slots * a.n_kv_heads, int64), pointer(new_values + row, int64)
                    for j in range(dim // 4):
                        new[j] = old[j]
        for head in range(0, group, QUERY_ROWS):  # a group larger than the scratch goes in parts
            in_part = min(group - head, QUERY_ROWS)
            rows = tokens * in_part
            # Depends on the run alone: a short block gives the bits of a longer one.
            many = (1 if alone else in_run) * in_part >= MANY
            unit = a.tall if many else a.unit
            padded = (rows + unit - 1) // unit * unit
            f, total, asked = pointer(states, float32), pointer(sums, float32), pointer(queries, float32)
            for r in range(padded):
                f[3 * r], f[3 * r + 1], f[3 * r + 2] = float32(-3.0e38), float32(0.0), float32(0.0)
                t, h = r // in_part, kv * group + head + r % in_part
                row = pointer(a.q + (start + t) * a.q_stride + 4 * dim * h, float32)
                for j in range(dim):
                    total[r * dim + j] = float32(0.0)
                    asked[r * dim + j] = row[j] if r < rows else float32(0.0)
                if next_part > 0 and r < rows:
                    so_far = pointer(a.carried + 8 * ((start + t) * a.n_heads + h), float32)
                    f[3 * r], f[3 * r + 1] = so_far[0], so_far[1]
                    row = pointer(a.out + (start + t) * a.out_stride + 4 * dim * h, float32)
                    for j in range(dim):
                        total[r * dim + j] = row[j]
            key, stop_key = next_part * size, last_key if whole else stop_part * size
            while key < stop_key:
                half = key >= edge
                n_keys = min(KEYS, stop_key - key if half else min(edge, stop_key) - key)
                if size > 0 and not half:  # a block holds all heads of its positions
                    keys = table[2 * (key // size)] + a.row_bytes * kv * size
                    values = table[2 * (key // size) + 1] + a.row_bytes * kv * size
                keys_at = new_keys if half else keys + a.row_bytes * key
                values_at = new_values if half else values + a.row_bytes * key
                if many:
                    call(a.transpose_keys_half if half else a.transpose_keys, (keys_at, n_keys, wide_keys))
                    for k in range(0, n_keys, span):
                        to = scores + 4 * k
                        call(a.product, (queries, 4 * dim, padded, wide_keys + 4 * dim * k, 4 * span, dim, to, 4 * KEYS, 0))
                else:
                    for r in range(0, padded, a.unit):
                        to = scores + 4 * KEYS * r
                        call(a.dots_half if half else a.dots, (keys_at, n_keys, queries + 4 * dim * r, to, 4 * KEYS))
                for r in range(padded):
                    seen = min(n_keys, max(0, first_slot + r // in_part + 1 - key)) if r < rows else 0
                    call(a.softmax, (scores + 4 * KEYS * r, seen, n_keys, states + 12 * r, a.floats + 4 * ATTN_SCALE))
                if many:
                    call(a.widen_half if half else a.widen, (values_at, n_keys * dim, wide_values))
                    for c in range(0, dim, span):
                        to = sums + 4 * c
                        call(a.product, (scores, 4 * KEYS, padded, wide_values + 4 * c, 4 * dim, n_keys, to, 4 * dim, states))
                else:
                    call(a.weigh_half if half else a.weigh, (scores, 4 * KEYS, padded, values_at, n_keys, sums, states))
                key += n_keys
            for r in range(rows):
                t, h = r // in_part, kv * group + head + r % in_part
                result = a.out + (start + t) * a.out_stride + 4 * dim * h
                to, factor = pointer(result, float32), float32(1.0) / f[3 * r + 1] if whole else float32(1.0)
                for j in range(dim):
                    to[j] = total[r * dim + j] * factor
                if not whole:
                    so_far = pointer(a.carried + 8 * ((start + t) * a.n_heads + h), float32)
                    so_far[0], so_far[1] = f[3 * r], f[3 * r + 1]
                elif a.rotate != 0:
                    call(a.rotate, (result,))


class KeepSegmentsArguments(NamedTuple):
    k: Address
    v: Address
    kv_stride: Count
    n_kv_heads: Count
    head_dim: Count
    layer: Count
    segment: Count
    write_half: Microkernel
    positions: Address
    tables: Address
    blocks: Address
    state: Address


@kernel(KeepSegmentsArguments)
def keep_segments(a, thread, threads):
    """Write k and v of each run's newest two segments to the cache, in half precision."""
    positions, tables, block_table = pointer(a.positions, int64), pointer(a.tables, int64), pointer(a.blocks, int64)
    items, dim, slots = pointer(a.state, int64)[BLOCKS], a.head_dim, 2 * a.segment
    for item in range(thread, a.n_kv_heads * items, threads):
        kv, block = item // items, item % items
        start, tokens, end = block_table[4 * block], block_table[4 * block + 1], block_table[4 * block + 3]
        if positions[start] // a.segment < positions[end - 1] // a.segment - 1:
            continue
        newest = pointer(tables[start] + 32 * a.layer, int64)[3]
        for t in range(start, start + tokens):
            to, row = newest + 2 * dim * (kv * slots + positions[t] % slots), t * a.kv_stride + 4 * dim * kv
            call(a.write_half, (a.k + row, dim, to))
            call(a.write_half, (a.v + row, dim, to + 2 * dim * slots * a.n_kv_heads))
