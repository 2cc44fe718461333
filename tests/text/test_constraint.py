"""Answers constrained to a schema, a grammar or a choice: allowed tokens, forced tokens, refusals."""

import json
import re
import sys
from fractions import Fraction

import numpy as np
import pytest
import small_vocab
from schemas import REFUSED, Generator, fits

from llamacli.errors import LlamacliError, PromptError, UsageError
from llamacli.text.constraint import Grammars
from llamacli.text.sampler import Sampler
from llamacli.text.schema import schema_text
from llamacli.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_gguf(small_vocab.in_memory(eot_token_id=small_vocab.lists()[0].index("<|eot|>")))


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer)


def said(tokenizer, constraint, seed=0, most=400, favour=None):
    """An answer drawn from random logits that favour the end more and more; and whether it is complete."""
    random, sampler = np.random.default_rng(seed), Sampler(temp=1.0, top_p=1.0, seed=seed, constraint=constraint)
    ends = np.array([any(c in '"}],' for c in tokenizer.decode([id])) for id in range(tokenizer.n_vocab)])
    ends[list(tokenizer.stop_ids)] = True
    ids, ahead = [], sampler.begin()
    while len(ids) < most and not (sampler.over and not ahead):
        if not ahead:
            logits = random.normal(size=tokenizer.n_vocab).astype(np.float32) + ends * np.float32(len(ids) / 10)
            if favour:
                logits[tokenizer.encode(favour, bos=False)] += 20
            ahead = sampler.next_ids(logits, ids)
        if ahead[0] in tokenizer.stop_ids:
            return tokenizer.decode(ids), True
        ids.append(ahead.pop(0))
    return tokenizer.decode(ids), sampler.over


# schemas


@pytest.mark.parametrize("seed", range(60))
def test_an_answer_fits_its_schema(tokenizer, grammars, seed):
    schema = Generator(seed).schema()
    try:
        constraint = grammars.constraint(schema)
    except UsageError as error:
        assert "nothing meets" in str(error)
        return
    text, whole = said(tokenizer, constraint, seed)
    if whole:
        assert fits(text, schema) is None, text


def test_most_of_these_answers_are_whole(tokenizer, grammars):
    simple = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}, "required": ["a", "b"]}
    assert all(said(tokenizer, grammars.constraint(simple), seed)[1] for seed in range(10))


@pytest.mark.parametrize("keyword", REFUSED)
def test_a_keyword_that_cannot_be_enforced_is_named(grammars, keyword):
    inner = {"type": "string", keyword: REFUSED[keyword]}
    for schema in (inner, {"properties": {"a": {"items": inner}}}, {"$defs": {"x": inner}, "type": "null"}):
        with pytest.raises(UsageError, match=re.escape(f"found {keyword} ")):
            grammars.constraint(schema)


@pytest.mark.parametrize(
    "schema, words",
    [
        ({"type": "string", "format": "color"}, "found format .*color"),
        ({"type": "string", "minlength": 3}, r"minlength \(did you mean minLength"),
        ({"type": "string", "pattern": "(?=a)b"}, "found pattern .*look-ahead"),
        ({"type": "string", "pattern": r"(a)\1"}, "found pattern .*backreferences"),
        ({"type": "string", "minLength": -1}, "found minLength"),
        ({"type": "strin"}, "found type"),
        ({"enum": []}, "nothing meets"),
        ({"type": "integer", "minimum": 5, "maximum": 2}, "nothing meets"),
        ({"oneOf": [{"type": "object"}, {"type": "object"}]}, "found oneOf"),
        ({"properties": {"a": {}, "b": {}}, "minProperties": 1}, "found minProperties"),
        ({"type": "object", "minProperties": 3, "required": ["a"]}, "minProperties 3: names .* may come twice"),
        ({"type": "object", "patternProperties": {"^a": {}, "b$": {}}}, "found patternProperties"),
        ({"$ref": "#/$defs/x"}, r"found \$ref"),
        ({"$ref": "https://example.org/x"}, r"found \$ref to .* outside"),
        ({"type": "integer", "minimum": 1e19}, "found minimum with 1e\\+19"),
        ({"const": {"a": [9007199254740993]}}, "found const with 9007199254740993"),
        ({"enum": [float("inf")]}, "Infinity"),
        ({"type": "number", "multipleOf": 0}, "found multipleOf 0"),
        ({"type": "number", "multipleOf": 0.07}, "found multipleOf"),
        ({"allOf": [{"multipleOf": 99999}, {"multipleOf": 99998}]}, "found multipleOf .* too large"),
        (
            {"allOf": [{"multipleOf": 0.5}, {"anyOf": [{"multipleOf": 0.25}, {"multipleOf": 40001.125}]}]},
            "found multipleOf .* too large",
        ),
        ({"prefixItems": [{}], "additionalItems": False}, "found prefixItems"),
        ({"prefixItems": [{"type": "null"}], "$schema": "http://json-schema.org/draft-07/schema#"}, "found prefixItems"),
        ({"items": {}, "additionalItems": False}, "found additionalItems"),
        ({"$schema": "https://example.org/mine"}, r"found \$schema"),
        ({"type": "string", "x-guidance": {"lenient": True}}, "found x-guidance"),
        ({"items": 3}, r"at \$.items, found 3"),
        ({"anyOf": {}}, r"a list at \$.anyOf"),
        ([], "an object or a boolean"),
        (False, "found false"),
        ("{", "expected JSON"),
        ('{"const": NaN}', "NaN"),
        ("[" * 100_000, "schema: expected JSON"),
        ({"const": {1, 2}}, "expected JSON"),
        ({"const": "\ud800"}, "schema: "),
    ],
)
def test_a_schema_that_cannot_bind_is_refused(grammars, schema, words):
    with pytest.raises(UsageError, match=words) as caught:
        grammars.constraint(schema)
    assert "\n" not in str(caught.value)


def test_text_and_objects_are_the_same_schema(grammars, tokenizer):
    schema = {"enum": ["größe", 1.5]}
    for form in (schema, json.dumps(schema), json.dumps(schema, ensure_ascii=False)):
        assert json.loads(said(tokenizer, grammars.constraint(form))[0]) in schema["enum"]
    assert json.loads(schema_text(True)) == {}


def test_json_is_written_on_one_line_and_all_that_is_certain_at_once(tokenizer, grammars):
    schema = {
        "type": "object",
        "properties": {"the fox": {"type": "boolean"}, "b": {"const": [1, "x"]}},
        "required": ["the fox", "b"],
    }
    constraint = grammars.constraint(schema | {"additionalProperties": False})
    assert said(tokenizer, constraint, favour=" \n")[0] in (json.dumps({"the fox": v, "b": [1, "x"]}) for v in (True, False))
    constraint.begin()
    assert tokenizer.decode(constraint.forced()).startswith('{"the fox"')


def test_a_decimal_multiple_is_exact(tokenizer, grammars):
    constraint = grammars.constraint({"type": "number", "multipleOf": 0.01, "minimum": 0, "exclusiveMaximum": 2})
    for seed in range(20):
        found = Fraction(said(tokenizer, constraint, seed)[0])
        assert 0 <= found < 2 and (found * 100).denominator == 1


@pytest.mark.parametrize("value", [1e-7, 1.5e10, 123456789.123, -0.0, -2.5, 0, 9007199254740992, -9007199254740992, 1e15])
def test_a_constant_number_is_itself(tokenizer, grammars, value):
    for schema in ({"const": value}, {"enum": [value]}, {"type": "number", "minimum": value, "maximum": value}):
        for seed in range(3):
            text, whole = said(tokenizer, grammars.constraint(schema), seed)
            assert not whole or json.loads(text) == value


@pytest.mark.parametrize("multiples", [(2, 3), (0.5, 0.2), (4, 6, 10), (0.25, 3)])
def test_all_multiples_at_once(tokenizer, grammars, multiples):
    schema = {"type": "number", "minimum": 1, "maximum": 1000, "allOf": [{"multipleOf": each} for each in multiples]}
    for seed in range(5):
        found = Fraction(said(tokenizer, grammars.constraint(schema), seed)[0])
        assert all((found / Fraction(str(each))).denominator == 1 for each in multiples)


# grammars and choices


@pytest.mark.parametrize(
    "grammar, pattern",
    [
        ("[0-9]{4}-[0-9]{2}", r"\d{4}-\d\d"),
        ("(yes|no)\n", "(yes|no)"),
        ('root ::= "<" item+ ">"\nitem ::= [a-c] | "é"', "<[a-cé]+>"),
        ('start: WORD (" " WORD){2}\nWORD: /[a-z]{1,4}/', "[a-z]{1,4}( [a-z]{1,4}){2}"),
        ('%llguidance {}\nstart: %json {"const": 5}', "5"),
    ],
    ids=["expression", "line break", "gbnf", "lark", "json in lark"],
)
def test_an_answer_is_of_its_grammar(tokenizer, grammars, grammar, pattern):
    for seed in range(5):
        text, whole = said(tokenizer, grammars.constraint(grammar=grammar), seed)
        assert re.fullmatch(pattern, text) if whole else "<" in text


@pytest.mark.parametrize("grammar", ["[a", 'root ::= "a" | b', "start: nothing", "", "\n", "start: <|nope|>", "a(?=b)"])
def test_a_grammar_that_is_none_is_one_line(grammars, grammar):
    with pytest.raises(UsageError, match="grammar: expected") as caught:
        grammars.constraint(grammar=grammar)
    assert "\n" not in str(caught.value)


def test_a_choice_is_one_of_its_texts(tokenizer, grammars):
    texts = ["yes", "yesterday", "größe", 'a "b"\n\\', "🦙"]
    assert {said(tokenizer, grammars.constraint(choice=texts), seed)[0] for seed in range(80)} == set(texts)
    for wrong in ([], [""], "yes", [1]):
        with pytest.raises(UsageError, match="choice: expected texts"):
            grammars.constraint(choice=wrong)


def test_many_choices_are_one_of_them(tokenizer, grammars):
    texts = [f"the {n}" for n in range(20_000)]
    assert said(tokenizer, grammars.constraint(choice=texts), 3)[0] in texts


def test_only_one_thing_binds_an_answer(grammars):
    for more in ({}, {"schema": {}, "choice": ["a"]}):
        with pytest.raises(UsageError, match="one of schema, grammar and choice"):
            grammars.constraint(**more)


# tokens


def test_special_tokens_are_no_text_and_the_end_comes_where_the_answer_is_whole(tokenizer, grammars):
    constraint, logits = grammars.constraint(grammar="(?s:.*)x"), np.zeros(tokenizer.n_vocab, np.float32)
    constraint.begin()
    constraint.mask(logits)
    special = [tokenizer.token_id(f"<|{name}|>") for name in small_vocab.SPECIALS]
    assert not np.isfinite(logits[special]).any()
    assert np.isfinite(logits[:256]).sum() == 128 + 51  # ASCII, and the first byte of any other character
    assert not np.isfinite(logits[len(small_vocab.lists()[0]) :]).any()
    constraint.accept(tokenizer.encode("x", bos=False)[0])
    logits[:] = 0
    constraint.mask(logits)
    assert not constraint.over
    assert {id for id in special if np.isfinite(logits[id])} == tokenizer.stop_ids


def test_what_must_follow_is_known_at_once(tokenizer, grammars):
    constraint = grammars.constraint(choice=["the quick brown fox"])
    constraint.begin()
    assert tokenizer.decode(constraint.forced()) == "the quick brown fox"
    assert constraint.over
    constraint.begin()
    assert not constraint.over and tokenizer.decode(constraint.forced()) == "the quick brown fox"


def test_an_answer_goes_on_where_it_was_cut(tokenizer, grammars):
    constraint = grammars.constraint(choice=["the quick brown fox"])
    constraint.begin(tokenizer.encode("the qu", bos=False))
    assert tokenizer.decode(constraint.forced()) == "ick brown fox"
    with pytest.raises(PromptError, match="does not fit"):
        constraint.begin(tokenizer.encode("a fox", bos=False))


def test_answers_of_two_samplers_do_not_meet(grammars):
    one, other = (grammars.constraint(choice=["ab", "cd"]) for _ in range(2))
    for constraint in (one, other):
        constraint.begin()
    one.accept(97 - 33)
    logits = np.zeros(grammars._words.vocab_size, np.float32)
    other.mask(logits)
    assert np.isfinite(logits).sum() == 2


def test_a_matcher_that_gave_up_is_an_error_and_no_end(tokenizer, grammars):
    constraint = grammars.constraint(choice=["yes", "no"])
    constraint.begin()
    with pytest.raises(LlamacliError, match="the grammar: expected to go on after 0 tokens"):
        constraint.accept(tokenizer.encode("x", bos=False)[0])
    with pytest.raises(LlamacliError, match="the grammar"):
        constraint.mask(np.zeros(tokenizer.n_vocab, np.float32))
    constraint.begin()
    assert not constraint.over


def test_without_the_package_it_is_one_line(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UsageError, match=re.escape("pip install 'llamacli[schema]'")):
        Grammars(tokenizer)
