"""Draw docs/pictures/chat.svg: a real chat with the small model, typed on a pseudo-terminal. `python tests/draw_chat.py`."""

import io
import itertools
import re
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text
from terminal import Terminal

OUT = Path(__file__).parents[1] / "docs" / "pictures" / "chat.svg"
PASTE = "\x1b[200~" + "\n".join(f"Line {n} of a long file." for n in range(1, 61)) + "\x1b[201~"
TURNS = "What is the capital of France?", "And of Italy?", PASTE + " Hello!", "/undo", "/search capital"


def styled(screen):
    """The screen as rich's text, a line a row; cells of one style are one piece."""
    rows = []
    for y in range(screen.lines):
        cells = [screen.buffer[y][x] for x in range(screen.columns)]
        row = Text()
        for style, group in itertools.groupby(cells, look):
            row.append("".join(cell.data for cell in group), style)
        row.rstrip()
        rows.append(row)
    return rows


def look(cell):
    colour = {"default": "", "brown": "yellow", "brightblack": "bright_black"}.get(cell.fg, cell.fg)
    colour = f"#{colour}" if re.fullmatch("[0-9a-f]{6}", colour) else colour
    return " ".join(word for word in ("bold" * cell.bold, "italic" * cell.italics, "reverse" * cell.reverse, colour) if word)


def main():
    with tempfile.TemporaryDirectory() as state:
        command = [sys.executable, "-m", "llamacli", "chat", "-m", "scout-tiny", "--temp", "0", "-n", "40"]
        t = Terminal(command, 80, 24, XDG_STATE_HOME=state)
        t.wait("ctx 0 of", seconds=120)
        for typed in TURNS:
            t.type(typed)
            t.pump(1)
            t.type("\r")
            t.pump(3)
        t.type("/re")
        t.pump(2)
        console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True)
        console.print(Text("\n").join(styled(t.screen)), soft_wrap=True)
        OUT.parent.mkdir(exist_ok=True)
        console.save_svg(str(OUT), title="llamacli chat")
        t.child.close(force=True)


main()
