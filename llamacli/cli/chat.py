"""`llamacli chat`: the conversation, with lines typed at a terminal or piped in as turns.

In: lines. Out: answers on stdout, everything else on stderr (the prompt sign is part of the line that is typed).
`Conversation` keeps the messages and knows no terminal; `Lines` reads turns; `chat` brings both together. Knows nothing of
decoding; session.py does it.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator

from llamacli import environment
from llamacli.cli.console import Console, is_terminal
from llamacli.cli.options import Generation, Output, checked, decoded
from llamacli.cli.run import describe
from llamacli.errors import ContextFullError, PromptError, UsageError
from llamacli.plan.machine import resident

TWICE = 1.0  # seconds between two Ctrl-C that mean it
FENCE = '"""'


class Conversation:
    """Messages and the session that answers them."""

    def __init__(self, model, sampler, system: str | None, max_tokens: int | None, stop: list[str]):
        self.model, self.sampler, self.system, self.max_tokens, self.stop = model, sampler, system or "", max_tokens, stop
        self.session = model.session()
        self.messages: list[dict[str, str]] = []

    def ask(self, text: str) -> Iterator[str]:
        """Add the user's turn and answer it. A turn that does not fit is taken back, one never answered is replaced."""
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()
        self.messages.append({"role": "user", "content": text})
        return self._answer()

    def regenerate(self) -> Iterator[str]:
        """Answer the latest question once more. PromptError if there is none."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if not self.messages:
            raise PromptError("nothing to answer again: ask something first")
        return self._answer()

    def undo(self) -> bool:
        """Forget the latest question and its answer; False if there is none."""
        while self.messages and self.messages.pop()["role"] != "user":
            pass
        return bool(self.messages)

    def clear(self) -> None:
        """Forget all turns, keep the system prompt."""
        self.messages.clear()

    def _answer(self) -> Iterator[str]:
        """Yields text, which becomes the assistant's turn even if the reader breaks off. Returns the finish reason."""
        parts: list[str] = []
        try:
            system = [{"role": "system", "content": self.system}] if self.system else []
            ids = self.model.prompt_ids(system + self.messages)
            for piece in self.session.stream(ids, self.sampler, self.max_tokens, self.stop):
                parts.append(piece.text)
                yield piece.text
                reason = piece.finish_reason
            return reason
        except (ContextFullError, PromptError):
            self.messages.pop()
            raise
        finally:
            if "".join(parts):
                self.messages.append({"role": "assistant", "content": "".join(parts)})


class Lines:
    """Turns from stdin: typed at a terminal, with history, or piped, one a line; a block in three quotes is one turn."""

    def __init__(self, console: Console, commands: list[str]):
        self.typed = is_terminal(sys.stdin)
        self._console = console
        self._readline = self.typed and is_terminal(sys.stdout) and _start_readline(commands)

    def turn(self) -> str:
        """The next turn. EOFError at the end; KeyboardInterrupt on Ctrl-C."""
        line = self._line("> ")
        if not line.lstrip().startswith(FENCE):
            return line
        block = line.lstrip()[len(FENCE) :]
        while not block.rstrip().endswith(FENCE):
            try:
                block += "\n" + self._line("... ")
            except EOFError:
                return block.strip("\n")
        return block.rstrip()[: -len(FENCE)].strip("\n")

    def _line(self, sign: str) -> str:
        if self._readline:
            return checked(input(self._console.prompt(sign)), "input")
        if self.typed:
            self._console.ask(sign)
        data = sys.stdin.buffer.readline() if sys.stdin is not None else b""
        if not data:
            raise EOFError
        return decoded(data.removesuffix(b"\n").removesuffix(b"\r"), "stdin")

    def save(self) -> None:
        """Keep the typed lines for the next time, for this user's eyes only."""
        if not self._readline:
            return
        path = environment.history_file()
        with contextlib.suppress(OSError):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
            os.chmod(path, 0o600)
            self._readline.set_history_length(1000)
            self._readline.write_history_file(path)


def _start_readline(commands: list[str]):
    try:
        import readline
    except ImportError:
        return None
    with contextlib.suppress(OSError):
        readline.read_history_file(environment.history_file())
    words = sorted(commands)
    readline.set_completer_delims("")
    readline.set_completer(lambda text, n: ([w for w in words if text.startswith("/") and w.startswith(text)] + [None])[n])
    readline.parse_and_bind("set enable-bracketed-paste on")  # a pasted text of several lines is one turn
    readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")
    return readline


class Chat:
    """One command of the conversation a method; `commands` maps a word to it and its line of help."""

    def __init__(self, conversation: Conversation, console: Console, typed: bool):
        self.conversation, self.console, self.typed = conversation, console, typed
        self.commands: dict[str, tuple[Callable[[str], None], str]] = {
            "/help": (self.help, "this list"),
            "/regen": (self.regen, "answer the latest question again"),
            "/undo": (self.undo, "forget the latest question and its answer"),
            "/clear": (self.clear, "forget the conversation, keep the system prompt"),
            "/system": (self.system, "TEXT: set the system prompt (alone: show it; - removes it)"),
            "/stats": (self.stats, "tokens, speed and memory"),
            "/exit": (self.exit, "leave (also /quit, /bye, Ctrl-D)"),
        }
        self.aliases = {"/quit": "/exit", "/bye": "/exit", "/?": "/help"}
        self._reason: str | None = None

    def take(self, text: str) -> None:
        """Obey a command or answer a turn."""
        word, _, rest = text.strip().partition(" ")
        if word.startswith("/") and "/" not in word[1:] and "\n" not in text:
            command = self.commands.get(self.aliases.get(word, word))
            if command is None:
                self.console.warn(f"unknown command {word}; /help lists them")
            else:
                command[0](rest.strip())
        elif text.strip():
            self._show(self.conversation.ask(text))

    def _show(self, answer: Iterator[str]) -> None:
        """Stream an answer; Ctrl-C ends it and keeps what was said."""
        self._reason = None
        try:
            for text in self._noting_the_end(answer):
                self.console.piece(text)
        except KeyboardInterrupt:
            answer.close()
            if not self.typed:
                raise  # nobody is there to go on talking
            self._reason = "stopped by Ctrl-C"
            self.console.fresh_line()
        finally:
            self.console.end(always=self._reason in ("stop", "length", "context"))
        if self._reason == "context":
            self.console.warn("the context is full, the answer ends here; /clear starts anew, a larger -c holds more")
        elif self._reason != "stop" or self.console.verbose:
            self.console.note(describe(self.conversation.session.stats, self._reason))

    def _noting_the_end(self, answer: Iterator[str]) -> Iterator[str]:
        self._reason = yield from answer

    def help(self, rest: str) -> None:
        for word, (_, line) in self.commands.items():
            self.console.say(f"  {word:<9}{line}")
        self.console.say(
            f"  {FENCE}      begins and ends a turn of several lines\n  Ctrl-C   stops an answer and keeps what was said"
        )

    def regen(self, rest: str) -> None:
        self._show(self.conversation.regenerate())

    def undo(self, rest: str) -> None:
        left = self.conversation.undo()
        self.console.note("the latest question is forgotten" if left else "the conversation is empty")

    def clear(self, rest: str) -> None:
        self.conversation.clear()
        self.console.note("the conversation is empty")

    def system(self, rest: str) -> None:
        if rest:
            self.conversation.system = "" if rest == "-" else rest
            self.console.note("system prompt removed" if rest == "-" else "system prompt set")
        else:
            self.console.say(self.conversation.system or "(no system prompt)")

    def stats(self, rest: str) -> None:
        session = self.conversation.session
        memory = getattr(session.cache, "nbytes", 0)
        self.console.say(f"context: {len(session.ids)} of {session.ctx} tokens, {memory / 1e6:.1f} MB of keys and values")
        self.console.say(f"latest answer: {describe(session.stats, None)}")
        for what, traffic in (("prompt", session.stats.prefill_traffic), ("answer", session.stats.decode_traffic)):
            if traffic:
                self.console.say(f"experts of the {what}: {traffic}")
        self.console.say(f"resident: {resident() / 1e9:.2f} GB")

    def exit(self, rest: str) -> None:
        raise EOFError


def chat(options: Generation = None, output: Output = None) -> None:
    """Talk with the model; /help inside lists the commands."""
    console = output.console()
    model = options.load(console)
    sampler = options.sampler(model, console)
    conversation = Conversation(model, sampler, options.system, options.max_tokens, options.stop or [])
    talk = Chat(conversation, console, is_terminal(sys.stdin))
    lines = Lines(console, [*talk.commands, *talk.aliases])
    if talk.typed:
        console.note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
    try:
        _loop(talk, lines, console)
    finally:
        lines.save()


def _loop(talk: Chat, lines: Lines, console: Console) -> None:
    """Turn after turn. Ctrl-C throws away what is typed; twice in a row it leaves."""
    interrupted = float("-inf")
    while True:
        try:
            talk.take(lines.turn())
        except EOFError:
            if lines.typed:
                console.say("")
            return
        except KeyboardInterrupt:
            now = time.monotonic()
            if now - interrupted < TWICE or not lines.typed:
                raise
            interrupted = now
            console.say("")
            console.note("Ctrl-D or /exit leaves, Ctrl-C twice too")
        except (PromptError, ContextFullError, UsageError) as error:
            if not lines.typed:
                raise
            console.warn(str(error))
