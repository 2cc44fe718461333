"""Renders an answer as it streams: finished blocks are printed once; only the unfinished block is redrawn.

In: pieces of Markdown, the size of the terminal. Out: text for the terminal. Of a growing document only the last block can
change. So the blocks before it are printed once and scroll as ordinary output; the last block is drawn as rows that fit the
screen, and only rows that differ are written again. A fence is printed line by line, a list item by item. Rows that scrolled
out of the screen are never changed, and the final scrollback is one rendering of the whole text.

A resized or suspended terminal may have moved the drawn rows: they stay as they are, and drawing continues below them.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.text import Text
from wcwidth import wcwidth

from llamacli.cli.chat.markdown import HIGHLIGHTED, NARROWEST, Renderer, blank_before, parse

EVERY, SHARE = 0.05, 0.1  # least seconds between two drawings; most of a core's time spent on them
SYNC = "\x1b[?2026h", "\x1b[?2026l"  # synchronized output: a terminal shows the text between these at once, or ignores them
_FENCE = re.compile(r"( {0,3})(`{3,}|~{3,})(.*)")


@dataclass
class Fence:
    """An unfinished block of code; `lines` are those already printed."""

    indent: int
    mark: str
    info: str
    lines: list[str] = field(default_factory=list)

    def closed_by(self, line: str) -> bool:
        found = _FENCE.fullmatch(line.rstrip())
        return bool(found) and found[2][0] == self.mark[0] and len(found[2]) >= len(self.mark) and not found[3].strip()

    def inner(self, line: str) -> str:
        """A line without the indent of the fence."""
        spaces = len(line) - len(line.lstrip(" "))
        return line[min(spaces, self.indent) :]


class Live:
    """`write` takes text for the terminal, `size` tells its columns and rows."""

    def __init__(
        self,
        renderer: Renderer,
        write: Callable[[str], None],
        size: Callable[[], tuple[int, int]],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._renderer, self._write, self._size, self._clock = renderer, write, size, clock
        self._tail = ""  # the source that is not printed yet; it begins with a block
        self._gap, self._begun = False, False  # whether a blank line stands before that block; whether anything was printed
        self._number: int | None = None  # number of the item at the tail's start, if its list began before
        self._fence: Fence | None = None
        self._shown: list[str] = []  # the rows on the screen that may change, the cursor at the end of the last one
        self._columns, self._due = 0, float("-inf")
        self.disturbed = False  # set when other output was written to the terminal

    def feed(self, text: str) -> None:
        """Take a piece of the answer."""
        self._tail += text.replace("\r\n", "\n").replace("\r", "\n")
        if self._clock() >= self._due:
            began = time.thread_time()
            self._draw(final=False)
            self._due = self._clock() + max(EVERY, (time.thread_time() - began) / SHARE)

    def close(self) -> None:
        """End the answer: print the rest and leave the cursor at the beginning of a line."""
        self._draw(final=True)

    def _draw(self, final: bool) -> None:
        columns, rows = self._size()
        columns, rows = max(columns - 1, NARROWEST), max(rows, 4)  # a full line makes some terminals wrap
        if self._shown and (self.disturbed or columns != self._columns or len(self._shown) >= rows):
            self._leave()
        self._columns, self.disturbed = columns, False
        done = [self._renderer.ansi(line) for line in self._finished(final)]
        live = [""] if final else self._rows(self._under_way())[-(rows - 1) :] or [""]
        self._replace(done + live)
        self._shown = live

    def _leave(self) -> None:
        """Keep the drawn rows, and continue below them."""
        self._write("\r\n")
        self._shown, self._number, self._gap = [], None, False
        if self._fence:
            self._fence.lines.append(self._fence.inner(self._tail))
        self._tail = ""

    def _finished(self, final: bool) -> list[Text]:
        """Remove from the tail the blocks that cannot change, and return their lines."""
        result: list[Text] = []
        while self._fence or self._tail:
            if self._fence:
                result += self._finished_code(final)
                if self._fence:
                    break
                continue
            text = self._tail if final else self._tail[: self._tail.rfind("\n") + 1]  # a cut line may become any block
            blocks, lines = parse(text), text.split("\n")
            if not blocks:
                self._gap |= "\n" in text
                self._tail = self._tail[len(text) :]
                break
            fence = next((i for i, block in enumerate(blocks) if block.type == "fence"), None)
            whole = blocks[:fence] if fence is not None else blocks if final else blocks[:-1]
            for block in whole:
                result += self._spaced(block, lines)
                self._number = None
            if fence is not None:
                result += self._open(blocks[fence], lines)
                continue
            if final:
                self._tail = ""
                break
            result += self._first_items(blocks[-1], lines)
            break
        return result

    def _spaced(self, block, lines: list[str]) -> list[Text]:
        """A block, and the blank line before it."""
        space = self._space(block, lines)
        self._begun, self._gap = True, False
        return space + self._renderer.block(block, lines, self._columns, self._number)

    def _space(self, block, lines: list[str]) -> list[Text]:
        blank = self._gap or block.type == "heading" or blank_before(block, lines)
        return [Text()] if self._begun and blank else []

    def _open(self, block, lines: list[str]) -> list[Text]:
        """Print the line that begins a block of code; what follows is printed line by line."""
        space = self._space(block, lines)
        self._cut(lines, block.map[0] + 1)
        self._begun, self._gap = True, False
        found = _FENCE.match(lines[block.map[0]])
        self._fence = Fence(len(found[1]), found[2], block.info)
        return [*space, self._renderer.fence(block.info)]

    def _finished_code(self, final: bool) -> list[Text]:
        *whole, rest = self._tail.split("\n")
        if final and rest:
            whole, rest = [*whole, rest], ""
        fence, new, closed = self._fence, 0, False
        while whole and not closed:
            line = whole.pop(0)
            closed = fence.closed_by(line)
            if not closed:
                fence.lines.append(fence.inner(line))
                new += 1
        self._tail = "\n".join([*whole, rest])
        result = self._renderer.code(fence.lines, fence.info, new) if new else []
        del fence.lines[: -HIGHLIGHTED[0]]
        if closed or final:
            self._fence = None
            result.append(self._renderer.fence(""))
        return result

    def _first_items(self, block, lines: list[str]) -> list[Text]:
        """The finished items of an unfinished list: all but the last. Leaves the tail at the block, or at its last item."""
        result, items = [], list(block.children) if block.type in ("bullet_list", "ordered_list") else []
        self._gap |= blank_before(block, lines)
        first = block.map[0]
        if len(items) > 1:
            number = int(block.attrs.get("start", 1)) if self._number is None else self._number
            block.children = items[:-1]
            result = self._spaced(block, lines)
            self._gap, first = blank_before(items[-1], lines), items[-1].map[0]
            self._number = number + len(items) - 1 if block.type == "ordered_list" else None
        self._cut(lines, first)
        return result

    def _cut(self, lines: list[str], first: int) -> None:
        self._tail = self._tail[sum(len(line) + 1 for line in lines[:first]) :]

    def _under_way(self) -> list[Text]:
        """The lines of the tail, as if the answer ended here."""
        if self._fence:
            return self._renderer.code([*self._fence.lines, self._fence.inner(self._tail)], self._fence.info, 1)
        result: list[Text] = []
        lines = self._tail.split("\n")
        for i, block in enumerate(parse(self._tail)):
            blank = self._begun and self._gap if i == 0 else blank_before(block, lines)
            result += [Text()] if blank or (block.type == "heading" and (self._begun or result)) else []
            result += self._renderer.block(block, lines, self._columns, self._number if i == 0 else None)
        return result

    def _rows(self, lines: list[Text]) -> list[str]:
        """Lines cut into rows that no terminal wraps, whatever width it gives to an emoji."""
        rows = []
        for line in lines:
            cuts, used = [], 0
            for i, c in enumerate(line.plain):
                size = 1 if c == "\ufe0f" else max(0, wcwidth(c))  # this one may make the character before it wide
                if used + size > self._columns and used:
                    cuts, used = [*cuts, i], 0
                used += size
            rows += [self._renderer.ansi(part) for part in (line.divide(cuts) if cuts else [line])]
        return rows

    def _replace(self, rows: list[str]) -> None:
        """Write `rows` over those shown; equal rows are not written."""
        shown = self._shown
        same = next(
            (i for i, (old, new) in enumerate(zip(shown, rows, strict=False)) if old != new), min(len(shown), len(rows))
        )
        if same == len(shown):
            text = "\r\n".join(["", *rows[same:]] if shown else rows)
        elif same == len(shown) - 1 and rows[same].startswith(shown[same]):
            text = "\r\n".join([rows[same][len(shown[same]) :], *rows[same + 1 :]])
        else:
            up = len(shown) - 1 - same
            text = "\r" + (f"\x1b[{up}A" if up else "") + "\x1b[J" + "\r\n".join(rows[same:])
            text = f"{SYNC[0]}{text}{SYNC[1]}"
        if text:
            self._write(text)
