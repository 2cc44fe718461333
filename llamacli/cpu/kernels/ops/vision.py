"""Operations of the vision tower between matrix products: layer norms, attention within a tile, GELU, joining patches.

Drivers over rows of float32 with a stride in bytes. Products leave biases out; the operation that reads the result next adds
them. `codes` are the int8 form of the same rows (formats/layout.py); 0 where no quantized product follows. `rows` is the
address of an int64: the rows of the run.
"""

import math
from typing import NamedTuple

from numpy import float32, int64

from llamacli.cpu.kernels.formats.layout import ACT_BYTES
from llamacli.cpu.kernels.jit.intrinsics import (
    Address,
    Count,
    Microkernel,
    OptionalAddress,
    atomic_load,
    call,
    kernel,
    pointer,
)

QUERIES = 48  # rows of scores made at a time, for which the tall tiles of every CPU divide
WIDTH = 32  # heads are padded to a multiple of so many elements, and keys to one of KEY_UNIT
KEY_UNIT = 64


class Scratch(NamedTuple):
    """Byte offsets into one thread's scratch, each a multiple of 64."""

    keys: int  # float32 [width, keys]: transposed; the queries come first
    values: int  # float32 [keys, width]
    scores: int  # float32 [QUERIES, keys]
    sums: int  # float32 [QUERIES, width]
    states: int  # float32 [QUERIES, 3]
    end: int

    @classmethod
    def of(cls, n_positions: int, head_dim: int) -> "Scratch":
        """Enough for tiles of `n_positions` rows."""
        width, keys = padded(head_dim, WIDTH), padded(n_positions, KEY_UNIT)
        queries = padded(n_positions, QUERIES)
        offsets = [0]
        for size in (queries * width, width * keys, keys * width, QUERIES * keys, QUERIES * width, QUERIES * 3):
            offsets.append(offsets[-1] + padded(4 * size, 64))
        return cls(*offsets[1:])


def padded(n: int, unit: int) -> int:
    """The next multiple of `unit`."""
    return -(-n // unit) * unit


class LayerNormArguments(NamedTuple):
    x: Address
    x_stride: Count
    more: OptionalAddress  # float32 [n_cols], which x still lacks
    weight: Address
    bias: Address
    n_cols: Count
    out: Address  # may be x
    out_stride: Count
    codes: OptionalAddress
    codes_stride: Count
    quantize: Microkernel
    eps: Address  # float32
    rows: Address


@kernel(LayerNormArguments)
def layer_norm(a, thread, threads):
    """x += more; out = (x - mean) / sqrt(variance + eps) * weight + bias, and codes (Ba, Kiros, Hinton, arXiv 1607.06450)."""
    n, rows, eps = a.n_cols, pointer(a.rows, int64)[0], pointer(a.eps, float32)[0]
    weight, bias = pointer(a.weight, float32), pointer(a.bias, float32)
    for t in range(rows * thread // threads, rows * (thread + 1) // threads):
        row, to = pointer(a.x + t * a.x_stride, float32), pointer(a.out + t * a.out_stride, float32)
        if a.more != 0:
            more = pointer(a.more, float32)
            for i in range(n):
                row[i] += more[i]
        total = float32(0.0)
        for i in range(n):
            total += row[i]
        mean, spread = total / float32(n), float32(0.0)
        for i in range(n):
            spread += (row[i] - mean) * (row[i] - mean)
        scale = float32(1.0) / math.sqrt(spread / float32(n) + eps)
        for i in range(n):
            to[i] = (row[i] - mean) * scale * weight[i] + bias[i]
        if a.codes != 0:
            call(a.quantize, (a.out + t * a.out_stride, (n + 255) // 256, a.codes + t * a.codes_stride))


class AttendTilesArguments(NamedTuple):
    q: Address
    k: Address
    v: Address
    stride: Count  # of all three
    q_bias: Address
    k_bias: Address
    v_bias: Address
    angles: Address  # float32 [n_positions, head_dim / 2, 2]: cos and sin
    out: Address
    out_stride: Count
    n_heads: Count
    head_dim: Count
    width: Count  # of a padded head
    n_positions: Count
    keys_stride: Count  # bytes of a row of transposed keys, and of scores
    softmax: Microkernel
    product: Microkernel
    span: Count  # columns that `product` makes at a time
    scale: Address  # float32
    rows: Address
    stop: Address  # int64: not 0 when the run is to end early; results are discarded then
    scratch: Address  # aligned to 64 bytes
    scratch_stride: Count
    keys_offset: Count  # Scratch's
    values_offset: Count
    scores_offset: Count
    sums_offset: Count
    states_offset: Count


@kernel(AttendTilesArguments)
def attend_tiles(a, thread, threads):
    """out = softmax(scale * q k^T) v over all rows of a tile, q and k turned by each row's angles.

    A thread takes one head of one tile at a time.
    """
    dim, width, n, n_heads = a.head_dim, a.width, a.n_positions, a.n_heads
    queries = a.scratch + thread * a.scratch_stride
    keys, values, scores = queries + a.keys_offset, queries + a.values_offset, queries + a.scores_offset
    sums, states = queries + a.sums_offset, queries + a.states_offset
    qs, ks, vs = pointer(queries, float32), pointer(keys, float32), pointer(values, float32)
    total, state = pointer(sums, float32), pointer(states, float32)
    line = a.keys_stride // 4
    tiles = pointer(a.rows, int64)[0] // n
    blocks = (n + QUERIES - 1) // QUERIES
    for item in range(thread, tiles * n_heads, threads):
        if atomic_load(a.stop) != 0:
            return
        tile, first = item // n_heads, item % n_heads * dim
        q_bias, k_bias = pointer(a.q_bias + 4 * first, float32), pointer(a.k_bias + 4 * first, float32)
        v_bias = pointer(a.v_bias + 4 * first, float32)
        for t in range(n):
            offset = (tile * n + t) * a.stride + 4 * first
            q, k, v = pointer(a.q + offset, float32), pointer(a.k + offset, float32), pointer(a.v + offset, float32)
            turn = pointer(a.angles + 4 * dim * t, float32)
            for j in range(dim // 2):
                c, s = turn[2 * j], turn[2 * j + 1]
                even, odd = q[2 * j] + q_bias[2 * j], q[2 * j + 1] + q_bias[2 * j + 1]
                qs[t * width + 2 * j], qs[t * width + 2 * j + 1] = even * c - odd * s, even * s + odd * c
                even, odd = k[2 * j] + k_bias[2 * j], k[2 * j + 1] + k_bias[2 * j + 1]
                ks[2 * j * line + t], ks[(2 * j + 1) * line + t] = even * c - odd * s, even * s + odd * c
            for j in range(dim):
                vs[t * width + j] = v[j] + v_bias[j]
        for block in range(blocks):
            start = block * QUERIES
            asked = queries + 4 * width * start
            for c in range(0, n, a.span):
                to = scores + 4 * c
                call(a.product, (asked, 4 * width, QUERIES, keys + 4 * c, a.keys_stride, dim, to, a.keys_stride, 0))
            for r in range(QUERIES):
                state[3 * r], state[3 * r + 1], state[3 * r + 2] = float32(-3.0e38), float32(0.0), float32(0.0)
                call(a.softmax, (scores + r * a.keys_stride, n, n, states + 12 * r, a.scale))
            for c in range(0, width, a.span):
                to = sums + 4 * c
                call(a.product, (scores, a.keys_stride, QUERIES, values + 4 * c, 4 * width, n, to, 4 * width, 0))
            for r in range(min(QUERIES, n - start)):
                to = pointer(a.out + (tile * n + start + r) * a.out_stride + 4 * first, float32)
                whole = float32(1.0) / state[3 * r + 1]
                for j in range(dim):
                    to[j] = total[r * width + j] * whole


class QuantizeTilesArguments(NamedTuple):
    x: Address
    x_stride: Count
    n_cols: Count
    codes: Address
    codes_stride: Count
    quantize: Microkernel
    rows: Address


@kernel(QuantizeTilesArguments)
def quantize_tiles(a, thread, threads):
    """codes of x; the threads share the superblocks."""
    supers = (a.n_cols + 255) // 256
    total = pointer(a.rows, int64)[0] * supers
    for k in range(total * thread // threads, total * (thread + 1) // threads):
        t, b = k // supers, k % supers
        call(a.quantize, (a.x + t * a.x_stride + 1024 * b, 1, a.codes + t * a.codes_stride + ACT_BYTES * b))


class GeluArguments(NamedTuple):
    x: Address
    x_stride: Count
    n_cols: Count
    bias: Address  # float32, padded with zeros to superblocks
    codes: OptionalAddress
    codes_stride: Count
    gelu: Microkernel
    quantize: Microkernel
    rows: Address


@kernel(GeluArguments)
def gelu(a, thread, threads):
    """x = gelu(x + bias) in place, and its codes; the threads share the superblocks."""
    supers = (a.n_cols + 255) // 256
    total = pointer(a.rows, int64)[0] * supers
    for k in range(total * thread // threads, total * (thread + 1) // threads):
        t, b = k // supers, k % supers
        at = a.x + t * a.x_stride + 1024 * b
        call(a.gelu, (at, a.bias + 1024 * b, 256))
        if a.codes != 0:
            call(a.quantize, (at, 1, a.codes + t * a.codes_stride + ACT_BYTES * b))


class JoinPatchesArguments(NamedTuple):
    x: Address
    x_stride: Count
    n_cols: Count
    side: Count  # patches along a side of a tile
    shuffle: Count
    out: Address
    out_stride: Count
    codes: OptionalAddress
    codes_stride: Count
    quantize: Microkernel
    rows: Address  # of the result


@kernel(JoinPatchesArguments)
def join_patches(a, thread, threads):
    """Rows of `shuffle` x `shuffle` neighbouring patches side by side, and their codes; the class token is left out.

    transformers' pixel shuffle: row (i, j) of a tile is patches (i * shuffle + di, j * shuffle + dj), dj fastest.
    """
    side, shuffle, n = a.side, a.shuffle, a.n_cols
    across = side // shuffle
    each, positions = across * across, side * side + 1
    rows = pointer(a.rows, int64)[0]
    for r in range(rows * thread // threads, rows * (thread + 1) // threads):
        tile, at = r // each, r % each
        for part in range(shuffle * shuffle):
            y, x = at // across * shuffle + part // shuffle, at % across * shuffle + part % shuffle
            given = pointer(a.x + (tile * positions + y * side + x) * a.x_stride, float32)
            to = pointer(a.out + r * a.out_stride + 4 * n * part, float32)
            for i in range(n):
                to[i] = given[i]
        if a.codes != 0:
            call(a.quantize, (a.out + r * a.out_stride, (n * shuffle * shuffle + 255) // 256, a.codes + r * a.codes_stride))
