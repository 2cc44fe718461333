"""The layers of a cluster as one stage of the engine: embedding and head here, everything between on nodes in a row.

In: tokens and caches, as device.Stage has them. Out: a `Rows` that waits for its result when it is looked at, so that the
batches of a prompt follow each other through the nodes; logits. Keys and values lie on the nodes. A cache here has the
positions and what was evaluated at them: when a node is lost, the layers are opened anew and all of it is evaluated again in
the same batches, which gives the same bits. `Link`s and nodes: wire.py, node.py.
"""

import itertools
import queue
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from llamacli import errors
from llamacli.cluster.row import PING_EVERY, NodeLost, Place, Row, node_error
from llamacli.cluster.wire import Frame, LinkClosed
from llamacli.device import IoStats, Run, Tokens
from llamacli.errors import DeviceError, LlamacliError
from llamacli.positions import Positions

FEW = 4  # tokens below which a batch has the bits of single tokens on every processor (cpu/kernels/ops/matmul.py)
AGAIN = FEW - 1  # single tokens that are evaluated together when keys and values are made anew


class Piece(NamedTuple):
    """Tokens of one batch, from `start` on: ids, rows in place of embeddings, whether the bits are those of single tokens."""

    start: int
    tokens: Tokens
    alone: bool


class ClusterCache(Positions):
    """The positions of a sequence whose keys and values the nodes hold (device.Cache)."""

    numbers = itertools.count(1)

    def __init__(self, stage: "ClusterStage", ctx: int):
        super().__init__(stage.config, ctx)
        self.number, self._stage = next(self.numbers), stage
        self.pieces: list[Piece] = []  # what was evaluated, in order
        self.opened = 0  # the row of nodes (ClusterStage.opened) that holds the keys and values
        self._reserved = 0
        weakref.finalize(self, stage.free, self.number)

    @property
    def nbytes(self) -> int:
        """Bytes that the nodes hold of all sequences."""
        return self._stage.held_bytes()

    def reserve(self, n: int) -> None:
        """Count `n` more positions; the nodes make room when they are written. ContextFullError past ctx."""
        self._reserved = self._claim(n)

    def truncate(self, pos: int) -> int:
        """Forget tokens from `pos` on, and what was evaluated at them (device.Cache)."""
        pos = super().truncate(pos)
        while self.pieces and self.pieces[-1].start >= pos:
            self.pieces.pop()
        return pos

    def take(self, piece: Piece) -> None:
        """Remember what was evaluated. Single tokens join those before them."""
        while self.pieces and self.pieces[-1].start >= piece.start:
            self.pieces.pop()
        if self.pieces and piece.alone and (last := self.pieces[-1]).alone:
            held = piece.start - last.start
            if len(last.tokens.ids) >= held and not last.tokens.rows and not piece.tokens.rows:
                del last.tokens.ids[held:]
                last.tokens.ids.extend(map(int, piece.tokens.ids))
                return
        self.pieces.append(piece._replace(tokens=Tokens([int(id) for id in piece.tokens.ids], piece.tokens.rows)))

    def export(self, layer: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of a layer, from its node."""
        where = {"cache": self.number, "ctx": self.ctx, "pos": self.pos, "layer": layer, "start": start, "end": end}
        keys, values = self._stage.ask_for(layer, "export", where).arrays
        return keys, values

    def restore(self, layer: int, start: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Write what `export` returned to the layer's node."""
        where = {"cache": self.number, "ctx": self.ctx, "pos": self.pos, "layer": layer, "start": start}
        self._stage.ask_for(layer, "restore", where | {"reserved": self._reserved - self.pos}, (keys, values))

    def copied_from(self, other: "ClusterCache") -> None:
        """Know what `other` knows, whose keys and values this one has been given."""
        self.opened = other.opened
        self.pieces = [piece._replace(tokens=Tokens([*piece.tokens.ids], piece.tokens.rows)) for piece in other.pieces]


class Batch:
    """Tokens under way through the nodes."""

    def __init__(
        self, number: int, tokens: Tokens, runs: Sequence[tuple[ClusterCache, int, int]], alone: bool, repeats: bool = False
    ):
        """`runs`: cache, first position, tokens. `repeats`: whether it only makes keys and values anew."""
        self.number, self.tokens, self.runs, self.alone, self.repeats = number, tokens, runs, alone, repeats
        self.sent = False
        self.result: np.ndarray | None = None


class Rows:
    """The stream after the last layer, float32 [n, n_embd]; waits for it when it is used."""

    def __init__(self, stage: "ClusterStage", batch: Batch):
        self._stage, self._batch = stage, batch

    def __len__(self) -> int:
        return len(self._batch.tokens.ids)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self._stage.rows(self._batch, whole=True)

    def last(self) -> np.ndarray:
        """The last row, [1, n_embd]."""
        return self._stage.rows(self._batch, whole=False)[-1:]


class ClusterStage:
    """All layers of a model (device.Stage), on nodes that `open_row` finds."""

    follow = timings = None

    def __init__(self, local, config, open_row: Callable[[Counter], Sequence[Place]], secret: bytes, on_close=None):
        """`local`: a stage of no layers with embedding and head. `open_row`: opens the layers, in order, on nodes; it is
        told how often each node was lost. DeviceError or MemoryLimitError if no nodes can hold them. `on_close`: called by
        `close`.
        """
        self.config, self.layers = config, range(config.n_layers)
        self.lost: Callable[[str], None] = lambda words: None  # told when a node is lost, and when its layers are elsewhere
        self.opened = 0  # how often a row of nodes was opened
        self._interrupted = False
        self._local, self._open_row, self._secret, self._on_close = local, open_row, secret, on_close
        self._numbers = itertools.count(1)
        self._under_way: dict[int, Batch] = {}
        self._free: list[int] = []
        self._row: Row | None = None
        self._losses: Counter = Counter()  # by the node's name
        self._open()

    # device.Stage

    @property
    def alone(self) -> bool:
        """Whether each token's result is to have the bits that it has alone."""
        return self._local.alone

    @alone.setter
    def alone(self, alone: bool) -> None:
        self._local.alone = alone

    @property
    def fetches(self) -> bool:
        """Whether a node reads experts while it computes."""
        return any(place.fetches for place in self.places)

    @property
    def places(self) -> Sequence[Place]:
        """The nodes in use, in the order of their layers."""
        return self._row.places if self._row else ()

    @property
    def notices(self) -> list[str]:
        return [*self._local.notices, *(notice for place in self.places for notice in place.notices)]

    @property
    def bytes_per_token(self) -> int:
        return self._local.bytes_per_token + sum(place.bytes_per_token for place in self.places)

    @property
    def products_per_token(self) -> int:
        return sum(place.products_per_token for place in self.places)

    def new_cache(self, ctx: int) -> ClusterCache:
        """An empty cache; the nodes make theirs when its first tokens come."""
        return ClusterCache(self, ctx)

    def forward(self, x: Tokens, runs: Sequence[Run]) -> Rows:
        """Send the batch on its way. Waits only while as many batches as there are nodes, and one more, are under way."""
        batch = Batch(next(self._numbers), x, [(run.cache, run.cache.pos, run.n) for run in runs], self.alone)
        self._under_way[batch.number] = batch
        self._guarded(self._make_way)
        return Rows(self, batch)

    def logits(self, x: "Rows | np.ndarray", first: int = 0) -> np.ndarray:
        """Logits of the rows x[first:], computed here."""
        if isinstance(x, Rows) and first == len(x) - 1:
            return self._local.logits(x.last())
        return self._local.logits(np.asarray(x), first)

    def interrupt(self) -> None:
        """Make the running call raise KeyboardInterrupt soon."""
        self._interrupted = True
        self._local.interrupt()
        if row := self._row:
            row.inbox.put(None)  # wakes who waits

    def resume(self) -> None:
        """Forget an interrupt, and batches that nobody waited for."""
        self._interrupted = False
        self._local.resume()
        self.abandon()

    def abandon(self) -> None:
        """Forget what is under way. Its caches go back to before it: the nodes may or may not have written there."""
        if not self._under_way:
            return
        for batch in self._under_way.values():
            for cache, pos, _ in batch.runs if not batch.repeats else ():
                cache.pos = min(cache.pos, pos)
        last = max(self._under_way)
        self._under_way.clear()
        if row := self._row:
            row.stop(last)

    def shrink(self, nbytes: int) -> int:
        """Nothing of it is here."""
        return 0

    def chosen(self, n: int) -> np.ndarray:
        """The experts that the last batch's tokens chose (device.Stage)."""
        self._guarded(self._finish)
        return np.concatenate([self._row.ask(k, "chosen", {"n": n}).arrays[0] for k in range(len(self._row.places))])

    def watch(self) -> list:
        raise errors.UsageError("expected a model on this machine alone, found a cluster; leave --cluster out")

    def take_io_stats(self) -> IoStats | None:
        """What all nodes read since the last call."""
        if self._row is None or not self.fetches:
            return None
        try:
            found = [self._row.ask(k, "io").head["answer"] for k in range(len(self._row.places))]
        except LlamacliError:  # a count is not worth an answer's end
            return None
        return sum((IoStats(**counts) for counts in found if counts), start=IoStats())

    def after_fork(self) -> None:
        """A forked child has no links."""
        self._row = None

    def close(self) -> None:
        """Close the links."""
        if self._row:
            self._row.close()
        self._row = None
        self._local.close()
        if self._on_close:
            self._on_close()

    # caches

    def free(self, number: int) -> None:
        """Have the nodes forget a cache, with the next batch."""
        self._free.append(number)

    def held_bytes(self) -> int:
        """Bytes of keys and values on all nodes."""
        return sum(self._row.ask(k, "held").head["answer"] for k in range(len(self._row.places))) if self._row else 0

    def ask_for(self, layer: int, op: str, head: dict, arrays: Sequence[np.ndarray] = ()) -> Frame:
        """Ask the node of a layer."""
        self._guarded(self._finish)
        return self._row.ask(next(k for k, place in enumerate(self.places) if layer in place.layers), op, head, arrays)

    # batches

    def rows(self, batch: Batch, whole: bool) -> np.ndarray:
        """A batch's result; `whole`: all rows, else perhaps only each run's last."""
        return self._guarded(self._rows, batch, whole)

    def _rows(self, batch: Batch, whole: bool) -> np.ndarray:
        while batch.result is None:
            if batch.number not in self._under_way:
                raise KeyboardInterrupt
            self._receive()
        if whole and len(batch.result) < len(batch.tokens.ids):
            try:
                batch.result = self._row.ask(len(self._row.places) - 1, "rows", {"id": batch.number}).arrays[0]
            except NodeLost:
                batch.result, batch.sent, self._under_way[batch.number] = None, False, batch
                raise
        return batch.result

    def _finish(self) -> None:
        while self._under_way:
            self._receive()

    def _make_way(self) -> None:
        while sum(batch.sent for batch in self._under_way.values()) > len(self._row.places) + 1:
            self._receive()

    def _send_waiting(self) -> None:
        """Send what is under way and not sent, each after what its caches' nodes do not hold yet."""
        for _, batch in sorted(self._under_way.items()):
            if not batch.sent:
                for cache, pos, _ in batch.runs:
                    if cache.opened != self.opened:
                        self._evaluate_again(cache, pos)
                self._send(batch)

    def _send(self, batch: Batch) -> None:
        self._under_way[batch.number], batch.sent = batch, True
        x = np.array(self._local.forward(batch.tokens, [Run(None, len(batch.tokens.ids))]))
        head = {"id": batch.number, "alone": batch.alone, "runs": [[c.number, c.ctx, pos, n] for c, pos, n in batch.runs]}
        free, self._free = self._free, []
        with suppress(LinkClosed):  # whoever waits for the result learns of it
            if free:
                self._row.tell("free", {"caches": free})
            self._row.links[0].send(head, [x])

    def _receive(self) -> None:
        """Take the next result. NodeLost, KeyboardInterrupt, or what a node raised."""
        try:
            item = self._row.inbox.get(timeout=PING_EVERY)
        except queue.Empty:
            item = None
        if self._interrupted:
            raise KeyboardInterrupt
        if item is None and self._row.lost:
            raise self._row.lost
        batch = item and self._under_way.get(item.head["id"])
        if batch is None:  # of a call that was interrupted
            return
        if "error" in item.head:
            raise node_error(*item.head["error"])
        batch.result = item.arrays[0]
        del self._under_way[batch.number]
        first, total = 0, len(batch.tokens.ids)
        for cache, pos, n in batch.runs:
            rows = {at - first: row for at, row in batch.tokens.rows.items() if first <= at < first + n}
            single = n == 1 and (total < FEW or batch.alone)
            cache.take(Piece(pos, Tokens(batch.tokens.ids[first : first + n], rows), batch.alone or single))
            first += n

    # a node is lost

    def _open(self) -> None:
        self._row = Row(self._open_row(self._losses), self._secret)
        self.opened += 1

    def _guarded(self, work: Callable, *args):
        """work(*args), again after each lost node, while the layers find a place."""
        lost = began = None
        while True:
            try:
                if self._row is None:
                    self._open()
                    self._send_waiting()
                    if lost:
                        words = ", ".join(f"{p.layers.start}-{p.layers.stop - 1} on {p.name}" for p in self.places)
                        self.lost(f"goes on after {time.monotonic() - began:.1f} s: layers {words}")
                        lost = None
                self._send_waiting()
                return work(*args)
            except NodeLost as error:
                lost, began = error, began or time.monotonic()
                self.lost(f"{lost}; its layers are opened anew")
                self._losses[lost.name] += 1
                if self._row:
                    self._row.close()
                self._row = None
                self._under_way = {number: batch for number, batch in self._under_way.items() if not batch.repeats}
                for batch in self._under_way.values():
                    batch.sent = False
            except BaseException:
                self.abandon()
                raise

    def _evaluate_again(self, cache: ClusterCache, end: int) -> None:
        """Have the nodes make a cache's keys and values below `end` anew, in the batches of the first time."""
        pieces, cache.pieces, cache.opened = cache.pieces, [], self.opened
        try:
            for part, start, alone in _parts(pieces, end, self.config.chunk_size):
                self._send(Batch(next(self._numbers), part, [(cache, start, len(part.ids))], alone, repeats=True))
                self._make_way()
            while any(batch.repeats for batch in self._under_way.values()):
                self._receive()
        except BaseException:
            cache.pieces, cache.opened = pieces, 0
            raise
        if end and (not cache.pieces or cache.pieces[-1].start + len(cache.pieces[-1].tokens.ids) < end):
            cache.pieces, cache.opened = pieces, 0
            raise DeviceError("a conversation whose beginning was read from a snapshot is lost with its node; ask again")


def _parts(pieces: Sequence[Piece], end: int, chunk: int) -> Iterator[tuple[Tokens, int, bool]]:
    """The batches of pieces below `end`: tokens, first position, whether the bits are those of single tokens."""
    for start, tokens, alone in pieces:
        at, n = 0, len(tokens.ids)
        while at < n and start + at < end:
            step = n - at
            if alone and not tokens.rows:
                step = min(step, AGAIN, end - start - at, chunk - (start + at) % chunk if chunk else AGAIN)
            yield Tokens(tokens.ids[at : at + step], tokens.rows), start + at, alone
            at += step
