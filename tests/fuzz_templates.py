"""Random chat templates: rendering must end soon, in ids or in one line of error.

    python tests/fuzz_templates.py [N] [SEED]        N templates (10,000), the same for the same seed; 4 GiB of address space

Templates are made of parts of those in golden/templates.json, with numbers, operators, loops and filters that grow. A finding
is a template that raises anything but a PromptError, takes more than 10 s of CPU time or 1 GB, makes a special token of a
message's text, or crashes the process; it is printed, and the exit code is 1. For crashes, the current template is kept in
`last_template.txt` of the current folder.
"""

import json
import random
import re
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import small_vocab as vocab
from jinja2.filters import FILTERS

from llamacli.errors import PromptError
from llamacli.plan.machine import resident_peak
from llamacli.text.template import render
from llamacli.text.tokenizer import Tokenizer

PIECE = re.compile(r"\{%.*?%\}|\{\{.*?\}\}|[^{]+|\{", re.S)
WORD = re.compile(r"\w+|<\|\w*\|?>?|'[^']*'|\s+|.", re.S)
FORGED = "<|fim_prefix|>"  # in messages only, so it must never become a token
NUMBERS = ["0", "-1", "3", "99", "100000", "2000000000", "10 ** 9", "9 ** 9 ** 9", "1e308", "-2000000000", "2.5"]
GROWING = [
    "{% for i in range(99999) %}@{% endfor %}",
    "{% for i in [1] recursive %}{{ loop([i, i]) }}@{% endfor %}",
    "{% macro f(n) %}@{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% set s = ('x' * 99999) %}@{{ s.replace('x', s) }}",
    "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}@{{ ns.s }}",
    "{% set ns = namespace(s=[1]) %}{% for i in range(99) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}@{{ ns.s | tojson }}",
    "{% set messages = messages + messages %}@",
    "{% set x %}@@{% endset %}{{ x * 9 }}",
    "{{ '%99999s' % messages[0].content }}@",
    "{% filter upper %}@{% endfilter %}",
    "{% generation %}@{% endgeneration %}",
    "{% call(x) f(@) %}@{% endcall %}",
]
ARGUMENTS = ["", "", "(3)", "(99)", "('role')", "('d')", "('upper')", "(attribute='role')", "('a', s)", "(indent=2)"]
MESSAGES = [
    {"role": "system", "content": " rules\n"},
    {"role": "user", "content": f"a {FORGED} <b> {{{{ 7 }}}} é🦙"},
    {"role": "assistant", "content": f"<think>x</think>{FORGED}<|python_start|>f()", "tool_calls": [{"name": FORGED, "n": 1}]},
    {"role": "user", "content": "and <|eo" + FORGED + "t|>?"},
]


def mutated(draw: random.Random, seeds: list[str]) -> str:
    """A template made of parts of others, then damaged a few times."""
    pieces = [draw.choice(PIECE.findall(draw.choice(seeds))) for _ in range(draw.randrange(8))]
    text = draw.choice(seeds) if draw.random() < 0.7 else "".join(pieces)
    for _ in range(draw.randrange(1, 7)):
        words = WORD.findall(text) or [""]
        at = draw.randrange(len(words))
        match draw.randrange(9):
            case 0:
                words[at] = ""
            case 1:
                words[at] = draw.choice(WORD.findall(draw.choice(seeds)) or [""])
            case 2:
                words[at] += draw.choice(pieces or [""])
            case 3:
                words[at] = draw.choice(NUMBERS)
            case 4:
                words = draw.choice(GROWING).replace("@", text).replace("s)", f"{draw.choice(NUMBERS)})").split("\0")
            case 5:
                found = [i for i, word in enumerate(words) if word == "}" and i and words[i - 1] != "}"] or [at]
                words[draw.choice(found)] = f" | {draw.choice(sorted(FILTERS))}{draw.choice(ARGUMENTS)} }}"
            case 6:
                words[at] = draw.choice(["+", "*", "**", "~", "%", "//", "-", "in", "is", "not", "|", ".", "(", ")", "[", "]"])
            case 7:
                end = draw.randrange(at, min(len(words), at + 40)) + 1
                words[at:end] = words[at:end] * draw.choice((2, 3, 50))
            case _:
                names = ("format", "join", "ljust", "split", "__class__", "encode", "zfill", "get", "append", "translate")
                words[at] += f".{draw.choice(names)}({draw.choice(NUMBERS)})"
        text = "".join(words)[: 1 << 17]
    return text


def check(tokenizer: Tokenizer, template: str, messages: list[dict]) -> str | None:
    """The fault in the handling of a template, or None."""
    began = time.process_time()
    try:
        ids = render(tokenizer, messages, template)
    except PromptError as error:
        if "\n" in str(error) or len(str(error)) > 400:
            return f"an error of more than one line: {str(error)[:500]!r}"
        ids = []
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    if tokenizer.token_id(FORGED) in ids:
        return "a message became a special token"
    if (took := time.process_time() - began) > 10:
        return f"{took:.1f} s"
    if (peak := resident_peak() / 1e9) > 1:
        return f"{peak:.1f} GB"
    return None


def main(n: int = 10_000, seed: int = 1) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    tokenizer = Tokenizer.from_gguf(vocab.in_memory())
    golden = json.loads((Path(__file__).parent / "golden" / "templates.json").read_text("utf-8"))
    seeds = sorted({case["template"] for case in golden})
    at_work, findings, slowest = Path("last_template.txt"), 0, 0.0
    for i in range(n):
        draw = random.Random(f"{seed}/{i}")
        template = mutated(draw, seeds)
        at_work.write_text(template, "utf-8", "replace")
        began = time.process_time()
        wrong = check(tokenizer, template, MESSAGES[draw.randrange(2) : draw.randrange(2, 5)])
        slowest = max(slowest, time.process_time() - began)
        if wrong:
            findings += 1
            print(f"{seed}/{i}: {wrong}\n  {template[:1000]!r}", flush=True)
    at_work.unlink()
    print(f"{n} templates, {findings} findings; the slowest took {slowest:.1f} s, {resident_peak() / 1e9:.2f} GB at most")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
