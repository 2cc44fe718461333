"""`chat` as a user meets it: piped lines, commands, and a real pseudo-terminal, over the miniature model of fakes.py."""

import os
import readline
import subprocess
from pathlib import Path

import pexpect
import pytest
from fakes import FakeModel, Scripted, fake

import llamacli
from llamacli.cli import chat

TESTS = Path(__file__).parents[1]


def talk(text, **how):
    done = subprocess.run(fake("chat", **how), input=text.encode(), capture_output=True, timeout=30)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_chat_takes_piped_lines_as_turns():
    assert talk("one\n\ntwo\n", reply="ok") == (0, "ok\nok\n", "")


def test_chat_commands_work_in_a_pipe_and_speak_on_stderr():
    code, out, err = talk("hi\n/regen\n/stats\n/system be kind\n/system\n/nonsense\n/exit\nnever\n", reply="ok")
    assert (code, out) == (0, "ok\nok\n")
    assert "context: " in err
    assert "be kind" in err
    assert "unknown command /nonsense; /help lists them" in err


def test_chat_reads_blocks_in_three_quotes_as_one_turn():
    text = '"""\nline one\nline two\n"""\n'
    code, out, _ = talk(text, reply="ok")
    assert (code, out) == (0, "ok\n")


def conversation(reply="ok"):
    model = FakeModel(Scripted(reply, chunk=64))
    return chat.Conversation(model, model.sampler(), None, None, [])


def test_a_conversation_remembers_undoes_and_answers_again():
    c = conversation()
    assert "".join(c.ask("one")) == "ok"
    assert "".join(c.ask("two")) == "ok"
    assert [m["content"] for m in c.messages] == ["one", "ok", "two", "ok"]
    assert "".join(c.regenerate()) == "ok"
    assert [m["content"] for m in c.messages] == ["one", "ok", "two", "ok"]
    c.undo()
    assert [m["content"] for m in c.messages] == ["one", "ok"]
    c.clear()
    with pytest.raises(llamacli.PromptError):
        list(c.regenerate())


def test_a_broken_off_answer_stays_as_the_turn():
    c = conversation("hello")
    answer = c.ask("one")
    assert next(answer) + next(answer) == "he"
    answer.close()
    assert c.messages[-1] == {"role": "assistant", "content": "he"}
    assert "".join(c.ask("two")) == "hello"


def test_a_turn_too_long_is_taken_back():
    c = conversation()
    list(c.ask("one"))
    with pytest.raises(llamacli.ContextFullError):
        list(c.ask("x" * 5000))
    assert [m["content"] for m in c.messages] == ["one", "ok"]


def test_chat_at_a_terminal(tmp_path):
    """Streaming, Ctrl-C during an answer and at the prompt, commands, Ctrl-D: on a real pseudo-terminal."""
    env = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "dumb", "PYTHONPATH": str(TESTS.parent)}
    command, *args = fake("chat", reply="a rather long answer", delay="0.02")
    child = pexpect.spawn(command, args, env=env, timeout=20, encoding="utf-8")
    child.expect("/help lists the commands")
    child.expect("> ")
    child.sendline("hello")
    child.expect("a rather")
    child.sendintr()
    child.expect("stopped by Ctrl-C")
    child.expect("> ")
    child.sendline("/regen")
    child.expect("a rather long answer\r\n")
    child.expect("> ")
    child.sendline('"""')
    child.expect(r"\.\.\. ")
    child.sendline('two lines"""')
    child.expect("a rather long answer\r\n")
    child.expect("> ")
    child.sendintr()
    child.expect("Ctrl-D or /exit leaves")
    child.expect("> ")
    child.sendline("/help")
    child.expect("/regen")
    child.expect("> ")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    history = tmp_path / "llamacli" / "history"
    assert history.stat().st_mode & 0o777 == 0o600
    assert "hello" in history.read_text()


@pytest.mark.skipif("GNU" not in getattr(readline, "__doc__", ""), reason="only GNU readline knows bracketed paste")
def test_pasted_lines_are_one_turn(tmp_path):
    env = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm"}
    command, *args = fake("chat", "--color", "never", reply="ok")
    child = pexpect.spawn(command, args, env=env, timeout=20, encoding="utf-8")
    child.expect("> ")
    child.send("\x1b[200~one\ntwo\x1b[201~\r")
    child.expect("ok")
    child.expect("> ")
    child.sendline("/stats")
    child.expect("12 prompt tokens")  # with the special ones around one\ntwo
    child.expect("> ")  # an end of input sent before the prompt is up is lost: the terminal is between its modes
    child.sendeof()
    child.expect(pexpect.EOF)


def test_chat_leaves_with_130_at_the_second_ctrl_c_in_a_row(tmp_path):
    env = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "dumb"}
    command, *args = fake("chat")
    child = pexpect.spawn(command, args, env=env, timeout=20, encoding="utf-8")
    child.expect("> ")
    child.sendintr()
    child.expect("Ctrl-C twice")
    child.expect("> ")
    child.sendintr()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130


def test_colour_only_where_it_is_wanted(tmp_path):
    def colours(*args, **env):
        command, *rest = fake("run", *args, "hi")
        child = pexpect.spawn(
            command, rest, env={**os.environ, "TERM": "xterm", "NO_COLOR": "", **env}, timeout=20, encoding="utf-8"
        )
        child.expect(pexpect.EOF)
        return "\x1b[" in child.before

    assert colours()
    assert not colours(NO_COLOR="1")
    assert not colours(TERM="dumb")
    assert not colours("--color", "never")
    assert colours("--color", "always", NO_COLOR="1")
