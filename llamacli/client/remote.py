"""A model behind a server: what `run` and `chat` need of one, by OpenAI's protocol, as `llamacli serve` and others speak it.

In: an address, messages, settings. Out: `connect` gives a `Remote`, used like a `Model`: `prompt_ids` makes a prompt, `session`
a session whose `stream` yields the same pieces. Tokens are counted by the server. It imports neither NumPy nor Numba.
"""

import base64
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

from llamacli.client.connection import STALLED, Missing, Server
from llamacli.errors import ServerError, UsageError
from llamacli.piece import Piece, Stats

UNKNOWN_CTX = 1 << 17  # tokens, where a server does not say
LONGEST_ANSWER = 64 << 20  # characters
SHORTEST = 0.02  # seconds that an answer must take for its speed to be shown
BANNED = -100.0  # the bias that OpenAI's protocol has for a token that must not come
_NAMES = {"temp": "temperature"}  # of settings, in the protocol
_PROGRESS = re.compile(r"(\d{1,12}) of (\d{1,12}) tokens")
_SURROGATES = re.compile("[\ud800-\udfff]")


def connect(address: str, key: str | None, name: str | None = None, stalled: float = STALLED) -> "Remote":
    """The model of a server, by its name if there are several. ServerError if none answers there or the key is wrong."""
    server = Server(address, key, stalled)
    try:
        found = server.json("GET", "/v1/models").get("data")
    except Missing:  # some have no list
        found = []
    found = found if isinstance(found, list) else []
    models = [each for each in found if isinstance(each, dict) and isinstance(each.get("id"), str)]
    names = [each["id"] for each in models]
    if name is not None and names and name not in names:
        shown = ", ".join(names[:5]) + ", ..." * (len(names) > 5)
        raise UsageError(f"-m: expected a model of {server.url} ({shown}), found {name}; --server none answers here")
    about = next((each for each in models if name in (None, each["id"])), {})
    return Remote(server, name or about.get("id") or "default", about)


class Prompt(NamedTuple):
    """What is asked: the fields of a request that have it."""

    path: str
    fields: dict


@dataclass
class Asked:
    """Settings as fields of a request. `constraint`: what the answer is bound to, or None."""

    fields: dict
    constraint: dict | None


class Remote:
    """A model behind a server. `ctx`: tokens of its context, 0 where the server does not say."""

    def __init__(self, server: Server, name: str, about: dict):
        self.server, self.name, self.defaults = server, name, {}
        meta = about.get("meta") if isinstance(about.get("meta"), dict) else {}
        self.ctx = _count(about.get("max_model_len")) or _count(meta.get("n_ctx"))
        self.config = SimpleNamespace(n_vocab=_count(meta.get("n_vocab")) or 1 << 31, context_length=self.ctx)
        self.engine = SimpleNamespace(follow_progress=None)

    def prompt_ids(
        self, messages: Sequence[dict], image_tiles: int | None = None, tools: Sequence[dict] = (), limit: int | None = None
    ) -> Prompt:
        """A conversation to be answered. `tools` may be called. Tiles and the length of a prompt are the server's to limit."""
        fields = {"messages": _messages(messages)}
        return Prompt("/v1/chat/completions", fields | ({"tools": list(tools)} if tools else {}))

    def text(self, text: str) -> Prompt:
        """A text to be continued, without the chat template."""
        return Prompt("/v1/completions", {"prompt": text})

    def count(self, text: str) -> int | None:
        """How many tokens a text has; None if the server does not tell."""
        try:
            found = self.server.json("POST", "/tokenize", {"content": text, "add_special": False})
        except Missing:
            return None
        return len(found["tokens"]) if isinstance(found.get("tokens"), list) else None

    def sampler(self, mirostat=0, samplers=None, logit_bias=None, ignore_eos=False, seed=None, **settings) -> Asked:
        """As Model.sampler takes them; what is None is left to the server."""
        bound = {name: settings.pop(name, None) for name in ("schema", "grammar", "choice")}
        for name in ("dry_sequence_breakers", "logprobs"):  # refused by the command line
            settings.pop(name, None)
        fields = {_NAMES.get(name, name): value for name, value in settings.items() if value is not None}
        fields |= {"seed": seed} if seed is not None else {}
        fields |= {"mirostat": mirostat} if mirostat else {}
        fields |= {"samplers": list(samplers)} if samplers else {}
        fields |= {"ignore_eos": True} if ignore_eos else {}
        if logit_bias:
            if beyond := next((x for x in logit_bias.values() if x != -float("inf") and not -100 <= x <= 100), None):
                raise UsageError(f"--logit-bias: expected from -100 to 100 with a server, found {beyond:g}")
            fields["logit_bias"] = {str(id): max(x, BANNED) for id, x in logit_bias.items()}
        binding = _binding(**bound)
        return Asked(fields | binding, binding or None)

    def session(self, *_, **__) -> "RemoteSession":
        """What answers, and counts."""
        return RemoteSession(self)


class RemoteSession:
    """Like a Session, but the cache is in the server.

    Only the length of `ids` is right: the number of tokens that the server counted.
    """

    def __init__(self, model: Remote):
        self._model, self.ids, self.stats = model, range(0), Stats()
        self.ctx, self.cache, self.snapshots, self.speculate = model.ctx or UNKNOWN_CTX, None, None, False

    def stream(
        self, prompt: Prompt, asked: Asked, max_tokens: int | None = None, stop: Sequence[str] = (), begun: Sequence = ()
    ) -> Iterator[Piece]:
        """The answer. Calls of tools come as text at its end, as a model writes them (text/calls.py)."""
        stats = self.stats = Stats()
        model, body = self._model, {**prompt.fields, **asked.fields, "model": self._model.name, "stream": True}
        body |= {"stream_options": {"include_usage": True}} | ({"max_tokens": max_tokens} if max_tokens else {})
        body |= {"stop": list(stop)} if stop else {}
        began, first, reason, calls, usage, size = time.perf_counter(), None, None, {}, {}, 0
        try:
            answer = model.server.open("POST", prompt.path, body)
        except Missing as error:
            raise ServerError(str(error)) from None
        with answer:
            for event in answer.events():
                if isinstance(event, str):
                    if (found := _PROGRESS.match(event)) and model.engine.follow_progress:
                        model.engine.follow_progress(int(found[1]), int(found[2]))
                    continue
                usage = event.get("usage") or usage
                text, why, asks = _delta(event)
                reason = why or reason
                size += len(text) + (len(json.dumps(asks)) if asks else 0)
                if size > LONGEST_ANSWER:
                    raise ServerError(
                        f"{model.server.url}: expected an answer of at most {LONGEST_ANSWER} characters, found more"
                    )
                for call in asks:
                    _join(calls, call)
                if text or asks:
                    now = time.perf_counter()
                    first = first or now
                    stats.completion_tokens += 1
                    stats.prefill_s, stats.decode_s = first - began, now - first
                if text:
                    yield Piece(text, None)
        self._count(usage if isinstance(usage, dict) else {})
        full = model.ctx and stats.prompt_tokens + stats.completion_tokens >= model.ctx - 1
        if reason == "length" and full and stats.completion_tokens != max_tokens:
            reason = "context"
        yield Piece("\n".join(map(_call, calls.values())), None, "stop" if reason in (None, "tool_calls") else reason)

    def _count(self, usage: dict) -> None:
        """Take the server's count."""
        stats, details = self.stats, usage.get("prompt_tokens_details")
        stats.prompt_tokens = _count(usage.get("prompt_tokens"))
        stats.cached_tokens = _count(details.get("cached_tokens")) if isinstance(details, dict) else 0
        stats.completion_tokens = _count(usage.get("completion_tokens")) or stats.completion_tokens
        stats.decoded = max(0, stats.completion_tokens - 1) if stats.decode_s > SHORTEST else 0
        self.ids = range(stats.prompt_tokens + stats.completion_tokens)


def data_url(data: bytes) -> str:
    """A picture's file as a request carries it."""
    kinds = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp", b"BM": "bmp"}
    kind = next((kind for start, kind in kinds.items() if data.startswith(start)), "avif" if data[4:8] == b"ftyp" else "tiff")
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _count(value) -> int:
    """A number that a server gives, or 0."""
    return value if type(value) is int and 0 <= value < 1 << 53 else 0


def _binding(schema=None, grammar=None, choice=None) -> dict:
    if schema is not None:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}}
    if choice is not None:
        grammar = "root ::= " + " | ".join(json.dumps(text, ensure_ascii=False) for text in choice)  # GBNF
    return {} if grammar is None else {"grammar": grammar}


def _messages(messages: Sequence[dict]) -> list[dict]:
    """Messages of a chat template as the protocol has them: results of calls name their call."""
    found, waiting = [], []
    for i, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if not isinstance(content, str):
            content = [
                {"type": "image_url", "image_url": {"url": part["image"]}} if part["type"] == "image" else part
                for part in content
            ]
        if calls := message.get("tool_calls"):
            functions = [call["function"] for call in calls]
            waiting = [f"call_{i}_{n}" for n in range(len(calls))]
            asked = [
                {"id": id, "type": "function", "function": {"name": f["name"], "arguments": json.dumps(f["arguments"])}}
                for id, f in zip(waiting, functions, strict=True)
            ]
            found.append({"role": role, "content": content, "tool_calls": asked})
        elif role == "ipython":
            found.append({"role": "tool", "tool_call_id": waiting.pop(0) if waiting else "call", "content": content})
        else:
            found.append({"role": role, "content": content})
    return found


def _delta(event: dict) -> tuple[str, str | None, list[dict]]:
    """(text, reason, parts of calls) of an event; what has another form counts as absent."""
    choices = event.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    delta = choice.get("delta") if isinstance(choice.get("delta"), dict) else {"content": choice.get("text")}
    text, reason, calls = delta.get("content"), choice.get("finish_reason"), delta.get("tool_calls")
    text = _SURROGATES.sub("\ufffd", text) if isinstance(text, str) else ""
    calls = [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    return text, reason if isinstance(reason, str) else None, calls


def _join(calls: dict[int, dict], part: dict) -> None:
    """Add a part of a call, whose arguments may come in pieces."""
    call = calls.setdefault(_count(part.get("index")), {"name": "", "arguments": ""})
    function = part.get("function") if isinstance(part.get("function"), dict) else {}
    for name in call:
        call[name] += function[name] if isinstance(function.get(name), str) else ""


def _call(call: dict) -> str:
    """A call as a model writes it."""
    try:
        arguments = json.loads(call["arguments"] or "{}")
    except (ValueError, RecursionError):
        arguments = call["arguments"]
    return json.dumps({"name": call["name"], "parameters": arguments}, ensure_ascii=False)
