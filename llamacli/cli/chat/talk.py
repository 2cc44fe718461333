"""Connects a conversation with a model: prompts, free context, settings, change of models.

In: a conversation, options. Out: answers piece by piece. It does not use the terminal. An error leaves the conversation as it
was: an unanswered question can be tried again, and an old answer is replaced only by a new one.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from llamacli.cli.chat.pictures import content, read_again, reference
from llamacli.cli.grammar import kind_of, meant, read_value
from llamacli.cli.images import look, sent
from llamacli.cli.inputs import Limit, context_limit
from llamacli.cli.options import HERE, Generation
from llamacli.conversation import Answer, Conversation, title
from llamacli.errors import ContextFullError, PromptError, UsageError
from llamacli.text.settings import SETTINGS as SAMPLING
from llamacli.tools.loop import answer as answer_with_tools

SHOWN = (
    "temp",
    "top_k",
    "top_p",
    "min_p",
    "repeat_penalty",
    "seed",
    "max_tokens",
    "stop",
)  # settings that /show shows even at their defaults
SETTINGS = (*SAMPLING, "mirostat", "samplers", "logit_bias", "dry_sequence_breaker", "ignore_eos", "seed", "max_tokens", "stop")
THEN = "then /regen answers"
FIELDS = {field.name: field for field in dataclasses.fields(Generation)}


class Talk:
    """`reason`: how the latest answer ended, None if it broke off."""

    def __init__(self, model, options: Generation, console, conversation: Conversation, box=None):
        """`box`: tools that the model may call (tools/loop.Toolbox)."""
        self._box, self._rounds = box, []  # (the answer, messages of the calls that led to it)
        self.model, self.options, self.conversation, self._console = model, options, conversation, console
        self.sampler = options.sampler(model, console)
        self.session = options.session(model)
        self.reason: str | None = None
        self.unread: dict[str, str] = {}  # texts that go before the next question, by the names of their files
        self._views: dict[str, object] = {}  # pictures as the model sees them, by their hash

    def ask(self, question: str) -> Iterator[str]:
        """Add a question and answer it."""
        return self._answer(self._asked(question))

    def _asked(self, question: str) -> Answer:
        """Add a question, and what goes before it; the answer to it, to be filled."""
        text = ""
        for part in [*self.unread.values(), question]:
            text += ("" if not text else "\n" if text.endswith("\n") else "\n\n") + part
        first = not self.conversation.messages and not self.conversation.name
        self.conversation.ask(text)
        if first and self.unread:  # else its title would be the first line of a file
            self.conversation.rename(title(question))
        self.unread.clear()
        return self.conversation.answer()

    def show(self, path: Path) -> None:
        """Encode a picture and put it before the next question."""
        from llamacli.vision.pictures import read_picture

        picture = read_picture(path)
        self._look(picture, path)
        self.unread[str(path)] = reference(picture, path)

    def edit(self, question: str) -> Iterator[str]:
        """Ask the latest question in other words; the old one stays on a branch of its own, or comes back with its answer if
        the new one gets none.
        """
        answered, unread = not self.conversation.unanswered, {**self.unread}
        take_back = self.conversation.set_aside()
        answer = self._asked(question)

        def put_back() -> None:
            take_back()
            self.unread.update(unread)

        return self._instead(answer, put_back, "then /edit asks again") if answered else self._answer(answer)

    def regenerate(self) -> Iterator[str]:
        """Answer the latest question anew. The old answer comes back if no new one does. PromptError if there is none."""
        put_back = self.conversation.retract()
        return self._instead(self.conversation.answer(), put_back)

    def _instead(self, answer: Answer, put_back: Callable[[], None], then: str = THEN) -> Iterator[str]:
        """Fill an answer in place of an old one, which comes back after an error, and after Ctrl-C before the first word."""
        try:
            yield from self._answer(answer, then)
        except (KeyboardInterrupt, GeneratorExit):
            if not answer.text:
                put_back()
            raise
        except BaseException:
            put_back()
            raise

    def proceed(self) -> Iterator[str]:
        """Continue an answer that was cut off. PromptError if there is none."""
        self.check_here("/continue")
        if self.conversation.messages and self.conversation.messages[-1].finish == "stop":
            raise PromptError("nothing to continue: the answer is complete; /regen answers anew")
        return self._answer(self.conversation.extend(), "then /continue goes on")

    @property
    def served(self) -> bool:
        """Whether a server has the model."""
        return self.options.server is not None

    @property
    def room(self) -> str:
        """Tokens in the context and its limit, if known."""
        return f"{self.used} of {self.session.ctx}" if self.model.ctx else f"{self.used}"

    @property
    def nearly_full(self) -> bool:
        """Whether the context has little room left, if that is known."""
        return bool(self.model.ctx) and self.used > 0.9 * self.session.ctx

    @property
    def limit(self) -> Limit:
        """The number of bytes of text that surely fills the context, or that a server accepts."""
        return context_limit(self.session.ctx, self.served, "choose a larger one by -c or /ctx")

    @property
    def model_name(self) -> str:
        """The name of the model."""
        return self.model.name if self.served else Path(self.conversation.model).name

    def count(self, text: str) -> int | None:
        """Tokens of a text; None if a server does not count them."""
        return self.model.count(text) if self.served else len(self.model.tokenizer.encode(text, bos=False, special=False))

    def check_here(self, name: str) -> None:
        """UsageError for a command that needs a model in this process."""
        if self.served:
            raise UsageError(
                f"{name}: expected a model that is loaded here, found one of a server; start chat with --server none"
            )

    def resize(self, ctx: int) -> None:
        """Another context limit; keys and values are computed again with the next question."""
        self.check_here("/ctx")
        self.session = self.options.session(self.model, ctx)

    def set(self, name: str, text: str) -> None:
        """Change a setting, checked as its option is; "default" gives the model's. UsageError for an invalid name or value."""
        name = name.lstrip("-").replace("-", "_")
        if name in HERE:
            self.check_here(f"/set {name}")
        if name not in SETTINGS:
            near = meant(name, SETTINGS)
            known = "a setting" if near else f"one of {', '.join(SETTINGS)}, markdown or stats"
            raise UsageError(f"/set: expected {known}, found {name!r}{near}")
        before = getattr(self.options, name)
        setattr(self.options, name, _value(name, text))
        try:
            self.sampler = self.options.sampler(self.model, self._console)
        except UsageError:
            setattr(self.options, name, before)
            raise

    def settings(self) -> list[tuple[str, str]]:
        """Names and values that differ from the model's defaults, and the defaults."""
        defaults = self.model.defaults
        rows = []
        for name in SETTINGS:
            value = getattr(self.options, name)
            value = None if value == () else value  # the parser's type for a repeatable option
            if value in (None, FIELDS[name].default) and name not in SHOWN and name not in defaults:
                continue
            default = defaults.get(name, SAMPLING[name][0] if name in SAMPLING else None)
            unset = "(as the server has it)" if self.served else f"{_text(default)} (default)".lstrip()
            rows.append((name, _text(value) if value is not None else unset))
        return rows

    def use(self, load: Callable[[str], object], path: str) -> None:
        """Answer with the model that `load(path)` returns. If it cannot be loaded, the old one is loaded again."""
        ctx, before = self.session.ctx, self.conversation.model
        self._views.clear()
        self.model.close()  # the next model needs its memory, and its connection to a cluster, of which a process may have one
        self.session = self.sampler = self.model = None
        try:
            self.model = load(path)
            self.conversation.use(path)
        except BaseException:
            self.model = load(before)
            raise
        finally:
            self.session = self.options.session(self.model, ctx)
            self.sampler = self.options.sampler(self.model, self._console)

    @property
    def used(self) -> int:
        """Tokens in the context."""
        return len(self.session.ids)

    def _answer(self, answer: Answer, then: str = THEN) -> Iterator[str]:
        """Yields text, which becomes the assistant's turn even if the caller stops early. `then`: advice once there is room."""
        self.reason = None
        said, messages = answer.text, self._messages()
        definitions = self._box.definitions if self._box else ()
        begun = self.model.tokenizer.encode(said, bos=False, special=False) if said else []
        ids = self.model.prompt_ids(messages[: -1 if said else None], tools=definitions)
        if not self.served:
            ids = ids + begun
            self._check_room(len(ids), then)
        reason, limits = None, (self.options.max_tokens, self.options.stop or ())
        if self._box and not said:
            pieces = answer_with_tools(self.model, self.session, self.sampler, messages, self._box, *limits)
        else:
            pieces = self.session.stream(ids, self.sampler, *limits, begun)
        try:
            for piece in pieces:
                answer.add(piece.text)
                reason = piece.finish_reason
                yield piece.text
            self.reason = reason
        except ContextFullError as error:
            if not self.served:
                raise
            raise ContextFullError(f"{error}; /undo, /drop or /clear makes room") from None
        finally:
            answer.close(reason)
            if self._box and self._box.turn and not said and answer.text:
                silent = [{**m, "content": ""} if m["role"] == "assistant" else m for m in self._box.turn]
                self._rounds.append((self.conversation.messages[-1], silent))

    def _messages(self) -> list[dict]:
        """The messages for the model, with the calls of this chat's earlier answers and their results."""
        shown = self.conversation.messages[self.conversation.start :]
        prompt = [m | {"content": content(m["content"], self._seen)} for m in self.conversation.prompt()]
        found = prompt[: len(prompt) - len(shown)]
        for message, said in zip(shown, prompt[len(found) :], strict=True):
            found += [*next((rounds for answer, rounds in self._rounds if answer is message), []), said]
        return found

    def _seen(self, path: str, digest: str):
        """The view of a picture of the conversation, encoded again if it is not cached."""
        return self._views.get(digest) or self._look(read_again(path, digest), Path(path))

    def _look(self, picture, path: Path):
        if self.served:
            view = sent(str(path))
        else:
            (view,) = look(self.model, [picture], self.options.image_tiles, self._console)
        self._views[picture.digest.hex()] = view
        return view

    def _check_room(self, n: int, then: str) -> None:
        ctx = self.session.ctx
        if n <= ctx:
            return
        larger = f"/ctx {(n + 512 + 1023) // 1024 * 1024} holds more"
        if sum(m.role == "user" for m in self.conversation.messages[self.conversation.start :]) > 1:
            raise ContextFullError(
                f"the conversation has {n} tokens with this question, the context holds {ctx}: /drop forgets the oldest turn, "
                f"{larger}; {then}; /undo or /clear makes room for another question"
            )
        raise ContextFullError(f"this question alone has {n} tokens, the context holds {ctx}: shorten it, or {larger}")


def _text(value) -> str:
    """A setting's value as text."""
    if isinstance(value, list | tuple):
        return " ".join(map(repr, map(str, value)))
    if isinstance(value, bool):
        return "on" if value else "off"
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _value(name: str, text: str):
    """The value of a text by the option's type and range."""
    field = FIELDS[name]
    kind, spec, several = kind_of(field.type)
    where = f"/set {name}"
    if text == "default":
        return field.default
    if kind is bool:
        if text not in ("on", "off"):
            raise UsageError(f"{where}: expected on or off, found {text!r}")
        return text == "on"
    return [read_value(kind, spec, text, where)] if several else read_value(kind, spec, text, where)
