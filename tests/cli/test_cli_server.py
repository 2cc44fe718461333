"""`run` and `chat` against a server: a real `llamacli serve` over the small model, and servers that break every rule."""

import base64
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import click
import pytest
from terminal import Terminal

from llamacli.cli import main, parser
from llamacli.text.settings import SETTINGS as SAMPLING

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
RUN = [sys.executable, "-m", "llamacli"]


@pytest.fixture(scope="module")
def server():
    """The address of a `llamacli serve`."""
    command = [*RUN, "serve", "--port", "0", "--ctx", "8192", "-t", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    yield process.stdout.readline().strip()
    process.kill()
    process.communicate()


def run(*args):
    return main(["run", "--temp", "0", "--no-stdin", *args])


# against the real one


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


def test_a_text_too_long_for_any_server_is_refused_without_a_word_about_options_of_a_model_here(tmp_path, capfd):
    (tmp_path / "huge.txt").write_bytes(b"x" * ((64 << 20) + 1))
    (tmp_path / "large.txt").write_bytes(b"x" * (5 << 20))
    with pretending(response(error("5 MB are too much", "context_length_exceeded"), "400 Bad Request")) as (url, asked):
        assert run("--server", url, "-f", str(tmp_path / "huge.txt"), "Hi") == 1
        assert (err := capfd.readouterr().err).endswith("huge.txt: expected at most 67108864 bytes, found more; shorten it\n")
        assert not asked
        assert run("--server", url, "-f", str(tmp_path / "large.txt"), "Hi") == 1
    assert "5 MB are too much" in (err := capfd.readouterr().err) and "-c" not in err.split()


def test_a_context_that_is_full_there_is_said_without_a_word_about_options_of_a_model_here(capfd):
    full = {"choices": [], "usage": {"prompt_tokens": 500, "completion_tokens": 12}}
    with pretending(stream(said("so far", "length"), full)) as (url, _):
        assert run("--server", url, "Hi") == 0
    out, err = capfd.readouterr()
    assert out == "so far\n" and "the context of 512 tokens is full" in err and "server with a larger one" in err
    assert "-c" not in err.split()


def test_none_loads_a_model_here_in_spite_of_the_environment(model, capfd, monkeypatch):
    monkeypatch.setenv("LLAMACLI_SERVER", "http://127.0.0.1:1")
    assert main(["run", "--server", "none", "-t", "2", "Hi"]) == 0
    assert capfd.readouterr().out == "first line\nsecond line\n"


# against hostile ones

MODELS = b'{"data": [{"id": "m", "max_model_len": 512, "meta": {"n_ctx": 512, "n_vocab": 1000}}]}'


def response(body, status="200 OK", kind="application/json", *headers):
    head = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def stream(*events, end=b"data: [DONE]\n\n"):
    body = b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in events) + end
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n" + body


def said(text, reason=None):
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}]}


@contextmanager
def pretending(answer, models=None):
    """A server that answers every request but the first kind with `answer`: bytes, or a function of the connection.

    Yields its address and a list of the requests that came.
    """
    asked = []

    def serve(connection):
        with connection:
            data = b""
            while b"\r\n\r\n" not in data:
                data += (part := connection.recv(1 << 16))
                if not part:
                    return
            head, _, body = data.partition(b"\r\n\r\n")
            length = int((re.search(rb"(?i)content-length: (\d+)", head) or [0, 0])[1])
            while len(body) < length:
                body += connection.recv(1 << 16)
            asked.append((head.decode(), json.loads(body or b"null")))
            found = (models or response(MODELS)) if head.startswith(b"GET /v1/models") else answer
            try:
                found(connection) if callable(found) else connection.sendall(found)
                connection.shutdown(socket.SHUT_WR)
                connection.recv(1)
            except OSError:
                pass

    def accept():
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", asked
        listening.shutdown(socket.SHUT_RDWR)


def error(message, code=None):
    return json.dumps({"error": {"message": message, "code": code}}).encode()


FAULTS = {
    "401": (response(b"{}", "401 Unauthorized"), "LLAMACLI_API_KEY"),
    "404": (response(b"{}", "404 Not Found"), "check the address"),
    "429": (response(error("too many requests"), "429 Too Many", "application/json", "Retry-After: 7"), "ask again in 7 s"),
    "503": (response(error("queue full"), "503 Busy", "application/json", "Retry-After: 5"), "queue full; ask again in 5 s"),
    "400": (response(error("temperature: expected less"), "400 Bad Request"), "temperature: expected less"),
    "500 without words": (response(b"<html>oops", "500 Oh", "text/html"), "HTTP 500 Oh"),
    "a redirect": (response(b"", "302 Found", "text/html", "Location: http://elsewhere.example/"), "http://elsewhere.example/"),
    "no stream": (response(b"<html>hello</html>", kind="text/html"), "text/html"),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.9\r\n", "expected HTTP"),
    "nothing": (b"", "broke off"),
    "no JSON": (stream(end=b"data: {broken\n\n"), "expected JSON"),
    "no object": (stream([1, 2]), "expected JSON"),
    "deep JSON": (stream(end=b"data: " + b"[" * 100_000 + b"\n\n"), "expected JSON"),
    "an error amid": (stream(said("Paris"), json.loads(error("the model failed")), end=b""), "the model failed"),
    "a cut": (stream(said("Paris"), end=b""), "broke off"),
    "a cut chunk": (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\nff\r\ndata: ",
        "broke off",
    ),
    "an endless header": (b"HTTP/1.1 200 OK\r\n" + b"X: " + b"x" * 200_000, "broke off"),
    "an error that steers": (response(error("\x1b[2J\nred"), "400 Bad Request"), "\\x1b[2J red"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_server_is_one_line(name, capfd, monkeypatch):
    monkeypatch.delenv("LLAMACLI_API_KEY", raising=False)
    answer, words = FAULTS[name]
    with pretending(answer) as (url, _):
        assert run("--server", url, "Hi") == 1
    out, err = capfd.readouterr()
    assert out in ("", "Paris\n") and err.count("\n") == 1 and words in err and url in err, err
    assert "Traceback" not in err and "\x1b" not in err


def test_nobody_there_is_said_with_what_to_do(capfd):
    assert run("--server", "http://127.0.0.1:1", "Hi") == 1
    assert "Connection refused" in (err := capfd.readouterr().err) and "llamacli serve" in err


def test_a_server_that_falls_silent_is_not_waited_for_without_end(capfd, monkeypatch):
    from llamacli.client import remote

    monkeypatch.setattr(remote.connect, "__defaults__", (None, 1.5))
    with pretending(lambda c: (c.sendall(stream(said("Paris"), end=b"")), c.recv(1))) as (url, _):
        assert run("--server", url, "Hi") == 1
    out, err = capfd.readouterr()
    assert out == "Paris\n" and "sent nothing for 1.5 s" in err


def test_a_line_without_end_is_not_kept_for_ever(capfd, monkeypatch):
    from llamacli.client import connection

    monkeypatch.setattr(connection, "LONGEST_LINE", 1 << 20)
    with pretending(stream(end=b"data: " + b"x" * (3 << 20))) as (url, _):
        assert run("--server", url, "Hi") == 1
    assert "found a longer one" in capfd.readouterr().err


@pytest.mark.parametrize(
    "address", ["ftp://host", "http://", "http://a b", "http://host:99999", "http://u:p@host", "http://h/?q=1", "hé"]
)
def test_an_address_that_is_none_is_refused(address, capfd):
    assert run("--server", address, "Hi") == 2
    assert "--server: expected an address" in capfd.readouterr().err


def test_odd_events_are_passed_over_and_text_is_kept_whole(capfd):
    odd = [{}, {"choices": []}, {"choices": [None]}, {"choices": [{"delta": None}]}, {"choices": [{"delta": {"content": 5}}]}]
    answer = stream(*odd, said("a\ud800b"), {"choices": [], "usage": {"prompt_tokens": "many"}}, said("c", "stop"))
    with pretending(answer) as (url, _):
        assert run("--server", url, "Hi") == 0
    assert capfd.readouterr().out == "a\ufffdbc\n"


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


def test_a_server_without_a_list_of_models_is_asked_all_the_same(capfd):
    with pretending(stream(said("ok", "stop")), models=response(b"", "404 Not Found")) as (url, _):
        assert run("--server", url, "Hi") == 0
    assert capfd.readouterr().out == "ok\n"


def test_text_of_the_server_does_not_steer_the_terminal(tmp_path):
    with pretending(stream(said("\x1b]0;owned\x07red \x1b[31m"), said("", "stop"))) as (url, _):
        t = Terminal([*RUN, "run", "--server", url, "--no-stdin", "Hi"], XDG_STATE_HOME=str(tmp_path), HOME=str(tmp_path))
        t.wait("red")
        t.close()
    assert "\x1b]0;" not in t.raw and "\x1b[31m" not in t.raw.replace("\x1b[31m\x1b", "")


def test_a_chat_survives_a_server_that_goes_away(tmp_path):
    answers = [stream(said("Fine.", "stop")), stream(said("Half"), end=b""), stream(said("Whole again.", "stop"))]
    with pretending(lambda c: c.sendall(answers.pop(0))) as (url, _):
        t = Terminal([*RUN, "chat", "--server", url], XDG_STATE_HOME=str(tmp_path), HOME=str(tmp_path))
        t.wait("ctx 0")
        t.type("How are you?\r")
        t.wait("Fine.")
        t.type("And now?\r")
        t.wait("broke off")
        t.type("/regen\r")
        t.wait("Whole again.")
        t.close()


def test_ctrl_c_ends_the_wait_for_a_silent_server_and_the_chat_goes_on(tmp_path):
    left = threading.Event()

    def silent(connection):
        connection.recv(1)  # until the client closes
        left.set()

    answers = [silent, lambda c: c.sendall(stream(said("Here I am.", "stop")))]
    with pretending(lambda c: answers.pop(0)(c)) as (url, _):
        t = Terminal([*RUN, "chat", "--server", url], XDG_STATE_HOME=str(tmp_path), HOME=str(tmp_path))
        t.wait("ctx 0")
        t.type("Are you there?\r")
        t.wait("reading the prompt")
        t.type("\x03")
        assert left.wait(300), "the connection is still open"
        t.wait("stopped by Ctrl-C")
        t.type("/regen\r")
        t.wait("Here I am.")
        t.close()


def test_a_chat_that_a_server_s_context_does_not_hold_is_told_what_makes_room(tmp_path):
    words = error("the prompt has 600 tokens and the context holds 512", "context_length_exceeded")
    answers = [stream(said("Half", None), end=b""), response(words, "400 Bad Request"), stream(said("Short enough.", "stop"))]
    with pretending(lambda c: c.sendall(answers.pop(0))) as (url, _):
        t = Terminal([*RUN, "chat", "--server", url], XDG_STATE_HOME=str(tmp_path), HOME=str(tmp_path))
        t.wait("ctx 0")
        t.type("Begin\r")
        t.wait("broke off")
        t.close()
        t = Terminal([*RUN, "chat", "--server", url, "--continue"], XDG_STATE_HOME=str(tmp_path), HOME=str(tmp_path))
        t.wait("/regen answers anew")
        t.type("A long question\r")
        t.wait("/undo, /drop or /clear makes room")
        t.type("/undo\r")
        t.type("A short one\r")
        t.wait("Short enough.")
        t.close()


def test_how_far_the_server_is_with_the_prompt_is_shown(tmp_path):
    head, _, events = stream(said("Done.", "stop")).partition(b"\r\n\r\n")
    seen = threading.Event()

    def slow(connection):
        connection.sendall(head + b"\r\n\r\n: 256 of 1024 tokens of the prompt\n\n")
        seen.wait(300)
        connection.sendall(events)

    with pretending(slow) as (url, _):
        t = Terminal([*RUN, "run", "--server", url, "--no-stdin", "Hi"], XDG_STATE_HOME=str(tmp_path), HOME=str(tmp_path))
        t.wait("256 of 1,024 tokens")
        seen.set()
        t.wait("Done.")
        t.close()


def test_a_pipe_of_turns_is_answered_by_the_server(server):
    turns = f"{QUESTION}\nAnd of Japan?\n"
    done = subprocess.run(
        [*RUN, "chat", "--server", server, "--temp", "0"], input=turns, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split("\n")[0] == ANSWER and "Tokyo" in done.stdout and done.returncode == 0


def test_an_answer_without_end_is_not_kept_for_ever(capfd, monkeypatch):
    from llamacli.client import remote

    monkeypatch.setattr(remote, "LONGEST_ANSWER", 1000)
    with pretending(stream(*[said("x" * 100)] * 20)) as (url, _):
        assert run("--server", url, "Hi") == 1
    out, err = capfd.readouterr()
    assert out == "x" * 1000 + "\n" and "at most 1000 characters" in err


def test_a_chat_sends_its_pictures_with_every_turn(tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    with pretending(stream(said("red", "stop"))) as (url, asked):
        command = [*RUN, "chat", "--server", url, "--image", str(tmp_path / "red.png")]
        done = subprocess.run(command, input="What is it?\nSure?\n", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = (body["messages"] for _, body in asked if body)
    kinds = [part["type"] for part in first[0]["content"]]
    assert (
        kinds == ["image_url", "text"]
        and first == second[:1]
        and second[1:]
        == [
            {"role": "assistant", "content": "red"},
            {"role": "user", "content": "Sure?"},
        ]
    )


def test_a_server_without_tls_is_told_from_one_that_is_not_there(server, capfd):
    assert run("--server", server.replace("http:", "https:"), "Hi") == 1
    assert "expected TLS" in capfd.readouterr().err
