"""`llamacli chat`: the conversation, typed at a terminal or piped in as turns.

In: turns. Out: answers on stdout, everything else on stderr. At a terminal the prompt is an editor, answers are rendered as
Markdown and the conversation is kept; in a pipe, or where TERM is dumb, turns are lines and answers plain text.

    loop.py       turn after turn                      talk.py        the conversation with a model
    prompt.py     the editor (prompt_toolkit)          lines.py       plain lines instead
    commands.py   /help and the others                 show.py        answers on the screen
    live.py       Markdown as it streams               markdown.py    Markdown to lines
    terminal.py   echo, suspending, the clipboard
"""

from pathlib import Path
from typing import Annotated

from llamacli.cli.grammar import argument, option
from llamacli.cli.options import Generation, Output
from llamacli.cli.tooling import Tooling


def chat(
    question: Annotated[
        list[str] | None, argument("[QUESTION]...", "The first question; words are joined by spaces.", empty=True)
    ] = None,
    file: Annotated[
        list[Path] | None, option("-f", "--file", metavar="FILE", help="Text before the first question; repeatable.")
    ] = None,
    go_on: Annotated[bool, option("--continue", help="Continue the latest conversation.")] = False,
    resume: Annotated[
        str | None, option("--resume", metavar="ID|NAME", help="Continue this conversation; see llamacli history.")
    ] = None,
    no_save: Annotated[bool, option("--no-save", help="Keep neither the conversation nor what is typed.")] = False,
    plain: Annotated[bool, option("--plain", help="Show Markdown as it is written.")] = False,
    tooling: Tooling = None,
    options: Generation = None,
    output: Output = None,
) -> None:
    """Talk with the model; /help inside lists the commands."""
    from llamacli.cli.chat.loop import talk_at_length  # late: help needs neither the editor nor the database

    talk_at_length(options, tooling, output.console(), " ".join(question or ()), file or [], go_on, resume, no_save, plain)
