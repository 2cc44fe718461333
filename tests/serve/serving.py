"""A server with a model in this process, on a real socket, and requests for tests."""

import json
import socket
import time
from contextlib import contextmanager

import httpx

from llamacli.serve.app import Limits, Server
from llamacli.serve.listen import Listener, bind


@contextmanager
def serving(model, limits=Limits(), **how):  # noqa: B008
    """Yields a client; `client.server` is the server."""
    server = Server(model, "miniature", limits, **how)
    listener = Listener(server.app, bind("127.0.0.1", 0))
    with httpx.Client(base_url=listener.url, timeout=300, verify=False) as client:
        client.server = server
        until(lambda: client.get("/health").status_code == 200)
        try:
            yield client
        finally:
            server.close()
            listener.close()


def until(true, seconds=300):
    """Wait until something is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def chat(text="Hi", **fields):
    """The body of a request for a chat's answer."""
    return {"messages": [{"role": "user", "content": text}], **fields}


def events(response):
    """The data of a stream's events, without the last one, which must be [DONE]."""
    data = [line[6:] for line in response.text.split("\n") if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(each) for each in data[:-1]]


def raw(client, data=b""):
    """Open a socket and send `data`."""
    made = socket.create_connection((client.base_url.host, client.base_url.port), timeout=300)
    made.sendall(data)
    return made


def post(body, path="/v1/chat/completions", **headers):
    """The bytes of a request."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body
