"""`llamacli serve` as a process, with the small model: its address, answers, memory and end."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from serving import chat, events

from llamacli import Model, environment
from llamacli.cli import main

QUESTIONS = [
    "What is the capital of France?",
    "Name a planet.",
    "What is the capital of Japan?",
    "What is 2 plus 3?",
    "Who are you?",
]


@contextmanager
def serve(*args, python=("-m", "llamacli"), **how):
    """Yields the process and a client."""
    command = [sys.executable, *python, "serve", "--port", "0", "--ctx", "1024", *args]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)
    try:
        url = process.stdout.readline().strip()
        assert url.startswith("http://127.0.0.1:"), process.stderr.read()
        with httpx.Client(base_url=url, timeout=300, verify=False) as client:
            yield process, client
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def running():
    with serve("-t", "1") as made:
        yield made


@pytest.fixture(scope="module")
def client(running):
    return running[1]


@pytest.fixture(scope="module")
def model():
    with Model.load(environment.SMALL_MODEL, threads=1, ctx=1024) as made:
        yield made


def alone(model, *turns):
    """The answer that a fresh session gives."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return "".join(piece.text for piece in model.stream(messages, 40, temp=0))


def test_answers_at_once_are_those_of_a_fresh_model(client, model):
    def ask(question):
        body = chat(question, temperature=0, max_tokens=40, stream=True)
        return "".join(
            e["choices"][0]["delta"].get("content", "") for e in events(client.post("/v1/chat/completions", json=body))
        )

    with ThreadPoolExecutor(5) as pool:
        found = [*pool.map(ask, QUESTIONS * 3)]
    assert found == [alone(model, question) for question in QUESTIONS] * 3
    assert found[0] == "The capital of France is Paris."


def test_the_second_turn_costs_its_new_tokens_only_and_answers_alike(client, model):
    turns = ["What is the capital of France?"]
    cached = []
    for following in ("And of Japan?", "Name a planet.", None):
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
        body = client.post("/v1/chat/completions", json={"messages": messages, "temperature": 0, "max_tokens": 40}).json()
        answer, usage = body["choices"][0]["message"]["content"], body["usage"]
        assert answer == alone(model, *turns)
        cached.append(usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"])
        turns += [answer, following]
    new = [len(model.tokenizer.encode(text, bos=False)) for text in ("And of Japan?", "Name a planet.")]
    assert all(cost <= n + 12 for cost, n in zip(cached[1:], new, strict=True))  # and the marks around them


USED = {  # of each protocol: tokens of a prompt, and how many of them were held
    "/v1/chat/completions": lambda u: (u["prompt_tokens"], u["prompt_tokens_details"]["cached_tokens"]),
    "/v1/completions": lambda u: (u["prompt_tokens"], u["prompt_tokens_details"]["cached_tokens"]),
    "/v1/responses": lambda u: (u["input_tokens"], u["input_tokens_details"]["cached_tokens"]),
    "/v1/messages": lambda u: (u["input_tokens"] + u["cache_read_input_tokens"], u["cache_read_input_tokens"]),
}


def said(path, response):
    """The text of an answer and its usage, of whatever protocol, streamed or whole."""
    if not response.headers["content-type"].startswith("text/event-stream"):
        body = response.json()
        match path:
            case "/v1/chat/completions":
                return body["choices"][0]["message"]["content"], body["usage"]
            case "/v1/completions":
                return body["choices"][0]["text"], body["usage"]
            case "/v1/responses":
                return body["output"][0]["content"][0]["text"], body["usage"]
            case _:
                return body["content"][0]["text"], body["usage"]
    data = [json.loads(line[6:]) for line in response.text.split("\n") if line.startswith("data: {")]
    match path:
        case "/v1/chat/completions" | "/v1/completions":
            choices = [choice for event in data for choice in event["choices"]]
            return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices), data[-1]["usage"]
        case "/v1/responses":
            return "".join(e["delta"] for e in data if e["type"] == "response.output_text.delta"), data[-1]["response"]["usage"]
        case _:
            text = "".join(e["delta"]["text"] for e in data if e["type"] == "content_block_delta")
            return text, next(e["usage"] for e in data if e["type"] == "message_delta")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", USED)
def test_the_second_turn_costs_its_new_tokens_only_by_each_protocol(client, model, path, stream):
    """Each conversation has its own first words, so that none reuses another's session."""
    turns = [f"{path} {stream} asks: What is the capital of France? Answer in one short sentence, please."]
    more = {"temperature": 0, "stream": stream}
    costs = []
    for following in ("And of Japan?", "Name a planet.", None):
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
        if path == "/v1/completions":
            body = {"prompt": " ".join(turns), "max_tokens": 40, "stream_options": {"include_usage": True}}
        elif path == "/v1/responses":
            body = {"input": messages, "max_output_tokens": 40}
        else:
            body = {"messages": messages, "max_tokens": 40}
            body |= {"stream_options": {"include_usage": True}} if path == "/v1/chat/completions" else {}
        answer, usage = said(path, client.post(path, json=body | more))
        n, held = USED[path](usage)
        costs.append(n - held)
        turns += [answer.strip() if path == "/v1/completions" else answer, following]
    new = [len(model.tokenizer.encode(text, bos=False)) for text in ("And of Japan?", "Name a planet.")]
    assert costs[0] > 20 and all(cost <= n + 12 for cost, n in zip(costs[1:], new, strict=True)), costs


FACTS = " ".join(f"The owl number {n} lives in Oslo." for n in range(60))
KEPT_APART = "import sys; from pathlib import Path; from llamacli import environment; from llamacli.cli import main; "
KEPT_APART += "environment.snapshots_folder = lambda: Path(sys.argv[1]); sys.exit(main(sys.argv[2:]))"


@pytest.mark.parametrize("others", [0, 1], ids=["alone", "while another answers"])
def test_a_server_that_starts_anew_reads_back_what_it_kept(tmp_path, others):
    """Blocks of 256 tokens are kept. The first server is killed, so it writes nothing at its end."""
    python = ("-c", KEPT_APART, str(tmp_path))

    def ask(client, question):
        messages = [{"role": "system", "content": FACTS}, {"role": "user", "content": question}]
        body = {"messages": messages, "temperature": 0, "max_tokens": 8}
        return said("/v1/chat/completions", client.post("/v1/chat/completions", json=body))

    with serve("--cache", "--cache-limit", "1G", python=python) as (_, client):
        text, usage = ask(client, "What is the capital of France?")
        n, held = USED["/v1/chat/completions"](usage)
        assert n > 512 and held == 0
    with serve("--cache", python=python) as (_, client):
        if others:
            long = chat("Hi", stream=True, temperature=1, ignore_eos=True, max_tokens=900)
            stream = client.stream("POST", "/v1/chat/completions", json=long)
            next(stream.__enter__().iter_text())
        again, usage = ask(client, "What is the capital of France?")
        n, held = USED["/v1/chat/completions"](usage)
        assert held >= (n - 1) // 256 * 256 >= 512 and again == text
        if others:
            stream.__exit__(None, None, None)
        other, usage = ask(client, "Name a planet.")
        n, held = USED["/v1/chat/completions"](usage)
        assert n - held < 20  # the session holds the rest
    with serve(python=python) as (_, client):
        assert ask(client, "Name a planet.")[0] == other


def test_a_line_a_request_with_v():
    with serve("-v", "--api-key", "topsecret") as (process, client):
        client.headers["x-api-key"] = "topsecret"
        client.post("/v1/chat/completions", json=chat("my words", max_tokens=3)).raise_for_status()
        client.get("/v1/models")
        process.send_signal(signal.SIGTERM)
        err = process.communicate(timeout=300)[1]
    lines = [line for line in err.splitlines() if re.match(r"\d{4}-\d\d-\d\d ", line)]
    assert re.search(r" /v1/chat/completions 200, \d+ tokens in \(0 reused\), 3 out, [\d.]+ s, [\d.]+ tok/s$", lines[0])
    assert re.search(r" /v1/models 200, [\d.]+ s$", lines[1]) and len(lines) == 2
    assert "words" not in err and "topsecret" not in err


def test_the_same_seed_gives_the_same_text(client):
    body = chat("Tell me something.", seed=3, temperature=1.5, max_tokens=20, n=2)
    first, second = (
        [c["message"]["content"] for c in client.post("/v1/chat/completions", json=body).json()["choices"]] for _ in range(2)
    )
    assert first == second and first[0] != first[1]


def test_a_schema_binds(client):
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}, "ok": {"type": "boolean"}},
        "required": ["n", "ok"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    for seed in range(3):
        body = client.post("/v1/chat/completions", json=chat(response_format=form, seed=seed, temperature=2)).json()
        found = json.loads(body["choices"][0]["message"]["content"])
        assert set(found) == {"n", "ok"} and 1 <= found["n"] <= 9 and type(found["ok"]) is bool
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    body = client.post("/v1/chat/completions", json=chat(tools=[tool], tool_choice="required", temperature=1)).json()
    (call,) = body["choices"][0]["message"]["tool_calls"]
    assert set(json.loads(call["function"]["arguments"])) == {"n", "ok"}


def test_a_schema_that_cannot_be_enforced_is_refused(client):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {"type": "string"}}}}
    refused = client.post("/v1/chat/completions", json=chat(response_format=form))
    assert refused.status_code == 400 and "not" in refused.json()["error"]["message"]
    stopped = chat(response_format={"type": "json_object"}, stop=["x"], stream=True)
    assert client.post("/v1/chat/completions", json=stopped).status_code == 400


def resident(process):
    """Bytes of memory that a process holds."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]) * 1024


def ask_many(process, client, n):
    """Memory after each fifth of `n` requests of all kinds, some of which end early."""
    found = []
    for i in range(n):
        question = f"{QUESTIONS[i % 5]} {i}"
        if i % 4 == 3:
            with client.stream("POST", "/v1/chat/completions", json=chat(question, stream=True, max_tokens=30)) as stream:
                next(stream.iter_raw())
        else:
            client.post("/v1/chat/completions", json=chat(question, max_tokens=4, logprobs=i % 2 == 0)).raise_for_status()
        if (i + 1) % (n // 5) == 0:
            found.append(resident(process))
    return found


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_memory_stays_flat(running):
    found = ask_many(*running, 200)
    assert found[-1] - found[1] < 4 << 20, found


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")
def test_memory_stays_flat_over_two_thousand_requests(running):
    found = ask_many(*running, 2000)
    print("MB after each fifth:", [round(n / 1e6, 1) for n in found])
    assert found[-1] - found[1] < 4 << 20, found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_soon_amid_an_answer(number):
    with serve() as (process, client):
        body = chat("Tell me a story.", stream=True, temperature=1, ignore_eos=True, max_tokens=900)
        with client.stream("POST", "/v1/chat/completions", json=body) as stream:
            texts = stream.iter_text()
            first = next(texts)
            process.send_signal(number)
            text = first + "".join(texts)  # raises RemoteProtocolError unless the stream comes to its proper end
        last = text.rstrip().rsplit("\n\n", 1)[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping" and "[DONE]" not in text
        assert process.wait(300) == -number
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    "args, words",
    [
        (["--host", "0.0.0.0"], "--api-key"),
        (["--host", "no.such.host.example"], "--host"),
        (["--port", "70000"], "65535"),
        (["--api-key", "a b"], "spaces"),
        (["--max-body", "5"], "unit"),
    ],
)
def test_what_cannot_be_served_is_refused(args, words, capfd):
    assert main(["serve", *args]) == 2
    out, err = capfd.readouterr()
    assert out == "" and words in err and err.count("\n") == 1


def test_a_port_in_use_is_named(capfd):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--port", port]) == 2
    assert port in capfd.readouterr().err


def test_keys_come_from_a_file_and_a_variable(tmp_path):
    (tmp_path / "keys").write_text("first\n\nsecond\n")
    with serve("--api-key-file", str(tmp_path / "keys"), env=os.environ | {"LLAMACLI_API_KEY": "third"}) as (_, client):
        known = {
            key: client.get("/v1/models", headers={"x-api-key": key}).status_code for key in ("first", "second", "third", "")
        }
    assert known == {"first": 200, "second": 200, "third": 200, "": 401}
