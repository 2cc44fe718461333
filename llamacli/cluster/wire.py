"""Frames between two processes that share a secret: a small JSON object and arrays, authenticated, never unpickled.

In: a connected socket and the secret. Out: `Link`, which sends and receives frames in threads of its own, so that an interrupt
of the caller cannot cut a frame in two. `Listener` is the side that accepts.

On connecting each side sends 32 random bytes and proves that it knows the secret (HMAC by keyed BLAKE2b over both). A frame is:
bytes of the head (uint32), bytes of the payload (uint64), a MAC of these lengths, a MAC of everything, the head, the payload. A
MAC has 16 bytes, is keyed per connection and direction and covers a counter, so that frames can be neither forged, replayed nor
reordered, and a length from anybody else is rejected. Memory is allocated as the bytes arrive. Nothing is encrypted.
"""

import hmac
import json
import os
import queue
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import blake2b
from math import prod

import numpy as np

from llamacli.errors import DeviceError

NONCE, MAC, KEY = 32, 16, 32
LENGTHS = struct.Struct("<IQ")
MOST_HEAD, MOST_PAYLOAD = 1 << 20, 1 << 32  # bytes
FIRST = 16 << 20  # bytes first allocated for a payload; doubled whenever they are full
SENT = 1 << 18  # bytes per call that sends
SEAL = LENGTHS.size + 2 * MAC  # bytes before the head
TYPES = {"f4": np.dtype("<f4"), "f2": np.dtype("<f2"), "u1": np.dtype("u1"), "i8": np.dtype("<i8")}
GREETING = 5.0  # seconds for the other side to authenticate
SILENCE = 5.0  # seconds after which unacknowledged bytes end a connection (Linux: TCP_USER_TIMEOUT)
QUEUED = 4  # most frames that wait on each side; then the sender waits
STRANGERS = 64  # most connections that are not yet authenticated


class LinkClosed(DeviceError):
    """The other side is gone, or did not prove that it knows the secret."""


class Frame:
    """A head, which is a JSON object, and arrays."""

    __slots__ = ("arrays", "head")

    def __init__(self, head: dict, arrays: Sequence[np.ndarray] = ()):
        self.head, self.arrays = head, arrays


def connect(address: Sequence, secret: bytes, role: str, timeout: float = GREETING) -> "Link":
    """Connect to (host, port); `role` is the purpose of the link. LinkClosed if nothing listens there or the secret differs."""
    try:
        sock = socket.create_connection(tuple(address), timeout)
    except OSError as error:
        raise LinkClosed(f"{address[0]}:{address[1]}: expected a node, found: {error.strerror or error}") from None
    link = Link(sock, secret, accepts=False)
    link.send({"role": role})
    return link


class Link:
    """Both directions of a connection. `received` is a queue of Frames; its last item is a LinkClosed.

    `heard`, `moved`: the times (time.monotonic) when bytes last came, and when bytes of arrays last went, so that a large frame
    on a slow network does not count as silence.
    """

    def __init__(self, sock: socket.socket, secret: bytes, accepts: bool, received: queue.Queue | None = None):
        """`accepts`: whether this side accepted the connection. `received`: the queue for received frames, default a new
        one.
        """
        self._sock = sock
        self.received = queue.Queue(QUEUED) if received is None else received
        self._outgoing: queue.Queue = queue.Queue(QUEUED)
        self._closed = False
        self.heard = self.moved = time.monotonic()
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * SILENCE))
            self._write_key, self._read_key = self._greet(secret, accepts, time.monotonic() + GREETING)
        except OSError as error:
            sock.close()
            raise LinkClosed(f"expected a node that knows the cluster's secret, found: {error}") from None
        sock.settimeout(None)
        for work in (self._read_all, self._write_all):
            threading.Thread(target=work, daemon=True, name=work.__name__).start()

    def send(self, head: dict, arrays: Sequence[np.ndarray] = ()) -> None:
        """Queue a frame. The arrays must not change until it is sent. LinkClosed if the connection is known to be closed."""
        while True:
            if self._closed:
                raise LinkClosed("the connection is closed")
            with suppress(queue.Full):
                return self._outgoing.put((head, arrays), timeout=0.5)

    def close(self) -> None:
        """Close the connection, which ends its threads."""
        self._closed = True
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        with suppress(queue.Full):
            self._outgoing.put_nowait(None)

    def _greet(self, secret: bytes, accepts: bool, until: float) -> tuple[bytes, bytes]:
        """The keys of both directions. OSError if the other side does not know the secret, or is not finished at `until`."""
        mine = os.urandom(NONCE)
        self._sock.settimeout(GREETING)
        self._sock.sendall(mine)
        theirs = bytes(self._exactly(NONCE, until=until))
        both = theirs + mine if accepts else mine + theirs  # the connecting side's first
        if mine == theirs:
            raise ConnectionError("an echo")

        def key(side: bool, what: bytes) -> bytes:
            return blake2b(both + what + bytes([side]), key=blake2b(secret).digest(), digest_size=KEY).digest()

        self._sock.sendall(key(accepts, b"proof"))
        if not hmac.compare_digest(self._exactly(KEY, until=until), key(not accepts, b"proof")):
            raise ConnectionError("another secret")
        return key(accepts, b"frames"), key(not accepts, b"frames")

    def _exactly(self, n: int, into: memoryview | None = None, until: float | None = None) -> memoryview:
        view = memoryview(bytearray(n)) if into is None else into
        done = 0
        while done < n:
            if until is not None:
                self._sock.settimeout(max(0.01, until - time.monotonic()))
            got = self._sock.recv_into(view[done:])
            if not got:
                raise ConnectionError("the connection was closed")
            done += got
            self.heard = time.monotonic()
        return view

    def _payload(self, n: int) -> np.ndarray:
        """The next n bytes."""
        found, done = np.empty(min(n, FIRST), np.uint8), 0
        while True:
            self._exactly(found.size - done, memoryview(found)[done:])
            if (done := found.size) == n:
                return found
            found.resize(min(n, 2 * done), refcheck=False)

    def _read_all(self) -> None:
        count = 0
        try:
            while True:
                self.received.put(self._read(count))
                count += 1
        except Exception as error:  # the other side may send anything
            self._closed = True
            with suppress(OSError):
                self._sock.close()
            with suppress(queue.Full):  # else the writing thread is at a frame, which fails
                self._outgoing.put_nowait(None)
            self.received.put(LinkClosed(str(getattr(error, "strerror", None) or error)))

    def _read(self, count: int) -> Frame:
        seal = bytes(self._exactly(SEAL))
        lengths = seal[: LENGTHS.size]
        n_head, n_payload = LENGTHS.unpack(lengths)
        if not hmac.compare_digest(seal[:-MAC], lengths + _mac(self._read_key, count, [lengths])):
            raise ConnectionError("a frame with a wrong checksum")
        if n_head > MOST_HEAD or n_payload > MOST_PAYLOAD:
            raise ConnectionError("a frame that is too long")
        head = self._exactly(n_head)
        payload = self._payload(n_payload)
        if not hmac.compare_digest(seal[-MAC:], _mac(self._read_key, count, [lengths, head, payload])):
            raise ConnectionError("a frame with a wrong checksum")
        found = json.loads(bytes(head))
        arrays, at = [], 0
        for name, shape in found.pop("arrays", ()):
            dtype, n = TYPES[name], prod(shape)
            if min(shape, default=0) < 0 or at + n * dtype.itemsize > n_payload:
                raise ValueError("arrays that are longer than their frame")
            arrays.append(np.frombuffer(payload, dtype, n, at).reshape(shape))
            at += n * dtype.itemsize
        return Frame(found, arrays)

    def _write_all(self) -> None:
        count = 0
        try:
            while (item := self._outgoing.get()) is not None:
                head, arrays = item
                arrays = [np.ascontiguousarray(array) for array in arrays]
                kinds = [[_name(array.dtype), array.shape] for array in arrays]
                text = json.dumps(head | {"arrays": kinds} if kinds else head).encode()
                parts = [memoryview(array).cast("B") for array in arrays if array.size]
                self._sock.sendall(sealed(self._write_key, count, text, parts) + text)
                for part in parts:
                    for at in range(0, part.nbytes, SENT):
                        self._sock.sendall(part[at : at + SENT])
                        self.moved = time.monotonic()
                count += 1
        except Exception:  # also for a frame that cannot be written, so that its receiver does not wait for it
            self._closed = True
            with suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)  # the reading thread reports it


class Listener:
    """Accepts links until `close`. `welcome(link, role)` runs in a thread for each authenticated link.

    Others may hold at most STRANGERS connections. One more closes the oldest of the address with most of them, so that no
    address can lock out others.
    """

    def __init__(self, host: str, secret: bytes, welcome: Callable[[Link, str | None], None]):
        self._secret, self._welcome = secret, welcome
        self._greeting: dict[socket.socket, str] = {}  # connections not yet authenticated, oldest first, and their addresses
        self._closed = False
        self._socket = socket.create_server((host, 0))
        self.address = self._socket.getsockname()[:2]
        threading.Thread(target=self._accept, daemon=True, name="accept").start()

    def close(self) -> None:
        """Stop accepting."""
        self._closed = True
        with suppress(OSError):  # wakes the thread in accept
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        while not self._closed:
            sock = None
            try:
                sock, (address, *_) = self._socket.accept()
                self._make_room()
                self._greeting[sock] = address
                threading.Thread(target=self._greet, args=(sock,), daemon=True).start()
            except (OSError, RuntimeError):  # no descriptors or threads at the moment
                if sock:
                    self._greeting.pop(sock, None)
                    sock.close()
                time.sleep(0.05)

    def _make_room(self) -> None:
        greeting = dict(self._greeting)
        if len(greeting) >= STRANGERS:
            most = Counter(greeting.values()).most_common(1)[0][0]
            oldest = next(sock for sock, address in greeting.items() if address == most)
            self._greeting.pop(oldest, None)
            with suppress(OSError):  # its thread closes it
                oldest.shutdown(socket.SHUT_RDWR)

    def _greet(self, sock: socket.socket) -> None:
        with suppress(LinkClosed):
            try:
                link = Link(sock, self._secret, accepts=True)
            finally:
                self._greeting.pop(sock, None)
            first = link.received.get()
            if isinstance(first, Frame):
                self._welcome(link, first.head.get("role"))


def _name(dtype: np.dtype) -> str:
    return next(name for name, kind in TYPES.items() if kind == dtype)


def sealed(key: bytes, count: int, head: bytes, parts: Sequence) -> bytes:
    """The bytes before the head of a frame, which is the `count`-th of its direction."""
    lengths = LENGTHS.pack(len(head), sum(memoryview(part).nbytes for part in parts))
    return lengths + _mac(key, count, [lengths]) + _mac(key, count, [lengths, head, *parts])


def _mac(key: bytes, count: int, parts: Sequence) -> bytes:
    digest = blake2b(count.to_bytes(8, "little"), key=key, digest_size=MAC)
    for part in parts:
        digest.update(part)
    return digest.digest()
