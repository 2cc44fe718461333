"""The official clients of OpenAI and Anthropic, and requests shaped as Codex and Claude Code send them."""

import json

import anthropic
import jsonschema
import openai
import pytest
from fakes import EOT, FakeModel, Scripted
from serving import serving

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}
CALL = '{"name": "weather", "parameters": {"city": "Paris", "days": 2}}'
HI = [{"role": "user", "content": "Hi"}]
LONG = "You are an assistant that is asked to write code. " * 2  # what two prompts share is then kept in whatever place is free


@pytest.fixture(scope="module")
def server():
    with serving(FakeModel(Scripted("hello there", chunk=64), ctx=3000), keys=["key"]) as made:
        yield made


@pytest.fixture
def says(server):
    """Has the model say something from now on."""

    def say(text):
        server.server.model.engine.reply = [*text.encode(), EOT]

    say("hello there")
    return say


@pytest.fixture(scope="module")
def gpt(server):
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="key", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def claude(server):
    with anthropic.Anthropic(base_url=str(server.base_url), api_key="key", max_retries=0) as made:
        yield made


def prompt_of(server):
    """The latest whole prompt, as text."""
    return bytes(t for call in server.server.model.engine.calls for t in call[1] if t < 256).decode(errors="replace")


# OpenAI: chat

TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": SCHEMA}}]


def test_openai_chat(gpt, says):
    answer = gpt.chat.completions.create(model="x", messages=HI)
    assert answer.choices[0].message.content == "hello there" and answer.usage.completion_tokens == 11
    chunks = [*gpt.chat.completions.create(model="x", messages=HI, stream=True, stream_options={"include_usage": True})]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "hello there"
    assert chunks[-1].usage.total_tokens == answer.usage.total_tokens


def test_openai_completions_models_and_errors(gpt, says, server):
    assert gpt.completions.create(model="x", prompt="a", max_tokens=5).choices[0].text == "ello "
    assert [model.id for model in gpt.models.list()] == ["miniature"]
    with pytest.raises(openai.BadRequestError, match="temperature"):
        gpt.chat.completions.create(model="x", messages=HI, temperature="hot")
    with pytest.raises(openai.AuthenticationError):
        gpt.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.BadRequestError) as full:
        gpt.chat.completions.create(model="x", messages=[{"role": "user", "content": "x" * 4000}])
    assert full.value.code == "context_length_exceeded"


@pytest.mark.parametrize("before", ["", "I look it up. "])
def test_a_call_is_taken_out_of_the_text(gpt, says, before):
    says(before + CALL)
    choice = gpt.chat.completions.create(model="x", messages=HI, tools=TOOLS).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == (before.strip() or None)
    (call,) = choice.message.tool_calls
    assert call.function.name == "weather" and json.loads(call.function.arguments) == {"city": "Paris", "days": 2}


def test_a_call_in_a_stream(gpt, says):
    says(f"So. {CALL}; {CALL}")
    with gpt.chat.completions.stream(model="x", messages=HI, tools=TOOLS) as stream:
        choice = stream.get_final_completion().choices[0]  # put together by the client itself
    assert choice.message.content == "So. " and choice.finish_reason == "tool_calls"
    assert [json.loads(call.function.arguments)["city"] for call in choice.message.tool_calls] == ["Paris", "Paris"]
    assert len({call.id for call in choice.message.tool_calls}) == 2
    one = gpt.chat.completions.create(model="x", messages=HI, tools=TOOLS, parallel_tool_calls=False)
    assert len(one.choices[0].message.tool_calls) == 1


def test_without_an_offer_a_call_is_text(gpt, says):
    says(CALL)
    for how in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        choice = gpt.chat.completions.create(model="x", messages=HI, **how).choices[0]
        assert (choice.message.content, choice.finish_reason, choice.message.tool_calls) == (CALL, "stop", None)


def test_results_go_back_to_the_model(gpt, says, server):
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    told = [*HI, {"role": "assistant", "content": None, "tool_calls": [call]}]
    gpt.chat.completions.create(
        model="x", messages=[*told, {"role": "tool", "tool_call_id": "call_1", "content": "rain in Oslo"}], tools=TOOLS
    )
    assert "i\nrain in Oslo" in prompt_of(server)  # the miniature's template writes the first letter of a role: ipython
    assert server.server.model.offered[0]["function"]["name"] == "weather"
    with pytest.raises(openai.BadRequestError, match="arguments"):
        call["function"]["arguments"] = "[1"
        gpt.chat.completions.create(model="x", messages=told, tools=TOOLS)


def test_a_call_that_must_be_binds_the_answer(gpt, says, server):
    says(CALL)
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        answer = gpt.chat.completions.create(model="x", messages=HI, tools=TOOLS, tool_choice=choice)
        assert answer.choices[0].message.tool_calls
        bound = jsonschema.Draft202012Validator(server.server.model.settings["schema"])
        assert bound.is_valid(json.loads(CALL))
        assert not bound.is_valid({"name": "other", "parameters": {}})
    with pytest.raises(openai.BadRequestError, match="beside"):
        gpt.chat.completions.create(model="x", messages=HI, tools=TOOLS, response_format={"type": "json_object"})


# OpenAI: responses


def test_openai_responses(gpt, says):
    answer = gpt.responses.create(model="x", input="Hi", instructions="be brief")
    assert answer.output_text == "hello there" and answer.status == "completed"
    assert answer.usage.output_tokens == 11 and answer.usage.total_tokens == answer.usage.input_tokens + 11
    with gpt.responses.stream(model="x", input=HI) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == "hello there"
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-1] == "response.completed"


def test_openai_responses_cut_short(gpt, says):
    answer = gpt.responses.create(model="x", input="Hi", max_output_tokens=5)
    assert (answer.status, answer.incomplete_details.reason, answer.output_text) == ("incomplete", "max_output_tokens", "hello")


def test_openai_responses_stores_nothing(gpt, says):
    with pytest.raises(openai.BadRequestError, match="stores no conversations"):
        gpt.responses.create(model="x", input="Hi", previous_response_id="resp_1")


def test_requests_as_codex_sends_them(gpt, says, server):
    tool = {
        "type": "function",
        "name": "shell",
        "strict": False,
        "parameters": {"type": "object", "properties": {"command": {}}},
    }
    asked = {
        "model": "x",
        "instructions": LONG,
        "tools": [tool, {"type": "web_search"}, {"type": "image_generation"}, {"type": "namespace", "name": "n"}],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"summary": "auto"},
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "abc",
        "text": {"verbosity": "low"},
        "client_metadata": {"a": "b"},
    }
    probe = server.post("/v1/responses", json=asked | {"input": [], "max_output_tokens": 1}, headers={"x-api-key": "key"})
    assert probe.status_code == 200
    turn = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "list the files"}]}]
    says('{"name": "shell", "parameters": {"command": ["ls"]}}')
    answer = server.post("/v1/responses", json=asked | {"input": turn}, headers={"x-api-key": "key"}).json()
    (call,) = answer["output"]
    assert call["type"] == "function_call" and json.loads(call["arguments"]) == {"command": ["ls"]}
    says("two files")
    turn += [
        {"type": "reasoning", "summary": [], "encrypted_content": None},
        call,
        {"type": "function_call_output", "call_id": call["call_id"], "output": "a.txt b.txt"},
    ]
    stream = server.post("/v1/responses", json=asked | {"input": turn, "stream": True}, headers={"x-api-key": "key"}).text
    last = json.loads(stream.strip().split("data: ")[-1])
    assert last["type"] == "response.completed"
    assert last["response"]["output"][0]["content"][0]["text"] == "two files"
    assert last["response"]["usage"]["input_tokens_details"]["cached_tokens"] > 0
    assert "a.txt b.txt" in prompt_of(server)


# Anthropic


def test_anthropic_messages(claude, says):
    answer = claude.messages.create(model="x", max_tokens=50, messages=HI, system="be brief")
    assert answer.content[0].text == "hello there" and answer.stop_reason == "end_turn"
    assert answer.usage.output_tokens == 11 and answer.usage.input_tokens > 0
    with claude.messages.stream(model="x", max_tokens=5, messages=HI) as stream:
        assert "".join(stream.text_stream) == "hello"
        final = stream.get_final_message()
    assert final.stop_reason == "max_tokens" and final.usage.output_tokens == 5


def test_anthropic_stop_sequences_are_named(claude, says):
    answer = claude.messages.create(model="x", max_tokens=50, messages=HI, stop_sequences=["zzz", " the"])
    assert (answer.content[0].text, answer.stop_reason, answer.stop_sequence) == ("hello", "stop_sequence", " the")


def test_anthropic_counts_the_tokens_that_a_message_then_has(claude, says):
    messages = [{"role": "user", "content": [{"type": "text", "text": "count this"}]}]
    counted = claude.messages.count_tokens(model="x", messages=messages, system="s").input_tokens
    usage = claude.messages.create(model="x", max_tokens=1, messages=messages, system="s").usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens


def test_anthropic_errors(claude, says):
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        claude.messages.create(model="x", max_tokens=0, messages=HI)
    with pytest.raises(anthropic.AuthenticationError) as refused:
        claude.with_options(api_key="wrong").messages.create(model="x", max_tokens=1, messages=HI)
    assert refused.value.body == {
        "type": "error",
        "error": {"type": "authentication_error", "message": refused.value.body["error"]["message"]},
    }
    source = {"type": "url", "url": "http://127.0.0.1/a.png"}
    with pytest.raises(anthropic.BadRequestError, match="opens no address"):
        picture = [{"role": "user", "content": [{"type": "image", "source": source}]}]
        claude.messages.create(model="x", max_tokens=1, messages=picture)


def test_requests_as_claude_code_sends_them(claude, says, server):
    tool = {"name": "Bash", "description": "Runs a command.", "input_schema": {"type": "object", "properties": {"command": {}}}}
    asked = {
        "model": "claude-x",
        "max_tokens": 500,
        "system": [{"type": "text", "text": LONG, "cache_control": {"type": "ephemeral"}}],
        "tools": [tool, {"type": "web_search_20250305", "name": "web_search"}],
        "metadata": {"user_id": "u"},
        "thinking": {"type": "adaptive"},
    }
    turn = [{"role": "user", "content": [{"type": "text", "text": "list", "cache_control": {"type": "ephemeral"}}]}]
    says('I look.\n{"name": "Bash", "parameters": {"command": "ls"}}')
    with claude.messages.stream(messages=turn, **asked) as stream:
        answer = stream.get_final_message()
    text, use = answer.content
    assert (text.text.strip(), use.name, use.input, answer.stop_reason) == ("I look.", "Bash", {"command": "ls"}, "tool_use")
    says("two files")
    result = [{"type": "text", "text": "a.txt b.txt"}]
    turn += [
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "hm", "signature": "s"}, *answer.model_dump()["content"]],
        },
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": result, "is_error": False}]},
    ]
    answer = claude.messages.create(messages=turn, **asked)
    assert answer.content[0].text == "two files" and answer.usage.cache_read_input_tokens > 0
    assert "i\na.txt b.txt" in prompt_of(server)
    assert claude.messages.count_tokens(messages=turn, **{k: asked[k] for k in ("model", "system", "tools")}).input_tokens > 0
