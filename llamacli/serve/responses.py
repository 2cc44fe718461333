"""OpenAI's protocol /v1/responses, which Codex uses.

In: checked fields, or events of answers. Out: an `Ask`, and bodies or events as the API reference has them
(platform.openai.com/docs/api-reference/responses, 2026). Nothing is stored: every request contains its whole conversation.
"""

import json
import time
from collections.abc import AsyncIterator
from secrets import token_hex

from llamacli.serve import asking, calling, openai
from llamacli.serve.asking import Ask
from llamacli.serve.calling import Called
from llamacli.serve.fields import Fields, Refusal
from llamacli.serve.openai import Usage
from llamacli.serve.scheduler import Begun

CUT = {"length": "max_output_tokens", "context": "max_output_tokens"}
PASSED_OVER = ("reasoning", "item_reference")  # items that are not shown to the model
ECHOED = (
    "instructions",
    "max_output_tokens",
    "metadata",
    "parallel_tool_calls",
    "temperature",
    "top_p",
    "tool_choice",
    "tools",
)


class Form:
    """The format of an answer."""

    def __init__(self, model: str, fields: Fields):
        self.stream, self.model, self.id = fields.flag("stream"), model, f"resp_{token_hex(16)}"
        self._created = int(time.time())
        echoed = {"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "metadata": {}}
        self._echoed = dict.fromkeys(ECHOED) | echoed | {name: fields.raw(name) for name in ECHOED if name in fields}
        self._text = fields.raw("text", {"format": {"type": "text"}})

    def body(self, status: str, output: list[dict], usage: dict | None = None, **more) -> dict:
        """The response object in its present state."""
        found = {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self.model,
            "output": output,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "text": self._text,
            "truncation": "disabled",
            "usage": usage,
            "user": None,
        }
        return found | self._echoed | more


def read(fields: Fields, model, name: str) -> tuple[Ask, Form]:
    """Read a request to /v1/responses."""
    for missing in ("previous_response_id", "conversation", "prompt"):
        if missing in fields:
            raise Refusal(
                f"{missing}: this server stores no conversations; send the whole one as input",
                code="unsupported_parameter",
                param=missing,
            )
    asking.refuse(fields, background=False, truncation="disabled", max_tool_calls=None)
    settings = asking.sampling(fields, model.config.n_vocab)
    form = fields.object("text").object("format")
    bound = asking.response_format(form, nested=False) if "type" in form else {}
    tools = [tool for tool in fields.objects("tools") if tool.text("type") == "function"]
    choice = openai.tool_choice(fields, nested=False)
    offer = calling.offer(tools, "parameters", choice, fields.flag("parallel_tool_calls", True))
    settings |= asking.bound(bound, offer)
    limit = asking.max_tokens(fields, "max_output_tokens")
    return Ask([asking.prompt(model, _messages(fields), offer)], settings, limit, offer=offer), Form(name, fields)


def _messages(fields: Fields) -> list[dict]:
    """Instructions and input as the chat template takes them; calls that follow each other are one message."""
    found = []
    if instructions := fields.text("instructions"):
        found.append({"role": "system", "content": instructions})
    if isinstance(fields.raw("input"), str):
        return [*found, {"role": "user", "content": fields.text("input")}]
    for item in fields.objects("input"):
        match item.text("type", "message"):
            case "message":
                found.append(openai.read_message(item))
            case "function_call":
                call = calling.earlier(item.text("name", ""), calling.arguments(item, "arguments"))
                if not (found and found[-1]["role"] == "assistant"):
                    found.append({"role": "assistant", "content": ""})
                found[-1].setdefault("tool_calls", []).append(call)
            case "function_call_output":
                found.append({"role": "ipython", "content": asking.content(item, "output")})
            case kind if kind not in PASSED_OVER:
                raise item.wrong("type", "message, function_call or function_call_output")
    if not found or found[-1]["role"] == "system":
        found.append({"role": "user", "content": ""})  # a client that checks whether the server responds
    return found


# answers


class _Answer:
    """An answer as it grows: its items and their events."""

    def __init__(self, form: Form):
        self._form, self._usage, self._items, self._numbers = form, Usage(), [], 0
        self._text: list[str] | None = None  # text of the open message
        self._reason = None

    def event(self, kind: str, **more) -> str:
        self._numbers += 1
        body = {"type": kind, "sequence_number": self._numbers - 1, **more}
        return f"event: {kind}\ndata: {json.dumps(body, ensure_ascii=False)}\n\n"

    def add(self, event, offered: bool) -> list[str]:
        """The protocol's events for an event of the answer."""
        self._usage.add(0, 1, event)
        if isinstance(event, Begun):
            body = self._form.body("in_progress", [])
            return [self.event("response.created", response=body), self.event("response.in_progress", response=body)]
        if isinstance(event, Called):
            return [*self.close(), *self._called(event)]
        self._reason = event.finish_reason
        if not event.text or (offered and self._text is None and not event.text.strip()):
            return []
        opened = [] if self._text is not None else self._open()
        self._text.append(event.text)
        return [*opened, self._about("response.output_text.delta", delta=event.text, logprobs=[])]

    def _about(self, kind: str, **more) -> str:
        """An event about the part of the open message."""
        return self.event(kind, item_id=self._id, output_index=len(self._items), content_index=0, **more)

    def _open(self) -> list[str]:
        self._text, self._id = [], f"msg_{token_hex(16)}"
        item = {"id": self._id, "type": "message", "status": "in_progress", "role": "assistant", "content": []}
        return [
            self.event("response.output_item.added", output_index=len(self._items), item=item),
            self._about("response.content_part.added", part=_part("")),
        ]

    def close(self) -> list[str]:
        """End the message that is open."""
        if self._text is None:
            return []
        text = "".join(self._text)
        status = "incomplete" if self._reason in CUT else "completed"
        item = {"id": self._id, "type": "message", "status": status, "role": "assistant", "content": [_part(text)]}
        events = [
            self._about("response.output_text.done", text=text, logprobs=[]),
            self._about("response.content_part.done", part=_part(text)),
            self.event("response.output_item.done", output_index=len(self._items), item=item),
        ]
        self._items.append(item)
        self._text = None
        return events

    def _called(self, called: Called) -> list[str]:
        index, item = len(self._items), {"id": f"fc_{token_hex(16)}", "type": "function_call", "call_id": called.id}
        item |= {"name": called.call.name, "arguments": "", "status": "in_progress"}
        done = item | {"arguments": called.arguments, "status": "completed"}
        about = {"item_id": item["id"], "output_index": index}
        self._items.append(done)
        return [
            self.event("response.output_item.added", output_index=index, item=item),
            self.event("response.function_call_arguments.delta", **about, delta=called.arguments),
            self.event("response.function_call_arguments.done", **about, name=item["name"], arguments=called.arguments),
            self.event("response.output_item.done", output_index=index, item=done),
        ]

    def body(self) -> dict:
        """The response at its end."""
        cut = CUT.get(self._reason)
        used = self._usage.shown()
        usage = {
            "input_tokens": used["prompt_tokens"],
            "input_tokens_details": used["prompt_tokens_details"],
            "output_tokens": used["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": used["total_tokens"],
        }
        more = {"incomplete_details": {"reason": cut}} if cut else {}
        return self._form.body("incomplete" if cut else "completed", self._items, usage, **more)


def _part(text: str) -> dict:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


async def whole(events, ask: Ask, form: Form, tokenizer) -> dict:
    """The body of an answer at its end."""
    answer = _Answer(form)
    async for _, event in events:
        answer.add(event, ask.offer is not None)
    answer.close()
    return answer.body()


async def chunks(events, ask: Ask, form: Form, tokenizer) -> AsyncIterator[str]:
    """The events of a stream, to the last one."""
    answer = _Answer(form)
    async for _, event in events:
        for told in answer.add(event, ask.offer is not None):
            yield told
    for told in answer.close():
        yield told
    body = answer.body()
    yield answer.event(f"response.{body['status']}", response=body)


error_body = openai.error_body


def failed(refusal: Refusal, told: int) -> str:
    """The last event of a stream that ends with an error after `told` other events."""
    body = {"type": "error", "code": refusal.code, "message": str(refusal), "param": refusal.param, "sequence_number": told}
    return f"event: error\ndata: {json.dumps(body)}\n\n"
