"""Batches, templates, bound answers: every line once and in order, whatever kills the run; what is wrong is named at once."""

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
import tiny
from fakes import REPLY, fake, prompt_of, start

from llamacli import Model
from llamacli.cli import main
from llamacli.cpu import kvcache
from llamacli.plan.placement import plan_residency
from llamacli.session import Session
from llamacli.text.sampler import Sampler


def write(path, *lines):
    path.write_text("".join(line if isinstance(line, str) and line[:1] == "#" else json.dumps(line) + "\n" for line in lines))
    return str(path)


def records(text):
    return [json.loads(line) for line in text.splitlines()]


def prompts_of(model):
    """What the engine was asked at the start of each answer."""
    return [bytes(t for t in ids if t < 256).decode() for _, ids in model.engine.calls if len(ids) > 1]


# batches


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


def test_a_result_is_one_line_whatever_is_said(model, tmp_path, capfd):
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


def test_what_all_prompts_begin_with_is_evaluated_once(tmp_path, monkeypatch):
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
    """A device can be read without end, and none keeps what it was given."""
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
    """To the last bit, though what the prompts share is evaluated once."""
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


# templates


@pytest.fixture
def templates(tmp_path, monkeypatch):
    """A folder for templates, as a function that writes one."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    folder = tmp_path / "config" / "llamacli" / "templates"
    folder.mkdir(parents=True)

    def add(name, text):
        (folder / f"{name}.toml").write_text(text)
        return folder / f"{name}.toml"

    return add


REVIEW = """
system = "You know {{ language }}."
prompt = "Review for {{what}}:\\n{{input}}\\nThat was {{language}}."
[defaults]
what = "mistakes"
language = "C"
"""


def test_a_template_is_filled_in(model, templates):
    templates("review", REVIEW)
    assert main(["run", "--template", "review", "--param", "language=Rust {{what}}", "fn", "main"]) == 0
    assert prompt_of(model) == "s\nYou know Rust {{what}}.u\nReview for mistakes:\nfn main\nThat was Rust {{what}}."


def test_a_template_may_be_a_file_and_need_no_input(model, tmp_path):
    (tmp_path / "t.toml").write_text('prompt = "A joke about {{n}} cats."\n[defaults]\nn = 3')
    assert main(["run", "--template", str(tmp_path / "t.toml")]) == 0
    assert prompt_of(model) == "u\nA joke about 3 cats."


def test_input_that_has_no_place_comes_last_and_the_option_is_the_system_prompt(model, templates):
    templates("t", 'prompt = "Sum up."\nsystem = "theirs"')
    assert main(["run", "-s", "mine", "--template", "t", "text"]) == 0
    assert prompt_of(model) == "s\nmineu\nSum up.\n\ntext"


def test_a_line_of_a_batch_may_have_parameters(model, templates, tmp_path, capfd):
    templates("review", REVIEW)
    lines = [{"prompt": "x", "params": {"what": "style"}}, "y"]
    assert main(["run", "--template", "review", "--param", "language=C++", "--batch", write(tmp_path / "in", *lines)]) == 0
    assert [p.split("u\n")[1] for p in prompts_of(model)] == [
        "Review for style:\nx\nThat was C++.",
        "Review for mistakes:\ny\nThat was C++.",
    ]


@pytest.mark.parametrize(
    "text, args, words",
    [
        (None, [], "no .*mine.toml"),
        ("prompt = ", [], "expected TOML"),
        ("prompt = 5", [], "expected prompt and system as texts"),
        ("system = 'x'", [], "expected prompt"),
        ("prompt = 'a'\ntemp = 0", [], "found 'temp'"),
        ("prompt = 'a'\ndefaults = 5", [], "defaults as a table"),
        ("prompt = 'a'\n[defaults]\nx = []", [], "found x"),
        ("prompt = '{{x}}'", [], "expected --param x="),
        ("prompt = '{{input}}'", [], "expected a prompt, -f FILE or a pipe"),
        ("prompt = '{{size}}'", ["--param", "sise=5"], "found sise; did you mean size"),
        ("prompt = 'a'", ["--param", "x"], "expected NAME=VALUE"),
        ("prompt = '{{input}}'", ["--param", "input=x"], "another name"),
        ("prompt = 'a'\nsystem = 'b'", ["--raw"], "--raw"),
    ],
)
def test_a_template_that_does_not_fit_is_one_line(model, templates, capfd, text, args, words):
    if text is not None:
        templates("mine", text)
    assert main(["run", "--template", "mine", *args]) in (1, 2)
    err = capfd.readouterr().err
    assert re.search(words, err) and err.count("\n") == 1 and "bug" not in err


def test_parameters_need_a_template(model, capfd):
    assert main(["run", "--param", "a=b", "hi"]) == 2
    assert "--template" in capfd.readouterr().err


# bound answers


TINY_ARGS = ["run", "--no-stdin", "--seed", "1"]


def small(*args, **how):
    return subprocess.run([sys.executable, "-m", "llamacli", *TINY_ARGS, *args], capture_output=True, text=True, **how)


def test_an_answer_that_is_cut_inside_its_json_says_so():
    schema = '{"type": "object", "properties": {"a": {"type": "string", "minLength": 40}}, "required": ["a"]}'
    done = small("--schema", schema, "-n", "5", "--json", "Hi")
    assert done.returncode == 1
    assert json.loads(done.stdout)["finish_reason"] == "length"
    assert "the answer is cut" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("schema", ['{"const": [1, 2, 3]}', '{"type": "integer", "minimum": 10000000}'])
def test_an_answer_that_is_cut_among_what_is_certain_or_in_a_number_says_so_too(schema, tmp_path):
    done = small("--schema", schema, "-n", "2", "Hi")
    assert done.returncode == 1 and len(done.stdout) < 6 and "the answer is cut" in done.stderr
    done = small("--schema", schema, "-n", "2", "--batch", write(tmp_path / "in", "Hi"))
    assert done.returncode == 1
    record = json.loads(done.stdout)
    assert record["finish_reason"] == "length" and "the answer is cut" in record["error"]


def test_a_choice_and_a_schema_from_a_file_bind(tmp_path):
    (tmp_path / "s.json").write_text('{"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 2, "maxItems": 2}')
    done = small("--schema", str(tmp_path / "s.json"), "Hi")
    assert done.returncode == 0 and set(json.loads(done.stdout)) <= {"a", "b"}
    assert small("--choice", '["x, y", "z"]', "Hi").stdout in ("x, y\n", "z\n")


@pytest.mark.parametrize(
    "args, words",
    [
        (["--schema", '{"not": {}}'], "found not"),
        (["--schema", "{"], "expected JSON"),
        (["--schema", '{"type": "string"}', "--choice", "a"], "exclude each other"),
        (["--choice", "a", "--stop", "x"], "--choice and --stop exclude"),
        (["--choice", "a", "--ignore-eos"], "--choice and --ignore-eos exclude"),
        (["--choice", "a,,b"], "nothing empty"),
        (["--choice", '["a"'], "JSON list"),
    ],
)
def test_what_cannot_bind_is_refused_before_the_model_loads(capfd, args, words):
    assert main(["run", "-m", "/no/such/model.gguf", *args, "hi"]) == 2
    err = capfd.readouterr().err
    assert words in err and err.count("\n") == 1


def test_a_chat_in_a_pipe_is_bound_too_and_says_when_an_answer_is_cut():
    command = [sys.executable, "-m", "llamacli", "chat", "--schema", '{"const": {"a": [1, 2, 3]}}']
    done = subprocess.run(command, input="one\ntwo\n", capture_output=True, text=True)
    assert done.returncode == 0
    assert [json.loads(line) for line in done.stdout.splitlines() if line] == [{"a": [1, 2, 3]}] * 2
    done = subprocess.run([*command, "-n", "4"], input="one\ntwo\n", capture_output=True, text=True)
    assert done.returncode == 1 and "the answer is cut" in done.stderr


# the best of several answers


def test_the_best_is_the_one_with_the_highest_mean_log_probability():
    done = small("--best-of", "5", "--seed", "4", "--temp", "1.5", "-n", "16", "--json", "Name a colour")
    found = json.loads(done.stdout)
    answers = found["answers"]
    assert [a["seed"] for a in answers] == [4, 5, 6, 7, 8]
    assert (found["text"], found["logprob"]) == max(((a["text"], a["logprob"]) for a in answers), key=lambda pair: pair[1])
    assert found["usage"]["completion_tokens"] == sum(a["completion_tokens"] for a in answers)
    for answer in answers[:2]:
        how = "--seed", str(answer["seed"]), "--temp", "1.5", "-n", "16", "--json", "--logprobs", "0"
        alone = json.loads(small(*how, "Name a colour").stdout)
        logprobs = [token["logprob"] for token in alone["logprobs"]["content"]]
        assert (alone["text"], alone["finish_reason"]) == (answer["text"], answer["finish_reason"])
        assert answer["logprob"] == pytest.approx(np.mean(logprobs), abs=1e-5)


def test_the_best_of_several_goes_where_an_answer_goes(model, tmp_path, capfd):
    assert main(["run", "--best-of", "3", "-o", str(tmp_path / "out"), "hi"]) == 0
    assert (tmp_path / "out").read_text() == REPLY + "\n"
    assert main(["run", "--best-of", "3", "-n", "4", "hi"]) == 0
    assert capfd.readouterr().out == REPLY[:4] + "\n"
    assert len(prompts_of(model)) == 2  # a prompt is evaluated once


def test_an_answer_that_is_whole_is_better_than_a_likelier_one_that_is_cut():
    done = small("--choice", "a much longer choice that is cut,no", "--best-of", "6", "--temp", "3", "-n", "2", "--json", "Hi")
    found = json.loads(done.stdout)
    whole = [a for a in found["answers"] if a["finish_reason"] == "stop"]
    assert (done.returncode, found["finish_reason"]) == ((0, "stop") if whole else (1, "length"))


def test_ctrl_c_leaves_the_best_of_what_there_is(model, capfd, monkeypatch):
    steps, forward_each = [], model.engine.forward_each

    def interrupted(*args):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return forward_each(*args)

    monkeypatch.setattr(model.engine, "forward_each", interrupted)
    assert main(["run", "--best-of", "4", "--json", "hi"]) == 130
    found = json.loads(capfd.readouterr().out)
    assert (found["finish_reason"], found["text"], len(found["answers"])) == ("interrupt", REPLY[:5], 4)


@pytest.mark.parametrize(
    "args, words",
    [
        (["--temp", "0"], "--temp above 0"),
        (["--batch", "x"], "--best-of and --batch exclude each other"),
        (["--server", "http://127.0.0.1:1"], "--best-of and --server exclude each other"),
        (["--best-of", "0"], "from 1 to 64"),
    ],
)
def test_best_of_what_makes_no_sense_is_refused(model, capfd, args, words):
    assert main(["run", "--best-of", "2", *args, "hi"]) == 2
    assert words in capfd.readouterr().err
