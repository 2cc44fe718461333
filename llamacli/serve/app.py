"""The web application: routes, who may use them, limits, errors.

In: a model and `Limits`. Out: `Server.app`, an ASGI application. Work on a request that takes long, such as tokenizing, is done
in a thread of its own, one request at a time, so that streams go on meanwhile.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from llamacli.serve import anthropic, asking, openai, responses
from llamacli.serve.calling import calls
from llamacli.serve.fields import Fields, Refusal, read_json
from llamacli.serve.guard import LOCAL, Guard
from llamacli.serve.metrics import Metrics
from llamacli.serve.page import page
from llamacli.serve.refusals import refusal_of, tell_bug
from llamacli.serve.scheduler import MOST_WAITING, PLACES, Begun, Scheduler, Stopping
from llamacli.serve.stream import KEEP_ALIVE, Answering, EventStream, unless_left

DRAINED = 3.0  # seconds for a client to send the rest of a body that is too large, so that it then reads the answer
OPEN = ("/", "/health", "/v1/health")  # no key is asked for


@dataclass(frozen=True)
class Limits:
    """What a client may ask for. `rate`: requests a minute of each client, None for any number."""

    places: int = PLACES
    waiting: int = MOST_WAITING
    body: int = 16 << 20  # bytes
    body_seconds: float = 60.0
    rate: int | None = None
    keep_alive: float = KEEP_ALIVE


class Server:
    """One model and its application. `keys`, `origins`, `hosts`: as for Guard. `report`: gets lines for stderr."""

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
    ):
        self.model, self.name, self.limits, self.created = model, name, limits, int(time.time())
        self._guard, self._report = Guard(keys, origins, hosts, limits.rate), report
        self.scheduler = Scheduler(model, limits.places, limits.waiting, snapshots, lambda error: tell_bug(error, report))
        self.metrics = Metrics()
        self._preparing = ThreadPoolExecutor(1, "prepare")
        cors = Middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])
        self.app = Starlette(
            routes=[Route(path, self._guarded(path, handler), methods=[method]) for method, path, handler in self._routes()],
            exception_handlers={HTTPException: self._unknown},
            middleware=[cors] if origins else [],
        )

    def close(self) -> None:
        """End all answers and the threads."""
        self.scheduler.close()
        self._preparing.shutdown(wait=False, cancel_futures=True)

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

    # who may, and what goes wrong

    def _guarded(self, path: str, handler: Callable[[Request], Awaitable[Response | None]]):
        """The handler behind all checks; errors become answers in the protocol's form."""

        async def endpoint(request: Request) -> Response:
            request.state.began = time.monotonic()
            try:
                self._guard.check(request, anybody=path in OPEN)
                response = await handler(request)
            except ClientDisconnect:
                response = None
            except Exception as error:
                response = self._refused(refusal_of(error, self._report), path)
            if response is None:
                response = Response(status_code=499)  # nobody is left to read it
            self.metrics.request(path, response.status_code)
            return response

        return endpoint

    def _refused(self, refusal: Refusal, path: str) -> Response:
        headers = {"Retry-After": str(refusal.retry)} if refusal.retry else {}
        if refusal.status in (408, 413):
            headers["Connection"] = "close"
        if refusal.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        protocol = anthropic if path.startswith("/v1/messages") else openai
        return JSONResponse(protocol.error_body(refusal), refusal.status, headers)

    async def _unknown(self, request: Request, error: HTTPException) -> Response:
        words = {404: f"no such address: {request.url.path!r:.80}", 405: f"expected another method than {request.method}"}
        refusal = Refusal(words.get(error.status_code, error.detail), error.status_code)
        return JSONResponse(openai.error_body(refusal), error.status_code, error.headers)

    # bodies

    async def _body(self, request: Request) -> bytes:
        """The body, if it is as small as it must be and comes in time."""
        limit = self.limits.body
        length = request.headers.get("content-length", "")
        too_large = Refusal(f"expected a body of at most {limit} bytes, found more; shorten it", 413, "body_too_large")
        large = length.isdigit() and int(length) > limit
        if large and "expect" in request.headers:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(DRAINED if large else self.limits.body_seconds) as patience:
                async for part in request.stream():
                    size += len(part)
                    if size > limit and not large:
                        large = True
                        patience.reschedule(asyncio.get_running_loop().time() + DRAINED)
                    if large:
                        parts.clear()
                    else:
                        parts.append(part)
        except TimeoutError:
            if not large:
                raise Refusal(f"expected the body within {self.limits.body_seconds:g} s", 408, "body_too_slow") from None
        if large:
            raise too_large
        return b"".join(parts)

    async def _read(self, request: Request, read: Callable[[Fields], object]):
        """What `read` makes of the body's fields, in the thread for such work."""
        body = await self._body(request)
        return await asyncio.get_running_loop().run_in_executor(self._preparing, lambda: read(Fields(read_json(body))))

    # answers

    async def _chat(self, request: Request) -> Response | None:
        return await self._answer(request, openai, openai.read_chat)

    async def _completions(self, request: Request) -> Response | None:
        return await self._answer(request, openai, openai.read_completion)

    async def _messages(self, request: Request) -> Response | None:
        return await self._answer(request, anthropic, anthropic.read)

    async def _responses(self, request: Request) -> Response | None:
        return await self._answer(request, responses, responses.read)

    async def _answer(self, request: Request, protocol, read) -> Response | None:
        """An answer in a protocol, as a stream or whole; None if the client left. `read` makes an Ask and a form of fields."""

        def prepare(fields: Fields):
            ask, form = read(fields, self.model, self.name)
            ask.check()
            return ask, form, [self.model.sampler(**ask.settings_of(i)) for i in range(ask.n * len(ask.prompts))]

        ask, form, samplers = await self._read(request, prepare)
        answering = Answering(self.scheduler, ask, samplers, self._guard.client(request))
        try:
            events = self._timed(answering, request.state.began)
            events = calls(events, ask.offer) if ask.offer else events
            if form.stream:
                texts = protocol.chunks(events, ask, form, self.model.tokenizer)
                failed = lambda error: protocol.failed(refusal_of(error, self._report))
                return EventStream(texts, answering, failed, self.limits.keep_alive)
            body = await unless_left(request.receive, protocol.whole(events, ask, form, self.model.tokenizer))
            return None if body is None else JSONResponse(body)
        finally:
            if not form.stream:
                answering.cancel()

    async def _timed(self, answering: Answering, began: float) -> AsyncIterator:
        """The events of an answer; the time of its first token is taken."""
        first = True
        async for choice, event in answering:
            if first and not isinstance(event, Begun):
                self.metrics.first_token(time.monotonic() - began)
                first = False
            yield choice, event

    # the small ones

    async def _page(self, request: Request) -> Response:
        return page()

    async def _health(self, request: Request) -> Response:
        if not self.scheduler.works:
            raise Stopping("the server is stopping; ask again later")
        return JSONResponse({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        return PlainTextResponse(self.metrics.text(self.scheduler), media_type="text/plain; version=0.0.4")

    async def _models(self, request: Request) -> Response:
        """OpenAI's list, and the one with sizes of the context that Codex reads."""
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
        def read(fields: Fields) -> list[int]:
            if "messages" in fields:
                return asking.prompt(self.model, [openai.read_message(message) for message in fields.objects("messages", 1)])
            text = fields.text("content" if "content" in fields else "prompt", "")
            return self.model.tokenizer.encode(text, bos=fields.flag("add_special", True), special=fields.flag("parse_special"))

        ids = [int(id) for id in await self._read(request, read)]
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": self.model.ctx})

    async def _detokenize(self, request: Request) -> Response:
        def read(fields: Fields) -> str:
            ids = fields.items("tokens")
            if not all(type(id) is int and 0 <= id < self.model.config.n_vocab for id in ids):
                raise fields.wrong("tokens", f"ids below {self.model.config.n_vocab}")
            return self.model.tokenizer.decode(ids)

        text = await self._read(request, read)
        return JSONResponse({"content": text, "prompt": text})
