"""Routed experts of a model that is larger than memory: each layer caches some in slots and reads the others on demand.

In: the experts' tensors in the file, and the number of slots of each layer. Out: tables of matrix addresses; an entry is valid
once an `ExpertFetch` has yielded that expert. `Slots.fetch` starts the reads of a layer's experts, gate and up before down, and
the caller computes meanwhile. Slots evict the least frequently used expert (LFU, with decay) and can be given back. Experts
beyond the number of slots go through a ring of buffers, so a long prompt does not evict what decoding uses; it also prefetches
the next layer's. files/reads.py does the reading.
"""

import mmap
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import astuple, dataclass
from time import perf_counter
from typing import NamedTuple

import numpy as np

from llamacli.files import pages
from llamacli.files.gguf import Tensor
from llamacli.files.reads import DirectReader, TensorSlices, address, failed, settle

GATE, UP, DOWN = range(3)
RING = 4  # buffers besides the slots: some are filled while another is multiplied
HALF_LIFE = 100  # choices after which a use counts half: a frequent expert stays in its slot although others were used later
MANY = 4  # choices per expert from which on a batch uses nearly all experts


@dataclass
class Traffic:
    """Counts of cache hits, prefetches and reads."""

    hits: int = 0  # experts that were in a slot when a layer's tokens chose them
    misses: int = 0
    bytes_read: int = 0
    guesses: int = 0  # experts prefetched for a single token, and how many of them it then chose
    good_guesses: int = 0
    stall_s: float = 0.0  # waiting for reads
    reading_s: float = 0.0  # with at least one read in flight

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __str__(self) -> str:
        speed = f" at {self.bytes_read / self.reading_s / 1e9:.2f} GB/s" if self.reading_s else ""
        asked = f"{self.hits} found in memory, {self.misses} not"
        if self.guesses:
            asked += f", {self.good_guesses} of {self.guesses} guesses were right"
        return f"{asked}; {self.bytes_read / 1e6:.0f} MB read{speed}, {self.stall_s:.2f} s waited"


class _Pass(NamedTuple):
    """Matrices of one expert that are read into a buffer of the ring."""

    layer: int
    expert: int
    parts: tuple[int, ...]


class _Layer:
    """One layer's slots: which expert is in which, and a decaying count of each expert's uses."""

    def __init__(self, stacks: Sequence[TensorSlices], n_experts: int, n_slots: int):
        self.stacks = stacks
        self.room = sum(stack.room for stack in stacks)
        self.memory = pages.memory(n_slots * self.room)
        self.slots: dict[int, int] = {}
        self.uses, self._worth = (
            np.zeros(n_experts),
            1.0,
        )  # weighted counts: a choice counts twice as much as one HALF_LIFE choices ago
        self.numbers = list(range(n_slots))  # of all slots
        self.free = list(self.numbers)
        self.addresses = np.zeros((3, n_experts), np.int64)
        self.arriving: dict[tuple[int, int], list[Future]] = {}  # (expert, part): reads in flight into its slot
        self.stale: dict[int, list[Future]] = {}  # free slots into which an abandoned read may still be running
        self.guess: int | None = None  # the expert prefetched for a single token
        self.clearing: list[Future] = []  # faulting in the memory before it is read into

    def count(self, chosen: Sequence[int]) -> None:
        """Update the use counts."""
        if len(chosen) == 1:
            self.uses[chosen[0]] += self._worth
        else:
            self.uses += np.bincount(chosen, self._worth * 2 ** (np.arange(len(chosen)) / HALF_LIFE), len(self.uses))
        self._worth *= 2 ** (len(chosen) / HALF_LIFE)
        if self._worth > 1e100:
            self.uses /= self._worth
            self._worth = 1.0


class Slots:
    """The routed experts of a stage's layers. Not thread-safe: one caller at a time."""

    def __init__(self, layers: dict[int, tuple[Tensor, Tensor, Tensor]], n_experts: int, n_slots: dict[int, int]):
        """`layers`: gate, up and down tensors by layer. `n_slots`: by layer, how many experts it caches."""
        self._traffic, self._reads = Traffic(), DirectReader()
        self._layers = {
            i: _Layer([self._reads.slices(tensor, n_experts) for tensor in tensors], n_experts, min(n_slots[i], n_experts))
            for i, tensors in layers.items()
        }
        largest = max(max(s[GATE].room + s[UP].room, s[DOWN].room) for s in (layer.stacks for layer in self._layers.values()))
        self._buffers = [pages.memory(largest) for _ in range(RING)]
        self._ring = list(self._buffers)  # free buffers
        self._passing: dict[_Pass, tuple[mmap.mmap, list[Future]]] = {}  # buffers in use
        self._held: list[mmap.mmap] = []

    @property
    def notices(self) -> list[str]:
        """Notes for the user about how the files are read."""
        return self._reads.notices

    def addresses(self, layer: int, part: int) -> int:
        """The address of the int64 addresses of a layer's GATE, UP or DOWN matrices."""
        return self._layers[layer].addresses[part].ctypes.data

    def prefetch(self, layer: int, chosen: Sequence[int]) -> None:
        """Start to read the experts that the layer's next `fetch` will probably need, as many as there is room for."""
        here, wanted = self._layers[layer], [e for e, _ in Counter(chosen).most_common()]
        for e in wanted:
            if len(wanted) > len(here.numbers):
                if not self._ahead(_Pass(layer, e, (GATE, UP))):
                    return
            elif e not in here.slots and _Pass(layer, e, (GATE, UP)) not in self._passing:
                here.guess = e if len(chosen) == 1 else None
                self._begin(here, e, self._slot(here, wanted))

    def load_resident(self, tensors: Sequence[Tensor]) -> dict[str, int]:
        """Read whole tensors into memory that stays resident; returns addresses by name. ModelFileError if a read fails."""
        stacks = [self._reads.slices(tensor, 1) for tensor in tensors]
        memory = pages.memory(sum(stack.room for stack in stacks))
        at, addresses, reads = 0, {}, []
        for tensor, stack in zip(tensors, stacks, strict=True):
            begun, addresses[tensor.name] = self._reads.begin(stack, 0, memory, at)
            reads += begun
            at += stack.room
        self._wait(reads)
        self._held.append(memory)
        pages.lock(address(memory), at)
        self.take_traffic()
        return addresses

    def fetch(self, layer: int, chosen: Sequence[int], in_order: bool = False) -> "ExpertFetch":
        """Start to read the experts in `chosen` (one entry per token and choice, the last token's at the end).

        Experts are yielded as they become available; with `in_order` by ascending number.
        """
        here = self._layers[layer]
        here.count(chosen)
        self._arrived(here)
        used, guess = sorted(set(chosen)), here.guess
        if guess is not None:
            here.guess = None
            self._traffic.guesses += 1
            self._traffic.good_guesses += guess in used
            if guess not in used and guess in here.slots:
                self._forget(here, guess)
        self._drop([one for one in self._passing if one.layer != layer or one.expert not in used or one.expert in here.slots])
        passing = {one.expert for one in self._passing}
        coming = {e for e in used if (e, GATE) in here.arriving}  # right guesses and other prefetches
        missing = [e for e in used if e not in here.slots]
        misses = len(missing) + len(coming)
        self._traffic.hits += len(used) - misses
        self._traffic.misses += misses
        few = len(used) <= len(here.numbers)
        fresh = sorted((e for e in missing if e not in passing), key=lambda e: -here.uses[e])
        for e in sorted(fresh if few else fresh[: len(here.free)]):
            self._begin(here, e, self._slot(here, used))
        if not in_order:  # in memory, in flight to the ring, in flight to slots, and the rest
            used.sort(key=lambda e: (e not in here.slots or (e, GATE) in here.arriving, e not in passing, e not in here.slots))
        if not few:
            self._clear(self._after(layer))
        return ExpertFetch(self, layer, used, not in_order and len(chosen) >= MANY * here.addresses.shape[1])

    def take_traffic(self) -> Traffic:
        """The counts since the last call."""
        taken, self._traffic = self._traffic, Traffic()
        taken.bytes_read, taken.reading_s = self._reads.take()
        return taken

    def shrink(self, nbytes: int) -> int:
        """Release slots of `nbytes` bytes, each time from the layer that has most, but leave one in each layer.

        Returns the bytes released, never filled slots included. Call it only between two fetches.
        """
        given = 0
        while given < nbytes:
            here = max(self._layers.values(), key=lambda here: len(here.numbers))
            if len(here.numbers) == 1:
                break
            settle(here.clearing)
            slot = self._slot(here, ())
            here.numbers.remove(slot)
            start, end = -(-slot * here.room // mmap.PAGESIZE), (slot + 1) * here.room // mmap.PAGESIZE
            if hasattr(mmap, "MADV_DONTNEED") and start < end:
                here.memory.madvise(mmap.MADV_DONTNEED, start * mmap.PAGESIZE, (end - start) * mmap.PAGESIZE)
            given += here.room
        return given

    def reset(self, layer: int) -> None:
        """Restore a valid state after a fetch was interrupted at any point, by an error or Ctrl-C.

        Waits for all reads, empties the slots of `layer` and of the next one, and drops experts of failed reads elsewhere.
        """
        self._reads.stop()
        self._passing.clear()
        self._ring = list(self._buffers)
        for i, here in self._layers.items():
            if i in (layer, *self._after(layer)):
                here.slots.clear()
                here.arriving, here.stale, here.guess, here.free = {}, {}, None, list(here.numbers)
            for e in {e for (e, _), reads in here.arriving.items() if failed(reads)}:
                self._forget(here, e)

    # used by ExpertFetch

    def _sweep(self, layer: int, experts: list[int], parts: tuple[int, ...], then: list[_Pass]) -> Iterator[int]:
        """Yields each expert once its parts are in memory. The first next() starts the reads; those of `then` come last."""
        here = self._layers[layer]
        line = deque([*(_Pass(layer, e, parts) for e in experts if e not in here.slots), *then])

        def fill() -> None:
            while line and self._ahead(line[0], line[0].layer != layer):
                line.popleft()

        fill()
        yield -1
        for e in experts:
            if e in here.slots:
                for part in parts:
                    self._wait(here.arriving.pop((e, part), ()))
                yield e
            else:
                one = _Pass(layer, e, parts)
                self._wait(self._passing[one][1])
                yield e
                self._drop([one])
            fill()

    def _after(self, layer: int) -> list[int]:
        """The next layer with experts, if there is one."""
        return [i for i in self._layers if i > layer][:1]

    def _following(self, layer: int) -> list[_Pass]:
        """The reads that a long prompt needs first in the next layer, as many as there is room for."""
        ahead = [
            [_Pass(i, e, (GATE, UP)) for e in range(there.addresses.shape[1]) if e not in there.slots][: len(there.free) + RING]
            for i, there in ((i, self._layers[i]) for i in self._after(layer))
        ]
        return ahead[0] if ahead else []

    def _clear(self, layers: list[int]) -> None:
        """Fault in, once and in the background, the free slots of layers that will soon be filled."""
        for here in (self._layers[i] for i in layers):
            if here.free and not here.clearing:
                here.clearing = [self._reads.clear(here.memory, here.room, list(here.free))]

    def _ahead(self, one: _Pass, free_slots: bool = True) -> bool:
        """Start to read what is not in memory, into a free slot if allowed, else into the ring; False if the ring is full."""
        there = self._layers[one.layer]
        if one not in self._passing and one.expert not in there.slots:
            if free_slots and there.free:
                self._begin(there, one.expert, self._slot(there, ()))
            elif self._ring:
                self._pass(one)
            else:
                return False
        return True

    def _pass(self, one: _Pass) -> None:
        """Start to read into a buffer of the ring."""
        here, memory, at, futures = self._layers[one.layer], self._ring[-1], 0, []
        self._passing[one] = memory, futures
        self._ring.pop()
        for part in one.parts:
            futures += self._read(here, one.expert, part, memory, at)
            at += here.stacks[part].room

    def _drop(self, passes: list[_Pass]) -> None:
        """Return buffers to the ring once their reads have ended."""
        running = {one: [future for future in self._passing[one][1] if not future.cancel()] for one in passes}
        for one, futures in running.items():
            settle(futures)
            self._ring.append(self._passing.pop(one)[0])

    def _wait(self, futures: Iterable[Future]) -> None:
        began = perf_counter()
        try:
            for future in futures:
                future.result()
        finally:
            self._traffic.stall_s += perf_counter() - began

    def _slot(self, here: _Layer, used: Collection[int]) -> int:
        """A slot to fill: a free one, or that of the least frequently used expert that is not in `used`, which is evicted."""
        quiet = next((slot for slot in here.free if all(f.done() for f in here.stale.get(slot, ()))), None)
        if quiet is None:
            old = min((e for e in here.slots if e not in used), key=here.uses.__getitem__, default=None)
            if old is not None:
                self._forget(here, old)
            quiet = here.free[-1]
            settle(here.stale.get(quiet, ()))
        here.free.remove(quiet)
        here.stale.pop(quiet, None)
        return quiet

    def _begin(self, here: _Layer, expert: int, slot: int) -> None:
        """Start to read an expert into a slot, gate and up before down."""
        here.slots[expert] = slot
        at = slot * here.room
        for part in (GATE, UP, DOWN):
            here.arriving[expert, part] = self._read(here, expert, part, here.memory, at)
            at += here.stacks[part].room

    def _arrived(self, here: _Layer) -> None:
        """Mark experts whose reads have finished as present; forget those whose reads failed."""
        for (e, part), reads in list(here.arriving.items()):
            if e in here.slots and all(read.done() for read in reads):
                if failed(reads):
                    self._forget(here, e)
                else:
                    here.arriving.pop((e, part), None)

    def _forget(self, here: _Layer, expert: int) -> None:
        """Evict an expert; reads still running into its slot become stale."""
        slot, futures = here.slots.pop(expert), []
        for part in (GATE, UP, DOWN):
            futures += here.arriving.pop((expert, part), ())
        here.stale[slot] = [future for future in futures if not future.cancel()]
        here.free.append(slot)

    def _read(self, here: _Layer, expert: int, part: int, memory: mmap.mmap, at: int) -> list[Future]:
        """Start to read one matrix into `memory` from byte `at` on; its address is valid when the reads are done."""
        reads, here.addresses[part, expert] = self._reads.begin(here.stacks[part], expert, memory, at)
        return reads


class ExpertFetch:
    """The reads of one layer's experts for a batch of tokens; at the end it may prefetch for the next layer."""

    def __init__(self, slots: Slots, layer: int, experts: list[int], many: bool):
        self._slots, self._layer, self.experts = slots, layer, experts
        self._then = slots._following(layer) if many else []
        down = [_Pass(layer, e, (DOWN,)) for e in experts if e not in slots._layers[layer].slots]
        self.gate_up = self._begun((GATE, UP), [*down, *self._then])

    def down(self) -> Iterator[int]:
        """Yields each expert once its down matrix is in memory; reads start at once. Call it after `gate_up` is exhausted."""
        return self._begun((DOWN,), self._then)

    def _begun(self, parts: tuple[int, ...], then: list[_Pass]) -> Iterator[int]:
        sweep = self._slots._sweep(self._layer, self.experts, parts, then)
        next(sweep)
        return sweep


def spread(n_slots: int, n_layers: int) -> list[int]:
    """Slots of each layer when `n_slots` are shared evenly; the first layers get the remainder."""
    each, more = divmod(n_slots, n_layers)
    return [each + (i < more) for i in range(n_layers)]
