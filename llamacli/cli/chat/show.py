"""Shows answers on the screen or writes them to a pipe.

In: an answer piece by piece. Out: on a terminal rendered Markdown, or text with control characters as escapes; elsewhere the
unchanged bytes. While an answer is written, typed keys are not echoed and not lost.
"""

import contextlib
import sys
import textwrap
from collections.abc import Iterator

from llamacli import environment
from llamacli.cli import signals
from llamacli.cli.chat.terminal import Quiet, unbroken
from llamacli.cli.console import Console, is_terminal, one_line, visible
from llamacli.cli.run import reading
from llamacli.cli.stats import describe

NARROWEST = 16  # columns between two texts in a row
RECALLED = 12  # lines of an earlier question that are shown


class Screen:
    """`edits`: the prompt is an editor. `markdown`: answers are rendered. `stats`: a line about the speed after each answer.
    `quiet`: the context without echo: the whole chat with an editor, else each answer.
    """

    def __init__(self, console: Console, edits: bool, plain: bool):
        self.edits, self.stats, self.stream = edits, console.verbose, sys.stdout
        self._console, self._shows = console, is_terminal(sys.stdout)
        self._markdown = self._shows and not plain and not environment.dumb_terminal()
        self._drawn = None  # draws the answer under way
        self.quiet = Quiet(edits, console.draw if self._shows else console.ask, self._moved)

    @property
    def markdown(self) -> bool:
        return self._markdown

    @markdown.setter
    def markdown(self, on: bool) -> None:
        self._markdown = on and self._shows and not environment.dumb_terminal()

    def size(self) -> tuple[int, int]:
        """Columns and rows."""
        return self._console.size()

    def send(self, text: str) -> None:
        """Control sequences of our own."""
        self._console.draw(text)

    def row(self, head: str, text: str, left: int) -> None:
        """Show a row of two columns; `left`: width of the first. If the second would be too narrow, it is shown below."""
        room = self.size()[0] - 1 - 2 - left
        if room < NARROWEST or len(head) >= left:
            self._console.say(f"  {head}")
            head = ""
        if room < NARROWEST:
            left, room = 2, max(NARROWEST, room + left - 2)
        for line in textwrap.wrap(one_line(text), room) or [""]:
            self._console.say(f"  {head.ljust(left)}{line}".rstrip())
            head = ""

    def answer(self, talk, answer: Iterator[str], typed: bool) -> None:
        """Show an answer to its end. Ctrl-C ends it and keeps the text so far; without a terminal it ends the chat."""
        self._space()
        live = self._drawn = self._live() if self._markdown else None
        stopped = False
        with contextlib.nullcontext() if self.edits else self.quiet:
            if self.edits:
                self.quiet.mark_pastes()
            try:
                for text in self._reading(talk, answer, typed):
                    if live:
                        with unbroken():
                            live.feed(text)
                    else:
                        self._console.piece(visible(text) if self._shows else text)
                    self.quiet.drain()
            except KeyboardInterrupt:
                answer.close()
                if not typed:
                    raise  # no user can continue the chat
                stopped = True
            finally:
                if live:
                    live.close()
                else:
                    self._console.end(always=talk.reason is not None)
                self._drawn = None
        if stopped or self.stats or talk.reason in ("length", "rounds"):
            self._console.note(describe(talk.session.stats, "stopped by Ctrl-C" if stopped else talk.reason))
        self._space()

    @contextlib.contextmanager
    def suspended(self):
        """A context for other output and input during an answer: the drawn part stays, and the terminal has its normal mode."""
        if self._drawn:
            with unbroken():
                self._drawn.close()
        with self.quiet.paused():
            yield

    def _reading(self, talk, answer: Iterator[str], typed: bool) -> Iterator[str]:
        """The answer's pieces, with the progress of the prompt before the first. Ctrl-C ends the answer, not the chat."""
        with signals.surviving() if typed else contextlib.nullcontext(), reading(self._console, talk.model) as first:
            for text in answer:
                first()
                yield text

    def message(self, message) -> None:
        """Show an earlier message."""
        if message.role == "user":
            lines = visible(message.content).split("\n")
            if len(lines) > RECALLED:
                lines = [*lines[: RECALLED - 1], f"... {len(lines) - RECALLED + 1} more lines"]
            self._console.say(
                "\n".join(self._console.dim(f"> {line}" if i == 0 else f"  {line}") for i, line in enumerate(lines))
            )
            self._space()
        elif self._markdown:
            live = self._live()
            live.feed(message.content)
            live.close()
            self._space()
        else:
            self._console.piece(visible(message.content))
            self._console.end()

    def _moved(self) -> None:
        if self._drawn:
            self._drawn.disturbed = True

    def _space(self) -> None:
        """Write a blank line between a typed turn and its answer."""
        if self.edits and self._shows:
            self._console.draw("\n")

    def _live(self):
        from llamacli.cli.chat.live import Live
        from llamacli.cli.chat.markdown import Renderer

        signs = "utf" in (getattr(sys.stdout, "encoding", None) or "").lower()
        return Live(Renderer(self._console.coloured(), signs), self._console.draw, self.size)
