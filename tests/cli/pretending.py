"""Servers for tests: the arguments to use one, and a server that answers with given bytes."""

import json
import re
import socket
import sys
import threading
from contextlib import contextmanager

from llamacli.cli import main

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
RUN = [sys.executable, "-m", "llamacli"]
MODELS = b'{"data": [{"id": "m", "max_model_len": 512, "meta": {"n_ctx": 512, "n_vocab": 1000}}]}'


def run(*args):
    return main(["run", "--temp", "0", "--no-stdin", *args])


def response(body, status="200 OK", kind="application/json", *headers):
    head = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def stream(*events, end=b"data: [DONE]\n\n"):
    body = b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in events) + end
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n" + body


def said(text, reason=None):
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}]}


@contextmanager
def pretending(answer, models=None):
    """A server that answers every request but the first kind with `answer`: bytes, or a function of the connection.

    Yields its address and a list of the requests that came.
    """
    asked = []

    def serve(connection):
        with connection:
            data = b""
            while b"\r\n\r\n" not in data:
                data += (part := connection.recv(1 << 16))
                if not part:
                    return
            head, _, body = data.partition(b"\r\n\r\n")
            length = int((re.search(rb"(?i)content-length: (\d+)", head) or [0, 0])[1])
            while len(body) < length:
                body += connection.recv(1 << 16)
            asked.append((head.decode(), json.loads(body or b"null")))
            found = (models or response(MODELS)) if head.startswith(b"GET /v1/models") else answer
            try:
                found(connection) if callable(found) else connection.sendall(found)
                connection.shutdown(socket.SHUT_WR)
                connection.recv(1)
            except OSError:
                pass

    def accept():
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", asked
        listening.shutdown(socket.SHUT_RDWR)


def error(message, code=None):
    return json.dumps({"error": {"message": message, "code": code}}).encode()
