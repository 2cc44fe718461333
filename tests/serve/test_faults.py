"""Hostile, broken or disconnected clients: the server continues, and the engine becomes free. Over real sockets."""

import json
import random
import socket
import struct
import threading

import httpx
import pytest
from fakes import FakeModel, Scripted
from serving import chat, events, post, raw, serving, until

from llamacli.serve.app import Limits

LONG = "x" * 3000
BODY = 1 << 20
SECRET = "/secret/"


@pytest.fixture(scope="module")
def client():
    """Answers of 3000 tokens, a few milliseconds each."""
    model = FakeModel(Scripted(LONG, chunk=64, delay=0.001), ctx=4000)
    with serving(model, Limits(places=2, waiting=4, body=BODY, body_seconds=1, keep_alive=0.05)) as made:
        yield made


@pytest.fixture(autouse=True)
def free_again(client):
    """After each test all places become free, and the server answers."""
    yield
    until(lambda: client.server.scheduler.active == client.server.scheduler.waiting == 0)
    answer = client.post("/v1/chat/completions", json=chat(max_tokens=3))
    assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"] == "xxx"


def reset(made):
    """Close the connection by a reset."""
    made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    made.close()


# clients that leave


@pytest.mark.parametrize("leave", [socket.socket.close, reset], ids=["close", "reset"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_during_its_answer_frees_the_engine(client, stream, leave):
    made = raw(client, post(chat(stream=stream)))
    until(lambda: client.server.scheduler.active)
    if stream:
        made.recv(100)
    cancelled = client.server.scheduler.totals.cancelled
    leave(made)
    until(lambda: client.server.scheduler.totals.cancelled == cancelled + 1)


def test_a_client_that_leaves_during_its_prompt_frees_the_engine(client):
    made = raw(client, post(chat("y" * 3500, stream=True)))
    until(lambda: client.server.scheduler.active)
    before = client.server.scheduler.totals.prompt_tokens
    made.close()
    until(lambda: not client.server.scheduler.active)
    assert client.server.scheduler.totals.prompt_tokens == before  # it was never evaluated completely


def test_a_client_that_leaves_the_queue_uses_no_place(client):
    busy = [raw(client, post(chat(stream=True))) for _ in range(2)]
    until(lambda: client.server.scheduler.active == 2)
    waiting = raw(client, post(chat("never read", stream=True)))
    until(lambda: client.server.scheduler.waiting == 1)
    waiting.close()
    until(lambda: client.server.scheduler.waiting == 0)
    for made in busy:
        made.close()


def test_clients_that_leave_at_many_moments(client):
    random.seed(1)
    request = post(chat(stream=True, max_tokens=40))
    for n in range(30):
        made = raw(client, request[: random.randrange(len(request))] if n % 3 == 0 else request)
        if n % 3:
            made.settimeout(random.random() * 0.05 + 0.001)
            try:
                while made.recv(65536):
                    pass
            except TimeoutError:
                pass
        reset(made) if n % 2 else made.close()


def test_a_half_closed_socket_does_not_hold_the_engine(client):
    made = raw(client, post(chat(stream=True)))
    until(lambda: client.server.scheduler.active)
    made.shutdown(socket.SHUT_WR)
    until(lambda: not client.server.scheduler.active)
    made.close()


def test_a_slow_reader_does_not_slow_others(client):
    made = raw(client, post(chat(stream=True, max_tokens=500)))
    assert client.post("/v1/chat/completions", json=chat(max_tokens=5)).status_code == 200
    until(lambda: not client.server.scheduler.active)  # the answer is over though nobody has read it
    received = b""
    while b"[DONE]" not in received:
        received += made.recv(65536)
    made.close()


# limits


def test_a_comment_comes_while_a_prompt_is_read(client):
    text = client.post("/v1/chat/completions", json=chat("y" * 300, stream=True, max_tokens=1)).text
    comments = [line for line in text.split("\n") if line.startswith(":")]
    assert comments and "tokens of the prompt" in comments[-1]


def test_a_full_queue_says_when_to_retry(client):
    made = [raw(client, post(chat(f"{i}", stream=True))) for i in range(2)]
    until(lambda: client.server.scheduler.active == 2)
    refused = client.post("/v1/chat/completions", json=chat(n=5))
    assert refused.status_code == 503 and int(refused.headers["Retry-After"]) > 0
    assert refused.json()["error"]["code"] == "queue_full"
    for each in made:
        each.close()


@pytest.mark.parametrize("size", [BODY + 1, pytest.param(100_000_000, marks=pytest.mark.slow)])
def test_a_body_that_is_too_large_is_refused_unread(client, size):
    answer = client.post("/v1/chat/completions", content=b"x" * size)
    assert answer.status_code == 413 and str(BODY) in answer.json()["error"]["message"]


def test_a_body_without_a_length_is_counted_as_it_comes(client):
    answer = client.post("/v1/chat/completions", content=(b"x" * 65536 for _ in range(40)))
    assert answer.status_code == 413


def test_a_body_that_is_not_sent_times_out(client):
    made = raw(client, post(b"{" + b" " * 100)[:-50])
    assert made.recv(65536).startswith(b"HTTP/1.1 408")
    made.close()


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20,
        b"GET / HTTP/9.9\r\n\r\n",
        b"A" * 200_000,
    ],
    ids=["empty", "word", "TLS", "version", "endless line"],
)
def test_data_that_is_not_http_ends_its_connection(client, data):
    made = raw(client)
    try:
        made.sendall(data)
        made.shutdown(socket.SHUT_WR)
        while made.recv(65536):
            pass
    except OSError:
        pass
    made.close()


def mutated(seed):
    """A request with random errors, possibly none."""
    random.seed(seed)
    body = chat("Hello", stream=random.random() < 0.3, max_tokens=2, temperature=0.5, stop=["\n"], logprobs=True, n=1)
    body |= {"input": "Hi", "prompt": "x", "content": "y", "max_output_tokens": 2, "tokens": [65], "tools": []}
    junk = [
        None,
        True,
        -1,
        0,
        1e308,
        2**70,
        "",
        "x" * 100,
        [],
        {},
        [[]],
        {"a": {}},
        "\x00",
        "\ud7ff",
        [None] * 50,
        {"type": "text"},
    ]
    kind = seed % 4
    if kind == 0:
        body[random.choice([*body, "response_format", "tools", "logit_bias", "top_logprobs"])] = random.choice(junk)
    elif kind == 1:
        place = random.choice([body["messages"][0], body["messages"]])
        if isinstance(place, list):
            place[random.choice([0])] = random.choice(junk)
        else:
            place[random.choice(["role", "content", "tool_calls", "name"])] = random.choice(junk)
    data = bytearray(json.dumps(body).encode())
    if kind >= 2:
        for _ in range(random.randrange(1, 6)):
            at = random.randrange(len(data))
            if kind == 2:
                data[at] = random.randrange(256)
            else:
                del data[at : at + random.randrange(1, 9)]
    return bytes(data)


def ask_wrongly(seeds):
    with serving(FakeModel(Scripted("ok", chunk=64), ctx=400)) as client:
        _ask_wrongly(client, seeds)
        assert client.server.scheduler.active == client.server.scheduler.waiting == 0


def _ask_wrongly(client, seeds):
    for seed in seeds:
        path = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/v1/messages", "/v1/responses", "/detokenize")[
            seed % 6
        ]
        answer = client.post(path, content=mutated(seed))
        assert answer.status_code in (200, 400, 404, 413), (seed, answer.status_code, answer.text)


def test_malformed_requests_are_refused_and_never_an_error_of_ours():
    ask_wrongly(range(300))


@pytest.mark.slow
def test_a_thousand_malformed_requests():
    ask_wrongly(range(1000, 2000))


# access control


def test_every_route_except_health_requires_the_key():
    with serving(FakeModel(Scripted("ok", chunk=64), ctx=100), keys=["right", "other"]) as client:
        assert client.get("/health").status_code == 200
        for path in ("/v1/models", "/metrics"):
            refused = client.get(path)
            assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
        for wrong in ("Bearer wrong", "Bearer", "Basic right", "right", "Bearer r\xefght"):
            assert client.get("/v1/models", headers={"Authorization": wrong.encode("latin-1")}).status_code == 401
        assert client.post("/v1/chat/completions", json=chat()).status_code == 401
        assert client.get("/v1/models", headers={"Authorization": "Bearer other"}).status_code == 200
        assert client.get("/v1/models", headers={"x-api-key": "right"}).status_code == 200


def test_a_client_over_its_rate_limit_is_told_when_to_retry():
    with serving(FakeModel(Scripted("ok", chunk=64), ctx=100), Limits(rate=3), keys=["a", "b"]) as client:
        found = [client.post("/v1/chat/completions", json=chat(), headers={"x-api-key": "a"}) for _ in range(4)]
        assert [answer.status_code for answer in found] == [200, 200, 200, 429]
        assert 0 < int(found[-1].headers["Retry-After"]) <= 61 and found[-1].json()["error"]["type"] == "rate_limit_error"
        assert client.post("/v1/chat/completions", json=chat(), headers={"x-api-key": "b"}).status_code == 200


def test_without_keys_the_rate_limit_ignores_the_clients_key():
    with serving(FakeModel(Scripted("ok", chunk=64), ctx=100), Limits(rate=3)) as client:
        found = [client.post("/v1/chat/completions", json=chat(), headers={"x-api-key": f"{i}"}) for i in range(4)]
        assert [answer.status_code for answer in found] == [200, 200, 200, 429]


def test_web_pages_are_refused_unless_their_origin_is_allowed(client):
    page = {"Origin": "https://evil.example"}
    refused = client.post("/v1/chat/completions", json=chat(max_tokens=1), headers=page)
    assert refused.status_code == 403 and "--cors" in refused.json()["error"]["message"]
    assert "access-control-allow-origin" not in refused.headers
    assert client.options("/v1/chat/completions", headers={**page, "Access-Control-Request-Method": "POST"}).status_code == 405
    assert client.get("/health", headers={"Host": "evil.example"}).status_code == 403  # DNS rebinding
    with serving(FakeModel(Scripted("ok", chunk=64), ctx=100), origins=["https://good.example"]) as other:
        let_in = other.post("/v1/chat/completions", json=chat(), headers={"Origin": "https://good.example"})
        assert let_in.status_code == 200 and let_in.headers["access-control-allow-origin"] == "https://good.example"
        assert other.post("/v1/chat/completions", json=chat(), headers=page).status_code == 403


@pytest.mark.parametrize(
    "path", ["/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1/models/../../../etc/passwd", "//etc/passwd"]
)
def test_no_address_leads_to_a_file(client, path):
    made = raw(client, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    received = b""
    while part := made.recv(65536):
        received += part
    assert received.startswith(b"HTTP/1.1 404") and b"root:" not in received
    made.close()


def test_an_error_of_the_machine_is_told_on_stderr_and_not_to_the_client():
    class Damaged(Scripted):
        def forward(self, ids, cache, **more):
            raise OSError(5, "Input/output error", f"{SECRET}model.gguf")

    reports = []
    with serving(FakeModel(Damaged("x"), ctx=100), report=reports.append) as client:
        whole = client.post("/v1/chat/completions", json=chat())
        assert whole.status_code == 500 and SECRET not in whole.text
        streamed = client.post("/v1/chat/completions", json=chat(stream=True))
        (event,) = [json.loads(line[6:]) for line in streamed.text.split("\n") if line.startswith("data: ")]
        assert event["error"]["type"] == "server_error" and SECRET not in streamed.text
        picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        seen = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": [picture]}]})
        assert seen.status_code == 400 and SECRET not in seen.text
    assert any(SECRET in report for report in reports)


def test_an_error_within_a_stream_of_responses_has_the_number_that_follows():
    class Failing(Scripted):
        def forward(self, ids, cache, **more):
            if len(self.calls) > 4:
                raise OSError(5, "Input/output error", "model.gguf")
            return super().forward(ids, cache, **more)

    with serving(FakeModel(Failing("a long answer", chunk=64), ctx=400), report=lambda _: None) as client:
        answer = client.post("/v1/responses", json={"input": "Talk.", "stream": True, "store": False})
    events = [json.loads(line[6:]) for line in answer.text.split("\n") if line.startswith("data: ")]
    assert events[-1]["type"] == "error" and len(events) > 3
    assert [event["sequence_number"] for event in events] == [*range(len(events))]


def test_the_end_of_the_server_ends_streams_with_an_error(client):
    with serving(FakeModel(Scripted(LONG, chunk=64, delay=0.002), ctx=4000)) as other:
        found = []
        asking = threading.Thread(
            target=lambda: found.append(
                httpx.post(f"{other.base_url}/v1/chat/completions", json=chat(stream=True), timeout=300).text
            )
        )
        asking.start()
        until(lambda: other.server.scheduler.active)
        other.server.close()
        asking.join(300)
    assert '"code": "stopping"' in found[0] and "[DONE]" not in found[0]


def test_many_clients_at_once_each_get_their_own_answer():
    with serving(FakeModel(Scripted("fine", chunk=64), ctx=200), Limits(places=3)) as client:
        found = {}

        def ask(i):
            with httpx.Client(base_url=client.base_url, timeout=300, verify=False) as own:
                found[i] = "".join(
                    e["choices"][0]["delta"].get("content", "")
                    for e in events(own.post("/v1/chat/completions", json=chat(f"{i}", stream=True)))
                )

        asking = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
        for each in asking:
            each.start()
        for each in asking:
            each.join(300)
    assert found == dict.fromkeys(range(16), "fine")
