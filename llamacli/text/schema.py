"""Checks that all of a JSON schema can be enforced on an answer.

In: a schema as text or as Python objects. Out: the same as JSON text for llguidance, or a UsageError that names the keyword
that cannot be enforced and its place. llguidance refuses some keywords itself, but ignores others: those it does not know in
the schema's draft, numbers beyond a double's exact integers, lists of items of another draft.
"""

import difflib
import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal

from llamacli.errors import UsageError

_NAMES = frozenset({"$schema", "$id", "id", "$anchor", "$defs", "definitions"})
_NOTES = frozenset({"$comment", "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"})
_BOUNDS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
_COUNTS = frozenset({"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"})
_OTHERS = frozenset({"type", "enum", "const", "required", "pattern", "format", "$ref"})
_INNER = frozenset({"items", "additionalItems", "additionalProperties"})  # a schema
_LISTS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})  # lists of schemas; `items` may also be one
_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions"})  # names to schemas
_KNOWN = _NAMES | _NOTES | _BOUNDS | _COUNTS | _OTHERS | _INNER | _LISTS | _MAPS
_NEWEST = "https://json-schema.org/draft/2020-12/schema"
_DRAFTS = {
    _NEWEST,
    "https://json-schema.org/draft/2019-09/schema",
    *(f"http://json-schema.org/draft-0{n}/schema" for n in (4, 6, 7)),
}
_WHOLE = 1 << 53  # whole numbers up to here are exact as doubles
_LARGEST_MULTIPLE = (1 << 32) - 1  # the largest value that llguidance computes without overflow
_WORDS = {  # parts of llguidance's messages, and the keyword that each is about
    "min/maxProperties": "minProperties or maxProperties",
    "Unsatisfiable": "demands that nothing meets",
    "patternProperty": "patternProperties",
    "Unknown format": "format",
    "Pointer": "$ref",
    "circular references": "$ref",
    "oneOf": "oneOf without a constant or a type that tells its options apart; anyOf asks for less",
    "regex": "pattern",
}


def schema_text(schema: str | dict | bool) -> str:
    """The checked schema as JSON. UsageError if it is invalid, or has a part that cannot be enforced."""
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        schema = json.loads(text, parse_constant=_no_number)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"schema: expected JSON, found: {error or 'brackets nested too deep'}; mend it") from None
    if isinstance(schema, bool):
        if not schema:
            raise UsageError("schema: expected one that some answer meets, found false")
        return "{}"
    multiples, draft = set(), _draft(schema)
    for path, part in _schemas(schema):
        _check(path, part, draft)
        if "multipleOf" in part:
            multiples.add(_multiple(path, part["multipleOf"]))
    scale = max((-each.as_tuple().exponent for each in multiples), default=0)
    if len(multiples) > 1 and math.prod(each.scaleb(max(0, scale)) for each in multiples) > _LARGEST_MULTIPLE:
        shown = ", ".join(sorted(map(str, multiples)))
        raise _unenforced("$", "multipleOf", f"of {shown}, whose common multiple is too large")
    return text


def refusal(message: str) -> UsageError:
    """The UsageError for llguidance's message about a schema that it cannot enforce."""
    words = " ".join(message.replace("Enable 'coerce_one_of' option to approximate oneOf with anyOf", "").split())
    known = (word for word in re.findall(r"\w+", words) if word in _KNOWN - _NAMES - _NOTES)
    keyword = next((word for part, word in _WORDS.items() if part in message), None) or next(known, "this schema")
    return UsageError(f"schema: expected what can be enforced, found {keyword} ({words:.200}); leave it out or mend it")


def _no_number(word: str):
    raise ValueError(f"{word}, which is no JSON")


def _unenforced(path: str, keyword: str, what: str) -> UsageError:
    return UsageError(f"schema: expected what can be enforced, found {keyword} {what}, at {path}; leave it out or mend it")


def _schemas(root) -> Iterator[tuple[str, dict]]:
    """Every object schema inside a schema, with its path; "$" is the whole."""
    left = [("$", root)]
    while left:
        path, part = left.pop()
        if isinstance(part, bool):
            continue
        if not isinstance(part, dict):
            raise UsageError(f"schema: expected an object or a boolean at {path}, found {part!r:.40}; mend it")
        yield path, part
        for key, value in part.items():
            below = f"{path}.{key}"
            if key in _MAPS and isinstance(value, dict):
                left += [(f"{below}.{name}", inner) for name, inner in value.items()]
            elif key in _LISTS or (key == "items" and isinstance(value, list)):
                left += [(f"{below}[{i}]", inner) for i, inner in enumerate(_list(below, value))]
            elif key in _INNER:
                left.append((below, value))


def _list(path: str, value) -> list:
    if not isinstance(value, list):
        raise UsageError(f"schema: expected a list at {path}, found {value!r:.40}; mend it")
    return value


def _draft(schema) -> str:
    """The draft of the whole schema."""
    named = schema.get("$schema", _NEWEST) if isinstance(schema, dict) else _NEWEST
    if not isinstance(named, str) or named.rstrip("#") not in _DRAFTS:
        raise _unenforced("$", "$schema", f"{named!r:.80}, a draft that is not known")
    return named.rstrip("#")


def _check(path: str, part: dict, draft: str) -> None:
    """UsageError if a keyword of this schema object, without those inside it, would not be enforced."""
    for key, value in part.items():
        if key not in _KNOWN and (key == "x-guidance" or not key.startswith("x-")):
            near = difflib.get_close_matches(key, _KNOWN, 1, 0.8)
            raise _unenforced(path, key, f"(did you mean {near[0]}?)" if near else "which cannot be")
        for number in _numbers(value) if key in _BOUNDS or key in ("enum", "const") else ():
            if not abs(number) <= _WHOLE:
                raise _unenforced(path, key, f"with {number}, above 2^53, where numbers are not exact")
    reference = part.get("$ref", "#")
    if "$schema" in part and path != "$":
        raise _unenforced(path, "$schema", "in a part of a schema")
    if not isinstance(reference, str) or not reference.startswith("#"):
        raise _unenforced(path, "$ref", f"to {reference!r:.80}, outside of the schema")
    tuples = isinstance(part.get("items"), list)
    if "prefixItems" in part and (tuples or "additionalItems" in part or draft != _NEWEST):
        raise _unenforced(path, "prefixItems", "with a word of an older draft: $schema, additionalItems or a list of items")
    if "additionalItems" in part and not tuples:
        raise _unenforced(path, "additionalItems", "without a list of items, where it says nothing")
    least, required = part.get("minProperties", 0), part.get("required", [])
    if isinstance(least, int) and isinstance(required, list) and least > len(set(map(str, required))) + 1:
        raise _unenforced(path, "minProperties", f"{least}: names that `required` does not list may come twice")


def _numbers(value) -> Iterator[int | float]:
    """All numbers in a JSON value."""
    left = [value]
    while left:
        found = left.pop()
        if isinstance(found, dict):
            left += found.values()
        elif isinstance(found, list):
            left += found
        elif isinstance(found, int | float) and not isinstance(found, bool):
            yield found


def _multiple(path: str, value) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise _unenforced(path, "multipleOf", f"{value!r:.40}, which is no number above 0")
    return Decimal(repr(value)).normalize()
