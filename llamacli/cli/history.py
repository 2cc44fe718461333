"""`llamacli history`: the conversations that chat keeps: list, search, show, export, delete.

In: an action and its argument. Out: text, JSON or Markdown on stdout.
"""

import json
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from llamacli import environment
from llamacli.cli.console import Console, is_terminal, one_line, visible
from llamacli.cli.grammar import argument, option, refuse
from llamacli.cli.options import Json, Output
from llamacli.errors import UsageError

if TYPE_CHECKING:
    from llamacli.store import Store, StoredChat


class Action(StrEnum):
    """What to do."""

    list = "list"
    search = "search"
    show = "show"
    export = "export"
    delete = "delete"


class Format(StrEnum):
    """How to export."""

    md = "md"
    jsonl = "jsonl"


def history(
    action: Annotated[Action, argument("[list|search|show|export|delete]", "What to do (list).")] = Action.list,
    what: Annotated[list[str] | None, argument("[ID|TEXT]...", "A conversation's id or name; the words to search for.")] = None,
    form: Annotated[
        Format, option("--format", metavar="md|jsonl", help="With export: Markdown (md) or JSON lines.")
    ] = Format.md,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Earlier conversations: list, search TEXT, show ID, export ID, delete ID."""
    from llamacli.store import Store  # late: help needs no database

    console, words = output.console(), what or []
    if (action == Action.list) == bool(words):
        found = repr(" ".join(words)) if words else "nothing"
        raise UsageError(f"history {action}: expected {_EXPECTED[action]}, found {found}")
    if action != Action.export:
        refuse(("form",), f"history export with it, found {action}")
    if action not in (Action.list, Action.search):
        refuse(("as_json",), f"history list or search with it, found {action}; `export --format jsonl` is for programs")
    if not environment.conversations_file().exists():
        if action != Action.list:
            raise UsageError(f"history {action}: expected earlier conversations, found none; `llamacli chat` begins one")
        console.result("[]") if as_json else console.note("no conversations yet; `llamacli chat` begins one")
        return
    store = Store(environment.conversations_file())
    if action == Action.list:
        _list(store.chats(), console, as_json)
    elif action == Action.search:
        _search(store, " ".join(words), console, as_json)
    elif action == Action.delete:
        for chat in [store.find(word) for word in words]:  # all of them are there, or none is deleted
            store.delete(chat.id)
            console.note(f"deleted {chat.id}: {_name(chat)}")
    else:
        _write(store, store.find(" ".join(words)), console, action, form)


_EXPECTED = {
    Action.list: "nothing after it",
    Action.search: "words to search for",
    Action.show: "an id or a name",
    Action.export: "an id or a name",
    Action.delete: "ids or names",
}


def _list(chats: "list[StoredChat]", console: Console, as_json: bool) -> None:
    if as_json:
        keys = ("id", "name", "question", "model", "turns", "created", "changed")
        console.result(json.dumps([{key: getattr(chat, key) for key in keys} for chat in chats], ensure_ascii=False))
    elif chats:
        rows = [(chat.id, _when(chat.changed), str(chat.turns), Path(chat.model).name, _name(chat)) for chat in chats]
        console.table("", rows, ("id", "changed", "turns", "model", "conversation"), numbers=(2,), spare=(3, 1))
    else:
        console.note("no conversations yet; `llamacli chat` begins one")


def _search(store: "Store", text: str, console: Console, as_json: bool) -> None:
    found = store.search(text)
    if as_json:
        hits = [{"id": hit.chat.id, "conversation": _name(hit.chat), "role": hit.role, "text": hit.snippet} for hit in found]
        console.result(json.dumps(hits, ensure_ascii=False))
    elif found:
        rows = [(hit.chat.id, _when(hit.chat.changed), "you" if hit.role == "user" else "model", hit.snippet) for hit in found]
        console.table("", rows, ("id", "changed", "who", "text"), spare=(1, 2))
    else:
        console.note(f"nothing found for {text!r}")


def _write(store: "Store", chat: "StoredChat", console: Console, action: Action, form: Format) -> None:
    """Write the current branch of a conversation, as Markdown or as JSON lines."""
    from llamacli.conversation import as_jsonl, as_markdown

    messages = store.branch(chat)
    if action == Action.export and form == Format.jsonl:
        text = as_jsonl(chat.system, messages)
    else:
        text = as_markdown(_name(chat), Path(chat.model).name, chat.created, chat.system, messages)
    console.piece(visible(text) if is_terminal(sys.stdout) else text)


def _name(chat: "StoredChat") -> str:
    from llamacli.conversation import title

    return one_line(chat.name or title(chat.question) or "(empty)")


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
