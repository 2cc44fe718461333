"""The nodes that hold a model's layers, in their order, and the links to them.

In: the addresses of opened nodes (host.py). Out: `Row`: a stream of batches to the first node, results of the last one in
`inbox`, questions to each. If a node is gone, silent, disconnected from its neighbour or makes no progress, `lost` is set and
`inbox` gets None.
"""

import itertools
import queue
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from llamacli import errors
from llamacli.cluster import progress
from llamacli.cluster.wire import Frame, Link, LinkClosed, connect
from llamacli.cpu.buffers import MAX_BATCH
from llamacli.errors import DeviceError, LlamacliError

PING_EVERY, PATIENCE = 1.0, 5.0  # seconds between pings; seconds without an answer after which a node counts as lost


class Place(NamedTuple):
    """A node that holds layers and waits for links."""

    name: str
    address: tuple[str, int]
    layers: range
    bytes_per_token: int = 0
    products_per_token: int = 0
    fetches: bool = False
    notices: tuple[str, ...] = ()
    pid: int = 0
    batch: int = MAX_BATCH  # most tokens of a batch in its memory plan
    seconds: float = 0.0  # seconds of a token in these layers, as planned
    alike: int = 1  # as in device.Stage


class NodeLost(DeviceError):
    """A node died, stopped answering or lost its neighbour."""

    def __init__(self, name: str, why: str):
        super().__init__(f"node {name}: {why}")
        self.name = name


class Row:
    """Links to opened nodes: a stream to the first, a sink from the last, a control link to each."""

    def __init__(self, places: Sequence[Place], secret: bytes):
        self.places, self.links = places, []
        self.inbox: queue.Queue = queue.Queue()  # frames of results; None: a loss or an interrupt
        self._calls, self._answers = itertools.count(1), {}
        self._closed = False
        self.lost: NodeLost | None = None  # the first lost node
        self._controls: list[Link] = []
        try:
            self._connect(secret)
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._collect, daemon=True).start()
        threading.Thread(target=self._ping, daemon=True).start()

    def _connect(self, secret: bytes) -> None:
        def link(place: Place, role: str) -> Link:
            try:
                return connect(place.address, secret, role)
            except LinkClosed as error:
                raise NodeLost(place.name, str(error)) from None

        for k, place in enumerate(self.places):
            self._controls.append(link(place, "control"))
            threading.Thread(target=self._listen, args=(k,), daemon=True).start()
        for k, following in enumerate(self.places[1:]):
            broken = self.ask(k, "next", {"address": following.address}).head["answer"]
            if broken:
                raise NodeLost(following.name, f"node {self.places[k].name} does not reach it: {broken}")
        self.links = [link(self.places[0], "stream"), link(self.places[-1], "sink")]

    def ask(self, k: int, op: str, head: dict | None = None, arrays: Sequence[np.ndarray] = ()) -> Frame:
        """Ask node k and return its answer. NodeLost if none comes; else the exception that the node returns."""
        call, answer = next(self._calls), queue.SimpleQueue()
        self._answers[k, call] = answer
        try:
            self._controls[k].send((head or {}) | {"op": op, "call": call}, arrays)
            while True:
                try:
                    found = answer.get(timeout=PATIENCE)
                    break
                except queue.Empty:
                    if self._closed or self._silent(k) > PATIENCE:
                        raise self.lost or NodeLost(self.places[k].name, f"no answer for {PATIENCE:.0f} s") from None
        except LinkClosed as error:  # of all nodes, when one is lost
            raise self.lost or NodeLost(self.places[k].name, str(error)) from None
        finally:
            self._answers.pop((k, call), None)
        if isinstance(found, NodeLost):
            raise found
        if "error" in found.head:
            raise node_error(found)
        return found

    def tell(self, op: str, head: dict) -> None:
        """Send a message to all nodes, without waiting for an answer."""
        for control in self._controls:
            with suppress(LinkClosed):
                control.send(head | {"op": op, "call": 0})

    def stop(self, number: int) -> None:
        """Cancel batches up to this number."""
        self.tell("stop", {"id": number})

    def close(self) -> None:
        """Close all links."""
        self._closed = True
        for link in (*self.links, *self._controls):
            link.close()

    def _silent(self, k: int) -> float:
        """Seconds since the last byte from or to node k."""
        moments = [self._controls[k].heard, self._controls[k].moved]
        if self.links:
            moments += [self.links[0].moved] if k == 0 else []
            moments += [self.links[1].heard] if k == len(self.places) - 1 else []
        return time.monotonic() - max(moments)

    def _listen(self, k: int) -> None:
        """Receive answers, answers to pings and errors of node k."""
        while isinstance(frame := self._controls[k].received.get(), Frame):
            if progress.hangs(frame.head):
                self._lose(k, progress.WHY)
            elif "broken" in frame.head:
                self._lose(k + 1 if k + 1 < len(self.places) else k, f"node {self.places[k].name} lost {frame.head['broken']}")
            elif isinstance(call := frame.head.get("call"), int) and (answer := self._answers.get((k, call))):
                answer.put(frame)
        self._lose(k, "it died" if "closed" in str(frame) or "reset" in str(frame) else str(frame))

    def _collect(self) -> None:
        while isinstance(frame := self.links[1].received.get(), Frame):
            self.inbox.put(frame)
        self._lose(len(self.places) - 1, "it died")

    def _ping(self) -> None:
        while not self._closed:
            asked = time.monotonic()
            self.tell("ping", {})
            time.sleep(PING_EVERY)
            if time.monotonic() - asked > PING_EVERY + 1:  # this program was suspended (Ctrl-Z), not the nodes
                for control in self._controls:
                    control.heard = time.monotonic()
                continue
            for k in range(len(self.places)):
                if self._silent(k) > PATIENCE:
                    self._lose(k, f"no answer for {PATIENCE:.0f} s")

    def _lose(self, k: int, why: str) -> None:
        if self._closed or self.lost:
            return
        lost = self.lost = NodeLost(self.places[k].name, why)
        self.inbox.put(None)
        self.close()  # wakes threads that wait to send a frame
        for answer in list(self._answers.values()):
            answer.put(lost)


def node_error(frame: Frame) -> Exception:
    """The exception that a node reports: of the same class if it is one of this project."""
    told = frame.head["error"]
    kind, words = map(str, told) if isinstance(told, list) and len(told) == 2 else ("", str(told)[:200])
    found = getattr(errors, kind, None) if kind else None
    if isinstance(found, type) and issubclass(found, LlamacliError):
        return found(words)
    return DeviceError(f"a node failed: {kind}: {words}; its log says more")
