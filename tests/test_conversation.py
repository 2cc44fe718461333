"""Persistent conversations: branches, a kill at any moment, two processes at once, search, and a store that fails."""

import functools
import itertools
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap

import pytest

from llamacli.conversation import Conversation, as_jsonl, as_markdown, from_jsonl
from llamacli.errors import LlamacliError, PromptError, UsageError
from llamacli.store import Store


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "conversations.db"


@pytest.fixture
def store(path):
    return Store(path)


def said(conversation):
    return [m.content for m in conversation.messages]


def turn(conversation, question, answer, reason="stop"):
    conversation.ask(question)
    growing = conversation.answer()
    for word in answer.split(" "):
        growing.add(word if word == answer.split(" ")[0] else " " + word)
    growing.close(reason)


def again(path):
    """The conversation as another process reads it."""
    store = Store(path)
    return Conversation.resume(store, store.latest())


def test_a_conversation_is_found_as_it_was_left(path, store):
    c = Conversation(store, "/models/a.gguf", "be kind")
    turn(c, "one", "a first answer")
    turn(c, "two", "a second")
    c.system = "be short"
    c.rename("counting")
    found = again(path)
    assert said(found) == ["one", "a first answer", "two", "a second"]
    assert (found.model, found.system, found.title, found.id) == ("/models/a.gguf", "be short", "counting", c.id)
    assert found.prompt()[0] == {"role": "system", "content": "be short"}
    turn(found, "three", "a third")
    assert said(again(path)) == [*said(c), "three", "a third"]


def test_nothing_is_written_before_the_first_question(store):
    c = Conversation(store, "m", "system")
    c.system = "another"
    assert store.chats() == []


def test_only_the_owner_may_read_the_files(path, store):
    turn(Conversation(store), "one", "two")
    assert {f.name: f.stat().st_mode & 0o777 for f in path.parent.iterdir()} == {
        "conversations.db": 0o600,
        "conversations.db-wal": 0o600,
        "conversations.db-shm": 0o600,
    }
    assert path.parent.stat().st_mode & 0o777 == 0o700
    os.chmod(path, 0o644)
    Store(path)
    assert path.stat().st_mode & 0o777 == 0o600


def test_undo_forgets_but_deletes_nothing(path, store):
    c = Conversation(store)
    for n in "abc":
        turn(c, f"question {n}", f"answer {n}")
    assert c.undo(2) == ["question c", "question b"]
    turn(c, "question d", "answer d")
    assert said(c) == said(again(path)) == ["question a", "answer a", "question d", "answer d"]
    assert [hit.snippet for hit in store.search("answer c")] == ["answer c"]
    assert c.undo(9) == ["question d", "question a"]
    assert c.undo() == []


def test_a_new_answer_stands_beside_the_old_one(path, store):
    c = Conversation(store)
    turn(c, "one", "old")
    put_back = c.retract()
    growing = c.answer()
    growing.add("half of a new")
    put_back()
    assert said(c) == said(again(path)) == ["one", "old"]
    c.retract()
    growing = c.answer()
    growing.add("new")
    growing.close("stop")
    assert said(c) == said(again(path)) == ["one", "new"]
    assert len(store.search("old")) == 1


def test_an_unanswered_question_waits_and_gives_way_to_the_next(path, store):
    c = Conversation(store)
    turn(c, "one", "1")
    c.ask("two")
    assert said(again(path)) == ["one", "1", "two"]
    assert c.retract()() is None
    assert said(c) == ["one", "1", "two"]
    c.ask("three")
    assert said(c) == said(again(path)) == ["one", "1", "three"]


def test_dropped_turns_are_not_sent_but_stay(path, store):
    c = Conversation(store, system="s")
    for n in "abc":
        turn(c, n, n.upper())
    assert c.drop() == 1
    assert [m["content"] for m in again(path).prompt()] == ["s", "b", "B", "c", "C"]
    assert c.drop(9) == 1
    assert [m["content"] for m in c.prompt()] == ["s", "c", "C"]
    assert c.drop() == 0
    assert said(again(path)) == ["a", "A", "b", "B", "c", "C"]
    c.undo(2)
    assert [m["content"] for m in c.prompt()] == ["s", "a", "A"]


@pytest.mark.parametrize("aside", [lambda c: c.set_aside(), lambda c: c.undo(), lambda c: c.retract(), lambda c: c.ask("x")])
def test_dropped_turns_stay_dropped_when_the_question_after_them_is_replaced(path, store, aside):
    c = Conversation(store)
    turn(c, "one", "1")
    turn(c, "two", "2")
    c.drop()
    aside(c)
    turn(c, "three", "3")
    assert [m["content"] for m in c.prompt()][-2:] == ["three", "3"]
    assert "one" not in [m["content"] for m in c.prompt()]
    assert again(path).prompt() == c.prompt()


def test_clear_begins_another_conversation(store):
    c = Conversation(store, system="s")
    turn(c, "one", "1")
    c.clear()
    turn(c, "two", "2")
    assert [(chat.question, chat.system) for chat in store.chats()] == [("two", "s"), ("one", "s")]


def test_a_cut_answer_goes_on_in_the_same_message(path, store):
    c = Conversation(store)
    turn(c, "one", "half of", "length")
    growing = c.extend()
    growing.add(" it.")
    growing.close("stop")
    assert said(again(path)) == ["one", "half of it."]
    assert again(path).messages[-1].finish == "stop"


def test_words_are_found_in_any_language_and_by_parts(store):
    c = Conversation(store)
    turn(c, 'What is "chunked" attention? 100% sure', "A chunk of 8192 tokens; 专家模型按需读取 and _more_")
    turn(Conversation(store), "another", "nothing of it")
    for text in ("chunk", "CHUNKED", '"chunked"', "chunk 8192", "专家", "按需读取", "of", "100%", "_m", "attention? sure"):
        assert {hit.chat.id for hit in store.search(text)} >= {c.id}, text
    assert {hit.chat.id for hit in store.search("tokens")} == {c.id}
    assert store.search("chunk elephant") == []
    assert store.search("AND OR NOT *") == []
    with pytest.raises(UsageError):
        store.search(" ")


def test_a_conversation_is_found_by_id_the_beginning_of_it_or_name(store):
    c, d = Conversation(store), Conversation(store)
    turn(c, "one", "1")
    turn(d, "two", "2")
    c.rename("first")
    assert {store.find(word).id for word in ("first", c.id, c.id[:7])} == {c.id}
    d.rename("first")
    with pytest.raises(UsageError, match="found 2"):
        store.find("first")
    for word in ("nope", "%", ""):
        with pytest.raises(UsageError, match="found none"):
            store.find(word)


def test_what_is_deleted_is_gone_from_the_disk(path, store):
    c = Conversation(store)
    turn(c, "my secret question", "a secret answer")
    turn(Conversation(store), "another", "one")
    store.remember("my secret question")
    store.remember("another")
    store.delete(c.id)
    assert store.search("secret") == []
    assert store.typed() == ["another"]
    store.close()
    assert not any(b"secret" in file.read_bytes() for file in path.parent.iterdir())


def test_a_conversation_deleted_elsewhere_is_written_anew(path, store):
    c = Conversation(store, system="s")
    turn(c, "one", "1")
    Store(path).delete(c.id)
    turn(c, "two", "2")
    assert said(again(path)) == ["one", "1", "two", "2"]
    Store(path).delete(c.id)
    growing = c.extend()
    growing.add(" more.")
    growing.close("stop")
    assert said(again(path)) == ["one", "1", "two", "2 more."]
    assert c.trouble is None


def test_two_chats_that_go_on_with_one_conversation_lose_nothing(path):
    """The second one to write is saved as a new conversation: each can be listed, shown and continued."""
    first, second = Store(path), Store(path)
    c = Conversation(first)
    turn(c, "one", "1")
    d = Conversation.resume(second, second.latest())
    turn(c, "two", "2")
    turn(d, "deux", "II")
    turn(c, "three", "3")
    turn(d, "trois", "III")
    assert c.trouble is None
    assert d.id in d.trouble
    assert {chat.id: [m.content for m in first.branch(chat)] for chat in first.chats()} == {
        c.id: ["one", "1", "two", "2", "three", "3"],
        d.id: ["one", "1", "deux", "II", "trois", "III"],
    }


@pytest.mark.parametrize("back", [lambda c: c.undo(), lambda c: c.retract()])
def test_going_back_in_one_chat_loses_no_turn_of_another_that_continued(path, back):
    c = Conversation(Store(path))
    turn(c, "one", "1")
    d = Conversation.resume(Store(path), Store(path).latest())
    turn(c, "two", "2")
    back(d)
    assert d.id != c.id
    (chat,) = [chat for chat in Store(path).chats() if chat.id == c.id]
    assert [m.content for m in Store(path).branch(chat)] == ["one", "1", "two", "2"]


@pytest.mark.parametrize("aside", [lambda c: c.set_aside(), lambda c: c.retract()])
def test_what_is_put_back_after_another_chat_went_on_is_in_the_copy(path, aside):
    """The conversation is saved as another one between the two, which lacks what was taken off."""
    c = Conversation(Store(path))
    turn(c, "one", "1")
    turn(c, "two", "2")
    turn(c, "three", "3")
    c.drop()
    other = Conversation.resume(Store(path), Store(path).latest())
    turn(other, "four", "4")
    put_back = aside(c)
    if not c.unanswered:
        c.ask("three in other words")
    put_back()
    assert said(c) == ["one", "1", "two", "2", "three", "3"]
    kept = Conversation.resume(Store(path), Store(path).find(c.id))
    assert (said(kept), kept.start, c.start) == (said(c), 2, 2)
    turn(c, "five", "5")
    assert said(Conversation.resume(Store(path), Store(path).find(c.id))) == said(c)


def test_turns_that_were_dropped_stay_dropped_in_a_copy(path):
    c = Conversation(Store(path))
    turn(c, "one", "1")
    turn(c, "two", "2")
    c.drop()
    turn(Conversation.resume(Store(path), Store(path).latest()), "three", "3")
    turn(c, "four", "4")
    kept = Conversation.resume(Store(path), Store(path).find(c.id))
    assert [m["content"] for m in kept.prompt()] == [m["content"] for m in c.prompt()] == ["two", "2", "four", "4"]


def test_a_copy_that_an_interrupt_cuts_is_made_whole_with_the_next_message(path, monkeypatch):
    store = Store(path)
    c = Conversation(store)
    turn(c, "one", "1")
    turn(Conversation.resume(Store(path), Store(path).latest()), "two", "2")
    add, calls = store.add, itertools.count()

    def once(*record):
        if next(calls) == 2:  # after the question that was refused, and the first message of the copy
            raise KeyboardInterrupt
        return add(*record)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store, "add", once)
        c.ask("three")
    turn(c, "four", "4")
    assert said(Conversation.resume(Store(path), Store(path).find(c.id))) == said(c) == ["one", "1", "four", "4"]


def test_turns_that_were_dropped_stay_dropped_when_a_question_is_put_back(path, store):
    c = Conversation(store)
    turn(c, "one", "1")
    turn(c, "two", "2")
    c.drop()
    put_back = c.set_aside()
    c.ask("deux")
    put_back()
    assert again(path).prompt() == c.prompt() == [{"role": "user", "content": "two"}, {"role": "assistant", "content": "2"}]


def test_a_question_that_an_interrupt_kept_from_the_disk_is_no_other_chat(path, store, monkeypatch):
    c = Conversation(store)
    turn(c, "one", "1")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store, "add", interrupted)
        c.ask("two")
    turn(c, "three", "3")
    assert (said(again(path)), len(store.chats()), c.trouble) == (["one", "1", "three", "3"], 1, None)


def test_an_interrupt_while_another_process_holds_the_file_leaves_it_usable(path, monkeypatch):
    """SQLite returns from its wait with the transaction begun, and only then is the interrupt raised."""

    class Connection(sqlite3.Connection):
        begun = False

        def execute(self, sql, *values):
            found = super().execute(sql, *values)
            if self.begun and sql.startswith("BEGIN"):
                Connection.begun = False
                raise KeyboardInterrupt
            return found

    monkeypatch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=Connection))
    c = Conversation(Store(path))
    turn(c, "one", "1")
    c.ask("a question that the next one replaces")
    monkeypatch.setattr(Connection, "begun", True)
    with pytest.raises(KeyboardInterrupt):
        c.ask("two")
    turn(Conversation(Store(path)), "another", "chat")
    turn(c, "three", "3")
    assert (said(c), said(again(path)), c.trouble) == (["one", "1", "three", "3"], said(c), None)


def interrupted(*_):
    raise KeyboardInterrupt


def test_a_store_that_fails_does_not_stop_a_conversation(store):
    c = Conversation(store)
    turn(c, "one", "1")
    store.close()
    turn(c, "two", "2")
    assert said(c) == ["one", "1", "two", "2"]
    assert "no longer saved" in c.trouble
    assert not c.kept


@pytest.mark.parametrize("content", [b"not a database, but a text of some length" * 20, b"\0" * 5000])
def test_a_file_that_is_no_database_is_one_line(path, content):
    path.parent.mkdir()
    path.write_bytes(content)
    if content.strip(b"\0"):
        with pytest.raises(LlamacliError, match="expected a database"):
            Store(path)
        assert path.read_bytes() == content


def test_a_newer_version_is_left_alone(path, store):
    store.close()
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 7")
    db.close()
    with pytest.raises(LlamacliError, match="found 7"):
        Store(path)


def test_a_cycle_in_a_damaged_file_does_not_hang(path, store):
    turn(Conversation(store), "one", "1")
    store.close()
    db = sqlite3.connect(path)
    db.execute("UPDATE message SET parent = (SELECT max(id) FROM message) WHERE parent IS NULL")
    db.commit()
    db.close()
    assert said(again(path)) == ["one", "1"]


def test_export_and_import(store):
    c = Conversation(store, "m", "be kind")
    turn(c, "one\ntwo", answer := "é 漢 \x1b a\u2028b\u2029c\x85d\x0be\r\nf")  # ends of lines, to some who read them
    text = as_jsonl(c.system, c.messages)
    assert [json.loads(line)["role"] for line in text.rstrip("\n").split("\n")] == ["system", "user", "assistant"]
    system, messages = from_jsonl(text, "x.jsonl")
    assert (system, [(m.role, m.content) for m in messages]) == ("be kind", [("user", "one\ntwo"), ("assistant", answer)])
    assert as_markdown("name", "m.gguf", None, "be kind", c.messages).startswith(
        "# name\n\nm.gguf\n\n## System\n\nbe kind\n\n## You"
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        '{"role": "user"}',
        '{"role": "tool", "content": "x"}',
        '{"role": "user", "content": 3}',
        "[" * 9999,
        '{"role": "assistant", "content": "x"}',
        '{"role": "user", "content": "x"}\n' * 2,
    ],
)
def test_what_is_no_conversation_is_refused(text):
    with pytest.raises(PromptError):
        from_jsonl(text, "x.jsonl")


TALKER = """
    import sys
    from pathlib import Path
    from llamacli.conversation import Conversation
    from llamacli.store import Store
    store = Store(Path(sys.argv[1]))
    c = Conversation.resume(store, store.latest()) if store.chats() else Conversation(store)
    begin = len(c.messages)
    for n in range(10**6):
        c.ask(f"question {begin + n}?")
        answer = c.answer()
        for word in range(20):
            answer.add(f"word{word} ")
            answer.add("of the answer. " if word % 5 == 4 else "and ")
            if word % 5 == 4:
                print("sentence", begin + n, word // 5, flush=True)
        answer.close("stop")
        print("turn", begin + n, flush=True)
"""


def killed_after(path, lines):
    """Let a process write a conversation and kill it with SIGKILL after this many lines of output; returns the turns that it
    reported as kept, and the last sentence.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(TALKER), str(path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    said = "".join(process.stdout.readline() for _ in range(lines))
    os.killpg(process.pid, signal.SIGKILL)
    lines = [line.split() for line in (said + process.stdout.read()).splitlines(keepends=True) if line.endswith("\n")]
    process.wait()
    return [int(line[1]) for line in lines if line[0] == "turn"], [line[1:] for line in lines if line[0] == "sentence"][-1]


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_loses_the_sentence_under_way_at_most(path, kills):
    chance, kept, whole = (
        random.Random(kills),
        [],
        "".join(f"word{word} " + ("of the answer. " if word % 5 == 4 else "and ") for word in range(20)),
    )
    for _ in range(kills):
        turns, (question, sentence) = killed_after(path, chance.randrange(1, 60))
        kept += turns
        db = sqlite3.connect(path)
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        db.execute("INSERT INTO words (words, rank) VALUES ('integrity-check', 1)")  # the index holds the messages' words
        db.close()
        c = again(path)
        last = said(c)[-1]
        if last.startswith("word"):  # its question was being answered, or was answered
            assert whole.startswith(last)
            if said(c)[-2] == f"question {question}?":
                assert last.count("of the answer.") >= int(sentence) + 1
        questions = [text for text in said(c) if text.startswith("question")]
        assert len(questions) == len(set(questions))
        for n in kept:
            at = said(c).index(f"question {n}?")
            assert said(c)[at + 1] == whole
    assert len(kept) > kills
