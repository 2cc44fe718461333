"""Anthropic's protocol: /v1/messages, its token count, and its errors.

In: checked fields, or events of answers. Out: an `Ask`, and bodies or events as the API reference has them
(docs.anthropic.com/en/api/messages, 2026).
"""

import json
from collections.abc import AsyncIterator
from secrets import token_hex

from llamacli.serve import asking, calling
from llamacli.serve.asking import Ask
from llamacli.serve.calling import Called
from llamacli.serve.fields import Fields, Refusal
from llamacli.serve.scheduler import Begun

REASONS = {"stop": "end_turn", "length": "max_tokens", "context": "model_context_window_exceeded", "tool_calls": "tool_use"}
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class Form:
    """The format of an answer."""

    def __init__(self, model: str, stream: bool, stops: list[str]):
        self.id, self.model, self.stream, self.stops = f"msg_{token_hex(12)}", model, stream, stops


def read(fields: Fields, model, name: str) -> tuple[Ask, Form]:
    """Read a request to /v1/messages."""
    asking.refuse(fields, mcp_servers=None, container=None)
    settings = asking.sampling(fields, model.config.n_vocab)
    stops = fields.texts("stop_sequences", asking.MOST_STOPS)
    limit = asking.max_tokens(fields, "max_tokens")
    if "max_tokens" not in fields:
        raise fields.wrong("max_tokens", "a whole number from 1 up")
    messages, offer = _conversation(fields)
    settings |= asking.bound({}, offer)
    return (
        Ask([asking.prompt(model, messages, offer)], settings, limit, stops, offer=offer),
        Form(name, fields.flag("stream"), stops),
    )


def count(fields: Fields, model) -> dict:
    """The body of a count of tokens."""
    messages, offer = _conversation(fields)
    return {"input_tokens": asking.count(model, messages, offer)}


def _conversation(fields: Fields) -> tuple[list[dict], calling.Offer | None]:
    messages = []
    if "system" in fields and (system := asking.content(fields, "system")):
        messages.append({"role": "system", "content": system})
    for message in fields.objects("messages", least=1):
        messages += _messages(message)
    tools = [tool for tool in fields.objects("tools") if tool.text("type", "custom") == "custom"]
    choice = fields.object("tool_choice")
    how = choice.text("type", "auto")
    if how not in ("auto", "any", "tool", "none"):
        raise choice.wrong("type", "auto, any, tool or none")
    several = not choice.flag("disable_parallel_tool_use")
    return messages, calling.offer(tools, "input_schema", (how, choice.text("name")), several)


def _messages(message: Fields) -> list[dict]:
    """Messages for the chat template; a message with results of calls becomes one message for each."""
    role = message.text("role")
    if role not in ("user", "assistant", "system"):
        raise message.wrong("role", "user, assistant or system")
    if isinstance(message.raw("content"), str):
        return [{"role": role, "content": message.text("content")}]
    results, parts, calls = [], [], []
    for block in message.objects("content"):
        match block.text("type"):
            case "tool_result":
                results.append({"role": "ipython", "content": asking.content(block)})
            case "tool_use":
                calls.append(calling.earlier(block.text("name", ""), calling.arguments(block, "input")))
            case "image":
                parts.append(_picture(block.object("source")))
            case "thinking" | "redacted_thinking":
                continue
            case _:
                parts.append(asking.part(block))
    said = {"role": role, "content": asking.joined(parts)} | ({"tool_calls": calls} if calls else {})
    return results + [said] * bool(parts or calls or not results)


def _picture(source: Fields) -> dict:
    if source.text("type") != "base64":
        raise source.wrong("type", "base64; the server opens no address")
    return asking.picture(f"data:{source.text('media_type', 'image/png')};base64,{source.text('data', '')}")


# answers


class _Answer:
    """An answer, as it grows."""

    def __init__(self, form: Form, tokenizer):
        self._form, self._decoder, self._said = form, tokenizer.stream(), ""
        self.usage = {"input_tokens": 0, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 0}
        self.reason = self.stop = None

    def begin(self, event: Begun) -> None:
        self.usage["input_tokens"] = event.prompt_tokens - event.cached_tokens
        self.usage["cache_read_input_tokens"] = event.cached_tokens

    def add(self, piece) -> None:
        if piece.id is not None:
            self.usage["output_tokens"] += 1
            if self._form.stops:  # calls come after the text of the pieces
                self._said += self._decoder.push(piece.id)
        if piece.finish_reason:
            self.reason = REASONS.get(piece.finish_reason, "end_turn")
            found = [(at, stop) for stop in self._form.stops if (at := self._said.find(stop)) >= 0]
            if piece.finish_reason == "stop" and found:
                self.reason, self.stop = "stop_sequence", min(found)[1]

    def shown(self, content: list[dict]) -> dict:
        """The message."""
        head = {"id": self._form.id, "type": "message", "role": "assistant", "model": self._form.model, "content": content}
        return head | {"stop_reason": self.reason, "stop_sequence": self.stop, "usage": self.usage}


async def whole(events, ask: Ask, form: Form, tokenizer) -> dict:
    """The body of an answer at its end."""
    answer, text, calls = _Answer(form, tokenizer), [], []
    async for _, event in events:
        if isinstance(event, Begun):
            answer.begin(event)
        elif isinstance(event, Called):
            calls.append({"type": "tool_use", "id": event.id, "name": event.call.name, "input": event.call.arguments})
        else:
            text.append(event.text)
            answer.add(event)
    said = "".join(text).strip() if calls else "".join(text)
    return answer.shown([{"type": "text", "text": said}] * bool(said or not calls) + calls)


async def chunks(events, ask: Ask, form: Form, tokenizer) -> AsyncIterator[str]:
    """The events of a stream, to the last one."""
    answer, index, is_open = _Answer(form, tokenizer), 0, False

    def start(block: dict) -> str:
        return _event("content_block_start", index=index, content_block=block)

    def delta(kind: str, **more) -> str:
        return _event("content_block_delta", index=index, delta={"type": kind, **more})

    async for _, event in events:
        if isinstance(event, Begun):
            answer.begin(event)
            yield _event("message_start", message=answer.shown([]))
        elif isinstance(event, Called):
            if is_open:
                yield _event("content_block_stop", index=index)
                index, is_open = index + 1, False
            yield start({"type": "tool_use", "id": event.id, "name": event.call.name, "input": {}})
            yield delta("input_json_delta", partial_json=event.arguments)
            yield _event("content_block_stop", index=index)
            index += 1
        else:
            answer.add(event)
            if event.text.strip() or (event.text and (is_open or not ask.offer)):
                if not is_open:
                    yield start({"type": "text", "text": ""})
                    is_open = True
                yield delta("text_delta", text=event.text)
    if is_open:
        yield _event("content_block_stop", index=index)
    ended = {"stop_reason": answer.reason, "stop_sequence": answer.stop}
    yield _event("message_delta", delta=ended, usage=answer.usage)
    yield _event("message_stop")


def _event(kind: str, **more) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **more}, ensure_ascii=False)}\n\n"


def error_body(refusal: Refusal) -> dict:
    """An error in the protocol's form."""
    kind = KINDS.get(refusal.status, "api_error" if refusal.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": str(refusal)}}


def failed(refusal: Refusal, told: int) -> str:
    """The last event of a stream that ends with an error."""
    return _event("error", error=error_body(refusal)["error"])
