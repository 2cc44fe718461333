"""Options of `run` and `chat` with --server: each is sent to the server, applied here, or refused by name."""

import json

import click
import pytest
from pretending import pretending, run, said, stream

from llamacli.cli import main, parser
from llamacli.text.settings import SETTINGS as SAMPLING

REFUSED = {  # option: its value
    **{"mmproj": "x", "image_tiles": "4", "ctx": "512", "threads": "2", "memory": "4G", "device": "cpu", "gpu_layers": "1"},
    **{"experts": "slots", "kv": "q8_0", "cache": None, "cache_limit": "1G", "kv_file": "x", "cluster": "h:1"},
    **{"cluster_layers": "1", "speculate": None, "routing_log": "x", "dry_sequence_breaker": "x", "logprobs": "1"},
    **{"batch": "x", "parallel": "2", "tool_choice": "required", "bind_tools": None, "best_of": "2"},
}
SETTINGS = {name: default or (1 if isinstance(default, int) else 0.5) for name, (default, _, _) in SAMPLING.items()}
AS_FIELDS = {  # option: its value, and the field that a server is sent
    **{name: (str(value), name, value) for name, value in SETTINGS.items()},
    "temp": ("0.25", "temperature", 0.25),
    "mirostat": ("2", "mirostat", 2),
    "samplers": ("top_k,temp", "samplers", ["top_k", "temperature"]),
    "logit_bias": ("7+1.5", "logit_bias", {"7": 1.5}),
    "ignore_eos": (None, "ignore_eos", True),
    "seed": ("3", "seed", 3),
    "max_tokens": ("9", "max_tokens", 9),
    "stop": ("x", "stop", ["x"]),
    "model": ("m", "model", "m"),
    "grammar": (__file__, "grammar", None),
    "choice": ("a", "grammar", 'root ::= "a"'),
    "schema": ("{}", "response_format", None),
}
IN_MESSAGES = {"system", "system_file", "image", "template", "param", "file", "prompt", "prompt_option", "raw", "question"}
DONE_HERE = {  # what becomes of text, answers and calls in this process
    *("server", "no_stdin", "single_turn", "out", "no_stream", "extract", "as_json", "color", "verbose", "quiet"),
    *("tools", "functions", "allow_tools", "tool_rounds", "tool_timeout", "go_on", "resume", "no_save", "plain"),
}


def named(command, option, value):
    """An option on the command line."""
    context = click.Context(parser())
    found = next(each for each in parser().get_command(context, command).params if each.name == option)
    return [max(found.opts, key=len), *([value] if value is not None else [])]


@pytest.mark.parametrize("command", ["run", "chat"])
def test_every_option_is_obeyed_with_a_server_or_refused_by_its_name(command):
    options = {each.name for each in parser().get_command(click.Context(parser()), command).params} - {"help"}
    assert options <= REFUSED.keys() | AS_FIELDS.keys() | IN_MESSAGES | DONE_HERE


@pytest.mark.parametrize("option", REFUSED)
def test_options_for_a_model_in_this_process_are_refused_by_name(option, capfd):
    words = named("run", option, REFUSED[option])
    more = {"logprobs": ["--json"], "tool_choice": ["--functions", __file__], "bind_tools": ["--functions", __file__]}
    assert run("--server", "http://127.0.0.1:1", "--temp", "1", *more.get(option, ()), *words, "Hi") == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and f"{words[0]} and --server exclude each other" in err


@pytest.mark.parametrize("option", AS_FIELDS)
def test_options_about_the_answer_reach_a_server_as_fields(option, capfd):
    value, field, sent = AS_FIELDS[option]
    with pretending(stream(said("ok", "stop"))) as (url, asked):
        assert main(["run", "--no-stdin", "--server", url, *named("run", option, value), "Hi"]) == 0, capfd.readouterr().err
    found = asked[-1][1][field]
    assert found == sent if sent is not None else found


def test_the_key_goes_to_the_server_and_options_as_fields(capfd, monkeypatch):
    monkeypatch.setenv("LLAMACLI_API_KEY", "secret")
    options = ["--top-k", "5", "--seed", "3", "--logit-bias", "7=-inf", "-n", "9", "--ignore-eos", "-m", "m", "-s", "Be brief."]
    with pretending(stream(said("ok", "stop"))) as (url, asked):
        assert run("--server", url, *options, "Hi") == 0
        assert run("--server", url, "-m", "other", "Hi") == 2
    assert "a model of" in capfd.readouterr().err
    assert all("Authorization: Bearer secret" in head for head, _ in asked)
    body = asked[1][1]
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    wanted = {
        "model": "m",
        "temperature": 0,
        "top_k": 5,
        "seed": 3,
        "logit_bias": {"7": -100},
        "max_tokens": 9,
        "ignore_eos": True,
    }
    assert wanted.items() <= body.items() and body["stream"] is True


def test_none_loads_a_model_here_in_spite_of_the_environment(model, capfd, monkeypatch, nobody):
    monkeypatch.setenv("LLAMACLI_SERVER", f"http://{nobody}")
    assert main(["run", "--server", "none", "-t", "2", "Hi"]) == 0
    assert capfd.readouterr().out == "first line\nsecond line\n"


@pytest.mark.parametrize(
    "address", ["ftp://host", "http://", "http://a b", "http://host:99999", "http://u:p@host", "http://h/?q=1", "hé"]
)
def test_an_invalid_address_is_refused(address, capfd):
    assert run("--server", address, "Hi") == 2
    assert "--server: expected an address" in capfd.readouterr().err


def test_calls_of_tools_run_here_and_their_results_go_back(tmp_path, capfd):
    (tmp_path / "t.py").write_text('def double(n: int) -> int:\n    """Twice n."""\n    return 2 * n\n')
    part = lambda name, text: {
        "choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"name": name, "arguments": text}}]}}]
    }
    call = stream(part("double", '{"n"'), part(None, ": 21}"), {"choices": [{"delta": {}, "finish_reason": "tool_calls"}]})
    answers = [call, stream(said("It is 42.", "stop"))]
    with pretending(lambda c: c.sendall(answers.pop(0))) as (url, asked):
        assert run("--server", url, "--functions", str(tmp_path / "t.py"), "--allow-tools", "all", "Twice 21?") == 0
    assert capfd.readouterr().out == "It is 42.\n"
    assert asked[1][1]["tools"][0]["function"]["name"] == "double"
    asks, result = asked[2][1]["messages"][-2:]
    assert json.loads(asks["tool_calls"][0]["function"]["arguments"]) == {"n": 21}
    assert (result["role"], result["tool_call_id"], result["content"]) == ("tool", asks["tool_calls"][0]["id"], "42")
