"""The web application: routes, who may use them, limits, errors.

In: a model and `Limits`. Out: `Server.app`, an ASGI application. Work on a request that takes long, such as tokenizing, is done
in a thread of its own, one request at a time, so that streams go on meanwhile.
"""

import asyncio
import hmac
import time
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from llamacli import environment
from llamacli.errors import ContextFullError, LlamacliError, PictureError, PromptError, UsageError
from llamacli.serve import asking, openai
from llamacli.serve.asking import Ask
from llamacli.serve.fields import Fields, Refusal, read_json
from llamacli.serve.metrics import Metrics
from llamacli.serve.scheduler import MOST_WAITING, PLACES, Begun, Busy, Scheduler, Stopping
from llamacli.serve.stream import KEEP_ALIVE, Answering, EventStream, unless_left

DRAINED = 3.0  # seconds for a client to send the rest of a body that is too large, so that it then reads the answer
LOCAL = ("localhost", "127.0.0.1", "[::1]")
OPEN = ("/health", "/v1/health")  # no key is asked for


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
    """One model and its application. `keys`: one of them is asked for, unless there is none; `origins`: web pages of these may
    use it, "*" for all; `hosts`: names by which clients may call the server, None for any.
    """

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
        self._keys, self._origins, self._hosts, self._report = [key.encode() for key in keys], origins, hosts, report
        self.scheduler = Scheduler(model, limits.places, limits.waiting, snapshots, report)
        self.metrics = Metrics()
        self._preparing = ThreadPoolExecutor(1, "prepare")
        self._latest: dict[str, deque[float]] = {}  # times of the requests of a client within a minute
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
        yield "GET", "/health", self._health
        yield "GET", "/v1/health", self._health
        yield "GET", "/metrics", self._metrics
        yield "GET", "/v1/models", self._models
        yield "GET", "/v1/models/{model:path}", self._model
        yield "POST", "/tokenize", self._tokenize
        yield "POST", "/detokenize", self._detokenize
        yield "POST", "/v1/chat/completions", self._chat
        yield "POST", "/v1/completions", self._completions

    # who may, and what goes wrong

    def _guarded(self, path: str, handler: Callable[[Request], Awaitable[Response | None]]):
        """The handler behind all checks; errors become answers in the protocol's form."""

        async def endpoint(request: Request) -> Response:
            request.state.began = time.monotonic()
            try:
                self._check(request, path)
                response = await handler(request)
            except ClientDisconnect:
                response = None
            except Exception as error:
                response = self._refused(error, path)
            if response is None:
                self.metrics.request(path, 499)  # nobody is left to read it
                return Response(status_code=499)
            self.metrics.request(path, response.status_code)
            return response

        return endpoint

    def _check(self, request: Request, path: str) -> None:
        host = request.headers.get("host", "")
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self._hosts is not None and name.lower() not in self._hosts:  # a page of that name would reach us by DNS rebinding
            raise Refusal(f"expected a request to {' or '.join(self._hosts)}, found one to {name!r:.80}", 403, "wrong_host")
        origin = request.headers.get("origin")
        own = origin is not None and origin.partition("://")[2] == host
        if origin and not own and not {origin, "*"} & set(self._origins):
            raise Refusal(
                f"web pages of {origin!r:.80} may not use this server; start it with --cors {origin:.80}", 403, "wrong_origin"
            )
        if path in OPEN:
            return
        if self._keys and not self._knows(_key(request)):
            raise Refusal(
                "expected an API key of this server, as `Authorization: Bearer KEY` or `x-api-key: KEY`, found "
                + ("another one" if _key(request) else "none"),
                401,
                "invalid_api_key",
            )
        if request.method == "POST":
            self._check_rate(self._client(request))

    def _knows(self, key: bytes) -> bool:
        """Whether it is one of the keys; the time it takes tells nothing of them but their lengths."""
        return any([hmac.compare_digest(key, own) for own in self._keys])

    def _client(self, request: Request) -> str:
        """Whose turn a request takes: the address it comes from, with its key."""
        return f"{request.client.host if request.client else ''} {_key(request).decode('latin-1')}"

    def _check_rate(self, client: str) -> None:
        if self.limits.rate is None:
            return
        now = time.monotonic()
        for other in [other for other, times in self._latest.items() if times[-1] < now - 60]:
            del self._latest[other]
        times = self._latest.setdefault(client, deque())
        while times and times[0] <= now - 60:
            times.popleft()
        if len(times) >= self.limits.rate:
            wait = int(times[0] + 60 - now) + 1
            raise Refusal(
                f"expected at most {self.limits.rate} requests a minute, found one more; ask again in {wait} s",
                429,
                "rate_limit_exceeded",
                retry=wait,
            )
        times.append(now)

    def _refused(self, error: Exception, path: str) -> Response:
        """An error as an answer. Those of the machine are told on stderr, not to the client: they name files."""
        refusal = self._refusal(error)
        headers = {"Retry-After": str(refusal.retry)} if refusal.retry else {}
        if refusal.status in (408, 413):
            headers["Connection"] = "close"
        if refusal.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self._error_body(refusal, path), refusal.status, headers)

    def _error_body(self, refusal: Refusal, path: str) -> dict:
        return openai.error_body(str(refusal), refusal.status, refusal.code, refusal.param)

    def _refusal(self, error: Exception) -> Refusal:
        match error:
            case Refusal():
                return error
            case Busy():
                return Refusal(str(error), 503, "queue_full", retry=5)
            case Stopping():
                return Refusal(str(error), 503, "stopping", retry=10)
            case ContextFullError():
                return Refusal(str(error), 400, "context_length_exceeded")
            case PromptError() | PictureError() | UsageError():
                return Refusal(str(error), 400, "invalid_value")
            case RecursionError():
                return Refusal("expected a body of JSON, found brackets nested too deep", 400, "invalid_json")
            case LlamacliError():
                self._report(str(error))
                return Refusal("the model could not answer; the server's stderr says why", 500, "model_error")
        self._report(f"{type(error).__name__}: {error} (a bug, please report it; LLAMACLI_DEBUG=1 shows where)")
        if environment.debug():
            self._report("".join(traceback.format_exception(error)))
        return Refusal("an error that nobody expected; the server's stderr says which", 500, "server_error")

    async def _unknown(self, request: Request, error: HTTPException) -> Response:
        words = {404: f"no such address: {request.url.path!r:.80}", 405: f"expected another method than {request.method}"}
        body = openai.error_body(words.get(error.status_code, error.detail), error.status_code)
        return JSONResponse(body, error.status_code, error.headers)

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

    def _samplers(self, ask: Ask) -> list:
        return [self.model.sampler(**ask.settings_of(i)) for i in range(ask.n * len(ask.prompts))]

    def _asked(self, request: Request, ask: Ask, samplers: Sequence) -> "_Timed":
        return _Timed(Answering(self.scheduler, ask, samplers, self._client(request)), self.metrics, request.state.began)

    async def _chat(self, request: Request) -> Response | None:
        return await self._answer(request, openai.read_chat)

    async def _completions(self, request: Request) -> Response | None:
        return await self._answer(request, openai.read_completion)

    async def _answer(self, request: Request, read) -> Response | None:
        """An answer in OpenAI's protocol, as a stream or whole."""

        def prepare(fields: Fields):
            ask, form = read(fields, self.model, self.name)
            return ask, form, self._samplers(ask)

        ask, form, samplers = await self._read(request, prepare)
        events, tokenizer = self._asked(request, ask, samplers), self.model.tokenizer
        if form.stream:
            return self._stream(openai.chunks(events, ask, form, tokenizer), events, request.url.path)
        return await self._whole(request, openai.whole(events, ask, form, tokenizer), events)

    def _stream(self, texts, events: "_Timed", path: str) -> Response:
        def failed(error: Exception) -> str:
            return openai.data(self._error_body(self._refusal(error), path))

        return EventStream(texts, events.answering, failed, self.limits.keep_alive)

    async def _whole(self, request: Request, body: Awaitable[dict], events: "_Timed") -> Response | None:
        try:
            found = await unless_left(request.receive, body)
            return None if found is None else JSONResponse(found)
        finally:
            events.answering.cancel()

    # the small ones

    async def _health(self, request: Request) -> Response:
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


class _Timed:
    """The events of an answer; the first token's time is taken."""

    def __init__(self, answering: Answering, metrics: Metrics, began: float):
        self.answering, self._metrics, self._began = answering, metrics, began

    def __aiter__(self) -> "_Timed":
        return self

    async def __anext__(self):
        choice, event = await anext(self.answering)
        if self._began is not None and not isinstance(event, Begun):
            self._metrics.first_token(time.monotonic() - self._began)
            self._began = None
        return choice, event


def _key(request: Request) -> bytes:
    """The key that a request gives, in OpenAI's or in Anthropic's header; empty without one."""
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    found = key.strip() if kind.lower() == "bearer" else request.headers.get("x-api-key", "")
    return found.encode("utf-8", "surrogatepass")
