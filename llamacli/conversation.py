"""Persistent conversations: a tree of messages in memory, written to SQLite as it grows.

In: questions, answers piece by piece, the commands that change a conversation. Out: messages for a chat template, and records
in the store (store.py has the database).

A conversation is a tree: every message names its parent, and the branch that ends at the head is what is sent to the model. So
undo, regenerate and edit move the head and delete nothing. An answer is written sentence by sentence; a process that is killed
loses at most the sentence under way. Where two processes continue one conversation, the second to write saves its branch as a
new conversation. If the store fails, the conversation continues in memory. `trouble` reports both cases, once.
"""

import json
import re
import sqlite3
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime

from llamacli.errors import PromptError
from llamacli.store import HeadMovedError, Store, StoredChat

TITLE = 60  # characters of the first question that name a conversation
_SENTENCE_END = re.compile(r"[.!?…:;。！？；：\n]")  # noqa: RUF001


@dataclass
class Message:
    """`id` is the store's, None where nothing is kept. `finish` None: the answer broke off."""

    role: str
    content: str
    id: int | None = None
    finish: str | None = None


class Conversation:
    """The current branch in `messages`; those from index `start` on are sent to the model."""

    def __init__(self, store: Store | None = None, model: str = "", system: str = ""):
        self.messages: list[Message] = []
        self.model, self.id, self.name, self.start, self.trouble = model, None, None, 0, None
        self._store, self._system = store, system
        self._head: int | None = None  # in the store, as this process wrote or read it last

    @classmethod
    def resume(cls, store: Store, chat: StoredChat) -> "Conversation":
        """A conversation of the store, as it was left."""
        self = cls(store, chat.model, chat.system)
        self.id, self.name, self._head = chat.id, chat.name, chat.head
        self.messages = [Message(m.role, m.content, m.id, m.finish) for m in store.branch(chat)]
        self.start = next((i for i, m in enumerate(self.messages) if m.id == chat.first), 0)
        return self

    @property
    def title(self) -> str:
        """The name that the user gave, else the beginning of the first question."""
        return self.name or title(next((m.content for m in self.messages), ""))

    @property
    def kept(self) -> bool:
        """Whether the conversation is being written to the store."""
        return self._store is not None

    @property
    def system(self) -> str:
        return self._system

    @system.setter
    def system(self, text: str) -> None:
        self._system = text
        self._update(system=text)

    def prompt(self) -> list[dict[str, str]]:
        """What the model is to answer: the system prompt and the branch."""
        system = [{"role": "system", "content": self._system}] if self._system else []
        return system + [{"role": m.role, "content": m.content} for m in self.messages[self.start :]]

    def ask(self, question: str) -> None:
        """Add the user's turn. It takes the place of a question that was never answered."""
        if self.unanswered:
            self._cut(len(self.messages) - 1)
        self._append(Message("user", question, finish="stop"))

    @property
    def unanswered(self) -> bool:
        return bool(self.messages) and self.messages[-1].role == "user"

    def answer(self) -> "Answer":
        """An empty answer to the last question. It joins the branch when its first text is added."""
        if not self.unanswered:
            raise PromptError("nothing to answer: ask something first")
        return Answer(self)

    def extend(self) -> "Answer":
        """The last answer, to be continued where it broke off."""
        if not self.messages or self.messages[-1].role != "assistant":
            raise PromptError("nothing to continue: expected an answer that broke off, found none")
        return Answer(self, self.messages[-1])

    def retract(self) -> Callable[[], None]:
        """Take the last answer off the branch, to answer its question anew. Returns a function that puts it back."""
        if not self.messages:
            raise PromptError("nothing to answer again: ask something first")
        return (lambda: None) if self.unanswered else self._take_off(len(self.messages) - 1)

    def set_aside(self) -> Callable[[], None]:
        """Take the latest question and its answer off the branch. Returns a function that puts them back."""
        return self._take_off(max((i for i, m in enumerate(self.messages) if m.role == "user"), default=0))

    def _take_off(self, length: int) -> Callable[[], None]:
        """Cut the branch to this length. Returns a function that puts back what was cut off, in place of what came since."""
        chat, start, off = self.id, self.start, self.messages[length:]
        self._cut(length)

        def put_back() -> None:
            self._cut(length)
            self.start = start
            if self.id == chat:
                self.messages += off
                self._move_head()
                if 0 < start < len(self.messages):
                    self._update(first=self.messages[start].id)
            else:  # saved as another conversation meanwhile, which lacks them
                for message in off:
                    message.id = None
                    self._append(message)

        return put_back

    def undo(self, turns: int = 1) -> list[str]:
        """Forget the latest questions and their answers; returns the questions, the latest first."""
        forgotten, end = [], len(self.messages)
        while end and len(forgotten) < turns:
            end -= 1
            if self.messages[end].role == "user":
                forgotten.append(self.messages[end].content)
        self._cut(end)
        return forgotten

    def drop(self, turns: int = 1) -> int:
        """Stop sending the oldest turns to the model; they stay in the conversation. Returns their number."""
        questions = [i for i in range(self.start, len(self.messages)) if self.messages[i].role == "user"]
        dropped = min(turns, max(0, len(questions) - 1))  # the latest question always stays
        if dropped:
            self.start = questions[dropped]
            self._update(first=self.messages[self.start].id)
        return dropped

    def clear(self) -> None:
        """Begin a new conversation with the same system prompt; the one so far stays in the store."""
        self.messages, self.id, self.name, self.start = [], None, None, 0

    def rename(self, name: str) -> None:
        self.name = name
        self._update(name=name)

    def use(self, model: str) -> None:
        """Note the file of the model that answers from now on."""
        self.model = model
        self._update(model=model)

    def _append(self, message: Message) -> None:
        self.messages.append(message)
        if self.id is None:
            self._keep(self._create)
        else:
            self._keep(self._write)

    def _cut(self, length: int) -> None:
        del self.messages[length:]
        if self.start > length:
            self.start = 0
        self._move_head()

    def _move_head(self) -> None:
        if self.id is not None:
            self._keep(self._write_head)

    def _write_head(self) -> None:
        head = next((m.id for m in reversed(self.messages) if m.id is not None), None)
        self._store.move(self.id, self._head, head)
        self._head = head

    def _create(self) -> None:
        """Write everything so far as a new conversation: with the first question, or if another process deleted it, or went on
        with it.
        """
        for message in self.messages:
            message.id = None
        self.id, self._head = self._store.create(self.model, self._system, self.name), None
        self._write()

    def _write(self) -> None:
        """Write the last messages: those that have no id, usually one, or more after an interrupt."""
        begin = len(self.messages)
        while begin and self.messages[begin - 1].id is None:
            begin -= 1
        for i, message in enumerate(self.messages[begin:], begin):
            parent = self.messages[i - 1].id if i else None
            written = message.role, message.content, message.finish
            message.id = self._head = self._store.add(self.id, self._head, parent, *written)
            if i and i == self.start:  # in place of a message that was the first of those sent
                self._store.update(self.id, first=message.id)

    def _rewrite(self, message: Message) -> None:
        self._keep(lambda: self._store.rewrite(message.id, message.content, message.finish))

    def _update(self, **fields) -> None:
        if self.id is not None:
            self._keep(lambda: self._store.update(self.id, **fields))

    def _keep(self, write: Callable[[], object]) -> None:
        """Write to the store. A failure ends the keeping, not the conversation."""
        if self._store is None:
            return
        try:
            try:
                write()
            except (sqlite3.IntegrityError, LookupError) as error:
                self._create()
                if isinstance(error, HeadMovedError):
                    self.trouble = f"another chat continued this conversation; this one is now saved as {self.id}"
        except (sqlite3.Error, OSError) as error:
            self._store = None
            self.trouble = f"this conversation is no longer saved: {error}; /export FILE saves it"


class Answer:
    """An answer as it grows: `add` pieces, then `close` with the reason of its end."""

    def __init__(self, conversation: Conversation, message: Message | None = None):
        self._conversation, self._message, self._unwritten = conversation, message, False

    @property
    def text(self) -> str:
        return self._message.content if self._message else ""

    def add(self, text: str) -> None:
        """Append a piece; what ends a sentence is written to the store."""
        if not text:
            return
        if self._message is None:
            self._message = Message("assistant", text)
            self._conversation._append(self._message)
            return
        self._message.content += text
        self._unwritten = True
        if _SENTENCE_END.search(text):
            self._write()

    def close(self, reason: str | None) -> None:
        """The answer is over. `reason` None: it broke off."""
        if self._message is not None and (self._unwritten or self._message.finish != reason):
            self._message.finish = reason
            self._write()

    def _write(self) -> None:
        self._unwritten = False
        self._conversation._rewrite(self._message)


def title(question: str) -> str:
    """The first line of a question that does not name a picture, shortened."""
    lines = [line.strip() for line in question.splitlines() if line.strip()]
    line = next((line for line in lines if not line.startswith("![")), "a picture" if lines else "")
    return line if len(line) <= TITLE else line[: TITLE - 1].rstrip() + "…"


def as_jsonl(system: str, messages: Iterable[Message]) -> str:
    """One object a line: role and content, as chat APIs take them."""
    lines = [{"role": "system", "content": system}] if system else []
    lines += [{"role": m.role, "content": m.content} for m in messages]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def as_markdown(name: str, model: str, created: float | None, system: str, messages: Iterable[Message]) -> str:
    """A page for a reader."""
    when = f"{datetime.fromtimestamp(created):%Y-%m-%d %H:%M}" if created else ""
    parts = [f"# {name}", " · ".join(part for part in (model, when) if part)]
    parts += [f"## System\n\n{system}"] if system else []
    parts += [f"## {'You' if m.role == 'user' else 'Model'}\n\n{m.content.strip()}" for m in messages]
    return "\n\n".join(part for part in parts if part) + "\n"


def from_jsonl(text: str, where: str) -> tuple[str, list[Message]]:
    """(system prompt, messages) from the text that `as_jsonl` wrote. PromptError for an invalid line."""
    system, messages = "", []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would split at characters within a text
        try:
            record = json.loads(line) if line.strip() else None
            role, content = (record["role"], record["content"]) if record is not None else ("", "")
        except (ValueError, TypeError, KeyError, RecursionError):
            role, content = None, None
        if role == "system" and isinstance(content, str) and not messages:
            system = content
        elif role in ("user", "assistant") and isinstance(content, str):
            if role == ("user", "assistant")[1 - len(messages) % 2]:
                raise PromptError(f"{where}: line {number}: expected user and assistant in turn, found two of {role}")
            messages.append(Message(role, content, finish="stop"))
        elif role != "":
            raise PromptError(f"{where}: line {number}: expected an object with a role and its content, found {line[:40]!r}")
    if not messages:
        raise PromptError(f"{where}: expected messages, one JSON object a line, found none")
    return system, messages
