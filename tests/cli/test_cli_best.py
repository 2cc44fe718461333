"""`run --best-of`: the likeliest of several answers, also when it is interrupted."""

import json

import numpy as np
import pytest
from batching import prompts_of, small
from fakes import REPLY

from llamacli.cli import main


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


def test_ctrl_c_writes_the_best_answer_so_far(model, capfd, monkeypatch):
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
def test_best_of_with_contradicting_options_is_refused(model, capfd, args, words):
    assert main(["run", "--best-of", "2", *args, "hi"]) == 2
    assert words in capfd.readouterr().err
