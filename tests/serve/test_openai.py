"""OpenAI's protocol, by its reference and its clients, with a miniature model and real sockets."""

import json

import pytest
from fakes import BOS, HEADER, FakeModel, Scripted
from serving import chat, events, serving

REPLY = "first line\nsecond line"


@pytest.fixture(scope="module")
def client():
    with serving(FakeModel(Scripted(REPLY, chunk=64), ctx=512)) as made:
        yield made


def error_of(response, status):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_a_whole_answer(client):
    body = client.post("/v1/chat/completions", json=chat()).json()
    assert body["object"] == "chat.completion" and body["model"] == "miniature"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": REPLY, "refusal": None},
            "finish_reason": "stop",
            "logprobs": None,
        }
    ]
    usage = body["usage"]
    assert (usage["completion_tokens"], usage["total_tokens"]) == (len(REPLY), usage["prompt_tokens"] + len(REPLY))


def test_a_stream_has_the_role_then_the_text_then_the_reason_then_the_usage(client):
    response = client.post("/v1/chat/completions", json=chat(stream=True, stream_options={"include_usage": True}))
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(response)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == REPLY
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == len(REPLY)
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1


def test_without_the_option_no_chunk_has_a_usage(client):
    assert all("usage" not in chunk for chunk in events(client.post("/v1/chat/completions", json=chat(stream=True))))


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_limit_cuts_the_answer(client, name):
    choice = client.post("/v1/chat/completions", json=chat(**{name: 5})).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (REPLY[:5], "length")


@pytest.mark.parametrize("stop", ["\n", ["zzz", "\nsec"]])
def test_a_stop_string_ends_the_answer_before_it(client, stop):
    choice = client.post("/v1/chat/completions", json=chat(stop=stop)).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("first line", "stop")


def test_several_choices_count_their_prompt_once(client):
    one = client.post("/v1/chat/completions", json=chat("n")).json()["usage"]
    body = client.post("/v1/chat/completions", json=chat("n", n=3)).json()
    assert [(c["index"], c["message"]["content"]) for c in body["choices"]] == [(i, REPLY) for i in range(3)]
    assert body["usage"]["prompt_tokens"] == one["prompt_tokens"]
    assert body["usage"]["completion_tokens"] == 3 * len(REPLY)


def test_log_probabilities(client):
    choice = client.post("/v1/chat/completions", json=chat(logprobs=True, top_logprobs=2, max_tokens=2)).json()["choices"][0]
    first = choice["logprobs"]["content"][0]
    assert (first["token"], first["bytes"], len(first["top_logprobs"])) == ("f", [102], 2)
    assert first["top_logprobs"][0]["token"] == "f" and first["logprob"] == first["top_logprobs"][0]["logprob"] < 0


def test_log_probabilities_of_a_completion_say_where_tokens_begin(client):
    body = client.post("/v1/completions", json={"prompt": "x", "logprobs": 1, "max_tokens": 3}).json()["choices"][0]
    assert body["logprobs"]["tokens"] == list(body["text"])
    assert body["logprobs"]["text_offset"] == [0, 1, 2]
    chunks = events(client.post("/v1/completions", json={"prompt": "x", "logprobs": 1, "max_tokens": 3, "stream": True}))
    offsets = [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    assert offsets == [[0], [1], [2]]


@pytest.mark.parametrize("prompt", ["text", [BOS, 65, 66], ["one", "two"], [[BOS, 65], [BOS, 66]]])
def test_prompts_of_a_completion(client, prompt):
    body = client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 2}).json()
    assert len(body["choices"]) == (2 if prompt[0] in ("one", [BOS, 65]) else 1)
    assert body["object"] == "text_completion"


def test_contents_may_be_lists_of_parts_and_roles_those_of_the_protocol(client):
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    response = client.post("/v1/chat/completions", json={"messages": messages, "user": "me", "metadata": {}, "store": False})
    assert response.status_code == 200
    prompt = bytes(id for id in client.server.model.engine.calls[-1 - len(REPLY)][1] if id < 256)
    assert b"one two" in prompt or response.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_settings_reach_the_sampler(client):
    asked = {"temperature": 0.5, "top_p": 0.8, "top_k": 4, "min_p": 0.1, "seed": 7, "logit_bias": {"65": -100}}
    client.post("/v1/chat/completions", json=chat(**asked, presence_penalty=0.5, repetition_penalty=1.1, max_tokens=1))
    found = client.server.model.settings
    assert found["temp"] == 0.5 and found["repeat_penalty"] == 1.1 and found["seed"] == 7 and found["logit_bias"] == {65: -100}


def test_each_choice_has_a_seed_of_its_own(client, monkeypatch):
    seeds, sampler = [], client.server.model.sampler
    monkeypatch.setattr(client.server.model, "sampler", lambda **s: seeds.append(s["seed"]) or sampler(**s))
    client.post("/v1/chat/completions", json=chat(n=3, seed=-1, max_tokens=1))
    assert seeds == [(1 << 63) - 1 + i for i in range(3)]


WRONG = {
    "messages": [
        {},
        {"messages": []},
        {"messages": "Hi"},
        {"messages": ["Hi"]},
        {"messages": [{"role": "user", "content": 5}]},
    ],
    "role": [{"messages": [{"role": "<|eot|>", "content": "x"}]}, {"messages": [{"content": "x"}]}],
    "value": [
        *(
            chat(**{name: value})
            for name in ("temperature", "top_p", "n", "max_tokens", "seed")
            for value in ("x", [1], -1e300)
        ),
        *(chat(**extra) for extra in ({"n": 0}, {"n": 10**6}, {"top_p": 1.5}, {"max_tokens": 0}, {"stream": "yes"})),
        *(chat(**extra) for extra in ({"top_logprobs": 3}, {"logprobs": True, "top_logprobs": 10**9}, {"stop": [""]})),
        *(chat(**extra) for extra in ({"logit_bias": {"a": 1}}, {"logit_bias": {"999999": 1}}, {"logit_bias": [1]})),
        chat(stop=["x"] * 1000),
        chat(temperature=True),
    ],
    "not supported": [
        chat(functions=[{"name": "f"}]),
        chat(tools=[{"type": "function", "function": {}}]),
        chat(tool_choice="required"),
        chat(tool_choice={"type": "function", "function": {"name": "f"}}),
        chat(modalities=["audio"]),
        chat(response_format={"type": "xml"}),
        chat(response_format={"type": "json_schema"}),
        chat(response_format={"type": "json_schema", "json_schema": {}}),
    ],
    "pictures": [
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}
        for url in ("file:///etc/passwd", "http://127.0.0.1/x.png", "/etc/passwd", "data:image/png;base64,AAAA", 5)
    ],
}


@pytest.mark.parametrize("body", [body for bodies in WRONG.values() for body in bodies], ids=lambda body: str(body)[:60])
def test_what_cannot_be_done_is_refused_and_said(client, body):
    assert error_of(client.post("/v1/chat/completions", json=body), 400)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "extra", [{"suffix": "x"}, {"echo": True}, {"best_of": 3}, {"prompt": []}, {"prompt": [-1]}, {"prompt": 5}]
)
def test_what_a_completion_cannot_do_is_refused(client, extra):
    error_of(client.post("/v1/completions", json={"prompt": "x", **extra}), 400)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"messages": NaN}', b"[" * 100000, b'{"a": "\\ud800"}', b"1" * 5000, b'"x"'],
    ids=lambda body: repr(body[:20]),
)
def test_a_body_that_is_no_object_is_refused(client, body):
    assert error_of(client.post("/v1/chat/completions", content=body), 400)["code"] == "invalid_json"


def test_a_prompt_that_leaves_no_room_says_how_much_there_is(client):
    error = error_of(client.post("/v1/chat/completions", json=chat("x" * 600)), 400)
    assert error["code"] == "context_length_exceeded" and "512" in error["message"]


@pytest.mark.parametrize(
    "long", [chat("x" * 4000), {"messages": [{"role": "user", "content": [{"type": "text", "text": "é" * 300}]}]}]
)
def test_a_text_that_cannot_fit_is_refused_before_it_is_cut_into_tokens(client, monkeypatch, long):
    monkeypatch.setattr(client.server.model, "prompt_ids", None)
    error = error_of(client.post("/v1/chat/completions", json=long), 400)
    assert error["code"] == "context_length_exceeded" and "512" in error["message"]
    monkeypatch.setattr(client.server.model.tokenizer, "encode", None, raising=False)
    assert error_of(client.post("/v1/completions", json={"prompt": "x" * 600}), 400)["code"] == "context_length_exceeded"


def test_a_full_context_is_a_length(client):
    body = client.post("/v1/completions", json={"prompt": [BOS, *[65] * 500, HEADER]}).json()
    assert body["choices"][0]["finish_reason"] == "length"


def test_models_are_listed_with_their_context(client):
    body = client.get("/v1/models").json()
    assert body["data"][0]["id"] == "miniature" and body["models"][0]["context_window"] == 512
    assert client.get("/v1/models/miniature").json() == body["data"][0]
    assert error_of(client.get("/v1/models/a/b"), 404)["code"] == "model_not_found"


def test_tokens_and_back(client):
    found = client.post("/tokenize", json={"content": "abc"}).json()
    assert found == {"tokens": [BOS, 97, 98, 99], "count": 4, "max_model_len": 512}
    assert client.post("/detokenize", json=found).json()["content"] == "abc"
    assert client.post("/tokenize", json={"content": "abc", "add_special": False}).json()["count"] == 3
    assert client.post("/tokenize", json=chat("abc")).json()["count"] > 4
    error_of(client.post("/detokenize", json={"tokens": [10**9]}), 400)


def test_unknown_addresses_and_methods(client):
    assert error_of(client.get("/v2/nothing"), 404)["type"] == "not_found_error"
    error_of(client.get("/v1/chat/completions"), 405)


def test_metrics_are_what_prometheus_reads(client):
    client.post("/v1/chat/completions", json=chat())
    lines = client.get("/metrics").text.splitlines()
    found = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}
    assert found['llamacli_requests_total{route="/v1/chat/completions",status="200"}'] >= 1
    assert found["llamacli_completion_tokens_total"] >= len(REPLY)
    assert found["llamacli_answers_active"] == 0
    assert found['llamacli_first_token_seconds_bucket{le="+Inf"}'] == found["llamacli_first_token_seconds_count"] >= 1


def test_json_is_utf_8_in_streams_and_bodies():
    with serving(FakeModel(Scripted("größer 你好 🦙", chunk=64), ctx=512)) as client:
        assert client.post("/v1/chat/completions", json=chat()).json()["choices"][0]["message"]["content"] == "größer 你好 🦙"
        texts = [
            e["choices"][0]["delta"].get("content", "")
            for e in events(client.post("/v1/chat/completions", json=chat(stream=True)))
        ]
        assert "".join(texts) == "größer 你好 🦙"
        assert json.loads(client.post("/v1/chat/completions", json=chat("🦙")).content)
