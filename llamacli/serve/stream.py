"""Answers on the event loop: the events of jobs in order of arrival, and their stream to a client.

In: an Ask, and a scheduler. Out: `Answering`, an async iterator of events; `EventStream`, a response of server-sent events
(WHATWG HTML, 9.2). If a client leaves before the end, its jobs are cancelled.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress

from starlette.requests import ClientDisconnect
from starlette.responses import Response

from llamacli.piece import Piece
from llamacli.serve.asking import Ask
from llamacli.serve.fields import Refusal
from llamacli.serve.scheduler import Begun, Job, Scheduler

KEEP_ALIVE = 5.0  # seconds without an event after which a comment is sent


class Answering:
    """The jobs of an ask, under way. Iterating gives (number of the choice, Begun or Piece); an error of a job is raised."""

    def __init__(self, scheduler: Scheduler, ask: Ask, samplers: Sequence, client: str):
        """`samplers`: one for each choice, those of the first prompt first. Busy if the queue has no room."""
        self._scheduler, self._loop, self._events = scheduler, asyncio.get_running_loop(), asyncio.Queue()
        self._jobs = [
            Job(client, ask.prompts[i // ask.n], sampler, lambda event, i=i: self._put(i, event), ask.max_tokens, ask.stop)
            for i, sampler in enumerate(samplers)
        ]
        self._left = len(self._jobs)
        scheduler.submit(self._jobs)

    def _put(self, choice: int, event) -> None:
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._events.put_nowait, (choice, event))

    def __aiter__(self) -> "Answering":
        return self

    async def __anext__(self) -> tuple[int, Begun | Piece]:
        if not self._left:
            raise StopAsyncIteration
        choice, event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        self._left -= isinstance(event, Piece) and event.finish_reason is not None
        return choice, event

    def progress(self) -> str:
        """The progress of the prompts, for a waiting client."""
        done, all_ = (sum(numbers) for numbers in zip(*((j.evaluated, len(j.prompt)) for j in self._jobs), strict=True))
        return f"{done} of {all_} tokens of the prompt" if done else "waiting"

    def cancel(self) -> None:
        """Cancel the unfinished jobs."""
        for job in self._jobs:
            self._scheduler.cancel(job)


class EventStream(Response):
    """`events`: texts of the protocol, one each. After an exception, `refusal_of` makes a Refusal of it, and `failed` makes the
    last event from this and the number of earlier events.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[str],
        answering: Answering,
        failed: Callable[[Refusal, int], str],
        refusal_of: Callable[[Exception], Refusal],
        keep_alive: float = KEEP_ALIVE,
    ):
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._answering, self._keep_alive = events, answering, keep_alive
        self._failed, self._refusal_of = failed, refusal_of
        self._told = 0
        self.cut: str | None = None  # the reason why it ended early

    async def __call__(self, scope, receive, send) -> None:
        leaving, following = asyncio.ensure_future(_left(receive)), None
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            while True:
                following = following or asyncio.ensure_future(anext(self._events, None))
                waited = {following, leaving}
                await asyncio.wait(waited, timeout=self._keep_alive, return_when=asyncio.FIRST_COMPLETED)
                if leaving.done():
                    self.cut = "client left"
                    return
                if following.done():
                    text, following = self._taken(following)
                    if text is None:
                        break
                else:
                    text = f": {self._answering.progress()}\n\n"
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._answering.cancel()
            for task in (leaving, following):
                if task is not None:
                    task.cancel()

    def _taken(self, following: asyncio.Future) -> tuple[str | None, asyncio.Future | None]:
        try:
            text = following.result()
            self._told += 1
            return text, None
        except Exception as error:
            ended = asyncio.get_running_loop().create_future()
            ended.set_result(None)
            refusal = self._refusal_of(error)
            self.cut = refusal.code
            return self._failed(refusal, self._told), ended


async def while_there(receive, awaitable: Awaitable):
    """Wait for the result. ClientDisconnect if the client leaves first."""
    leaving, working = asyncio.ensure_future(_left(receive)), asyncio.ensure_future(awaitable)
    try:
        await asyncio.wait({leaving, working}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()


async def _left(receive) -> None:
    """Returns when the client has left. Other data that it sends is ignored."""
    while (await receive())["type"] != "http.disconnect":
        pass
