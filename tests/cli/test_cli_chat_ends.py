"""Ends of a chat: after a kill, a hang-up or /exit the terminal is restored, and no finished turn is lost."""

import os
import random
import re
import signal
import sqlite3
import subprocess

import pytest
from chatting import READY, TITLE, asked, conversation, kept
from fakes import fake
from terminal import Terminal


@pytest.mark.parametrize("end", ["Ctrl-D", "SIGTERM at the prompt", "SIGTERM during an answer"])
def test_the_terminal_is_restored(tmp_path, end):
    command = " ".join(f"'{word}'" for word in fake("chat", "--no-save", reply="many words", delay="0.3"))
    t = Terminal(["bash", "-c", f"set -m; {command}; echo status=$?; stty -a"])
    t.wait(READY)
    if end == "Ctrl-D":
        t.type("\x04")
    else:
        if "answer" in end:
            t.type("hello\r")
            t.wait("m")
            t.pump(0.5)
        process = int(subprocess.run(["pgrep", "-P", str(t.process.pid)], capture_output=True, text=True).stdout)
        os.kill(process, signal.SIGTERM)
    t.wait("status=0" if end == "Ctrl-D" else "status=143")
    t.wait("icanon")
    assert re.search(r"(?<!-)icanon", t.text)
    assert re.search(r"(?<!-)\becho\b", t.text)
    assert re.search(r"(?<!-)icrnl", t.text)
    assert t.raw.rindex("\x1b[?2004l") > t.raw.rindex("\x1b[?2004h")


def test_a_chat_whose_terminal_is_gone_ends():
    t = Terminal(["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *fake("chat", "--no-save")])
    t.wait(READY)
    t.hang_up()
    t.process.wait(300)


def test_a_conversation_goes_on_the_next_day(begin, tmp_path):
    t = begin("-s", "be kind")
    asked(t, "one\x1b\rmore")
    t.type("/save Monday\r", "\x04")
    t.ends()
    for args in (("--continue",), ("--resume", "Monday")):
        t = begin(*args, ready="so far")
        t.wait("fine", TITLE)
        assert "> one\n  more" in t.text or "> again" in t.text
        asked(t, "again", 2)
        t.type("\x04")
        t.ends()
    kept(tmp_path, "be kind", "one\nmore", "fine", "again", "fine", "again", "fine")


def test_a_killed_chat_keeps_what_was_said(begin, tmp_path):
    t = begin(reply="First sentence. Second sentence. Third" + "d" * 2000, delay="0.02")  # not over before it is killed
    t.type("tell\r")
    t.wait("Second sentence. T")
    t.close()
    kept(tmp_path, "tell", "First sentence. Second sentence.")
    t = begin("--continue", ready="the answer broke off")


def test_a_state_that_cannot_be_written_does_not_stop_the_chat(begin, tmp_path):
    (tmp_path / "llamacli").write_text("in the way")
    t = begin(ready="will not be kept")
    asked(t, "x")
    t.type("/list\r")
    t.wait("nothing is kept here")


@pytest.mark.slow
def test_fifty_kills_of_a_chat_lose_no_finished_turn(begin, tmp_path):
    """Each chat goes on where the one before was killed, at a random moment of a question or an answer."""
    chance, path, seen = random.Random(50), tmp_path / "llamacli" / "conversations.db", []
    reply = "The first sentence. A second one. And a third."
    for n in range(50):
        t = begin("-c", "64K", *["--continue"] * bool(n), reply=reply, delay="0.0005", ready=None)
        t.wait(f"> {TITLE}")
        for turn in range(chance.randint(0, 2)):
            before = t.text.count(reply)
            t.type(f"question {n}.{turn}\r")
            t.wait(reply, times=before + 1)
            t.wait(f"> {TITLE}")
            seen.append(f"question {n}.{turn}")
        t.type(f"question {n}.9\r")
        t.pump(chance.uniform(0, 0.15))
        t.close()
        db = sqlite3.connect(path)
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        db.close()
        found = conversation(tmp_path)
        questions = [text for text in found if text.startswith("question")]
        assert len(questions) == len(set(questions))
        for question in seen:
            assert found.count(question) == 1
            assert found[found.index(question) + 1] == reply
    assert len(seen) > 30
