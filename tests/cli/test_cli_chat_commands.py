"""The commands of `chat`, typed on a real pseudo-terminal, with the miniature model of fakes.py."""

import base64
import re

import pytest
from chatting import TITLE, asked, kept

from llamacli.cli.chat.terminal import copying
from llamacli.errors import UsageError


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


def test_undo_names_the_removed_question(begin, tmp_path):
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


def test_a_full_context_gives_advice_and_loses_nothing(begin, tmp_path):
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


def test_the_clipboard_is_reached_through_screen_and_refused_where_there_is_none():
    assert copying("é", {"TERM": "xterm"}) == "\x1b]52;c;w6k=\x07"
    assert copying("é", {"TERM": "screen-256color", "TMUX": "/tmp/tmux"}) == "\x1b]52;c;w6k=\x07"
    wrapped = copying("x" * 600, {"TERM": "screen"})
    assert "".join(re.findall(r"\x1bP(.*?)\x1b\\", wrapped, re.S)) == copying("x" * 600, {"TERM": "xterm"})
    for text, term in (("x", "dumb"), ("x" * 80_000, "xterm")):
        with pytest.raises(UsageError):
            copying(text, {"TERM": term})
