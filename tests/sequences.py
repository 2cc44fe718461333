"""Speed of several sequences that decode together: `python tests/sequences.py FILE.gguf [--counts 1,2,4,8] [--tokens 32] ...`.

In: a GGUF that fits into memory. Out, for each count of sequences: tokens per second, and the ratio to the first count;
"by-bytes": the ratio if only reading took time, where a step reads each weight that every token uses once, and an expert once
if any sequence chose it; "random": the same with experts chosen at random; "experts": different experts of a layer. Then the
time of each operation in a step of the most sequences, and the speed of a prompt. Counts alternate, and the median of their
rounds is shown. First it checks that each sequence's logits have the same bits as alone.
"""

import argparse
from collections import Counter
from statistics import median
from time import perf_counter

import numpy as np

from llamacli import Model
from llamacli.plan.placement import size_by_kind


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file")
    parser.add_argument("--counts", default="1,2,4,8")
    parser.add_argument("--depth", type=int, default=64, help="tokens of each prompt (64)")
    parser.add_argument("--tokens", type=int, default=32, help="steps of a round (32)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--temp", type=float, default=0.6)
    parser.add_argument("--kv", default="f16")
    parser.add_argument("-t", "--threads", type=int)
    asked = parser.parse_args()
    counts = [int(count) for count in asked.counts.split(",")]
    ctx = asked.depth + 8 * asked.tokens
    with Model.load(asked.file, asked.threads, ctx, experts="mapped", kv=asked.kv, sessions=max(counts)) as model:
        crew = Crew(model, max(counts), asked.depth, asked.temp)
        crew.check()
        rounds = {count: [] for count in counts}
        for n in range(asked.rounds + 1):
            for count in counts:
                found = crew.decode(count, asked.tokens)
                if n:  # the first round warms up
                    rounds[count].append(found)
        show(model, rounds)
        crew.profile(max(counts), asked.tokens)
        crew.prefill(512)


class Crew:
    """Caches of several sequences, each with a prompt of its own."""

    def __init__(self, model, most, depth, temp):
        self.model, self.engine, self.depth = model, model.engine, depth
        self.sizes = size_by_kind(((t.name, t.nbytes) for t in model.gguf.tensors.values()), model.config)
        texts = np.random.default_rng(0).integers(0, model.config.n_vocab, (most, depth))
        self.caches = [self.engine.new_cache(model.ctx) for _ in texts]
        self.samplers = [model.sampler(temp=temp, seed=n, ignore_eos=True) for n in range(most)]
        self.first = np.stack([self.engine.forward(text, cache) for text, cache in zip(texts, self.caches, strict=True)])

    def check(self):
        """SystemExit if a step together differs from the steps alone."""
        for cache in self.caches:
            assert cache.truncate(self.depth) == self.depth
        ids = [[int(logits.argmax())] for logits in self.first]
        alone = [self.engine.forward(some, cache).copy() for some, cache in zip(ids, self.caches, strict=True)]
        for cache in self.caches:
            cache.truncate(self.depth)
        same = [np.array_equal(a, b) for a, b in zip(self.engine.forward_each(ids, self.caches), alone, strict=True)]
        print(f"{sum(same)} of {len(same)} sequences have the bits that they have alone")

    def decode(self, count, steps):
        """Seconds of a step, in all, in the engine and in samplers; bytes of a step, and different experts of a layer."""
        caches, logits = self.caches[:count], self.first[:count]
        for cache in caches:
            cache.truncate(self.depth)
        chosen, seconds = [], Counter()
        self.engine.follow_routing = lambda pos, experts: chosen.append(experts.copy())
        history = [[] for _ in caches]
        began = perf_counter()
        for _ in range(steps):
            at = perf_counter()
            ids = [sampler.next_ids(row, past) for sampler, row, past in zip(self.samplers, logits, history, strict=False)]
            for past, some in zip(history, ids, strict=True):
                past += some
            seconds["sampler"] += perf_counter() - at
            at = perf_counter()
            logits = self.engine.forward_each(ids, caches)
            seconds["engine"] += perf_counter() - at
        total = perf_counter() - began
        self.engine.follow_routing = None
        mixtures = [i for i in range(self.model.config.n_layers) if self.model.config.is_moe(i)]
        experts, nbytes = 0, steps * self.sizes.always
        for step in range(0, len(chosen), count):
            for i, size in zip(mixtures, self.sizes.experts, strict=True):
                different = len({e for of_one in chosen[step : step + count] for e in of_one[i]})
                experts, nbytes = experts + different, nbytes + different * size
        shares = {name: value / steps for name, value in seconds.items()}
        return {"step": total / steps, **shares, "bytes": nbytes / steps, "experts": experts / steps / max(1, len(mixtures))}

    def profile(self, count, steps):
        """Print the time of a step by operation; the threads synchronize after each operation, which takes a little time
        itself.
        """
        timings = Counter()
        for stage in self.engine.stages:
            stage.timings = timings
        self.decode(count, steps)
        for stage in self.engine.stages:
            stage.timings = None
        by_name = Counter()
        for (_, name), seconds in timings.items():
            by_name[name] += seconds
        total = sum(by_name.values())
        print(f"\na step of {count}: " + ", ".join(f"{name} {100 * s / total:.1f} %" for name, s in by_name.most_common()))

    def prefill(self, n):
        """Print the speed of a prompt."""
        ids, found = np.random.default_rng(1).integers(0, self.model.config.n_vocab, n), []
        for _ in range(4):
            cache, began = self.engine.new_cache(n), perf_counter()
            self.engine.forward(ids, cache)
            found.append(perf_counter() - began)
        print(f"a prompt of {n} tokens: {n / median(found[1:]):.1f} tokens/s")


def show(model, rounds):
    """A line for each count."""
    sizes = size_by_kind(((t.name, t.nbytes) for t in model.gguf.tensors.values()), model.config)
    middle = {n: {key: median(found[key] for found in many) for key in many[0]} for n, many in rounds.items()}
    used, of = model.config.n_experts_used, max(1, model.config.n_experts)
    print(
        f"{model.gguf.path.name}, {model.engine.threads} threads: weights of every token {sizes.always / 1e9:.3f} GB,", end=" "
    )
    print(f"experts of one token {used * sizes.one_per_layer / 1e9:.3f} GB")
    heads = (
        "sequences",
        "tokens/s",
        "times one",
        "by bytes",
        "random",
        "ms a step",
        "sampling",
        "other",
        "GB",
        "GB/s",
        "experts",
    )
    print(" ".join(f"{head:>9}" for head in heads))
    one = middle[min(middle)]
    for n, m in middle.items():
        at_random = sizes.always + of * (1 - (1 - used / of) ** n) * sizes.one_per_layer
        found = (n / m["step"], n * one["step"] / m["step"], n * one["bytes"] / m["bytes"])
        found += (n * (sizes.always + used * sizes.one_per_layer) / at_random, 1000 * m["step"], 1000 * m["sampler"])
        found += (1000 * (m["step"] - m["engine"] - m["sampler"]), m["bytes"] / 1e9, m["bytes"] / m["step"] / 1e9, m["experts"])
        print(f"{n:9} " + " ".join(f"{value:9.2f}" for value in found))


if __name__ == "__main__":
    main()
