"""Requests to a server of OpenAI's protocol, and what it answers: an object, or a stream of events.

In: an address, a key, bodies. Out: checked JSON. An answer that is refused, cut, no JSON, too long or stalled is a ServerError.
Leaving a response closes its connection, which tells the server to stop. Redirects are not followed: the key and the question
are for one server.
"""

import http.client
import json
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

from llamacli.errors import ContextFullError, LlamacliError, ServerError, UsageError

CONNECTING, STALLED = 10.0, 300.0  # seconds for a connection; without a byte (`llamacli serve` sends some every 5)
LONGEST_BODY, LONGEST_LINE = 8 << 20, 16 << 20  # bytes of a body, and of a line of a stream


class Missing(LlamacliError):
    """The server answered 404."""


class Server:
    """Requests to a server. `url` is its root. Each has a connection of its own."""

    def __init__(self, address: str, key: str | None, stalled: float = STALLED):
        parts = urlsplit(address if "://" in address else f"http://{address}")
        try:
            self._host, self._port = parts.hostname, parts.port
            sound = parts.scheme in ("http", "https") and self._host and "@" not in parts.netloc
            sound = sound and address.isascii() and address.isprintable() and " " not in address
        except ValueError:
            sound = False
        if not sound or parts.query or parts.fragment:
            raise UsageError(f"--server: expected an address such as http://127.0.0.1:8080, found {address!r:.100}")
        if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
            raise UsageError("LLAMACLI_API_KEY: expected printable ASCII without spaces, found something else")
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc}{self._path}"
        self._secure, self._key, self._stalled = parts.scheme == "https", key, stalled
        self.in_clear = bool(key) and not self._secure and self._host not in ("localhost", "127.0.0.1", "::1")

    def json(self, method: str, path: str, body: dict | None = None) -> dict:
        """The object that a request is answered with."""
        with self.open(method, path, body) as answer:
            return answer.object()

    def open(self, method: str, path: str, body: dict | None = None) -> "Response":
        """A request that was answered with 200. ServerError else; Missing for 404."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Accept": "application/json, text/event-stream", "Accept-Encoding": "identity", "User-Agent": "llamacli"}
        headers |= {"Content-Type": "application/json"} if data else {}
        headers |= {"Authorization": f"Bearer {self._key}"} if self._key else {}
        connection = self._connection()
        try:
            self._reach(connection)
            try:
                connection.request(method, self._path + path, data, {**headers, "Connection": "close"})
            except (BrokenPipeError, ConnectionResetError):  # it may refuse a body before it has read it
                pass
            except OSError as error:
                raise ServerError(
                    f"{self.url}: the connection broke off ({_words(error)}); try again, or check the server"
                ) from None
            answer = Response(self, connection, self._waiting(connection.getresponse))
            answer.check()
            return answer
        except BaseException:
            connection.close()
            raise

    def _connection(self) -> http.client.HTTPConnection:
        if not self._secure:
            return http.client.HTTPConnection(self._host, self._port, timeout=CONNECTING)
        import ssl

        return http.client.HTTPSConnection(self._host, self._port, timeout=CONNECTING, context=ssl.create_default_context())

    def _reach(self, connection: http.client.HTTPConnection) -> None:
        try:
            connection.connect()
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sock.settimeout(self._stalled)
        except (OSError, UnicodeError) as error:  # errors of TLS are an OSError
            words = str(error)
            if "CERTIFICATE_VERIFY_FAILED" in words:
                raise ServerError(
                    f"{self.url}: expected a certificate that this system trusts, found: "
                    f"{getattr(error, 'verify_message', '') or words}; set SSL_CERT_FILE to a file of certificates"
                ) from None
            if "SSL" in words:
                raise ServerError(f"{self.url}: expected TLS, found something else; http:// perhaps?") from None
            found = "no answer in time" if isinstance(error, TimeoutError) else getattr(error, "strerror", None) or words
            raise ServerError(
                f"{self.url}: expected a server, found none ({found}); start one with `llamacli serve`, or leave --server out"
            ) from None

    def _waiting(self, receive, *arguments):
        """What `receive` returns; a connection that stalls or ends is a ServerError."""
        try:
            return receive(*arguments)
        except TimeoutError:
            raise ServerError(
                f"{self.url}: the server has sent nothing for {self._stalled:g} s; try again, or check it"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, http.client.BadStatusLine) and not isinstance(error, http.client.RemoteDisconnected):
                raise ServerError(f"{self.url}: expected HTTP, found something else; check the address") from None
            raise ServerError(
                f"{self.url}: the connection broke off ({_words(error)}); try again, or check the server"
            ) from None


class Response:
    """A response whose body is still to be read."""

    def __init__(self, server: Server, connection: http.client.HTTPConnection, response: http.client.HTTPResponse):
        self._server, self._connection, self._response = server, connection, response
        self._url = server.url

    def __enter__(self) -> "Response":
        return self

    def __exit__(self, *_) -> None:
        self._response.close()
        self._connection.close()

    def check(self) -> None:
        """ServerError unless the status is 200; Missing for 404."""
        status, headers = self._response.status, self._response.headers
        if status == 200:
            return
        if 300 <= status < 400:
            where = headers.get("Location") or "nowhere"
            raise ServerError(f"{self._url}: expected an answer, found a redirect to {where:.200}; give --server that address")
        code, words = _told(self._some())
        if status == 401 or (status == 403 and not words):
            found = "another key" if self._server._key else "no key"
            raise ServerError(f"{self._url}: the server asks for a key, found {found}; set LLAMACLI_API_KEY to one of its own")
        if status == 404:
            raise Missing(f"{self._url}: expected a server with OpenAI's protocol, found HTTP 404; check the address")
        words = (words or f"HTTP {status} {self._response.reason}").rstrip(".")[:1000]
        if code == "context_length_exceeded":
            raise ContextFullError(f"{self._url}: {words}")
        again = headers.get("Retry-After", "")
        if status in (429, 503):
            words += f"; ask again in {again} s" if again.isdigit() and "again in" not in words else ""
        raise ServerError(f"{self._url}: {words}")

    def _some(self) -> bytes:
        try:
            return self._response.read(1 << 16)
        except (OSError, http.client.HTTPException):
            return b""

    def _part(self) -> bytes:
        return self._server._waiting(self._response.read1, 1 << 16)

    def object(self) -> dict:
        """The body, an object as JSON."""
        data = bytearray()
        while part := self._part():
            data += part
            if len(data) > LONGEST_BODY:
                raise ServerError(f"{self._url}: expected at most {LONGEST_BODY >> 20} MiB of JSON, found more")
        return self._parsed(bytes(data))

    def _parsed(self, data: bytes) -> dict:
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            kind = self._response.headers.get_content_type()
            raise ServerError(
                f"{self._url}: expected JSON, found other text ({kind:.60}); is it a server of OpenAI's protocol?"
            )
        return found

    def events(self) -> Iterator[dict | str]:
        """The objects of a stream of events, and the texts of its comments. ServerError if it ends without [DONE]."""
        if self._response.headers.get_content_type() != "text/event-stream":
            raise ServerError(
                f"{self._url}: expected a stream, found {self._response.headers.get_content_type():.60}; "
                f"is it a server of OpenAI's protocol?"
            )
        held = b""
        while part := self._part():
            *lines, held = (held + part).split(b"\n")
            if len(held) > LONGEST_LINE:
                raise ServerError(f"{self._url}: expected lines of at most {LONGEST_LINE >> 20} MiB, found a longer one")
            for line in map(bytes.strip, lines):
                if line.startswith(b":"):
                    yield line[1:].strip().decode("utf-8", "replace")
                elif line.startswith(b"data:"):
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        return
                    found = self._parsed(data)
                    if "error" in found:
                        raise ServerError(
                            f"{self._url}: the answer broke off: {_told(data)[1] or 'the server does not say why'}"
                        )
                    yield found
        raise ServerError(f"{self._url}: the answer broke off: the server ended the connection; try again")


def _told(data: bytes) -> tuple[str, str]:
    """(code, message) of an error's body."""
    try:
        error = json.loads(data)["error"]
        return (str(error.get("code")), str(error.get("message") or "")) if isinstance(error, dict) else ("", str(error))
    except (ValueError, KeyError, TypeError, RecursionError):
        return "", ""


def _words(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)[:120]
