"""A tool: its name, what it does, the JSON schema of its arguments, and how it is run.

In: a Python function, or a definition as OpenAI's protocol and MCP have it. Out: a `Tool`. A function's schema comes from its
annotations, its description from its docstring.
"""

import inspect
import json
import re
import threading
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from llamacli.errors import UsageError
from llamacli.text.calls import MOST_LEVELS, too_deep

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}", re.ASCII)
_KINDS = {str: "string", int: "integer", float: "number", bool: "boolean", dict: "object", list: "array"}
_OF_KIND = {
    "string": str,
    "integer": int,
    "number": int | float,
    "boolean": bool,
    "object": dict,
    "array": list,
    "null": type(None),
}


class ToolError(Exception):
    """A call failed; the model is given the reason and may continue."""


@dataclass(frozen=True)
class Tool:
    """`parameters`: a JSON schema of an object. `run(arguments, timeout)` returns the result as text, or raises ToolError;
    None: the reader of the answer runs it.
    """

    name: str
    description: str
    parameters: dict
    run: Callable[[dict, float], str] | None = None

    @property
    def definition(self) -> dict:
        """The definition as chat templates take it."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}

    @property
    def order(self) -> list[str]:
        """Names of the parameters."""
        return [*self.parameters.get("properties", {})]

    def check(self, arguments: dict) -> None:
        """ToolError if an argument is missing or unknown, or does not match its type or enum in the schema's outermost
        level.
        """
        properties = self.parameters.get("properties", {})
        missing = [name for name in self.parameters.get("required", []) if name not in arguments]
        if missing:
            raise ToolError(f"expected the argument {missing[0]}, found none")
        for name, value in arguments.items():
            schema = properties.get(name)
            if schema is None and self.parameters.get("additionalProperties", not properties) is False:
                raise ToolError(f"expected one of {', '.join(properties) or 'no arguments'}, found the argument {name}")
            if isinstance(schema, dict):
                _check_value(name, value, schema)


def _check_value(name: str, value, schema: dict) -> None:
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    allowed = tuple(_OF_KIND[kind] for kind in kinds if isinstance(kind, str) and kind in _OF_KIND)
    whole = isinstance(value, float) and value.is_integer() and "integer" in kinds
    if allowed and not whole and not any(isinstance(value, kind) and _is_kind(value, kind) for kind in allowed):
        raise ToolError(f"{name}: expected {' or '.join(map(str, kinds))}, found {json.dumps(value, ensure_ascii=False)[:80]}")
    if isinstance(schema.get("enum"), list) and value not in schema["enum"]:
        raise ToolError(f"{name}: expected one of {json.dumps(schema['enum'])[:200]}, found {json.dumps(value)[:80]}")


def _is_kind(value, kind) -> bool:
    """Whether a value has a JSON type; in JSON true is not a number."""
    return kind is bool or not isinstance(value, bool)


def check_definition(name, description, parameters, where: str) -> tuple[str, str, dict]:
    """Check the three fields and return them. UsageError that begins with `where`."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UsageError(f"{where}: expected a name of letters, digits, _, - and ., found {name!r:.80}")
    parameters = {"type": "object", "properties": {}} if parameters is None else parameters
    properties = parameters.get("properties", {}) if isinstance(parameters, dict) else None
    if not isinstance(properties, dict) or parameters.get("type", "object") != "object":
        raise UsageError(f"{where}: {name}: expected parameters as a JSON schema of an object, found {parameters!r:.80}")
    if too_deep(parameters):
        raise UsageError(f"{where}: {name}: expected parameters of at most {MOST_LEVELS} levels, found more; make them flatter")
    required = parameters.get("required", [])
    if not isinstance(required, list) or not all(isinstance(each, str) for each in required):
        raise UsageError(f"{where}: {name}: expected `required` to be a list of names, found {required!r:.80}")
    if not isinstance(description, str | None):
        raise UsageError(f"{where}: {name}: expected a description in words, found {description!r:.80}")
    return name, description or "", parameters


def from_function(function: Callable) -> Tool:
    """A tool from a Python function, which runs in this process. One that hangs keeps its thread, which cannot be ended."""
    name, description, parameters = described(function)
    return Tool(name, description, parameters, lambda arguments, timeout: _in_thread(function, arguments, timeout))


def described(function: Callable) -> tuple[str, str, dict]:
    """Name, description and schema of a function. UsageError if it cannot be called by names."""
    name = getattr(function, "__name__", None) or type(function).__name__
    try:
        signature = inspect.signature(function)
        hints = typing.get_type_hints(function, include_extras=True)
    except (TypeError, ValueError, NameError) as error:
        raise UsageError(f"{name}: expected a function whose parameters can be read, found: {error}") from None
    properties, required = {}, []
    for p in signature.parameters.values():
        if p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL, p.VAR_KEYWORD):
            raise UsageError(f"{name}: expected parameters that can be given by name, found {p}")
        properties[p.name] = _schema(hints.get(p.name))
        if p.default is p.empty:
            required.append(p.name)
        elif isinstance(p.default, str | int | float | bool):
            properties[p.name]["default"] = p.default
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return check_definition(name, inspect.getdoc(function), schema, "functions")


def _schema(hint) -> dict:
    """The JSON schema of a type; {}, which accepts anything, for a type without one."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        words = next((each for each in args[1:] if isinstance(each, str)), None)
        return _schema(args[0]) | ({"description": words} if words else {})
    if origin is typing.Literal:
        return {"enum": list(args)}
    if origin in (typing.Union, types.UnionType):
        kinds = [_schema(each) if each is not type(None) else {"type": "null"} for each in args]
        if all(set(kind) == {"type"} for kind in kinds):
            return {"type": [kind["type"] for kind in kinds]}
        return {"anyOf": kinds} if all(kinds) else {}
    if origin in (list, tuple, set) or hint in (tuple, set):
        return {"type": "array"} | ({"items": _schema(args[0])} if args and origin is list else {})
    if inspect.isclass(hint) and issubclass(hint, Enum):
        return {"enum": [each.value for each in hint]}
    kind = _KINDS.get(origin or hint)
    return {"type": kind} if kind else {}


def as_text(value) -> str:
    """A result as text for the model."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        return str(value)


def _in_thread(function: Callable, arguments: dict, timeout: float) -> str:
    found: list = []

    def call() -> None:
        try:
            found.append((as_text(function(**arguments)), None))
        except Exception as error:
            found.append(("", f"{type(error).__name__}: {error}"))
        except SystemExit as error:
            found.append(("", f"the function ended the program ({error.code})"))

    thread = threading.Thread(target=call, daemon=True, name=f"tool {function}")
    thread.start()
    thread.join(timeout)
    if not found:
        raise ToolError(f"no result after {timeout:g} seconds")
    text, failure = found[0]
    if failure:
        raise ToolError(failure)
    return text
