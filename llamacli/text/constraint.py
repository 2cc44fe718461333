"""Constrains an answer to a JSON schema, a grammar or a choice, by llguidance (the extra `schema`; imported only when needed).

In: a tokenizer; a schema, a grammar (Lark, GBNF or a regular expression) or a list of texts. Out: a `Constraint` for `Sampler`:
which tokens may come next, which must, and whether the answer is complete. llguidance walks a tree of the vocabulary's bytes
beside a parser of the grammar; a mask of 202,048 tokens takes it a tenth of a millisecond or less in JSON.

A mask never allows special tokens, except those that end an answer, when the answer is complete. JSON is written on one line,
spaced as json.dumps does: so most tokens between values are forced, and an answer cannot continue with spaces without end.
"""

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from time import perf_counter

import numpy as np

from llamacli.cpu.kernels.ops.masks import BITS, keep
from llamacli.errors import LlamacliError, PromptError, UsageError
from llamacli.text.schema import refusal, schema_text
from llamacli.text.tokenizer import Tokenizer

_STRICT = {  # json.dumps's separators; no keyword is ignored
    **{"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
    **{"lenient": False, "coerce_one_of": False},
}
_LARK, _GBNF = re.compile(r"^\s*(start\s*:|%llguidance\b)", re.M), re.compile(r"^\s*[\w-]+\s*::=", re.M)
_KEPT = 8  # compiled grammars


def library():
    """The package llguidance; UsageError if it is not installed."""
    try:
        import llguidance
    except ImportError:
        raise UsageError(
            "a schema, a grammar or a choice needs the package llguidance, found none; pip install 'llamacli[schema]'"
        ) from None
    return llguidance


class Grammars:
    """Compiles grammars for one tokenizer's vocabulary. Making it takes a second for 202,048 tokens, a grammar some
    milliseconds.

    UsageError if llguidance is not installed, or if the vocabulary has no token that ends an answer.
    """

    def __init__(self, tokenizer: Tokenizer):
        llguidance = library()
        if not tokenizer.stop_ids:
            raise UsageError("a schema, a grammar or a choice needs a token that ends an answer, and this model has none")
        ends = sorted(tokenizer.stop_ids, key=lambda id: (id != tokenizer.eos, id))
        words = llguidance.TokenizerWrapper(_Words(tokenizer, ends[0]))
        self._library, self._words = llguidance, llguidance.LLTokenizer(words, eos_token=ends)
        words.tokens = []  # it has copied them
        self._compiled = lru_cache(_KEPT)(self._compile)

    def constraint(
        self, schema: str | dict | bool | None = None, grammar: str | None = None, choice: Sequence[str] | None = None
    ) -> "Constraint":
        """A constraint by exactly one of a JSON schema, a grammar and texts to choose among.

        A grammar is Lark if it has a rule `start:`, GBNF if it has rules with `::=`, else a regular expression. UsageError for
        none or several, and for one that cannot be enforced completely.
        """
        if sum(each is not None for each in (schema, grammar, choice)) != 1:
            raise UsageError("expected one of schema, grammar and choice, found none or several; they exclude each other")
        if schema is not None:
            kind, text = "schema", schema_text(schema)
        elif choice is not None:
            kind, text = "choice", _choice_text(choice)
        elif not isinstance(grammar, str) or not grammar.strip():
            raise UsageError(f"grammar: expected Lark, GBNF or a regular expression, found {grammar!r:.40}")
        else:
            kind, text = "grammar", grammar
        return Constraint(self._compiled(kind, text).deep_copy(), self._words.vocab_size)

    def _compile(self, kind: str, text: str):
        """A matcher at the start of an answer."""
        known = self._library.LLMatcher
        try:
            if kind == "schema":
                made = known.grammar_from_json_schema(text, overrides=_STRICT)
            elif kind == "choice" or _LARK.search(text):
                made = known.grammar_from_lark(text)
            elif _GBNF.search(text):
                made = self._library.grammar_from("gbnf", text)
            else:
                made = known.grammar_from_regex(text.strip("\r\n"))
            wrong, notes = known.validate_grammar_with_warnings(made, self._words)
        except ValueError as error:
            wrong, notes = True, [str(error)]
        if notes and kind == "schema":
            raise refusal(notes[0])
        if wrong:
            found = " ".join(notes[0].partition("<backtrace>")[0].split())
            raise UsageError(f"{kind}: expected one that can be enforced, found: {found:.300}; mend it")
        matcher = known(self._words, made, log_level=0)
        if matcher.is_error():
            raise UsageError(f"{kind}: expected one that can be enforced, found: {matcher.get_error():.300}; simplify it")
        return matcher


class Constraint:
    """A sampler.Constraint by a grammar, for one answer after the other.

    `seconds`: spent on masks and tokens of the present answer.
    """

    def __init__(self, matcher, n_vocab: int):
        self._fresh, self._matcher = matcher, matcher.deep_copy()
        self._bits = np.empty(-(-n_vocab // BITS), np.uint32)
        self._count = 0
        self.seconds = 0.0

    def begin(self, begun: Sequence[int] = ()) -> None:
        """Begin another answer, whose text so far is `begun`. PromptError if that does not fit the grammar."""
        self._matcher, self._count, self.seconds = self._fresh.deep_copy(), len(begun), 0.0
        if begun and not self._matcher.consume_tokens(list(begun)):
            raise PromptError("the answer so far does not fit its schema, grammar or choice: ask for a new one")

    def mask(self, logits: np.ndarray) -> None:
        """Set the logits [n_vocab] of tokens that may not come next to minus infinity, in place.

        LlamacliError if the grammar is too complex to continue.
        """
        began = perf_counter()
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        keep(logits, self._bits)
        self.seconds += perf_counter() - began

    def accept(self, id: int) -> None:
        """Advance by the token that was picked. LlamacliError for one that the mask forbids."""
        began = perf_counter()
        self._matcher.consume_token(id)
        self._check()
        self._count += 1
        self.seconds += perf_counter() - began

    def forced(self) -> list[int]:
        """Advance by the ids that must come next whatever the logits, and return them."""
        began = perf_counter()
        ids = self._matcher.compute_ff_tokens()
        if ids:
            self._matcher.consume_tokens(ids)
            self._count += len(ids)
        self._check()
        self.seconds += perf_counter() - began
        return ids

    @property
    def over(self) -> bool:
        """Whether the answer is complete and nothing may follow."""
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            found = " ".join(self._matcher.get_error().split("\n")[0].split())
            raise LlamacliError(f"the grammar: expected to go on after {self._count} tokens, found: {found:.200}; simplify it")


class _Words:
    """A tokenizer in the form that llguidance needs."""

    def __init__(self, tokenizer: Tokenizer, eos: int):
        self._encode = tokenizer.encode
        self.tokens, self.special_token_ids = tokenizer.byte_table()
        self.eos_token_id, self.bos_token_id = eos, tokenizer.bos

    def __call__(self, text: str) -> list[int]:
        return self._encode(text, bos=False, special=False)


def _choice_text(choice: Sequence[str]) -> str:
    """The Lark grammar of a choice: one terminal, since the time for rules grows with the square of their number."""
    if isinstance(choice, str) or not choice or not all(isinstance(each, str) and each for each in choice):
        raise UsageError(f"choice: expected texts to choose among, none of them empty, found {choice!r:.80}")
    return "start: TEXT\nTEXT: " + " | ".join(map(json.dumps, dict.fromkeys(choice)))
