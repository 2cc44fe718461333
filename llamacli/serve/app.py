"""The web application: routes, access control, limits, errors.

In: a model and `Limits`. Out: `Server.app`, an ASGI application. Long work on a request, such as tokenizing, runs in threads,
so that streams continue meanwhile; the vision tower runs in another thread, so that text requests do not wait for it.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from llamacli.serve import anthropic, asking, openai, responses
from llamacli.serve.bodies import BODIES_FULL, Bodies
from llamacli.serve.calling import calls
from llamacli.serve.endpoint import Endpoint, Log
from llamacli.serve.fields import Fields, Refusal, read_json
from llamacli.serve.guard import LOCAL, Guard
from llamacli.serve.metrics import Metrics
from llamacli.serve.page import page
from llamacli.serve.refusals import refusal_of, tell_bug
from llamacli.serve.scheduler import MOST_WAITING, PLACES, Begun, Scheduler, Stopping
from llamacli.serve.stream import KEEP_ALIVE, Answering, EventStream, while_there

PREPARED = 4  # requests that are read and tokenized at a time
OPEN = ("/", "/health", "/v1/health")  # routes without a key


@dataclass(frozen=True)
class Limits:
    """Limits for clients. `rate`: requests per minute of each client, None for any number."""

    places: int = PLACES
    waiting: int = MOST_WAITING
    body: int = 16 << 20  # bytes
    body_seconds: float = 60.0
    bodies: int | None = None  # bytes of all requests under way together; None: 16 of the largest size
    rate: int | None = None
    keep_alive: float = KEEP_ALIVE


class Server:
    """One model and its application. `keys`, `origins`, `hosts`: as for Guard. `report`: called with lines for stderr."""

    def __init__(
        self,
        model,
        name: str,
        limits: Limits = Limits(),
        keys: Sequence[str] = (),
        origins: Sequence[str] = (),
        hosts: Sequence[str] | None = LOCAL,
        snapshots=None,
        report: Callable[[str], None] = lambda text: None,
        log: Callable[[str], None] | None = None,
    ):
        """`log`: called with a line about each request."""
        self.model, self.name, self.limits, self.created = model, name, limits, int(time.time())
        self._guard, self._report = Guard(keys, origins, hosts, limits.rate), report
        self.scheduler = Scheduler(model, limits.places, limits.waiting, snapshots, lambda error: tell_bug(error, report))
        self.metrics = Metrics()
        self._bodies = Bodies(limits.body, limits.body_seconds, 16 * limits.body if limits.bodies is None else limits.bodies)
        self._preparing, self._looking = ThreadPoolExecutor(PREPARED, "prepare"), ThreadPoolExecutor(1, "look")
        self._seeing, self._log = asyncio.Semaphore(limits.places), Log(log)
        cors = Middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])
        self.app = Starlette(
            routes=[Route(path, self._guarded(path, handler), methods=[method]) for method, path, handler in self._routes()],
            exception_handlers={HTTPException: self._unknown},
            middleware=[cors] if origins else [],
        )

    def close(self) -> None:
        """End all answers and the threads."""
        self.scheduler.close()
        for threads in (self._preparing, self._looking):
            threads.shutdown(wait=False, cancel_futures=True)

    def _routes(self):
        yield "GET", "/", self._page
        yield "GET", "/health", self._health
        yield "GET", "/v1/health", self._health
        yield "GET", "/metrics", self._metrics
        yield "GET", "/v1/models", self._models
        yield "GET", "/v1/models/{model:path}", self._model
        yield "POST", "/tokenize", self._tokenize
        yield "POST", "/detokenize", self._detokenize
        yield "POST", "/v1/chat/completions", self._chat
        yield "POST", "/v1/completions", self._completions
        yield "POST", "/v1/responses", self._responses
        yield "POST", "/v1/messages", self._messages
        yield "POST", "/v1/messages/count_tokens", self._count

    # access control and errors

    def _guarded(self, path: str, handler: Callable[[Request], Awaitable[Response]]) -> Endpoint:
        """A handler with all checks before it; errors become responses in the protocol's form."""

        async def answer(request: Request) -> Response:
            try:
                self._guard.check(request, anybody=path in OPEN)
                response = await handler(request)
            except ClientDisconnect:
                response = Response(status_code=499)  # the client has left
            except Exception as error:
                response = self._refused(refusal_of(error, self._report), path)
            self.metrics.request(path, response.status_code)
            return response

        return Endpoint(path, answer, self._log)

    def _refused(self, refusal: Refusal, path: str) -> Response:
        headers = {"Retry-After": str(refusal.retry)} if refusal.retry else {}
        if refusal.status in (408, 413) or refusal.code == BODIES_FULL:
            headers["Connection"] = "close"
        if refusal.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        protocol = anthropic if path.startswith("/v1/messages") else openai
        return JSONResponse(protocol.error_body(refusal), refusal.status, headers)

    async def _unknown(self, request: Request, error: HTTPException) -> Response:
        words = {404: f"no such address: {request.url.path!r:.80}", 405: f"expected another method than {request.method}"}
        refusal = Refusal(words.get(error.status_code, error.detail), error.status_code)
        self._log.line("-", error.status_code)
        return JSONResponse(openai.error_body(refusal), error.status_code, error.headers)

    # long work in threads

    async def _read(self, request: Request, read: Callable[[Fields], object]):
        """The result of `read` on the body's fields."""
        body = await self._bodies.read(request)
        return await self._prepared(request, lambda: read(Fields(read_json(body))))

    async def _prepared(self, request: Request, work: Callable[[], object]):
        """The result of `work`, run in a thread. ClientDisconnect if the client leaves before it ends."""
        self._check_works()
        return await while_there(request.receive, asyncio.get_running_loop().run_in_executor(self._preparing, work))

    def _check_works(self) -> None:
        """Raise Stopping if the threads have ended or are about to end."""
        if not self.scheduler.works:
            raise Stopping("the server is stopping; ask again later")

    async def _seen(self, request: Request, prompt: Sequence[int] | asking.Pictured) -> Sequence:
        """The tokens of a prompt after its pictures were encoded. Views are held for at most as many requests as are answered
        at a time; other requests wait. Pictures of several requests take turns.
        """
        if not isinstance(prompt, asking.Pictured):
            return prompt
        await while_there(request.receive, self._seeing.acquire())
        request.state.held.callback(self._seeing.release)
        for part in prompt.parts:
            part["image"] = await self._looked_at(request, part["image"])
        return await self._prepared(request, lambda: prompt.ids(self.model))

    async def _looked_at(self, request: Request, picture):
        """Encode a picture in the tower's thread. If the client leaves, the tower stops."""
        gone = threading.Event()
        self._check_works()

        def follow(*_):  # an interrupt before the tower begins would be lost
            if gone.is_set():
                raise KeyboardInterrupt

        def look():
            self.model.sight.follow = follow
            while not gone.is_set():
                with suppress(KeyboardInterrupt):  # may have been meant for the picture before
                    return self.model.sight.look(picture)

        looking = self._looking.submit(look)
        try:
            return await while_there(request.receive, asyncio.wrap_future(looking))
        except ClientDisconnect:
            gone.set()
            if not looking.cancel():
                self.model.sight.interrupt()
            raise

    # answers

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, openai, openai.read_chat)

    async def _completions(self, request: Request) -> Response:
        return await self._answer(request, openai, openai.read_completion)

    async def _messages(self, request: Request) -> Response:
        return await self._answer(request, anthropic, anthropic.read)

    async def _responses(self, request: Request) -> Response:
        return await self._answer(request, responses, responses.read)

    async def _answer(self, request: Request, protocol, read) -> Response:
        """An answer in a protocol, as a stream or as one body. `read` makes an Ask and a form from fields."""

        def prepare(fields: Fields):
            ask, form = read(fields, self.model, self.name)
            ask.check()
            return ask, form, [self.model.sampler(**ask.settings_of(i)) for i in range(ask.n * len(ask.prompts))]

        ask, form, samplers = await self._read(request, prepare)
        ask.prompts = [await self._seen(request, prompt) for prompt in ask.prompts]
        answering = Answering(self.scheduler, ask, samplers, self._guard.client(request))
        try:
            events = self._counted(answering, ask, request)
            events = calls(events, ask.offer) if ask.offer else events
            if form.stream:
                texts = protocol.chunks(events, ask, form, self.model.tokenizer)
                refused = lambda error: refusal_of(error, self._report)
                return EventStream(texts, answering, protocol.failed, refused, self.limits.keep_alive)
            return JSONResponse(await while_there(request.receive, protocol.whole(events, ask, form, self.model.tokenizer)))
        finally:
            if not form.stream:
                answering.cancel()

    async def _counted(self, answering: Answering, ask: asking.Ask, request: Request) -> AsyncIterator:
        """The events of an answer; counts its tokens and notes the time of the first."""
        record = request.state.record
        async for choice, event in answering:
            if record.first is None and not isinstance(event, Begun):
                record.first = time.monotonic()
                self.metrics.first_token(record.first - record.began)
            record.usage.add(choice, ask.n, event)
            yield choice, event

    # other routes

    async def _page(self, request: Request) -> Response:
        return page()

    async def _health(self, request: Request) -> Response:
        if not self.scheduler.works:
            raise Stopping("the server is stopping; ask again later")
        return JSONResponse({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        return PlainTextResponse(self.metrics.text(self.scheduler), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        """OpenAI's list of models, and the list with context sizes that Codex reads."""
        sizes = {"slug": self.name, "display_name": self.name, "context_window": self.model.ctx}
        return JSONResponse({"object": "list", "data": [self._about()], "models": [sizes]})

    async def _model(self, request: Request) -> Response:
        if request.path_params["model"] != self.name:
            raise Refusal(f"expected {self.name}, the model of this server, found another name", 404, "model_not_found")
        return JSONResponse(self._about())

    def _about(self) -> dict:
        about = {"id": self.name, "object": "model", "created": self.created, "owned_by": "llamacli"}
        return about | {
            "max_model_len": self.model.ctx,
            "meta": {"n_ctx": self.model.ctx, "n_vocab": self.model.config.n_vocab},
        }

    async def _count(self, request: Request) -> Response:
        return JSONResponse(await self._read(request, lambda fields: anthropic.count(fields, self.model)))

    async def _tokenize(self, request: Request) -> Response:
        def read(fields: Fields) -> Sequence[int] | asking.Pictured:
            if "messages" in fields:
                return asking.prompt(self.model, [openai.read_message(message) for message in fields.objects("messages", 1)])
            text = fields.text("content" if "content" in fields else "prompt", "")
            return self.model.tokenizer.encode(text, bos=fields.flag("add_special", True), special=fields.flag("parse_special"))

        ids = [int(id) for id in await self._seen(request, await self._read(request, read))]
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": self.model.ctx})

    async def _detokenize(self, request: Request) -> Response:
        def read(fields: Fields) -> str:
            ids = fields.items("tokens")
            if not all(type(id) is int and 0 <= id < self.model.config.n_vocab for id in ids):
                raise fields.wrong("tokens", f"ids below {self.model.config.n_vocab}")
            return self.model.tokenizer.decode(ids)

        text = await self._read(request, read)
        return JSONResponse({"content": text, "prompt": text})
