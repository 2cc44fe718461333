"""The options --schema, --grammar and --choice, which constrain an answer.

In: the options' values. Out: keywords for `Model.sampler`. Errors that need no model are raised before it is loaded.
"""

import json

from llamacli.cli.console import Console
from llamacli.cli.inputs import Limit, read_file
from llamacli.errors import CutAnswerError, UsageError

LARGEST = Limit(16 << 20)  # a schema or a grammar


def binding(schema: str | None, grammar: str | None, choice: str | None, stops: bool, ignore_eos: bool, here: bool) -> dict:
    """The keyword for `Model.sampler` and its value; empty without these options. `here`: this process enforces it, not a
    server.
    """
    asked = {"--schema": schema, "--grammar": grammar, "--choice": choice}
    asked = {name: value for name, value in asked.items() if value is not None}
    if not asked:
        return {}
    name, *others = [*asked, *["--stop"] * stops, *["--ignore-eos"] * ignore_eos]
    if others:
        raise UsageError(f"{name} and {others[0]} exclude each other: {name} alone decides where the answer ends")
    if here:
        from llamacli.text.constraint import library

        library()
    if schema is not None:
        from llamacli.text.schema import schema_text

        is_json = schema.lstrip()[:1] in ("{", "[") or schema in ("true", "false")
        return {"schema": schema_text(schema if is_json else read_file(schema, Console(), LARGEST))}
    if grammar is not None:
        return {"grammar": read_file(grammar, Console(), LARGEST)}
    return {"choice": _choices(choice)}


def _choices(words: str) -> list[str]:
    if not words.startswith("["):
        found = [word.strip() for word in words.split(",")]
    else:
        try:
            found = json.loads(words)
        except ValueError as error:
            raise UsageError(f"--choice: expected texts as a JSON list, found: {error}") from None
    if not found or not all(isinstance(word, str) and word for word in found):
        raise UsageError(f"--choice: expected texts such as yes,no with nothing empty among them, found {words!r:.80}")
    return found


def check_whole(sampler, reason: str | None) -> None:
    """CutAnswerError if a constrained answer was cut. Even a number may lack its last digits."""
    if sampler.constraint is not None and reason != "stop":
        limit = {"length": "the -n limit", "context": "the full context"}.get(reason, "an interrupt")
        raise CutAnswerError(f"the answer is cut: expected a complete one, found {limit} first; allow more tokens")


def slowness(sampler, stats) -> str | None:
    """A note about a grammar that takes more than a tenth of the answer's time, and a noticeable time; "" otherwise."""
    seconds, tokens = getattr(sampler.constraint, "seconds", 0.0), max(1, stats.completion_tokens)
    if seconds < 0.5 or seconds < 0.1 * stats.decode_s:
        return None
    share = 100 * seconds / stats.decode_s
    return (
        f"the grammar takes {1000 * seconds / tokens:.1f} ms a token, {share:.0f} % of the answer's time; "
        f"rules that match single characters are slow, a regular expression is fast"
    )
