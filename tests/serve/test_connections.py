"""Limits of connections: bodies of all requests together, heads that are not sent, answers that are not received."""

import json
import socket

import pytest
from fakes import FakeModel, Scripted
from serving import chat, post, raw, serving, until

from llamacli.serve import bodies, listen
from llamacli.serve.app import Limits

MB = 1 << 20


def served(reply="ok", delay=0.0, ctx=3000, **limits):
    return serving(FakeModel(Scripted(reply, chunk=64, delay=delay), ctx=ctx), Limits(**limits))


def all_of(made):
    """All data until the server closes the connection."""
    received = b""
    try:
        while part := made.recv(65536):
            received += part
    except ConnectionResetError:
        pass
    return received


def half_sent(client, size):
    """Send a request without the last byte of its body."""
    before = client.server._bodies.held
    made = raw(client, post(b" " * size)[:-1])
    until(lambda: client.server._bodies.held >= before + size - 1 or client.server._bodies.held < before)
    return made


def test_bodies_of_all_requests_together_are_bounded(monkeypatch):
    monkeypatch.setattr(bodies, "DRAINED", 0.2)
    with served(body=MB, bodies=2 * MB) as client:
        sending = [half_sent(client, 900_000) for _ in range(2)]
        assert client.server._bodies.held == 2 * 899_999
        third = raw(client, post(b" " * 900_000)[:-1])
        answer = all_of(third)
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503") and b"retry-after: 5" in head.lower()
        error = json.loads(body)["error"]
        assert error["code"] == "bodies_full" and str(2 * MB) in error["message"]
        assert client.post("/v1/chat/completions", json=chat(max_tokens=1)).status_code == 200  # there is room for a small one
        sending[0].close()
        until(lambda: client.server._bodies.held == 899_999)
        full = json.dumps(chat("x", metadata={"x": "y" * 900_000}, max_tokens=1))
        assert client.post("/v1/chat/completions", content=full).status_code == 200
        sending[1].sendall(b" ")  # the whole body now; it is no JSON
        assert sending[1].recv(65536).startswith(b"HTTP/1.1 400")
        sending[1].close(), third.close()
        until(lambda: client.server._bodies.held == 0)


def test_a_body_counts_until_its_answer_is_over():
    with served("x" * 2000, delay=0.005) as client:
        made = raw(client, post(chat(stream=True)))
        until(lambda: client.server.scheduler.active)
        assert client.server._bodies.held == len(json.dumps(chat(stream=True)))
        made.close()
        until(lambda: client.server._bodies.held == 0)


def test_a_refused_body_is_given_back():
    with served(body=1000) as client:
        for how in ({"content": b"x" * 5000}, {"content": (b"x" * 300 for _ in range(9))}, {"content": b"{"}):
            assert client.post("/v1/chat/completions", **how).status_code in (400, 413)
        until(lambda: client.server._bodies.held == 0)


@pytest.mark.parametrize("sent", [b"", b"GET /health HTT", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea"])
def test_a_connection_without_a_complete_request_head_is_closed(monkeypatch, sent):
    monkeypatch.setattr(listen, "IDLE", 0.2)
    with served() as client:
        monkeypatch.setattr(listen, "HEAD", 0.2)
        made = raw(client, sent)
        assert all_of(made).startswith(b"HTTP/1.1 200" if b"\r\n\r\n" in sent else b"")
        made.close()


def test_a_connection_between_requests_is_not_cut_off(monkeypatch):
    with served(delay=0.03) as client:
        monkeypatch.setattr(listen, "HEAD", 0.4)
        made = raw(client)
        for _ in range(2):
            made.sendall(post(chat("a question", stream=True)))  # takes longer than the head of one may
            received = b""
            while not received.endswith(b"0\r\n\r\n"):
                part = made.recv(65536)
                assert part, received
                received += part
        made.close()


def test_a_client_that_does_not_receive_its_answer_is_disconnected(monkeypatch):
    monkeypatch.setattr(listen, "MOST_WAIT", 1.0)
    with served("x" * 2900) as client:
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        made.connect((client.base_url.host, client.base_url.port))
        made.sendall(post(chat(stream=True, logprobs=True, top_logprobs=20)))  # some megabytes, more than all buffers hold
        until(lambda: client.server._bodies.held)
        until(lambda: not client.server._bodies.held)
        made.settimeout(300)
        assert b"[DONE]" not in all_of(made)
        made.close()
        assert client.server.scheduler.active == 0


def test_more_connections_than_there_may_be_are_refused_and_do_no_harm(monkeypatch):
    monkeypatch.setattr(listen, "MOST_CONNECTIONS", 6)
    monkeypatch.setattr(listen, "SPARE", 3)
    with served() as client:
        idle = [raw(client) for _ in range(30)]
        assert [all_of(each) for each in idle[10:]] == [b""] * 20  # beyond those whose requests are refused
        idle[0].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert idle[0].recv(65536).startswith(b"HTTP/1.1 503")
        for each in idle:
            each.close()
        until(lambda: client.get("/health").status_code == 200)
