"""A node that encodes: it reads pieces of its own copy of a conversion's source and returns them encoded (for tasks.py).

A task is some rows of one tensor: the head {"call", "name", "type", "rows": [group, first, count]}, and perhaps an array of the
group's weights, float32 [n_cols]. The answer is {"call", "errors"}, an error for each piece, and the pieces as arrays of bytes;
or {"call", "error": [class, words]}. {"ping"} is answered at once, with "stalled", the seconds for which tasks under way have
made no progress (progress.py). A node has at most two unanswered tasks, so its memory is bounded.
"""

import queue
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from llamacli.cluster.progress import Progress
from llamacli.cluster.wire import Frame, Link, LinkClosed, Listener
from llamacli.files.ggml import BY_NAME
from quantize.opening import Source
from quantize.pieces import Piece, PieceEncoder, pieces


class Counts:
    """Counts of a link's tasks. One thread counts those begun, another those ended."""

    begun = ended = 0

    @property
    def under_way(self) -> int | None:
        """The number of the first task that has not ended."""
        return self.ended if self.ended < self.begun else None


class EncodingNode:
    """Encodes on `threads` threads until `close`."""

    def __init__(self, source: Source, secret: bytes, host: str, threads: int):
        """`host`: the only address to listen on."""
        self._rows, self._encode = source.all_rows, PieceEncoder(source.maps)
        self._pool = ThreadPoolExecutor(threads, "encode")
        self._links: set[Link] = set()
        self._listener = Listener(host, secret, self._welcome)
        self.address = self._listener.address

    def close(self) -> None:
        """Stop listening, and end the tasks under way."""
        self._listener.close()
        for link in list(self._links):
            link.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _welcome(self, link: Link, role: str | None) -> None:
        if role == "encode":
            self._links.add(link)
            tasks: queue.SimpleQueue = queue.SimpleQueue()
            counts, progress = Counts(), Progress()
            threading.Thread(target=self._answer, args=(link, tasks, counts), daemon=True).start()
            while isinstance(frame := link.received.get(), Frame):
                if "ping" in frame.head:
                    with suppress(LinkClosed):
                        link.send(frame.head | {"stalled": progress.stalled(counts.under_way)})
                else:
                    counts.begun += 1
                    tasks.put(self._begin(frame))
            tasks.put(None)
            self._links.discard(link)
        link.close()

    def _begin(self, frame: Frame) -> tuple[int, list[Future] | Exception]:
        """The number of a task and its pieces under way."""
        call = frame.head.get("call")
        try:
            name, kind, part = frame.head["name"], BY_NAME[frame.head["type"]], Piece(*frame.head["rows"])
            source, weights = self._rows[name], frame.arrays[0] if frame.arrays else None
            started = [self._pool.submit(self._encode, name, kind, source, piece, weights) for piece in pieces(source, part)]
        except Exception as error:  # the program gets any error of its task
            return call, error
        return call, started

    def _answer(self, link: Link, tasks: queue.SimpleQueue, counts: Counts) -> None:
        """Send the results of tasks in order until the link is closed; tasks under way are then cancelled."""
        while (task := tasks.get()) is not None:
            call, started = task
            try:
                if isinstance(started, Exception):
                    raise started
                found = [one.result() for one in started]
                answer = {"call": call, "errors": [errors for _, errors in found]}, [encoded for encoded, _ in found]
            except Exception as error:
                answer = {"call": call, "error": [type(error).__name__, str(error)]}, ()
            counts.ended += 1
            try:
                link.send(*answer)
            except LinkClosed:
                for one in started if isinstance(started, list) else ():
                    one.cancel()
