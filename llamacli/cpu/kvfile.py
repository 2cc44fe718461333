"""A KV cache larger than memory: of the layers that see every position, what memory does not hold lies in a file.

In: a Config, a limit, a `KVFile` (where, how many positions stay in memory). Out: `FileCache`, a device.Cache. Positions are
grouped in blocks. Each such layer has slots in memory for some blocks, which hold the newest positions and as many more as fit;
the others are in the file, and cpu/kvreads.py reads them whenever attention passes over them. Chunked layers stay rings in
memory.

A block is [keys, values][n_kv_heads, positions, kv_row_bytes], padded to whole pages. It is written to the file when its slot
is needed for a newer one, and again only if it was changed since. The file's name is removed as soon as it is open, so nothing
is left of it, however the process ends. Space for a prompt is reserved before any of it is evaluated.
"""

import ctypes
import errno
import os
import sys
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llamacli.cpu.kvcache import KVCache, segment_bytes
from llamacli.errors import ModelFileError, OutputError, UsageError
from llamacli.files import pages
from llamacli.files.reads import BLOCK as PAGE
from llamacli.files.reads import DirectReader, TensorSlices, address, make_buffered, make_direct
from llamacli.llama4.config import Config

POSITIONS = 1024  # of a block: a multiple of attention's KEYS; for Scout 4 MB in F16, which an SSD reads at its full speed
RING = 8  # buffers of one block through which an engine reads (kvreads.py)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class KVFile(NamedTuple):
    """Where keys and values go, and what stays in memory."""

    path: Path  # a folder, or the path of a file that does not exist
    window: int = 0  # positions of each layer in memory; the cache takes at least what a batch needs
    block: int = POSITIONS


def seeing_all(config: Config, layers: range | None = None) -> list[int]:
    """The layers that see every position: those that a file is for."""
    layers = range(config.n_layers) if layers is None else layers
    return [i for i in layers if not (config.chunk_size and config.uses_rope(i))]


def block_bytes(config: Config, block: int = POSITIONS) -> int:
    """Bytes of one layer's block, in memory and in the file."""
    return -(-2 * config.n_kv_heads * block * config.kv_row_bytes // PAGE) * PAGE


def slots(ctx: int, window: int, batch: int, block: int = POSITIONS) -> int:
    """Blocks of a layer in memory: those of `window` positions, at least those that a batch may touch, at most those of ctx."""
    return min(max(window // block, -(-batch // block) + 1), -(-ctx // block))


def nbytes(config: Config, ctx: int, window: int, batch: int, block: int = POSITIONS) -> int:
    """Most bytes of memory that a cache holds, without the buffers of reads (RING blocks for each engine)."""
    rings = 2 * config.n_kv_heads * config.kv_row_bytes * min(ctx, config.chunk_size)
    seeing = len(seeing_all(config))
    blocks = slots(ctx, window, batch, block) * block_bytes(config, block)
    return (config.n_layers - seeing) * rings + seeing * blocks + config.n_layers * segment_bytes(config)


def file_bytes(config: Config, ctx: int, window: int, batch: int, block: int = POSITIONS) -> int:
    """Bytes of the file when the context is full."""
    absent = -(-ctx // block) - slots(ctx, window, batch, block)
    return absent * len(seeing_all(config)) * block_bytes(config, block)


def bytes_per_token(config: Config, depth: int, ctx: int, window: int, batch: int, block: int = POSITIONS) -> int:
    """Bytes read to decode the token after `depth` others: every block that memory does not hold, once in each layer."""
    absent = max(0, depth // block + 1 - slots(ctx, window, batch, block))
    return absent * len(seeing_all(config)) * block_bytes(config, block)


def check(path: Path) -> None:
    """UsageError unless a file can be made at `path`, or in it if it is a folder."""
    os.close(_created(path))


class _File:
    """The file of one cache: blocks of equal size, made when the first one is written."""

    def __init__(self, path: Path, nbytes: int, reads: DirectReader):
        """`nbytes`: of a block."""
        self.path, self._nbytes, self._reads = path, nbytes, reads
        self.blocks: TensorSlices | None = None
        self._direct = self._reserved = 0

    def reserve(self, n: int) -> None:
        """Have the system set aside room for `n` blocks, where it can. OutputError if the disk does not have it."""
        self._open()
        if n <= self._reserved or sys.platform != "linux":
            return
        allocate = ctypes.CDLL(None, use_errno=True).fallocate
        allocate.argtypes = ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64
        if allocate(self.blocks.file, 0, 0, n * self._nbytes) != 0 and ctypes.get_errno() in _FULL:
            raise self._full(n * self._nbytes, ctypes.get_errno())
        self._reserved = n

    def write(self, k: int, block: memoryview) -> None:
        """Write block k. OutputError if the disk is full or fails."""
        self._open()
        at, done = k * self._nbytes, 0
        while done < len(block):
            try:
                n = os.pwrite(self.blocks.file, block[done:], at + done)
            except OSError as error:
                if error.errno == errno.EINVAL and self._direct:
                    self._buffered()
                    continue
                if error.errno in _FULL:
                    raise self._full(at + len(block), error.errno) from None
                raise OutputError(
                    f"{self.path}: expected to write keys and values, found: {error.strerror}; check the disk, or name "
                    f"another folder with --kv-file"
                ) from None
            done += n
            if done % PAGE and self._direct:  # a direct write cannot continue in the middle of a page
                self._buffered()

    def read(self, k: int, memory, at: int) -> None:
        """Read block k into `memory` from byte `at` on, and wait for it. OutputError if that fails."""
        with reading(self.path):
            for part in self._reads.begin(self.blocks, k, memory, at)[0]:
                part.result()

    def _open(self) -> None:
        if self.blocks is None:
            file = _created(self.path)
            self._direct = make_direct(file)
            weakref.finalize(self, os.close, file)
            self.blocks = self._reads.adopt(self.path, file, self._direct, self._nbytes)

    def _buffered(self) -> None:
        make_buffered(self.blocks.file)
        self._direct = False
        self._reads.adopt(self.path, self.blocks.file, False, self._nbytes)

    def _full(self, nbytes: int, number: int) -> OutputError:
        size = f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"
        return OutputError(
            f"{self.path}: expected room for {size} of keys and values, found: {os.strerror(number)}; free "
            f"some, name another folder with --kv-file, or use a smaller --kv"
        )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Within it a failed read is an OutputError about the file of keys and values."""
    try:
        yield
    except ModelFileError as error:
        found = str(error).partition("expected ")[2].partition(";")[0]
        raise OutputError(
            f"{path}: expected keys and values as they were written, {found}; check the disk, or name another folder with "
            f"--kv-file"
        ) from None


class _Blocks:
    """One layer's blocks: which of them are in memory, which in the file. `table`, int64 [n_blocks, 2], is what attention
    reads: where keys and values of each block begin, less the bytes of the positions before it.
    """

    def __init__(self, n_slots: int, n_blocks: int, nbytes: int):
        self.memory = pages.memory(n_slots * nbytes)  # resident as far as it is written to
        self.slot_of: dict[int, int] = {}  # by block
        self.n_slots = n_slots
        self.changed: set[int] = set()  # blocks in memory that the file does not have as they are
        self.stored: set[int] = set()  # blocks in the file
        self.table = np.zeros((n_blocks, 2), np.int64)


class FileCache(KVCache):
    """Keys and values of which a part is in a file (see device.Cache)."""

    def __init__(self, config: Config, ctx: int, layers: range, where: KVFile, batch: int, reads: DirectReader):
        """`batch`: most tokens that are evaluated together. `reads`: what reads the file."""
        self._blocks: dict[int, _Blocks] = {}
        super().__init__(config, ctx, layers)
        self.block, self._block_bytes = where.block, block_bytes(config, where.block)
        self._row_bytes = config.kv_row_bytes
        self._n_slots, n_blocks = slots(ctx, where.window, batch, where.block), -(-ctx // where.block)
        seeing = seeing_all(config, layers)
        self._blocks = {i: _Blocks(self._n_slots, n_blocks, self._block_bytes) for i in seeing}
        self._number = {layer: g for g, layer in enumerate(seeing)}
        self.file = _File(where.path, self._block_bytes, reads)
        self._tables = self.table[None]

    @property
    def nbytes(self) -> int:
        """Bytes of memory held by all layers."""
        return super().nbytes + sum(len(blocks.slot_of) for blocks in self._blocks.values()) * self._block_bytes

    def reserve(self, n: int) -> None:
        """Make room for `n` more tokens, in the file as well: OutputError if the disk does not have it."""
        beyond = -(-(self.pos + n) // self.block) - self._n_slots
        if beyond > 0 and self.pos + n <= self.ctx:
            self.file.reserve(beyond * len(self._blocks))
        super().reserve(n)

    def tables(self, n: int) -> np.ndarray:
        """Brings the blocks of the next `n` positions into memory; the addresses of their cache tables, int64 [n]."""
        first, last = self.pos // self.block, (self.pos + n - 1) // self.block
        tables = np.repeat(self.table[None], last + 1 - first, 0)
        for layer, blocks in self._blocks.items():
            for block in range(first, last + 1):
                self._in_memory(layer, block, range(first, last + 1))
                blocks.changed.add(block)
            before = range(first - 1, -1, -1)  # after going back, slots are free: the newest blocks come back into them
            while len(blocks.slot_of) < min(self._n_slots, last + 1):
                self._in_memory(layer, next(block for block in before if block not in blocks.slot_of), ())
            rows = tables[:, layer - self.layers.start]
            rows[:, :2], rows[:, 2] = blocks.table[first : last + 1], self.block
        self._tables = tables  # kept until the next batch
        at = (self.pos + np.arange(n)) // self.block - first
        return tables.ctypes.data + at * tables.strides[0]

    def absent(self, layer: int, n: int) -> list[int]:
        """The blocks in the file that `n` tokens after those that are held will see, in order."""
        slot_of = self._blocks[layer].slot_of
        return [block for block in range(self.n_blocks(n)) if block not in slot_of]

    def n_blocks(self, n: int) -> int:
        """Blocks of all positions, `n` more than those that are held."""
        return -(-(self.pos + n) // self.block)

    def place(self, layer: int, block: int, at: int) -> None:
        """Set the address of the block's keys and values."""
        before = self._row_bytes * block * self.block
        values = at + self._heads * self.block * self._row_bytes
        self._blocks[layer].table[block] = at - before, values - before

    def table_of(self, layer: int) -> int:
        """The address of a layer's `table`."""
        return self._blocks[layer].table.ctypes.data

    def number_in_file(self, layer: int, block: int) -> int:
        """Which block of the file it is: those of all layers lie side by side, so that the file grows with the positions."""
        return block * len(self._blocks) + self._number[layer]

    def truncate(self, pos: int) -> int:
        """As Positions.truncate; blocks of which nothing is left are forgotten."""
        pos = super().truncate(pos)
        for blocks in self._blocks.values():
            for block in [block for block in blocks.slot_of if block * self.block >= pos]:
                del blocks.slot_of[block]
            left = range(-(-pos // self.block))
            blocks.changed.intersection_update(left)
            blocks.stored.intersection_update(left)
        return pos

    def export(self, layer: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """As KVCache.export."""
        if layer not in self._blocks:
            return super().export(layer, start, end)
        self._held_slots(layer, start, end)
        dtype, length = self._row
        sides = np.empty((2, self._heads, end - start, length), dtype)
        for block, at in self._parts(start, end):
            blocks = self._blocks[layer]
            if block in blocks.slot_of:
                rows = self._rows(blocks.memory, blocks.slot_of[block])
            else:
                memory = pages.memory(self._block_bytes)
                self.file.read(self.number_in_file(layer, block), memory, 0)
                rows = self._rows(memory, 0)
            first = block * self.block
            sides[:, :, at.start - start : at.stop - start] = rows[:, :, at.start - first : at.stop - first]
        return sides[0], sides[1]

    def restore(self, layer: int, start: int, keys: np.ndarray, values: np.ndarray) -> None:
        """As KVCache.restore."""
        if layer not in self._blocks:
            return super().restore(layer, start, keys, values)
        blocks = self._blocks[layer]
        for block, at in self._parts(start, start + keys.shape[1]):
            rows, first = self._rows(blocks.memory, self._in_memory(layer, block, (block,))), block * self.block
            for side, given in zip(rows, (keys, values), strict=True):
                side[:, at.start - first : at.stop - first] = given[:, at.start - start : at.stop - start]
            blocks.changed.add(block)
        return None

    def _capacity(self, layer: int, held: int, need: int) -> int:
        return 0 if layer in self._blocks else super()._capacity(layer, held, need)

    def _in_memory(self, layer: int, block: int, needed: Sequence[int]) -> int:
        """The slot that holds a block, after reading it if it is in the file. The oldest block not in `needed` makes room."""
        blocks = self._blocks[layer]
        if block in blocks.slot_of:
            return blocks.slot_of[block]
        used = set(blocks.slot_of.values())
        slot = next((slot for slot in range(blocks.n_slots) if slot not in used), None)
        if slot is None:
            oldest = min(other for other in blocks.slot_of if other not in needed)
            if oldest in blocks.changed:
                at = blocks.slot_of[oldest] * self._block_bytes
                self.file.write(self.number_in_file(layer, oldest), memoryview(blocks.memory)[at : at + self._block_bytes])
                blocks.changed.discard(oldest)
                blocks.stored.add(oldest)
            slot = blocks.slot_of.pop(oldest)
        if block in blocks.stored:
            self.file.read(self.number_in_file(layer, block), blocks.memory, slot * self._block_bytes)
        self.place(layer, block, address(blocks.memory) + slot * self._block_bytes)
        blocks.slot_of[block] = slot  # last: an interrupt before it leaves the block absent, and the slot free
        return slot

    def _rows(self, memory, slot: int) -> np.ndarray:
        """Keys and values in a slot, [2, n_kv_heads, block, ...]."""
        dtype, length = self._row
        shape = (2, self._heads, self.block, length)
        return np.frombuffer(memory, dtype, int(np.prod(shape)), slot * self._block_bytes).reshape(shape)

    def _parts(self, start: int, end: int) -> list[tuple[int, range]]:
        """Positions start to end - 1 by block."""
        numbers = range(start // self.block, -(-end // self.block))
        return [(b, range(max(start, b * self.block), min(end, (b + 1) * self.block))) for b in numbers]


def _created(path: Path) -> int:
    """A descriptor of a new file without a name."""
    try:
        if path.is_dir():
            file, name = tempfile.mkstemp(prefix="llamacli-kv-", dir=path)
        else:
            file, name = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), path
        os.unlink(name)
        return file
    except OSError as error:
        raise UsageError(
            f"--kv-file {path}: expected a folder, or a path where a new file can be made, found: {error.strerror}"
        ) from None
