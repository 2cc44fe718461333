"""Access control and rate limits.

In: a request, before its body is read. Out: nothing, or a Refusal.
"""

import hmac
import time
from collections import deque
from collections.abc import Sequence

from starlette.requests import Request

from llamacli.serve.fields import Refusal

LOCAL = ("localhost", "127.0.0.1", "[::1]")
MINUTE = 60


class Guard:
    """`keys`: a request must have one of them; empty: no key is needed; `origins`: web pages of these origins are allowed, "*"
    for all; `hosts`: the allowed names in the Host header, None for any; `rate`: requests per minute of each client, None for
    any number.
    """

    def __init__(self, keys: Sequence[str], origins: Sequence[str], hosts: Sequence[str] | None, rate: int | None):
        self._keys, self._origins, self._hosts, self._rate = [key.encode() for key in keys], set(origins), hosts, rate
        self._latest: dict[str, deque[float]] = {}  # times of a client's requests of the last minute

    def check(self, request: Request, anybody: bool = False) -> None:
        """Raise Refusal if the request is not allowed. `anybody`: no key is needed."""
        host = request.headers.get("host", "")
        name = host if host.endswith("]") else host.rsplit(":", 1)[0]
        if self._hosts is not None and name.lower() not in self._hosts:  # DNS rebinding lets web pages send such requests
            raise Refusal(f"expected a request to {' or '.join(self._hosts)}, found one to {name!r:.80}", 403, "wrong_host")
        origin = request.headers.get("origin")
        if origin and origin.partition("://")[2] != host and not {origin, "*"} & self._origins:
            raise Refusal(
                f"web pages of {origin!r:.80} may not use this server; start it with --cors {origin:.80}", 403, "wrong_origin"
            )
        if anybody:
            return
        if self._keys and not self._knows(_key(request)):
            found = "another one" if _key(request) else "none"
            raise Refusal(
                f"expected an API key of this server, as `Authorization: Bearer KEY` or `x-api-key: KEY`, found {found}",
                401,
                "invalid_api_key",
            )
        if request.method == "POST" and self._rate is not None:
            self._count(self.client(request) if self._keys else _address(request), self._rate)

    def client(self, request: Request) -> str:
        """The client that a request counts for: its address and key. The key is unchecked if the server has none."""
        return f"{_address(request)} {_key(request).decode('latin-1')}"

    def _knows(self, key: bytes) -> bool:
        """Whether it is one of the keys; the time of the comparison reveals only their lengths."""
        return any([hmac.compare_digest(key, own) for own in self._keys])

    def _count(self, client: str, rate: int) -> None:
        now = time.monotonic()
        for other in [other for other, times in self._latest.items() if times[-1] <= now - MINUTE]:
            del self._latest[other]
        times = self._latest.setdefault(client, deque())
        while times and times[0] <= now - MINUTE:
            times.popleft()
        if len(times) >= rate:
            wait = int(times[0] + MINUTE - now) + 1
            raise Refusal(
                f"expected at most {rate} requests a minute, found one more; ask again in {wait} s",
                429,
                "rate_limit_exceeded",
                retry=wait,
            )
        times.append(now)


def _address(request: Request) -> str:
    return request.client.host if request.client else ""


def _key(request: Request) -> bytes:
    """The key in OpenAI's or Anthropic's header of a request; empty without one."""
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    found = key.strip() if kind.lower() == "bearer" else request.headers.get("x-api-key", "")
    return found.encode("utf-8", "surrogatepass")
