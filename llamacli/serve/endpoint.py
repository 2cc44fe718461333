"""A route as an ASGI application, and a log line for each request.

In: a handler of requests. Out: an `Endpoint`, which releases a request's resources when its response ends; lines with time,
route, status, tokens and speed. A line contains no data of a client: no content, no key, no address.
"""

import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack

from starlette.requests import Request
from starlette.responses import Response

from llamacli.serve.openai import Usage


class Record:
    """Measurements of a request: the times of its begin and its first token, by time.monotonic; the tokens of its answers."""

    def __init__(self):
        self.began, self.first, self.usage = time.monotonic(), None, Usage()


class Log:
    """Passes lines about requests to `write`, unless that is None."""

    def __init__(self, write: Callable[[str], None] | None):
        self._write = write

    def line(self, route: str, status: int, record: Record | None = None, cut: str | None = None) -> None:
        """Write the line of a finished request. `cut`: the reason why a stream ended early."""
        if self._write is None:
            return
        said = [f"{time.strftime('%Y-%m-%d %H:%M:%S')} {route} {status}" + (f" ({cut})" if cut else "")]
        if record is not None:
            now, usage = time.monotonic(), record.usage
            if usage.prompt:
                said.append(f"{usage.prompt} tokens in ({usage.cached} reused), {usage.completion} out")
            said.append(f"{now - record.began:.2f} s")
            if usage.completion > 1 and record.first is not None and now > record.first:
                said.append(f"{(usage.completion - 1) / (now - record.first):.1f} tok/s")
        self._write(", ".join(said))


class Endpoint:
    """`answer` makes the response to a request, whose state has a `record` and `held`, an ExitStack that is closed after the
    response.
    """

    def __init__(self, route: str, answer: Callable[[Request], Awaitable[Response]], log: Log):
        self._route, self._answer, self._log = route, answer, log

    async def __call__(self, scope, receive, send) -> None:
        request = Request(scope, receive, send)
        with ExitStack() as held:
            request.state.held, request.state.record = held, Record()
            response = await self._answer(request)
            try:
                await response(scope, receive, send)
            finally:
                self._log.line(self._route, response.status_code, request.state.record, getattr(response, "cut", None))
