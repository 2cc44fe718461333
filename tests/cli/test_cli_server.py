"""`run` and `chat` with a real `llamacli serve` and the small model."""

import base64
import json
import re
import signal
import subprocess
import sys
import time

import pytest
from pretending import ANSWER, QUESTION, RUN, pretending, run, said, stream
from terminal import Terminal


@pytest.fixture(scope="module")
def server():
    """The address of a `llamacli serve`."""
    command = [*RUN, "serve", "--port", "0", "--ctx", "8192", "-t", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    yield process.stdout.readline().strip()
    process.kill()
    process.communicate()


def test_the_answer_is_the_one_that_the_model_gives_here(server, capfd):
    assert run("--server", server, QUESTION) == 0
    assert capfd.readouterr() == (ANSWER + "\n", "")


def test_the_address_may_come_from_the_environment_and_have_the_api_s_path(server, capfd, monkeypatch):
    monkeypatch.setenv("LLAMACLI_SERVER", server + "/v1/")
    assert run(QUESTION) == 0
    assert capfd.readouterr().out == ANSWER + "\n"


def test_json_has_the_tokens_that_the_server_counted(server, capfd):
    assert run("--server", server, "--json", "-n", "3", QUESTION) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["finish_reason"] == "length" and found["usage"] == {"prompt_tokens": 17, "completion_tokens": 3}
    assert ANSWER.startswith(found["text"])


def test_settings_and_bindings_reach_the_server(server, capfd):
    number = {"type": "integer", "minimum": 1, "maximum": 9}
    schema = json.dumps({"type": "object", "properties": {"n": number}, "required": ["n"], "additionalProperties": False})
    assert run("--server", server, "--schema", schema, "Say a number.") == 0
    assert isinstance(json.loads(capfd.readouterr().out)["n"], int)
    assert run("--server", server, "--choice", '["red", "a \\"blue\\" one"]', "Which?") == 0
    assert capfd.readouterr().out.strip() in ("red", 'a "blue" one')
    assert run("--server", server, "--stop", "Paris", QUESTION) == 0
    assert capfd.readouterr().out == "The capital of France is \n"
    assert run("--server", server, "-s", "Answer in one word.", "--raw", QUESTION) == 2
    capfd.readouterr()
    assert run("--server", server, "--raw", "The capital of France is", "-n", "1") == 0
    assert capfd.readouterr().out.strip()


def test_a_picture_is_sent_as_its_file_is(server, tmp_path, capfd):
    from PIL import Image

    Image.new("RGB", (336, 336), "red").save(tmp_path / "red.png")
    assert run("--server", server, "--image", str(tmp_path / "red.png"), "-n", "8", "What is this?") == 0
    assert capfd.readouterr().out.strip()
    with pretending(stream(said("red", "stop"))) as (url, asked):
        assert run("--server", url, "--image", str(tmp_path / "red.png"), "What is this?") == 0
        assert run("--server", url, "--image", __file__, "What is this?") == 1
    picture, text = asked[1][1]["messages"][0]["content"]
    sent = base64.b64encode((tmp_path / "red.png").read_bytes()).decode()
    assert picture["image_url"]["url"] == f"data:image/png;base64,{sent}" and text["text"] == "What is this?"


def test_the_client_starts_without_numpy_and_numba(server):
    code = (
        "import sys; from llamacli.cli import main\n"
        f"main(['run', '--server', {server!r}, '--temp', '0', '--no-stdin', {QUESTION!r}])\n"
        "print(sorted({'numpy', 'numba', 'llvmlite', 'tokenizers', 'PIL', 'asyncio', 'rich', 'ssl'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == [ANSWER, "[]"] or done.stdout.splitlines() == [ANSWER, "['ssl']"], done.stderr


def test_ctrl_c_ends_the_request_and_the_server_is_free(server):
    command = [*RUN, "run", "--server", server, "--ignore-eos", "-n", "900", "--no-stdin", "Tell me a story."]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    assert process.wait(300) == -signal.SIGINT
    assert b"Traceback" not in process.stderr.read()
    process.stdout.close(), process.stderr.close()
    until = time.monotonic() + 300
    while active(server):
        assert time.monotonic() < until, "the server still answers"
        time.sleep(0.02)


def active(server):
    """Answers under way, by the server's own counters."""
    from urllib.request import ProxyHandler, build_opener

    text = build_opener(ProxyHandler({})).open(server + "/metrics", timeout=300).read().decode()
    return float(re.search(r"^\S*answers_active (\S+)$", text, re.M)[1])


def test_a_chat_goes_on_after_ctrl_c_and_sends_its_turns(server, tmp_path):
    t = Terminal([*RUN, "chat", "--server", server, "--temp", "0"], XDG_STATE_HOME=str(tmp_path))
    t.wait("ctx 0 of 8192")
    t.type(QUESTION + "\r")
    t.wait(ANSWER)
    t.type("/set ignore_eos on\r")
    t.type("Tell me a story.\r")
    t.wait("Once upon")
    t.type("\x03")
    t.wait("stopped by Ctrl-C")
    t.type("/set ignore_eos off\r")
    t.type("/undo\r")
    t.type("And of Japan?\r")
    t.wait("The capital of Japan is Tokyo.")
    for command in ("/continue", "/ctx 2048", "/model other", "/set dry_sequence_breaker x"):
        t.type(command + "\r")
        t.wait(f"{' '.join(command.split()[:-1]) or command}: expected a model that is loaded here")
    t.type("/show\r")
    t.wait(f"scout-tiny of {server}")
    t.type("\x04")
    t.close()


def test_a_pipe_of_turns_is_answered_by_the_server(server):
    turns = f"{QUESTION}\nAnd of Japan?\n"
    done = subprocess.run(
        [*RUN, "chat", "--server", server, "--temp", "0"], input=turns, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split("\n")[0] == ANSWER and "Tokyo" in done.stdout and done.returncode == 0


def test_a_server_without_tls_is_told_from_one_that_is_not_there(server, capfd):
    assert run("--server", server.replace("http:", "https:"), "Hi") == 1
    assert "expected TLS" in capfd.readouterr().err
