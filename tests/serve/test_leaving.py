"""Clients that leave at any moment, and malformed HTTP: no resources stay in use, and the engine becomes free."""

import gc
import json
import os
import random
import socket
import struct
import threading

import pytest
from fakes import FakeModel, Scripted
from serving import chat, post, raw, serving, until

from llamacli.serve.app import Limits

REPLY = "x" * 40
SAID = [ord("x")]  # a token of an answer
PROTOCOLS = {
    "/v1/chat/completions": chat("Hi", stream=True),
    "/v1/completions": {"prompt": "Hi", "stream": True},
    "/v1/responses": {"input": "Hi", "stream": True},
    "/v1/messages": chat("Hi", stream=True, max_tokens=100),
}


class Gated(Scripted):
    """Waits before each token of an answer if a test asks for it."""

    gate = None

    def forward(self, ids, cache, **more):
        while self.gate and list(ids) == SAID and not self.gate.acquire(timeout=0.05):
            pass
        return super().forward(ids, cache, **more)


@pytest.fixture(scope="module")
def client():
    model = FakeModel(Gated(REPLY, chunk=64), ctx=600)
    with serving(model, Limits(places=2, body_seconds=0.5, keep_alive=0.05)) as made:
        for path, body in PROTOCOLS.items():  # everything that the first request creates exists
            made.post(path, json=body | {"stream": False}).raise_for_status()
        yield made


def said(engine, calls):
    """Tokens of answers that were evaluated from this call on."""
    return sum(ids == SAID for _, ids in engine.calls[calls:])


def held(client):
    """The resources that a client can make the server hold: sockets and files, threads, bodies, places, jobs in the queue."""
    gc.collect()
    server = client.server
    files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    threads = [each for each in threading.enumerate() if not each.name.startswith("prepare")]  # of these there are four at most
    return files, len(threads), server._bodies.held, server.scheduler.active, server.scheduler.waiting


@pytest.fixture(autouse=True)
def nothing_stays(client):
    """Check that no resources stay in use and that the server still answers."""

    def answers():
        body = client.post("/v1/chat/completions", json=chat("still there?")).json()
        return body["choices"][0]["message"]["content"] == REPLY

    before = held(client)
    yield
    client.server.model.engine.gate = None
    until(lambda: held(client) <= before)
    assert answers()


def reset(made):
    made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    made.close()


@pytest.mark.parametrize("path", PROTOCOLS)
def test_a_client_that_leaves_during_its_request_leaves_no_resources(client, path):
    request = post(PROTOCOLS[path], path)
    body = request.index(b"\r\n\r\n") + 4
    cuts = sorted({0, 1, 4, body - 4, body - 2, body, body + 1, len(request) - 1, len(request), *range(0, len(request), 13)})
    for n, cut in enumerate(cuts):
        made = raw(client, request[:cut])
        reset(made) if n % 2 else made.close()


@pytest.mark.parametrize("path", PROTOCOLS)
def test_a_client_that_leaves_during_its_answer_leaves_no_resources(client, path):
    """The engine waits before each token, so the answer is at a known token when the client leaves."""
    engine = client.server.model.engine
    for tokens in range(0, 12):
        engine.gate = threading.Semaphore(tokens)
        cancelled, calls = client.server.scheduler.totals.cancelled, len(engine.calls)
        made = raw(client, post(PROTOCOLS[path], path))
        until(lambda calls=calls, n=tokens: said(engine, calls) == n)
        received = b""
        while received.count(b"data:") <= tokens:  # the role or the start, too
            received += made.recv(65536)
        reset(made) if tokens % 2 else made.close()
        until(lambda: client.server._bodies.held == 0)  # the server has seen it
        engine.gate.release(1)  # the token under way; no other is needed
        until(lambda n=cancelled: client.server.scheduler.totals.cancelled == n + 1)
        until(lambda: client.server.scheduler.active == 0)
        assert said(engine, calls) <= tokens + 1


@pytest.mark.parametrize("whole", [False, True])
def test_a_half_closed_connection_leaves_no_resources(client, whole):
    request = post(chat("Hi", stream=True))
    for cut in (0, 10, request.index(b"\r\n\r\n") + 4, len(request) - 1, len(request)):
        made = raw(client, request[:cut])
        made.shutdown(socket.SHUT_WR)
        if whole:  # reads what comes, to its end
            while made.recv(65536):
                pass
        made.close()


def test_many_clients_that_leave_at_once(client):
    made = [raw(client, post(chat(f"{n}", stream=True))) for n in range(60)]
    for n, each in enumerate(made):
        reset(each) if n % 2 else each.close()


def chunked(*chunks):
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(chunks)


BODY = json.dumps(chat("Hi", max_tokens=1)).encode()
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
BROKEN = {
    "two lengths": POST + LENGTH + b"Content-Length: 3\r\n\r\n" + BODY,
    "a length and chunks": POST + LENGTH + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "no number as length": POST + b"Content-Length: many\r\n\r\n" + BODY,
    "a negative length": POST + b"Content-Length: -1\r\n\r\n" + BODY,
    "a huge length": POST + b"Content-Length: 99999999999999999999\r\n\r\n" + BODY,
    "no length": POST + b"\r\n" + BODY,
    "unknown encoding": POST + b"Transfer-Encoding: gzip\r\n\r\n" + BODY,
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "a foreign host": b"GET /health HTTP/1.1\r\nHost: a.example\r\n\r\n",
    "two hosts": b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: a.example\r\n\r\n",
    "a null in a header": POST + b"X: a\x00b\r\n\r\n",
    "a header without a name": POST + b": a\r\n\r\n",
    "a folded header": POST + b"X: a\r\n b\r\n" + LENGTH + b"\r\n" + BODY,
    "bytes in the address": b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "an endless header": POST + b"X: " + b"a" * 200_000,
    "many headers": POST + b"".join(b"X-%d: a\r\n" % n for n in range(20_000)),
    "no method": b" /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "another method": b"BREW /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a tunnel": b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "another protocol": POST + b"Connection: Upgrade\r\nUpgrade: websocket\r\n" + LENGTH + b"\r\n" + BODY,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "chunks of no size": chunked(b"zz\r\nabc\r\n"),
    "a huge chunk": chunked(b"ffffffffffffffff\r\nabc\r\n"),
    "a chunk that is too long": chunked(b"3\r\nabcdef\r\n0\r\n\r\n"),
    "tiny chunks": chunked(*(b"1\r\n%c\r\n" % byte for byte in BODY), b"0\r\n\r\n"),
    "chunks without an end": chunked(b"3\r\nabc\r\n"),
    "two requests at once": (POST + LENGTH + b"\r\n" + BODY) * 2,
    "a request and rubbish": POST + LENGTH + b"\r\n" + BODY + b"\x00\x01rubbish\r\n\r\n",
}
FINE = ("tiny chunks", "two requests at once", "a request and rubbish", "a folded header", "another protocol")


@pytest.mark.parametrize("what", BROKEN)
def test_broken_http_ends_its_connection_alone(client, what):
    made = raw(client)
    received = b""
    try:
        made.sendall(BROKEN[what])
        made.shutdown(socket.SHUT_WR) if what not in FINE else made.settimeout(300)
        while part := made.recv(65536):
            received += part
            if what in FINE and received.count(b'"usage"') == BROKEN[what].count(b"POST"):
                break
    except OSError:  # the server closed first
        pass
    made.close()
    statuses = {line.split()[1] for line in received.split(b"\r\n") if line.startswith(b"HTTP/1.1")}
    assert statuses == {b"200"} if what in FINE else statuses <= {b"400", b"403", b"404", b"405", b"408", b"413", b"499"}
    assert b"Traceback" not in received


def test_broken_http_at_random(client):
    """A valid request with some bytes changed, omitted or sent twice."""
    random.seed(3)
    sound = POST + LENGTH + b"\r\n" + BODY
    for _ in range(150):
        data = bytearray(sound)
        for _ in range(random.randrange(1, 6)):
            at = random.randrange(len(data))
            how = random.randrange(3)
            if how == 0:
                data[at] = random.randrange(256)
            elif how == 1:
                del data[at : at + random.randrange(1, 20)]
            else:
                data[at:at] = data[at : at + random.randrange(1, 20)]
        made = raw(client, bytes(data))
        received = b""
        try:
            made.shutdown(socket.SHUT_WR)
            while part := made.recv(65536):
                received += part
        except OSError:
            pass
        made.close()
        assert b"HTTP/1.1 5" not in received, bytes(data)
