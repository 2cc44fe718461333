"""Distributes a conversion's tensors as tasks over the nodes of a cluster, and repeats the tasks of lost nodes.

In: planned tensors; nodes that have opened their copies of the source (encoding.py). Out: encoded pieces in file order, as if
they had been encoded here. Rows of each tensor are divided into tasks. A ready node gets tasks, two at a time, so faster nodes
do more of them. At most WINDOW results per node wait here for earlier ones. A node that died, does not answer or makes no
progress is reported and opened again, while others do its tasks; a node that joins later is used, too. If a node reports an
error, the task is done here: if that succeeds, the node is at fault and gets no more tasks.
"""

import itertools
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from llamacli.cluster import copies, host, progress
from llamacli.cluster.wire import Frame, Link, LinkClosed, connect
from llamacli.errors import DeviceError
from quantize.encoders import widen
from quantize.opening import Source
from quantize.pieces import Encoded, Piece, PieceEncoder, pieces
from quantize.plan import Planned
from quantize.sources import groups_and_rows

RESULT = 4 << 20  # approximate bytes of a task's result
HELD = 2  # tasks that a node holds: one is encoded, one is on its way
WINDOW = 12  # tasks per node between the first unfinished one and the last one sent
PING_EVERY, PATIENCE = 1.0, 15.0  # seconds between pings; seconds without a byte after which a node counts as lost
CLOSE = 1e-3  # relative: sums of squares are float32 within a row
AGAIN = 5.0  # seconds until the next attempt to open a lost node
LOOK_EVERY = 30.0  # seconds between checks for nodes that have joined

Open = Callable[..., dict[str, dict | Exception]]  # opens the source on the named nodes, or all but `skip`: control.encoders


class Task:
    """Rows of a tensor to encode. `result`: the pieces, or the error text of a node."""

    numbers = itertools.count(1)

    def __init__(self, tensor: Planned, part: Piece, weights: np.ndarray | None):
        self.tensor, self.part, self.weights = tensor, part, weights
        self.number, self.result, self.by = next(self.numbers), None, ""

    @property
    def frame(self) -> tuple[dict, list[np.ndarray]]:
        """The frame for a node."""
        head = {"call": self.number, "name": self.tensor.name, "type": self.tensor.type.name, "rows": list(self.part)}
        return head, [] if self.weights is None else [self.weights]


class Worker:
    """A ready node and the tasks that it holds."""

    def __init__(self, name: str, link: Link, pid: int):
        self.name, self.link, self.pid = name, link, pid
        self.held: dict[int, Task] = {}


class Tasks:
    """Encodes on the nodes of a cluster (pieces.Elsewhere)."""

    def __init__(self, open_nodes: Open, secret: bytes, told: Callable[[str], None]):
        """`told`: called with a line about a node that is left out, lost or available again."""
        self._open_nodes, self._secret, self._told = open_nodes, secret, told
        self.done: dict[str, int] = {}
        self.workers: dict[str, Worker] = {}
        self._todo: deque[Task] = deque()
        self._changed = threading.Condition()  # held while any of this changes
        self._opening: set[str] = set()  # lost nodes that are tried for the first time again
        self._lost: set[str] = set()  # lost nodes that are tried again
        self._refused: set[str] = set()
        self._closed = False

    def begin(self, path: Path, source: Source, encode: PieceEncoder) -> int:
        """Open the source on all nodes that have the same copy (pieces.Elsewhere). DeviceError if none has."""
        self._encode = encode
        self._how = {"path": os.path.abspath(path), "made_by": host.version(), "digest": copies.source_digest(source)}
        why = self._open(None)
        if not self.workers:
            raise DeviceError("; ".join(why) or "expected a node that encodes, found none; see `llamacli cluster status`")
        for words in why:
            self._told(f"{words}; it is left out")
        threading.Thread(target=self._ping, daemon=True).start()
        threading.Thread(target=self._look_out, args=(set(why),), daemon=True).start()
        return (WINDOW + HELD) * RESULT * len(self.workers)

    def close(self) -> None:
        """End all links."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            for worker in self.workers.values():
                worker.link.close()

    def encoded(self, tensor: Planned, weights: np.ndarray | None) -> Iterator[Encoded]:
        """As pieces.Threads.encoded."""
        waiting: deque[Task] = deque()
        try:
            for part in parts(tensor):
                task = Task(tensor, part, None if weights is None else np.ascontiguousarray(weights[part.group]))
                waiting.append(task)
                with self._changed:
                    self._todo.append(task)
                    self._changed.notify_all()
                if len(waiting) >= WINDOW * max(1, len(self.workers)):
                    yield from self._result(waiting.popleft())
            while waiting:
                yield from self._result(waiting.popleft())
        finally:
            with self._changed:
                self._todo.clear()

    def _result(self, task: Task) -> list[Encoded]:
        """Wait for the pieces of a task."""
        with self._changed:
            while task.result is None:
                if not self.workers and not self._opening:
                    raise DeviceError("expected a node that encodes, found none left; see `llamacli cluster status`")
                self._changed.wait(1.0)
        if isinstance(task.result, str):
            words, task.result = task.result, self._made_here(task)
            self._refuse(task.by, words)
        else:
            made = sum(encoded.nbytes for encoded, _ in task.result)
            self.done[task.by] = self.done.get(task.by, 0) + made
        return task.result

    def _made_here(self, task: Task) -> list[Encoded]:
        """Encode a task from this machine's copy; errors are those of the source."""
        tensor = task.tensor
        return [
            self._encode(tensor.name, tensor.type, tensor.source, piece, task.weights)
            for piece in pieces(tensor.source, task.part)
        ]

    # nodes

    def _open(self, names: list[str] | None) -> list[str]:
        """Open the source on nodes and give them tasks; returns the reasons of those that cannot."""
        why, skip = [], {*self.workers, *self._lost, *self._refused}
        for name, facts in self._open_nodes(names, () if names else tuple(skip), **self._how).items():
            try:
                if isinstance(facts, Exception):
                    raise facts
                worker = Worker(name, connect(facts["address"], self._secret, "encode"), facts["pid"])
            except Exception as error:
                why.append(f"node {name}: {error}")
                continue
            with self._changed:
                if self._closed:
                    worker.link.close()
                    return why
                self.workers[name] = worker
            for work in (self._give, self._take):
                threading.Thread(target=work, args=(worker,), daemon=True).start()
        return why

    def _give(self, worker: Worker) -> None:
        """Send tasks to a node whenever it holds fewer than HELD."""
        while True:
            with self._changed:
                while not self._gone(worker) and not (self._todo and len(worker.held) < HELD):
                    self._changed.wait()
                if self._gone(worker):
                    return
                task = self._todo.popleft()
                worker.held[task.number] = task
            with suppress(LinkClosed):  # the receiving thread reports it
                worker.link.send(*task.frame)

    def _take(self, worker: Worker) -> None:
        """Receive the answers of a node."""
        while isinstance(frame := worker.link.received.get(), Frame):
            if progress.hangs(frame.head):
                return self._lose(worker, progress.WHY)
            call = frame.head.get("call")
            if (task := next((task for task in list(worker.held.values()) if task.number == call), None)) is None:
                continue
            try:
                result = "{}: {}".format(*frame.head["error"]) if "error" in frame.head else _believed(task, frame)
            except Exception as error:  # an answer may have any content
                result = f"an answer that cannot be: {error}"
            with self._changed:
                if self._gone(worker):  # lost meanwhile: another node does this task
                    return
                del worker.held[task.number]
                task.result, task.by = result, worker.name
                self._changed.notify_all()
        died = "closed" in str(frame) or "reset" in str(frame)
        self._lose(worker, "it died" if died else str(frame))

    def _gone(self, worker: Worker) -> bool:
        return self._closed or self.workers.get(worker.name) is not worker

    def _lose(self, worker: Worker, why: str, again: bool = True) -> None:
        """Remove a node and give its tasks to others; try to open it again."""
        with self._changed:
            if self._gone(worker):
                return
            del self.workers[worker.name]
            self._todo.extendleft(sorted(worker.held.values(), key=lambda task: -task.number))
            if again:
                self._opening.add(worker.name)
                self._lost.add(worker.name)
            self._changed.notify_all()
        worker.link.close()
        if again:
            self._told(f"node {worker.name}: {why}; others do its part")
            threading.Thread(target=self._open_again, args=(worker.name,), daemon=True).start()

    def _refuse(self, name: str, words: str) -> None:
        if name not in self._refused:
            self._refused.add(name)
            self._told(f"node {name} is left out: it failed to encode what this machine could: {words}")
        if worker := self.workers.get(name):
            self._lose(worker, words, again=False)

    def _open_again(self, name: str) -> None:
        """Try to open a node until it is available, or until the end. If no other node is left, only the first attempt is
        waited for.
        """
        while not self._closed and name not in self._refused:
            began = time.monotonic()
            with suppress(Exception):  # the control plane may be closing
                self._open([name])
            with self._changed:
                self._opening.discard(name)
                back = name in self.workers
                self._changed.notify_all()
            if back:
                self._lost.discard(name)
                self._told(f"node {name} is available again")
                return
            self._ended(began + AGAIN - time.monotonic())

    def _ended(self, seconds: float) -> bool:
        """Wait up to some seconds; returns whether this was closed."""
        with self._changed:
            return self._changed.wait_for(lambda: self._closed, max(0.0, seconds))

    def _look_out(self, said: set[str]) -> None:
        """Use nodes that join, and those that did not answer before. `said`: the lines already shown about them."""
        while not self._ended(LOOK_EVERY):
            before = set(self.workers)
            with suppress(Exception):  # the control plane may be closing
                for words in set(self._open(None)) - said:
                    said.add(words)
                    self._told(f"{words}; it is left out")
            for name in sorted(set(self.workers) - before - self._lost):
                self._told(f"node {name} encodes, too")

    def _ping(self) -> None:
        while not self._closed:
            asked = time.monotonic()
            for worker in list(self.workers.values()):
                with suppress(LinkClosed):
                    worker.link.send({"ping": 1})
            time.sleep(PING_EVERY)
            now = time.monotonic()
            for worker in list(self.workers.values()):
                if now - asked > PING_EVERY + 1:  # this program was suspended, for example by Ctrl-Z, and not the nodes
                    worker.link.heard = now
                elif now - max(worker.link.heard, worker.link.moved) > PATIENCE:
                    self._lose(worker, f"no answer for {PATIENCE:.0f} s")


def parts(tensor: Planned) -> Iterator[Piece]:
    """The rows of each task: pieces of a group with about RESULT encoded bytes."""
    n_groups, n_rows = groups_and_rows(tensor.shape)
    piece = next(pieces(tensor.source))
    nbytes = tensor.type.row_bytes(tensor.shape[-1]) * piece.count
    step = piece.count * max(1, RESULT // nbytes)
    for group in range(n_groups):
        for first in range(0, n_rows, step):
            yield Piece(group, first, min(step, n_rows - first))


def _believed(task: Task, frame: Frame) -> list[Encoded]:
    """An answer's pieces. ValueError or TypeError if they cannot be the requested ones.

    The check: by the triangle inequality, the norms of the decoded rows q and of the weights x differ at most by the error: |
    |q| - |x| | <= |x - q|. Bytes of other weights, and bytes that decode to NaN, fail it.
    """
    kind, n_cols, found = task.tensor.type, task.tensor.shape[-1], []
    asked = list(pieces(task.tensor.source, task.part))
    for piece, array, (wrong, whole) in zip(asked, frame.arrays, frame.head["errors"], strict=True):
        if array.dtype != np.uint8 or array.size != piece.count * kind.row_bytes(n_cols):
            raise ValueError("an answer of another size than was asked for")
        decoded = np.empty((piece.count, n_cols), np.float32)
        widen.blocks(kind.name, array.reshape(piece.count, -1), decoded)
        _, energy = widen.squares(decoded, decoded)
        lengths = math.sqrt(energy), math.sqrt(whole)  # ValueError for a negative one
        if not abs(lengths[0] - lengths[1]) <= (1 + CLOSE) * math.sqrt(wrong) + CLOSE * lengths[1]:
            raise ValueError("an answer whose bytes are not those of its weights")
        found.append((array, (float(wrong), float(whole))))
    return found
