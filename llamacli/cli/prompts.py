"""The prompt of `run`: text, a system prompt, and a template that they fill in.

In: text from words, files and pipes; the fields of a batch's line. Out: messages, or the text alone with --raw, and their ids.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llamacli.cli.images import content
from llamacli.cli.templates import Template
from llamacli.errors import UsageError


def joined(*parts: str) -> str:
    """The parts that have text, with a blank line between each two."""
    text = ""
    for part in filter(None, parts):
        text += ("" if not text else "\n" if text.endswith("\n") else "\n\n") + part
    return text


@dataclass
class Prompts:
    """`text` comes before the text of a batch's line, or is the whole prompt. `system`: of the options. `raw`: no chat
    template. `pictured`: pictures come before the text, which may be empty then.
    """

    text: str
    system: str | None
    template: Template | None
    params: Mapping[str, str]
    raw: bool
    pictured: bool = False

    def __post_init__(self) -> None:
        if self.raw and self.template and self.template.system:
            raise UsageError(f"--raw and {self.template.path} exclude each other: the template has a system prompt")

    def added(self, pictures: Sequence[str]) -> bytes:
        """Bytes that identify what the options add to each line of a batch; empty if nothing. `pictures`: their hashes."""
        form = self.template and [self.template.prompt, self.template.system, self.template.defaults]
        parts = [self.text, self.system, form, dict(self.params), self.raw, pictures]
        return json.dumps(parts, sort_keys=True).encode() if any(parts) else b""

    def messages(
        self,
        prompt: str = "",
        system: str | None = None,
        params: Mapping[str, str] | None = None,
        pictured: bool = False,
    ) -> list[dict]:
        """The messages of one question; `pictured`: it has pictures of its own. UsageError if there is nothing to ask."""
        text = joined(self.text, prompt)
        if self.template:
            text, its_system = self.template.fill(text, {**self.params, **(params or {})})
        elif params:
            raise UsageError("params: expected --template with them, which has the places; add it or leave them out")
        elif not text and not (self.pictured or pictured):
            raise UsageError(
                "no prompt: give one as an argument, with -f FILE or through a pipe; `llamacli chat` starts a conversation"
            )
        system = system or self.system or (its_system if self.template else None)
        if self.raw and system:
            raise UsageError("--raw and a system prompt exclude each other: there is no chat template; leave one out")
        return [*self._system(system), {"role": "user", "content": text}]

    def of_messages(self, messages: list[dict]) -> list[dict]:
        """The messages that a line of a batch gives; the options' system prompt comes first if they have none."""
        if self.text or self.template or self.raw or self.pictured:
            raise UsageError(
                "messages: expected no other text, picture, template or --raw beside them, found one; leave it out"
            )
        has_system = any(message["role"] == "system" for message in messages)
        return messages if has_system else [*self._system(self.system), *messages]

    def _system(self, system: str | None) -> list[dict]:
        return [{"role": "system", "content": str(system)}] if system else []

    def seen(self, messages: list[dict], views: Sequence) -> list[dict]:
        """The messages with `views` of pictures before the last text."""
        *before, last = messages
        return [*before, {**last, "content": content(views, last["content"])}] if views else messages

    def ids(self, model, messages: list[dict], views: Sequence = ()) -> list:
        """Tokens, `views` of pictures before the last text. ContextFullError for more text than fits the context, before it is
        tokenized.
        """
        from llamacli.session import check_length  # late: it imports NumPy, and help does not

        size = sum(len(text.encode("utf-8", "replace")) for message in messages for text in _texts(message["content"]))
        check_length(size // model.tokenizer.most_bytes, model.ctx, " or more")
        if not self.raw:
            return model.prompt_ids(self.seen(messages, views))
        ids = model.tokenizer.encode(messages[-1]["content"], bos=True, special=False)
        if not views:
            return ids
        from llamacli.prompt import tokens

        return tokens([ids[:1], *(part for view in views for part in view.segments), ids[1:]])


def _texts(content: str | list[dict]) -> list[str]:
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
