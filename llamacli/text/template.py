"""Messages to token ids through the model's chat template.

In: a tokenizer, messages ({"role": ..., "content": ...}) and the file's Jinja template, or None for Llama 4's own format. Out:
ids with BOS exactly once.

Only the template writes special tokens; what a message says stays text, whatever it says (marks.py). One exception: a special
token that the model may say inside an answer (`Tokenizer.visible_ids`) is a token again in an assistant's message, so that the
model finds its own words as it said them. Templates come with the file and run in a sandbox (sandbox.py).
"""

from collections.abc import Callable, Iterator, Sequence

from llamacli.errors import PromptError
from llamacli.text.marks import marks
from llamacli.text.tokenizer import Tokenizer

_LLAMA4 = (
    "{{ bos_token }}{% for m in messages %}<|header_start|>{{ m.role }}<|header_end|>\n\n{{ m.content }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>\n\n{% endif %}"
)


def render(
    tokenizer: Tokenizer, messages: Sequence[dict], template: str | None = None, add_generation_prompt: bool = True
) -> list[int]:
    """The ids of a conversation; with `add_generation_prompt` up to where the assistant's answer begins.

    A content is a string or a list of {"type": "text", "text": ...}. PromptError says which message or what in the template
    is wrong. A template that is empty counts as none; one that leaves the last message out is an error.
    """
    from llamacli.text import sandbox  # loads Jinja, which takes longer than all else here

    messages = [_checked(i, message) for i, message in enumerate(messages, 1)]
    if not messages:
        raise PromptError("the conversation is empty: expected at least one message")
    source = _source(tokenizer, template)
    if len(source) > sandbox.LONGEST_SOURCE:
        raise PromptError(f"expected a chat template of at most {sandbox.LONGEST_SOURCE} characters, found {len(source)}")
    own = marks(tokenizer.special_names, [source, *_strings(messages)])
    tokens = {"bos": tokenizer.bos, "eos": tokenizer.eos, "unk": tokenizer.token_id("<unk>"), "pad": tokenizer.padding}
    variables = {f"{name}_token": own.mark(_name(tokenizer, id)) for name, id in tokens.items()}
    variables |= {"add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}

    def text(messages: list[dict]) -> str:
        said = [_said(message, lambda text: own.mark(text, tokenizer.visible_names)) for message in messages]
        return sandbox.render(source, own, {**variables, "messages": said})

    rendered = text(messages)
    last = messages[-1]["content"].strip()
    if last and last not in own.plain(rendered) and text([*messages[:-1], {**messages[-1], "content": last + "x"}]) == rendered:
        raise PromptError("the model's chat template leaves the last message out; --raw goes without the template")
    ids: list[int] = []
    for part in own.split(rendered):
        ids += [part] if isinstance(part, int) else tokenizer.encode(part, bos=False)
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
    """The message, with tokens that the model said marked if it is the assistant's."""
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
