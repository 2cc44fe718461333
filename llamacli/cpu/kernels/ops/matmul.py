"""Matrix products of one activation matrix with one weight matrix or with one matrix per expert, in any tensor type.

`Matrix` says where rows of weights are and which leaves read them. `matmul` is the driver: threads take ranges of rows, as
they come free, and do them for all tokens. Few tokens go through `matvec`, which reads the weights once at memory speed; more
go through panels: some rows are unpacked once (`prepare`) and multiplied with all tokens of the group (`tile`).

Pairs and groups. Work is a list of pairs, ordered by group; group g uses matrix g. For a dense product there is one group and
pair j is token j. For routed experts a pair is (token, choice), numbered token * n_choices + choice; `x_div` and `out_div` (1
or n_choices) turn its number into a row of x and a row of out. The table is int64: n_groups + 1 offsets, then the pairs. Knows
nothing of layers.
"""

from typing import NamedTuple

import numpy as np
from numpy import int64

from llamacli.cpu.kernels.formats import dots, floats, tiles
from llamacli.cpu.kernels.formats import layout as formats
from llamacli.cpu.kernels.jit.intrinsics import atomic_add, atomic_store, call, kernel, part, pointer, unpack
from llamacli.cpu.kernels.jit.loader import chosen_target, load

FEW = 4  # tokens below which unpacking a panel does not pay
TOKENS = 240  # tokens packed at a time; panels are made anew for each such block
PANEL_SHARE = 384 << 10  # bytes of panels kept in the second-level cache while all tokens pass by
FLOAT_BLOCK = 64  # rows that a float tile takes at a time
UNIT, FLOAT_UNIT = 16, 4  # rows of an item of work are a multiple of these
SMALL = 4  # small items of work for each thread


class Leaves(NamedTuple):
    """Addresses of one tensor type's leaves; prepare and pack are 0 for float types."""

    dequantize: int
    matvec: int
    prepare: int
    pack: int
    tile: int
    panel_rows: int
    tile_rows: int
    tile_tokens: int
    panel_bytes: int  # of one superblock
    packed_bytes: int  # of one superblock of tile_tokens tokens
    quantized: bool


_leaves: dict[str, Leaves] = {}


def leaves(type_name: str) -> Leaves:
    """The leaves of a tensor type, compiled or read from the cache on first use. KeyError for a type without leaves."""
    if type_name not in _leaves:
        if type_name in formats.FLOATS:
            found = load(type_name, lambda target: floats.floats(type_name, target), floats.SYMBOLS)
            found = Leaves(
                found["dequantize"], found["matvec"], 0, 0, found["tile"], 0, FLOAT_BLOCK, floats.TOKENS, 0, 0, False
            )
        else:
            found = load(type_name, lambda target: dots.quantized(type_name, target), dots.SYMBOLS)
            target = chosen_target()
            sizes = tiles.panel_bytes(type_name, target.lanes), tiles.packed_bytes(type_name, target.tile, target)
            found = Leaves(
                *(found[s] for s in dots.SYMBOLS), target.lanes, target.lanes * target.tile_vectors, target.tile, *sizes, True
            )
        _leaves[type_name] = found
    return _leaves[type_name]


class Matrix(NamedTuple):
    """Rows of weights: one matrix, or n_groups of them one after the other."""

    address: int
    type_name: str
    n_groups: int
    n_rows: int
    n_cols: int
    row_bytes: int
    name: str = ""  # in the file

    @property
    def nbytes(self) -> int:
        """Bytes of one group."""
        return self.n_rows * self.row_bytes


class Rows(NamedTuple):
    """A buffer of activation rows: float32 and int8 sides, each with its stride in bytes; either address may be 0."""

    address: int
    stride: int
    codes: int = 0
    codes_stride: int = 0


def scratch_bytes(max_pairs: int, max_rows: int, max_cols: int) -> int:
    """Scratch that one thread needs: addresses, a row to throw away, packed tokens, and panels or activations laid aside."""
    target = chosen_target()
    supers, tokens = -(-max_cols // 256), min(max_pairs, TOKENS) + 2 * target.tile
    panels = max(PANEL_SHARE, supers * tiles.panel_bytes("Q6_K", target.lanes) * target.tile_vectors)
    return 16 * (max_pairs + 64) + 4 * (max_rows + 64) + panels + supers * tiles.packed_bytes("Q6_K", tokens, target) + 256


def arguments(
    matrix: Matrix,
    x: Rows,
    out: Rows,
    table: int,
    scratch: np.ndarray,
    max_pairs: int,
    *,
    add=False,
    x_div=1,
    out_div=1,
    where=0,
    window=0,
):
    """The int64 arguments of one `matmul` step; scratch is uint8 [threads, scratch_bytes].

    `where`: address of the int64 addresses of all groups, if they do not lie one after the other. `window`: address of two
    int64: only groups from the first to before the second are done.
    """
    f = leaves(matrix.type_name)
    side = (x.codes, x.codes_stride) if f.quantized else (x.address, x.stride)
    supers = matrix.n_cols // 256
    rows = (
        max(1, PANEL_SHARE * f.panel_rows // max(1, f.panel_bytes * supers * f.tile_rows)) * f.tile_rows
        if supers
        else f.tile_rows
    )
    tiled = f.tile if not f.quantized or matrix.n_cols % 256 == 0 else 0
    return [
        *(matrix.address, matrix.n_groups, matrix.nbytes, matrix.n_rows, matrix.n_cols, matrix.row_bytes),
        *(*side, out.address, out.stride, int(add), table, x_div, out_div),
        *(f.matvec, f.prepare, f.pack, tiled, f.panel_rows, f.tile_rows, f.tile_tokens, f.panel_bytes),
        *(f.packed_bytes, rows),
        *(scratch.ctypes.data, scratch.strides[0], max_pairs, where, window, UNIT if f.quantized else FLOAT_UNIT),
        0,  # how many items of work are taken
    ]


@part
def _rows_of(item, n_rows, unit, threads):
    """The rows of one item of work: `threads` large ones first, then small ones, so that who is held up gets fewer of them."""
    large = n_rows * 3 // 4 // threads // unit * unit
    if item < threads:
        return item * large, (item + 1) * large
    left = threads * large
    small = ((n_rows - left) // (SMALL * threads) // unit + 1) * unit
    return min(left + (item - threads) * small, n_rows), min(left + (item - threads + 1) * small, n_rows)


@part
def _blocks_of(n_rows, most, unit, threads):
    """(number, rows of each) of the equal blocks that rows are done in, `most` rows at a time: a few for every thread."""
    n = (n_rows + most - 1) // most
    if n < 4 * threads:
        n = (n + threads - 1) // threads * threads
    size = ((n_rows + n - 1) // n + unit - 1) // unit * unit if n > 0 else unit
    return (n_rows + size - 1) // size, size


@kernel
def matmul(at, thread, threads):
    """out[pair] (+)= W[group] x[pair]; threads take items of work, some rows each, until none is left.

    Where groups add to the same row of out, every thread has rows of its own instead.
    """
    weights, n_groups, group_bytes, n_rows, n_cols, row_bytes = unpack(at, 6)
    x, x_stride, out, out_stride, add, table_at, x_div, out_div = unpack(at + 8 * 6, 8)
    matvec, prepare, pack, tile, panel_rows, tile_rows, tile_tokens, panel_bytes, packed_bytes, block_rows = unpack(
        at + 8 * 14, 10
    )
    scratch, scratch_stride, max_pairs, where, window, unit = unpack(at + 8 * 24, 6)
    taken = at + 8 * 30
    scratch += thread * scratch_stride

    table = pointer(table_at, int64)
    pairs = pointer(table_at + 8 * (n_groups + 1), int64)
    xs_at, outs_at = scratch, scratch + 8 * (max_pairs + 64)
    xs, outs = pointer(xs_at, int64), pointer(outs_at, int64)
    spare = outs_at + 8 * (max_pairs + 64)
    panels = (spare + 4 * (n_rows + 64) + 63) // 64 * 64
    supers = n_cols // 256
    panel_bytes, packed_bytes = panel_bytes * supers, packed_bytes * supers
    packed = panels + (block_rows // max(1, panel_rows) * panel_bytes + 63) // 64 * 64
    low, high, sharing = int64(0), n_rows, threads
    if out_div > 1:
        units, sharing = (n_rows + 31) // 32, int64(1)
        low, high = min(units * thread // threads * 32, n_rows), min(units * (thread + 1) // threads * 32, n_rows)
    whole = max(0, high - low) // tile_rows * tile_rows
    row_blocks, block_rows = _blocks_of(whole, block_rows, tile_rows, sharing)
    first_group, end_group = int64(0), n_groups
    if window != 0:
        first_group, end_group = pointer(window, int64)[0], pointer(window, int64)[1]

    item, before = atomic_add(taken, 1) if sharing > 1 else int64(0), int64(0)
    for group in range(first_group, end_group):
        start, count = table[group], table[group + 1] - table[group]
        if count == 0:
            continue
        tiled = count >= FEW and tile != 0
        padded = (count + tile_tokens - 1) // tile_tokens * tile_tokens
        n_tiles = padded // tile_tokens
        blocks = (padded + TOKENS - 1) // TOKENS
        items = blocks * row_blocks + 1 if tiled else sharing + SMALL * sharing
        if item >= before + items:
            before += items
            continue
        base = pointer(where, int64)[group] if where != 0 else weights + group * group_bytes
        for j in range(count):
            pair = pairs[start + j]
            xs[j] = x + pair // x_div * x_stride
            outs[j] = out + pair // out_div * out_stride
        for j in range(count, padded):
            xs[j], outs[j] = xs[count - 1], spare
        at_hand = int64(-1)  # the block of tokens that is packed
        while item < before + items:
            row, row_end = low + whole, high
            if not tiled:
                row, row_end = _rows_of(item - before, high - low, unit, sharing)
                row, row_end = low + row, low + row_end
            elif item - before < items - 1:
                block, row = (item - before) // row_blocks, low + (item - before) % row_blocks * block_rows
                row_end = min(row + block_rows, low + whole)
                token, token_end = n_tiles * block // blocks * tile_tokens, n_tiles * (block + 1) // blocks * tile_tokens
                if pack != 0 and at_hand != block:
                    for j in range(token, token_end, tile_tokens):
                        call(pack, (xs_at + 8 * j, supers, packed + (j - token) // tile_tokens * packed_bytes))
                at_hand = block
                if prepare != 0:
                    for r in range(row, row_end, panel_rows):
                        call(prepare, (base + r * row_bytes, row_bytes, supers, panels + (r - row) // panel_rows * panel_bytes))
                for j in range(token, token_end, tile_tokens):
                    for r in range(row, row_end, tile_rows):
                        if prepare != 0:
                            panel = panels + (r - row) // panel_rows * panel_bytes
                            xs_tile = packed + (j - token) // tile_tokens * packed_bytes
                            call(tile, (panel, supers, xs_tile, outs_at + 8 * j, 4 * r, add))
                        else:
                            at_row = base + r * row_bytes
                            call(tile, (at_row, row_bytes, tile_rows, n_cols, xs_at + 8 * j, outs_at + 8 * j, 4 * r, add))
                row = row_end
            if row < row_end:
                at_row = base + row * row_bytes
                for j in range(count):
                    call(matvec, (at_row, row_bytes, row_end - row, n_cols, xs[j], outs[j] + 4 * row, add, panels))
            item = atomic_add(taken, 1) if sharing > 1 else item + 1
        before += items
    if sharing > 1 and item == before + threads - 1:  # the last to come in vain
        atomic_store(taken, 0)


@kernel
def embed(at, thread, threads):
    """x[t] = row ids[t] of the embedding, as float32."""
    weights, row_bytes, n_cols, dequantize, out, out_stride, ids_at, state = unpack(at, 8)
    n = pointer(state, int64)[0]
    ids = pointer(ids_at, int64)
    for t in range(n * thread // threads, n * (thread + 1) // threads):
        call(dequantize, (weights + ids[t] * row_bytes, n_cols, out + t * out_stride))
