"""Output to the terminal: answers to stdout, everything else to stderr, colours only where they are wanted.

In: text. Out: bytes on descriptor 1, unbuffered, so that a pipe gets each piece at once and no write can fail when the process
ends; notes, tables and progress. Tables on a terminal are drawn by rich; in a pipe they are plain aligned text of any width.
"""

import errno
import os
import re
import select
import sys
import termios
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, suppress

from llamacli import environment
from llamacli.cli.progress import Meter, cut, padded
from llamacli.cli.wrap import columns
from llamacli.errors import OutputError

DIM, RED, CYAN, BOLD, PLAIN = "\x1b[2m", "\x1b[31m", "\x1b[36m", "\x1b[1m", "\x1b[0m"
CLEAR = "\x1b[K"  # the rest of the line
SHADES, PLAIN_SHADES = " ░▒▓█", " .:+#"
HEAT = (16, 17, 18, 54, 90, 126, 162, 198, 203, 208, 214, 220, 227)
MOST_CELLS = 128  # columns of a picture if stdout is not a terminal
# characters that a terminal obeys or hides: C0, C1, bidirectional controls, line separators, invisible and tag characters
_STEERING = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\u061c\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb\\ud800-\\udfff\\U000e0000-\\U000e007f]"
)
NUMBER = re.compile(r"-|([-+]|about )?[0-9][0-9.,]*( to [0-9.,]+)?( [^ 0-9]{1,7}){0,2}|")  # a cell that is aligned to the right
DRAW_EVERY, LOG_EVERY, QUIET_FOR = 0.1, 10.0, 60.0  # seconds: of a bar, of lines with -v, before lines without it


def one_line(text: str) -> str:
    """`text` without line breaks and control characters: a hostile file must not steer the terminal."""
    words = " ".join(str(text).split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)


def visible(text: str) -> str:
    """`text` with control characters and marks that turn the direction of writing shown as escapes; lines and tabs stay."""
    return _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def amount(nbytes: float) -> str:
    """A number of bytes with a unit, such as 1.50 GB."""
    return _scaled(nbytes, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), f"{nbytes} B")


def count(n: float) -> str:
    """A large number with a unit."""
    return _scaled(n, (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)), f"{n:.0f}")


def rate(n: float) -> str:
    """A speed rounded to two significant digits: further ones differ from run to run."""
    if n >= 100:
        places = 10 ** (len(str(int(n))) - 2)
        return f"{round(n / places) * places:.0f}"
    return f"{n:.0f}" if n >= 10 else f"{n:.1f}" if n >= 1 else f"{n:.2g}"


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
        pass  # stderr is gone


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


def is_gone(terminal) -> bool:
    """Whether a stream was a terminal that is now closed."""
    try:
        termios.tcgetattr(terminal.fileno())
    except termios.error as error:
        return error.args[0] in (errno.EIO, errno.ENXIO)
    except (AttributeError, OSError, ValueError):
        pass
    return False


class Console:
    """`color` is auto, always or never. `talks`: whether notes are shown, on a terminal or with -v, but not with -q."""

    def __init__(self, color: str = "auto", verbose: bool = False, quiet: bool = False):
        self.verbose = verbose
        self.talks = not quiet and (verbose or is_terminal(sys.stderr))
        self._color = color
        self._last = ""  # the last character of the answer under way; empty before its first
        self._bar = False  # whether a progress line may be on the current line of stderr

    def note(self, text: str) -> None:
        """A remark beside the answer."""
        if self.talks:
            self.say(self.dim(_folded(one_line(text))))

    def say(self, text: str) -> None:
        """A line to stderr that the user asked for."""
        _to_stderr((f"\r{CLEAR}" if self._bar else "") + text + "\n")

    def ask(self, sign: str) -> None:
        """Write the prompt sign before a typed line, where readline does not write it."""
        _to_stderr(sign)

    def question(self, text: str) -> str:
        """Show a question and read the line typed after it, "" at the end of stdin.

        Keys typed before the question was shown are discarded.
        """
        import termios

        with suppress(OSError, termios.error):
            termios.tcflush(0, termios.TCIFLUSH)
        _to_stderr(text)
        return os.read(0, 4096).decode("utf-8", "replace").strip()

    def warn(self, text: str) -> None:
        """A line to stderr that -q does not suppress."""
        self.say(_folded(f"llamacli: {one_line(text)}"))

    def fail(self, text: str) -> None:
        """Report an error after which the program continues."""
        text = _folded(one_line(text))
        self.say(f"{RED}{text}{PLAIN}" if _coloured(sys.stderr, self._color) else text)

    def dim(self, text: str) -> str:
        """`text` in grey where stderr has colours."""
        return f"{DIM}{text}{PLAIN}" if _coloured(sys.stderr, self._color) else text

    def piece(self, text: str) -> None:
        """A piece of the answer, to stdout at once. BrokenPipeError if the reader has closed the pipe."""
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

    def wrap(self) -> Callable[[str], str]:
        """A function that breaks the pieces of an answer between words if stdout is a terminal, and else leaves them as they
        are.
        """
        if not is_terminal(sys.stdout) or environment.dumb_terminal():
            return lambda text: text
        from llamacli.cli.wrap import WordWrap

        return WordWrap(_width(1)).push

    def end(self, always: bool = True) -> None:
        """End the answer with a newline unless it has one. `always` False: only if there was an answer."""
        last, self._last = self._last, ""
        if last != "\n" and (last or always):
            _write(b"\n")

    def result(self, text: str) -> None:
        """A whole result to stdout, one line."""
        _write(text.encode("utf-8", "replace") + b"\n")

    def table(
        self,
        title: str,
        rows: Iterable[tuple[str, ...]],
        head: tuple[str, ...] = (),
        numbers: tuple[int, ...] | None = None,
        spare: tuple[int, ...] = (),
        to_stderr: bool = False,
    ) -> None:
        """A result as aligned columns to stdout.

        The columns `numbers` are aligned to the right; None: in a table with a head, the columns that hold only numbers. If a
        terminal is too narrow, the columns `spare` are left out one after the other, then each row is printed as several lines;
        a number is never wrapped. `to_stderr`: the table is a note beside the result.
        """
        to = sys.stderr if to_stderr else sys.stdout
        body = [tuple(one_line(cell) for cell in row) for row in rows]
        right = numbers if numbers is not None else tuple(i for i in range(len(head)) if _is_numeric([row[i] for row in body]))
        lines = ([head] if head else []) + body
        widths = [max(map(columns, column)) for column in zip(*lines, strict=True)]
        limit = _width(to.fileno()) if is_terminal(to) else None
        kept = list(range(len(widths)))
        for column in spare:
            if limit and _room(widths, kept) > limit:
                kept.remove(column)
        if head and limit and _room(widths, kept) > limit:
            text = _stacked(lines[0], body, limit - 1)
        elif limit or _coloured(to, self._color):
            text = self._drawn_table(lines, bool(head), right, kept, limit or _room(widths, kept), _coloured(to, self._color))
        else:
            text = "\n".join("  " + "  ".join(padded(line[i], widths[i], i in right) for i in kept).rstrip() for line in lines)
        if title:
            shown = one_line(title) if not limit else textwrap.fill(one_line(title), limit - 1, break_on_hyphens=False)
            shown = f"{BOLD}{shown}{PLAIN}" if _coloured(to, self._color) else shown
            text = "\n" * title.startswith("\n") + f"{shown}\n{text}"
        self.say(text) if to_stderr else self.result(text)

    def _drawn_table(self, lines, headed, right, kept, width, coloured) -> str:
        import io

        from rich.console import Console as Rich
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=headed, padding=(0, 0, 0, 2), pad_edge=True)
        for i in kept:
            side = "right" if i in right else "left"
            table.add_column(lines[0][i] if headed else None, style=None if i else "cyan", justify=side, no_wrap=i in right)
        for line in lines[headed:]:
            table.add_row(*(Text(line[i]) for i in kept))
        rendered = io.StringIO()
        Rich(file=rendered, force_terminal=True, width=width, color_system="standard" if coloured else None).print(table)
        text = rendered.getvalue() if coloured else re.sub("\x1b\\[[0-9;]*m", "", rendered.getvalue())
        return "\n".join(line.rstrip() for line in text.rstrip("\n").split("\n"))

    def shades(self, title: str, rows: Iterable[tuple[str, Sequence[float]]]) -> None:
        """Draw a heat map on stdout: a row for each label, a cell for each number from 0 to 1; larger numbers are denser or, in
        colours, brighter.

        If a terminal is too narrow, neighbours share a cell, which shows the largest of them.
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
    def waiting(self, words: Callable[[], str], after: float = 1.0):
        """A context that, after `after` seconds, shows on a terminal what is waited for, and removes the line at the end.

        `words` is called repeatedly for the text. Yields a function that removes the line earlier. In a pipe it shows nothing.
        """
        if not self.talks or not is_terminal(sys.stderr):
            yield lambda: None
            return
        over = threading.Event()
        drawer = threading.Thread(target=self._draw_waiting, args=(words, after, over), daemon=True)
        self._bar = not environment.dumb_terminal()
        drawer.start()

        def stop() -> None:
            over.set()
            drawer.join()
            self._bar = False

        try:
            yield stop
        finally:
            stop()

    def _draw_waiting(self, words: Callable[[], str], after: float, over: threading.Event) -> None:
        if over.wait(after):
            return
        if environment.dumb_terminal():
            self.note(words())
            return
        while True:
            _to_stderr(f"\r{self.dim(cut(words(), _width(2) - 1))}{CLEAR}")
            if over.wait(DRAW_EVERY * 2):
                break
        _to_stderr(f"\r{CLEAR}")

    def signs(self) -> tuple[str, str]:
        """The filled and the empty part of a bar, as the terminal's encoding allows."""
        return ("━", "─") if "utf" in (getattr(sys.stderr, "encoding", None) or "").lower() else ("#", "-")

    def width(self) -> int:
        """Columns of the terminal of stderr."""
        return _width(2)

    @contextmanager
    def progress(self, what: str, nbytes: bool = False):
        """Yields update(done, total, label, weights) for a long job, as `Meter` takes it.

        On a terminal it redraws one line, which it removes at the end; elsewhere it writes plain lines, with -v or if the job
        takes long.
        """
        if not is_terminal(sys.stderr) or environment.dumb_terminal():
            yield self._log_progress(Meter(what, nbytes=nbytes))
            return
        self._bar = True
        try:
            yield self._draw_progress(Meter(what, nbytes=nbytes))
        finally:
            self._bar = False
            _to_stderr(f"\r{CLEAR}")

    def _log_progress(self, meter: Meter):
        start = logged = time.monotonic()
        share = 0.0

        def update(done: int, total: int, label: str = "", weights: int | None = None) -> None:
            nonlocal logged, share
            meter.update(done, total, one_line(label), weights)
            now = time.monotonic()
            due = meter.share - share >= 0.1 or (self.verbose and now - logged >= LOG_EVERY)
            if due and (self.talks or now - start >= QUIET_FOR):
                logged, share = now, meter.share
                self.say(meter.words())

        return update

    def _draw_progress(self, meter: Meter):
        drawn, signs = 0.0, self.signs()
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


def _is_numeric(cells: Sequence[str]) -> bool:
    return any(cells) and all(NUMBER.fullmatch(cell) for cell in cells)


def _room(widths: Sequence[int], kept: Sequence[int]) -> int:
    """Columns that a table needs."""
    return sum(widths[i] + 2 for i in kept)


def _stacked(head: Sequence[str], body: Iterable[Sequence[str]], width: int) -> str:
    """A row as several lines, for a terminal too narrow for columns: its first cell, then each other cell after its column's
    head.
    """
    widest, lines = max(map(len, head[1:]), default=0), []
    for first, *others in body:
        lines.append(f"  {first}")
        for name, cell in zip(head[1:], others, strict=True):
            parts = textwrap.wrap(cell, max(16, width - widest - 6), break_on_hyphens=False)
            lines += [f"    {(name if i == 0 else '').ljust(widest)}  {part}" for i, part in enumerate(parts)]
    return "\n".join(lines)


def _painted(value: float, wide: int) -> str:
    """A cell with a background from black over blue and red to yellow, of the 216 colours that terminals share."""
    return f"\x1b[48;5;{HEAT[round(value * (len(HEAT) - 1))]}m{' ' * wide}{PLAIN}"


def _width(descriptor: int) -> int:
    """Columns of the terminal on this descriptor, or a default if the terminal does not report its width."""
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
