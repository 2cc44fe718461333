"""Measures the effect of --speculate: `python tests/guesses.py FILE.gguf [--tokens 200] [--rounds 3]`.

In: a GGUF that fits into memory. Out, for answers of several kinds: tokens a second without guesses and with them, the guesses
and how many were right, and whether text and logits are the same to the bit. The answers "edited code", "summary" and "random
tokens" are given texts: the time is the model's, the text is a typical answer to such a prompt. The other answers are the
model's own, greedy and sampled. Runs with and without guesses alternate; medians are shown.
"""

import argparse
from pathlib import Path
from statistics import median
from time import perf_counter
from zlib import crc32

import numpy as np

from llamacli import Model, environment

ROOT = Path(__file__).resolve().parents[1]
EDITS = (("Guesses", "Proposals"), ("PAUSE", "REST"), ("seconds", "duration"))


class Given:
    """A sampler that picks the tokens of a text."""

    constraint, chosen, over = None, None, False

    def __init__(self, ids):
        self._ids = ids

    def begin(self, begun=()):
        self._said, self.sum = 0, 0
        return []

    def next_ids(self, logits, history=()):
        self.sum = crc32(logits.tobytes(), self.sum)
        self._said += 1
        return [self._ids[self._said - 1]]


def summed(sampler):
    """The model's sampler, which also records a checksum of its logits."""
    pick = sampler.pick

    def noted(logits, history=()):
        sampler.sum = crc32(logits.tobytes(), getattr(sampler, "sum", 0))
        return pick(logits, history)

    sampler.pick = noted
    return sampler


def cases(model, n):
    """(name, ids of the prompt, most tokens of the answer, a function that makes a sampler)."""
    encode = model.tokenizer.encode
    code, text = (ROOT / "llamacli/speculation.py").read_text(), (ROOT / "docs/context.md").read_text().split("## ")[1]
    edited = code
    for old, new in EDITS:
        edited = edited.replace(old, new)
    sentences = [sentence for sentence in text.replace("\n", " ").split(". ") if len(sentence) < 200]
    summary = " In short: ".join(f"It says that {sentence.strip()}." for sentence in sentences[::2])
    words = np.random.default_rng(0).integers(0, 256, n).tolist()
    given = {
        "edited code": (encode(code), encode(edited, bos=False)),
        "summary": (encode(text), encode(summary, bos=False)),
        "random tokens": (encode(text), words),
    }
    for name, (prompt, answer) in given.items():
        yield name, prompt, min(n, len(answer)), lambda answer=answer: Given(answer)
    for name, settings in (("own, greedy", {"temp": 0}), ("own, sampled", {"temp": 0.8, "seed": 1})):
        yield name, encode(text)[:200], n, lambda settings=settings: summed(model.sampler(**settings, ignore_eos=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", nargs="?", default=environment.SMALL_MODEL)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-t", "--threads", type=int)
    asked = parser.parse_args()
    print("answer          plain/s  guessing/s  times  guesses  right  same")
    with Model.load(asked.file, asked.threads, 8192, experts="mapped") as model:
        for name, prompt, most, make in cases(model, asked.tokens):
            speeds, outcomes = {False: [], True: []}, set()
            session = model.session()
            session.sync(prompt)
            for _ in range(asked.rounds):
                for speculate in speeds:
                    fork, sampler = session.fork(), make()
                    fork.speculate = speculate
                    began = perf_counter()
                    ids = [piece.id for piece in fork.stream(prompt, sampler, most)]
                    speeds[speculate].append(fork.stats.completion_tokens / (perf_counter() - began))
                    outcomes.add((tuple(ids), fork.stats.completion_tokens, sampler.sum))
                    stats = fork.stats
            plain, guessing = (median(found) for found in speeds.values())
            same = "yes" if len(outcomes) == 1 else "NO"
            print(
                f"{name:14} {plain:8.1f} {guessing:11.1f} {guessing / plain:6.2f} {stats.proposed:8} {stats.accepted:6}  {same}"
            )


if __name__ == "__main__":
    main()
