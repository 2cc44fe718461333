"""Bound calls: whatever a small model would say, its calls parse and their arguments fit the tools' schemas."""

import json

import jsonschema
import numpy as np
import pytest

from llamacli import Model, environment
from llamacli.errors import LlamacliError, UsageError
from llamacli.tools.loop import Toolbox
from llamacli.tools.tool import Tool

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
POINT = {
    "type": "object",
    "$defs": {
        "P": {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"], "additionalProperties": False}
    },
    "properties": {"p": {"$ref": "#/$defs/P"}, "q": {"$ref": "#/$defs/P"}},
    "required": ["p"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model():
    with Model.load(environment.SMALL_MODEL, ctx=2048) as loaded:
        yield loaded


def tool(name, schema, ran):
    return Tool(name, f"Tells of a {name}.", schema, lambda arguments, timeout: ran.append((name, arguments)) or "done")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("choice", ["required", "point", "city"])
def test_a_turn_begins_with_a_call_that_fits_its_schema(model, choice, seed):
    ran = []
    box = Toolbox([tool("city", CITY, ran), tool("point", POINT, ran)], choice=choice)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    pieces = list(model.chat(question, box, max_tokens=150, temp=1.5, seed=seed))
    name, arguments = ran[0]
    assert choice in ("required", name)
    assert jsonschema.Draft202012Validator(CITY if name == "city" else POINT).is_valid(arguments)
    assert len(ran) == 1 and box.results[0].failed is False
    assert pieces[-1].finish_reason in ("stop", "length")


@pytest.mark.parametrize("seed", range(4))
def test_a_bound_answer_is_a_text_or_calls(model, seed):
    ran = []
    box = Toolbox([tool("city", CITY, ran)], bound=True, rounds=1)
    pieces = list(model.chat([{"role": "user", "content": "Hi"}], box, max_tokens=60, temp=1.0, seed=seed))
    assert "".join(piece.text for piece in pieces).strip() or ran
    assert all(jsonschema.Draft202012Validator(CITY).is_valid(arguments) for _, arguments in ran)


def test_the_grammar_takes_calls_and_texts_and_nothing_between(model):
    """Asked of llguidance itself, text by text."""
    from llamacli.tools.binding import answer_grammar

    grammar = answer_grammar([tool("city", CITY, [])])
    call = json.dumps({"name": "city", "parameters": {"city": "Oslo", "days": 3}})

    def whole(text):
        constraint = model.constraint(grammar=grammar)
        try:
            constraint.begin(model.tokenizer.encode(text, bos=False))
        except LlamacliError:
            return False
        logits = np.zeros(model.tokenizer.n_vocab, np.float32)
        constraint.mask(logits)
        return np.isfinite(logits[model.tokenizer.eos])

    assert whole("Paris.") and whole(call) and whole(f"{call}; {call}")
    assert not whole(call[:-1]) and not whole(call.replace("3", "12")) and not whole('{"a": 1}')


def test_a_schema_that_cannot_be_enforced_is_refused_by_name(model):
    bad = tool("odd", {"type": "object", "properties": {}, "not": {}}, [])
    with pytest.raises(UsageError, match="odd: schema: expected what can be enforced, found not"):
        list(model.chat([{"role": "user", "content": "x"}], Toolbox([bad], bound=True)))
    with pytest.raises(UsageError, match="expected required, or a tool among odd, found 'even'"):
        Toolbox([bad], choice="even")
