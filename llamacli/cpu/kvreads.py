"""Reads blocks of keys and values from files, ahead of the attention that passes over them (cpu/kvfile.py).

In: the runs of a batch, the layers. Out: for each run and layer, ranges of blocks that are in memory, in order. All reads of a
batch are one queue, in the order in which attention needs them: a buffer that becomes free takes the next one, so the first
blocks of the next layer are read while this layer's products are computed. A batch reads each block once in each layer.
"""

import mmap
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from time import perf_counter
from typing import NamedTuple

from llamacli.cpu.kvfile import RING, FileCache, reading
from llamacli.device import Run
from llamacli.files import pages
from llamacli.files.reads import DirectReader

TOGETHER = 4  # blocks of one call of attention, while the others are read


class _Read(NamedTuple):
    """A block on its way into a buffer."""

    block: tuple[FileCache, int, int]  # cache, layer, number
    buffer: int
    address: int
    parts: list[Future]


class BlockReader:
    """The buffers and reads of one stage. `stall_s`: seconds that attention waited, since they were last taken."""

    def __init__(self, block_bytes: int):
        self.files, self.stall_s = DirectReader(), 0.0
        self._block_bytes = block_bytes
        self._memory: mmap.mmap | None = None
        self._free = list(range(RING))
        self._queue: deque[tuple[FileCache, int, int]] = deque()
        self._under_way: deque[_Read] = deque()

    def start(self, runs: Sequence[Run], layers: Iterable[int]) -> None:
        """Begin to read what a batch needs of these layers, in order."""
        self._queue.extend((run.cache, i, block) for i in layers for run in runs for block in run.cache.absent(i, run.n))
        self._fill()

    def visits(self, run: Run, layer: int) -> Iterator[tuple[int, int]]:
        """Ranges of blocks, first and end, that together are all that the run sees in a layer; each is in memory until the next
        is asked for. OutputError if a read fails.
        """
        absent, end, at = run.cache.absent(layer, run.n), run.cache.n_blocks(run.n), 0
        if not absent:
            yield 0, end
        for i in range(0, len(absent), TOGETHER):
            read = [self._next((run.cache, layer, block)) for block in absent[i : i + TOGETHER]]
            until = absent[i + TOGETHER] if i + TOGETHER < len(absent) else end
            yield at, until
            at = until
            self._free += read
            self._fill()

    def take_counts(self) -> tuple[int, float, float]:
        """Bytes read since the last call, seconds with at least one read in flight, seconds that attention waited."""
        nbytes, seconds = self.files.take_counts()
        stalled, self.stall_s = self.stall_s, 0.0
        return nbytes, seconds, stalled

    def stop(self) -> None:
        """After a batch that broke off: end its reads."""
        self._queue.clear()
        self.files.stop()
        self._under_way.clear()
        self._free = list(range(RING))

    def close(self) -> None:
        """End the reading threads."""
        self.files.close()

    def _fill(self) -> None:
        """Start reads into all free buffers."""
        while self._queue and self._free:
            if self._memory is None:
                self._memory = pages.memory(RING * self._block_bytes)
            cache, layer, block = self._queue.popleft()
            buffer = self._free.pop()
            k = cache.number_in_file(layer, block)
            parts, at = self.files.begin(cache.file.blocks, k, self._memory, buffer * self._block_bytes)
            self._under_way.append(_Read((cache, layer, block), buffer, at, parts))

    def _next(self, wanted: tuple[FileCache, int, int]) -> int:
        """Wait for the next read, which must be the one that is wanted; the buffer that it went to."""
        read = self._under_way.popleft()
        assert read.block == wanted, "blocks are visited in the order in which they were asked for"
        began = perf_counter()
        with reading(read.block[0].file.path):
            for part in read.parts:
                part.result()
        self.stall_s += perf_counter() - began
        cache, layer, block = read.block
        cache.place(layer, block, read.address)
        return read.buffer
