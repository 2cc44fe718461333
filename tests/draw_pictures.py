"""Draw docs/pictures/*.svg: real sessions with the small model, typed on a pseudo-terminal. `python tests/draw_pictures.py`."""

import io
import itertools
import os
import re
import sys
import tempfile
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text
from terminal import Terminal

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "pictures"
PASTE = "\x1b[200~" + "\n".join(f"Line {n} of a long file." for n in range(1, 61)) + "\x1b[201~"
TURNS = "What is the capital of France?", "And of Italy?", PASTE + " Hello!", "/undo", "/search capital"
LOCAL = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.S)  # no address of a font to fetch


def shell(folder, columns=80, rows=24):
    """A shell that knows `llamacli`; what it keeps lies in `folder`."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    t = Terminal(
        ["bash", "--norc", "-i"],
        columns,
        rows,
        PATH=path,
        PS1="$ ",
        XDG_STATE_HOME=folder,
        BASH_SILENCE_DEPRECATION_WARNING="1",
    )
    t.wait("$ ")
    return t


def chat(folder):
    t = shell(folder)
    t.type("clear; llamacli chat -m scout-tiny --temp 0 -n 40\r")
    t.wait("ctx 0 of", seconds=120)
    for typed in TURNS:
        t.type(typed)
        t.pump(1)
        t.type("\r")
        t.pump(3)
    t.type("/re")
    t.pump(2)
    return t


def run(folder):
    """Two runs, the second while it reads a long prompt."""
    t = shell(folder, rows=10)
    t.type('llamacli run -m scout-tiny --temp 0 "What is the capital of France?"\r')
    t.wait("Paris.", seconds=120)
    t.type("cat docs/usage.md | llamacli run -m scout-tiny --temp 0 -v 'What is this?'\r")
    while not re.search(r" [4-7]\d %", t.text):
        assert t.pump(0.1), t.text
    return t


def help_(folder):
    t = shell(folder, 90, 36)
    t.type("clear; llamacli run --help | head -n 34\r")
    t.wait("Sampling:")
    t.pump(1)
    return t


def history(folder):
    """The conversation of `chat` and another one, listed, searched and shown."""
    t = shell(folder, rows=20)
    t.type('llamacli chat -m scout-tiny --temp 0 -n 40 "What do elephants eat?"\r')
    t.wait("Ask something", seconds=120)
    t.type("/save animals\r")
    t.wait("is called")
    t.type("\x04")
    t.wait("$ ", times=2)
    t.type("clear; llamacli history\r")
    t.pump(2)
    t.type("llamacli history search capital\r")
    t.pump(2)
    t.type("llamacli history show animals\r")
    t.pump(2)
    return t


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
    while rows and not rows[-1]:
        rows.pop()
    return rows


def look(cell):
    colour = {"default": "", "brown": "yellow", "brightblack": "bright_black"}.get(cell.fg, cell.fg)
    colour = f"#{colour}" if re.fullmatch("[0-9a-f]{6}", colour) else colour
    return " ".join(word for word in ("bold" * cell.bold, "italic" * cell.italics, "reverse" * cell.reverse, colour) if word)


def main():
    os.chdir(ROOT)
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for draw in (chat, run, help_, history):
            name = draw.__name__.rstrip("_")
            t = draw(folder)
            console = Console(record=True, width=t.screen.columns, file=io.StringIO(), force_terminal=True)
            console.print(Text("\n").join(styled(t.screen)), soft_wrap=True)
            title = {"help": "llamacli run --help", "run": "llamacli run"}.get(name, f"llamacli {name}")
            console.save_svg(str(OUT / f"{name}.svg"), title=title, code_format=LOCAL)
            t.close()


main()
