"""`run` with tools: permission, output streams, and tools that hang, die or print escapes."""

import json
import signal
import sys
import time
from pathlib import Path

import pytest
from fakes import Answers, fake, start
from terminal import Terminal

from llamacli.cli import main

HERE = Path(__file__).parent
CITY = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}
OSLO = '{"name": "weather", "parameters": {"city": "Oslo"}}'
FUNCTIONS = """
import time
def weather(city: str) -> str:
    "The weather."
    return "sunny in " + city + "\\x1b[2J"
def hang():
    time.sleep(60)
"""


@pytest.fixture
def functions(tmp_path):
    (tmp_path / "f.py").write_text(FUNCTIONS)
    return str(tmp_path / "f.py")


@pytest.fixture
def definitions(tmp_path):
    def write(*tools):
        (tmp_path / "t.json").write_text(json.dumps(tools))
        return str(tmp_path / "t.json")

    return write


def answers(model, *replies):
    model.engine = Answers(*replies)


def test_functions_run_where_they_are_allowed_and_stdout_has_the_answer_alone(model, functions, capfd):
    answers(model, f"Wait.\n{OSLO}", "Sunny.")
    assert main(["run", "-v", "--functions", functions, "--allow-tools", "weather", "Oslo?"]) == 0
    out, err = capfd.readouterr()
    assert out == "Wait.\nSunny.\n"
    assert r'weather(city="Oslo"): sunny in Oslo\x1b[2J' in err
    assert "\x1b" not in err


def test_in_a_pipe_only_allowed_tools_run(model, functions, capfd):
    assert main(["run", "--functions", functions, "Oslo?"]) == 2
    assert "--allow-tools weather,hang lets them run" in capfd.readouterr().err
    assert main(["run", "--functions", functions, "--allow-tools", "wether", "Oslo?"]) == 2
    assert "expected names among weather, hang, or all" in capfd.readouterr().err
    answers(model, OSLO, "No.")
    assert main(["run", "--json", "--functions", functions, "--allow-tools", "hang", "Oslo?"]) == 0
    record = json.loads(capfd.readouterr().out)
    assert record["text"] == "No."
    assert record["tool_calls"][0]["result"] == "error: the user does not allow this call"


def test_a_function_that_hangs_is_ended_and_the_answer_goes_on(model, functions, capfd):
    answers(model, "[hang()]", "It hangs.")
    assert main(["run", "--json", "--functions", functions, "--allow-tools", "all", "--tool-timeout", "0.5", "x"]) == 0
    record = json.loads(capfd.readouterr().out)
    assert record["tool_calls"] == [
        {"name": "hang", "parameters": {}, "result": "error: no result after 0.5 seconds", "failed": True}
    ]
    assert record["text"] == "It hangs."
    assert record["usage"]["completion_tokens"] == len("[hang()]") + len("It hangs.")


def test_calls_to_tools_without_a_command_are_the_answer(model, definitions, capfd, tmp_path):
    file = definitions(CITY)
    answers(model, f"I ask. {OSLO}")
    assert main(["run", "--tools", file, "Oslo?"]) == 0
    assert capfd.readouterr().out == f"I ask. \n{OSLO}\n"
    answers(model, OSLO)
    assert main(["run", "--tools", file, "-o", str(tmp_path / "out"), "Oslo?"]) == 0
    assert (tmp_path / "out").read_text() == f"{OSLO}\n"
    answers(model, OSLO)
    assert main(["run", "--tools", file, "--json", "Oslo?"]) == 0
    record = json.loads(capfd.readouterr().out)
    assert (record["finish_reason"], record["tool_calls"]) == ("tool_calls", [json.loads(OSLO)])


def test_a_command_is_a_tool(model, definitions, capfd):
    code = "import json, sys; print(json.load(sys.stdin)['city'].upper())"
    answers(model, OSLO, "Done.")
    file = definitions({**CITY, "command": [sys.executable, "-c", code]})
    assert main(["run", "-v", "--tools", file, "--allow-tools", "all", "Oslo?"]) == 0
    assert 'weather(city="Oslo"): OSLO' in capfd.readouterr().err


def test_a_server_from_the_common_file_is_used(model, tmp_path, capfd):
    server = {"command": sys.executable, "args": [str(HERE.parent / "tools" / "mcp_server.py")]}
    (tmp_path / "mcp.json").write_text(json.dumps({"mcpServers": {"test": server}}))
    answers(model, "[add(a=40, b=2)]", "42.")
    assert main(["run", "-v", "--tools", str(tmp_path / "mcp.json"), "--allow-tools", "add", "x"]) == 0
    out, err = capfd.readouterr()
    assert (out, "add(a=40, b=2): 42" in err) == ("42.\n", True)


def test_the_limit_of_rounds_is_reported(model, functions, capfd):
    answers(model, OSLO, OSLO)
    assert main(["run", "--functions", functions, "--allow-tools", "all", "--tool-rounds", "1", "x"]) == 0
    assert "after 1 rounds of calls; --tool-rounds allows more" in capfd.readouterr().err


@pytest.mark.parametrize(
    "args",
    [
        ["--allow-tools", "all"],
        ["--tools", "/no/such"],
        ["--functions", "/no/such.py"],
        ["--functions", "F", "--raw"],
        ["--functions", "F", "--choice", "a,b"],
        ["--tool-timeout", "0"],
        ["--functions", "F", "--functions", "F", "--allow-tools", "all"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_one_line(args, model, functions, capfd):
    assert main(["run", *(functions if word == "F" else word for word in args), "x"]) in (1, 2)
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "expected" in err or "exclude" in err


@pytest.fixture
def terminal():
    open_ones = []

    def start(*args, reply):
        open_ones.append(Terminal(fake(*args, reply=reply), columns=100))
        return open_ones[-1]

    yield start
    for each in open_ones:
        each.close()


def test_at_a_terminal_each_call_is_asked_for(terminal, functions):
    """The miniature model repeats its answer, a call, until the limit of rounds."""
    reply = "Hm.\n" + OSLO.replace("Oslo", "Os\\u001blo")
    t = terminal("run", "--functions", functions, "--tool-rounds", "3", "Oslo?", reply=reply)
    question = r'call weather(city="Os\u001blo")? [y]es, [n]o, [a]lways:'
    t.wait(question)
    t.type("n\n")
    t.wait("the user does not allow this call")
    t.wait(question, times=2)
    t.type("always\n")
    t.wait(r"sunny in Os\x1blo\x1b[2J", times=2)
    t.wait("after 3 rounds of calls")
    assert t.text.count("call weather") == 2
    assert t.ends() == 0


def test_all_of_a_call_is_shown_before_it_is_allowed(terminal, functions):
    end = "rm -rf the end"
    t = terminal("run", "--functions", functions, "x", reply=OSLO.replace("Oslo", "x" * 2000 + end))
    t.wait("[a]lways:")
    assert end in t.text.replace("\n", "")
    t.type("n\n")


def test_ctrl_c_ends_a_tool_and_the_program(functions, tmp_path):
    Path(functions).write_text(FUNCTIONS.replace("time.sleep", f"open({str(tmp_path / 'began')!r}, 'w').close(); time.sleep"))
    process = start("run", "--functions", functions, "--allow-tools", "all", "x", reply="[hang()]")
    while not (tmp_path / "began").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(300) == -signal.SIGINT


def test_a_call_can_be_required(definitions, capfd):
    """With the small model, which would not call a tool by itself."""
    city = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
    tools = ["--tools", definitions(CITY | {"parameters": city}), "--tool-choice", "weather"]
    assert main(["run", "--no-stdin", *tools, "--seed", "1", "Hi"]) == 0
    call = json.loads(capfd.readouterr().out)
    assert call["name"] == "weather" and call["parameters"]["city"] in ("Oslo", "Rome")


# chat


def test_a_chat_asks_before_each_call_and_goes_on(terminal, functions, tmp_path):
    reply = "Hm **so**.\n" + OSLO
    t = Terminal(
        fake("chat", "--functions", functions, "--tool-rounds", "2", reply=reply), columns=100, XDG_STATE_HOME=str(tmp_path)
    )
    t.wait("ctx 0 of")
    t.type("Oslo?\r")
    t.wait('call weather(city="Oslo")? [y]es, [n]o, [a]lways:')
    t.type("y\n")
    t.wait(r"sunny in Oslo\x1b[2J")
    t.wait("call weather", times=2)
    t.type("n\n")
    t.wait("the user does not allow this call", "stopped at the --tool-rounds limit")
    assert "**so**" not in t.text
    assert t.text.count("Hm so.") == 3
    t.type("more\r")
    t.wait("call weather", times=3)
    t.type("\x03")
    t.wait("stopped by Ctrl-C", "Ask something, or /help")
    t.type("/exit\r")
    assert t.ends() == 0
    t.close()


def test_a_piped_chat_runs_what_is_allowed(functions):
    process = start(
        "chat", "--functions", functions, "--allow-tools", "all", "--tool-rounds", "1", "Oslo?", reply="Hm.\n" + OSLO
    )
    assert process.stdout.read() == b"Hm.\nHm.\n"
    assert process.wait(300) == 0
    refused = start("chat", "--functions", functions, "Oslo?")
    assert (refused.stdout.read(), refused.wait(300)) == (b"", 2)


def test_a_chat_refuses_tools_without_a_command(definitions):
    process = start("chat", "--tools", definitions(CITY), "Oslo?")
    assert (process.wait(300), process.stderr.read().count(b"expected tools that run here")) == (2, 1)
