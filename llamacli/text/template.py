"""Messages to token ids through the model's chat template.

In: a tokenizer, messages ({"role": ..., "content": ...}) and the file's Jinja template, or None for Llama 4's own format. Out:
ids with BOS exactly once. Templates come with the file and run in a sandbox. What a message says never becomes a special token:
before rendering, every character of it with which a special token could begin is swapped for a stand-in that occurs nowhere
else; special tokens are cut out of the rendered text, and only then do the stand-ins change back. Knows nothing of models.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache

from llamacli.errors import PromptError
from llamacli.text.tokenizer import Tokenizer

_LLAMA4 = (
    "{{ bos_token }}{% for m in messages %}<|header_start|>{{ m.role }}<|header_end|>\n\n{{ m.content }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>\n\n{% endif %}"
)
_STAND_INS = range(0xE000, 0xF900)  # Unicode's private use area
_MOST_TEXT = 1 << 24  # characters, or the result, of one multiplication


def render(
    tokenizer: Tokenizer, messages: Sequence[dict], template: str | None = None, add_generation_prompt: bool = True
) -> list[int]:
    """The ids of a conversation; with `add_generation_prompt` up to where the assistant's answer begins.

    A content is a string or a list of {"type": "text", "text": ...}. PromptError says which message or what in the template
    is wrong.
    """
    messages = [_checked(i, message) for i, message in enumerate(messages, 1)]
    if not messages:
        raise PromptError("the conversation is empty: expected at least one message")
    if template is None:
        if tokenizer.token_id("<|header_start|>") is None or tokenizer.token_id("<|eot|>") is None:
            raise PromptError("the model has neither a chat template nor Llama 4's header tokens; use --raw to continue a text")
        template = _LLAMA4
    elif not isinstance(template, str):
        raise PromptError("the model's chat template is no text; use --raw to continue a text without it")
    there, back = _stand_ins(tokenizer, template, messages)
    try:
        text = _compiled(template).render(
            messages=_deep(messages, there),
            add_generation_prompt=add_generation_prompt,
            bos_token=_name(tokenizer, tokenizer.bos),
            eos_token=_name(tokenizer, tokenizer.eos),
            tools=None,
            documents=None,
        )
    except PromptError:
        raise
    except Exception as error:  # whatever a template may do: syntax, undefined names, sandbox, recursion, memory
        message = " ".join(str(error).split()).translate(back)[:200] or type(error).__name__
        raise PromptError(
            f"the model's chat template cannot render this conversation: {message}; --raw goes without it"
        ) from None
    ids: list[int] = []
    for part in tokenizer.split(text):
        ids += [part] if isinstance(part, int) else tokenizer.encode(part.translate(back), bos=False)
    if (bos := tokenizer.bos) is not None:
        first = next((i for i, token in enumerate(ids) if token != bos), len(ids))
        ids[:first] = [bos]
    return ids


def _checked(number: int, message) -> dict:
    """A copy of a message, its content one string."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not message["role"].strip():
        raise PromptError(f'message {number}: expected {{"role": "user", "content": "..."}}, found {repr(message)[:80]}')
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise PromptError(f"message {number}: expected parts of type text, found {repr(part)[:80]}; only text is read")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise PromptError(f"message {number}: expected a string or list of texts as content, found {type(content).__name__}")
    return {**message, "content": content}


def _stand_ins(tokenizer: Tokenizer, template: str, messages: list[dict]) -> tuple[dict[int, int], dict[int, int]]:
    """Tables for str.translate, there and back: the first characters of special tokens to characters found nowhere."""
    taken = set(template)
    _deep(messages, lambda text: taken.update(text))
    free = (code for code in _STAND_INS if chr(code) not in taken)
    firsts = {ord(text[0]) for text in tokenizer.special_tokens if not text[:1].isspace() and text}
    there = dict(zip(sorted(firsts), free, strict=False))
    if len(there) < len(firsts):
        raise PromptError("the messages use up all of Unicode's private use area: expected ordinary text")
    return there, {code: first for first, code in there.items()}


def _deep(value, change):
    """A copy of nested lists and dicts with every string changed: by a str.translate table or a function."""
    if isinstance(value, str):
        return change(value) if callable(change) else value.translate(change)
    if isinstance(value, dict):
        return {
            key if isinstance(key, str) and key.isidentifier() else _deep(key, change): _deep(v, change)
            for key, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [_deep(item, change) for item in value]
    return value


def _name(tokenizer: Tokenizer, token: int | None) -> str:
    return "" if token is None else tokenizer.decode([token], special=True)


@lru_cache(8)
def _compiled(template: str):
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # half of this module's loading time

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context, operator, left, right):
            """Jinja's sandbox bounds loops, but not `"x" * 10 ** 10`."""
            size = [len(side) if hasattr(side, "__len__") else abs(side) for side in (left, right)]
            if size[0] * size[1] > _MOST_TEXT or (operator == "**" and size[1] > 64):
                raise PromptError("the model's chat template asks for more text than a prompt holds; --raw goes without it")
            return super().call_binop(context, operator, left, right)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
    environment.filters["tojson"] = _to_json  # Jinja's own escapes <, > and & for HTML
    return environment.from_string(template)


def _raise(message: str):
    raise PromptError(f"the model's chat template refuses this conversation: {' '.join(str(message).split())[:200]}")


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
