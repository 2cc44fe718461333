"""Limits the cost of rendering a chat template: a budget of units, and the price of each operation before it runs.

In: values of a template. Out: `spend` takes units from the budget of the rendering in progress and raises `TooMuch` when it is
used up. A unit is about one character touched, or 10 nanoseconds. The budget grows with the messages, so a long conversation
may cost more. Prices bound the time and the memory of an operation before it runs; they are upper bounds, not measurements, so
the same template and messages are refused or not on any machine.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from jinja2.utils import Namespace

from llamacli.errors import PromptError

STEP = 128  # units of a call, or of a pass of a loop
NODE = 32  # units of an item in a list or dictionary
_BASE = 1 << 25  # units that any template may spend: a quarter of a million steps, some two seconds
_PER_UNIT = 64  # further units for each unit of the variables
_LONGEST = 1 << 20  # characters of the result

_left: ContextVar[list[int]] = ContextVar("left")
_VIEWS = tuple(map(type, ({}.keys(), {}.values(), {}.items())))


class TooMuch(PromptError):
    """The budget is used up."""

    def __init__(self):
        super().__init__("the model's chat template asks for more work or text than a prompt needs; --raw goes without it")


@contextmanager
def budget(variables: dict) -> Iterator[int]:
    """A context with a budget for one rendering with these variables, in this thread; gives the most characters of the
    result.
    """
    token = _left.set([1 << 62])
    try:
        size = weigh(variables)
        _left.get()[0] = _BASE + _PER_UNIT * size
        yield _LONGEST + 16 * size
    finally:
        _left.reset(token)


def spend(units: int) -> None:
    """Take `units` from the budget."""
    left = _left.get()
    left[0] -= units
    if left[0] < 0:
        raise TooMuch


def weigh(value) -> int:
    """The size of a value as text: characters, and a little for each item; shared parts count as often as they appear.

    TooMuch once it exceeds the rest of the budget, as a list that contains itself always does.
    """
    if isinstance(value, str):
        return len(value)
    most, total, left = _left.get()[0], 0, [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            total += len(value) + NODE
        elif isinstance(value, int):
            total += NODE + value.bit_length()
        elif isinstance(value, Namespace):
            total += NODE
            left.append(value._Namespace__attrs)
        elif isinstance(value, dict):
            total += NODE
            left += value.keys()
            left += value.values()
        elif isinstance(value, (list, tuple, *_VIEWS)):
            total += NODE + NODE * len(value)
            left += value
        else:
            total += NODE
        if total > most:
            raise TooMuch
    return total


def charged(value):
    """Charge the result of an operation by its length, and return it."""
    if isinstance(value, str):
        spend(len(value))
    elif isinstance(value, list | tuple | dict):
        spend(NODE * len(value))
    return value


def price(name: str, subject, args: tuple, kwargs: dict) -> int:
    """Units of a method or a filter whose result may be larger than its arguments."""
    values = [*args, *kwargs.values()]
    numbers = sum(abs(value) for value in values if isinstance(value, int))
    texts = sum(len(value) for value in values if isinstance(value, str))
    size = len(subject) if hasattr(subject, "__len__") else 1
    match name:
        case "replace" if len(args) > 1 and isinstance(args[0], str) and isinstance(args[1], str):
            return size + (size // max(1, len(args[0])) + 1) * len(args[1])
        case "join":  # items|join("x") and "x".join(items): each of the two may be a string
            items = values[0] if isinstance(subject, str) and values else subject
            separator = size if isinstance(subject, str) else texts
            return weigh(items) + (len(items) if hasattr(items, "__len__") else 1) * separator + size * texts
        case "center" | "ljust" | "rjust" | "zfill":
            return size + numbers
        case "indent":
            return size + (subject.count("\n") + 1 if isinstance(subject, str) else size) * (numbers + texts)
        case "tojson":
            return _indented(subject, numbers + texts) if numbers + texts else 0
        case "batch" | "slice":
            return NODE * (size + numbers)
        case "round":
            return numbers * numbers
        case "sum" if any(isinstance(value, list | tuple) for value in values):
            raise TooMuch  # a sum of lists copies each list once for each later one
        case "format":
            return format_price(str(subject), (*args, *kwargs.values()))
        case "strip" | "lstrip" | "rstrip" | "trim" | "rsplit" | "rfind" | "rindex" | "rpartition":
            return size * max(1, texts)  # searches from the end are quadratic at worst
        case _:
            return size + texts


def _indented(value, indent: int) -> int:
    """Characters of JSON's indentation."""
    total, left = 0, [(value, 1)]
    while left:
        value, depth = left.pop()
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        total += depth * indent * (len(items) + 1)
        left += [(item, depth + 1) for item in items if isinstance(item, dict | list | tuple)]
        if total > _left.get()[0]:
            raise TooMuch
    return total


def format_price(text: str, values: tuple) -> int:
    """Units of text % values or text.format(values): the widths in the text, and each value for each field."""
    widths = re.findall(r"\d+", text)
    if any(len(width) > 8 for width in widths):
        raise TooMuch
    most = weigh(values)
    if "*" in text or re.search(r"\{[^{}]*\{", text):  # widths among the values
        most += sum(abs(value) for value in values if isinstance(value, int))
    return STEP + len(text) + sum(map(int, widths)) + (text.count("%") + text.count("{")) * most
