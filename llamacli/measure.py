"""Measurements: speed of prefill and decode, and what the machine's memory could give at best.

In: a loaded model. Out: plain records, ready for JSON; nothing is printed. Knows nothing of the command line.
"""

from collections.abc import Callable
from statistics import median
from time import perf_counter

import numpy as np


def speed(
    model, n_prompt: int, n_generate: int, repetitions: int, progress: Callable[[int, int, str], None] = lambda *_: None
) -> list[dict]:
    """Tokens per second of a prompt of `n_prompt`, and of `n_generate` tokens decoded from an empty context; 0: leave out.

    A record: test ("pp512", "tg128"), tokens_per_second (the median), runs, gbytes_per_second (bytes of weights read over
    time: for decode those of one token's active experts, for a prompt every weight once), bandwidth_limit (GB/s that this
    machine's threads can read, None if it cannot be measured).
    """
    ids = _tokens(model, max(n_prompt, n_generate, 1))
    tests = [(f"pp{n_prompt}", n_prompt, _prefill, _all_weights(model) / max(1, n_prompt))] if n_prompt else []
    if n_generate:
        tests.append((f"tg{n_generate}", n_generate, _decode, model.engine.bytes_per_token))
    limit, total, done = bandwidth(model.engine.threads), len(tests) * (repetitions + 1), 0
    records = []
    for name, n, test, bytes_per_token in tests:
        runs = []
        for _ in range(repetitions + 1):  # the first one warms caches and buffers and does not count
            progress(done, total, name)
            runs.append(n / test(model, ids[:n]))
            done += 1
        rate = median(runs[1:])
        records.append(
            {
                "test": name,
                "tokens_per_second": round(rate, 3),
                "runs": [round(run, 3) for run in runs[1:]],
                "gbytes_per_second": round(rate * bytes_per_token / 1e9, 3),
                "bandwidth_limit": limit,
            }
        )
    return records


def bandwidth(threads: int) -> float | None:
    """GB/s that `threads` threads read from memory, or None where there is no kernel to measure it."""
    try:
        from llamacli.kernels.bandwidth import read_gbps
    except ImportError:
        return None
    return round(float(read_gbps(threads)), 3)


def _tokens(model, n: int) -> list[int]:
    """A fixed random text: random tokens spread over the experts as a varied text does."""
    hidden = set(np.asarray(model.tokenizer.hidden_ids).tolist()) | set(model.tokenizer.stop_ids)
    usable = [i for i in range(model.config.n_vocab) if i not in hidden]
    return [int(i) for i in np.random.default_rng(0).choice(usable, n)]


def _all_weights(model) -> int:
    return sum(t.nbytes for t in model.gguf.tensors.values() if t.name != "token_embd.weight")


def _prefill(model, ids: list[int]) -> float:
    cache = model.engine.new_cache(len(ids) + 1)
    began = perf_counter()
    model.engine.forward(ids, cache)
    return perf_counter() - began


def _decode(model, ids: list[int]) -> float:
    cache = model.engine.new_cache(len(ids) + 1)
    began = perf_counter()
    for token in ids:
        model.engine.forward([token], cache)
    return perf_counter() - began
