"""Tools: what a function's annotations say, what definitions must be, arguments that do not fit."""

import json
from enum import Enum
from typing import Annotated, Literal

import jsonschema
import pytest

from llamacli.errors import UsageError
from llamacli.tools import files
from llamacli.tools.tool import Tool, ToolError, described, from_function


class Unit(Enum):
    celsius = "c"
    fahrenheit = "f"


def weather(
    city: Annotated[str, "Name of the city."],
    days: int = 1,
    unit: Literal["c", "f"] = "c",
    scale: Unit = Unit.celsius,
    near: list[str] | None = None,
    limit: float | str = 1.5,
    more: dict | None = None,
    anything=None,
) -> str:
    """The weather of a city."""
    return f"{city}: sunny for {days} days"


def test_a_function_is_described_by_its_annotations_and_its_docstring():
    name, description, schema = described(weather)
    assert (name, description) == ("weather", "The weather of a city.")
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["required"] == ["city"]
    assert schema["properties"] == {
        "city": {"type": "string", "description": "Name of the city."},
        "days": {"type": "integer", "default": 1},
        "unit": {"enum": ["c", "f"], "default": "c"},
        "scale": {"enum": ["c", "f"]},
        "near": {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]},
        "limit": {"type": ["number", "string"], "default": 1.5},
        "more": {"type": ["object", "null"]},
        "anything": {},
    }


def test_a_function_that_cannot_be_called_by_names_is_refused():
    for bad in (lambda *words: 1, lambda a, /: 1, lambda **more: 1, print, 3, type):
        with pytest.raises(UsageError, match="expected"):
            described(bad)


def test_a_function_runs_and_its_errors_and_its_hanging_are_told():
    def fails(x: int):
        raise KeyError(x)

    def leaves():
        raise SystemExit(3)

    def hangs():
        import time

        time.sleep(60)

    def table():
        return {"a": [1, None]}

    assert from_function(weather).run({"city": "Oslo"}, 300) == "Oslo: sunny for 1 days"
    assert from_function(table).run({}, 300) == '{"a": [1, null]}'
    for function, arguments, seconds, words in (
        (fails, {"x": 1}, 60, "KeyError: 1"),
        (leaves, {}, 60, "ended the program"),
        (hangs, {}, 0.1, "no result after 0.1"),
    ):
        with pytest.raises(ToolError, match=words):
            from_function(function).run(arguments, seconds)


SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer"},
        "x": {"type": ["number", "null"]},
        "b": {"type": "boolean"},
        "e": {"enum": [1, "a"]},
    },
    "required": ["n"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "arguments",
    [
        {"n": 1},
        {"n": 2.0},
        {"n": 1, "x": None},
        {"n": 1, "x": 2},
        {"n": 1, "b": True},
        {"n": 1, "e": "a"},
        {},
        {"n": "1"},
        {"n": True},
        {"n": 1.5},
        {"n": 1, "x": "y"},
        {"n": 1, "b": 1},
        {"n": 1, "e": 2},
        {"n": 1, "z": 1},
        {"n": None},
    ],
    ids=json.dumps,
)
def test_arguments_are_checked_as_the_schema_says(arguments):
    """Against the package jsonschema."""
    tool = Tool("t", "", SCHEMA)
    if jsonschema.Draft202012Validator(SCHEMA).is_valid(arguments):
        tool.check(arguments)
    else:
        with pytest.raises(ToolError, match="expected"):
            tool.check(arguments)


def test_definitions_are_read_as_openai_and_as_mcp_write_them():
    bare = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
    for text in (
        bare,
        [bare],
        {"tools": [bare]},
        {"type": "function", "function": bare},
        [{"name": "f", "description": "d", "inputSchema": bare["parameters"]}],
    ):
        (tool,) = files.from_json(json.dumps(text), "t.json").tools
        assert (tool.name, tool.description, tool.parameters, tool.run) == ("f", "d", bare["parameters"], None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "3",
        "[]",
        "[3]",
        '{"name": "a b"}',
        '{"name": 3}',
        '[{"name": "f", "parameters": 3}]',
        '{"name": "f", "parameters": {"type": "string"}}',
        '{"name": "f", "parameters": {"properties": 3}}',
        '{"name": "f", "parameters": {"required": "x"}}',
        '{"name": "f", "description": 3}',
        '{"name": "f", "command": "ls"}',
        '{"name": "f", "command": []}',
        '{"mcpServers": 3}',
        '{"mcpServers": {"a": {"url": "http://x"}}}',
        '{"mcpServers": {"a": {"command": "x", "args": 3}}}',
        '{"mcpServers": {}}',
        '{"mcpServers": {"a": {"command": "/no/such"}}}',
        "[" * 100000,
    ],
    ids=lambda text: text[:50],
)
def test_what_is_no_definition_is_one_line(text):
    with pytest.raises(UsageError, match=r"^(t\.json|a): .*expected"):
        files.from_json(text, "t.json")


@pytest.mark.parametrize("kind", [[{}], {}, [[], "string"], 3])
def test_an_invalid_type_in_a_schema_accepts_any_value(kind):
    Tool("f", "", {"properties": {"a": {"type": kind}}}).check({"a": "text"})


@pytest.mark.parametrize("inside", ['{"a": ', "["])
def test_parameters_too_deep_for_templates_are_refused(inside):
    nested = inside * 400 + "1" + {"[": "]"}.get(inside, "}") * 400
    with pytest.raises(UsageError, match="f: expected parameters of at most 100 levels"):
        files.from_json(f'[{{"name": "f", "parameters": {{"properties": {{"a": {nested}}}}}}}]', "tools.json")
