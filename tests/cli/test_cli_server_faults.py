"""`run` with servers that break the protocol: errors are one line, and memory is limited."""

import json

import pytest
from pretending import error, pretending, response, run, said, stream

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


def test_what_was_said_before_a_fault_is_kept_where_an_answer_is_written_at_its_end(tmp_path, capfd):
    with pretending(stream(said("Paris"), end=b"")) as (url, _):
        assert run("--server", url, "-o", str(tmp_path / "out"), "Hi") == 1
        assert (tmp_path / "out").read_text() == "Paris\n"
        assert run("--server", url, "--no-stream", "Hi") == 1
        assert capfd.readouterr().out == "Paris\n"
        assert run("--server", url, "--json", "Hi") == 1
    found = json.loads(capfd.readouterr().out)
    assert (found["text"], found["finish_reason"]) == ("Paris", "error")


@pytest.mark.parametrize("how", [["-o", "OUT"], ["--json"], ["--no-stream"]])
def test_a_fault_before_the_first_word_writes_nothing(how, tmp_path, capfd):
    with pretending(stream(end=b"")) as (url, _):
        assert run("--server", url, *(word.replace("OUT", str(tmp_path / "out")) for word in how), "Hi") == 1
    assert capfd.readouterr().out == "" and not (tmp_path / "out").exists()


def test_an_unreachable_server_is_reported_with_advice(capfd, nobody):
    assert run("--server", f"http://{nobody}", "Hi") == 1
    assert "Connection refused" in (err := capfd.readouterr().err) and "llamacli serve" in err


def test_a_server_that_falls_silent_is_not_waited_for_without_end(capfd, monkeypatch):
    from llamacli.client import remote

    monkeypatch.setattr(remote.connect, "__defaults__", (None, 1.5))
    with pretending(lambda c: (c.sendall(stream(said("Paris"), end=b"")), c.recv(1))) as (url, _):
        assert run("--server", url, "Hi") == 1
    out, err = capfd.readouterr()
    assert out == "Paris\n" and "sent nothing for 1.5 s" in err


def test_an_endless_line_is_limited_in_memory(capfd, monkeypatch):
    from llamacli.client import connection

    monkeypatch.setattr(connection, "LONGEST_LINE", 1 << 20)
    with pretending(stream(end=b"data: " + b"x" * (3 << 20))) as (url, _):
        assert run("--server", url, "Hi") == 1
    assert "found a longer one" in capfd.readouterr().err


def test_an_endless_answer_is_limited_in_memory(capfd, monkeypatch):
    from llamacli.client import remote

    monkeypatch.setattr(remote, "LONGEST_ANSWER", 1000)
    with pretending(stream(*[said("x" * 100)] * 20)) as (url, _):
        assert run("--server", url, "Hi") == 1
    out, err = capfd.readouterr()
    assert out == "x" * 1000 + "\n" and "at most 1000 characters" in err


def test_odd_events_are_passed_over_and_text_is_kept_whole(capfd):
    odd = [{}, {"choices": []}, {"choices": [None]}, {"choices": [{"delta": None}]}, {"choices": [{"delta": {"content": 5}}]}]
    answer = stream(*odd, said("a\ud800b"), {"choices": [], "usage": {"prompt_tokens": "many"}}, said("c", "stop"))
    with pretending(answer) as (url, _):
        assert run("--server", url, "Hi") == 0
    assert capfd.readouterr().out == "a\ufffdbc\n"


def test_a_server_without_a_list_of_models_is_used(capfd):
    with pretending(stream(said("ok", "stop")), models=response(b"", "404 Not Found")) as (url, _):
        assert run("--server", url, "Hi") == 0
    assert capfd.readouterr().out == "ok\n"


def test_a_text_too_long_for_any_server_is_refused_without_advice_about_local_options(tmp_path, capfd):
    (tmp_path / "huge.txt").write_bytes(b"x" * ((64 << 20) + 1))
    (tmp_path / "large.txt").write_bytes(b"x" * (5 << 20))
    with pretending(response(error("5 MB are too much", "context_length_exceeded"), "400 Bad Request")) as (url, asked):
        assert run("--server", url, "-f", str(tmp_path / "huge.txt"), "Hi") == 1
        assert (err := capfd.readouterr().err).endswith("huge.txt: expected at most 67108864 bytes, found more; shorten it\n")
        assert not asked
        assert run("--server", url, "-f", str(tmp_path / "large.txt"), "Hi") == 1
    assert "5 MB are too much" in (err := capfd.readouterr().err) and "-c" not in err.split()


def test_a_full_context_of_the_server_is_reported_without_advice_about_local_options(capfd):
    full = {"choices": [], "usage": {"prompt_tokens": 500, "completion_tokens": 12}}
    with pretending(stream(said("so far", "length"), full)) as (url, _):
        assert run("--server", url, "Hi") == 0
    out, err = capfd.readouterr()
    assert out == "so far\n" and "the context of 512 tokens is full" in err and "server with a larger one" in err
    assert "-c" not in err.split()
