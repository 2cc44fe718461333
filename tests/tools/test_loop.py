"""Answers with tools: scripted models call, are told, and answer; whatever a tool does, the conversation goes on."""

import pytest
from fakes import Answers, FakeModel

from llamacli.errors import UsageError
from llamacli.text.calls import Call
from llamacli.tools.loop import Toolbox
from llamacli.tools.tool import Tool


def weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def add(a: int, b: int) -> int:
    return a + b


def broken() -> str:
    raise ValueError("out of order")


QUESTION = [{"role": "user", "content": "?"}]
OSLO = '{"name": "weather", "parameters": {"city": "Oslo"}}'


def ask(*replies, tools=(weather, add, broken), box=None, **more):
    """(the pieces, the prompts that the model saw as text)"""
    model = FakeModel(Answers(*replies))
    pieces = list(model.chat(QUESTION, box or Toolbox(tools), **more))
    everything = [bytes(t if t < 256 else 124 for t in ids).decode() for _, ids in model.engine.calls if len(ids) > 1]
    return pieces, everything


def text(pieces):
    return "".join(piece.text for piece in pieces)


def test_two_tools_are_called_and_their_results_answered():
    pieces, prompts = ask(f"I look.\n{OSLO}", "[add(a=2, b=40)]", "Sunny, and 42.")
    assert text(pieces) == "I look.\nSunny, and 42."
    assert pieces[-1].finish_reason == "stop"
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert "i\nsunny in Oslo" in prompts[1]
    assert "i\n42" in prompts[2]


def test_several_calls_at_once_give_a_result_each_in_their_order():
    _, prompts = ask(f"{OSLO}; {OSLO.replace('Oslo', 'Rome')}", "done")
    assert "i\nsunny in Oslo|i\nsunny in Rome" in prompts[1]


def test_an_answer_without_calls_is_as_without_tools():
    pieces, prompts = ask('{"name": "unknown", "parameters": {}} [x]')
    assert text(pieces) == '{"name": "unknown", "parameters": {}} [x]'
    assert len(prompts) == 1


@pytest.mark.parametrize(
    "call, words",
    [
        ("[broken()]", "error: ValueError: out of order"),
        ("[add(a=1)]", "error: expected the argument b, found none"),
        ('[add(a=1, b="x")]', 'error: b: expected integer, found "x"'),
        ("[weather(city='x', days=1)]", "error: expected one of city, found the argument days"),
    ],
)
def test_a_call_that_fails_is_told_to_the_model(call, words):
    _, prompts = ask(call, "sorry")
    assert f"i\n{words}" in prompts[1]


def test_nothing_runs_that_is_not_allowed_and_the_model_is_told():
    ran, asked = [], []
    tool = Tool("f", "", {"type": "object"}, lambda arguments, timeout: ran.append(1) or "ran")
    box = Toolbox([tool], ask=lambda call: asked.append(call) or len(asked) > 1)
    pieces, prompts = ask("[f()]", "[f()]", "done", box=box)
    assert asked == [Call("f", {})] * 2
    assert ran == [1]
    assert "i\nerror: the user does not allow this call" in prompts[1]
    assert text(pieces) == "done"
    assert box.record == [
        {"name": "f", "parameters": {}, "result": "error: the user does not allow this call", "failed": True},
        {"name": "f", "parameters": {}, "result": "ran", "failed": False},
    ]


def test_rounds_are_limited():
    box = Toolbox([weather], rounds=2)
    pieces, prompts = ask(OSLO, OSLO, OSLO, box=box)
    assert pieces[-1].finish_reason == "rounds"
    assert (len(prompts), len(box.results)) == (3, 2)


def test_calls_that_nothing_here_runs_are_left_to_the_reader():
    box = Toolbox([Tool("f", "", {"type": "object"}), weather])
    pieces, _ = ask(f"See: [f()] {OSLO}", box=box)
    assert (text(pieces), pieces[-1].finish_reason) == ("See: ", "tool_calls")
    assert box.calls == [Call("f", {}), Call("weather", {"city": "Oslo"})]
    assert box.results == []


def test_the_limit_of_tokens_is_that_of_all_answers_together():
    pieces, _ = ask(OSLO, "x" * 100, max_tokens=len(OSLO) + 5)
    assert (text(pieces), pieces[-1].finish_reason) == ("x" * 5, "length")
    pieces, prompts = ask(OSLO, "x", max_tokens=len(OSLO) - 1)
    assert (text(pieces), pieces[-1].finish_reason, len(prompts)) == (OSLO[:-1], "length", 1)


def test_calls_before_a_cut_are_not_run_and_not_lost():
    box = Toolbox([weather])
    pieces, prompts = ask(f"{OSLO}; {OSLO}", box=box, max_tokens=len(OSLO) + 4)
    assert (text(pieces), pieces[-1].finish_reason, len(prompts)) == ('{"', "length", 1)
    assert (box.results, box.calls) == ([], [Call("weather", {"city": "Oslo"})])


def test_a_long_result_is_cut_and_says_so():
    tool = Tool("f", "", {"type": "object"}, lambda arguments, timeout: "y" * 100_000)
    _, prompts = ask("[f()]", "done", box=Toolbox([tool], rounds=1), max_tokens=50)
    assert "[cut here: 2042 of 100000 characters]" in prompts[1]


def test_the_model_is_told_of_its_tools():
    model = FakeModel(Answers("hi"))
    list(model.stream(QUESTION, tools=[weather]))
    (function,) = (definition["function"] for definition in model.offered)
    assert (function["name"], function["description"]) == ("weather", "The weather of a city.")


def test_two_tools_of_one_name_are_refused():
    with pytest.raises(UsageError, match="weather twice"):
        Toolbox([weather, weather])


def test_a_reader_who_stops_early_leaves_nothing_behind():
    model = FakeModel(Answers(OSLO, "a long answer"))
    pieces = model.chat(QUESTION, [weather])
    while not next(pieces).text:
        pass
    pieces.close()
    assert list(FakeModel(Answers("x")).chat(QUESTION, [weather]))[-1].finish_reason == "stop"


def test_a_result_with_half_of_a_pair_is_told_all_the_same():
    """JSON can say it, so a server can; a prompt cannot."""
    half = Tool("half", "", {}, lambda arguments, timeout: "a \ud800 b")
    pieces, prompts = ask('{"name": "half", "parameters": {}}', "So?", tools=[half])
    assert text(pieces) == "So?"
    assert "a ? b" in prompts[1]


def test_a_call_too_deep_for_templates_is_text():
    deep = '{"name": "weather", "parameters": {"city": ' + "[" * 400 + "]" * 400 + "}}"
    pieces, _ = ask(deep)
    assert text(pieces) == deep
