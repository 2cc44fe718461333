"""Where bytes meet the terminal: answers to stdout, everything else to stderr, colour only where it is wanted.

In: text. Out: bytes on descriptor 1, unbuffered, so that a pipe gets each piece at once and nothing is left to fail at the
end; notes, tables and progress. The only file that imports rich, and only for tables. Knows nothing of
models or options.
"""

import os
import re
import select
import sys
import textwrap
import time
from collections.abc import Iterable, Sequence
from contextlib import contextmanager

from llamacli import environment
from llamacli.cli.progress import Meter
from llamacli.errors import OutputError

DIM, RED, CYAN, BOLD, PLAIN = "\x1b[2m", "\x1b[31m", "\x1b[36m", "\x1b[1m", "\x1b[0m"
CLEAR = "\x1b[K"  # the rest of the line
SHADES, PLAIN_SHADES = " ░▒▓█", " .:+#"
HEAT = (16, 17, 18, 54, 90, 126, 162, 198, 203, 208, 214, 220, 227)
MOST_CELLS = 128  # columns of a picture where the reader has no width
# what a terminal obeys or hides: C0, C1, bidirectional controls, separators of lines, invisible and tag characters
_STEERING = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb\\ud800-\\udfff\\U000e0000-\\U000e007f]"
)
DRAW_EVERY, TELL_EVERY, QUIET_FOR = 0.1, 10.0, 60.0  # seconds: of a bar, of lines with -v, before lines without it


def one_line(text: str) -> str:
    """`text` without line breaks and control characters: a hostile file must not steer the terminal."""
    words = " ".join(str(text).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)


def visible(text: str) -> str:
    """`text` with control characters and marks that turn the direction of writing shown as escapes; lines and tabs stay."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def amount(nbytes: float) -> str:
    """Bytes for a reader."""
    return _scaled(nbytes, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), f"{nbytes} B")


def count(n: float) -> str:
    """A large number for a reader."""
    return _scaled(n, (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)), f"{n:.0f}")


def _scaled(n: float, units, small: str) -> str:
    return next((f"{n / size:.2f} {unit}" for unit, size in units if n >= size), small)


def complain(message: str) -> None:
    """The one line of an error."""
    text = _folded(f"llamacli: error: {one_line(message)}")
    if _coloured(sys.stderr, "auto"):
        text = text.replace("llamacli: error:", f"{RED}llamacli: error:{PLAIN}", 1)
    _to_stderr(text + "\n")


def _folded(text: str) -> str:
    """One line as lines that a terminal need not break in the middle of a word; elsewhere one line."""
    if not is_terminal(sys.stderr):
        return text
    return textwrap.fill(text, max(20, _width(2) - 1), break_long_words=False, break_on_hyphens=False)


def _to_stderr(text: str) -> None:
    try:
        if sys.stderr is not None:
            sys.stderr.write(text)
            sys.stderr.flush()
    except (OSError, ValueError):
        pass  # nobody is left to tell


def _coloured(stream, color: str) -> bool:
    if color != "auto":
        return color == "always"
    return is_terminal(stream) and not environment.plain_terminal()


def is_terminal(stream) -> bool:
    """Whether `stream` is a terminal; False for one that is closed or missing."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:
        return False


class Console:
    """`color` is auto, always or never. `talks`: whether notes are shown, on a terminal or with -v."""

    def __init__(self, color: str = "auto", verbose: bool = False):
        self.verbose = verbose
        self.talks = verbose or is_terminal(sys.stderr)
        self._color = color
        self._last = ""  # the last character of the answer under way; empty before its first

    def note(self, text: str) -> None:
        """A remark beside the answer."""
        if self.talks:
            self.say(self.dim(_folded(one_line(text))))

    def say(self, text: str) -> None:
        """A line to stderr that the user asked for."""
        _to_stderr(text + "\n")

    def ask(self, sign: str) -> None:
        """The sign before a line to be typed, where readline does not write it."""
        _to_stderr(sign)

    def warn(self, text: str) -> None:
        """A line to stderr that is shown in any case."""
        _to_stderr(_folded(f"llamacli: {one_line(text)}") + "\n")

    def fail(self, text: str) -> None:
        """What went wrong in a program that goes on."""
        text = _folded(one_line(text))
        self.say(f"{RED}{text}{PLAIN}" if _coloured(sys.stderr, self._color) else text)

    def dim(self, text: str) -> str:
        """`text` in grey where stderr has colours."""
        return f"{DIM}{text}{PLAIN}" if _coloured(sys.stderr, self._color) else text

    def prompt(self, text: str) -> str:
        """`text` in bold where stdout has colours, marked as taking no room for readline."""
        return f"\x01{BOLD}\x02{text}\x01{PLAIN}\x02" if _coloured(sys.stdout, self._color) else text

    def piece(self, text: str) -> None:
        """A piece of the answer, to stdout at once. BrokenPipeError if nobody reads any more."""
        if text:
            self._last = text[-1]
            _write(text.encode("utf-8", "replace"))

    def draw(self, text: str) -> None:
        """Text with control sequences of our own, to stdout, which is a terminal."""
        _write(text.encode("utf-8", "replace"))

    def coloured(self) -> bool:
        """Whether stdout may show colours."""
        return _coloured(sys.stdout, self._color)

    def size(self) -> tuple[int, int]:
        """Columns and rows of the terminal that shows the answers."""
        try:
            size = os.get_terminal_size(1)
        except OSError:
            return 80, 24
        return size.columns or 80, size.lines or 24

    def end(self, always: bool = True) -> None:
        """The answer is over: make sure that it ends in a newline. `always` False: only if there was an answer."""
        last, self._last = self._last, ""
        if last != "\n" and (last or always):
            _write(b"\n")

    def fresh_line(self) -> None:
        """After a ^C that the terminal echoed: begin a new line, unless `end` will."""
        if not self._last:
            self.say("")

    def result(self, text: str) -> None:
        """A whole result to stdout, one line."""
        _write(text.encode("utf-8", "replace") + b"\n")

    def table(
        self,
        title: str,
        rows: Iterable[tuple[str, ...]],
        head: tuple[str, ...] = (),
        numbers: tuple[int, ...] = (),
        spare: tuple[int, ...] = (),
        aside: bool = False,
    ) -> None:
        """A result as aligned columns to stdout; the first is text, the others numbers or words.

        The columns `numbers` stand to the right; those in `spare` give way one after the other where a terminal is too narrow.
        `aside`: to stderr, and no result.
        """
        to = sys.stderr if aside else sys.stdout
        lines = [tuple(one_line(cell) for cell in row) for row in ([head] if head else []) + [*rows]]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        limit = _width(to.fileno()) if is_terminal(to) else None
        kept = list(range(len(widths)))
        for column in spare:
            if limit and sum(widths[i] + 2 for i in kept) > limit:
                kept.remove(column)
        text = self._aligned(title, lines, bool(head), numbers, kept, widths, limit, to)
        self.say(text) if aside else self.result(text)

    def _aligned(self, title, lines, headed, numbers, kept, widths, limit, to) -> str:
        if not _coloured(to, self._color):
            text = [title] if title else []
            for line in lines:
                cells = [line[i].rjust(widths[i]) if i in numbers else line[i].ljust(widths[i]) for i in kept]
                text.append("  " + "  ".join(cells).rstrip())
            return "\n".join(text)
        import io

        from rich.console import Console as Rich
        from rich.table import Table
        from rich.text import Text

        table = Table(
            box=None, show_header=headed, title=title or None, title_justify="left", title_style="bold", pad_edge=True
        )
        for i in kept:
            side = "right" if i in numbers else "left"
            table.add_column(lines[0][i] if headed else None, style=None if i else "cyan", overflow="fold", justify=side)
        for line in lines[headed:]:
            table.add_row(*(Text(line[i]) for i in kept))
        rendered = io.StringIO()
        Rich(file=rendered, force_terminal=True, width=limit or 100).print(table)
        return "\n".join(line.rstrip() for line in rendered.getvalue().rstrip("\n").split("\n"))

    def shades(self, title: str, rows: Iterable[tuple[str, Sequence[float]]]) -> None:
        """A picture to stdout: a row a label, a cell a number from 0 to 1, the larger the denser, or the brighter in colours.

        Where a terminal is too narrow neighbours share a cell, which shows the largest of them.
        """
        rows = [(one_line(label), values) for label, values in rows]
        margin, columns = 2 + max(len(label) for label, _ in rows), len(rows[0][1])
        limit = (_width(1) if is_terminal(sys.stdout) else 2 * MOST_CELLS) - margin - 1
        wide = 2 if 2 * columns <= min(limit, MOST_CELLS) else 1
        group = -(-columns * wide // max(1, limit))
        coloured = _coloured(sys.stdout, self._color)
        signs = SHADES if "utf" in (getattr(sys.stdout, "encoding", None) or "").lower() else PLAIN_SHADES
        lines = [one_line(title)]
        for label, values in rows:
            cells = [max(values[i : i + group]) for i in range(0, columns, group)]
            drawn = [_painted(v, wide) if coloured else wide * signs[round(v * (len(signs) - 1))] for v in cells]
            lines.append(f"  {label.rjust(margin - 2)} " + "".join(drawn).rstrip())
        self.result("\n".join(lines))

    @contextmanager
    def progress(self, what: str):
        """Yields update(done, total, label, weights) for a long job, as `Meter` takes it.

        On a terminal a line that redraws itself and is gone at the end; elsewhere plain lines, with -v or if it takes long.
        """
        if not is_terminal(sys.stderr) or environment.dumb_terminal():
            yield self._told(Meter(what))
            return
        try:
            yield self._drawn(Meter(what))
        finally:
            _to_stderr(f"\r{CLEAR}")

    def _told(self, meter: Meter):
        start = told = time.monotonic()
        share = 0.0

        def update(done: int, total: int, label: str = "", weights: int | None = None) -> None:
            nonlocal told, share
            meter.update(done, total, one_line(label), weights)
            now = time.monotonic()
            due = meter.share - share >= 0.1 or (self.verbose and now - told >= TELL_EVERY)
            if due and (self.talks or now - start >= QUIET_FOR):
                told, share = now, meter.share
                self.say(meter.words())

        return update

    def _drawn(self, meter: Meter):
        drawn, signs = 0.0, ("━", "─") if "utf" in (sys.stderr.encoding or "").lower() else ("#", "-")
        colours = {"filled": CYAN, "empty": DIM, "speed": DIM} if _coloured(sys.stderr, self._color) else {}

        def paint(text: str, part: str) -> str:
            return f"{colours[part]}{text}{PLAIN}" if colours else text

        def update(done: int, total: int, label: str = "", weights: int | None = None) -> None:
            nonlocal drawn
            meter.update(done, total, one_line(label), weights)
            now = time.monotonic()
            if now - drawn >= DRAW_EVERY:
                drawn = now
                _to_stderr(f"\r{meter.bar(_width(2) - 1, *signs, paint)}{CLEAR}")  # a full line would wrap on some terminals

        return update


def _painted(value: float, wide: int) -> str:
    """A cell on a ground from black over blue and red to yellow, of the 216 colours that terminals share."""
    return f"\x1b[48;5;{HEAT[round(value * (len(HEAT) - 1))]}m{' ' * wide}{PLAIN}"


def _width(descriptor: int) -> int:
    """Columns of the terminal there; a terminal may not know its width."""
    try:
        return os.get_terminal_size(descriptor).columns or 100
    except OSError:
        return 100


def _write(data: bytes) -> None:
    while data:
        try:
            data = data[os.write(1, data) :]
        except BlockingIOError:
            select.select([], [1], [])
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(
                f"stdout: expected to write {len(data)} bytes, found: {error.strerror}; free some room or redirect elsewhere"
            ) from None
