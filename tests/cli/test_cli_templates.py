"""Templates of prompts: places are filled once; errors are one line."""

import re

import pytest
from batching import prompts_of, write
from fakes import prompt_of

from llamacli.cli import main


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
