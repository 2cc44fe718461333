"""Checks the fields of a request.

In: the bytes of a body. Out: values of the type and range that a protocol requires, or a `Refusal`, which names the field.
"""

import json
import math
import re
from collections.abc import Sequence

from llamacli.errors import LlamacliError

_SURROGATE = re.compile("[\ud800-\udfff]")
_MISSING = object()


class Refusal(LlamacliError):
    """The error with which a request is answered. `status`: HTTP's; `code`, `param`: as in OpenAI's protocol."""

    def __init__(self, message: str, status: int = 400, code: str | None = None, param: str | None = None, retry: int = 0):
        """`retry`: seconds after which the client may send the request again."""
        super().__init__(message)
        self.status, self.code, self.param, self.retry = status, code, param, retry


def read_json(body: bytes) -> dict:
    """The JSON object of a body."""
    try:
        value = json.loads(body, parse_constant=_no_number)
        if found := _SURROGATE.search(json.dumps(value, ensure_ascii=False)):
            raise ValueError(f"half of a character, \\u{ord(found[0]):04x}")
    except (ValueError, RecursionError) as error:
        raise Refusal(f"expected a body of JSON, found: {error or 'brackets nested too deep'}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise Refusal(f"expected a body with a JSON object, found {_shown(value)}", code="invalid_json")
    return value


def _no_number(word: str):
    raise ValueError(f"{word}, which is no JSON")


class Fields:
    """A JSON object of a request. Every method takes a field's name and returns its value; null counts as absent."""

    def __init__(self, values: dict, where: str = ""):
        self._values, self._where = values, where

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def names(self) -> Sequence[str]:
        """Names of all fields that are there."""
        return [name for name, value in self._values.items() if value is not None]

    def raw(self, name: str, default=None):
        """The value, of whatever type."""
        value = self._values.get(name)
        return default if value is None else value

    def wrong(self, name: str, wanted: str, found=_MISSING) -> Refusal:
        """The refusal of a field's value."""
        value = self._values.get(name) if found is _MISSING else found
        at = f"{self._where}{name}"
        return Refusal(f"{at}: expected {wanted}, found {_shown(value)}", param=at, code="invalid_value")

    def whole(self, name: str, default: int | None = None, least: float = -math.inf, most: float = math.inf) -> int | None:
        """A whole number."""
        value = self.raw(name, default)
        if value is default:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(name, f"a whole number{_range(least, most)}")
        return value

    def number(self, name: str, default: float | None = None, least: float = -math.inf, most: float = math.inf):
        """A number, whole or not."""
        value = self.raw(name, default)
        if value is default:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise self.wrong(name, f"a number{_range(least, most)}")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """true or false."""
        value = self.raw(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str | None:
        """A string."""
        value = self.raw(name, default)
        if value is not default and not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def texts(self, name: str, most: int) -> list[str]:
        """A string or a list of some; none may be empty."""
        value = self.raw(name, [])
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or len(found) > most or not all(isinstance(each, str) and each for each in found):
            raise self.wrong(name, f"a string or a list of at most {most}, none of them empty")
        return found

    def items(self, name: str, least: int = 0) -> list:
        """A list."""
        value = self.raw(name, [])
        if not isinstance(value, list) or len(value) < least:
            raise self.wrong(name, "a list" + f" of at least {least}" * bool(least))
        return value

    def object(self, name: str) -> "Fields":
        """An object; an empty one if it is absent."""
        value = self.raw(name, {})
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return Fields(value, f"{self._where}{name}.")

    def objects(self, name: str, least: int = 0) -> list["Fields"]:
        """A list of objects."""
        found = self.items(name, least)
        for i, value in enumerate(found):
            if not isinstance(value, dict):
                raise self.wrong(f"{name}[{i}]", "an object", value)
        return [Fields(value, f"{self._where}{name}[{i}].") for i, value in enumerate(found)]


def _range(least: float, most: float) -> str:
    if least == -math.inf:
        return ""
    return f" from {least:g} " + ("up" if most == math.inf else f"to {most:g}")


def _shown(value) -> str:
    if value is _MISSING or value is None:
        return "none"
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
