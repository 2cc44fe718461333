"""Messages to token ids through the model's chat template.

In: a tokenizer, messages ({"role": ..., "content": ...}), the tools that may be called, and the file's Jinja template, or None
for Llama 4's own format. Out: ids with BOS exactly once, and `<|image|>` for each picture. For a template without tools, the
definitions, calls and results are put into the texts of messages.

Only the template writes special tokens; the text of messages never becomes one (marks.py). One exception: a special token that
the model may write inside an answer (`Tokenizer.visible_ids`) is a token in an assistant's message, too, so that the history
has the same ids as the answer. Templates are untrusted and run in a sandbox (sandbox.py).
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence

from llamacli.errors import PromptError
from llamacli.text.calls import MOST_LEVELS, too_deep
from llamacli.text.marks import marks
from llamacli.text.tokenizer import Tokenizer

PICTURE = "<|image|>"  # a picture's place in a prompt
_LLAMA4 = (
    "{{ bos_token }}{% for m in messages %}<|header_start|>{{ m.role }}<|header_end|>\n\n{{ m.content }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>\n\n{% endif %}"
)
_TOLD = (
    "Functions can be called. To call one, answer with JSON alone: "
    '{"name": the name of the function, "parameters": an object with its arguments}. Several calls are separated by a '
    "semicolon. The result comes in the next message. Call a function only where it helps; answer in words otherwise. "
    "The functions:\n"
)


def render(
    tokenizer: Tokenizer,
    messages: Sequence[dict],
    template: str | None = None,
    add_generation_prompt: bool = True,
    tools: Sequence[dict] = (),
) -> list[int]:
    """The ids of a conversation; with `add_generation_prompt` up to where the assistant's answer begins.

    A content is a string or a list of parts: {"type": "text", "text": ...} or a picture (`pictures`), which becomes `<|image|>`
    where it stands; the template sees one string. `tools` are {"type": "function", "function": {"name", "description",
    "parameters"}}; a call is an assistant's message with `tool_calls`, a result is a message of the role ipython; their
    contents stay text. PromptError names the wrong message or part of the template. An empty template counts as none; a
    template that omits the last message or a picture is an error.
    """
    from llamacli.text import sandbox  # imports Jinja, which takes longer than the rest of this module

    n_pictures = len(pictures(messages))
    messages = [_checked(i, message) for i, message in enumerate(messages, 1)]
    if not messages:
        raise PromptError("the conversation is empty: expected at least one message")
    image = tokenizer.special_names.ids.get(PICTURE)
    if n_pictures and image is None:
        raise PromptError(f"expected a model with the token {PICTURE}, found none in its vocabulary; it cannot take pictures")
    source = _source(tokenizer, template)
    if len(source) > sandbox.LONGEST_SOURCE:
        raise PromptError(f"expected a chat template of at most {sandbox.LONGEST_SOURCE} characters, found {len(source)}")
    if too_deep(messages) or too_deep(list(tools)):
        raise PromptError(f"expected messages and tools with at most {MOST_LEVELS} levels of lists and objects, found more")
    own = marks(tokenizer.special_names, [source, *_strings(messages), *_strings(list(tools))])
    tokens = {"bos": tokenizer.bos, "eos": tokenizer.eos, "unk": tokenizer.token_id("<unk>"), "pad": tokenizer.padding}
    variables = {f"{name}_token": own.mark(_name(tokenizer, id)) for name, id in tokens.items()}
    messages = [{**message, "content": _joined(message["content"], own.mark(PICTURE))} for message in messages]
    messages = _in_words(messages, tools, source)
    variables |= {"add_generation_prompt": add_generation_prompt, "tools": list(tools) or None, "documents": None}

    def text(messages: list[dict]) -> str:
        said = [_said(message, lambda text: own.mark(text, tokenizer.visible_names)) for message in messages]
        return sandbox.render(source, own, {**variables, "messages": said})

    rendered = text(messages)
    last = messages[-1]["content"].strip()
    if (
        last
        and own.plain(last) not in own.plain(rendered)
        and text([*messages[:-1], {**messages[-1], "content": last + "x"}]) == rendered
    ):
        raise PromptError("the model's chat template leaves the last message out; --raw goes without the template")
    ids: list[int] = []
    for part in own.split(rendered):
        ids += [part] if isinstance(part, int) else tokenizer.encode(part, bos=False)
    if n_pictures and ids.count(image) != n_pictures:
        raise PromptError(
            f"expected the model's chat template to show {n_pictures} pictures, found {ids.count(image)}; --raw goes without it"
        )
    if (bos := tokenizer.bos) is not None:
        first = next((i for i, token in enumerate(ids) if token != bos), len(ids))
        ids[:first] = [bos]
    return ids


def _source(tokenizer: Tokenizer, template: str | None) -> str:
    """The template to use: the file's, without a byte order mark, or Llama 4's own."""
    if template is not None and not isinstance(template, str):
        raise PromptError("the model's chat template is no text; use --raw to continue a text without it")
    template = (template or "").removeprefix("\ufeff")
    if template.strip():
        return template
    if tokenizer.token_id("<|header_start|>") is None or tokenizer.token_id("<|eot|>") is None:
        raise PromptError("the model has neither a chat template nor Llama 4's header tokens; use --raw to continue a text")
    return _LLAMA4


def pictures(messages: Sequence) -> list:
    """The pictures that parts of messages name, in order: paths, bytes, `data:` URLs or Pillow's pictures.

    A part is {"type": "image"} with "image", "path" or "url", or {"type": "image_url", "image_url": {"url": ...}}.
    """
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [found for part in parts if (found := picture_of(part)) is not None]


def picture_of(part):
    """The picture that a part names; None if it is not a picture part."""
    if not isinstance(part, dict):
        return None
    if part.get("type") == "image":
        return next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)
    if part.get("type") == "image_url":
        url = part.get("image_url")
        return url.get("url") if isinstance(url, dict) else url
    return None


def _joined(content: list[str | None], mark: str) -> str:
    return "".join(mark if part is None else part for part in content)


def _in_words(messages: list[dict], tools: Sequence[dict], source: str) -> list[dict]:
    """The messages, with tools and calls in their texts if the template does not use tools."""
    if not tools:
        return messages
    if "tool_calls" not in source:
        messages = [
            {**m, "content": "\n".join(filter(None, [m["content"], _calls(m["tool_calls"])]))} if m.get("tool_calls") else m
            for m in messages
        ]
    if re.search(r"\btools\b", source):
        return messages
    definitions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    told = _TOLD + definitions
    if messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{told}"}, *messages[1:]]
    return [{"role": "system", "content": told}, *messages]


def _calls(calls: Sequence[dict]) -> str:
    """Calls in the form that the model is told to write."""
    try:
        functions = [call["function"] for call in calls]
        written = [{"name": f["name"], "parameters": f["arguments"]} for f in functions]
        return "; ".join(json.dumps(call, ensure_ascii=False) for call in written)
    except (TypeError, KeyError, ValueError):
        raise PromptError(
            f'tool_calls: expected [{{"function": {{"name": ..., "arguments": ...}}}}], found {repr(calls)[:80]}'
        ) from None


def _checked(number: int, message) -> dict:
    """A copy of a message, its content a list of texts and, for each picture, None."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not message["role"].strip():
        raise PromptError(f'message {number}: expected {{"role": "user", "content": "..."}}, found {repr(message)[:80]}')
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""
    if isinstance(content, str):
        return {**message, "content": [content]}
    if not isinstance(content, list):
        raise PromptError(f"message {number}: expected a string or list of parts as content, found {type(content).__name__}")
    for part in content:
        text = isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        if not text and picture_of(part) is None:
            raise PromptError(f"message {number}: expected parts of type text or image, found {repr(part)[:80]}")
    return {**message, "content": [None if part["type"] != "text" else part["text"] for part in content]}


def _strings(value) -> Iterator[str]:
    """Every string in nested lists and dictionaries."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings([*value, *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _said(message: dict, mark: Callable[[str], str]) -> dict:
    """The message; in an assistant's message, special tokens that the model wrote are marked."""
    if message["role"] != "assistant":
        return message
    return {key: value if key == "role" else _deep(value, mark) for key, value in message.items()}


def _deep(value, change: Callable[[str], str]):
    """A copy of nested lists and dictionaries with every string changed, keys left as they are."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _deep(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_deep(item, change) for item in value]
    return value


def _name(tokenizer: Tokenizer, token: int | None) -> str:
    return "" if token is None else tokenizer.decode([token], special=True)
