"""Matrix products of one activation matrix with one weight matrix or with one matrix per expert, in any tensor type.

`Matrix` says where rows of weights are and which microkernels read them. `matmul` is the driver: threads take ranges of rows
as they become free, and do them for all tokens. One token goes through `matvec`, which reads the weights once at memory speed,
and a few through `matvecs`, which unpacks them once for all. More go through panels: some rows are unpacked once
(`prepare`) and multiplied with all tokens of the group (`tile`). From FEW pairs a group on, on average, all groups take panels:
then a token's result does not depend on what else is in the batch. Nor does it while there are fewer tokens than `few_tokens`.

Pairs and groups. Work is a list of pairs, ordered by group; group g uses matrix g. For a dense product there is one group and
pair j is token j. For routed experts a pair is (token, choice), numbered token * n_choices + choice; `x_div` and `out_div` (1
or n_choices) turn its number into a row of x and a row of out. The table is int64: n_groups + 1 offsets, then the pairs.
"""

from typing import NamedTuple

import numpy as np
from numpy import int64

from llamacli.cpu.kernels.formats import dots, floats, tiles
from llamacli.cpu.kernels.formats import layout as formats
from llamacli.cpu.kernels.formats.several import MOST, PAD, scratch_bytes
from llamacli.cpu.kernels.formats.tiles import LINE
from llamacli.cpu.kernels.jit.intrinsics import (
    Address,
    Count,
    Flag,
    Microkernel,
    OptionalAddress,
    OptionalMicrokernel,
    atomic_add,
    atomic_load,
    atomic_store,
    call,
    device_function,
    kernel,
    pointer,
)
from llamacli.cpu.kernels.jit.loader import chosen_target, load

FEW = 4  # tokens below which unpacking a panel does not pay
TOKENS = 240  # tokens packed at a time; panels are made anew for each such block
PANEL_SHARE = 384 << 10  # bytes of panels kept in the second-level cache while all tokens pass by
ROWS_SHARE = 256 << 10  # bytes of rows that a few tokens pass by
FLOAT_BLOCK = 64  # rows that a float tile takes at a time
UNIT, FLOAT_UNIT = 16, 4  # rows of an item of work are a multiple of these
SMALL = 4  # small items of work for each thread


class Microkernels(NamedTuple):
    """Addresses of one tensor type's microkernels; matvecs, prepare, pack and short tiles are 0 for float types."""

    dequantize: int
    matvec: int
    matvecs: int
    prepare: int
    pack: int
    tile: int
    pack_short: int
    tile_short: int
    panel_rows: int
    tile_rows: int
    tile_tokens: int
    short_tokens: int  # of tile_short
    panel_bytes: int  # of one superblock
    packed_bytes: int  # of one superblock of a token
    quantized: bool


_loaded: dict[str, Microkernels] = {}


def microkernels(type_name: str) -> Microkernels:
    """Those of a tensor type, compiled or read from the cache on first use. KeyError for a type without any."""
    if type_name not in _loaded:
        if type_name in formats.FLOATS:
            found = load(type_name, lambda target: floats.floats(type_name, target), floats.SYMBOLS)
            found = Microkernels(
                found["dequantize"], found["matvec"], 0, 0, 0, found["tile"], 0, 0, 0, FLOAT_BLOCK, floats.TOKENS,
                floats.TOKENS, 0, 0, False,
            )  # fmt: skip
        else:
            found = load(type_name, lambda target: dots.quantized(type_name, target), dots.SYMBOLS)
            target = chosen_target()
            rows = target.lanes, target.lanes * target.tile_vectors
            sizes = tiles.panel_bytes(type_name, target.lanes), tiles.packed_bytes(type_name, 1, target)
            found = Microkernels(*(found[s] for s in dots.SYMBOLS), *rows, target.tile, tiles.short(target), *sizes, True)
        _loaded[type_name] = found
    return _loaded[type_name]


def few_tokens() -> int:
    """Tokens of a group from which on panels pay, for block formats. On ARM they pay early: a tile multiplies matrices."""
    return FEW if chosen_target().neon else MOST + 1


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


class Scratch(NamedTuple):
    """Byte offsets into one thread's scratch, each a multiple of 64."""

    outs: int  # after the addresses of x's rows, int64 [pairs]: those of out's
    spare: int  # a float32 row for results of padding
    panels: int  # unpacked rows of weights; or, for `matvec` and `matvecs`, rows of activations laid out anew
    packed: int  # activations of a block of tokens
    end: int

    @classmethod
    def of(cls, max_pairs: int, max_rows: int, max_cols: int) -> "Scratch":
        """Enough for products of up to `max_pairs` pairs with matrices of up to `max_rows` rows and `max_cols` columns."""
        target = chosen_target()
        pairs = -(-max_pairs // 8) * 8  # addresses fill whole cache lines, so that `outs` tells their number
        supers, tokens = -(-max_cols // 256), min(pairs, TOKENS) + 2 * target.tile
        rows = supers * tiles.panel_bytes("Q6_K", target.lanes) * target.tile_vectors
        panels = max(PANEL_SHARE, rows, scratch_bytes(formats.QUANTIZED["Q6_K"], supers, MOST, target))
        pointers = 8 * (pairs + 64)
        offsets = [0]
        for size in (pointers, pointers, 4 * (max_rows + 64), panels, supers * tiles.packed_bytes("Q6_K", tokens, target)):
            offsets.append(offsets[-1] + -(-size // 64) * 64)
        return cls(*offsets[1:])


class MatmulArguments(NamedTuple):
    weights: Address
    n_groups: Count
    group_bytes: Count
    n_rows: Count
    n_cols: Count
    row_bytes: Count
    x: Address  # float32 or codes, as the microkernels take them
    x_stride: Count
    out: Address
    out_stride: Count
    add: Flag
    table: Address
    x_div: Count
    out_div: Count
    matvec: Microkernel
    matvecs: OptionalMicrokernel
    few: Count  # tokens of a group from which on panels pay
    prepare: OptionalMicrokernel
    pack: OptionalMicrokernel
    tile: OptionalMicrokernel
    pack_short: OptionalMicrokernel
    tile_short: OptionalMicrokernel
    ragged: Flag  # rows end within a superblock: `prepare` reads beyond them, so the last rows of a matrix take no panel
    panel_rows: Count
    tile_rows: Count
    tile_tokens: Count
    short_tokens: Count
    panel_bytes: Count  # of all superblocks of panel_rows rows
    packed_bytes: Count  # of all superblocks of a token
    block_rows: Count  # most rows whose panels are made at a time
    scratch: Address  # aligned to 64 bytes
    scratch_stride: Count
    outs_offset: Count  # Scratch's
    spare_offset: Count
    panels_offset: Count
    packed_offset: Count
    addresses: OptionalAddress  # int64 [n_groups]: of the groups' matrices, if they do not lie one after the other
    window: OptionalAddress  # int64 [2]: the first group to do, and the one to stop before
    unit: Count  # rows of an item of work are a multiple of it
    taken: Address  # int64, 0 between runs: items of work that threads have taken
    alone: Address  # int64: not 0 where tokens are to be done one by one, so that each has the bits it has alone
    stop: Address  # int64: not 0 when the run is to end early; results are discarded then


def arguments(
    matrix: Matrix,
    x: Rows,
    out: Rows,
    table: int,
    scratch: np.ndarray,
    offsets: Scratch,
    taken: int,
    stop: int,
    alone: int,
    *,
    add: bool = False,
    x_div: int = 1,
    out_div: int = 1,
    addresses: int = 0,
    window: int = 0,
) -> MatmulArguments:
    """Arguments of one `matmul` step; `scratch` is uint8 [threads, offsets.end], aligned to 64 bytes."""
    f = microkernels(matrix.type_name)
    supers = -(-matrix.n_cols // 256)  # where the last is not whole, its other activations are zeros
    panel_bytes, packed_bytes = f.panel_bytes * supers, f.packed_bytes * supers
    block_rows = f.tile_rows
    if supers:
        block_rows = max(1, PANEL_SHARE * f.panel_rows // max(1, panel_bytes * f.tile_rows)) * f.tile_rows
    assert 4 * matrix.n_rows <= offsets.panels - offsets.spare, "the spare row is too short"
    if f.prepare:
        laid_out = scratch_bytes(formats.QUANTIZED[matrix.type_name], supers, MOST, chosen_target())
        assert laid_out <= offsets.packed - offsets.panels, "activations laid out anew overlap packed tokens"
        assert block_rows // f.panel_rows * panel_bytes <= offsets.packed - offsets.panels, "the panels overlap packed tokens"
        most = min(offsets.outs // 8 - 64, TOKENS) + 2 * f.tile_tokens
        assert most * packed_bytes <= offsets.end - offsets.packed, "packed tokens pass the end of the scratch"
    return MatmulArguments(
        weights=matrix.address,
        n_groups=matrix.n_groups,
        group_bytes=matrix.nbytes,
        n_rows=matrix.n_rows,
        n_cols=matrix.n_cols,
        row_bytes=matrix.row_bytes,
        x=x.codes if f.quantized else x.address,
        x_stride=x.codes_stride if f.quantized else x.stride,
        out=out.address,
        out_stride=out.stride,
        add=add,
        table=table,
        x_div=x_div,
        out_div=out_div,
        matvec=f.matvec,
        matvecs=f.matvecs,
        few=few_tokens() if f.matvecs else FEW,
        prepare=f.prepare,
        pack=f.pack,
        tile=f.tile,
        pack_short=f.pack_short,
        tile_short=f.tile_short,
        ragged=f.quantized and matrix.n_cols % 256 != 0,
        panel_rows=f.panel_rows,
        tile_rows=f.tile_rows,
        tile_tokens=f.tile_tokens,
        short_tokens=f.short_tokens,
        panel_bytes=panel_bytes,
        packed_bytes=packed_bytes,
        block_rows=block_rows,
        scratch=scratch.ctypes.data,
        scratch_stride=scratch.strides[0],
        outs_offset=offsets.outs,
        spare_offset=offsets.spare,
        panels_offset=offsets.panels,
        packed_offset=offsets.packed,
        addresses=addresses,
        window=window,
        unit=UNIT if f.quantized else FLOAT_UNIT,
        taken=taken,
        alone=alone,
        stop=stop,
    )


@device_function
def _rows_of(item, n_rows, unit, threads):
    """The rows of one item of work: `threads` large ones first, then small ones, so that a slow thread takes fewer of them."""
    large = n_rows * 3 // 4 // threads // unit * unit
    if item < threads:
        return item * large, (item + 1) * large
    left = threads * large
    small = ((n_rows - left) // (SMALL * threads) // unit + 1) * unit
    return min(left + (item - threads) * small, n_rows), min(left + (item - threads + 1) * small, n_rows)


@device_function
def _blocks_of(n_rows, most, unit, threads):
    """(number, rows of each) of the equal blocks that rows are done in, `most` rows at a time: a few for every thread."""
    n = (n_rows + most - 1) // most
    if n < 4 * threads:
        n = (n + threads - 1) // threads * threads
    size = ((n_rows + n - 1) // n + unit - 1) // unit * unit if n > 0 else unit
    return (n_rows + size - 1) // size, size


@device_function
def _list_rows(a, xs, outs, group, padded):
    """Addresses of the group's rows of x and out; beyond them, up to `padded`, the last x and the spare row."""
    table = pointer(a.table, int64)
    pairs = pointer(a.table + 8 * (a.n_groups + 1), int64)
    start, count = table[group], table[group + 1] - table[group]
    xs_list, outs_list = pointer(xs, int64), pointer(outs, int64)
    spare = outs - a.outs_offset + a.spare_offset
    for j in range(count):
        pair = pairs[start + j]
        xs_list[j] = a.x + pair // a.x_div * a.x_stride
        outs_list[j] = a.out + pair // a.out_div * a.out_stride
    for j in range(count, padded):
        xs_list[j], outs_list[j] = xs_list[count - 1], spare


@device_function
def _tiles_of(a, count):
    """How many tiles of tile_tokens tokens, and after them of short_tokens, multiply the least padding."""
    n, n_short = (count + a.tile_tokens - 1) // a.tile_tokens, int64(0)
    for shorts in range(1, 3):
        others = (max(0, count - shorts * a.short_tokens) + a.tile_tokens - 1) // a.tile_tokens
        if others * a.tile_tokens + shorts * a.short_tokens < n * a.tile_tokens + n_short * a.short_tokens:
            n, n_short = others, int64(shorts)
    return n, n_short


@device_function
def _first_token(a, tile, n_full):
    """The first token of a tile, of which n_full have tile_tokens tokens."""
    return min(tile, n_full) * a.tile_tokens + max(0, tile - n_full) * a.short_tokens


@device_function
def _pack_tokens(a, xs, packed, first, end, n_full):
    """Lay out the activations of some tiles for `tile`."""
    token = _first_token(a, first, n_full)
    for i in range(first, end):
        j = _first_token(a, i, n_full)
        to = packed + (j - token) * a.packed_bytes
        call(a.pack if i < n_full else a.pack_short, (xs + 8 * j, (a.n_cols + 255) // 256, to))


@device_function
def _multiply_tiles(a, base, row, row_end, after, first, end, n_full, xs, outs, panels, packed):
    """Rows from `row` on, whole tiles of them, times the tokens of some tiles, which are packed. Meanwhile the rows that follow
    are prefetched, at the end those from `after` on.

    Where the tokens fit into the second-level cache, one tile's rows at a time are multiplied with all of them; otherwise as
    many rows at a time as have panels that fit there.
    """
    supers, token = (a.n_cols + 255) // 256, _first_token(a, first, n_full)
    size = (_first_token(a, end, n_full) - token) * a.packed_bytes
    step = a.tile_rows if size <= PANEL_SHARE else a.block_rows
    for low in range(row, row_end, step):
        high = min(low + step, row_end)
        if a.prepare != 0:
            for r in range(low, high, a.panel_rows):
                panel = panels + (r - low) // a.panel_rows * a.panel_bytes
                call(a.prepare, (base + r * a.row_bytes, a.row_bytes, supers, panel))
        ahead = base + (high if high < row_end else after) * a.row_bytes
        lines = (high - low) * a.row_bytes // (LINE * (end - first) * ((high - low) // a.tile_rows) * max(1, supers)) + 1
        for i in range(first, end):
            j = _first_token(a, i, n_full)
            tile = a.tile if i < n_full else a.tile_short
            for r in range(low, high, a.tile_rows):
                if a.prepare != 0:
                    panel = panels + (r - low) // a.panel_rows * a.panel_bytes
                    to = outs + 8 * j
                    call(tile, (panel, supers, packed + (j - token) * a.packed_bytes, to, 4 * r, a.add, ahead, lines))
                    ahead += LINE * lines * supers
                else:
                    at = base + r * a.row_bytes
                    call(a.tile, (at, a.row_bytes, a.tile_rows, a.n_cols, xs + 8 * j, outs + 8 * j, 4 * r, a.add))


@device_function
def _multiply_rows(a, base, row, row_end, count, xs, outs, panels, ready):
    """Rows from `row` on times `count` tokens: one by `matvec`, several by `matvecs`, MOST at a time. Where they take several
    calls, as many rows at a time as the second-level cache holds, so that they are read from memory once. `ready`: 1 if the
    rows before were multiplied with the same tokens.
    """
    xs_list, outs_list = pointer(xs, int64), pointer(outs, int64)
    at_once = int64(1) if a.matvecs == 0 or count == 1 else MOST
    step = row_end - row if count <= at_once else max(1, ROWS_SHARE // a.row_bytes // a.unit) * a.unit
    for first in range(row, row_end, step):
        at, rows, to = base + first * a.row_bytes, min(step, row_end - first), 4 * first
        for j in range(0, count, at_once):
            if at_once == 1:
                call(a.matvec, (at, a.row_bytes, rows, a.n_cols, xs_list[j], outs_list[j] + to, a.add, panels))
            else:
                some = min(at_once, count - j)
                ready = ready if count <= MOST else int64(0)
                call(a.matvecs, (at, a.row_bytes, rows, a.n_cols, xs + 8 * j, outs + 8 * j, a.add, panels, to, some, ready))


@kernel(MatmulArguments)
def matmul(a, thread, threads):
    """out[pair] (+)= W[group] x[pair]; threads take items of work, some rows each, until none is left.

    Where groups add to the same row of out, every thread has rows of its own instead.
    """
    scratch = a.scratch + thread * a.scratch_stride
    xs, outs = scratch, scratch + a.outs_offset
    panels, packed = scratch + a.panels_offset, scratch + a.packed_offset
    table = pointer(a.table, int64)
    tile_rows = a.tile_rows
    low, high, sharing = int64(0), a.n_rows, threads
    if a.out_div > 1:
        units, sharing = (a.n_rows + 31) // 32, int64(1)
        low, high = min(units * thread // threads * 32, a.n_rows), min(units * (thread + 1) // threads * 32, a.n_rows)
    whole = max(0, high - low - a.ragged * tile_rows) // tile_rows * tile_rows
    row_blocks, block_rows = _blocks_of(whole, a.block_rows, tile_rows, sharing)
    alone = pointer(a.alone, int64)[0] != 0
    least = max(a.few * max(a.x_div, a.out_div), FEW * a.n_groups)  # pairs from which on all groups take panels
    first_group, end_group = int64(0), a.n_groups
    if a.window != 0:
        first_group, end_group = pointer(a.window, int64)[0], pointer(a.window, int64)[1]

    item, before = atomic_add(a.taken, 1) if sharing > 1 else int64(0), int64(0)
    for group in range(first_group, end_group):
        count = table[group + 1] - table[group]
        if count == 0:
            continue
        tiled = a.tile != 0 and not alone and (count >= a.few or table[a.n_groups] >= least)
        n_full, n_short = _tiles_of(a, count)
        n_tiles = n_full + n_short
        padded = _first_token(a, n_tiles, n_full)
        blocks = (padded + TOKENS - 1) // TOKENS
        items = blocks * row_blocks + 1 if tiled else sharing + SMALL * sharing
        if item >= before + items:
            before += items
            continue
        base = pointer(a.addresses, int64)[group] if a.addresses != 0 else a.weights + group * a.group_bytes
        _list_rows(a, xs, outs, group, max(padded, (count + PAD - 1) // PAD * PAD))
        packed_block, ready = int64(-1), int64(0)
        while item < before + items:
            row, row_end = low + whole, high
            if atomic_load(a.stop) != 0:  # the items are still taken, so that the counter ends as it should
                row = row_end
            elif not tiled:
                row, row_end = _rows_of(item - before, high - low, a.unit, sharing)
                row, row_end = low + row, low + row_end
            elif item - before < items - 1:
                block, row = (item - before) // row_blocks, low + (item - before) % row_blocks * block_rows
                row_end = min(row + block_rows, low + whole)
                first, end = n_tiles * block // blocks, n_tiles * (block + 1) // blocks
                if a.pack != 0 and packed_block != block:
                    _pack_tokens(a, xs, packed, first, end, n_full)
                packed_block = block
                after = row + sharing * block_rows
                _multiply_tiles(a, base, row, row_end, after, first, end, n_full, xs, outs, panels, packed)
                row = row_end
            if row < row_end:
                _multiply_rows(a, base, row, row_end, count, xs, outs, panels, ready)
                ready = int64(not tiled)
            item = atomic_add(a.taken, 1) if sharing > 1 else item + 1
        before += items
    if sharing > 1 and item == before + threads - 1:  # the last thread that found no item
        atomic_store(a.taken, 0)
