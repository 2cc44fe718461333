"""Random JSON schemas and answers constrained to them. `python tests/schemas.py 1000` lets the small model answer each.

In: seeds. Out: schemas with keywords that can be enforced, some with one that cannot; whether a text fits its schema, in exact
decimal arithmetic.
"""

import decimal
import json
import random
import sys
from collections import Counter
from pathlib import Path

import jsonschema

WORDS = ["name", "age", "größe", "id", "x", 'a "quoted" key', "city", "tags", "left", "🦙"]
PATTERNS = ["^[a-z]{2,6}$", "^\\d{4}-\\d{2}$", "[A-Z]+", "^(yes|no|maybe)$", "^\\S+$", "é", "^.{1,5}$", "a.*b"]
FORMATS = ["uuid", "ipv4", "email"]
REFUSED = {  # keywords that cannot be enforced
    **{"uniqueItems": True, "not": {"type": "null"}, "contains": {"type": "null"}, "if": {"type": "null"}},
    **{"propertyNames": {"maxLength": 3}, "dependentRequired": {"x": ["id"]}, "unevaluatedProperties": False},
    **{"minlength": 2, "nullable": True, "contentEncoding": "base64", "$dynamicRef": "#x", "dependencies": {}},
}


class Generator:
    """Schemas from one seed. `hostile`: the share of schemas with a keyword of REFUSED, which `refused` then names."""

    def __init__(self, seed, hostile=0.0):
        self._random, self._hostile = random.Random(seed), hostile
        self.refused = None

    def schema(self):
        r = self._random
        self._left = r.randint(2, 14)  # parts
        found = {"$defs": {"leaf": self._leaf(), "tree": self._tree()}} | self._part(3)
        if r.random() < self._hostile:
            self.refused = r.choice(list(REFUSED))
            spots = [part for part in _parts(found) if "$ref" not in part]
            r.choice(spots)[self.refused] = REFUSED[self.refused]
        return found

    def _tree(self):
        return {
            "type": "object",
            "properties": {"value": self._leaf(), "next": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]}},
            "required": ["value", "next"],
            "additionalProperties": False,
        }

    def _part(self, depth):
        r, self._left = self._random, self._left - 1
        inner = [self._object, self._object, self._array, self._tuple, self._any, self._one, self._all, self._reference]
        return (r.choice(inner)(depth - 1) if depth and self._left > 0 else self._leaf()) | self._note()

    def _note(self):
        return self._random.choice([{}, {}, {"description": "text"}, {"title": "T", "examples": [1]}, {"x-own": 1}])

    def _leaf(self):
        r = self._random
        kind = r.randrange(10)
        if kind == 0:
            return {"const": self._value(1)}
        if kind == 1:
            return {"enum": [self._value(1) for _ in range(r.randint(1, 4))]}
        if kind == 2:
            return {"type": r.choice(["boolean", "null", ["null", "string"], ["integer", "boolean"]])}
        if kind in (3, 4):
            return {"type": "integer"} | self._bounds(lambda: r.randint(-1000, 1000), r.choice([2, 3, 7, 10]))
        if kind in (5, 6):
            return {"type": "number"} | self._bounds(lambda: round(r.uniform(-100, 100), 2), r.choice([0.1, 0.5, 0.01, 3]))
        if kind == 7:
            return {"type": "string", "pattern": r.choice(PATTERNS)}
        if kind == 8:
            return {"type": "string", "format": r.choice(FORMATS)}
        low = r.randint(0, 5)
        return {"type": "string"} | r.choice([{}, {"minLength": low}, {"minLength": low, "maxLength": low + r.randint(0, 20)}])

    def _bounds(self, number, multiple):
        r, low = self._random, number()
        found = r.choice([{}, {"minimum": low}, {"exclusiveMinimum": low}, {"maximum": low}, {"exclusiveMaximum": low}])
        if "minimum" in found and r.random() < 0.5:
            found["maximum"] = low + 50
        return found | ({"multipleOf": multiple} if r.random() < 0.3 else {})

    def _value(self, depth):
        r = self._random
        kind = r.randrange(8 if depth else 6)
        if kind == 6:
            return [self._value(depth - 1) for _ in range(r.randint(0, 3))]
        if kind == 7:
            return {name: self._value(depth - 1) for name in r.sample(WORDS, r.randint(0, 3))}
        return r.choice([None, True, False, r.randint(-9999, 9999), round(r.uniform(-9, 9), 3), r.choice(WORDS), 'line\n"\\'])

    def _object(self, depth):
        r = self._random
        names = r.sample(WORDS, r.randint(0, 4))
        found = {"type": "object", "properties": {name: self._part(depth) for name in names}}
        found["required"] = [name for name in names if r.random() < 0.6]
        others = r.choice([False, False, True, "schema", None])
        if others is not None:
            found["additionalProperties"] = self._part(0) if others == "schema" else others
        if r.random() < 0.2:
            found["patternProperties"] = {"^[a-c]_": self._part(0), "^n[0-9]": self._part(0)}
        if found["required"] == names and r.random() < 0.3:
            found |= {"minProperties": len(names) + (others is not False), "maxProperties": len(names) + 2}
        return found

    def _array(self, depth):
        low = self._random.randint(0, 2)
        return {"type": "array", "items": self._part(depth), "minItems": low, "maxItems": low + self._random.randint(0, 3)}

    def _tuple(self, depth):
        parts = [self._part(depth) for _ in range(self._random.randint(1, 3))]
        rest = self._random.choice([False, self._part(0)])
        return {"type": "array", "prefixItems": parts, "items": rest, "minItems": len(parts), "maxItems": len(parts) + 2}

    def _any(self, depth):
        return {"anyOf": [self._part(depth) for _ in range(self._random.randint(1, 3))]}

    def _one(self, depth):
        options = [{"type": "null"}, {"type": "boolean"}, {"type": "string"}, {"type": "integer"}, self._object(depth)]
        return {"oneOf": self._random.sample(options, self._random.randint(1, 4))}

    def _all(self, depth):
        return {"allOf": [self._object(depth), {"type": "object", "properties": {"both": self._leaf()}, "required": ["both"]}]}

    def _reference(self, depth):
        return {"$ref": self._random.choice(["#/$defs/leaf", "#/$defs/tree"])}


def _parts(schema):
    """All schema objects inside a schema."""
    yield schema
    for key, value in schema.items():
        if key in ("properties", "patternProperties", "$defs"):
            inner = value.values()
        elif key in ("anyOf", "oneOf", "allOf", "prefixItems"):
            inner = value
        else:
            inner = [value] if key in ("items", "additionalProperties") else []
        for part in inner:
            if isinstance(part, dict):
                yield from _parts(part)


def _exact(digits):
    try:
        return decimal.Decimal(digits)
    except decimal.InvalidOperation:  # a very large exponent
        return float(digits)


def fits(text, schema):
    """None if `text` is JSON that meets `schema`, else what is wrong. Numbers are compared as decimals, not as doubles."""
    with decimal.localcontext() as context:
        context.prec = 2000
        try:
            value = json.loads(text, parse_float=_exact)
        except ValueError as error:
            return f"no JSON: {error}"
        exact = json.loads(json.dumps(schema), parse_float=decimal.Decimal)
        checker = jsonschema.FormatChecker(formats=FORMATS)
        return next(
            (e.message for e in jsonschema.Draft202012Validator(exact, format_checker=checker).iter_errors(value)), None
        )


def main(count):
    """Let the small model answer each of `count` schemas; returns how many answers did not fit."""
    from llamacli import Model, UsageError

    model = Model.load(Path(__file__).parents[1] / "models" / "scout-tiny" / "scout-tiny.gguf")
    ends = dict.fromkeys(model.tokenizer.ids_with(['"', "}", "]"]), 6.0)  # without this so small a model rarely ends a string
    settings = {"temp": 1.0, "top_p": 1.0, "repeat_penalty": 1.3, "logit_bias": ends}
    seen, wrong = Counter(), 0
    for seed in range(count):
        made = Generator(seed, hostile=0.15)
        schema = made.schema()
        prompt = [{"role": "user", "content": f"Write JSON about {random.Random(seed).choice(WORDS)}."}]
        try:
            pieces = list(model.stream(prompt, 600, schema=schema, seed=seed, **settings))
        except UsageError as error:
            named = made.refused is None or f"found {made.refused} " in str(error)
            seen["refused" if made.refused else f"refused: {str(error)[40:120]}"] += 1
            fault = None if named else f"the refusal does not name {made.refused}: {error}"
        else:
            reason, text = pieces[-1].finish_reason, "".join(piece.text for piece in pieces)
            seen[reason] += 1
            fault = "it was not refused" if made.refused else fits(text, schema) if reason == "stop" else None
        if fault:
            wrong += 1
            print(f"seed {seed}: {fault}\n  {json.dumps(schema)}\n  {text!r}", file=sys.stderr)
    print(*(f"{n:6} {what}" for what, n in seen.most_common()), f"{wrong:6} wrong", sep="\n")
    return wrong


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])) > 0)
