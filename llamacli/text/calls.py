"""Finds tool calls in an answer, in every dialect of Llama 4, complete or while it streams.

In: an answer piece by piece; the tools' names with the names of their parameters. Out: `CallParser.push` returns the text that
cannot belong to a call, `calls` has the calls. Text that may begin a call is held back until it is one or cannot become one. A
malformed call, or one of an unknown tool, is text, without any change.

The dialects, by Meta's page on Llama 4's prompt format and the templates of its checkpoints:

    {"name": "f", "parameters": {"a": 1}}       also in a list, after one another or separated by ";" or ","
    <|python_start|>...<|python_end|>           around any of these
    [f(a=1), g()]                               a list of calls as Python writes them
    <function=f>{"a": 1}</function>
"""

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

START, END, FUNCTION, FUNCTION_END = "<|python_start|>", "<|python_end|>", "<function=", "</function>"
LONGEST = 1 << 20  # characters of a call
MOST_LEVELS = 100  # of lists and objects inside one another, in tools and calls: templates and JSON go through them recursively
_BEGIN = re.compile(r"[{\[<]")
_KEYS = ("name", "type", "function", "parameters", "arguments", "id")  # of a call as JSON
_FIRST_KEY = re.compile(r'\{\s*(?:"(\w*)("?)|$)')
_SPACE = re.compile(r"\s*")
_BETWEEN = re.compile(r"[\s;,]*")
_TEXT = r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\""
_TOKEN = re.compile(rf"{_TEXT}|[\[\](){{}}'\"]", re.DOTALL)
_WORD = re.compile(r"[\[\s]{0,16}([A-Za-z_][\w.-]*)?(\s*\()?", re.ASCII)
_JUST_BEGUN = 256  # characters of held text up to which it is parsed after every piece


def too_deep(value) -> bool:
    """Whether lists and dictionaries lie inside one another more than MOST_LEVELS deep."""
    level = [value]
    for _ in range(MOST_LEVELS + 1):
        insides = (each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list | tuple))
        if not (level := [item for inside in insides for item in inside]):
            return False
    return True


class Call(NamedTuple):
    """A tool's name and its arguments."""

    name: str
    arguments: dict


class _More(Exception):
    """The text may become a call; more text is needed."""


def _no_number(word: str):
    raise ValueError(word)


_JSON = json.JSONDecoder(parse_constant=_no_number)


class CallParser:
    """See the module. `tools`: name to the names of its parameters, in their order."""

    def __init__(self, tools: Mapping[str, Sequence[str]]):
        self.calls: list[Call] = []
        self._tools, self._held = tools, ""
        self._after = self._final = False  # the last parsed text is a call; no more text will come
        odd = sorted((name for name in tools if not name.replace(".", "_").isidentifier()), key=len, reverse=True)
        self._aliases = {f"tool_{i}_": name for i, name in enumerate(odd)}  # for names that Python's parser does not accept
        self._odd = re.compile(rf"({_TEXT})|(?<![\w.-])({'|'.join(map(re.escape, odd))})(?=\s*\()", re.DOTALL) if odd else None

    def push(self, text: str) -> str:
        """Add a piece of the answer; returns the part of it, and of the held text, that is text."""
        self._held += text
        if len(self._held) > _JUST_BEGUN and not any(sign in text for sign in "}])>"):
            return "" if self._begun() else self._read(False)
        return self._read(False)

    def close(self) -> str:
        """End the answer; returns the text that was still held back."""
        return self._read(True)

    def _begun(self) -> bool:
        """Whether the held text begins like a call and is not too long for one."""
        return self._held[0] in "{[<" and len(self._held) < LONGEST

    def _read(self, final: bool) -> str:
        shown, at, self._final = [], 0, final
        while at < len(self._held):
            if self._after:
                at = self._between(at)
                if at == len(self._held):
                    break
            found = _BEGIN.search(self._held, at)
            start = found.start() if found else len(self._held)
            if start > at:
                shown.append(self._held[at:start])
                at, self._after = start, False
            if found is None:
                break
            try:
                calls = self._calls(at) if len(self._held) - at < LONGEST else None
            except _More:
                if not final:
                    break
                calls = None
            found, end = calls or ([], at + 1)
            self.calls += found
            if not found:
                shown.append(self._held[at:end])
            at, self._after = end, bool(found)
        self._held = self._held[at:]
        return "".join(shown)

    def _between(self, at: int) -> int:
        """The position after separators of calls and after their end mark."""
        while True:
            at = _BETWEEN.match(self._held, at).end()
            if self._held.startswith(END, at):
                at += len(END)
            elif not self._final and at < len(self._held) and END.startswith(self._held[at:]):
                return at  # the mark's beginning is held by `_calls`
            else:
                return at

    def _calls(self, at: int) -> tuple[list[Call], int] | None:
        """The calls that begin at a bracket or a mark, and their end. Without calls, it is text up to there; None: at least the
        first character is text. _More if it is not yet clear.
        """
        text = self._held
        if text[at] == "{":
            return self._json(at)
        if text[at] == "[":
            return self._list(at)
        rest = text[at : at + len(START)]
        if rest == START:
            return self._marked(at + len(START))
        if rest.startswith(FUNCTION):
            return self._function(at + len(FUNCTION))
        if any(mark.startswith(rest) for mark in (START, FUNCTION, *[END] * self._after)) and len(text) - at == len(rest):
            raise _More
        return None

    def _skip(self, at: int) -> int:
        """The position of the next character that is not a space; _More if there is none."""
        at = _SPACE.match(self._held, at).end()
        if at == len(self._held):
            raise _More
        return at

    def _marked(self, at: int) -> tuple[list[Call], int] | None:
        """One or more calls between the Python marks."""
        calls: list[Call] = []
        while True:
            if calls and self._final and _SPACE.match(self._held, at).end() == len(self._held):
                return calls, at  # the answer ended in place of the end mark
            at = self._skip(at)
            if calls and self._held.startswith(END, at):
                return calls, at + len(END)
            if self._held[at] == "<" and END.startswith(self._held[at:]):
                raise _More
            found = self._calls(at) if self._held[at] in "{[" or self._held.startswith(FUNCTION, at) else self._python(at)
            if not found or not found[0]:
                return (calls, at) if calls else None
            calls += found[0]
            at = _BETWEEN.match(self._held, found[1]).end()

    def _function(self, at: int) -> tuple[list[Call], int] | None:
        """<function=NAME>{...}</function>, from the position after the equals sign."""
        text = self._held
        end = text.find(">", at, at + 200)
        if end < 0:
            if any(name.startswith(text[at:]) for name in self._tools):
                raise _More
            return None
        name = text[at:end].strip()
        if name not in self._tools:
            return None
        at = self._skip(end + 1)
        arguments = {}
        if text[at] == "{":
            arguments, at = self._decoded(at)
        elif not text.startswith(FUNCTION_END, at) and FUNCTION_END.startswith(text[at:]):
            raise _More
        elif not text.startswith(FUNCTION_END, at):
            return None
        if not isinstance(arguments, dict):
            return None
        after = _SPACE.match(text, at).end()
        if text.startswith(FUNCTION_END, after):
            at = after + len(FUNCTION_END)
        elif FUNCTION_END.startswith(text[after:]) and not (self._final and after == len(text)):
            raise _More
        return [Call(name, arguments)], at

    def _json(self, at: int) -> tuple[list[Call], int] | None:
        """An object that is a call."""
        key = _FIRST_KEY.match(self._held, at)
        if key is None:
            return None
        if key[1] is not None and not (key[1] in _KEYS if key[2] else any(name.startswith(key[1]) for name in _KEYS)):
            return None
        value, end = self._decoded(at)
        call = self._as_call(value)
        return ([call] if call else [], end) if end > at else None

    def _list(self, at: int) -> tuple[list[Call], int] | None:
        """A list of calls, as JSON or as Python."""
        inner = self._skip(at + 1)
        if self._held[inner] != "{":
            return self._python(at)
        values, end = self._decoded(at)
        calls = [self._as_call(value) for value in values] if isinstance(values, list) else []
        return (calls if all(calls) else [], end) if end > at else None

    def _decoded(self, at: int) -> tuple[object, int]:
        """The JSON value at `at`, and its end; (None, ...) if it is malformed. _More if it is incomplete."""
        try:
            return _JSON.raw_decode(self._held, at)
        except json.JSONDecodeError as error:
            if error.msg.startswith("Unterminated string") or len(self._held) - error.pos < 8:
                raise _More from None
        except (ValueError, RecursionError):  # NaN, or a number of thousands of digits
            pass
        return None, at

    def _as_call(self, value) -> Call | None:
        if not isinstance(value, dict):
            return None
        inner = value.get("function")
        if isinstance(inner, dict) and not set(value) - {"type", "function", "id"}:
            value = inner
        elif isinstance(inner, str) and "name" not in value:
            value = {**value, "name": inner}
        name, arguments = value.get("name"), value.get("parameters", value.get("arguments"))
        if not isinstance(name, str) or name not in self._tools or set(value) - set(_KEYS):
            return None
        if isinstance(arguments, str):
            try:
                arguments = _JSON.decode(arguments)
            except (ValueError, RecursionError):
                return None
        arguments = {} if arguments is None else arguments
        return Call(name, arguments) if isinstance(arguments, dict) and not too_deep(arguments) else None

    # as Python

    def _python(self, at: int) -> tuple[list[Call], int] | None:
        """A call, or a list of calls, in Python's syntax."""
        word = _WORD.match(self._held, at)
        name, opened = word[1] or "", word[2]
        if not opened:
            if word.end() == len(self._held) and any(known.startswith(name) for known in self._tools):
                raise _More
            return None
        if name not in self._tools:
            return None
        end = self._closing(at)
        calls = self._parsed(self._held[at:end])
        return calls and (calls, end)

    def _closing(self, at: int) -> int:
        """The position after the bracket that closes the first one; _More if there is none yet."""
        depth = 0
        for token in _TOKEN.finditer(self._held, at):
            sign = token[0]
            if sign in ("'", '"'):  # the text is incomplete
                break
            depth += (sign in ("(", "[", "{")) - (sign in (")", "]", "}"))
            if depth == 0 and len(sign) == 1:
                return token.end()
        raise _More

    def _parsed(self, source: str) -> list[Call] | None:
        if self._odd:
            alias = {name: alias for alias, name in self._aliases.items()}
            source = self._odd.sub(lambda found: found[1] or alias[found[2]], source)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # warnings about unknown escapes
                tree = ast.parse(source.strip(), mode="eval").body
            return [self._called(node) for node in _flat(tree)] or None
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return None

    def _called(self, node: ast.expr) -> Call:
        """A call; ValueError if the node is not one."""
        if not isinstance(node, ast.Call):
            raise ValueError("no call")
        name = ast.unparse(node.func)
        name = self._aliases.get(name, name)
        parameters = self._tools.get(name)
        if parameters is None or len(node.args) > len(parameters):
            raise ValueError(name)
        arguments = {key: _literal(value) for key, value in zip(parameters, node.args, strict=False)}
        for keyword in node.keywords:
            if keyword.arg is None or keyword.arg in arguments:
                raise ValueError("an argument twice, or **")
            arguments[keyword.arg] = _literal(keyword.value)
        return Call(name, arguments)


def _flat(node: ast.expr) -> list[ast.expr]:
    """The members of nested lists."""
    if isinstance(node, ast.List | ast.Tuple):
        return [inner for each in node.elts for inner in _flat(each)]
    return [node]


def _literal(node: ast.expr):
    """The JSON value of a literal; ValueError for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None) and node.value != float("inf"):
        return node.value
    if isinstance(node, ast.Name) and node.id.lower() in ("true", "false", "null", "none"):
        return {"true": True, "false": False}.get(node.id.lower())
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(each) for each in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_literal(key) if key is not None else None for key in node.keys]
        if not all(isinstance(key, str) for key in keys):
            raise ValueError("a key that is no text")
        return dict(zip(keys, map(_literal, node.values), strict=True))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _literal(node.operand)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return -value
    raise ValueError("no literal")
