"""Ctrl-C, SIGTERM and SIGHUP: handled wherever the program is, and the process ends by the signal.

Compiled code, which Python cannot interrupt, is simulated by a call that keeps the main thread in the C library. These tests do
not measure how soon the program ends with a real model.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pexpect
import pytest
from fakes import REPLY, fake, sleeps
from terminal import Terminal

from llamacli.cli import main

ROOT = Path(__file__).parents[2]

DEAF = """
import ctypes, sys
from llamacli.cli import enter, options
from fakes import FakeModel, Scripted

class Engine(Scripted):
    calls_left = int(sys.argv[1])
    def forward(self, ids, cache, **more):
        self.calls_left -= 1
        if self.calls_left < 0:
            print("deaf", file=sys.stderr, flush=True)
            lock = ctypes.create_string_buffer(64)
            libc = ctypes.CDLL(None)
            libc.pthread_mutex_lock(lock)
            libc.pthread_mutex_lock(lock)  # waits for itself, and hears no signal: as a compiled layer, but idle
        return super().forward(ids, cache, **more)

model = FakeModel(Engine("first line\\nsecond line", chunk=64))
options.load_model = lambda *args, **more: model
options.find_model = lambda name, console: name
sys.argv[1:2] = []
enter()
"""

SLEEPING = DEAF.replace("lock = ctypes", "import time; time.sleep(1000); lock = ctypes")  # its call can be interrupted


@contextmanager
def deaf(after, *args, code=DEAF, **how):
    """A `llamacli` whose engine cannot be interrupted from its call number `after` on."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    pipes.setdefault("env", os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(__file__))})
    process = subprocess.Popen([sys.executable, "-c", code, str(after), *args], **pipes)
    try:
        assert process.stderr.readline() == b"deaf\n"
        yield process
    finally:
        process.kill()
        process.communicate()


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_compiled_code_ends_the_process(number):
    with deaf(0, "run", "hi") as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err) == (-number, b"", b"")
    # the call alone would never return


def test_ctrl_c_before_the_first_token_leaves_no_output():
    with deaf(0, "run", "hi", code=SLEEPING) as process:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err) == (-signal.SIGINT, b"", b"")


def test_a_signal_while_a_model_is_loaded_ends_the_process_at_once():
    """There is nothing to keep yet, so the process ends at once, although the main thread cannot be interrupted, has a limit of
    a thousand seconds, and holds the interpreter's lock, as the library does that builds the tokenizer.
    """
    code = DEAF.replace("libc = ctypes.CDLL", "libc = ctypes.PyDLL").replace(
        "options.load_model = lambda *args, **more: model",
        "from llamacli.cli import signals\nsignals.GRACE = 1000\n"
        "def load(*args, **more):\n    with signals.at_once():\n        Engine('').forward([], None)\n"
        "options.load_model = load",
    )
    with deaf(0, "run", "hi", code=code) as process:
        sleeps(process)  # in the call that cannot be interrupted: nothing before it waits
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err) == (-signal.SIGINT, b"", b"")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_a_model_is_loaded_leaves_no_random_file(number, tmp_path):
    """The file that `bench --shape` makes has gigabytes."""
    code = (
        DEAF.replace("options.load_model = lambda *args, **more: model", "from llamacli.cli import bench, signals")
        .replace("options.find_model = lambda name, console: name", "from quantize import shapes")
        .replace(
            "sys.argv[1:2] = []",
            "def write(shape, layers, path, progress):\n    path.write_text('')\n"
            "def load(*args, **more):\n    with signals.at_once():\n        Engine('').forward([], None)\n"
            "shapes.write, bench.load_model = write, load\nsys.argv[1:2] = []",
        )
    )
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests"), "LLAMACLI_CACHE": str(tmp_path)}
    with deaf(0, "bench", "--shape", "scout", "-n", "1", "-p", "0", code=code, env=env) as process:
        assert len([*tmp_path.rglob("*.gguf")]) == 1
        process.send_signal(number)
        process.communicate(timeout=300)
    assert process.returncode == -number
    assert [*tmp_path.rglob("*.gguf")] == []


@pytest.mark.parametrize("number", SIGNALS)
def test_an_interrupted_answer_keeps_its_text(number, tmp_path):
    with deaf(3, "run", "hi") as process:
        process.send_signal(number)
        out, _ = process.communicate(timeout=300)
    assert (process.returncode, out) == (-number, REPLY[:3].encode() + b"\n")
    with deaf(3, "run", "-o", str(tmp_path / "out"), "hi") as process:
        process.send_signal(number)
        process.communicate(timeout=300)
    assert (process.returncode, (tmp_path / "out").read_bytes()) == (-number, REPLY[:3].encode() + b"\n")


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGHUP])
def test_a_sighup_while_the_program_ends_stops_no_write(first, tmp_path):
    """Where a terminal is closed, the shell sends one and the system another, within a millisecond."""
    code = SLEEPING.replace(
        "sys.argv[1:2] = []",
        "import os, signal\nfrom llamacli.cli import run\nwrite = run.write_new\n"
        "run.write_new = lambda *how: (os.kill(os.getpid(), signal.SIGHUP), write(*how))\nsys.argv[1:2] = []",
    )
    with deaf(3, "run", "-o", str(tmp_path / "out"), "hi", code=code) as process:
        process.send_signal(first)
        _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (-first, b"")
    assert (tmp_path / "out").read_bytes() == REPLY[:3].encode() + b"\n"


@pytest.mark.parametrize("calls, text", [(0, ""), (4, REPLY[:4])])
def test_json_interrupted_in_compiled_code_prints_the_text_so_far(calls, text):
    with deaf(calls, "run", "--json", "hi") as process:
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=300)
    record = json.loads(out)
    assert process.returncode == -signal.SIGINT
    assert (record["text"], record["finish_reason"]) == (text, "interrupt")


def test_json_interrupted_between_tokens_prints_the_text_so_far(model, monkeypatch, capfd):
    answered, logits = [], model.engine.logits

    def interrupted(*args):
        answered.append(1)
        if len(answered) > 11:  # 7 tokens of the prompt, 4 of the answer
            raise KeyboardInterrupt
        return logits(*args)

    monkeypatch.setattr(model.engine, "logits", interrupted)
    assert main(["run", "--json", "hi"]) == 130
    record = json.loads(capfd.readouterr().out)
    assert (record["text"], record["finish_reason"]) == (REPLY[:5], "interrupt")


def test_a_chat_killed_in_compiled_code_restores_the_terminal():
    command = shlex.join([sys.executable, "-c", DEAF, "0", "chat", "--no-save"])
    t = Terminal(["bash", "-c", f"set -m; {command}; echo status=$?; stty -a"], PYTHONPATH=str(ROOT / "tests"))
    t.wait("ctx 0 of")
    t.type("hello\r")
    t.wait("deaf")
    os.kill(int(subprocess.run(["pgrep", "-P", str(t.process.pid)], capture_output=True, text=True).stdout), signal.SIGTERM)
    t.wait("status=143", "icanon")
    assert all(re.search(rf"(?<!-)\b{mode}\b", t.text) for mode in ("icanon", "echo", "icrnl")), t.text
    assert t.raw.rindex("\x1b[?2004l") > t.raw.rindex("\x1b[?2004h")


def test_a_shell_loop_stops_at_the_first_ctrl_c():
    command = shlex.join(fake("run", "hi", reply="reply " + "x" * 300, delay="0.05"))
    script = f"for i in 1 2 3; do {command}; done; echo over"
    child = pexpect.spawn("bash", ["-c", script], timeout=300, encoding="utf-8")
    child.expect("reply x")
    child.sendintr()
    child.expect(pexpect.EOF)
    child.close()
    assert "over" not in child.before
    assert child.before.count("reply") == 0


def test_a_second_signal_ends_a_command_that_cannot_stop():
    code = (
        "import time\nfrom llamacli.cli import enter, run\n"
        "def stuck(*args, **more):\n"
        "    try:\n        print('ready', flush=True); time.sleep(1000)\n"
        "    finally:\n        print('stopping', flush=True); time.sleep(1000)\n"
        "run._text = stuck\nenter()"
    )
    process = subprocess.Popen([sys.executable, "-c", code, "run", "hi"], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == b"stopping\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGINT


def test_a_signal_that_was_ignored_stays_ignored():
    """As under nohup and in the background of a script."""
    code = "import signal, os, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.executable, sys.argv[1:])"
    args = fake("run", "hi", delay="0.05")
    process = subprocess.Popen([sys.executable, "-c", code, *args], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert process.stdout.read(1) == b"f"
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=300)
    assert (process.returncode, out.decode()) == (0, REPLY[1:] + "\n")


STARTED = """
import builtins, importlib, os, signal, sys, tomllib
with open(sys.argv.pop(1), "rb") as file:
    module, name = tomllib.load(file)["project"]["scripts"]["llamacli"].split(":")
real, wanted, before = builtins.__import__, sys.argv.pop(1), set(sys.modules)
def watched(name, *args, **more):
    if name == wanted:
        os.kill(os.getpid(), signal.SIGINT)
    return real(name, *args, **more)
start = getattr(importlib.import_module(module), name)
print(*sorted(set(sys.modules) - before), file=sys.stderr, flush=True)
builtins.__import__ = watched
start()
"""


def started(interrupted_at, *args):
    """Start the program as pip's script does and interrupt it where it imports a module. Returns the modules imported before
    its first line, and the result.
    """
    command = [sys.executable, "-c", STARTED, ROOT / "pyproject.toml", interrupted_at, *args]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL)
    first, _, rest = done.stderr.partition(b"\n")
    return first.decode().split(), (done.returncode, done.stdout, rest)


@pytest.mark.parametrize("module", ["llamacli.cli", "click", "llamacli.cli.console", "llamacli.cli.options"])
def test_ctrl_c_while_the_program_starts_is_quiet(module):
    """Most of a start is spent on imports."""
    assert started(module, "run", "hi")[1] == (-signal.SIGINT, b"", b"")


def test_few_modules_are_imported_before_ctrl_c_is_quiet():
    """An interrupt during one of these shows a traceback, as does one during the interpreter's own start. What is built into
    the interpreter is there at once.
    """
    imported = set(started("", "--version")[0]) - set(sys.builtin_module_names)
    assert imported <= {"__future__", "llamacli", "llamacli.__main__", "llamacli.errors"}


@pytest.mark.parametrize("place", ["install", "main", "after"])
def test_ctrl_c_before_and_after_the_command_is_quiet(place):
    """In the lines before and after the command's own code."""
    code = (
        "import os, signal, sys\nfrom llamacli import cli\nfrom llamacli.cli import signals\n"
        "def interrupt(*_, **__):\n    os.kill(os.getpid(), signal.SIGINT)\n    return 0\n"
        "install, place = signals.install, sys.argv.pop(1)\n"
        "if place == 'install':\n    signals.install = lambda: (install(), interrupt())\n"
        "if place == 'main':\n    cli.main = interrupt\n"
        "if place == 'after':\n    cli.main = lambda **_: 0\n    sys.stderr.flush = interrupt\n"
        "cli.enter()"
    )
    done = subprocess.run([sys.executable, "-c", code, place, "run", "hi"], capture_output=True, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")
