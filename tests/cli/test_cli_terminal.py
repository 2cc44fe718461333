"""`run` and `plan` on a real pseudo-terminal: progress of a prompt, wrapping of words, tables, the effect of `-q`."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import fakes
import pytest
from checkpoint import CONFIG, SCOUT
from fakes import fake
from terminal import Terminal

from llamacli import environment
from llamacli.cli.console import Console
from llamacli.cli.options import find_model

LONG = "The experts of this model are read from the disk whenever the router asks for them, which takes 1,048,576 microseconds."


def lines(command, columns=80, rows=50, **environment):
    """The screen's contents when the command has ended."""
    t = Terminal(command, columns, rows, **environment)
    assert t.ends() == 0, t.text
    return t.lines


# while a prompt is read


def drawn(t, pattern):
    """Whether a line that is redrawn had this content at some time."""
    return any(re.fullmatch(pattern, re.sub(r"\x1b\[[0-9;]*[mK]", "", line)) for line in re.split("[\r\n]+", t.raw))


def test_progress_of_the_prompt_is_shown_until_the_first_token(preloaded):
    t = Terminal(fake("run", "x" * 95, delay="0.03"), columns=80, start=preloaded.start)
    assert t.ends() == 0
    assert drawn(t, r"reading the prompt, +\d+ of 100 tokens  ━+─+  +\d+ %  \d+:\d\d left"), t.raw
    assert t.lines == ["first line", "second line"]


def test_forty_columns_hold_the_share_and_the_time(preloaded):
    t = Terminal(fake("run", "x" * 95, delay="0.03"), columns=40, start=preloaded.start)
    assert t.ends() == 0
    assert drawn(t, r"reading the prompt.* \d+ %  \d+:\d\d left"), t.raw
    assert t.lines == ["first line", "second line"]


def test_a_model_that_fetches_experts_says_that_it_reads_them():
    code = (
        "import sys; from types import SimpleNamespace; import fakes\n"
        "fakes.FakeEngine.stages = [SimpleNamespace(slots=object())]\n"
        "fakes.answer(['fine', '0.03', 'run', 'x' * 70])"
    )
    t = Terminal([sys.executable, "-c", code], 100, PYTHONPATH=str(Path(fakes.__file__).parent))
    t.wait("reading the prompt and experts, ", "of 75 tokens")
    assert t.ends() == 0
    assert t.lines == ["fine"]


def test_no_progress_is_shown_with_quiet_or_in_a_pipe(preloaded):
    quiet = Terminal(fake("run", "-q", "x" * 45, delay="0.04"), start=preloaded.start)
    piped = subprocess.run(fake("run", "x" * 45, delay="0.04"), stdin=subprocess.DEVNULL, capture_output=True, timeout=300)
    assert (piped.stdout, piped.stderr) == (b"first line\nsecond line\n", b"")
    assert quiet.ends() == 0
    assert "reading" not in quiet.raw
    assert quiet.lines == ["first line", "second line"]


def test_a_dumb_terminal_is_told_once_without_an_escape(preloaded):
    t = Terminal(fake("run", "x" * 45, delay="0.04"), TERM="dumb", start=preloaded.start)
    assert t.ends() == 0
    assert re.fullmatch(r"reading the prompt, +\d+ of 50 tokens.*", t.lines[0])
    assert t.lines[1:] == ["first line", "second line"]
    assert "\x1b" not in t.raw


def test_a_long_question_of_a_chat_is_followed_too(tmp_path, preloaded):
    t = Terminal(fake("chat", "--no-save", "x" * 95, delay="0.03", reply="fine"), start=preloaded.start)
    t.wait("of 100 tokens", " left")
    t.wait("\nfine", "Ask something")
    assert "reading the prompt" not in t.text
    t.close()


def test_a_model_that_is_loaded_says_how_large_it_is(tmp_path):
    """Loading is slowed down and no kernel is compiled, so the note names the file."""
    (tmp_path / "slow.gguf").write_bytes(bytes(2_500_000))
    code = (
        "import sys, time, llamacli; from llamacli.cli import enter, inputs\n"
        "shown, words = [], inputs._loading\n"
        "def load(*_, **__):\n"
        "    while len(shown) < 2: time.sleep(0.01)  # it is drawn again and again: once for certain\n"
        "    raise llamacli.UsageError('enough')\n"
        "llamacli.Model.load, inputs._loading = load, lambda path: shown.append(path) or words(path)\n"
        "sys.argv[1:] = ['run', '-m', sys.argv[1], 'hi']; enter()"
    )
    t = Terminal([sys.executable, "-c", code, str(tmp_path / "slow.gguf")])
    t.wait("loading slow.gguf (2.50 MB) ...")
    t.wait("enough")
    assert "loading" not in t.text


WARNED = """
import time
from llamacli.cli.console import Console
console, shown = Console(), []
def words():
    shown.append(1)
    return "waiting ..."
with {work} as update:
    {until_drawn}
    console.warn("careful")
    console.warn("and more")
"""


@pytest.mark.parametrize(
    "work, until_drawn",
    [
        ("console.progress('work')", "update(1, 2, 'label')"),
        ("console.waiting(words, 0)", "while len(shown) < 2: time.sleep(0.01)"),
    ],
    ids=["bar", "waiting"],
)
def test_a_warning_starts_on_its_own_line_beside_a_progress_line(work, until_drawn):
    code = WARNED.format(work=work, until_drawn=until_drawn)
    assert lines([sys.executable, "-c", code]) == ["llamacli: careful", "llamacli: and more"]


# answers at the edge


@pytest.mark.parametrize("columns", [40, 80])
def test_words_are_whole_at_the_edge_of_a_terminal_and_bytes_in_a_pipe(columns, preloaded):
    command = fake("run", "hi", reply=LONG)
    shown = lines(command, columns, start=preloaded.start)
    assert len(shown) > 1 and all(len(line) < columns for line in shown)
    assert " ".join(shown) == LONG
    assert subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).stdout.decode() == LONG + "\n"


def test_stdout_has_only_the_answer_and_a_cut_one_is_noted_unless_quiet(preloaded):
    assert lines(fake("run", "hi"), start=preloaded.start) == ["first line", "second line"]
    assert lines(fake("run", "-n", "5", "hi"), start=preloaded.start)[:1] == ["first"]
    assert "stopped at the -n limit" in " ".join(lines(fake("run", "-n", "5", "hi"), start=preloaded.start))
    assert lines(fake("run", "-q", "-n", "5", "hi"), start=preloaded.start) == ["first"]


def test_an_interrupted_answer_tells_its_speed(preloaded):
    t = Terminal(fake("run", "--ignore-eos", "hi", reply="many words " * 1000, delay="0.02"), start=preloaded.start)
    t.wait("many words many")
    t.type("\x03")
    assert t.ends() == -signal.SIGINT
    said = " ".join(t.lines[-3:])  # a word of the answer may still come between the terminal's ^C and this
    assert re.search(r"\[7 prompt tokens at [^]]* stopped by Ctrl-C\]$", said), t.text


def test_stdin_that_does_not_end_is_named_and_only_run_can_leave_it(tmp_path):
    t = Terminal(fake("run", "-f", "-"))
    t.wait("reading stdin until it ends (Ctrl-D)")
    t.type("hi\n\x04")
    assert t.ends() == 0
    assert "--no-stdin" not in t.text
    os.mkfifo(tmp_path / "pipe")
    t = Terminal(["sh", "-c", f"{shlex.join(fake('run', 'hi'))} < {tmp_path}/pipe"])
    with open(tmp_path / "pipe", "w") as pipe:
        t.wait("reading stdin until it ends (Ctrl-D); --no-stdin leaves it alone")
        pipe.write("more")
    assert t.ends() == 0


def test_quiet_names_no_model(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    find_model(None, Console(quiet=True))
    assert capsys.readouterr().err == ""
    find_model(None, Console(verbose=True))
    assert environment.SMALL_MODEL.name in capsys.readouterr().err


def test_piped_text_before_a_prompt_is_noted_at_a_terminal():
    command = f"printf 'one\\ntwo\\n' | {shlex.join(fake('run', 'three'))}"
    assert lines(["sh", "-c", command]) == [
        "read 8 bytes of stdin before the prompt; --no-stdin leaves it alone",
        "first line",
        "second line",
    ]
    assert lines(["sh", "-c", f"{command} -q"]) == ["first line", "second line"]


# tables


@pytest.fixture(scope="module")
def scout(tmp_path_factory):
    """A folder with the config.json of a Scout."""
    folder = tmp_path_factory.mktemp("hf") / "Llama-4-Scout-17B-16E-Instruct-a-rather-long-name"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | SCOUT))
    return folder


def plan(scout, *more):
    return [
        sys.executable,
        "-m",
        "llamacli",
        "plan",
        str(scout),
        "--memory",
        "48G",
        "--disk",
        "1",
        "--bandwidth",
        "100",
        "-t",
        "4",
        *more,
    ]


def test_cells_of_a_narrow_terminal_break_between_words(tmp_path):
    code = (
        "from llamacli.cli.console import Console\n"
        "rows = [('id', '1,048,576', 'What do elephants eat in the morning?')]\n"
        "Console('never').table('', rows, ('id', 'tokens', 'conversation'))"
    )
    assert lines([sys.executable, "-c", code], 40) == [
        "  id",
        "    tokens        1,048,576",
        "    conversation  What do elephants eat",
        "                  in the morning?",
    ]


@pytest.fixture(scope="module")
def piped(scout):
    """The output in a pipe."""
    return subprocess.run(plan(scout), capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("columns, color", [(40, "auto"), (40, "never"), (80, "always"), (200, "auto")])
def test_titles_are_whole_words_and_numbers_are_never_folded(scout, piped, columns, color):
    """The numbers of a narrow terminal are those of a pipe, and each stands on one line."""
    numbers = set(re.findall(r"[0-9][0-9,.]*", piped.replace(str(scout), "")))
    shown = lines(plan(scout, "--color", color), columns, 200)
    assert all(len(line) <= columns for line in shown)
    there = set(re.findall(r"[0-9][0-9,.]*", "\n".join(shown)))
    assert {number.rstrip(".,") for number in numbers} <= {number.rstrip(".,") for number in there}
    if columns == 200:
        titles = [line for line in piped.splitlines() if line and not line.startswith(" ")]
        assert [line.split() for line in titles] == [line.split() for line in shown if line and not line.startswith(" ")]


# completion, by the key


BIN = Path(sys.executable).parent
SHELLS = {  # how to start it without anybody's settings, and what enables completion
    "bash": (["bash", "--norc", "-i"], 'eval "$(llamacli completion bash)"'),
    "zsh": (["zsh", "-f", "-i"], 'autoload -Uz compinit; compinit -u -D; eval "$(llamacli completion zsh)"'),
    "fish": (["fish", "--no-config", "-i"], "llamacli completion fish | source"),
}


@pytest.mark.skipif(not (BIN / "llamacli").exists(), reason="needs the command installed")
@pytest.mark.parametrize("shell", [pytest.param(s, marks=pytest.mark.skipif(not shutil.which(s), reason=s)) for s in SHELLS])
def test_tab_completes_commands_types_models_and_files(shell, tmp_path):
    (tmp_path / "notes of mine.txt").touch()
    command, enable = SHELLS[shell]
    env = {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path), "PS1": "$ "}
    t = Terminal(["sh", "-c", f"cd {tmp_path} && exec {shlex.join(command)}"], 100, 40, **env)
    t.pump(0.5)
    t.type(f"{enable}; echo rea''dy\r")
    t.wait("\nready")
    t.type("llamacli qua\t")
    t.wait("llamacli quantize")
    t.type("a b --type IQ4_X\t")
    t.wait("IQ4_XS")
    t.type("\x15llamacli run -m scout-t\t")
    t.wait("llamacli run -m scout-tiny")
    t.type("-f no\t")
    t.wait("mine.txt")
    t.close()
