"""Frames between nodes: they arrive unchanged; frames of a peer without the secret are rejected."""

import mmap
import queue
import select
import socket
import struct
import threading
import time
import tracemalloc
from contextlib import suppress

import numpy as np
import pytest

from llamacli.cluster import wire
from llamacli.cluster.wire import Frame, Link, LinkClosed, connect

SECRET = b"of this test"


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as found:
        yield found


def accepted(listener, secret=SECRET):
    """The accepting side's result: a Link, or the error."""
    found = []

    def accept():
        try:
            found.append(Link(listener.accept()[0], secret, accepts=True))
        except LinkClosed as error:
            found.append(error)

    thread = threading.Thread(target=accept)
    thread.start()
    return thread, found


def pair(listener, through=None):
    """Both ends of a link; `through` is the address of a machine in the middle."""
    thread, found = accepted(listener)
    link = connect(through or listener.getsockname(), SECRET, "stream")
    thread.join()
    return link, found[0]


def test_heads_and_arrays_arrive_as_they_were(listener):
    near, far = pair(listener)
    assert far.received.get(timeout=300).head == {"role": "stream"}
    sent = [np.arange(12, dtype=np.float32).reshape(3, 4), np.zeros((0, 5), np.float16), np.array([1, 2], np.uint8)]
    near.send({"id": 7}, sent)
    far.send({"answer": "é"})
    frame = far.received.get(timeout=300)
    assert frame.head == {"id": 7}
    assert [a.dtype for a in frame.arrays] == [a.dtype for a in sent]
    assert all(map(np.array_equal, frame.arrays, sent))
    assert near.received.get(timeout=300).head == {"answer": "é"}
    near.close()
    assert isinstance(far.received.get(timeout=300), LinkClosed)


def test_another_secret_is_refused_on_both_sides(listener):
    thread, found = accepted(listener, b"another")
    with pytest.raises(LinkClosed):
        connect(listener.getsockname(), SECRET, "stream")
    thread.join()
    assert isinstance(found[0], LinkClosed)


def test_a_peer_that_echoes_our_bytes_is_refused(listener):
    def echo():
        sock, _ = listener.accept()
        while data := sock.recv(64):
            sock.sendall(data)

    threading.Thread(target=echo, daemon=True).start()
    with pytest.raises(LinkClosed):
        connect(listener.getsockname(), SECRET, "stream")


class Between:
    """A machine in the middle, which can change the bytes between both sides."""

    def __init__(self, listener, change):
        self.address = None
        self._far, self._change = listener.getsockname(), change
        self._own = socket.create_server(("127.0.0.1", 0))
        self.address = self._own.getsockname()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        near, _ = self._own.accept()
        far = socket.create_connection(self._far)
        threading.Thread(target=self._pass, args=(far, near, lambda data: data), daemon=True).start()
        self._pass(near, far, self._change)

    def _pass(self, source, target, change):
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(change(data))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.replace(b"payload!", b"payloaX!"),
        lambda data: data * 2 if b"payload!" in data else data,  # sent twice
        lambda data: struct.pack("<IQ", 1 << 31, 0) + bytes(32) if b"payload!" in data else data,
        lambda data: struct.pack("<IQ", 2, 1 << 60) + bytes(32) if b"payload!" in data else data,
        lambda data: struct.pack("<IQ", 2, 3 << 30) + data[12:] if b"payload!" in data else data,  # as long as may be
    ],
    ids=["changed", "replayed", "huge head", "huge payload", "large payload"],
)
def test_frames_that_were_changed_end_the_connection(listener, change):
    near, far = pair(listener, Between(listener, change).address)
    assert isinstance(far.received.get(timeout=300), Frame)
    near.send({"text": "payload!"})
    seen = [far.received.get(timeout=300)]
    if isinstance(seen[0], Frame):  # the first of two
        assert seen[0].head == {"text": "payload!"}
        seen.append(far.received.get(timeout=300))
    assert isinstance(seen[-1], LinkClosed)


def silent_after(n):
    """Forward the first bytes, then nothing."""
    left, over = [n], threading.Event()

    def change(data):
        left[0] -= len(data)
        if left[0] < 0:
            over.wait()
        return data

    return change, over


def test_memory_is_taken_for_bytes_that_came_and_not_for_those_that_were_announced(listener):
    change, over = silent_after(1 << 20)
    near, far = pair(listener, Between(listener, change).address)
    assert far.received.get(timeout=300).head == {"role": "stream"}
    array = np.frombuffer(mmap.mmap(-1, 128 << 20), np.uint8)  # memory that tracemalloc does not count
    tracemalloc.start()
    try:
        near.send({}, [array])
        until = time.monotonic() + 300
        while tracemalloc.get_traced_memory()[1] < 1 << 20 and time.monotonic() < until:
            time.sleep(0.01)  # until the payload is awaited
        time.sleep(0.2)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
        over.set()
        near.close()
        far.close()


@pytest.mark.parametrize("size", [0, 1, (16 << 20) - 1, 16 << 20, (16 << 20) + 1, (40 << 20) + 3])
def test_arrays_of_every_size_arrive(listener, size):
    near, far = pair(listener)
    far.received.get(timeout=300)
    sent = np.resize(np.arange(251, dtype=np.uint8), size)
    near.send({}, [sent, sent[:7]])
    assert all(map(np.array_equal, far.received.get(timeout=300).arrays, (sent, sent[:7])))


class Liar(Link):
    """A peer that knows the secret and sends any bytes as a head."""

    def _greet(self, *how):
        self.keys = super()._greet(*how)
        return self.keys

    def say(self, text: bytes, payload: bytes = b"", count: int = 0) -> None:
        self._sock.sendall(wire.sealed(self.keys[0], count, text, [payload]) + text + payload)


@pytest.mark.parametrize(
    "text",
    [
        b"7",
        b"[]",
        b"null",
        b"{",
        b"\xff",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"arrays": 1}',
        b'{"arrays": [1]}',
        b'{"arrays": [["f4", [2.5]]]}',
        b'{"arrays": [["f4", ["a"]]]}',
        b'{"arrays": [["f4", [-1]]]}',
        b'{"arrays": [["f4", [1e99]]]}',
        b'{"arrays": [["O", [1]]]}',
        b'{"arrays": [[{}, [1]]]}',
        b'{"arrays": [["f4", {"a": 1}]]}',
        b'{"arrays": [["u1", ' + str([1] * 99).encode() + b"]]}",
        b'{"arrays": [["u1", [99999999999999999999, 0]]]}',
    ],
)
def test_a_head_that_is_none_ends_the_connection(listener, text):
    thread, found = accepted(listener)
    near = Liar(socket.create_connection(listener.getsockname()), SECRET, accepts=False)
    thread.join()
    near.say(text, bytes(8))
    assert isinstance(found[0].received.get(timeout=300), LinkClosed)


def test_a_link_knows_when_bytes_came_and_when_they_went(listener):
    change, over = silent_after(1 << 20)
    near, far = pair(listener, Between(listener, change).address)
    far.received.get(timeout=300)
    began, far.heard, near.moved = time.monotonic(), 0.0, 0.0
    near.send({}, [np.zeros(64 << 20, np.uint8)])  # more than what lies in buffers on the way
    until = time.monotonic() + 300
    while min(far.heard, near.moved) < began and time.monotonic() < until:
        time.sleep(0.01)
    assert far.received.empty() and min(far.heard, near.moved) >= began
    over.set()
    assert far.received.get(timeout=300).arrays[0].nbytes == 64 << 20


def test_a_link_whose_other_side_is_gone_leaves_no_thread(listener):
    before = set(threading.enumerate())
    ours, theirs = pair(listener)
    theirs.close()
    assert isinstance(ours.received.get(), LinkClosed)
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
        assert not thread.is_alive(), thread.name


def test_a_peer_that_sends_nothing_or_garbage_gets_no_link(listener, monkeypatch):
    monkeypatch.setattr(wire, "GREETING", 0.2)
    for words in (b"", b"GET / HTTP/1.1\r\n\r\n" * 10):
        thread, found = accepted(listener)
        with socket.create_connection(listener.getsockname()) as stranger:
            stranger.sendall(words)
            thread.join(300)
        assert isinstance(found[0], LinkClosed)


def is_over(sock):
    """Whether the other side has ended a connection, once what it sent is read."""
    try:
        return sock.recv(wire.NONCE) == b""
    except OSError:
        return True


def test_unauthenticated_connections_do_not_block_others(monkeypatch):
    monkeypatch.setattr(wire, "STRANGERS", 8)
    monkeypatch.setattr(wire, "GREETING", 30.0)  # they would hold them for long
    welcomed = queue.Queue()
    listener = wire.Listener("127.0.0.1", SECRET, lambda link, role: welcomed.put(link))
    strangers = [socket.create_connection(listener.address) for _ in range(40)]
    links = [connect(listener.address, SECRET, "control") for _ in range(3)]
    strangers += [socket.create_connection(listener.address) for _ in range(20)]  # who proved itself is no stranger
    for link in links:
        link.send({"hello": 1})
        assert welcomed.get(timeout=300).received.get(timeout=300).head == {"hello": 1}
    held = set(strangers)
    while len(held) > 8:  # as many may wait; the others are told to go
        ready = select.select(held, [], [], 300)[0]
        assert ready, f"{len(held)} strangers hold connections"
        held -= {sock for sock in ready if is_over(sock)}
    for sock in strangers:
        sock.close()
    for link in links:
        link.close()
    listener.close()
