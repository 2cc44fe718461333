"""Batches: each line is answered once and in order, also after the run was killed; errors are named before the first answer."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
import tiny
from batching import prompts_of, records, small, write
from fakes import REPLY, fake, start

from llamacli import Model
from llamacli.cli import main
from llamacli.cpu import kvcache
from llamacli.plan.placement import plan_residency
from llamacli.session import Session
from llamacli.text.sampler import Sampler


def test_each_line_is_answered_in_order(model, tmp_path, capfd):
    messages = [{"role": "user", "content": "three"}, {"role": "assistant", "content": "3"}, {"role": "user", "content": "4"}]
    lines = ["one", {"prompt": "two", "system": "be", "id": {"n": 2}}, {"messages": messages, "id": 7}]
    assert main(["run", "-s", "all", "--batch", write(tmp_path / "in", *lines)]) == 0
    found = records(capfd.readouterr().out)
    assert [r["line"] for r in found] == [1, 2, 3]
    assert [r.get("id") for r in found] == [None, {"n": 2}, 7]
    assert {(r["text"], r["finish_reason"]) for r in found} == {(REPLY, "stop")}
    assert found[0]["usage"] == {"prompt_tokens": 14, "completion_tokens": len(REPLY)}
    assert prompts_of(model) == ["s\nallu\none", "s\nbeu\ntwo", "s\nallu\nthreea\n3u\n4"]


def test_words_and_files_come_before_each_line_and_empty_lines_ask_nothing(model, tmp_path, capfd):
    (tmp_path / "in").write_text('"a"\n\n  \n"b"')
    (tmp_path / "text").write_text("text\n")
    assert main(["run", "-f", str(tmp_path / "text"), "--batch", str(tmp_path / "in"), "words"]) == 0
    assert [r["line"] for r in records(capfd.readouterr().out)] == [1, 4]
    assert prompts_of(model) == ["u\ntext\n\nwords\n\na", "u\ntext\n\nwords\n\nb"]


def test_a_result_is_one_line_for_any_answer(model, tmp_path, capfd):
    model.engine.reply = [*"a\n\u2028\x85é".encode(), 257]
    assert main(["run", "--batch", write(tmp_path / "in", "one")]) == 0
    out = capfd.readouterr().out
    assert len(out.splitlines()) == 1 and json.loads(out)["text"] == "a\n\u2028\x85é"


def test_a_prompt_that_cannot_be_answered_has_an_error_and_the_others_are_answered(model, tmp_path, capfd):
    assert main(["run", "--batch", write(tmp_path / "in", "one", "x" * 5000, "three")]) == 1
    out, err = capfd.readouterr()
    assert ["text" in r for r in records(out)] == [True, False, True]
    assert "context holds 4096" in records(out)[1]["error"]
    assert "1 that failed" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "line, words",
    [
        ("# no json\n", "line 2: expected a text or an object as JSON"),
        (5, "line 2: expected a text or an object, found int"),
        ({}, "either prompt or messages, found none"),
        ({"prompt": "a", "messages": []}, "found both"),
        ({"prompt": 5}, "to be texts"),
        ({"prompt": "a", "temp": 0}, "found 'temp'"),
        ({"messages": [{"role": "user"}]}, "role and content"),
        ({"messages": [{"role": "user", "content": "a"}], "system": "b"}, "put it into the messages"),
        ({"prompt": "a", "params": {"x": 1}}, "an object of texts"),
        ({"prompt": "a", "params": {"x": "1"}}, "expected --template"),
        ({"prompt": ""}, "no prompt"),
    ],
)
def test_a_line_that_is_wrong_is_named_before_the_first_answer(model, tmp_path, capfd, line, words):
    assert main(["run", "--batch", write(tmp_path / "in", "one", line)]) in (1, 2)
    out, err = capfd.readouterr()
    assert out == "" and words in err and "line 2" in err and err.count("\n") == 1
    assert model.engine.calls == []


def test_several_answers_at_a_time_come_in_order(tmp_path):
    lines = [f"Say {i}" if i % 4 else "x" * 40_000 if i == 8 else f"What is {i} plus 3?" for i in range(30)]
    questions = write(tmp_path / "in", *lines)
    one, four = (small("--temp", "0", "-n", "20", "--batch", questions, *more) for more in ([], ["--parallel", "4"]))
    assert one.returncode == four.returncode == 1  # for the long one
    assert "context holds" in records(four.stdout)[8]["error"]
    assert [r["line"] for r in records(four.stdout)] == list(range(1, 31))
    same = [a == b for a, b in zip(records(one.stdout), records(four.stdout), strict=True)]
    assert sum(same) >= 28  # last bits may differ, and with them a word


def test_as_many_as_memory_holds_are_answered_at_a_time_with_the_bytes_of_one(tmp_path):
    lines = [f"Say {i}" if i % 4 else f"What is {i} plus 3?" for i in range(20)]
    questions = write(tmp_path / "in", *lines)
    one, several = (small("--seed", "3", "-n", "20", "--batch", questions, *more) for more in (["--parallel", "1"], []))
    assert one.stdout == several.stdout
    assert [r["line"] for r in records(one.stdout)] == list(range(1, 21))


def test_the_common_beginning_of_prompts_is_evaluated_once(tmp_path, monkeypatch):
    (tmp_path / "text").write_text("The cat sits on the mat and sees a red ball. " * 40)
    questions, evaluated = write(tmp_path / "in", *(f"Question {i}? " * 20 for i in range(9))), []
    evaluate = Session._evaluate
    monkeypatch.setattr(Session, "_evaluate", lambda self, ids: evaluated.append(len(ids)) or evaluate(self, ids))
    args = ["run", "-n", "2", "--seed", "1", "-f", str(tmp_path / "text"), "--batch", questions, "-o"]
    assert main([*args, str(tmp_path / "several")]) == 0
    together = sum(evaluated)
    assert main([*args, str(tmp_path / "one"), "--parallel", "1"]) == 0
    assert (tmp_path / "several").read_bytes() == (tmp_path / "one").read_bytes()
    assert together < 4 * max(evaluated)


@pytest.mark.parametrize("contexts, sessions", [(20, 8), (3.5, 3)])
def test_contexts_that_nobody_asked_for_take_no_memory_from_the_weights(contexts, sessions, tmp_path, no_other_model):
    path, ctx = tiny.tiny_gguf(tmp_path / "m.gguf"), 1 << 22
    with Model.load(path, ctx=ctx) as model:
        one = kvcache.nbytes(model.config, ctx)
        needed = plan_residency(model.gguf, model.config, ctx, None, None, "auto").nbytes
    with Model.load(path, ctx=ctx, memory=int(needed + (contexts - 1) * one), more_sessions=7) as model:
        assert model.sessions == sessions
        assert not model.engine.fetches
    with Model.load(path, ctx=ctx, experts="slots", more_sessions=7) as model:
        assert model.sessions == 1


def test_several_at_a_time_need_a_file_of_prompts(model, tmp_path, capfd):
    assert main(["run", "--parallel", "2", "hi"]) == 2
    assert "--batch" in capfd.readouterr().err
    assert main(["run", "--parallel", "2", "--batch", "-"]) == 2
    assert "expected a file" in capfd.readouterr().err


@pytest.mark.slow
def test_a_thousand_prompts_killed_many_times_are_what_they_are_in_one_run(tmp_path):
    lines = [f"What is {i} plus {i % 7}?" if i % 3 else {"prompt": f"Say {i}", "id": i} for i in range(1000)]
    command = ["run", "--batch", write(tmp_path / "in", *lines), "--seed", "1", "-n", "12"]
    command = [sys.executable, "-m", "llamacli", *command, "-o"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True)
    random, kills, out = np.random.default_rng(0), 0, tmp_path / "killed"
    while True:
        process = subprocess.Popen([*command, str(out)])
        before = out.stat().st_size if out.exists() else 0
        wanted = before + random.integers(1, 20_000)
        while process.poll() is None and (not out.exists() or out.stat().st_size < wanted):
            time.sleep(0.01)
        process.kill()
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
    assert kills >= 5
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()
    assert [r["line"] for r in records(out.read_text())] == list(range(1, 1001))


def test_a_batch_that_is_killed_goes_on_where_it_stopped(tmp_path):
    questions, out = write(tmp_path / "in", *({"prompt": f"question {i}", "id": i} for i in range(60))), tmp_path / "out"
    command = fake("run", "--batch", questions, "-o", str(out), reply="line\nother", delay="0.001")
    kills, before = 0, -1
    while True:
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        while process.poll() is None and (not out.exists() or out.stat().st_size <= before + 500 * (kills + 1)):
            time.sleep(0.005)
        process.kill()
        assert process.stderr.read() == b""
        process.wait()
        if process.returncode == 0 and kills >= 3:
            break
        assert process.returncode in (-signal.SIGKILL, 0)  # 0: on a busy machine it may be through before it is killed
        kills, before = kills + 1, out.stat().st_size
        if kills == 2 or process.returncode == 0:  # as a full disk or a lost machine would leave it
            os.truncate(out, before - 20)
    found = records(out.read_text())
    assert [(r["line"], r["id"], r["text"]) for r in found] == [(i + 1, i, "line\nother") for i in range(60)]
    done = subprocess.run(command, capture_output=True)
    assert (done.returncode, done.stdout, records(out.read_text())) == (0, b"", found)


def test_results_of_something_else_are_left_alone(model, tmp_path, capfd):
    questions, out = write(tmp_path / "in", "one", "two"), tmp_path / "out"
    assert main(["run", "--batch", questions, "-o", str(out)]) == 0
    good = out.read_text()
    first, second = good.splitlines(keepends=True)
    for other in ("notes", "notes\n", first + first, second, good + first, first + "[]\n", first + '{"line": 3, "te', "{}\n"):
        out.write_text(other)
        assert main(["run", "--batch", questions, "-o", str(out)]) == 1
        assert out.read_text() == other
        assert "expected the results of this batch" in capfd.readouterr().err
    out.write_text(good)
    assert main(["run", "--batch", write(tmp_path / "in", "one", "changed"), "-o", str(out)]) == 1
    assert out.read_text() == good


@pytest.mark.parametrize(
    "before, now",
    [
        (["-s", "be kind"], ["-s", "be short"]),
        ([], ["-s", "be short"]),
        (["Translate:"], ["Sum up:"]),
        (["--template", "OLD"], ["--template", "NEW"]),
        (["--template", "OLD", "--param", "x=1"], ["--template", "OLD", "--param", "x=2"]),
        (["--raw"], []),
    ],
    ids=str,
)
def test_results_to_another_prompt_are_not_taken_for_those_of_this_run(model, tmp_path, capfd, before, now):
    (tmp_path / "OLD").with_suffix(".toml").write_text('prompt = "{{input}} {{x}}"\n[defaults]\nx = 0\n')
    (tmp_path / "NEW").with_suffix(".toml").write_text('prompt = "{{input}}, please"\n')
    questions, out = write(tmp_path / "in", "one", "two"), tmp_path / "out"

    def run(words):
        words = [str(tmp_path / f"{word}.toml") if word in ("OLD", "NEW") else word for word in words]
        return main(["run", "--batch", questions, "-o", str(out), *words])

    assert run(before) == 0
    good = out.read_text()
    assert run(before) == 0
    assert run(now) == 1
    assert out.read_text() == good
    assert (
        "expected the results of this batch, found for line 1 one to another text, picture, template or system prompt"
        in capfd.readouterr().err
    )


def test_of_another_file_no_more_is_read_than_tells_it_apart(model, tmp_path, capfd):
    out = tmp_path / "out"
    with open(out, "wb") as file:
        file.truncate(300 << 20)  # a hole: one line of zeros
    tracemalloc.start()
    try:
        assert main(["run", "--batch", write(tmp_path / "in", "one"), "-o", str(out)]) == 1
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()
    assert "expected the results of this batch" in capfd.readouterr().err
    assert out.stat().st_size == 300 << 20


@pytest.mark.parametrize("name", ["/dev/null", "/dev/full", "/dev/zero", "fifo"])
def test_results_go_to_a_file_and_to_nothing_else(model, tmp_path, name, capfd):
    """A device may be read without end and does not store what was written."""
    os.mkfifo(tmp_path / "fifo")
    assert main(["run", "--batch", write(tmp_path / "in", "one"), "-o", str(tmp_path / name)]) == 1
    assert "found a device or a pipe" in capfd.readouterr().err


def test_a_file_system_without_locks_takes_results_too(model, tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert main(["run", "--batch", write(tmp_path / "in", "one"), "-o", str(tmp_path / "out")]) == 0
    assert len(records((tmp_path / "out").read_text())) == 1


@pytest.mark.parametrize("id", ["NaN", "-Infinity", "1e999"])
def test_a_result_is_json_for_every_reader(model, tmp_path, id, capfd):
    (tmp_path / "in").write_text(f'{{"prompt": "one", "id": {id}}}')
    assert main(["run", "--batch", str(tmp_path / "in")]) == 1
    assert f"the number {id}" in capfd.readouterr().err


def test_half_of_a_pair_in_an_id_comes_back(model, tmp_path, capfd):
    """JSON can write it, UTF-8 cannot."""
    (tmp_path / "in").write_text(r'{"prompt": "one", "id": "\ud800"}')
    assert main(["run", "--batch", str(tmp_path / "in"), "-o", str(tmp_path / "out")]) == 0
    assert main(["run", "--batch", str(tmp_path / "in")]) == 0
    assert [r["id"] for r in records((tmp_path / "out").read_text() + capfd.readouterr().out)] == ["\ud800"] * 2


def test_two_runs_do_not_write_to_one_file(tmp_path):
    questions, out = write(tmp_path / "in", *["hi"] * 1000), tmp_path / "out"
    with start("run", "--batch", questions, "-o", str(out), delay="0.01") as first:
        while not out.exists() or not out.stat().st_size:
            time.sleep(0.01)
        second = subprocess.run(fake("run", "--batch", questions, "-o", str(out)), capture_output=True)
        first.send_signal(signal.SIGINT)
        assert first.wait() == -signal.SIGINT
    assert second.returncode == 1 and b"another that writes to it" in second.stderr
    assert all(r["text"] == REPLY for r in records(out.read_text()))


def test_lines_from_a_pipe_are_answered_as_they_come():
    for name in ("-", "/dev/stdin"):
        with start("run", "--batch", name, stdin=subprocess.PIPE) as process:
            for text in (b'"a"\n', b'{"prompt": "b"}\n'):
                process.stdin.write(text)
                process.stdin.flush()
                assert name != "-" or json.loads(process.stdout.readline())["text"] == REPLY
            process.stdin.close()
            assert len(records(process.stdout.read())) == 2 * (name != "-")
        assert process.returncode == 0


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs /dev/zero")
def test_a_line_without_end_is_refused(model, capfd):
    assert main(["run", "--batch", "/dev/zero"]) == 1
    assert "line 1: expected less than 16 MB" in capfd.readouterr().err


def test_an_answer_does_not_depend_on_the_one_before(tmp_path):
    """The bytes are equal, although the prompts' common beginning is evaluated once."""
    with Model.load(tiny.tiny_gguf(tmp_path / "tiny.gguf", chunk=64), threads=2, ctx=512) as model:
        random, reused = np.random.default_rng(0), 0
        shared = random.integers(0, 256, 300).tolist()
        session = Session(model.engine, model.tokenizer, 512, exact=True)
        for n in (300, 260, 299, 5, 100, 280, 64, 63, 200):
            ids = shared[:n] + random.integers(0, 256, 9).tolist()
            found = session.sync(ids)
            assert np.array_equal(found, Session(model.engine, model.tokenizer, 512).sync(ids))
            reused += session.stats.cached_tokens
            list(session.stream(ids, Sampler(temp=0), 3))
    assert reused > 300
