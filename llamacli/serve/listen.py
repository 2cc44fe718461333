"""The socket and the web server on it (uvicorn, in its own thread, so that the main thread handles signals).

In: an ASGI application, a host, a port. Out: a `Listener`, which serves until it is closed.
"""

import asyncio
import errno
import resource
import socket
import threading
from ipaddress import ip_address

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from llamacli.errors import UsageError

CLOSING = 2  # seconds for connections to end
MOST_CONNECTIONS = 1024
SPARE = 64  # connections more, whose requests are refused, and files that the process opens
IDLE = 75  # seconds that a connection may be idle between requests
HEAD = 30  # seconds for a client to send the head of a request
MOST_WAIT = 60  # seconds for a client to receive sent data


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0: a free one. UsageError if it cannot be opened."""
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
    """Whether only this machine can reach an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def most_connections() -> int:
    """How many connections are served at a time; limited by the files that the process may open."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    most = MOST_CONNECTIONS if allowed == resource.RLIM_INFINITY else min(MOST_CONNECTIONS, max(8, allowed - 4 * SPARE))
    return 1 + most  # uvicorn counts the new connection, too


class _Connection(H11Protocol):
    """A connection with time limits: for the head of a request, and for the client to receive a response."""

    _head: asyncio.TimerHandle | None = None
    _taking: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._head = self.loop.call_later(HEAD, transport.abort)
        if len(self.connections) > self.limit_concurrency + SPARE:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop("_head")
        self._stop("_taking")
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop("_head")
        elif self._head is None:
            self._head = self.loop.call_later(HEAD, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._taking = self.loop.call_later(MOST_WAIT, self.transport.abort)

    def resume_writing(self) -> None:
        self._stop("_taking")
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():  # `close` would wait for the client to receive the data
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def _stop(self, name: str) -> None:
        if (timer := getattr(self, name)) is not None:
            timer.cancel()
            setattr(self, name, None)


class Listener:
    """A running web server at the address `url`."""

    def __init__(self, app, bound: socket.socket):
        host, port = bound.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        config = uvicorn.Config(
            app,
            http=_Connection,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            proxy_headers=False,  # a client must not claim another address
            server_header=False,
            limit_concurrency=most_connections(),
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
        """Accept no more requests, and stop."""
        self._server.should_exit = True
        self._ended.wait(3 * CLOSING)
        self._bound.close()
