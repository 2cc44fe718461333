"""Reads turns as plain lines: from a pipe, or typed at a terminal without control sequences.

In: bytes of stdin. Out: turns. This module also defines turns of several lines, for prompt.py too: a block in three quotes,
also after a command, and, where lines are typed, a line that ends in a backslash.
"""

import os
import select
import sys

from llamacli.cli.console import Console
from llamacli.cli.options import decoded

FENCE = '"""'
SIGN, MORE = "> ", "... "


def unfinished(text: str) -> bool:
    """Whether `text` begins a block in three quotes that does not end."""
    block = _after_command(text)
    return block.startswith(FENCE) and not (len(block.rstrip()) >= 2 * len(FENCE) and block.rstrip().endswith(FENCE))


def unfenced(text: str) -> str:
    """`text` without the quotes around its block."""
    block = _after_command(text)
    if not block.startswith(FENCE):
        return text
    inner = block[len(FENCE) :]
    inner = inner.rstrip().removesuffix(FENCE) if inner.rstrip().endswith(FENCE) else inner
    return text[: len(text) - len(text.lstrip())] + text.lstrip()[: len(text.lstrip()) - len(block)] + inner.strip("\n")


def _after_command(text: str) -> str:
    text = text.lstrip()
    return text.partition(" ")[2].lstrip() if text.startswith("/") and "/" not in text.split(" ")[0][1:] else text


class Lines:
    """Turns from stdin. `typed`: stdin is a terminal, which shows a prompt sign before each line."""

    def __init__(self, console: Console, typed: bool):
        self._console, self._typed = console, typed
        self._data, self._ended, self._first = b"", False, True

    def turn(self, default: str = "") -> str:
        """The next turn. EOFError at the end; KeyboardInterrupt on Ctrl-C. `default` cannot be edited here and is left out."""
        text = self._line(SIGN)
        while unfinished(text) or (self._typed and text.endswith("\\")):
            text = text if unfinished(text) else text[:-1]
            try:
                text += "\n" + self._line(MORE)
            except EOFError:
                break
        return unfenced(text)

    def type_ahead(self, data: bytes) -> None:
        """Empty: the system keeps the lines typed meanwhile."""

    def _line(self, sign: str) -> str:
        if self._typed:
            self._console.ask(sign)
        while b"\n" not in self._data and not self._ended:
            self._read()
        if not self._data:
            raise EOFError
        line, _, self._data = self._data.partition(b"\n")
        text = decoded(line.removesuffix(b"\r"), "stdin")
        if self._first:
            self._first, text = False, text.removeprefix("\ufeff")
        return text.replace("\0", "") if self._typed else text

    def _read(self) -> None:
        """Read more bytes. Also works for a non-blocking descriptor, and for one that may not be read."""
        try:
            data = os.read(0, 1 << 16) if sys.stdin is not None else b""
        except BlockingIOError:
            select.select([0], [], [])
            return
        except OSError:
            data = b""
        self._data += data
        self._ended = not data
