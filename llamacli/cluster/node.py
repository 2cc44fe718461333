"""A node: some layers of a model behind a socket. It applies them to incoming batches and sends the results to the next node.

In: the node's own copy of the file, a range of layers, the cluster's secret; frames of the residual stream. Out: frames to the
next node or, from the last one, to the program (stage.py). Links to a node have a role, named by their first frame:

    stream    the residual stream from the node before, or from the program to the first node
    sink      results from the last node to the program
    control   the program's questions, each with a number, and its pings

A frame of the stream has the head {"id", "runs": [[cache, ctx, pos, n], ...], "alone"}. The answer to a ping has "stalled", the
seconds for which a batch under way has made no progress (progress.py).
"""

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np

from llamacli.cluster.progress import Progress
from llamacli.cluster.wire import QUEUED, Frame, Link, LinkClosed, Listener, connect
from llamacli.cpu.buffers import MAX_BATCH
from llamacli.device import Run

WHOLE = 32  # rows up to which the last node sends all of a batch; of longer ones each run's last row, the others on demand


class Node:
    """Serves a stage until `close`."""

    def __init__(self, stage, secret: bytes, host: str, last: bool, most: int = MAX_BATCH):
        """`stage`: a device.Stage without embedding and head. `host`: the only address to listen on. `last`: whether no layers
        follow. `most`: tokens for which this node's memory is planned; longer batches are evaluated in parts.
        """
        self._stage, self._secret, self._last, self._most = stage, secret, last, most
        self._chosen: list[np.ndarray] = []  # experts of the parts of the last batch, if it had parts
        self._caches: dict[int, object] = {}
        self._busy = threading.Lock()  # held while the stage or its caches are used
        self._incoming: queue.Queue = queue.Queue(QUEUED)
        self._next: Link | None = None
        self._controls: list[Link] = []
        self._stopped = 0  # batches up to this number are cancelled
        self._kept: tuple[int, np.ndarray | None] = 0, None  # the last batch's number and rows, if they were not sent whole
        self._closed = False
        self._computing: int | None = None  # the number of the batch under way here
        self._progress = Progress()
        self._linked = threading.Event()  # set once the link to the receiver is open
        self._listener = Listener(host, secret, self._welcome)
        self.address = self._listener.address
        threading.Thread(target=self._compute, daemon=True, name="compute").start()

    def close(self) -> None:
        """Stop listening and release the stage."""
        self._closed = True
        self._listener.close()
        self._linked.set()
        with suppress(queue.Full):
            self._incoming.put_nowait(None)
        for link in (self._next, *self._controls):
            if link:
                link.close()
        self._stage.interrupt()
        with self._busy:
            self._caches.clear()
            self._kept = 0, None
            self._stage.close()

    # links

    def _welcome(self, link: Link, role: str | None) -> None:
        if role == "control":
            self._controls.append(link)
            self._answer(link)
        elif role == "sink":
            self._next = link
            self._linked.set()
        elif role == "stream":
            while isinstance(frame := link.received.get(), Frame):
                self._incoming.put(frame)
        else:
            link.close()

    def _answer(self, link: Link) -> None:
        """Answer the program's questions until its link is closed."""
        while isinstance(frame := link.received.get(), Frame):
            what, call = frame.head.get("op"), frame.head.get("call")
            if what == "stop":
                self._stopped = max(self._stopped, int(frame.head["id"]))
                self._stage.interrupt()
                continue
            if what == "ping":
                link.send({"call": call, "answer": None, "stalled": self._progress.stalled(self._computing)})
            else:  # it may wait for the running batch, but pings must not
                threading.Thread(target=self._do, args=(link, what, call, frame), daemon=True).start()
        link.close()
        self._controls.remove(link)

    def _do(self, link: Link, what: str, call: int, frame: Frame) -> None:
        with suppress(LinkClosed):
            try:
                answer = getattr(self, f"_op_{what}")(frame)
                head, arrays = answer if isinstance(answer, tuple) else (answer, ())
                link.send({"call": call, "answer": head}, arrays)
            except Exception as error:  # the program gets any error of its question
                link.send({"call": call, "error": [type(error).__name__, str(error)]})

    def _op_next(self, frame: Frame) -> str | None:
        """Connect to the next node; returns the reason if that fails."""
        try:
            self._next = connect(frame.head["address"], self._secret, "stream")
        except LinkClosed as error:
            return str(error)
        self._linked.set()
        return None

    def _op_free(self, frame: Frame):
        with self._busy:
            for number in frame.head["caches"]:
                self._caches.pop(number, None)

    def _op_rows(self, frame: Frame):
        with self._busy:
            number, rows = self._kept
            if number != frame.head["id"]:
                raise ValueError(f"rows of batch {frame.head['id']} are gone")
            return None, [np.array(rows)]

    def _op_chosen(self, frame: Frame):
        with self._busy:
            found = self._chosen or [self._stage.chosen(int(frame.head["n"]))]
            return None, [np.concatenate(found, axis=1)]

    def _op_io(self, frame: Frame):
        with self._busy:
            found = self._stage.take_io_stats()
        return found and vars(found)

    def _op_held(self, frame: Frame):
        with self._busy:
            return sum(cache.nbytes for cache in self._caches.values())

    def _op_export(self, frame: Frame):
        layer, start, end = (int(frame.head[name]) for name in ("layer", "start", "end"))
        with self._busy:
            cache = self._cache(frame.head["cache"], int(frame.head["ctx"]))
            cache.pos = int(frame.head["pos"])
            return None, [*cache.export(layer, start, end)]

    def _op_restore(self, frame: Frame):
        layer, start = int(frame.head["layer"]), int(frame.head["start"])
        with self._busy:
            cache = self._cache(frame.head["cache"], int(frame.head["ctx"]))
            cache.pos = int(frame.head["pos"])
            cache.reserve(int(frame.head["reserved"]))
            cache.restore(layer, start, *frame.arrays)

    def _op_export_segments(self, frame: Frame):
        with self._busy:
            cache = self._cache(frame.head["cache"], int(frame.head["ctx"]))
            return None, [cache.export_segments(int(frame.head["layer"]))]

    def _op_restore_segments(self, frame: Frame):
        with self._busy:
            cache = self._cache(frame.head["cache"], int(frame.head["ctx"]))
            cache.restore_segments(int(frame.head["layer"]), *frame.arrays)

    # the stream

    def _cache(self, number: int, ctx: int):
        if number not in self._caches:
            self._caches[number] = self._stage.new_cache(ctx)
        return self._caches[number]

    def _compute(self) -> None:
        while not self._closed:
            frame = self._incoming.get()
            self._linked.wait()
            if frame is None or self._closed:
                return
            number = frame.head.get("id")
            try:
                if number <= self._stopped:
                    continue
                if "error" not in frame.head:
                    self._computing = number
                    try:
                        frame = self._through(frame)
                    finally:
                        self._computing = None
                if frame is not None:
                    self._next.send(frame.head, frame.arrays)
            except LinkClosed as error:
                self._tell(f"its link to the next node: {error}")
            except Exception as error:  # the program must be told any error
                head = {"id": number, "error": [type(error).__name__, str(error)]}
                with suppress(LinkClosed):
                    self._next.send(head)

    def _tell(self, words: str) -> None:
        for link in self._controls:
            with suppress(LinkClosed):
                link.send({"broken": words})

    def _through(self, frame: Frame) -> Frame | None:
        """The frame with the stream after this node's layers, None if the batch is cancelled."""
        head, (x, *_) = frame.head, frame.arrays
        with self._busy:
            self._chosen, found, done = [], [], 0
            for runs in _parts(head["runs"], self._most):
                n = sum(n for *_, n in runs)
                rows = self._forward(head, x[done : done + n], runs)
                if rows is None:
                    return None
                done += n
                if n < len(x):
                    self._chosen.append(np.array(self._stage.chosen(n)))
                found.append(rows)
            return Frame(head, self._ends(head, found[0] if len(found) == 1 else np.concatenate(found)))

    def _forward(self, head: dict, x: np.ndarray, given: Sequence) -> np.ndarray | None:
        while head["id"] > self._stopped and not self._closed:
            self._stage.resume()
            self._stage.alone = bool(head["alone"])
            runs = []
            for number, ctx, pos, n in given:
                cache = self._cache(number, ctx)
                cache.pos = pos
                cache.reserve(n)
                runs.append(Run(cache, n))
            try:
                rows = np.array(self._stage.forward(x, runs))
            except KeyboardInterrupt:  # the interrupt may have been for an earlier batch
                continue
            for run in runs:
                run.cache.pos += run.n
            return rows
        return None

    def _ends(self, head: dict, rows: np.ndarray) -> Sequence[np.ndarray]:
        """The rows to send: all, or, from the last node, each run's last."""
        if not self._last or len(rows) <= WHOLE:
            return [rows]
        self._kept = head["id"], rows
        return [rows[np.cumsum([n for *_, n in head["runs"]]) - 1]]


def _parts(runs: Sequence, most: int) -> Iterator[list]:
    """Divide runs (cache, ctx, pos, n) into batches of equal length, at most `most` tokens each."""
    left = sum(n for *_, n in runs)
    size = -(-left // -(-left // most))
    part, room = [], size
    for number, ctx, pos, n in runs:
        while n:
            some = min(n, room)
            part.append((number, ctx, pos, some))
            pos, n, room = pos + some, n - some, room - some
            if not room:
                yield part
                part, room = [], size
    if part:
        yield part
