"""Routed experts of a model that is larger than memory: each layer caches some in slots and reads the others on demand.

In: the experts' tensors in the file, and the number of slots of each layer. Out: tables of matrix addresses; an entry is valid
once an `ExpertFetch` has yielded that expert. `Slots.fetch` starts the reads of a layer's experts, gate and up before down, and
the caller computes meanwhile. Slots evict the least frequently used expert (LFU, with decay) and can be given back. Experts
beyond the number of slots go through a ring of buffers, so a long prompt does not evict what decoding uses; it also prefetches
the next layer's. files/reads.py does the reading.
"""

import mmap
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from time import perf_counter
from typing import NamedTuple

import numpy as np

from llamacli.device import IoStats
from llamacli.files import pages
from llamacli.files.gguf import Tensor
from llamacli.files.reads import DirectReader, Memory, TensorSlices, address, failed, settle

GATE, UP, DOWN = range(3)
RING = 4  # buffers besides the slots: some are filled while another is multiplied
HALF_LIFE = 100  # choices after which a use counts half: a frequent expert stays in its slot although others were used later
MANY = 4  # choices per expert from which on a batch uses nearly all experts


class _RingRead(NamedTuple):
    """Matrices of one expert that are read into a buffer of the ring."""

    layer: int
    expert: int
    parts: tuple[int, ...]


class _LayerCache:
    """One layer's slots: which expert is in which, and a decaying count of each expert's uses.

    An expert is in one of three states. Absent: not in `slot_of`. Reading: in `slot_of`, and for at least one of its matrices
    in `pending`. Present: in `slot_of` alone. Only `_evict` makes an expert absent; its slot is then free, but a read that had
    begun may still write to it. The slot is in `abandoned` until `_take_slot` has seen that read end.
    """

    def __init__(self, tensors: Sequence[TensorSlices], n_experts: int, n_slots: int, allocate: Callable[[int], Memory]):
        self.tensors = tensors
        self.slot_bytes = sum(tensor.buffer_bytes for tensor in tensors)
        self.memory = allocate(n_slots * self.slot_bytes)
        self.slot_of: dict[int, int] = {}  # by expert
        self.uses = np.zeros(n_experts)  # weighted counts
        self._weight = 1.0  # of the next use: it doubles every HALF_LIFE choices
        self.all_slots = list(range(n_slots))  # `shrink` removes some
        self.free = list(self.all_slots)
        self.addresses = np.zeros((3, n_experts), np.int64)
        self.pending: dict[tuple[int, int], list[Future]] = {}  # (expert, part): reads in flight into its slot
        self.abandoned: dict[int, list[Future]] = {}  # free slots into which an abandoned read may still be running
        self.prefetched: int | None = None  # the expert prefetched for a single token
        self.faulting_in: list[Future] = []  # faulting in the memory before it is read into

    def count(self, chosen: Sequence[int]) -> None:
        """Update the use counts."""
        if len(chosen) == 1:
            self.uses[chosen[0]] += self._weight
        else:
            self.uses += np.bincount(chosen, self._weight * 2 ** (np.arange(len(chosen)) / HALF_LIFE), len(self.uses))
        self._weight *= 2 ** (len(chosen) / HALF_LIFE)
        if self._weight > 1e100:
            self.uses /= self._weight
            self._weight = 1.0


class Slots:
    """The routed experts of a stage's layers. Not thread-safe: one caller at a time."""

    def __init__(
        self,
        layers: dict[int, tuple[Tensor, Tensor, Tensor]],
        n_experts: int,
        n_slots: dict[int, int],
        allocate: Callable[[int], Memory] = pages.memory,
    ):
        """`layers`: gate, up and down tensors by layer. `n_slots`: by layer, how many experts it caches. `allocate(bytes)`
        gives memory that begins at a page: of each layer's slots, then of the RING buffers.
        """
        self._io, self._reads = IoStats(), DirectReader()
        self._layers = {
            i: _LayerCache(
                [self._reads.slices(tensor, n_experts) for tensor in tensors], n_experts, min(n_slots[i], n_experts), allocate
            )
            for i, tensors in layers.items()
        }
        largest = 0
        for layer in self._layers.values():
            gate, up, down = (tensor.buffer_bytes for tensor in layer.tensors)
            largest = max(largest, gate + up, down)
        self._buffers = [allocate(largest) for _ in range(RING)]
        self._free_buffers = list(self._buffers)
        self._ring_reads: dict[_RingRead, tuple[Memory, list[Future]]] = {}  # the buffers in use
        self._resident: list[mmap.mmap] = []

    @property
    def notices(self) -> list[str]:
        """Notes for the user about how the files are read."""
        return self._reads.notices

    def addresses(self, layer: int, part: int) -> int:
        """The address of the int64 addresses of a layer's GATE, UP or DOWN matrices."""
        return self._layers[layer].addresses[part].ctypes.data

    def address(self, layer: int, part: int, expert: int) -> int:
        """Where one of these matrices is, once it has been read."""
        return int(self._layers[layer].addresses[part, expert])

    def prefetch(self, layer: int, chosen: Sequence[int]) -> None:
        """Start to read the experts that the layer's next `fetch` will probably need, as many as there is room for."""
        cache, wanted = self._layers[layer], [e for e, _ in Counter(chosen).most_common()]
        for e in wanted:
            if len(wanted) > len(cache.all_slots):
                if not self._start_read(_RingRead(layer, e, (GATE, UP))):
                    return
            elif e not in cache.slot_of and _RingRead(layer, e, (GATE, UP)) not in self._ring_reads:
                cache.prefetched = e if len(chosen) == 1 else None
                self._read_to_slot(cache, e, self._take_slot(cache, wanted))

    def load_resident(self, tensors: Sequence[Tensor]) -> dict[str, int]:
        """Read whole tensors into memory that stays resident; returns addresses by name. ModelFileError if a read fails."""
        slices = {tensor.name: self._reads.slices(tensor, 1) for tensor in tensors}
        memory = pages.memory(sum(whole.buffer_bytes for whole in slices.values()))
        at, addresses, reads = 0, {}, []
        for name, whole in slices.items():
            begun, addresses[name] = self._reads.begin(whole, 0, memory, at)
            reads += begun
            at += whole.buffer_bytes
        self._wait(reads)
        self._resident.append(memory)
        pages.lock(address(memory), at)
        self.take_io_stats()
        return addresses

    def fetch(self, layer: int, chosen: Sequence[int], in_order: bool = False) -> "ExpertFetch":
        """Start to read the experts in `chosen` (one entry per token and choice, the last token's at the end).

        Experts are yielded as they become available; with `in_order` by ascending number.
        """
        cache = self._layers[layer]
        cache.count(chosen)
        self._collect_finished(cache)
        used, guess = sorted(set(chosen)), cache.prefetched
        if guess is not None:
            cache.prefetched = None
            self._io.guesses += 1
            self._io.good_guesses += guess in used
            if guess not in used and guess in cache.slot_of:
                self._evict(cache, guess)
        needless = [
            read for read in self._ring_reads if read.layer != layer or read.expert not in used or read.expert in cache.slot_of
        ]
        self._release_buffers(needless)
        in_ring = {read.expert for read in self._ring_reads}
        coming = {e for e in used if (e, GATE) in cache.pending}  # right guesses and other prefetches
        missing = [e for e in used if e not in cache.slot_of]
        misses = len(missing) + len(coming)
        self._io.hits += len(used) - misses
        self._io.misses += misses
        few = len(used) <= len(cache.all_slots)
        fresh = sorted((e for e in missing if e not in in_ring), key=lambda e: -cache.uses[e])
        for e in sorted(fresh if few else fresh[: len(cache.free)]):
            self._read_to_slot(cache, e, self._take_slot(cache, used))
        if not in_order:  # in memory, in flight to the ring, in flight to slots, and the rest
            pending = {e for e, part in cache.pending if part == GATE}
            used.sort(key=lambda e: (e not in cache.slot_of or e in pending, e not in in_ring, e not in cache.slot_of))
        if not few:
            self._fault_in(self._next_layer(layer))
        return ExpertFetch(self, layer, used, not in_order and len(chosen) >= MANY * cache.addresses.shape[1])

    def take_io_stats(self) -> IoStats:
        """The counts since the last call."""
        taken, self._io = self._io, IoStats()
        taken.bytes_read, taken.reading_s = self._reads.take_counts()
        return taken

    def shrink(self, nbytes: int) -> int:
        """Release slots of `nbytes` bytes, each time from the layer that has most, but leave one in each layer.

        Returns the bytes released, never filled slots included. Call it only between two fetches.
        """
        given = 0
        while given < nbytes:
            cache = max(self._layers.values(), key=lambda cache: len(cache.all_slots))
            if len(cache.all_slots) == 1:
                break
            settle(cache.faulting_in)
            slot = self._take_slot(cache, ())
            cache.all_slots.remove(slot)
            start, end = -(-slot * cache.slot_bytes // mmap.PAGESIZE), (slot + 1) * cache.slot_bytes // mmap.PAGESIZE
            if start < end:
                pages.drop_pages(address(cache.memory) + start * mmap.PAGESIZE, (end - start) * mmap.PAGESIZE)
            given += cache.slot_bytes
        return given

    def close(self) -> None:
        """End the reading threads and close the files."""
        self._reads.close()

    def reset(self, layer: int) -> None:
        """Restore a valid state after a fetch was interrupted at any point, by an error or Ctrl-C.

        Waits for all reads, empties the slots of `layer` and of the next one, and drops experts of failed reads elsewhere.
        """
        self._reads.stop()
        self._ring_reads.clear()
        self._free_buffers = list(self._buffers)
        for i, cache in self._layers.items():
            if i in (layer, *self._next_layer(layer)):
                cache.slot_of.clear()
                cache.pending, cache.abandoned, cache.prefetched, cache.free = {}, {}, None, list(cache.all_slots)
            for e in {e for (e, _), reads in cache.pending.items() if failed(reads)}:
                self._evict(cache, e)

    # used by ExpertFetch

    def _stream(self, layer: int, experts: list[int], parts: tuple[int, ...], then: list[_RingRead]) -> Iterator[int]:
        """Yields each expert once its parts are in memory. The first next() starts the reads; those of `then` come last."""
        cache = self._layers[layer]
        queue = deque([*(_RingRead(layer, e, parts) for e in experts if e not in cache.slot_of), *then])

        def fill() -> None:
            while queue and self._start_read(queue[0], queue[0].layer != layer):
                queue.popleft()

        fill()
        yield -1
        for e in experts:
            if e in cache.slot_of:
                for part in parts:
                    self._wait(cache.pending.pop((e, part), ()))
                yield e
            else:
                read = _RingRead(layer, e, parts)
                self._wait(self._ring_reads[read][1])
                yield e
                self._release_buffers([read])
            fill()

    def _next_layer(self, layer: int) -> list[int]:
        """The next layer with experts, if there is one."""
        return [i for i in self._layers if i > layer][:1]

    def _first_reads_of_next_layer(self, layer: int) -> list[_RingRead]:
        """The reads that a long prompt needs first in the next layer, as many as there is room for."""
        for i in self._next_layer(layer):
            cache = self._layers[i]
            absent = [e for e in range(cache.addresses.shape[1]) if e not in cache.slot_of]
            return [_RingRead(i, e, (GATE, UP)) for e in absent[: len(cache.free) + RING]]
        return []

    def _fault_in(self, layers: list[int]) -> None:
        """Fault in, once and in the background, the free slots of layers that will soon be filled."""
        for cache in (self._layers[i] for i in layers):
            if cache.free and not cache.faulting_in:
                cache.faulting_in = [self._reads.clear(cache.memory, cache.slot_bytes, list(cache.free))]

    def _start_read(self, read: _RingRead, free_slots: bool = True) -> bool:
        """Start a read that is needed: into a free slot if allowed, else into the ring; False if the ring is full."""
        cache = self._layers[read.layer]
        if read not in self._ring_reads and read.expert not in cache.slot_of:
            if free_slots and cache.free:
                self._read_to_slot(cache, read.expert, self._take_slot(cache, ()))
            elif self._free_buffers:
                self._read_to_ring(read)
            else:
                return False
        return True

    def _read_to_ring(self, read: _RingRead) -> None:
        """Start to read into a buffer of the ring."""
        cache, memory, at, futures = self._layers[read.layer], self._free_buffers[-1], 0, []
        self._ring_reads[read] = memory, futures
        self._free_buffers.pop()
        for part in read.parts:
            futures += self._read(cache, read.expert, part, memory, at)
            at += cache.tensors[part].buffer_bytes

    def _release_buffers(self, reads: list[_RingRead]) -> None:
        """Return buffers to the ring once their reads have ended; reads that have not begun are cancelled."""
        running = {read: [future for future in self._ring_reads[read][1] if not future.cancel()] for read in reads}
        for read, futures in running.items():
            settle(futures)
            self._free_buffers.append(self._ring_reads.pop(read)[0])

    def _wait(self, futures: Iterable[Future]) -> None:
        began = perf_counter()
        try:
            for future in futures:
                future.result()
        finally:
            self._io.stall_s += perf_counter() - began

    def _take_slot(self, cache: _LayerCache, used: Collection[int]) -> int:
        """A slot to fill: a free one, or that of the least frequently used expert that is not in `used`, which is evicted."""
        unused = next((slot for slot in cache.free if all(f.done() for f in cache.abandoned.get(slot, ()))), None)
        if unused is None:
            old = min((e for e in cache.slot_of if e not in used), key=cache.uses.__getitem__, default=None)
            if old is not None:
                self._evict(cache, old)
            unused = cache.free[-1]
            settle(cache.abandoned.get(unused, ()))
        cache.free.remove(unused)
        cache.abandoned.pop(unused, None)
        return unused

    def _read_to_slot(self, cache: _LayerCache, expert: int, slot: int) -> None:
        """Start to read an expert into a slot, gate and up before down."""
        cache.slot_of[expert] = slot
        at = slot * cache.slot_bytes
        for part in (GATE, UP, DOWN):
            cache.pending[expert, part] = self._read(cache, expert, part, cache.memory, at)
            at += cache.tensors[part].buffer_bytes

    def _collect_finished(self, cache: _LayerCache) -> None:
        """Mark experts whose reads have finished as present; evict those whose reads failed."""
        for (e, part), reads in list(cache.pending.items()):
            if e in cache.slot_of and all(read.done() for read in reads):
                if failed(reads):
                    self._evict(cache, e)
                else:
                    cache.pending.pop((e, part), None)

    def _evict(self, cache: _LayerCache, expert: int) -> None:
        """Evict an expert; reads still running into its slot are abandoned."""
        slot, futures = cache.slot_of.pop(expert), []
        for part in (GATE, UP, DOWN):
            futures += cache.pending.pop((expert, part), ())
        cache.abandoned[slot] = [future for future in futures if not future.cancel()]
        cache.free.append(slot)

    def _read(self, cache: _LayerCache, expert: int, part: int, memory: Memory, at: int) -> list[Future]:
        """Start to read one matrix into `memory` from byte `at` on; its address is valid when the reads are done."""
        reads, cache.addresses[part, expert] = self._reads.begin(cache.tensors[part], expert, memory, at)
        return reads


class ExpertFetch:
    """The reads of one layer's experts for a batch of tokens; at the end it may prefetch for the next layer."""

    def __init__(self, slots: Slots, layer: int, experts: list[int], many: bool):
        self._slots, self._layer, self.experts = slots, layer, experts
        self._then = slots._first_reads_of_next_layer(layer) if many else []
        down = [_RingRead(layer, e, (DOWN,)) for e in experts if e not in slots._layers[layer].slot_of]
        self.gate_up = self._started((GATE, UP), [*down, *self._then])

    def down(self) -> Iterator[int]:
        """Yields each expert once its down matrix is in memory; reads start at once. Call it after `gate_up` is exhausted."""
        return self._started((DOWN,), self._then)

    def _started(self, parts: tuple[int, ...], then: list[_RingRead]) -> Iterator[int]:
        stream = self._slots._stream(self._layer, self.experts, parts, then)
        next(stream)
        return stream


def slots_per_layer(n_slots: int, n_layers: int) -> list[int]:
    """Slots of each layer when `n_slots` are shared evenly; the first layers get the remainder."""
    each, more = divmod(n_slots, n_layers)
    return [each + (i < more) for i in range(n_layers)]
