"""`llamacli cache`: what --cache keeps on disk, shown or removed.

In: an action. Out: a line, or JSON, on stdout.
"""

import json
from enum import StrEnum
from typing import Annotated

from llamacli import environment
from llamacli.cli.console import amount
from llamacli.cli.grammar import argument
from llamacli.cli.options import Json, Output
from llamacli.errors import OutputError


class Action(StrEnum):
    """What to do."""

    show = "show"
    clear = "clear"


def cache(
    action: Annotated[Action, argument("[show|clear]", "What to do (show).")] = Action.show,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """What --cache keeps of prompts on disk: show, clear.

    Examples:
    llamacli run --cache -f book.txt "Who is the narrator?"
    llamacli cache
    llamacli cache clear
    """
    from llamacli.snapshots import clear, held  # late: help needs no engine

    console, folder = output.console(), environment.snapshots_folder()
    try:
        found = clear(folder) if action == Action.clear else held(folder)
    except OSError as error:
        raise OutputError(
            f"{error.filename}: expected a file that can be removed, found: {error.strerror}; check the folder"
        ) from None
    if as_json:
        console.result(json.dumps({"folder": str(folder), "files": found.files, "bytes": found.nbytes}))
    else:
        verb = "removed " if action == Action.clear else ""
        console.result(f"{verb}{amount(found.nbytes)} in {found.files} files, {folder}")
