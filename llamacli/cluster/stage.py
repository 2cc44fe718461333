"""The layers of a cluster as one stage of the engine: the embedding and the head are here, the layers on a row of nodes.

In: tokens and caches, as device.Stage has them. Out: a `Rows` that waits for its result when it is read, so that the batches of
a prompt pass through the nodes as a pipeline; logits. Keys and values are on the nodes. A cache here has the positions and the
record of evaluated batches: when a node is lost, the layers are opened again and the same batches are evaluated again, which
gives the same bits. `Link`s and nodes: wire.py, node.py.
"""

import itertools
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np

from llamacli import errors
from llamacli.cluster.cache import FEW, ClusterCache, Piece, covered, parts
from llamacli.cluster.row import PING_EVERY, NodeLost, Place, Row, node_error
from llamacli.cluster.wire import Frame, LinkClosed
from llamacli.cpu.buffers import MAX_BATCH
from llamacli.device import Abandoned, IoStats, Run, Tokens
from llamacli.errors import DeviceError, LlamacliError
from llamacli.positions import Positions

FORGET = 300.0  # seconds after which a loss of a node no longer counts
LOOK_EVERY = 10.0  # seconds between checks for nodes that are available again


class Batch:
    """Tokens under way through the nodes."""

    def __init__(
        self, number: int, tokens: Tokens, runs: Sequence[tuple[ClusterCache, int, int]], alone: bool, repeats: bool = False
    ):
        """`runs`: cache, first position, tokens. `repeats`: whether it only recomputes keys and values."""
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

    def ends(self) -> np.ndarray:
        """The last row of each run, [n_runs, n_embd]."""
        found, runs = self._stage.rows(self._batch, whole=False), self._batch.runs
        return found if len(found) == len(runs) else found[np.cumsum([n for *_, n in runs]) - 1]


class ClusterStage:
    """All layers of a model (device.Stage), on nodes that `open_row` finds."""

    follow = timings = None

    def __init__(
        self,
        local,
        config,
        open_row: Callable[[Counter], Sequence[Place]],
        secret: bytes,
        on_close: Callable[[], None] | None = None,
        there_again: Callable[[Counter], Sequence[str]] = lambda losses: (),
    ):
        """`local`: a stage of no layers with embedding and head. `open_row`: opens the layers, in order, on nodes; it is
        told how often each node was lost within FORGET seconds. DeviceError or MemoryLimitError if no nodes can hold them.
        `on_close`: called by `close`. `there_again`: names of nodes that the last opening could not use and the next can.
        """
        self.config, self.layers = config, range(config.n_layers)
        self.lost: Callable[[str], None] = lambda words: None  # called with a line about a loss
        self.opened = 0  # number of rows of nodes opened so far
        self._interrupted = False
        self._local, self._open_row, self._secret, self._on_close = local, open_row, secret, on_close
        self._numbers = itertools.count(1)
        self._under_way: dict[int, Batch] = {}
        self._free: list[int] = []
        self._row: Row | None = None
        self._losses: list[tuple[float, str]] = []  # time and name of lost nodes
        self._there_again, self._returned, self._looking, self._closed = there_again, (), False, False
        self._open()

    # device.Stage

    @property
    def alone(self) -> bool:
        """Whether each token's result must have the bits of a call of its own."""
        return self._local.alone

    @alone.setter
    def alone(self, alone: bool) -> None:
        self._local.alone = alone

    @property
    def fetches(self) -> bool:
        """Whether a node reads experts while it computes."""
        return any(place.fetches for place in self.places)

    @property
    def most(self) -> int:
        """The most tokens of a batch for which all nodes have memory."""
        return min((place.batch for place in self.places), default=MAX_BATCH)

    @property
    def alike(self) -> int:
        """The smallest `alike` of all nodes, whose processors may differ, and of the head here."""
        return min([self._local.alike, *(place.alike for place in self.places)])

    @property
    def depth(self) -> int:
        """The number of batches under way that keeps all nodes busy."""
        seconds = [place.seconds for place in self.places]
        return max(1, round(sum(seconds) / max(seconds))) if any(seconds) else 1

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
        """Send the batch to the first node. Waits only while more batches than nodes are under way."""
        if self._returned and not self._under_way and not self.alone and max(run.n for run in runs) >= FEW:
            self._divide_anew()  # at the start of a prompt, evaluating a conversation again costs least
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
            row.inbox.put(None)  # wakes the waiting thread

    def resume(self) -> None:
        """Clear an interrupt."""
        self._interrupted = False
        self._local.resume()

    def abandon(self) -> None:
        """Forget the batches under way and truncate their caches to before them: the nodes may have written later positions."""
        if not self._under_way:
            return
        back: dict[ClusterCache, int] = {}
        for batch in self._under_way.values():
            batch.result = None
            for cache, pos, _ in batch.runs if not batch.repeats else ():
                back[cache] = min(back.get(cache, pos), pos)
        for cache, pos in back.items():
            Positions.truncate(cache, pos)  # further back if a later batch may have overwritten a ring
        last = max(self._under_way)
        self._under_way.clear()
        if row := self._row:
            row.stop(last)

    def abandon_after(self, cache: ClusterCache, pos: int) -> None:
        """Forget what is under way if it writes to a cache at `pos` or beyond: an interrupted call does not wait for it.
        Another thread's call may go on meanwhile.
        """
        if any(
            own is cache and start + n > pos
            for batch in [*self._under_way.values()]
            for own, start, n in (() if batch.repeats else batch.runs)
        ):
            self.abandon()

    def shrink(self, nbytes: int) -> int:
        """Returns 0: the weights are on the nodes."""
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
        except LlamacliError:  # an error of the statistics must not end an answer
            return None
        return sum((IoStats(**counts) for counts in found if counts), start=IoStats())

    def after_fork(self) -> None:
        """A forked child has no links."""
        self._row = None

    def close(self) -> None:
        """Close the links."""
        self._closed = True
        if self._row:
            self._row.close()
        self._row = None
        self._local.close()
        if self._on_close:
            self._on_close()

    # caches

    def free(self, number: int) -> None:
        """Tell the nodes, with the next batch, to free a cache."""
        self._free.append(number)

    def held_bytes(self) -> int:
        """Bytes of keys and values on all nodes."""
        return sum(self._row.ask(k, "held").head["answer"] for k in range(len(self._row.places))) if self._row else 0

    def ask_for(self, layer: int, op: str, head: dict, arrays: Sequence[np.ndarray] = ()) -> Frame:
        """Ask the node of a layer about keys and values; again if it is lost. The next one has none of them, and that is no
        wrong copy: a copy knows in which row of nodes its original was (ClusterCache.opened).
        """
        return self._guarded(self._ask, layer, op, head, arrays)

    def _ask(self, layer: int, op: str, head: dict, arrays: Sequence[np.ndarray]) -> Frame:
        self._finish()
        return self._row.ask(next(k for k, place in enumerate(self.places) if layer in place.layers), op, head, arrays)

    # batches

    def rows(self, batch: Batch, whole: bool) -> np.ndarray:
        """A batch's result. `whole`: all rows; else possibly only each run's last."""
        return self._guarded(self._rows, batch, whole)

    def _rows(self, batch: Batch, whole: bool) -> np.ndarray:
        while batch.result is None:
            if batch.number not in self._under_way:
                raise Abandoned("given up with another answer; ask again")
            self._receive()
        if whole and len(batch.result) < len(batch.tokens.ids):
            try:
                found = self._row.ask(len(self._row.places) - 1, "rows", {"id": batch.number})
                batch.result = self._stream_of(found, len(batch.tokens.ids))
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
        """Send the unsent batches, each after the batches that restore its caches on the nodes."""
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
        with suppress(LinkClosed):  # the reader of the result gets the error
            if free:
                self._row.tell("free", {"caches": free})
            self._row.links[0].send(head, [x])

    def _receive(self) -> None:
        """Take the next result. NodeLost, KeyboardInterrupt, or the exception of a node."""
        try:
            item = self._row.inbox.get(timeout=PING_EVERY)
        except queue.Empty:
            item = None
        if self._interrupted:
            raise KeyboardInterrupt
        if item is None and self._row.lost:
            raise self._row.lost
        number = item and item.head.get("id")
        batch = self._under_way.get(number) if isinstance(number, int) else None
        if batch is None:  # the batch of an interrupted call
            return
        if "error" in item.head:
            raise node_error(item)
        batch.result = self._stream_of(item, len(batch.tokens.ids), len(batch.runs))
        first, total = 0, len(batch.tokens.ids)
        for cache, pos, n in batch.runs:
            rows = {at - first: row for at, row in batch.tokens.rows.items() if first <= at < first + n}
            single = n == 1 and (total < FEW or batch.alone)
            cache.take(Piece(pos, Tokens(batch.tokens.ids[first : first + n], rows), batch.alone or single))
            first += n
        del self._under_way[batch.number]  # last: what an interrupt leaves under way is forgotten by `abandon`

    def _stream_of(self, frame: Frame, *lengths: int) -> np.ndarray:
        """The stream that the last node sent, of one of these lengths. NodeLost if it sent something else."""
        found = frame.arrays[0] if len(frame.arrays) == 1 else np.empty(0)
        if found.dtype != np.float32 or found.shape not in [(n, self.config.n_embd) for n in lengths]:
            raise NodeLost(self._row.places[-1].name, "it sent what is no result")
        return found

    # a node is lost

    def _open(self) -> None:
        self.opened += 1  # first: no cache may count as held by nodes that have just begun
        self._row = Row(self._open_row(self._recent_losses()), self._secret)

    def _leave_row(self) -> None:
        """Close the row; the batches under way are sent to the next row."""
        row, self._row = self._row, None  # first, so that no result of a closed row is taken
        self._under_way = {number: batch for number, batch in self._under_way.items() if not batch.repeats}
        for batch in self._under_way.values():
            batch.sent = False
        if row:
            row.close()

    def _recent_losses(self) -> Counter:
        return Counter(name for at, name in self._losses if time.monotonic() - at < FORGET)

    def _look_out(self) -> None:
        """After a loss: check whether lost nodes are available again."""
        while not self._closed:
            time.sleep(LOOK_EVERY)
            with suppress(Exception):  # the control plane may be closing
                self._returned = tuple(self._there_again(self._recent_losses()))

    def _divide_anew(self) -> None:
        self.lost(f"node {', '.join(self._returned)} is available again; the layers are divided again")
        self._returned = ()
        self._leave_row()

    def _guarded(self, work: Callable, *args):
        """Call work(*args), again after each lost node, as long as the layers can be placed."""
        lost = began = None
        while True:
            try:
                if self._row is None:
                    self._open()
                    self._send_waiting()
                    if lost:
                        words = ", ".join(f"{p.layers.start}-{p.layers.stop - 1} on {p.name}" for p in self.places)
                        self.lost(f"continues after {time.monotonic() - began:.1f} s: layers {words}")
                        lost = None
                        if not self._looking:
                            self._looking = True
                            threading.Thread(target=self._look_out, daemon=True).start()
                self._send_waiting()
                return work(*args)
            except NodeLost as error:
                lost, began = error, began or time.monotonic()
                self.lost(f"{lost}; its layers are opened again")
                self._losses.append((time.monotonic(), lost.name))
                self._leave_row()
            except BaseException:
                self.abandon()
                raise

    def _evaluate_again(self, cache: ClusterCache, end: int) -> None:
        """Let the nodes recompute a cache's keys and values below `end`, in the original batches."""
        pieces = cache.pieces
        if not covered(pieces, end):
            raise DeviceError("a conversation of which a part was not evaluated here is lost with its node; ask again")
        try:
            cache.pieces = []
            for part, start, alone in parts(pieces, end, self.config.chunk_size):
                self._send(Batch(next(self._numbers), part, [(cache, start, len(part.ids))], alone, repeats=True))
                self._make_way()
            while any(batch.repeats for batch in self._under_way.values()):
                self._receive()
            cache.opened = self.opened
        except BaseException:
            cache.pieces = pieces
            raise
