"""Measures the cost of a constrained answer: `python tests/mask_cost.py FILE.gguf [N_VOCAB]`.

In: a GGUF with a vocabulary, grown to N_VOCAB tokens (202,048, as Llama 4) with pairs of its words if it has fewer. Out: CPU
time (other programs change it little): to build llguidance's form of a vocabulary, to compile a grammar, and per sampled token
of several typical answers: its mask, the parser's advance and the forced tokens.
"""

import json
import sys
from time import process_time, thread_time

import numpy as np

from llamacli import sampling_defaults
from llamacli.files.gguf import open_gguf, zero_ended
from llamacli.llama4.vocabulary import CONTROL
from llamacli.text.constraint import Grammars
from llamacli.text.sampler import Sampler
from llamacli.text.tokenizer import Tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 60},
        "born": {"type": "string", "format": "date"},
        "height_in_metres": {"type": "number", "minimum": 0, "maximum": 3},
        "languages": {"type": "array", "items": {"enum": ["German", "English", "French", "Italian"]}, "maxItems": 4},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "postal_code": {"type": "string", "pattern": "^\\d{5}$"}},
            "required": ["street", "postal_code"],
            "additionalProperties": False,
        },
        "biography": {"type": "string"},
    },
    "required": ["name", "born", "height_in_metres", "languages", "address", "biography"],
    "additionalProperties": False,
}
PROSE = (
    "She grew up in Göttingen, where her father taught mathematics, and published her first results at the age of twenty-two. "
    "Later she worked on invariants, rings and ideals; colleagues called her lectures difficult, fast and unforgettable. "
) * 3
RECORD = {
    "name": "Emmy Noether",
    "born": "1882-03-23",
    "height_in_metres": 1.63,
    "languages": ["German", "English"],
    "address": {"street": "Stegemühlenweg 51", "postal_code": "37083"},
    "biography": PROSE,
}
GBNF = r"""root ::= object
value ::= object | array | string | number | "true" | "false" | "null"
object ::= "{" ws (pair ("," ws pair)*)? "}"
pair ::= string ":" ws value ws
array ::= "[" ws (value ws ("," ws value ws)*)? "]"
string ::= "\"" char* "\""
char ::= [^"\\] | "\\" ["\\/bfnrt]
number ::= "-"? [0-9]+ ("." [0-9]+)?
ws ::= [ \n]*
"""
CASES = {
    "a record": ({"schema": PERSON}, json.dumps(RECORD, ensure_ascii=False)),
    "any JSON": ({"schema": {}}, json.dumps(RECORD | {"more": [[1.5, True, None], {}]}, ensure_ascii=False)),
    "a long string": ({"schema": {"type": "string"}}, json.dumps(PROSE, ensure_ascii=False)),
    "JSON by GBNF": ({"grammar": GBNF}, json.dumps(RECORD, ensure_ascii=False)),
    "an expression": ({"grammar": r"(\w+[,;.]? )+"}, "the quick brown fox jumps over the lazy dog, once more; " * 4),
    "1,000 choices": ({"choice": [f"number {i} of a thousand" for i in range(1000)]}, "number 517 of a thousand"),
}


def vocabulary(path, n_vocab):
    """A tokenizer of `n_vocab` tokens."""
    gguf = open_gguf(path)
    texts, types = list(gguf.metadata["tokenizer.ggml.tokens"]), gguf.metadata["tokenizer.ggml.token_type"].tolist()
    words = [text for text in texts if text.startswith("Ġ") and text[1:].isalpha()]
    known, random = set(texts), np.random.default_rng(0)
    while len(texts) < n_vocab:
        pair = "".join(words[i] for i in random.integers(0, len(words), 2)).replace("Ġ", "", 1)
        if pair not in known:
            known.add(pair)
            texts.append(pair)
            types.append(1)
    merges = zero_ended(gguf.metadata, "tokenizer.ggml.merges")
    tokenizer = Tokenizer(texts, merges, [id for id, kind in enumerate(types) if kind == CONTROL])
    tokenizer.eos = gguf.metadata["tokenizer.ggml.eos_token_id"]
    tokenizer.stop_ids = frozenset({tokenizer.eos})
    return tokenizer


def walk(tokenizer, constraint, text):
    """Seconds of each sampled token, and the number of forced tokens, for the answer `text`."""
    rest, logits, times, forced = text.encode(), np.zeros(tokenizer.n_vocab, np.float32), [], 0
    constraint.begin()
    while True:
        began = thread_time()
        ids = constraint.forced()
        times.append(thread_time() - began)
        forced += len(ids)
        for id in ids:
            rest = rest.removeprefix(tokenizer.token_bytes(id))
        if not rest:
            return times, forced
        id = tokenizer.encode(rest.decode(), bos=False)[0]
        logits[:] = 0
        began = thread_time()
        constraint.mask(logits)
        assert logits[id] == 0, f"{tokenizer.decode([id])!r} is not allowed before {rest[:40]!r}"
        constraint.accept(id)
        times[-1] += thread_time() - began
        rest = rest.removeprefix(tokenizer.token_bytes(id))


def main(path, n_vocab=202_048):
    tokenizer = vocabulary(path, int(n_vocab))
    began = process_time()
    grammars = Grammars(tokenizer)
    print(f"{tokenizer.n_vocab} tokens; llguidance's tree of them takes {process_time() - began:.2f} s of CPU time")
    sampler, random = Sampler(**sampling_defaults({}), seed=0), np.random.default_rng(0)
    logits = random.normal(size=tokenizer.n_vocab).astype(np.float32) * 2
    logits[:20] += 12  # few tokens have nearly all of the probability, as with most models
    times = []
    for _ in range(200):
        began = thread_time()
        sampler.pick(logits)
        times.append(thread_time() - began)
    print(f"sampling alone: {1e6 * np.median(times):.0f} µs a token")
    head = ("compile", "sampled", "forced", "mean", "median", "99 %", "most")
    walk(tokenizer, grammars.constraint(choice=["a", "b"]), "a")  # compiles llamacli's kernel
    print(f"{'µs a sampled token':20} " + " ".join(f"{word:>8}" for word in head))
    for name, (bound, text) in CASES.items():
        began = thread_time()
        constraint = grammars.constraint(**bound)
        made = thread_time() - began
        times, forced = walk(tokenizer, constraint, text)
        shown = (np.mean(times), np.median(times), np.quantile(times, 0.99), np.max(times))
        print(f"{name:20} {1000 * made:5.1f} ms {len(times):8} {forced:8} " + " ".join(f"{1e6 * t:8.0f}" for t in shown))


if __name__ == "__main__":
    main(*sys.argv[1:])
