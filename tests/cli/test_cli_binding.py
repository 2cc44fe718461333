"""Answers bound by --schema, --grammar and --choice: one that is cut says so, and what cannot bind is refused."""

import json
import subprocess
import sys

import pytest
from batching import small, write

from llamacli.cli import main


def test_an_answer_that_is_cut_inside_its_json_says_so():
    schema = '{"type": "object", "properties": {"a": {"type": "string", "minLength": 40}}, "required": ["a"]}'
    done = small("--schema", schema, "-n", "5", "--json", "Hi")
    assert done.returncode == 1
    assert json.loads(done.stdout)["finish_reason"] == "length"
    assert "the answer is cut" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("schema", ['{"const": [1, 2, 3]}', '{"type": "integer", "minimum": 10000000}'])
def test_an_answer_cut_in_forced_tokens_or_in_a_number_is_an_error(schema, tmp_path):
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
def test_an_invalid_constraint_is_refused_before_the_model_loads(capfd, args, words):
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
