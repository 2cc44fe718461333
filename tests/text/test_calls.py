"""Tool calls in answers: every dialect of Llama 4, complete and in any pieces; malformed calls stay text."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamacli.text.calls import Call, CallParser

TOOLS = {"get_weather": ["city", "days"], "now": [], "math.add": ["a", "b"], "read-file": ["path"], "get": ["x"]}
PARIS = Call("get_weather", {"city": "Paris"})
CALLS = [  # what the model says, the text that is shown, the calls
    ('{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
    ('{"name": "get_weather", "arguments": {"city": "Paris"}}', "", [PARIS]),
    ('{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
    ('{"type": "function", "function": {"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}}', "", [PARIS]),
    ('{"function": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
    ('{"parameters": {"city": "Paris"}, "name": "get_weather"}\n', "", [PARIS]),
    ('{"name": "now", "parameters": {}}', "", [Call("now", {})]),
    ('{"name": "now"}', "", [Call("now", {})]),
    ('{"name": "now", "parameters": null}', "", [Call("now", {})]),
    ('{"name":"now"}; {"name": "get_weather", "parameters": {"city": "Paris"}}', "", [Call("now", {}), PARIS]),
    ('{"name":"now"}\n{"name":"now"},{"name":"now"}', "", [Call("now", {})] * 3),
    ('[{"name": "now"}, {"name": "get_weather", "parameters": {"city": "Paris"}}]', "", [Call("now", {}), PARIS]),
    ('<|python_start|>{"name": "now"}<|python_end|>', "", [Call("now", {})]),
    ('<|python_start|>{"name": "now"}', "", [Call("now", {})]),  # ended by <|eom|>
    ('<|python_start|>\n{"name": "now"};{"name": "now"}\n<|python_end|>\n', "", [Call("now", {})] * 2),
    ('<|python_start|>[now(), now()]<|python_end|>', "", [Call("now", {})] * 2),
    ('<|python_start|>get_weather(city="Paris")<|python_end|>', "", [PARIS]),
    ('{"name": "now"}<|python_end|>', "", [Call("now", {})]),
    ('I look.\n\n{"name": "now"}', "I look.\n\n", [Call("now", {})]),
    ('<|python_start|>I look.<|python_end|>{"name": "now"}', "<|python_start|>I look.<|python_end|>", [Call("now", {})]),
    ('[get_weather(city="Paris")]', "", [PARIS]),
    ("[get_weather(city='Paris', days=3), now()]", "", [Call("get_weather", {"city": "Paris", "days": 3}), Call("now", {})]),
    ('[get_weather("Paris", days=-2.5)]', "", [Call("get_weather", {"city": "Paris", "days": -2.5})]),
    ('[[now()], [get(x=[1, ["a)]"], {"k": None}])]]', "", [Call("now", {}), Call("get", {"x": [1, ["a)]"], {"k": None}]})]),
    ("[get(x=true)]", "", [Call("get", {"x": True})]),
    ('Sure: [math.add(a=1, b=2)] and more', "Sure: and more", [Call("math.add", {"a": 1, "b": 2})]),
    ("[read-file(path='a now() b')]", "", [Call("read-file", {"path": "a now() b"})]),
    ('<function=get_weather>{"city": "Paris"}</function>', "", [PARIS]),
    ('<function=now></function>', "", [Call("now", {})]),
    ('<function=now>{}', "", [Call("now", {})]),
    ('Well.\n<function=now>{}</function>\n<function=now>{}</function>', "Well.\n", [Call("now", {})] * 2),
    ('{"name": "get", "parameters": {"x": "é \\"}\\" <|eot|> [now()]"}}', "", [Call("get", {"x": 'é "}" <|eot|> [now()]'})]),
]  # fmt: skip
TEXTS = [
    "",
    "Hello.",
    "a < b and [1, 2] and {x}",
    '{"answer": 42}',
    '{"name": "Alice", "age": 7}',
    '{"name": "get_weather", "age": 7}',
    '{"name": "unknown", "parameters": {}}',
    '{"name": "get_weather", "parameters": [1]}',
    '{"name": "get_weather", "parameters": "x"}',
    '{"name": "get_weather", "parameters": {"city": "Par',
    '{"name": "get_weather", "parameters": {"city": Paris}}',
    '{"name": "get_weather", "parameters": {"days": NaN}}',
    '{"name": "now"',
    '[{"name": "now"}, 3]',
    '{"name": "unknown", "parameters": {"inner": {"name": "now"}}}',
    "[get(x=true)",
    "[now()",
    "[now(",
    "[now]",
    "[now](http://x)",
    "[unknown()]",
    "[now(), unknown()]",
    "[now(1)]",
    "[get(x=1, x=2)]",
    "[get(**{})]",
    "[get(x=open('f'))]",
    "[get(x=__import__('os').system('true'))]",
    "[get(x=1 + 2)]",
    "[get(x='a]",
    "[get(x=1e999)]",
    "[get(x=f'{1}')]",
    "[now() for _ in range(9)]",
    "now()",
    "<function=unknown>{}</function>",
    "<function=now>{broken}</function>",
    "<function=now>text",
    "<|python_start|>print(1)<|python_end|>",
    "<|python_start|>",
    "<|python_start|>{",
    "<|python_",
    "<|python_end|>",
    "[" * 300 + "now()",
    "[get(x=" + "[" * 5000 + "]" * 5000 + ")]",
    "[get(x=" + "-" * 20000 + "1)]",
    '{"name": "get", "parameters": ' + "[" * 100_000 + "]" * 100_000 + "}",
    '{"name": "get", "parameters": {"x": ' + "9" * 5000 + "}}",
]


def said(pieces):
    parser = CallParser(TOOLS)
    shown = "".join(map(parser.push, pieces)) + parser.close()
    return shown, parser.calls


@pytest.mark.parametrize("text, shown, calls", CALLS)
def test_a_call_is_read_in_every_dialect(text, shown, calls):
    assert said([text]) == (shown, calls)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:40])
def test_what_is_no_call_is_shown_to_the_last_character(text):
    assert said([text]) == (text, [])


@pytest.mark.parametrize("text, shown, calls", [*CALLS, *((text, text, []) for text in TEXTS if len(text) < 2000)])
def test_pieces_of_any_size_give_the_same(text, shown, calls):
    assert said(text) == (shown, calls)  # a character each
    for n in (2, 3, 5, 7, 11):
        assert said([text[i : i + n] for i in range(0, len(text), n)]) == (shown, calls)


@settings(max_examples=100)
@given(
    st.lists(
        st.sampled_from([c[0] for c in CALLS] + [t for t in TEXTS if len(t) < 80] + ["\n", " ", "x", ";", "{", "[", '"']),
        max_size=4,
    ),
    st.data(),
)
def test_whole_and_streamed_are_the_same_for_any_mixture(parts, data):
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert said(pieces) == said([text])


def test_text_is_shown_at_once_where_it_can_be_no_call():
    parser = CallParser(TOOLS)
    assert [parser.push(piece) for piece in ("A ", "list: [1", ", 2]", ' {"ans', 'wer": 1}', " [x]", "(y)")] == [
        "A ", "list: [1", ", 2]", ' {"ans', 'wer": 1}', " [x]", "(y)"
    ]  # fmt: skip
    assert [parser.push(piece) for piece in ("see [get_", "wea", "k]")] == ["see ", "", "[get_weak]"]


@settings(max_examples=40)
@given(
    st.dictionaries(
        st.text(max_size=8),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
            lambda inner: st.lists(inner, max_size=3),
            max_leaves=6,
        ),
        max_size=4,
    )
)
def test_any_arguments_come_back_as_they_were_written(arguments):
    for text in (json.dumps({"name": "get", "parameters": arguments}), f"[get(x={arguments!r})]"):
        expected = arguments if text[0] == "{" else {"x": arguments}
        assert said([text]) == ("", [Call("get", expected)])
