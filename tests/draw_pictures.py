"""Draw docs/pictures/*.svg: sessions with the small model on a pseudo-terminal. `python tests/draw_pictures.py [NAME]...`."""

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
LOCAL = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.S)  # without the address of a font


def shell(folder, columns=80, rows=24):
    """A shell with the command `llamacli`, whose state is in `folder`."""
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
    t.wait("$")
    return t


def chat(folder):
    t = shell(folder, rows=27)
    t.type("llamacli chat -m scout-tiny --temp 0 -n 40\r")
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
    t.wait("Paris.\n$", seconds=120)
    t.type("cat docs/*.md | llamacli run -m scout-tiny -c 128K --temp 0 'What is this?'\r")
    while not re.search(r" [3-6]\d % .*left", t.text):
        assert t.pump(0.1), t.text
    return t


def help_(folder):
    t = shell(folder, 80, 44)
    t.type("llamacli run --help | head -n 42\r")
    t.wait("--memory")
    t.pump(1)
    return t


def history(folder):
    """Two conversations, listed, searched and shown."""
    t = shell(folder, rows=28)
    for n, (question, name) in enumerate(
        (("What is the capital of France?", "travels"), ("What do elephants eat?", "animals")), 1
    ):
        t.type(f'llamacli chat -m scout-tiny --temp 0 -n 40 "{question}"\r')
        t.wait("Ask something", times=1, seconds=120)
        t.type(f"/save {name}\r")
        t.wait("is called", times=n)
        t.type("\x04")
        t.wait("\n$", times=n)
    t.type("\x0c")
    t.pump(0.5)
    for command in ("llamacli history", "llamacli history search capital", "llamacli history show animals"):
        t.type(command + "\r")
        t.pump(3)
    return t


def styled(screen):
    """The screen as rich's text, a line a row; cells of one style are one piece."""
    rows = []
    for y in range(screen.lines):
        cells = [screen.buffer[y][x] for x in range(screen.columns)]
        row = Text()
        for style, group in itertools.groupby(cells, look):
            text = "".join(cell.data for cell in group)
            row.append(" " * (len(text) - len(text.lstrip())), f"conceal {style}")  # apart, or some viewers drop it
            row.append(text.lstrip(), style)
        row.rstrip()
        rows.append(row)
    while rows and not rows[-1]:
        rows.pop()
    return rows


def look(cell):
    """A cell's style as rich writes it."""
    ground = f"on {colour}" if (colour := named(cell.bg)) else ""
    words = ("bold" * cell.bold, "italic" * cell.italics, "reverse" * cell.reverse, named(cell.fg), ground)
    return " ".join(word for word in words if word)


def named(colour):
    colour = {"default": "", "brown": "yellow", "brightblack": "bright_black"}.get(colour, colour)
    return f"#{colour}" if re.fullmatch("[0-9a-f]{6}", colour) else colour


def main():
    os.chdir(ROOT)
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for draw in (chat, run, help_, history):
            name = draw.__name__.rstrip("_")
            if sys.argv[1:] and name not in sys.argv[1:]:
                continue
            t = draw(folder)
            console = Console(record=True, width=t.screen.columns, file=io.StringIO(), force_terminal=True)
            console.print(Text("\n").join(styled(t.screen)), soft_wrap=True)
            title = {"help": "llamacli run --help", "run": "llamacli run"}.get(name, f"llamacli {name}")
            console.save_svg(str(OUT / f"{name}.svg"), title=title, code_format=LOCAL)
            t.close()


main()
