"""Bodies of requests: counted as they come, each and all together, before anything is parsed.

In: a request. Out: the bytes of its body, or a Refusal. A refused client has a few seconds to send the rest, which is
discarded, so that it then reads the response.
"""

import asyncio

from starlette.requests import Request

from llamacli.serve.fields import Refusal

DRAINED = 3.0  # seconds for the rest of a body that is refused
BODIES_FULL = "bodies_full"


class Bodies:
    """`most`: bytes of a body; `seconds`: for it to come; `total`: bytes of the bodies of all requests that are under way."""

    def __init__(self, most: int, seconds: float, total: int):
        self._most, self._seconds, self._total = most, seconds, total
        self.held = 0  # bytes of all bodies

    async def read(self, request: Request) -> bytes:
        """Read the body. It counts until `request.state.held` (an ExitStack) is closed."""
        declared = request.headers.get("content-length", "")
        refused = self._too_large() if declared.isdigit() and int(declared) > self._most else None
        if refused and "expect" in request.headers:
            raise refused
        own = _Share(self)
        request.state.held.callback(own.give_back)
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(DRAINED if refused else self._seconds) as patience:
                async for part in request.stream():
                    if not refused and (refused := own.take(len(part))):
                        parts.clear()
                        own.give_back()
                        patience.reschedule(asyncio.get_running_loop().time() + DRAINED)
                    elif not refused:
                        parts.append(part)
        except TimeoutError:
            refused = refused or Refusal(f"expected the body within {self._seconds:g} s", 408, "body_too_slow")
        if refused:
            raise refused
        return b"".join(parts)

    def _too_large(self) -> Refusal:
        return Refusal(f"expected a body of at most {self._most} bytes, found more; shorten it", 413, "body_too_large")

    def _full(self) -> Refusal:
        return Refusal(
            f"the bodies of all requests under way may have {self._total} bytes together, and have; ask again later",
            503,
            BODIES_FULL,
            retry=5,
        )


class _Share:
    """The share of one request."""

    def __init__(self, bodies: Bodies):
        self._bodies, self._size = bodies, 0

    def take(self, n: int) -> Refusal | None:
        """Count `n` more bytes. Refusal if there are too many."""
        bodies = self._bodies
        if self._size + n > bodies._most:
            return bodies._too_large()
        if bodies.held + n > bodies._total:
            return bodies._full()
        self._size += n
        bodies.held += n
        return None

    def give_back(self) -> None:
        self._bodies.held -= self._size
        self._size = 0
