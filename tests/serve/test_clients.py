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
CHUNK = 64  # the miniature's cache goes back to a chunk's edge where a conversation differs from its contents
HI = [{"role": "user", "content": "Hi"}]
LONG = "You are an assistant that is asked to write code. " * 2  # any place then keeps what two prompts share


@pytest.fixture(scope="module")
def server():
    with serving(FakeModel(Scripted("hello there", chunk=CHUNK), ctx=3000), keys=["key"]) as made:
        yield made


@pytest.fixture
def says(server):
    """Sets the model's next answers."""

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


class Codex:
    """Sends requests as Codex does: the whole conversation each time, as a stream, with its own tools and fields."""

    def __init__(self, server):
        self.server, self.input = server, []
        shell = {
            "type": "function",
            "name": "shell",
            "description": "Runs a command.",
            "strict": False,
            "parameters": {
                "type": "object",
                "properties": {"command": {"type": "array", "items": {"type": "string"}}, "workdir": {"type": "string"}},
                "required": ["command"],
                "additionalProperties": False,
            },
        }
        plan = {"type": "function", "name": "update_plan", "strict": False, "parameters": {"type": "object", "properties": {}}}
        self.asked = {
            "model": "x",
            "instructions": "You are Codex, a coding agent. " * 10,
            "tools": [shell, plan, {"type": "web_search"}, {"type": "image_generation"}, {"type": "namespace", "name": "n"}],
            "tool_choice": "auto",
            "parallel_tool_calls": False,
            "reasoning": {"effort": "medium", "summary": "auto"},
            "store": False,
            "stream": True,
            "include": ["reasoning.encrypted_content"],
            "prompt_cache_key": "abc",
            "text": {"verbosity": "low"},
            "client_metadata": {"a": "b"},
        }

    def say(self, *items):
        """Add items, ask, and return the events of the answer, whose items become part of the conversation."""
        self.input += items
        headers = {"x-api-key": "key", "Accept": "text/event-stream", "originator": "codex_cli_rs", "session_id": "s"}
        answer = self.server.post("/v1/responses", json=self.asked | {"input": self.input}, headers=headers)
        assert answer.status_code == 200, answer.text
        blocks = [block.split("\n") for block in answer.text.split("\n\n") if block and not block.startswith(":")]
        assert all(len(b) == 2 and b[0].startswith("event: ") and b[1].startswith("data: ") for b in blocks)
        events = [json.loads(data[6:]) for _, data in blocks]
        assert [name[7:] for name, _ in blocks] == [event["type"] for event in events]
        assert [event["sequence_number"] for event in events] == [*range(len(events))]
        done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        assert events[-1]["type"] == "response.completed" and events[-1]["response"]["output"] == done
        self.input += [{"type": "reasoning", "summary": [], "encrypted_content": None}, *done]
        return events


def test_a_session_as_codex_has_it(says, server):
    codex, costs = Codex(server), []
    user = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "<environment_context>linux"}]}
    says('I look. {"name": "shell", "parameters": {"command": ["ls"]}}')
    events = codex.say(user, user | {"content": [{"type": "input_text", "text": "list the files"}]})
    message, call = events[-1]["response"]["output"]
    assert message["content"][0]["text"].strip() == "I look."
    assert (call["type"], call["name"], json.loads(call["arguments"])) == ("function_call", "shell", {"command": ["ls"]})
    about = [event["type"] for event in events if event.get("output_index") == 1]
    assert about == [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
    ]
    for output, reply in (
        ("a.txt b.txt", '{"name": "shell", "parameters": {"command": ["cat", "a.txt"]}}'),
        ("text", "two files"),
    ):
        costs.append(events[-1]["response"]["usage"])
        call = next(item for item in reversed(codex.input) if item["type"] == "function_call")
        says(reply)
        events = codex.say({"type": "function_call_output", "call_id": call["call_id"], "output": output})
        assert output in prompt_of(server)
    last = events[-1]["response"]
    assert [item["type"] for item in last["output"]] == ["message"] and last["output"][0]["content"][0]["text"] == "two files"
    for before, after in zip(costs, [*costs[1:], last["usage"]], strict=True):  # the earlier conversation is reused
        assert after["input_tokens_details"]["cached_tokens"] >= (before["input_tokens"] - 1) // CHUNK * CHUNK


def test_codex_can_check_whether_the_server_responds(server):
    asked = Codex(server).asked | {"input": [], "max_output_tokens": 1, "stream": False}
    assert server.post("/v1/responses", json=asked, headers={"x-api-key": "key"}).status_code == 200


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


class ClaudeCode:
    """Sends requests as Claude Code does: blocks with cache_control, dozens of tools, a count before, ?beta=true, always a
    stream.
    """

    def __init__(self, server):
        self.server, self.messages = server, []
        self.schema = {"$schema": "http://json-schema.org/draft-07/schema#", "type": "object", "additionalProperties": False}
        tools = [{"name": f"Tool{n}", "description": f"Does {n}.", "input_schema": self.schema} for n in range(24)]
        command = {"command": {"type": "string", "description": "The command."}, "timeout": {"type": "number"}}
        bash = {"name": "Bash", "description": "Runs a command.", "input_schema": self.schema | {"properties": command}}
        self.asked = {
            "model": "claude-x",
            "system": [
                {"type": "text", "text": "x-anthropic-billing-header: cc_version=2"},
                {"type": "text", "text": "You are Claude Code.", "cache_control": {"type": "ephemeral"}},
                {"type": "text", "text": "Be brief. " * 20, "cache_control": {"type": "ephemeral", "ttl": "1h"}},
            ],
            "tools": [bash, *tools, {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}],
        }
        self.more = {
            "max_tokens": 500,
            "metadata": {"user_id": "user_1"},
            "thinking": {"type": "adaptive"},
            "temperature": 1,
            "context_management": {"edits": []},
            "stream": True,
        }

    def post(self, path, body):
        headers = {
            "x-api-key": "key",
            "anthropic-version": "2023-06-01",
            "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14",
            "x-app": "cli",
        }
        answer = self.server.post(f"{path}?beta=true", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        return answer

    def say(self, *blocks):
        """Add a user's blocks, ask, and return the content, the reason and the usage of the answer."""
        self.messages.append({"role": "user", "content": [*blocks]})
        body = self.asked | {"messages": self.messages}
        counted = self.post("/v1/messages/count_tokens", body).json()["input_tokens"]
        text = self.post("/v1/messages", body | self.more).text
        events = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: ")]
        assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
        content, usage = [], events[0]["message"]["usage"]
        for event in events[1:-2]:
            if event["type"] == "content_block_start":
                assert event["index"] == len(content)
                content.append(event["content_block"] | {"json": ""})
            elif event["type"] == "content_block_delta" and event["delta"]["type"] == "text_delta":
                content[-1]["text"] += event["delta"]["text"]
            elif event["type"] == "content_block_delta":
                content[-1]["json"] += event["delta"]["partial_json"]
        for block in content:
            made = block.pop("json")
            if block["type"] == "tool_use":
                block["input"] = json.loads(made)
        assert counted == usage["input_tokens"] + usage["cache_read_input_tokens"]
        thinking = {"type": "thinking", "thinking": "hm", "signature": "s"}
        self.messages.append({"role": "assistant", "content": [thinking, *content]})
        return content, events[-2]["delta"]["stop_reason"], usage


def test_a_session_as_claude_code_has_it(says, server):
    assert server.head("/").status_code == 200  # it checks whether the server responds
    claude = ClaudeCode(server)
    quota = {"model": "claude-haiku-x", "max_tokens": 1, "messages": [{"role": "user", "content": "quota"}]}
    assert claude.post("/v1/messages", quota).json()["stop_reason"] in ("max_tokens", "end_turn")
    says('I look.\n{"name": "Bash", "parameters": {"command": "ls"}}; {"name": "Tool3", "parameters": {}}')
    reminder = {"type": "text", "text": "<system-reminder>today</system-reminder>"}
    content, reason, first = claude.say(reminder, {"type": "text", "text": "list", "cache_control": {"type": "ephemeral"}})
    text, bash, other = content
    assert text["text"].strip() == "I look." and reason == "tool_use" and first["cache_read_input_tokens"] < 20
    assert (bash["name"], bash["input"], other["name"], other["input"]) == ("Bash", {"command": "ls"}, "Tool3", {})
    assert bash["id"] != other["id"]
    assert [tool["function"]["name"] for tool in server.server.model.offered][:2] == ["Bash", "Tool0"]
    says("two files")
    results = [
        {
            "type": "tool_result",
            "tool_use_id": bash["id"],
            "content": [{"type": "text", "text": "a.txt b.txt"}],
            "is_error": False,
        },
        {"type": "tool_result", "tool_use_id": other["id"], "content": "no such thing", "is_error": True},
    ]
    content, reason, second = claude.say(*results, reminder | {"cache_control": {"type": "ephemeral"}})
    assert (content[0]["text"], reason) == ("two files", "end_turn")
    said = prompt_of(server)
    assert "i\na.txt b.txt" in said and "i\nno such thing" in said
    held = second["cache_read_input_tokens"]
    before = first["input_tokens"] + first["cache_read_input_tokens"]
    assert held >= (before - 1) // CHUNK * CHUNK  # the earlier conversation


# llm


@pytest.fixture
def llm(server, tmp_path, monkeypatch):
    """Runs the command `llm` with the server; returns its output."""
    from click.testing import CliRunner

    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    monkeypatch.setenv("LLM_LOAD_PLUGINS", "")
    (tmp_path / "keys.json").write_text('{"ours": "key"}')
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: ours\n  model_name: miniature\n  api_base: {server.base_url}/v1\n  api_key_name: ours\n"
        f"  supports_tools: true\n  supports_schema: true\n"
    )
    from llm.cli import cli

    def run(*args):
        done = CliRunner().invoke(cli, [*args], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output.strip()

    return run


def test_llm_asks_as_a_stream_and_whole_and_goes_on_with_a_conversation(llm, says, server):
    assert llm("-m", "ours", "What is it?") == "hello there"
    says("whole")
    assert llm("-m", "ours", "-s", "be brief", "--no-stream", "What is it then?") == "whole"
    says("gone on")
    assert llm("-c", "And then?") == "gone on"
    assert "What is it then?" in prompt_of(server) and "be brief" in prompt_of(server)
    assert llm("-m", "ours", "-o", "temperature", "0.5", "-o", "max_tokens", "3", "Hi") == "gon"


def test_llm_binds_an_answer_to_a_schema(llm, says, server):
    says('{"city": "Oslo", "days": 3}')
    assert json.loads(llm("-m", "ours", "--schema", "city, days int", "Where?")) == {"city": "Oslo", "days": 3}
    bound = jsonschema.Draft202012Validator(server.server.model.settings["schema"])
    assert bound.is_valid({"city": "Oslo", "days": 3}) and not bound.is_valid({"city": "Oslo"})


def test_llm_runs_a_tool_and_comes_back_with_its_result(llm, says, server, monkeypatch):
    engine = server.server.model.engine
    says('{"name": "weather", "parameters": {"city": "Oslo"}}')
    called = "def weather(city: str) -> str:\n    return 'rain in ' + city\n"
    reply, prompt_ids = engine.reply, server.server.model.prompt_ids

    def once_called(messages, *more, **how):
        engine.reply = [*b"It rains.", EOT] if messages[-1]["role"] == "ipython" else reply
        return prompt_ids(messages, *more, **how)

    monkeypatch.setattr(server.server.model, "prompt_ids", once_called)
    assert llm("-m", "ours", "--functions", called, "How is it in Oslo?").endswith("It rains.")
    assert "i\nrain in Oslo" in prompt_of(server)
