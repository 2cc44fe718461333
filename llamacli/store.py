"""The database of conversations: SQLite in WAL mode, full-text search, one file that only its owner may read.

In: messages, ids, words to search for. Out: records. Any number of processes may use one file: every change is one transaction,
and a process killed at any moment leaves the database as it was before or after it. Deleted text is overwritten with zeros.

Schema, `PRAGMA user_version` 1:
    chat     id, name, model, system, created, changed; head: the last message of the current branch; first: of those sent
    message  id, chat, parent, role, content, finish (NULL: the answer broke off), created
    words    FTS5 over message.content, trigrams, so that any part of a word and text without spaces are found
    typed    lines typed at the prompt, for its history
"""

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from llamacli.errors import LlamacliError, UsageError

VERSION = 1
BUSY = 5.0  # seconds that a process waits for another's transaction
TYPED = 1000  # entries of the prompt's history that are kept
SNIPPET = 30  # characters before and after what was found

SCHEMA = """
CREATE TABLE chat (id TEXT PRIMARY KEY, name TEXT, model TEXT NOT NULL, system TEXT NOT NULL, created REAL NOT NULL,
    changed REAL NOT NULL, head INTEGER, first INTEGER);
CREATE TABLE message (id INTEGER PRIMARY KEY AUTOINCREMENT, chat TEXT NOT NULL REFERENCES chat ON DELETE CASCADE,
    parent INTEGER, role TEXT NOT NULL, content TEXT NOT NULL, finish TEXT, created REAL NOT NULL);
CREATE INDEX message_chat ON message (chat);
CREATE TABLE typed (id INTEGER PRIMARY KEY AUTOINCREMENT, text TEXT NOT NULL);
CREATE VIRTUAL TABLE words USING fts5 (content, content='message', content_rowid='id', tokenize='trigram');
CREATE TRIGGER message_added AFTER INSERT ON message BEGIN
    INSERT INTO words (rowid, content) VALUES (new.id, new.content);
END;
CREATE TRIGGER message_removed AFTER DELETE ON message BEGIN
    INSERT INTO words (words, rowid, content) VALUES ('delete', old.id, old.content);
END;
CREATE TRIGGER message_changed AFTER UPDATE OF content ON message BEGIN
    INSERT INTO words (words, rowid, content) VALUES ('delete', old.id, old.content);
    INSERT INTO words (rowid, content) VALUES (new.id, new.content);
END;
"""


class StoredChat(NamedTuple):
    """A conversation. `turns`: questions on all its branches; `question`: the first one."""

    id: str
    name: str | None
    model: str
    system: str
    created: float
    changed: float
    head: int | None
    first: int | None
    turns: int
    question: str


class StoredMessage(NamedTuple):
    """A message. `finish` None: the answer broke off."""

    id: int
    role: str
    content: str
    finish: str | None
    created: float


class HeadMovedError(LookupError):
    """Another process changed the conversation: its head is not the message that this process wrote last."""


class Found(NamedTuple):
    """A message that holds the words searched for, and the text around the first of them."""

    chat: StoredChat
    role: str
    snippet: str


_CHATS = """SELECT c.id, c.name, c.model, c.system, c.created, c.changed, c.head, c.first,
    (SELECT count(*) FROM message m WHERE m.chat = c.id AND m.role = 'user'),
    coalesce((SELECT content FROM message m WHERE m.chat = c.id ORDER BY m.id LIMIT 1), '') FROM chat c"""


class Store:
    """The open database at `path`; made where it is absent. LlamacliError if it cannot be used."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._db = _open(path)
        except (sqlite3.Error, OSError) as error:
            raise LlamacliError(
                f"{path}: expected a database of conversations, found: {error}; make it writable or move it away"
            ) from None
        found = self._db.execute("PRAGMA user_version").fetchone()[0]
        if found != VERSION:
            raise LlamacliError(
                f"{path}: expected a database of version {VERSION}, found {found}; use a newer llamacli or move it away"
            )

    def close(self) -> None:
        self._db.close()

    def create(self, model: str, system: str, name: str | None = None) -> str:
        """A new, empty conversation; returns its id."""
        chat, now = os.urandom(4).hex(), time.time()
        self._db.execute(
            "INSERT INTO chat (id, name, model, system, created, changed) VALUES (?, ?, ?, ?, ?, ?)",
            (chat, name, model, system, now, now),
        )
        return chat

    def add(self, chat: str, head: int | None, parent: int | None, role: str, content: str, finish: str | None = None) -> int:
        """Append a message after `parent` and make it the head instead of `head`. sqlite3.IntegrityError if the conversation
        was deleted, HeadMovedError if the head is another; nothing is added then.
        """
        now = time.time()
        with self._transaction():
            message = self._db.execute(
                "INSERT INTO message (chat, parent, role, content, finish, created) VALUES (?, ?, ?, ?, ?, ?)",
                (chat, parent, role, content, finish, now),
            ).lastrowid
            self._move(chat, head, message)
        return message

    def move(self, chat: str, head: int | None, to: int | None) -> None:
        """Make `to` the head instead of `head`. HeadMovedError if the head is another, LookupError if the chat was deleted."""
        with self._transaction():
            if not self._db.execute("SELECT 1 FROM chat WHERE id = ?", (chat,)).fetchone():
                raise LookupError(chat)
            self._move(chat, head, to)

    def _move(self, chat: str, head: int | None, to: int | None) -> None:
        moved = self._db.execute(
            "UPDATE chat SET head = ?, changed = ? WHERE id = ? AND head IS ?", (to, time.time(), chat, head)
        )
        if not moved.rowcount:
            raise HeadMovedError(chat)

    def rewrite(self, message: int, content: str, finish: str | None) -> None:
        """Replace a message's text. LookupError if it was deleted."""
        found = self._db.execute("UPDATE message SET content = ?, finish = ? WHERE id = ?", (content, finish, message))
        if not found.rowcount:
            raise LookupError(message)

    def update(self, chat: str, **fields) -> None:
        """Change fields of a conversation. LookupError if it was deleted."""
        names = ", ".join(f"{name} = ?" for name in fields)
        found = self._db.execute(f"UPDATE chat SET {names}, changed = ? WHERE id = ?", (*fields.values(), time.time(), chat))
        if not found.rowcount:
            raise LookupError(chat)

    def branch(self, chat: StoredChat) -> list[StoredMessage]:
        """The messages from the first one to the head."""
        rows = self._db.execute(
            "SELECT id, role, content, finish, created, parent FROM message WHERE chat = ?", (chat.id,)
        ).fetchall()
        found, branch, at = {row[0]: row for row in rows}, [], chat.head
        while at in found:
            *message, at = found.pop(at)  # pop: a damaged file may contain a cycle
            branch.append(StoredMessage(*message))
        return branch[::-1]

    def chats(self, limit: int = -1) -> list[StoredChat]:
        """Conversations, the latest first."""
        return [StoredChat(*row) for row in self._db.execute(f"{_CHATS} ORDER BY c.changed DESC LIMIT ?", (limit,))]

    def find(self, word: str) -> StoredChat:
        """The conversation with this id, this beginning of an id, or this name. UsageError if there is none or several."""
        named = [StoredChat(*r) for r in self._db.execute(f"{_CHATS} WHERE c.id = ?1 OR c.name = ?1", (word,))]
        begun = named or [c for c in self.chats() if word and c.id.startswith(word)]
        if not begun:
            raise UsageError(
                f"{word}: expected the id or the name of a conversation, found none; `llamacli history` lists them"
            )
        if len(begun) > 1:
            ids = ", ".join(c.id for c in begun[:4])
            raise UsageError(f"{word}: expected one conversation, found {len(begun)}; say which by its id: {ids}")
        return begun[0]

    def latest(self) -> StoredChat:
        """The conversation changed last. UsageError if there is none."""
        if not (found := self.chats(1)):
            raise UsageError("expected an earlier conversation, found none; `llamacli chat` begins one")
        return found[0]

    def search(self, text: str, limit: int = 50) -> list[Found]:
        """Messages of all branches that hold every word of `text`, the latest first."""
        words = text.split()
        if not words:
            raise UsageError("expected words to search for, found none")
        long = [word for word in words if len(word) >= 3]  # a trigram index cannot find shorter words
        where = ["id IN (SELECT rowid FROM words WHERE words MATCH ?)"] if long else []
        where += [r"content LIKE ? ESCAPE '\'"] * (len(words) - len(long))
        values = [" ".join('"' + word.replace('"', '""') + '"' for word in long)] if long else []
        values += [f"%{_escaped(word)}%" for word in words if len(word) < 3]
        rows = self._db.execute(
            f"SELECT chat, role, content FROM message WHERE {' AND '.join(where)} ORDER BY id DESC LIMIT ?", (*values, limit)
        ).fetchall()
        chats = {chat.id: chat for chat in self.chats()} if rows else {}
        return [Found(chats[chat], role, _around(content, words[0])) for chat, role, content in rows if chat in chats]

    def delete(self, chat: str) -> None:
        """Remove a conversation, and what was typed in it from the prompt's history."""
        with self._transaction():
            self._db.execute("DELETE FROM typed WHERE text IN (SELECT content FROM message WHERE chat = ?)", (chat,))
            self._db.execute("DELETE FROM chat WHERE id = ?", (chat,))
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # the write-ahead log also contains the text

    def remember(self, text: str) -> None:
        """Append to the prompt's history."""
        with self._transaction():
            self._db.execute("INSERT INTO typed (text) VALUES (?)", (text,))
            self._db.execute("DELETE FROM typed WHERE id <= (SELECT max(id) FROM typed) - ?", (TYPED,))

    def typed(self) -> list[str]:
        """The prompt's history, the latest first."""
        return [row[0] for row in self._db.execute("SELECT text FROM typed ORDER BY id DESC")]

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
        except BaseException:
            if self._db.in_transaction:  # an interrupt may come between the begin of one and the next line
                self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


def _open(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))  # SQLite gives its -wal and -shm the same mode
    if path.stat().st_mode & 0o077:
        path.chmod(0o600)
    db = sqlite3.connect(path, timeout=BUSY, isolation_level=None)
    db.execute("PRAGMA foreign_keys = ON")
    db.execute("PRAGMA secure_delete = ON")
    db.execute("PRAGMA synchronous = NORMAL")  # survives a killed process; a power cut may cost the last sentences
    _patiently(lambda: db.execute("PRAGMA journal_mode = WAL"))  # a file system without shared memory keeps its own mode
    if db.execute("PRAGMA user_version").fetchone()[0] == 0:
        db.execute("BEGIN IMMEDIATE")
        if db.execute("PRAGMA user_version").fetchone()[0] == 0:  # unless another process was first
            for statement in _statements(SCHEMA):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {VERSION}")
        db.execute("COMMIT")
    return db


def _patiently(change) -> None:
    """Repeat `change` while another process holds the file: changing the mode of the journal does not wait by itself."""
    until = time.monotonic() + BUSY
    while True:
        try:
            change()
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.02)


def _statements(script: str) -> Iterator[str]:
    statement = ""
    for line in script.strip().splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _escaped(word: str) -> str:
    return "".join("\\" + c if c in "\\%_" else c for c in word)


def _around(content: str, word: str) -> str:
    """The text around the first occurrence of `word`, on one line."""
    at = max(0, content.lower().find(word.lower()))
    begin, end = max(0, at - SNIPPET), at + len(word) + SNIPPET
    text = " ".join(content[begin:end].split())
    return ("…" if begin else "") + text + ("…" if end < len(content) else "")
