"""Constrains calls to the schemas of their tools, so that arguments are always valid.

In: tools. Out: arguments of `Model.constraint`: a JSON schema for an answer that must be a call, a grammar for one that may be.
UsageError names the tool and the keyword of a schema that cannot be enforced.
"""

import json
from collections.abc import Sequence

from llamacli.errors import UsageError
from llamacli.text.schema import schema_text
from llamacli.tools.tool import Tool

_STRICT = {  # the options that Grammars sets for a schema (text/constraint.py), as a part of the schema
    **{"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
    **{"lenient": False, "coerce_one_of": False},
}


def call_schema(tools: Sequence[Tool]) -> dict:
    """The JSON schema of one call to any of the tools."""
    return {"anyOf": [_call(i, tool) for i, tool in enumerate(tools)]}


def answer_grammar(tools: Sequence[Tool]) -> str:
    """The Lark grammar of an answer: calls separated by semicolons, or a text that does not begin like a call."""
    schema = json.dumps(call_schema(tools) | {"x-guidance": _STRICT})
    return f'start: text | call ("; " call)*\ntext: /[^{{\\[<\\s](.|\\n)*/\ncall: %json {schema}\n'


def _call(i: int, tool: Tool) -> dict:
    parameters = {"type": "object", "additionalProperties": False} | tool.parameters
    try:
        text = schema_text(parameters)
    except UsageError as error:
        raise UsageError(f"{tool.name}: {error}") from None
    # references inside a tool's schema start at its own root
    text = text.replace('"$ref": "#', f'"$ref": "#/anyOf/{i}/properties/parameters')
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "parameters": json.loads(text)},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }
