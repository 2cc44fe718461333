"""The commands of the chat: each is a method of `Commands`; `COMMANDS` has their names, arguments and help.

In: a turn. Out: an answer shown, or a command executed. Failures are raised as exceptions of errors.py.
"""

import dataclasses
import difflib
import os
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path

from llamacli.cli.binding import check_whole
from llamacli.cli.chat.lines import FENCE
from llamacli.cli.chat.pictures import dropped, paths_in
from llamacli.cli.chat.show import Screen
from llamacli.cli.chat.talk import SETTINGS, Talk
from llamacli.cli.chat.terminal import copying
from llamacli.cli.code import code_blocks
from llamacli.cli.console import Console, is_terminal, one_line, visible
from llamacli.cli.newfile import write_new
from llamacli.cli.options import Given, find_model, model_names, read_file, token_count
from llamacli.cli.stats import describe
from llamacli.conversation import Conversation, as_jsonl, as_markdown, from_jsonl, title
from llamacli.errors import PromptError, UsageError
from llamacli.plan.machine import resident_words
from llamacli.store import Store

COMMANDS = {  # name: (argument, help); an argument in brackets may be left out
    "/help": ("", "this list"),
    "/regen": ("", "answer the latest question anew"),
    "/continue": ("", "go on with an answer that was cut off"),
    "/edit": ("[TEXT]", "ask the latest question in other words"),
    "/undo": ("[N]", "forget the latest question and its answer, or N of them"),
    "/clear": ("", "begin a new conversation, keep the system prompt"),
    "/system": ("[TEXT]", "set the system prompt; alone: show it; - removes it"),
    "/read": ("FILE", "put a text file before the next question"),
    "/image": ("FILE...", "put pictures before the next question; a file dropped here does the same"),
    "/set": ("[NAME VALUE]", "change a setting, such as temp 0.2; alone: show them"),
    "/show": ("", "model, settings and the conversation's name"),
    "/ctx": ("[N]", "another context limit in tokens, such as 16K"),
    "/drop": ("[N]", "the model forgets the oldest turn, or N of them"),
    "/save": ("NAME", "name the conversation; it is kept in any case"),
    "/load": ("ID|NAME|FILE", "go on with another conversation, or one exported as .jsonl"),
    "/list": ("", "the latest conversations"),
    "/search": ("TEXT", "find conversations by their text"),
    "/export": ("FILE", "write the conversation to FILE.md or FILE.jsonl"),
    "/copy": ("[code]", "copy the latest answer, or its last block of code"),
    "/stats": ("", "tokens, speed and memory"),
    "/model": ("[FILE|NAME]", "answer with another model"),
    "/exit": ("", "leave (also Ctrl-D)"),
}
ALIASES = {"/quit": "/exit", "/bye": "/exit", "/?": "/help", "/retry": "/regen", "/reset": "/clear", "/new": "/clear"}
PATHS = ("/read", "/image", "/export")
KEYS = (
    ("Ctrl-C", "stops an answer and keeps what was said; twice at the prompt leaves"),
    ("Alt-Enter", "a new line; also Ctrl-J, or a \\ at the end of a line"),
    (FENCE, "begins and ends a turn of several lines"),
    ("Ctrl-G", "writes the turn in your editor; Ctrl-R searches the history"),
)
LISTED = 20  # conversations that /list shows
MOST_READ = 64 << 20  # bytes of a file that /read takes


class Commands:
    """`store` None: nothing is kept. `draft`: the text in the editor when the next prompt begins."""

    def __init__(self, talk: Talk, console: Console, screen: Screen, store: Store | None, typed: bool):
        self.talk, self.console, self.screen, self.typed = talk, console, screen, typed
        self._store = store
        self.draft, self._editing, self._hinted = "", False, ""

    @property
    def _conversation(self) -> Conversation:
        return self.talk.conversation

    def take(self, text: str) -> None:
        """Execute a command or answer a turn, and report where the conversation is saved if that changed. EOFError leaves the
        chat.
        """
        try:
            self._take(text)
        finally:
            if trouble := self._conversation.trouble:
                self._conversation.trouble = None
                self.console.fail(trouble)

    def _take(self, text: str) -> None:
        editing, self._editing, self.draft = self._editing, False, ""
        word, _, rest = text.strip().partition(" ")
        name = ALIASES.get(word.lower(), word.lower())
        if word.startswith("/") and "/" not in word[1:] and (name in COMMANDS or "\n" not in text):
            self._obey(word, name, rest.strip())
        elif text.strip().lower() in ("exit", "quit", "bye") and self.typed and self._hinted != text:
            self._hinted = text
            self.console.note(f"/exit leaves; {text.strip()} once more is sent to the model")
        elif text.strip():
            if self.typed:
                paths, text = dropped(text)
                for path in paths:
                    self.talk.show(path)
                if not text.strip():
                    return
            self._show(self.talk.edit(text) if editing else self.talk.ask(text))

    def forget_draft(self) -> None:
        """After Ctrl-C at the prompt: stop editing a question, which stays unchanged."""
        self.draft, self._editing = "", False

    def arguments(self, word: str) -> str | Iterable[str]:
        """The possible arguments of a command, for completion."""
        name = ALIASES.get(word, word)
        if name in PATHS:
            return "path"
        if name == "/set":
            return (*SETTINGS, "markdown", "stats")
        if name == "/load" and self._store:
            return [word for chat in self._store.chats(100) for word in (chat.name, chat.id) if word]
        if name == "/model":
            return model_names() or "path"
        return ()

    def status(self) -> str:
        """The line below the prompt."""
        talk, conversation = self.talk, self._conversation
        parts = [f"ctx {talk.room}"]
        if talk.session.stats.decode_tps:
            parts.append(f"{talk.session.stats.decode_tps:.1f} tok/s")
        parts += [f"{one_line(Path(path).name)} attached" for path in talk.unread]
        if conversation.messages:
            parts.append(f"{'saved' if conversation.kept else 'not saved'}: {one_line(conversation.title)}")
        return " · ".join(parts)

    def _obey(self, word: str, name: str, rest: str) -> None:
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, [*COMMANDS, *ALIASES], 1)
            raise UsageError(f"unknown command {word}; " + (f"did you mean {near[0]}?" if near else "/help lists them"))
        argument = COMMANDS[name][0]
        if rest and not argument:
            raise UsageError(f"{name}: expected nothing after it, found {rest!r}")
        if not rest and argument and not argument.startswith("["):
            raise UsageError(f"{name}: expected {argument}, found nothing")
        getattr(self, name[1:] + "_")(rest)

    def _show(self, answer: Iterator[str]) -> None:
        self.screen.answer(self.talk, answer, self.typed)
        ctx = self.talk.session.ctx
        more = "" if self.talk.served else f"/ctx {2 * ctx} holds more"
        if self.talk.reason == "context":
            self.console.fail(
                f"the context of {ctx} tokens is full, the answer ends here; {more}{more and ', then /continue goes on; '}"
                f"/drop forgets the oldest turn, /clear starts over"
            )
        elif self.typed and self.talk.nearly_full:
            self.console.note(f"the context is nearly full, {self.talk.room} tokens: {more or '/drop forgets the oldest turn'}")
        if self.talk.reason in ("length", "context"):
            check_whole(self.talk.sampler, self.talk.reason)

    def help_(self, rest: str) -> None:
        lines = [(f"{name} {argument}".strip(), words) for name, (argument, words) in COMMANDS.items()]
        for head, words in [*lines, *KEYS]:
            self.screen.row(head, words, 24 if self.screen.size()[0] > 70 else 12)

    def regen_(self, rest: str) -> None:
        self._show(self.talk.regenerate())

    def continue_(self, rest: str) -> None:
        self._show(self.talk.proceed())

    def edit_(self, rest: str) -> None:
        question = next((m.content for m in reversed(self._conversation.messages) if m.role == "user"), None)
        if question is None:
            raise PromptError("nothing to edit: ask something first")
        if rest:
            self._show(self.talk.edit(rest))
        elif not self.screen.edits:
            raise UsageError("/edit: expected TEXT, found nothing; this terminal cannot edit the question itself")
        else:
            self.draft, self._editing = question, True

    def undo_(self, rest: str) -> None:
        forgotten = self._conversation.undo(_count(rest, "/undo"))
        if not forgotten:
            raise PromptError("nothing to undo: the conversation is empty")
        for question in forgotten:
            self.console.note(f'forgotten: "{title(question)}" and its answer')

    def drop_(self, rest: str) -> None:
        dropped = self._conversation.drop(_count(rest, "/drop"))
        if not dropped:
            raise PromptError("nothing to drop: the latest turn stays, /clear starts over")
        turns = "turn" if dropped == 1 else f"{dropped} turns"
        self.console.note(f"the model no longer sees the oldest {turns}; nothing is deleted")

    def clear_(self, rest: str) -> None:
        kept = self._conversation.kept and self._conversation.id
        self._conversation.clear()
        self.console.note("a new conversation" + (f"; /load {kept} goes back" if kept else ""))

    def system_(self, rest: str) -> None:
        if rest:
            self._conversation.system = "" if rest == "-" else rest
            self.console.note("system prompt removed" if rest == "-" else "system prompt set")
        else:
            self.console.say(visible(self._conversation.system) or "(no system prompt)")

    def read_(self, rest: str) -> None:
        path = Path(os.path.expanduser(rest))
        if path.exists() and (not path.is_file() or path.stat().st_size > MOST_READ):
            raise PromptError(f"{path}: expected a text file of at most {MOST_READ >> 20} MB, found another")
        self.attach(path)

    def attach(self, path: Path) -> None:
        """Put a text before the next question."""
        text = read_file(str(path), self.console, self.talk.limit)
        if not text.strip():
            raise PromptError(f"{path}: expected text, found none")
        tokens = self.talk.count(text)
        self.talk.unread[str(path)] = text
        size = f"{len(text)} characters" if tokens is None else f"{tokens} tokens, of {self.talk.session.ctx} of the context"
        self.console.note(f"{path}: {size}; goes with the next question")

    def image_(self, rest: str) -> None:
        for path in paths_in(rest):
            self.talk.show(path)

    def set_(self, rest: str) -> None:
        name, _, value = rest.replace("=", " ", 1).partition(" ")
        if name in ("markdown", "stats"):
            if value not in ("on", "off"):
                raise UsageError(f"/set {name}: expected on or off, found {value!r}")
            setattr(self.screen, name, value == "on")
        elif not rest:
            self.show_("")
        elif not value.strip():
            raise UsageError(f"/set {name}: expected a value, found nothing; default gives the model's own")
        else:
            self.talk.set(name, value.strip())

    def show_(self, rest: str) -> None:
        conversation = self._conversation
        on = {True: "on", False: "off"}
        rows = [
            ("model", f"{self.talk.model_name} of {self.talk.model.server.url}" if self.talk.served else conversation.model),
            ("conversation", f"{conversation.title or '(empty)'}, {conversation.id or 'not saved yet'}"),
            ("system", title(conversation.system) or "(none)"),
            ("ctx", f"{self.talk.room} tokens used"),
            *self.talk.settings(),
            ("markdown", on[self.screen.markdown]),
            ("stats", on[self.screen.stats]),
        ]
        for name, value in rows:
            self.screen.row(name, value, 16)

    def ctx_(self, rest: str) -> None:
        if rest:
            ctx, limit = token_count(rest, "/ctx"), self.talk.model.config.context_length
            self.talk.resize(ctx)
            if limit and ctx > limit:
                self.console.note(f"{ctx} is more than the {limit} tokens that the model was made for")
        self.console.say(f"context: {self.talk.room} tokens")

    def save_(self, rest: str) -> None:
        if rest.endswith((".md", ".jsonl")):
            raise UsageError(f"/save: expected a name, found a file; /export {rest} writes one")
        self._conversation.rename(rest)
        self.console.note(f'the conversation is called "{rest}" now; /load or chat --resume finds it')

    def load_(self, rest: str) -> None:
        if rest.endswith(".jsonl") and Path(os.path.expanduser(rest)).is_file():
            system, messages = from_jsonl(read_file(os.path.expanduser(rest), self.console), rest)
            loaded = Conversation(self._store, self._conversation.model, system)
            loaded.messages = messages
        else:
            loaded = Conversation.resume(self._kept(), self._kept().find(rest))
            if loaded.model != self._conversation.model:
                loaded.use(self._conversation.model)
        self.talk.conversation = loaded
        self.recall()

    def recall(self) -> None:
        """Show where a conversation was left."""
        conversation = self._conversation
        turns = sum(m.role == "user" for m in conversation.messages)
        self.console.note(f'"{conversation.title}", {turns} turn{"s" * (turns != 1)} so far')
        if not self.typed:
            return
        at = next((i for i in range(len(conversation.messages) - 1, -1, -1) if conversation.messages[i].role == "user"), None)
        for message in conversation.messages[at:] if at is not None else ():
            self.screen.message(message)
        if conversation.unanswered:
            self.console.note("not answered; /regen answers it")
        elif conversation.messages and conversation.messages[-1].finish != "stop":
            self.console.note(f"the answer broke off; {'/regen answers anew' if self.talk.served else '/continue goes on'}")

    def list_(self, rest: str) -> None:
        for chat in self._kept().chats(LISTED):
            self.screen.row(f"{chat.id}  {_when(chat.changed)}", chat.name or title(chat.question), 28)

    def search_(self, rest: str) -> None:
        found = self._kept().search(rest)
        for hit in found:
            self.screen.row(f"{hit.chat.id}  {_when(hit.chat.changed)}", hit.snippet, 28)
        if not found:
            self.console.note("nothing found")

    def export_(self, rest: str) -> None:
        conversation, path = self._conversation, Path(os.path.expanduser(rest))
        if not conversation.messages:
            raise PromptError("nothing to export: the conversation is empty")
        if path.suffix not in (".md", ".jsonl"):
            raise UsageError(f"/export: expected a file that ends in .md or .jsonl, found {rest!r}")
        if path.suffix == ".md":
            text = as_markdown(conversation.title, self.talk.model_name, None, conversation.system, conversation.messages)
        else:
            text = as_jsonl(conversation.system, conversation.messages)
        write_new(path, text)
        self.console.note(f"wrote {path}")

    def copy_(self, rest: str) -> None:
        answer = next((m.content for m in reversed(self._conversation.messages) if m.role == "assistant"), None)
        if answer is None:
            raise PromptError("nothing to copy: ask something first")
        if rest not in ("", "code"):
            raise UsageError(f"/copy: expected nothing or code, found {rest!r}")
        blocks = code_blocks(answer) if rest else [answer]
        if not blocks:
            raise PromptError("nothing to copy: expected a block of code in the latest answer, found none")
        if not is_terminal(self.screen.stream):
            raise UsageError("/copy: expected a terminal, found none")
        self.screen.send(copying(blocks[-1]))
        self.console.note(f"copied {len(blocks[-1])} characters, if your terminal allows it")

    def stats_(self, rest: str) -> None:
        session = self.talk.session
        stats = session.stats
        latest = describe(stats, None)[1:-1] if stats.prompt_tokens or stats.completion_tokens else "(none yet)"
        if self.talk.served:
            rows = [("context", f"{self.talk.room} tokens"), ("latest answer", latest), ("server", self.talk.model.server.url)]
        else:
            rows = [*self._local_stats(session, latest), ("memory", resident_words())]
        for head, text in rows:
            self.screen.row(head, text, 16)

    def _local_stats(self, session, latest: str) -> list[tuple[str, str]]:
        memory = getattr(session.cache, "nbytes", 0)
        rows = [("context", f"{self.talk.room} tokens, {memory / 1e6:.1f} MB of keys and values"), ("latest answer", latest)]
        for what, io in (("prompt", session.stats.prefill_io), ("answer", session.stats.decode_io)):
            if io:
                rows.append((f"{'experts' if io.hits + io.misses else 'reads'}, {what}", str(io)))
        return rows

    def model_(self, rest: str) -> None:
        if not rest:
            self.console.say(self._conversation.model or "(the small model)")
            return
        self.talk.check_here("/model")
        from llamacli.files.gguf import open_gguf

        path = str(find_model(Given(rest, "the path after /model"), self.console))
        open_gguf(path)  # a file that is not a model changes nothing

        def load(name: str):
            return dataclasses.replace(self.talk.options, model=name, routing_log=None).load(self.console)

        with self.screen.quiet.paused():
            self.talk.use(load, path)
        self.console.note(f"{Path(path).name} answers from now on")

    def exit_(self, rest: str) -> None:
        raise EOFError

    def _kept(self) -> Store:
        if self._store is None:
            raise UsageError("expected a database of conversations, found none: nothing is kept here")
        return self._store


def _count(text: str, where: str) -> int:
    if text and not (text.isascii() and text.isdigit() and 0 < int(text) < 10**6):
        raise UsageError(f"{where}: expected a number of turns, found {text!r}")
    return int(text or 1)


def _when(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"
