"""`chat` on a real pseudo-terminal with a screen, with the miniature model of fakes.py; and in a pipe."""

import fcntl
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
from chatting import READY, TITLE, asked, conversation, kept
from fakes import fake, sleeps
from terminal import Terminal

from llamacli.store import Store


def piped(text, *args, **how):
    done = subprocess.run(fake("chat", *args, **how), input=text.encode(), capture_output=True, timeout=300)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


# in a pipe


def test_piped_lines_are_turns_and_the_answers_alone_are_on_stdout():
    assert piped("one\n\ntwo\n", reply="**fine**") == (0, "**fine**\n**fine**\n", "")


def test_commands_work_in_a_pipe_and_speak_on_stderr():
    code, out, err = piped("hi\n/regen\n/stats\n/system be kind\n/system\n/set temp 0.2\n/show\n/exit\nnever\n", reply="fine")
    assert (code, out) == (0, "fine\nfine\n")
    for words in ("context         ", "be kind", "temp            0.2"):
        assert words in err


def test_what_is_wrong_in_a_pipe_ends_it_with_a_code_of_its_own():
    code, out, err = piped("hi\n/nonsense\nhi\n", reply="fine")
    assert (code, out, err) == (2, "fine\n", "llamacli: error: unknown command /nonsense; /help lists them\n")


def test_blocks_in_three_quotes_are_one_turn_also_of_a_command():
    code, out, err = piped('"""\nline one\nline two\n"""\n/system """be\nkind"""\n/system\n', reply="fine")
    assert (code, out, err) == (0, "fine\n", "be\nkind\n")


def test_a_pipe_keeps_its_backslashes_and_loses_its_mark_of_utf8():
    code, out, err = piped("\ufeffends in \\\n/exit\n", reply="fine")
    assert (code, out, err) == (0, "fine\n", "")


def drained(pipe):
    """Wait until somebody has read what was written."""
    while struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0]:
        time.sleep(0.005)


def test_a_pipe_that_does_not_wait_is_read_to_its_end():
    read, write = os.pipe()
    os.set_blocking(read, False)
    chat = subprocess.Popen(fake("chat", reply="fine"), stdin=read, stdout=subprocess.PIPE)
    os.write(write, b"first\n")
    assert chat.stdout.readline() == b"fine\n"
    for part in (b"sec", b"ond\n", b"third"):
        sleeps(chat)  # it has read all that there is, and was told to try again
        os.write(write, part)
        drained(read)
    os.close(read)
    sleeps(chat)
    os.close(write)
    assert chat.communicate(timeout=300) == (b"fine\nfine\n", None)
    assert chat.returncode == 0


def test_a_piped_chat_is_not_kept_unless_it_goes_on_with_one_that_is(begin, tmp_path):
    t = begin()
    asked(t, "first")
    t.type("\x04")
    assert t.ends() == 0
    env = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    for args in ((), ("--continue",)):
        subprocess.run(
            fake("chat", *args, reply="fine"), input=b"second\n", env=env, check=True, capture_output=True, timeout=300
        )
    kept(tmp_path, "first", "fine", "second", "fine")
    assert len(Store(tmp_path / "llamacli" / "conversations.db").chats()) == 1


# at the prompt


def test_turns_and_answers_stand_apart(begin):
    t = begin(reply="The **capital** is `Paris`.")
    asked(t, "Where?", answer="The capital is Paris.")
    assert t.lines[:6] == [
        "/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves",
        "> Where?",
        "",
        "The capital is Paris.",
        "",
        f"> {TITLE}",
    ]
    assert "\x1b[1mcapital\x1b[0m" in t.raw
    t.type("\x04")
    assert t.ends() == 0
    assert t.screen.cursor.x == 0


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(begin, tmp_path):
    whole = "a rather long answer, and many words more in a row"
    t = begin(reply=whole, delay="0.06")
    t.type("hello\r")
    t.wait("a rather")
    t.type("\x03")
    t.wait("stopped by Ctrl-C", TITLE)
    assert "^C" not in t.text
    _, said = conversation(tmp_path)
    assert said.startswith("a rather") and len(said) < len(whole)
    t.type("/continue\r")
    t.wait(whole[len(said) :].strip(), TITLE)
    kept(tmp_path, "hello", whole)


def test_ctrl_c_twice_leaves_on_a_line_of_its_own(begin):
    t = begin()
    t.type("and a second text", "\x03")
    t.wait("Ctrl-C twice too")
    t.wait(TITLE)
    t.type("half a", "\x03")
    assert t.ends() in (130, -signal.SIGINT)
    assert t.screen.cursor.x == 0
    assert "half a" not in t.lines[-1] or t.screen.cursor.y > t.lines.index("> half a")


def test_new_lines_by_alt_enter_ctrl_j_and_backslash(begin, tmp_path):
    t = begin()
    t.type("one\x1b\r", "two\n", "three\\\r", "four")
    t.wait("  four")
    t.type("\r")
    t.wait("fine")
    kept(tmp_path, "one\ntwo\nthree\nfour", "fine")


def test_a_block_in_three_quotes_takes_enter_as_a_new_line(begin, tmp_path):
    t = begin()
    t.type('/system """be\r', 'kind"""\r')
    t.wait("system prompt set")
    t.type('"""a\r', 'b"""\r')
    t.wait("fine")
    kept(tmp_path, "be\nkind", "a\nb", "fine")


def test_a_long_paste_is_named_and_sent_whole(begin, tmp_path):
    t = begin("-c", "4000", ready="ctx 0 of")
    lines = [f"{i}" for i in range(500)]
    t.type("\x1b[200~" + "\r".join(lines) + "\x1b[201~")
    t.wait("> [500 lines pasted]")
    t.type(" what is this?\r")
    t.wait("fine")
    kept(tmp_path, "\n".join(lines) + " what is this?", "fine")
    assert "\n> [500 lines pasted] what is this?" in t.text
    assert "498" not in t.text


def test_a_short_paste_is_shown_with_its_tabs_and_without_what_steers(begin, tmp_path):
    t = begin()
    t.type("\x1b[200~x\ty\0z\x1b[201~\r")
    t.wait("fine")
    kept(tmp_path, "x\tyz", "fine")


def test_a_paste_without_its_end_does_not_swallow_the_keyboard(begin, tmp_path):
    t = begin()
    t.type("\x1b[200~one\ntwo")
    t.wait("> one", "  two")
    t.type("!\r")
    t.wait("fine")
    kept(tmp_path, "one\ntwo!", "fine")


def test_history_holds_whole_turns_of_all_chats(begin, tmp_path):
    first, second = begin(), begin()
    first.type("\x1b[200~one\ntwo\nthree\x1b[201~\r")
    first.wait("fine")
    asked(second, "of the second")
    for t in (first, second):
        t.wait(TITLE)
        t.type("\x04")
        t.ends()
    third = begin()
    third.type("\x1b[A")
    third.wait("> of the second")
    third.type("\x1b[A")
    third.wait("  two", "  three")
    third.type("\r")
    third.wait("fine")
    kept(tmp_path, "one\ntwo\nthree", "fine")
    third.wait(TITLE)
    third.type("\x12of th")
    third.wait("> of the second")
    assert TITLE not in third.text
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "llamacli").iterdir()}
    assert set(modes.values()) == {0o600}


def test_commands_are_completed_and_files_too(begin, tmp_path):
    (tmp_path / "notes of mine.txt").write_text("text")
    t = begin()
    t.type("/rege")
    t.wait("answer the latest question anew")
    t.type("\t")
    t.wait("> /regen")
    t.type("\x15", f"/read {tmp_path}/not")
    t.wait("notes of mine.txt")
    t.type("\t", "\r", "\r")
    t.wait("goes with the next question")


def test_the_editor_of_the_user_writes_the_turn(begin, tmp_path):
    editor = tmp_path / "editor.sh"
    editor.write_text('#!/bin/sh\ncat "$1" >"$0.saw"\nprintf "from the\\neditor" >"$1"\n')
    editor.chmod(0o755)
    t = begin(VISUAL=str(editor))
    t.type("draft", "\x07")
    t.wait("  editor")
    t.type("\r")
    t.wait("fine")
    kept(tmp_path, "from the\neditor", "fine")
    assert (tmp_path / "editor.sh.saw").read_text() == "draft"


def test_letters_of_all_languages_are_typed_in_the_c_locale(begin, tmp_path):
    t = begin(LC_ALL="C", fresh=True)
    t.type("é漢😀 x\r")
    t.wait("fine")
    assert "> é漢😀 x" in t.text
    kept(tmp_path, "é漢😀 x", "fine")


# while it answers


def test_what_is_typed_during_an_answer_waits_for_the_prompt(begin, tmp_path):
    t = begin(reply="a long answer of many words", delay="0.02")
    t.type("hello\r")
    t.wait("a long")
    t.type("typed ahead")
    t.wait("> typed ahead")
    assert "a long answer of many words" in t.lines
    t.type("\r")
    t.wait("a long answer of many words", times=2)
    kept(tmp_path, "hello", ..., "typed ahead", ...)


def test_a_paste_during_an_answer_is_one_turn(begin, tmp_path):
    t = begin(reply="a long answer of many words", delay="0.02")
    t.type("hello\r")
    t.wait("a long")
    t.type("\x1b[200~tab\there\rand more\x1b[201~")
    t.wait("  and more")
    t.type("\r")
    t.wait("a long answer of many words", times=2)
    kept(tmp_path, "hello", ..., "tab\there\nand more", ...)


def test_a_suspended_answer_goes_on():
    t = Terminal(["bash", "--norc", "-i"], PS1="$ ")
    t.wait("$")
    words = " ".join(
        f"'{word}'" for word in fake("chat", "--no-save", "hello", reply="a long answer of many words", delay="0.1")
    )
    t.type(words + "\r")
    t.wait("\na long")
    t.type("\x1a")
    t.wait("Stopped")
    t.type("echo she''ll\r")
    t.wait("\nshell")
    t.type("fg\r")
    t.wait(TITLE)
    said = t.text[t.text.index("\na long") :]
    before, after = said[: said.index("[1]")], said[said.index("\nshell") : said.index(f"> {TITLE}")]
    assert (before.split("\n")[1] + after.rstrip().split("\n")[-1]).replace(" ", "") == "alonganswerofmanywords"
    t.close()


def test_what_the_model_says_is_shown_and_not_obeyed(begin):
    t = begin(reply="\x1b]0;owned\x07\x1b[2J\u202ecba")
    asked(t, "go", answer=r"\x1b]0;owned\x07\x1b[2J\u202ecba")
    assert "\x1b]0" not in t.raw
    assert "\x1b[2J" not in t.raw


# narrow, plain and old terminals


def test_nothing_is_broken_in_the_middle_of_a_word_at_40_columns(begin):
    t = begin(columns=40, rows=60, reply="The experts of this model are read from the disk when they are needed.")
    asked(t, "x", answer="needed.")
    t.type("/help\r")
    t.wait("Ctrl-R searches")
    t.wait(TITLE)
    for words in (r"answer the latest\n +question anew", r"stops an answer and keeps\n +what was said", r"from\nthe disk"):
        assert re.search(words, t.text), words
    t.type("/nonsens\r")
    t.wait("unknown command /nonsens;")
    assert all(len(line) <= 40 for line in t.lines)


@pytest.mark.parametrize("name", ["dumb", "unknown"])
def test_a_dumb_terminal_gets_no_escape_at_all(name, begin, tmp_path):
    t = begin(TERM=name, ready="/help lists the commands", reply="**fine**")
    t.type("hello\r")
    t.wait("**fine**")
    t.type("two \\\r", "lines\r")
    t.wait("**fine**", times=2)
    t.type("/regen\r")
    t.wait("**fine**", times=3)
    t.type("\x04")
    assert t.ends() == 0
    assert "\x1b" not in t.raw
    kept(tmp_path, "hello", "**fine**", "two \nlines", "**fine**")


def test_no_color_keeps_the_structure(begin):
    t = begin(NO_COLOR="1", reply="# Head\n\n- **one**\n")
    asked(t, "x", answer="# Head\n\n• one")
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", t.raw)


def test_plain_shows_markdown_as_it_is_written(begin):
    t = begin("--plain", reply="**fine**")
    asked(t, "x", answer="**fine**")
    t.type("/set markdown on\r")
    asked(t, "y", answer="\nfine")


def test_answers_in_a_file_and_the_prompt_at_the_terminal(tmp_path):
    command = " ".join(f"'{word}'" for word in fake("chat", "--no-save", reply="**fine**"))
    t = Terminal(["sh", "-c", f"{command} > {tmp_path}/answers"])
    t.wait(READY)
    t.type("hello\r")
    t.wait("ctx 1")
    t.type("\x04")
    assert t.ends() == 0
    assert (tmp_path / "answers").read_text() == "**fine**\n"


@pytest.mark.parametrize("args", ["'--help'", "'chat', '--help'", "'history', '--help'", "'run', '--help'"])
def test_help_imports_neither_editor_nor_database(args):
    code = f"import sys; from llamacli.cli import main; main([{args}]); print(*sorted(sys.modules), file=sys.stderr)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    ).stderr.split()
    assert "llamacli.cli.chat" in loaded or "chat" not in args
    assert not {"prompt_toolkit", "sqlite3", "markdown_it", "rich", "pygments", "numpy"} & set(loaded)
