"""`chat` as a person meets it, on a real pseudo-terminal with a screen, over the miniature model of fakes.py; and in a pipe."""

import base64
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fakes import fake
from terminal import Terminal

from llamacli.cli.chat.terminal import copying
from llamacli.conversation import Conversation
from llamacli.errors import LlamacliError, UsageError
from llamacli.store import Store

TESTS = Path(__file__).parents[1]
READY = "ctx 0 of"
TITLE = "Ask something, or /help"


def piped(text, *args, **how):
    done = subprocess.run(fake("chat", *args, **how), input=text.encode(), capture_output=True, timeout=300)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture
def begin(tmp_path, preloaded):
    """Start a chat whose state is this test's own; it is ended at the test's end. `fresh`: by a new interpreter."""
    begun = []

    def start(*args, reply="fine", delay="0", columns=80, rows=24, ready=READY, fresh=False, **environment):
        how = {"start": None if fresh else preloaded.start, "XDG_STATE_HOME": str(tmp_path), **environment}
        t = Terminal(fake("chat", *args, reply=reply, delay=delay), columns, rows, **how)
        begun.append(t)
        if ready:
            t.wait(ready)
        return t

    yield start
    for t in begun:
        t.close()


def asked(t, question, n=1, answer="fine"):
    """Ask, and wait for the `n`th answer and the next prompt."""
    t.type(question + "\r")
    t.wait(answer, times=n)
    t.wait(TITLE)


def conversation(tmp_path):
    """The messages of the latest conversation, as they are now."""
    try:
        store = Store(tmp_path / "llamacli" / "conversations.db")
        found = Conversation.resume(store, store.latest())
    except LlamacliError:
        return None
    store.close()
    return [found.system] * bool(found.system) + [message.content for message in found.messages]


def kept(tmp_path, *expected, seconds=300):
    """Wait until the latest conversation has these messages; ... stands for any."""
    until = time.monotonic() + seconds
    while (
        (found := conversation(tmp_path)) is None
        or len(found) != len(expected)
        or any(wanted not in (..., message) for wanted, message in zip(expected, found, strict=True))
    ):
        assert time.monotonic() < until, f"expected {expected}, found {found}"
        time.sleep(0.02)


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


def test_a_pipe_that_does_not_wait_is_read_to_its_end():
    read, write = os.pipe()
    os.set_blocking(read, False)
    chat = subprocess.Popen(fake("chat", reply="fine"), stdin=read, stdout=subprocess.PIPE)
    os.close(read)
    for part in (b"fir", b"st\n", b"second"):
        time.sleep(0.4)
        os.write(write, part)
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


def test_a_chat_whose_terminal_is_gone_ends():
    t = Terminal(["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *fake("chat", "--no-save")])
    t.wait(READY)
    t.hang_up()
    t.process.wait(300)


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


def test_a_dumb_terminal_gets_no_escape_at_all(begin, tmp_path):
    t = begin(TERM="dumb", ready="/help lists the commands", reply="**fine**")
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


# commands


def test_a_wrong_command_gets_a_proposal(begin):
    t = begin()
    for typed, said in (
        ("/regn", "did you mean /regen?"),
        ("/nonsense", "/help lists them"),
        ("/clear all", "expected nothing after it"),
        ("/read", "expected FILE, found nothing"),
        ("/undo x", "expected a number of turns"),
        ("/regen", "ask something first"),
        ("/edit", "ask something first"),
        ("/set temp hot", "expected a number from 0"),
        ("/set top_p 1.5", "expected a number from 0 to 1"),
        ("/set heat 1", "expected one of temp"),
        ("/ctx many", "expected a number of tokens"),
        ("/read /nowhere", "No such file"),
        ("/read /dev/zero", "expected a text file"),
        ("/load nobody", "found none"),
    ):
        t.type(typed + "\r")
        t.wait(said.split()[0], said.split()[-1])
    t.type("/HELP\r")
    t.wait("this list")


def test_exit_typed_as_a_word_is_explained_once(begin):
    t = begin()
    t.type("exit\r")
    t.wait("/exit leaves")
    asked(t, "exit")
    t.type("/exit\r")
    assert t.ends() == 0


def test_undo_says_what_it_forgets(begin, tmp_path):
    t = begin()
    for n, question in enumerate(("one", "two", "three"), 1):
        asked(t, question, n)
    t.type("/undo 2\r")
    t.wait('forgotten: "three"', 'forgotten: "two"')
    kept(tmp_path, "one", "fine")


def test_edit_asks_the_question_in_other_words(begin, tmp_path):
    t = begin()
    asked(t, "wht is it")
    t.type("/edit\r")
    t.wait("> wht is it", times=2)
    t.type("?\r")
    t.wait("fine", times=2)
    kept(tmp_path, "wht is it?", "fine")
    t.wait(TITLE)
    t.type("/edit\r")
    t.wait("> wht is it?", times=2)
    t.type("\x03")
    t.wait("Ctrl-C twice too")
    asked(t, "another", 3)
    kept(tmp_path, "wht is it?", "fine", "another", "fine")


def test_a_file_goes_before_the_next_question(begin, tmp_path):
    (tmp_path / "a.txt").write_text("of a\n")
    t = begin("-f", str(tmp_path / "a.txt"), "what", "is it?", ready=None)
    t.wait("fine")
    kept(tmp_path, "of a\n\nwhat is it?", "fine")
    t.wait(TITLE)
    t.type(f"/read {tmp_path}/a.txt\r")
    t.wait("goes with the next question", "a.txt attached", times=1)
    asked(t, "and now?", 2)
    t.type("/list\r")
    t.wait("  what is it?")  # and not the first line of the file
    kept(tmp_path, "of a\n\nwhat is it?", "fine", "of a\n\nand now?", "fine")


def test_settings_are_changed_and_shown(begin):
    t = begin()
    t.type("/set temp 0.2\r", "/set seed=7\r", "/set max_tokens 1\r", "/show\r")
    t.wait("temp            0.2", "seed            7", "max_tokens      1")
    asked(t, "x", answer="stopped at the -n limit")
    t.type("/set mirostat 2\r", "/set ignore_eos on\r", "/set samplers top_k,temp\r", "/set logit_bias 5+1\r", "/show\r")
    t.wait("mirostat        2", "ignore_eos      on", "samplers        top_k,temp", "logit_bias      '5+1'")
    t.type("/set ignore_eos maybe\r", "/set samplers default\r")
    t.wait("expected on or off")
    t.type("/set max_tokens default\r", "/continue\r")
    t.wait("\nine")


def test_copy_reaches_the_clipboard_through_the_terminal(begin):
    t = begin(reply="text\n\n```py\nprint(1)\n```\n")
    asked(t, "x", answer="print(1)")
    t.type("/copy code\r")
    t.wait("copied 9 characters")
    assert f"\x1b]52;c;{base64.b64encode(b'print(1)' + bytes([10])).decode()}\x07" in t.raw
    t.type("/copy\r")
    t.wait("copied 25 characters")


def test_export_search_list_and_load(begin, tmp_path):
    t = begin()
    asked(t, "about elephants")
    t.type(f"/export {tmp_path}/c.md\r", f"/export {tmp_path}/c.jsonl\r")
    t.wait("c.jsonl")
    assert "about elephants" in (tmp_path / "c.md").read_text()
    t.type("/save animals\r", "/clear\r")
    t.wait("a new conversation")
    asked(t, "about stones", 2)
    t.type("/search elephants\r")
    t.wait("about elephants", times=2)
    t.type("/load animals\r")
    t.wait('"animals", 1 turn so far')
    asked(t, "more", 4)
    kept(tmp_path, "about elephants", "fine", "more", "fine")
    t.type(f"/load {tmp_path}/c.jsonl\r")
    t.wait('"about elephants", 1 turn so far')


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


def test_a_full_context_says_what_to_do_and_loses_nothing(begin, tmp_path):
    t = begin("-c", "40")
    asked(t, "first question")
    t.type("a second question\r")
    t.wait("/clear makes room", "/drop", "/ctx 1024")
    t.type("/regen\r")
    t.wait("makes room", times=2)
    kept(tmp_path, "first question", "fine", "a second question")
    t.type("/ctx 1K\r", "/regen\r")
    t.wait("fine", times=2)
    kept(tmp_path, "first question", "fine", "a second question", "fine")
    t.type("/ctx 40\r")
    t.wait("of 40 tokens")
    t.type("/drop\r", "/regen\r")
    t.wait("no longer sees the oldest turn", times=1)
    t.wait("fine", times=3)


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


@pytest.mark.parametrize("args", ["'--help'", "'chat', '--help'", "'history', '--help'", "'run', '--help'"])
def test_help_loads_neither_editor_nor_database(args):
    code = f"import sys; from llamacli.cli import main; main([{args}]); print(*sorted(sys.modules), file=sys.stderr)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    ).stderr.split()
    assert "llamacli.cli.chat" in loaded or "chat" not in args
    assert not {"prompt_toolkit", "sqlite3", "markdown_it", "rich", "pygments", "numpy"} & set(loaded)


@pytest.mark.parametrize("end", ["Ctrl-D", "SIGTERM at the prompt", "SIGTERM during an answer"])
def test_the_terminal_is_given_back_as_it_was(tmp_path, end):
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


def test_the_clipboard_is_reached_through_screen_and_refused_where_there_is_none():
    assert copying("é", {"TERM": "xterm"}) == "\x1b]52;c;w6k=\x07"
    assert copying("é", {"TERM": "screen-256color", "TMUX": "/tmp/tmux"}) == "\x1b]52;c;w6k=\x07"
    wrapped = copying("x" * 600, {"TERM": "screen"})
    assert "".join(re.findall(r"\x1bP(.*?)\x1b\\", wrapped, re.S)) == copying("x" * 600, {"TERM": "xterm"})
    for text, term in (("x", "dumb"), ("x" * 80_000, "xterm")):
        with pytest.raises(UsageError):
            copying(text, {"TERM": term})


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
