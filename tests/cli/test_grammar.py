"""The command line's grammar: names, aliases, values from variables and settings, and errors that name the wrong word."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import click
import pytest
from fakes import prompt_of, start

from llamacli import environment
from llamacli.cli import COMMANDS, grammar, inputs, main, options, parser, settings
from llamacli.cli.code import code_blocks

TEXTS = ["run", "tokenize"]


@pytest.fixture
def tiny_model(monkeypatch, tmp_path):
    """A model named `tiny` in the folder of models."""
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "tiny.gguf").touch()
    monkeypatch.setattr(environment, "MODELS", folder)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return folder / "tiny.gguf"


@pytest.fixture
def config(monkeypatch, tmp_path):
    """Write the settings file; returns its path."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    def write(text):
        file = tmp_path / "llamacli" / "config.toml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        return file

    return write


# names of other programs


@pytest.mark.parametrize(
    "words, setting, value",
    [
        (["--temperature", "0.25"], "temp", 0.25),
        (["--top_k", "7"], "top_k", 7),
        (["--top_p", "0.5"], "top_p", 0.5),
        (["--min_p", "0.1"], "min_p", 0.1),
        (["--typical", "0.5"], "typical_p", 0.5),
        (["--presence-penalty", "-1.5"], "presence_penalty", -1.5),
        (["--repeat-last-n", "-1"], "repeat_last_n", -1),
        (["--dynatemp-exp", "2"], "dynatemp_exponent", 2.0),
        (["--mirostat", "2"], "mirostat", 2),
        (["--ignore-eos"], "ignore_eos", True),
    ],
)
def test_sampling_options_may_have_the_names_of_other_programs(model, words, setting, value):
    assert main(["run", *words, "hi"]) == 0
    assert model.settings[setting] == value


def test_lengths_prompts_and_stops_may_have_the_names_of_other_programs(model, capfd):
    assert main(["run", "--n-predict", "5", "--ctx-size", "2K", "-sys", "be kind", "-p", "two words", "-st"]) == 0
    assert capfd.readouterr().out == "first\n"
    assert prompt_of(model) == "s\nbe kindu\ntwo words"
    assert main(["run", "-n", "-1", "-r", "\nsec", "hi"]) == 0
    assert capfd.readouterr().out == "first line\n"


def test_aliases_are_not_in_the_help(capfd):
    main(["run", "--help"])
    out = capfd.readouterr().out
    assert "--temp " in out
    assert not any(name in out for name in ("--temperature", "--n-predict", "-sys,", "--top_k"))


def test_a_flag_may_come_before_the_command_and_help_may_be_a_command(model, capfd):
    assert main(["-v", "run", "-n", "3", "hi"]) == 0
    assert "3 answered" in capfd.readouterr().err
    assert main(["help", "bench"]) == 0
    assert "Usage: llamacli bench" in capfd.readouterr().out
    assert main(["-V"]) == 0


# the model by its name, its file, an option, a word


def test_the_first_word_may_be_the_model_as_in_other_programs(model, tiny_model, monkeypatch, capfd):
    asked = []
    monkeypatch.setattr(options, "find_model", lambda name, console: asked.append(name))
    assert main(["run", "tiny", "What is it?"]) == 0
    assert (asked, prompt_of(model)) == (["tiny"], "u\nWhat is it?")
    assert main(["run", "-v", str(tiny_model), "What?"]) == 0
    assert asked[1] == str(tiny_model)
    assert "by the first word" in capfd.readouterr().err
    assert main(["run", "-m", "other", "tiny", "is a word"]) == 0
    assert asked[2] == "other"


def test_a_models_name_alone_is_questioned(model, tiny_model, capfd):
    assert main(["run", "tiny"]) == 2
    err = capfd.readouterr().err
    assert "llamacli chat -m tiny" in err and "-p tiny" in err
    assert model.engine.calls == []
    assert main(["run", "-p", "tiny"]) == 0
    assert prompt_of(model) == "u\ntiny"


def test_a_word_that_is_no_model_is_a_prompt(model, tiny_model):
    assert main(["run", "tinier", "\0", "x" * 5]) == 0
    assert prompt_of(model) == "u\ntinier \0 xxxxx"


@pytest.mark.parametrize("command", ["inspect", "plan", "bench", "tokenize", "perplexity"])
def test_a_model_is_a_word_or_an_option_but_not_both(command, tiny_model, capfd, monkeypatch, tmp_path):
    (tmp_path / "text").write_text("words")
    text = {"tokenize": ["some text"], "perplexity": ["-f", str(tmp_path / "text")]}.get(command, [])
    for words in (["tiny"], ["-m", "tiny"]):
        assert main([command, *words, *text]) == 1
        assert f"{tiny_model}: " in capfd.readouterr().err  # it was found: an empty file is no GGUF
    if command != "tokenize":
        assert main([command, "tiny", "-m", "tiny", *text]) == 2
        assert "leave one of them out" in capfd.readouterr().err


def test_tokenize_joins_words_and_reads_files(capfd, tmp_path):
    (tmp_path / "text").write_text("hello world")
    printed = []
    for words in (["hello world"], ["hello", "world"], ["-f", str(tmp_path / "text")], ["-p", "hello world", "--json"]):
        assert main(["tokenize", *words]) == 0
        printed.append(json.loads(capfd.readouterr().out))
    assert printed == [printed[0]] * 4
    assert main(["tokenize", "a", "-f", str(tmp_path / "text")]) == 2


# errors


@pytest.mark.parametrize(
    "args, words",
    [
        (["run", "--tempp", "1", "hi"], "--tempp: no such option; did you mean --temp"),
        (["run", "--max-toke", "1", "hi"], "did you mean --max-tokens"),
        (["run", "-n"], "-n: expected a value after it, found none"),
        (["run", "--raw=1", "hi"], "--raw: expected no value"),
        (["run", "--temp", "-1", "hi"], "--temp: expected a number from 0 up, found -1"),
        (["run", "--temperature", "-1", "hi"], "--temperature: expected a number from 0 up, found -1"),
        (["run", "-n", "-5", "hi"], "-n: expected a whole number from 1 up, or -1 for no limit, found -5"),
        (["run", "-n", "many", "hi"], "-n: expected a whole number from 1 up, or -1 for no limit, found 'many'"),
        (["run", "-c", "1.5K", "hi"], "-c: expected a number of tokens"),
        (["run", "--color", "blue", "hi"], "--color: expected auto, always or never, found 'blue'"),
        (["run", "--experts", "slot", "hi"], "did you mean slots?"),
        (["run", "--memory", "24", "hi"], "--memory: expected a size like 48G, 500M or 2GiB, with its unit, found '24'"),
        (["run", "--samplers", "top_k,topp", "hi"], "found 'topp'; did you mean top_p?"),
        (["run", "--samplers", "top_k;top-k", "hi"], "expected each step once, found top_k twice"),
        (["run", "--logit-bias", "15", "hi"], "--logit-bias: expected a token's id and what is added"),
        (["run", "-l", "15+inf", "hi"], "-l: expected a token's id"),
        (["run", "-l", "261+1", "hi"], "--logit-bias: expected an id below 261, found 261"),
        (["run", "--logprobs", "2", "hi"], "--logprobs: expected --json with it"),
        (["quantize", "-m", "a", "b", "Q4_0", "c"], "expected one model, found b and -m a"),
        (["plan", "--memory", "32"], "--memory: expected a size like 48G"),
        (["quantize", "a", "b", "--split-max-size", "4"], "4G, perhaps?"),
        (["run", "--memory", "1M", "--experts", "mapped", "hi"], "--memory: expected --experts slots or auto"),
        (["quantize", "a", "b.gguf", "--type", "Q4KM"], "--type: expected a type, found 'Q4KM'; did you mean Q4_K_M?"),
        (["quantize", "a", "b.gguf", "Q4KM"], "TYPE: expected a type, found 'Q4KM'; did you mean Q4_K_M?"),
        (["quantize", "a", "b.gguf", "Q4_0", "--type", "Q8_0"], "expected one type"),
        (["quantize", "a", "b.gguf", "Q4_0", "4"], "expected [TYPE] as the last word, found one too many: 4"),
        (["quantize"], "expected SRC, found none"),
        (["caht"], "found 'caht'; did you mean chat?"),
        (["What is up?"], "llamacli run 'What is up?'"),
        (["completion", "tcsh"], "bash, zsh or fish"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_parser_errors_are_one_line(model, capfd, args, words):
    assert main(args) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("llamacli: error: ")
    assert words in err
    assert not any(dialect in err for dialect in ("Input should", "Value error", "Error:", "Got unexpected"))


WITHOUT_USE = [  # where nothing obeys the option that the error begins with
    ("tokenize --decode 1,2 --count", "--count: expected a text with it, found --decode"),
    ("tokenize --decode 1,2 --pieces", "--pieces: expected a text"),
    ("tokenize --decode 1,2 --no-bos", "--no-bos: expected a text"),
    ("history show x --format jsonl", "--format: expected history export with it, found show"),
    ("history delete x --json", "--json: expected history list or search with it, found delete"),
    ("history export x --json", "--json: expected history list or search"),
    ("models --dry-run", "--dry-run: expected models pull with it, found list"),
    ("models check --memory 4G", "--memory: expected models pull"),
    ("models remove x --force", "--force: expected models pull"),
    ("models add x.gguf --json", "--json: expected models list, show or pull"),
    ("models show x -a", "-a: expected models list with it, found show"),
    ("bench --layers 3", "--layers: expected --shape with it, found none"),
    ("bench --keep", "--keep: expected --shape"),
    ("bench --fill", "--fill: expected -d above 0 with it"),
    ("config temp 1 --json", "--json: expected nothing to write with it"),
    ("run --cache-limit 5G hi", "--cache-limit: expected --cache with it, found none"),
    ("serve --cache-limit 5G", "--cache-limit: expected --cache"),
    ("chat --no-save --cache", "--no-save and --cache exclude each other"),
    ("chat --continue --resume x", "--continue and --resume exclude each other"),
]


@pytest.mark.parametrize("words, expected", WITHOUT_USE, ids=[words for words, _ in WITHOUT_USE])
def test_an_option_that_nothing_obeys_is_refused(model, capfd, monkeypatch, tmp_path, words, expected):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert main(words.split()) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"llamacli: error: {expected}")


def test_a_limit_of_the_cache_in_the_settings_waits_for_a_cache(model, config):
    config('cache-limit = "5G"\n')
    assert main(["run", "hi"]) == 0


EMPTY = [
    ["run", "-m", "", "hi"],
    ["run", "--memory", "", "hi"],
    ["run", "-f", "", "hi"],
    ["run", "--stop", "", "hi"],
    ["run", "--routing-log", "", "hi"],
    ["run", "-o", "", "hi"],
    ["quantize", "a", ""],
    ["quantize", "", "b"],
    ["quantize", "a", "b", "--imatrix", ""],
    ["quantize", "a", "b", "--type", ""],
    ["perplexity", "-f", "x", "--reference", ""],
    ["imatrix", "-f", "x", "-o", ""],
    ["inspect", ""],
    ["plan", ""],
    ["bench", "--against", ""],
    ["bench", ""],
]


@pytest.mark.parametrize("args", EMPTY, ids=" ".join)
def test_an_empty_value_as_an_unset_variable_gives_is_refused(model, capfd, args):
    assert main(args) == 2
    assert "found ''; a variable that is not set, perhaps?" in capfd.readouterr().err


def test_an_empty_system_prompt_is_one(model):
    assert main(["run", "-s", "", "hi"]) == 0
    assert prompt_of(model) == "u\nhi"


def test_a_number_as_system_prompt_is_noted(model, capfd):
    assert main(["run", "-v", "-s", "42", "hi"]) == 0
    assert "--seed 42 sets the seed" in capfd.readouterr().err


@pytest.mark.parametrize(
    "args, environ, words",
    [
        (["tokenize", "-m", "nosuch", "x"], {}, "check -m"),
        (["tokenize", "--model", "nosuch", "x"], {}, "check --model"),
        (["tokenize", "x"], {"LLAMACLI_MODEL": "nosuch"}, "check LLAMACLI_MODEL"),
        (["inspect", "nosuch"], {}, "check FILE"),
        (["plan", "nosuch"], {}, "check FILE|FOLDER"),
        (["perplexity", "-m", "tiny", "-f", "-", "--reference", "nosuch"], {}, "check --reference"),
        (["tokenize", "-m", "tyny", "x"], {}, "did you mean tiny?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_model_that_is_not_there_is_named_by_what_was_written(tiny_model, capfd, monkeypatch, args, environ, words):
    monkeypatch.setattr("llamacli.cli.perplexity.read_file", lambda name, console: "text")
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert main(args) == 1
    assert words in capfd.readouterr().err


# settings


def test_an_option_comes_before_the_variable_the_file_and_the_model(model, config, monkeypatch):
    config('temp = 0.1\n"top-k" = 5\nsystem = "from the file"\n')
    assert main(["run", "hi"]) == 0
    assert (model.settings["temp"], model.settings["top_k"], model.settings["top_p"]) == (0.1, 5, None)
    assert prompt_of(model) == "s\nfrom the fileu\nhi"
    monkeypatch.setenv("LLAMACLI_TEMP", "0.2")
    main(["run", "hi"])
    assert model.settings["temp"] == 0.2
    main(["run", "--temp", "0.3", "hi"])
    assert model.settings["temp"] == 0.3


def test_the_files_model_comes_after_the_variable(config, tiny_model, monkeypatch):
    config('model = "tiny"\n')
    quiet = options.Output().console()
    assert options.find_model(None, quiet) == tiny_model
    monkeypatch.setenv("LLAMACLI_MODEL", "/other.gguf")
    assert options.find_model(None, quiet) == Path("/other.gguf")


@pytest.mark.parametrize(
    "text, words",
    [
        ("temp = 'hot'", "config.toml: temp: expected a number from 0 up, found 'hot'"),
        ("temp = -1", "config.toml: temp: expected a number from 0 up, found -1"),
        ("tmep = 1", "config.toml: tmep: expected one of"),
        ("tmep = 1", "did you mean temp?"),
        ("temp = ", "config.toml: expected TOML"),
        ("memory = 24", "config.toml: memory: expected a size like 48G"),
        ("temp = [1]", "config.toml: temp: expected a number from 0 up, found [1]"),
        ("color = true", "config.toml: color: expected auto, always or never, found True"),
        ("max-tokens = true", "config.toml: max-tokens: expected a whole number from 1 up, or -1 for no limit, found True"),
        ("ctx = {}", "config.toml: ctx: expected a number of tokens from 1 up, such as 8192, 128K or 1M, found {}"),
        ("system = ['a']", "config.toml: system: expected some text, found ['a']"),
        ("verbose = 2", "config.toml: verbose: expected true or false, found 2"),
        ("verbose = 'maybe'", "config.toml: verbose: expected true or false, found 'maybe'"),
        ("quiet = [true]", "config.toml: quiet: expected true or false, found [True]"),
    ],
)
def test_a_wrong_setting_names_the_file_and_the_key(model, config, capfd, text, words):
    config(text)
    assert main(["run", "hi"]) == 2
    err = capfd.readouterr().err
    assert words in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "name, value, words", [("TEMP", "hot", "expected a number"), ("QUIET", "maybe", "expected true or false, found 'maybe'")]
)
def test_a_wrong_variable_is_named(model, monkeypatch, capfd, name, value, words):
    monkeypatch.setenv(f"LLAMACLI_{name}", value)
    assert main(["run", "hi"]) == 2
    assert f"LLAMACLI_{name}: {words}" in capfd.readouterr().err


@pytest.mark.parametrize("word, tells", [("1", True), ("yes", True), ("off", False), ("0", False), ("", False)])
def test_a_variable_may_turn_an_option_on(model, monkeypatch, capfd, word, tells):
    monkeypatch.setenv("LLAMACLI_VERBOSE", word)
    assert main(["run", "hi"]) == 0
    assert ("prompt tokens" in capfd.readouterr().err) == tells


def test_a_settings_file_that_cannot_be_read_is_not_passed_over(model, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "llamacli" / "config.toml").mkdir(parents=True)
    for args in (["run", "hi"], ["config", "temp"], ["config", "temp", "0.3"]):
        assert main(args) == 2
        err = capfd.readouterr().err
        assert "config.toml: expected a file of settings, found: Is a directory" in err and err.count("\n") == 1


def test_settings_that_do_not_go_together_with_an_option_give_way(model, config):
    config('system = "kind"\nmemory = "1G"\n')
    assert main(["run", "--raw", "--experts", "mapped", "hi"]) == 0
    assert model.engine.calls[0][1] == [256, *b"hi"]


def test_config_writes_what_it_shows_and_keeps_comments(config, capfd):
    file = config("# mine\ntemp = 0.5  # calm\n")
    assert main(["config", "top-k", "40"]) == 0
    assert main(["config", "model", "scout-tiny"]) == 0
    assert main(["config", "--unset", "top-k"]) == 0
    assert file.read_text() == '# mine\ntemp = 0.5  # calm\nmodel = "scout-tiny"\n'
    assert file.stat().st_mode & 0o777 == 0o600
    assert main(["config", "temp"]) == 0
    assert capfd.readouterr().out == "0.5\n"
    assert main(["config", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["model"] == "scout-tiny"
    assert main(["config"]) == 0
    assert "scout-tiny  file" in capfd.readouterr().out
    for wrong in (["config", "temp", "hot"], ["config", "nosuch", "1"], ["config", "temp", "--unset", "1"]):
        assert main(wrong) == 2
    assert file.read_text().startswith("# mine\ntemp = 0.5")


def test_a_settings_file_that_is_a_link_stays_one(config, tmp_path):
    """Some users keep their settings in a repository and link to it."""
    file, kept = config(""), tmp_path / "kept.toml"
    kept.write_text("temp = 0.5\n")
    file.unlink()
    file.symlink_to(kept)
    assert main(["config", "top-k", "40"]) == 0
    assert file.is_symlink()
    assert kept.read_text() == "temp = 0.5\ntop-k = 40\n"


def test_settings_that_cannot_be_written_leave_what_was(config, capfd, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    file = config("temp = 0.5\n")
    monkeypatch.setattr(os, "replace", full)
    assert main(["config", "top-k", "40"]) == 1
    assert "No space left on device" in capfd.readouterr().err
    assert file.read_text() == "temp = 0.5\n"
    assert [*file.parent.iterdir()] == [file]


def test_every_setting_is_an_option_of_run():
    run_options = {name for p in parser().get_command(None, "run").params for name in p.opts}
    assert {f"--{key}" for key in settings.known()} <= run_options


# where the answer goes


def test_an_answer_can_go_to_a_new_file(model, tmp_path, capfd):
    out = tmp_path / "out.txt"
    assert main(["run", "-o", str(out), "hi"]) == 0
    assert capfd.readouterr().out == ""
    assert out.read_text() == "first line\nsecond line\n"
    assert main(["run", "-o", str(out), "hi"]) == 1
    assert main(["run", "-o", str(tmp_path / "no" / "out"), "hi"]) == 1


@pytest.mark.parametrize("name", ["/proc/self/answer", "n" * 300])
def test_a_file_that_cannot_be_made_is_refused_before_the_answer_is_computed(model, capfd, name):
    assert main(["run", "-o", name, "hi"]) == 1
    assert capfd.readouterr().err.count("\n") == 1
    assert model.engine.calls == []


def test_an_answer_that_finds_no_room_in_its_file_is_not_lost(tmp_path):
    """A limit on file sizes simulates a full disk; the terminal or the pipe can still be written."""
    out = tmp_path / "out.txt"
    process = start("run", "-o", str(out), "hi", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4, 4)))
    said, err = process.communicate(timeout=300)
    assert (process.returncode, said) == (1, b"first line\nsecond line\n")
    assert err.count(b"\n") == 1 and b"the answer went to stdout" in err
    assert not out.exists()


def test_no_stream_writes_once(model, monkeypatch, capfd):
    written = []
    monkeypatch.setattr("os.write", lambda fd, data: (written.append(bytes(data)), len(data))[1])
    assert main(["run", "--no-stream", "hi"]) == 0
    monkeypatch.undo()
    assert written == [b"first line\nsecond line", b"\n"]


@pytest.mark.parametrize(
    "text, blocks",
    [
        ("Here:\n```python\nx = 1\n```\nDone", ["x = 1\n"]),
        ("~~~\na\n```\nb\n~~~\n```\nc\n```", ["a\n```\nb\n", "c\n"]),
        ("````\n```\nnested\n```\n````", ["```\nnested\n```\n"]),
        (
            "1. First\n   ```sh\n   ls\n     -l\n   ```\n2. Then\n\n       ```\n\n> ```\n> quoted\n> ```\n",
            ["ls\n  -l\n", "quoted\n"],
        ),
        ("```\nnever closed", ["never closed"]),
        ("`no` code\n``` x `` y", []),
    ],
)
def test_blocks_of_code(text, blocks):
    assert code_blocks(text) == blocks


@pytest.mark.parametrize(
    "reply, out", [("Here:\n```\nx = 1\n```\n\n```\ny\n```", "x = 1\n"), ("no code", "no code\n")], ids=["code", "none"]
)
def test_extract_writes_the_first_block_of_code_or_the_answer(reply, out):
    assert start("run", "-x", "hi", reply=reply).communicate(timeout=300)[0].decode() == out


# input


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "bom").write_bytes(b"\xef\xbb\xbfHello")
    assert inputs.read_file(str(tmp_path / "bom"), options.Output().console()) == "Hello"


# completion and help


def _complete(line, shell="bash", **environ):
    words = line.split(" ")
    variables = {"_LLAMACLI_COMPLETE": f"{shell}_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    code = "from llamacli.cli import enter; enter()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables, **environ}, capture_output=True, text=True, check=False
    )
    return [text.partition(",")[2] for text in done.stdout.splitlines()]


def test_completion_knows_commands_options_types_and_models(tmp_path):
    assert _complete("llamacli qu") == ["quantize"]
    assert "--temp" in _complete("llamacli run --te")
    assert _complete("llamacli quantize a b --type Q4_K_") == ["Q4_K_M", "Q4_K_S"]
    assert "scout-tiny" in _complete("llamacli run -m sc")
    assert _complete("llamacli run --color a") == ["auto", "always"]
    assert _complete("llamacli config to") == ["top-k", "top-p", "top-n-sigma"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_for_their_shell(shell, capfd):
    assert main(["completion", shell]) == 0
    assert f"_LLAMACLI_COMPLETE={shell}_complete" in capfd.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_groups_and_examples_that_parse(command, capfd):
    assert main([command, "--help"]) == 0
    out = capfd.readouterr().out
    assert "Output and help:" in out
    assert "<" not in out.split("Examples:")[0].replace("<|...|>", "")  # no types of Python
    made = parser().get_command(None, command)
    known = {name for p in made.get_params(click.Context(made)) for name in (*p.opts, *getattr(p, "aliases", ()))}
    for line in made.examples.splitlines():
        for part in line.split("|"):
            words = part.split("#")[0].split()
            if words[:2] == ["llamacli", command]:
                used = {word for word in words[2:] if word.startswith("-") and word != "-" and not word[1:].isdigit()}
                assert used <= known, line


def test_a_parameter_without_a_default_is_required():
    def count(text: Annotated[str, grammar.argument("TEXT", "The text.")], n: Annotated[int, grammar.option("-n", help="N.")]):
        """Count."""
        return text, n

    command = grammar.command(count)
    assert command.main(["word", "-n", "3"], standalone_mode=False) == ("word", 3)
    for words in (["-n", "3"], ["word"]):
        with pytest.raises(click.MissingParameter):
            command.main(words, standalone_mode=False)
