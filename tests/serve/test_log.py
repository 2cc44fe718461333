"""The log has a line for each request: with its cost, and without any data of the client."""

import re

import pytest
from fakes import FakeModel, Scripted
from serving import chat, post, raw, serving, until

from llamacli.serve.app import Limits

TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


@pytest.fixture
def lines():
    return []


@pytest.fixture
def client(lines):
    model = FakeModel(Scripted("hello", chunk=64), ctx=300)
    with serving(model, Limits(places=1), keys=["topsecret"], log=lines.append) as made:
        made.headers["x-api-key"] = "topsecret"
        forget(lines)
        yield made


def forget(lines):
    """Drop the lines of requests that check whether the server responds."""
    until(lambda: lines and "/health 200" in lines[-1])
    lines.clear()


def last(lines, n=1):
    until(lambda: len(lines) == n)
    return lines[-1]


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_seconds_and_speed(client, lines, stream):
    client.post("/v1/chat/completions", json=chat("my words", stream=stream))
    found = re.fullmatch(
        rf"{TIME} /v1/chat/completions 200, (\d+) tokens in \(0 reused\), 5 out, \d+\.\d\d s, \d+\.\d tok/s", last(lines)
    )
    n_prompt = int(found[1])
    client.post("/v1/chat/completions", json=chat("my words", stream=stream))
    assert f"{n_prompt} tokens in ({n_prompt - 1} reused), 5 out" in last(lines, 2)


def test_all_dialects_count_and_choices_count_their_prompt_once(client, lines):
    for n, (path, body) in enumerate(
        [
            ("/v1/messages", chat("a", max_tokens=5)),
            ("/v1/responses", {"input": "a"}),
            ("/v1/completions", {"prompt": "a", "max_tokens": 5}),
            ("/v1/chat/completions", chat("a", n=3)),
        ],
        1,
    ):
        assert client.post(path, json=body).status_code == 200
        assert re.search(rf"{path} 200, \d+ tokens in", last(lines, n))
    assert "15 out" in lines[-1] and int(re.search(r"(\d+) tokens in", lines[-1])[1]) < 12


def test_others_have_a_route_a_status_and_seconds(client, lines):
    asked = ("/health", "/v1/models/other-name?a=words", "/words/words")
    for path in asked:
        client.get(path)
    client.post("/v1/chat/completions", content=b"words")
    client.get("/v1/models", headers={"x-api-key": "words"})
    until(lambda: len(lines) == 5)
    said = [re.sub(rf"{TIME} ", "", line) for line in lines]
    assert [re.sub(r", \d+\.\d\d s", "", line) for line in said] == [
        "/health 200",
        "/v1/models/{model:path} 404",
        "- 404",
        "/v1/chat/completions 400",
        "/v1/models 401",
    ]


def test_no_line_has_what_a_client_wrote(client, lines):
    tool = {"type": "function", "function": {"name": "words", "parameters": {"type": "object"}}}
    client.post("/v1/chat/completions?words=words", json=chat("words", user="words", tools=[tool]), headers={"words": "words"})
    client.post("/v1/chat/completions", json=chat("words", temperature="words"))
    client.post("/words")
    last(lines, 3)
    assert not any(word in line for line in lines for word in ("words", "topsecret", "hello", "127.0.0.1"))


def test_a_stream_that_is_cut_says_by_what(lines):
    with serving(FakeModel(Scripted("x" * 3000, chunk=64, delay=0.002), ctx=4000), Limits(), log=lines.append) as client:
        forget(lines)
        made = raw(client, post(chat(stream=True)))
        until(lambda: client.server.scheduler.active)
        made.close()
        assert "200 (client left), " in last(lines)
        until(lambda: not client.server.scheduler.active)
        other = raw(client, post(chat(stream=True)))
        until(lambda: client.server.scheduler.active)
        client.server.scheduler.close()
        assert "200 (stopping), " in last(lines, 2)
        other.close()
