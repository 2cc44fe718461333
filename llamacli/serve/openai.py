"""OpenAI's protocol: /v1/chat/completions and /v1/completions, and its errors.

In: checked fields, or events of answers. Out: an `Ask`, and bodies or chunks as the API reference has them
(platform.openai.com/docs/api-reference, 2026).
"""

import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from secrets import token_hex

from llamacli.piece import Piece
from llamacli.serve import asking, calling
from llamacli.serve.asking import Ask
from llamacli.serve.calling import Called
from llamacli.serve.fields import Fields, Refusal
from llamacli.serve.scheduler import Begun

MOST_LIKELY = 20  # alternatives of a token
REASONS = {"stop": "stop", "length": "length", "context": "length", "tool_calls": "tool_calls"}


@dataclass
class Form:
    """The format of an answer. `likely`: alternatives of each token, None for no probabilities at all."""

    model: str
    chat: bool
    likely: int | None = None
    stream: bool = False
    usage: bool = False  # send a chunk with the usage at the end of a stream

    def __post_init__(self):
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{token_hex(12)}"
        self.created = int(time.time())

    def head(self, chunk: bool) -> dict:
        """The first fields of every body."""
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def read_chat(fields: Fields, model, name: str) -> tuple[Ask, Form]:
    """Read a request to /v1/chat/completions."""
    asking.refuse(fields, audio=None, functions=None, function_call="none", modalities=["text"], web_search_options=None)
    messages = [read_message(message) for message in fields.objects("messages", least=1)]
    likely = fields.whole("top_logprobs", None, 0, MOST_LIKELY)
    if likely is not None and not fields.flag("logprobs"):
        raise fields.wrong("logprobs", "true beside top_logprobs")
    likely = (likely or 0) if fields.flag("logprobs") else None
    form = Form(name, True, likely, fields.flag("stream"), fields.object("stream_options").flag("include_usage"))
    ask = _ask(fields, model, likely, "max_completion_tokens", "max_tokens", "n_predict")
    ask.offer = read_tools(fields)
    ask.settings |= asking.bound(asking.binding(fields), ask.offer)
    ask.prompts = [asking.prompt(model, messages, ask.offer)]
    return ask, form


def read_message(message: Fields) -> dict:
    """A message as the chat template takes it."""
    role = message.text("role")
    if role not in asking.ROLES:
        raise message.wrong("role", ", ".join(asking.ROLES))
    found = {"role": asking.ROLES[role], "content": asking.content(message)}
    if role == "assistant" and (calls := message.objects("tool_calls")):
        functions = [call.object("function") for call in calls]
        found["tool_calls"] = [
            calling.earlier(function.text("name", ""), calling.arguments(function, "arguments")) for function in functions
        ]
    return found


def read_tools(fields: Fields) -> calling.Offer | None:
    """The tools of a chat."""
    tools = [tool.object("function") for tool in fields.objects("tools") if tool.text("type", "function") == "function"]
    return calling.offer(tools, "parameters", tool_choice(fields, nested=True), fields.flag("parallel_tool_calls", True))


def tool_choice(fields: Fields, nested: bool) -> tuple[str, str | None]:
    """The field `tool_choice` as calling.offer takes it. `nested`: the tool's name is inside `function`."""
    choice = fields.raw("tool_choice", "auto")
    if isinstance(choice, dict):
        chosen = fields.object("tool_choice")
        if chosen.text("type") != "function":
            raise chosen.wrong("type", "function")
        return "tool", (chosen.object("function") if nested else chosen).text("name")
    if choice not in ("auto", "none", "required"):
        raise fields.wrong("tool_choice", "auto, none, required or a function")
    return ("any" if choice == "required" else choice), None


def read_completion(fields: Fields, model, name: str) -> tuple[Ask, Form]:
    """Read a request to /v1/completions."""
    asking.refuse(fields, suffix=None, echo=False)
    if fields.whole("best_of", None, 1) not in (None, fields.whole("n", 1, 1)):
        raise fields.wrong("best_of", "the value of n")
    likely = fields.whole("logprobs", None, 0, MOST_LIKELY)
    form = Form(name, False, likely, fields.flag("stream"), fields.object("stream_options").flag("include_usage"))
    ask = _ask(fields, model, likely, "max_tokens", "n_predict")
    ask.settings |= asking.binding(fields)
    ask.prompts = [asking.check_room(ids, model.ctx) for ids in _prompts(fields, model)]
    return ask, form


def _ask(fields: Fields, model, likely: int | None, *limits: str) -> Ask:
    settings = asking.sampling(fields, model.config.n_vocab)
    if likely is not None:
        settings["logprobs"] = likely
    n = fields.whole("n", 1, 1, asking.MOST_CHOICES)
    return Ask([], settings, asking.max_tokens(fields, *limits), fields.texts("stop", asking.MOST_STOPS), n)


def _prompts(fields: Fields, model) -> list[Sequence[int]]:
    """A text, a list of ids, or a list of several of either."""
    value = fields.raw("prompt")
    several = value if isinstance(value, list) and value and isinstance(value[0], str | list) else [value]
    if len(several) > asking.MOST_PROMPTS:
        raise fields.wrong("prompt", f"at most {asking.MOST_PROMPTS} prompts")
    found = []
    for each in several:
        if isinstance(each, str):
            asking.check_text(each, model)
            ids = model.tokenizer.encode(each, bos=True, special=False)
        elif isinstance(each, list) and all(type(id) is int and 0 <= id < model.config.n_vocab for id in each):
            ids = each
        else:
            ids = None
        if not ids:
            raise fields.wrong("prompt", f"a text, or ids of tokens below {model.config.n_vocab}", each)
        found.append([int(id) for id in ids])
    return found


# answers


class Usage:
    """Counts tokens of all choices."""

    def __init__(self):
        self.prompt = self.cached = self.completion = 0

    def add(self, choice: int, n: int, event) -> None:
        """Count an event; the `n` choices of one prompt count its tokens once."""
        if isinstance(event, Begun):
            if choice % n == 0:
                self.prompt += event.prompt_tokens
                self.cached += event.cached_tokens
        elif isinstance(event, Piece):
            self.completion += event.id is not None

    def shown(self) -> dict:
        """The usage in the protocol's form."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


async def whole(events, ask: Ask, form: Form, tokenizer) -> dict:
    """The body of an answer at its end."""
    usage, choices = Usage(), [_Choice(i, form, tokenizer) for i in range(ask.n * len(ask.prompts))]
    async for choice, event in events:
        usage.add(choice, ask.n, event)
        if not isinstance(event, Begun):
            choices[choice].add(event)
    return {**form.head(chunk=False), "choices": [choice.shown() for choice in choices], "usage": usage.shown()}


class _Choice:
    """A choice, as it grows."""

    def __init__(self, index: int, form: Form, tokenizer):
        self._index, self._form, self._tokenizer = index, form, tokenizer
        self._text, self._likely, self._reason, self._calls = [], [], None, []

    def add(self, piece: Piece | Called) -> None:
        if isinstance(piece, Called):
            self._calls.append(_call(piece))
            return
        self._text.append(piece.text)
        if piece.logprobs and self._form.likely is not None:
            self._likely.append(piece)
        self._reason = REASONS.get(piece.finish_reason)

    def shown(self) -> dict:
        """The choice of a whole body."""
        found = {"index": self._index, "logprobs": None, "finish_reason": self._reason}
        if self._form.likely is not None:
            found["logprobs"] = likelihoods(self._likely, self._form.chat, self._tokenizer)[0]
        if self._form.chat:
            message = {"role": "assistant", "content": "".join(self._text), "refusal": None}
            if self._calls:
                message |= {"content": message["content"].strip() or None, "tool_calls": self._calls}
            return {**found, "message": message}
        return {**found, "text": "".join(self._text)}


def _call(called: Called) -> dict:
    function = {"name": called.call.name, "arguments": called.arguments}
    return {"id": called.id, "type": "function", "function": function}


async def chunks(events, ask: Ask, form: Form, tokenizer) -> AsyncIterator[str]:
    """The events of a stream, to the last one."""
    usage, begun, offsets = Usage(), set(), {}
    async for choice, event in events:
        usage.add(choice, ask.n, event)
        if isinstance(event, Begun):
            if form.chat and choice not in begun:
                yield _chunk(form, choice, {"role": "assistant", "content": ""})
            begun.add(choice)
            continue
        if isinstance(event, Called):
            yield _chunk(form, choice, {"tool_calls": [{"index": event.index, **_call(event)}]})
            continue
        likely = None
        if event.logprobs and form.likely is not None:
            likely, offsets[choice] = likelihoods([event], form.chat, tokenizer, offsets.get(choice, 0))
        if event.text or likely:
            yield _chunk(form, choice, {"content": event.text}, likely)
        if event.finish_reason:
            yield _chunk(form, choice, {}, reason=REASONS.get(event.finish_reason))
    if form.usage:
        yield data({**form.head(chunk=True), "choices": [], "usage": usage.shown()})
    yield "data: [DONE]\n\n"


def _chunk(form: Form, choice: int, delta: dict, likely: dict | None = None, reason: str | None = None) -> str:
    part = {"delta": delta} if form.chat else {"text": delta.get("content", "")}
    body = {"index": choice, **part, "logprobs": likely, "finish_reason": reason}
    return data({**form.head(chunk=True), "choices": [body]} | ({"usage": None} if form.usage else {}))


def data(body: dict) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def likelihoods(pieces: Sequence, chat: bool, tokenizer, offset: int = 0) -> tuple[dict, int]:
    """Log probabilities of tokens in the form of chat or completions, and the number of characters up to the end of these
    tokens.
    """

    def named(id: int, logprob: float) -> dict:
        raw = tokenizer.token_bytes(id, special=True)
        return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": [*raw]}

    tokens = [named(p.id, p.logprobs[0]) | {"top_logprobs": [named(*each) for each in p.logprobs[1]]} for p in pieces]
    if chat:
        return {"content": tokens, "refusal": None}, 0
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token["token"])
    return {
        "tokens": [token["token"] for token in tokens],
        "token_logprobs": [token["logprob"] for token in tokens],
        "top_logprobs": [{each["token"]: each["logprob"] for each in token["top_logprobs"]} for token in tokens],
        "text_offset": offsets,
    }, offset


def error_body(refusal: Refusal) -> dict:
    """An error in the protocol's form."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(refusal.status, "server_error" if refusal.status >= 500 else "invalid_request_error")
    return {"error": {"message": str(refusal), "type": kind, "param": refusal.param, "code": refusal.code}}


def failed(refusal: Refusal, told: int) -> str:
    """The last event of a stream that ends with an error."""
    return data(error_body(refusal))
