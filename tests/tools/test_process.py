"""Programs that run tools: commands, servers of the Model Context Protocol, the functions of a file. Each may hang or die."""

import json
import os
import resource
import sys
import time
from pathlib import Path

import pytest

from llamacli.errors import UsageError
from llamacli.tools import files, process
from llamacli.tools.process import Server, run_once
from llamacli.tools.tool import ToolError

HERE = Path(__file__).parent


@pytest.fixture
def server():
    made = []

    def start(fault="", **how):
        made.append(Server("test", [sys.executable, str(HERE / "mcp_server.py"), fault], **how))
        return made[-1]

    yield start
    for each in made:
        each.close()


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"


# commands


def test_a_command_gets_its_arguments_as_json_and_answers_with_its_output():
    code = "import json, sys; print('got', json.load(sys.stdin)['a'])"
    assert run_once([sys.executable, "-c", code], {"a": "é"}, 300) == "got é"
    assert run_once(["echo", "hi"], {"a": "x" * 200_000}, 300) == "hi"


@pytest.mark.parametrize(
    "script, words",
    [
        ("sleep 60", "no result after {} seconds"),
        ("sleep 60 & sleep 60", "no result after {} seconds"),
        ("exec >&-; sleep 60", "no result after {} seconds"),
        ("echo oops >&2; exit 3", "ended with code 3: oops"),
        ("kill -9 $$", "died of signal 9"),
        ("yes", "more than 1 MB"),
        ("yes >&2", "no result after {} seconds"),
    ],
)
def test_a_command_that_hangs_dies_or_never_ends_is_an_error_and_is_gone(script, words, tmp_path):
    pids, seconds = tmp_path / "pids", 0.3 if "no result" in words else 60
    while not pids.exists() or not pids.read_text():  # a busy machine may begin later than that
        with pytest.raises(ToolError, match=words.format(seconds)):
            run_once(["bash", "-c", f"echo $$ > {pids}; {script}"], {}, seconds)
        seconds *= 4
    assert gone(int(pids.read_text()))


def test_a_command_that_is_not_there_is_an_error():
    with pytest.raises(ToolError, match="expected to start /no/such"):
        run_once(["/no/such"], {}, 1)


def test_bytes_that_are_no_text_and_escapes_are_passed_on_as_text():
    assert run_once(["printf", r"\x1b[2J\xff\n"], {}, 300) == "\x1b[2J\ufffd"


# servers


@pytest.mark.parametrize("fault", ["", "noise", "old", "stderr"])
def test_a_server_lists_its_tools_and_runs_them(server, fault):
    made = server(fault)
    tools = {tool.name: tool for tool in made.tools()}
    assert list(tools) == ["add", "fail", "sleep", "exit", "where"]
    assert tools["add"].description == "Adds."
    assert tools["add"].run({"a": 2, "b": 3.5}, 300) == "5.5"
    with pytest.raises(ToolError, match="it is broken"):
        tools["fail"].run({}, 300)
    with pytest.raises(ToolError, match="no tool x"):
        made.call("x", {}, 300)
    assert tools["add"].run({"a": 1}, 300) == "1"


def test_a_server_that_hung_or_died_is_started_again(server):
    made = server()
    made.tools()
    for name, words in (("sleep", "no result after 0.2 seconds"), ("exit", "ended with code 3: out of cheese")):
        with pytest.raises(ToolError, match=words):
            made.call(name, {}, 0.2 if name == "sleep" else 60)
        assert made.call("add", {"a": 4}, 300) == "4"


@pytest.mark.parametrize(
    "fault, words, seconds",
    [
        ("dies", "no licence", 300),
        ("hangs", "no result", 1.0),
        ("deaf", "no result", 1.0),
        ("junk", "more than 16 MB", 300),
        ("unsound", "expected a name", 300),
        ("many", "more than 1000 tools", 300),
    ],
)
def test_a_server_that_cannot_begin_is_one_line(server, fault, words, seconds, monkeypatch):
    monkeypatch.setattr(process, "START_SECONDS", seconds)
    with pytest.raises(UsageError, match=words):
        server(fault).tools(seconds)


def test_a_program_that_writes_without_end_ends_no_wait():
    """A server's notifications, for one, while its answer is waited for."""
    made = process.Program(["yes"], "yes")
    try:
        assert made.line(time.monotonic() + 300) == b"y"
        with pytest.raises(TimeoutError):
            while True:
                made.line(0.0)  # a time long past
    finally:
        made.kill()
        made.close()


def test_programs_are_read_with_a_thousand_files_open(tmp_path):
    """As a model in many parts takes them: select() knows descriptors below 1024 only."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], 2048), before[1]))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        assert run_once(["cat"], {"a": 1}, 300) == '{"a": 1}'
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_servers_come_from_the_common_file_and_do_not_see_tokens(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    entry = {"command": sys.executable, "args": [str(HERE / "mcp_server.py")], "env": {"KEY": "x"}}
    servers = {"one": entry, "two": entry, "off": {**entry, "disabled": True}}
    source = files.from_json(json.dumps({"mcpServers": servers}), "mcp.json")
    names = [tool.name for tool in source.tools]
    assert names[:6] == ["add", "fail", "sleep", "exit", "where", "two_add"] and len(names) == 10
    seen = json.loads(source.tools[4].run({}, 300))
    assert "KEY" in seen and "PATH" in seen and "HF_TOKEN" not in seen
    source.close()


@pytest.mark.slow
def test_the_servers_of_the_package_mcp_are_understood(tmp_path):
    """The reference: a server that the protocol's own library runs."""
    pytest.importorskip("mcp")
    file = tmp_path / "server.py"
    file.write_text(
        "try:\n    from mcp.server.fastmcp import FastMCP as Server\n"
        "except ImportError:\n    from mcp.server import MCPServer as Server\nserver = Server('reference')\n"
        "@server.tool()\ndef add(a: int, b: int = 1) -> int:\n    'Adds.'\n    return a + b\nserver.run()\n"
    )
    made = Server("reference", [sys.executable, str(file)])
    (tool,) = made.tools()
    assert (tool.name, tool.description, tool.order) == ("add", "Adds.", ["a", "b"])
    assert tool.run({"a": 41}, 300) == "42"
    with pytest.raises(ToolError):
        tool.run({"a": "x"}, 300)
    made.close()


# functions


def functions(tmp_path, text):
    (tmp_path / "f.py").write_text(text)
    return files.from_python(str(tmp_path / "f.py"))


def test_the_functions_of_a_file_are_tools_that_keep_their_state(tmp_path):
    (tmp_path / "beside.py").write_text("WORD = 'beside'\n")
    source = functions(
        tmp_path,
        "import os, time\nfrom json import dumps\nfrom beside import WORD\ncount = 0\n"
        "def more(by: int = 1) -> int:\n    'Counts.'\n    global count\n    count += by\n    print(by)\n    return count\n"
        "def ask():\n    return input()\ndef hang():\n    time.sleep(60)\ndef die():\n    os._exit(9)\ndef fail():\n    1 / 0\n"
        "def word() -> str:\n    return WORD + '\\x1b[31m'\ndef _hidden():\n    pass\n",
    )
    tools = {tool.name: tool for tool in source.tools}
    assert list(tools) == ["more", "ask", "hang", "die", "fail", "word"]
    assert [tools["more"].run({"by": 2}, 300), tools["more"].run({}, 300)] == ["2", "3"]
    assert tools["word"].run({}, 300) == "beside\x1b[31m"
    for name, words in (("fail", "ZeroDivisionError"), ("ask", "EOFError"), ("hang", "no result after"), ("die", "code 9")):
        with pytest.raises(ToolError, match=words):
            tools[name].run({}, 0.3 if name == "hang" else 60)
    assert tools["more"].run({}, 300) == "1"  # a new process
    source.close()


@pytest.mark.parametrize(
    "text, words",
    [
        ("1 / 0", "ZeroDivisionError.*line 1"),
        ("def", "SyntaxError"),
        ("x = 1", "expected functions"),
        ("import sys; sys.exit(2)", "ends the program"),
        ("def f(*a): pass", "given by name"),
        ("import no_such", "ModuleNotFoundError"),
    ],
)
def test_a_file_that_is_unsound_is_one_line(tmp_path, text, words):
    with pytest.raises(UsageError, match=words) as error:
        functions(tmp_path, text)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_refused_in_one_line():
    with pytest.raises(UsageError, match="expected a Python file, found none"):
        files.from_python("/no/such.py")
