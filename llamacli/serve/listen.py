"""The socket and the web server on it (uvicorn, in a thread of its own, so that the main thread hears signals).

In: an ASGI application, a host, a port. Out: a `Listener`, which serves until it is closed.
"""

import errno
import socket
import threading
from ipaddress import ip_address

import uvicorn

from llamacli.errors import UsageError

CLOSING = 2  # seconds for connections to end
MOST_CONNECTIONS = 1024
IDLE = 75  # seconds that a connection may wait for its next request


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. UsageError if that is not possible."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        found = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UsageError(
            f"--host: expected a name or an address of this machine, found {host!r}: {getattr(error, 'strerror', error)}; "
            f"127.0.0.1 is the default"
        ) from None
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(512)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            raise UsageError(f"--port: expected a free port, found {port} in use; --port 0 takes a free one") from None
        raise UsageError(
            f"{host}:{port}: expected an address to listen at, found: {error.strerror}; choose another --host or --port"
        ) from None
    return found


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Listener:
    """A web server that runs. `url` is where."""

    def __init__(self, app, bound: socket.socket):
        host, port = bound.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            proxy_headers=False,  # a client may not say that it is another one
            server_header=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_keep_alive=IDLE,
            timeout_graceful_shutdown=CLOSING,
        )
        self._server, self._bound, self._ended = uvicorn.Server(config), bound, threading.Event()
        threading.Thread(target=self._run, daemon=True, name="web").start()

    def _run(self) -> None:
        try:
            self._server.run([self._bound])
        finally:
            self._ended.set()

    # A thread whose `join` a signal breaks off counts as ended from then on (Python 3.11), so an event is waited for instead.

    def wait(self) -> None:
        """Return when the server has ended."""
        self._ended.wait()

    def close(self) -> None:
        """Take no more requests, and end."""
        self._server.should_exit = True
        self._ended.wait(3 * CLOSING)
        self._bound.close()
