"""Helpers for tests of a chat on a pseudo-terminal: ask a question, wait for its answer, read the stored conversation."""

import time

from llamacli.conversation import Conversation
from llamacli.errors import LlamacliError
from llamacli.store import Store

READY = "ctx 0 of"
TITLE = "Ask something, or /help"


def asked(t, question, n=1, answer="fine"):
    """Ask, and wait for the `n`th answer and the next prompt."""
    t.type(question + "\r")
    t.wait(answer, times=n)
    t.wait(TITLE)


def conversation(tmp_path):
    """The messages of the latest conversation in the store."""
    try:
        store = Store(tmp_path / "llamacli" / "conversations.db")
        found = Conversation.resume(store, store.latest())
    except LlamacliError:
        return None
    store.close()
    return [found.system] * bool(found.system) + [message.content for message in found.messages]


def kept(tmp_path, *expected, seconds=300):
    """Wait until the latest conversation has these messages; ... matches any."""
    until = time.monotonic() + seconds
    while (
        (found := conversation(tmp_path)) is None
        or len(found) != len(expected)
        or any(wanted not in (..., message) for wanted, message in zip(expected, found, strict=True))
    ):
        assert time.monotonic() < until, f"expected {expected}, found {found}"
        time.sleep(0.02)
