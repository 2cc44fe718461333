"""Frames between nodes: what comes is what was sent; nothing is taken from who does not know the secret."""

import queue
import socket
import struct
import threading
from contextlib import suppress

import numpy as np
import pytest

from llamacli.cluster.wire import Frame, Link, LinkClosed, connect

SECRET = b"of this test"


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as found:
        yield found


def accepted(listener, secret=SECRET):
    """What the accepting side comes to: a Link, or the error."""
    found = []

    def accept():
        try:
            found.append(Link(listener.accept()[0], secret, accepts=True))
        except LinkClosed as error:
            found.append(error)

    thread = threading.Thread(target=accept)
    thread.start()
    return thread, found


def pair(listener):
    thread, found = accepted(listener)
    link = connect(listener.getsockname(), SECRET, "stream")
    thread.join()
    return link, found[0]


def test_heads_and_arrays_arrive_as_they_were(listener):
    near, far = pair(listener)
    assert far.received.get().head == {"role": "stream"}
    sent = [np.arange(12, dtype=np.float32).reshape(3, 4), np.zeros((0, 5), np.float16), np.array([1, 2], np.uint8)]
    near.send({"id": 7}, sent)
    far.send({"answer": "é"})
    frame = far.received.get()
    assert frame.head == {"id": 7}
    assert [a.dtype for a in frame.arrays] == [a.dtype for a in sent]
    assert all(map(np.array_equal, frame.arrays, sent))
    assert near.received.get().head == {"answer": "é"}
    near.close()
    assert isinstance(far.received.get(), LinkClosed)


def test_another_secret_is_refused_on_both_sides(listener):
    thread, found = accepted(listener, b"another")
    with pytest.raises(LinkClosed):
        connect(listener.getsockname(), SECRET, "stream")
    thread.join()
    assert isinstance(found[0], LinkClosed)


def test_who_sends_our_own_words_back_is_refused(listener):
    def echo():
        sock, _ = listener.accept()
        while data := sock.recv(64):
            sock.sendall(data)

    threading.Thread(target=echo, daemon=True).start()
    with pytest.raises(LinkClosed):
        connect(listener.getsockname(), SECRET, "stream")


class Between:
    """A machine in the middle, which may change what goes by."""

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
        lambda data: struct.pack("<IQ", 1 << 31, 0) + bytes(16) if b"payload!" in data else data,
        lambda data: struct.pack("<IQ", 2, 1 << 60) + bytes(16) if b"payload!" in data else data,
    ],
    ids=["changed", "replayed", "huge head", "huge payload"],
)
def test_frames_that_were_changed_end_the_connection(listener, change):
    between = Between(listener, change)
    thread, found = accepted(listener)
    near = connect(between.address, SECRET, "stream")
    thread.join()
    far = found[0]
    assert isinstance(far.received.get(timeout=300), Frame)
    near.send({"text": "payload!"})
    seen = [far.received.get(timeout=300)]
    if isinstance(seen[0], Frame):  # the first of two
        assert seen[0].head == {"text": "payload!"}
        seen.append(far.received.get(timeout=300))
    assert isinstance(seen[-1], LinkClosed)


def test_a_stranger_that_says_nothing_or_rubbish_gets_no_link(listener, monkeypatch):
    from llamacli.cluster import wire

    monkeypatch.setattr(wire, "GREETING", 0.2)
    for words in (b"", b"GET / HTTP/1.1\r\n\r\n" * 10):
        thread, found = accepted(listener)
        with socket.create_connection(listener.getsockname()) as stranger:
            stranger.sendall(words)
            thread.join(300)
        assert isinstance(found[0], LinkClosed)


def test_strangers_that_hold_connections_lock_nobody_out(monkeypatch):
    from llamacli.cluster import wire

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
    ended = 0
    for sock in strangers:
        sock.settimeout(0.2)
        with suppress(OSError):
            sock.recv(wire.NONCE)  # the greeting
            ended += sock.recv(1) == b""
        sock.close()
    assert ended >= len(strangers) - 8
    for link in links:
        link.close()
    listener.close()
