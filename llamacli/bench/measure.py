"""Measures prefill and decode: tokens per second at several depths of context, the share of the machine's limits, a profile.

In: a loaded model, a list of `Case`s. Out: records ready for JSON. Work is counted, not sampled: bytes of weights, keys and
values that a token must read, multiply-adds of weights and attention. The limits (bandwidth, int8 arithmetic) are measured
afterwards in the same process.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import NamedTuple

import numpy as np

from llamacli.llama4.tensors import TOKEN_EMBD
from llamacli.plan.machine import resident_peak
from llamacli.positions import segment

COPIED = 512  # tokens that are evaluated where depths are filled with copies
PROFILED = 16  # tokens decoded for a profile; the time of a single one is too noisy
COMMAND = [sys.executable, "-c", "import sys; from llamacli.cli import main; sys.exit(main())"]


class Case(NamedTuple):
    """One thing to measure: `n` tokens after `depth` others, as one prompt or decoded one by one."""

    n: int
    depth: int
    decode: bool

    @property
    def name(self) -> str:
        """pp512, tg128, pp512@d8192 ..."""
        return f"{'tg' if self.decode else 'pp'}{self.n}" + (f"@d{self.depth}" if self.depth else "")


def plan(prompts: Sequence[int], generates: Sequence[int], depths: Sequence[int]) -> list[Case]:
    """All cases: every length at every depth; lengths of 0 are left out."""
    return [
        Case(n, depth, decode)
        for depth in depths
        for decode, lengths in ((False, prompts), (True, generates))
        for n in lengths
        if n
    ]


def speed(
    model,
    cases: Sequence[Case],
    repetitions: int,
    progress: Callable[[int, int, str], None] = lambda *_: None,
    peers: Sequence = (),
    profile: bool = False,
    records: list[dict] | None = None,
    fill: bool = False,
) -> list[dict]:
    """Run every case `repetitions` times after one run that is not counted; `peers` (peer.Peer) take turns with the model.

    `fill`: the tokens before a case are not evaluated; their places are filled with copies of the first tokens' keys and
    values.

    Returns a record for each case. They are added to `records`, if given, as cases are done: after an interrupt it holds the
    complete ones, without the limits of the machine. Fields of a record:
      test, n, depth             the case: its name, tokens, depth
      tokens_per_second          median; min, max, runs
      gbytes_per_second          bytes that must be read, over time. Decode: weights of the active experts, keys and values.
                                 Prefill: every weight once
      gops_per_second            two operations for each multiply-add
      attention_share            how many of those are attention's
      bandwidth_limit            what the same threads read at best
      compute_limit              what they multiply at best: bytes for weights, float32 for attention, by their shares
      share_of_limit             decode: of the bandwidth, prefill: of the arithmetic
      kv_bytes                   of keys and values in memory
      peak_memory_bytes          of this process up to then
      kv_read_bytes_per_token    only if keys and values were read from a file
      peers, ratio               only with peers: {name: {tokens_per_second, runs, peak_memory_bytes}}, the ratio to the fastest
      profile                    only with `profile`, see `_profile`
    """
    engine, most = model.engine, max(case.depth + case.n for case in cases)
    ids = tokens(model, most)
    records = [] if records is None else records
    done, total = 0, len(cases) * (repetitions + 1)
    cache, depth = None, None
    for case in cases:
        if case.depth != depth:
            depth, cache = case.depth, engine.new_cache(most)
            if fill:
                _fill(engine, cache, ids, depth)
        runners = {"llamacli": lambda case, cache=cache: _seconds(engine, cache, ids, case)}
        runners |= {peer.name: peer.seconds for peer in peers}
        rates = {name: [] for name in runners}
        for _ in range(repetitions + 1):
            progress(done, total, case.name)
            for name, seconds in runners.items():
                rates[name].append(case.n / seconds(case))
            done += 1
        record = _record(model, case, rates.pop("llamacli")[1:]) | {"kv_bytes": cache.nbytes}
        if (io := engine.take_io_stats()) and io.kv_bytes:
            record["kv_read_bytes_per_token"] = round(io.kv_bytes / case.n)
        if peers:
            others = {
                peer.name: {
                    "tokens_per_second": _rounded(median(rates[peer.name][1:])),
                    "runs": _rounded(rates[peer.name][1:]),
                    "peak_memory_bytes": peer.peak,
                }
                for peer in peers
            }
            best = max(other["tokens_per_second"] for other in others.values())
            record |= {"peers": others, "ratio": _rounded(record["tokens_per_second"] / best)}
        if profile:
            record["profile"] = _profile(engine, cache, ids, case)
        records.append(record)
    read, *multiplied = limits(engine.threads)  # last, or its buffer would count as the model's peak memory
    for case, record in zip(cases, records, strict=True):
        multiply = _together(*multiplied, record["attention_share"])
        share = record["gbytes_per_second"] / read if case.decode else record["gops_per_second"] / multiply
        record |= {"bandwidth_limit": _rounded(read), "compute_limit": _rounded(multiply), "share_of_limit": _rounded(share)}
    return records


def limits(threads: int) -> tuple[float, float, float]:
    """GB/s that `threads` threads read from memory, and Gop/s of their int8 products and of their float32 products."""
    from llamacli.bench.limits import buffer_megabytes, multiply_floats_gops, multiply_gops, read_gbps

    return read_gbps(threads, buffer_megabytes(threads)), multiply_gops(threads), multiply_floats_gops(threads)


def _together(bytes_: float, floats: float, share: float) -> float:
    """Operations a second if a share `share` of them runs at the rate `floats` and the rest at the rate `bytes_`."""
    return 1 / ((1 - share) / bytes_ + share / floats)


def startup(path: os.PathLike, threads: int | None, repetitions: int) -> dict:
    """Seconds of whole processes, `llamacli run -n 1` on the file, its pages and the compiled kernels being in memory."""
    args = ["run", "--raw", "--no-stdin", "-m", str(path), "-n", "1", "-c", "4096", "--temp", "0", "-p", "Hello"]
    args += ["-t", str(threads)] if threads else []
    runs = []
    for _ in range(repetitions + 1):
        began = perf_counter()
        subprocess.run([*COMMAND, *args], check=True, stdout=subprocess.DEVNULL)
        runs.append(perf_counter() - began)
    runs = _rounded(runs[1:])
    return {"test": "startup", "seconds": median(runs), "min": min(runs), "max": max(runs), "runs": runs}


def extrapolate(record: dict, held: int, layers: int) -> float:
    """Tokens per second of a model of `layers` layers, from the record (with profile) of one that has only `held` of them.

    The time inside the layers is scaled; the time outside (embedding, last norm, output) counts once.
    """
    profile = record["profile"]
    inside = sum(profile["layers"]) / sum(profile["operations"].values())
    return record["tokens_per_second"] / (1 - inside + inside * layers / held)


def tokens(model, n: int) -> list[int]:
    """`n` ids of a fixed random text without special tokens; random tokens use all experts, as a varied text does."""
    hidden = set(np.asarray(model.tokenizer.hidden_ids).tolist()) | set(model.tokenizer.stop_ids)
    usable = [i for i in range(model.config.n_vocab) if i not in hidden]
    return [int(i) for i in np.random.default_rng(0).choice(usable, n)]


def attended(config, case: Case) -> int:
    """Pairs of a token and a position that it attends to, summed over the layers."""
    at = np.arange(case.depth, case.depth + case.n)
    everything, chunk = int((at + 1).sum()), config.chunk_size
    in_chunk = int((at % chunk + 1).sum()) if chunk else everything
    return sum(in_chunk if config.uses_rope(i) else everything for i in range(config.n_layers))


def _record(model, case: Case, rates: list[float]) -> dict:
    config, engine, rate = model.config, model.engine, median(rates)
    pairs, last = attended(config, case), config.n_vocab * config.n_embd
    products = engine.products_per_token * case.n + last * (case.n if case.decode else 1)
    attention = 2 * config.n_heads * config.head_dim * pairs
    products += attention
    if case.decode:
        nbytes = engine.bytes_per_token * case.n + 2 * config.n_kv_heads * config.kv_row_bytes * pairs
    else:
        nbytes = sum(t.nbytes for t in model.gguf.tensors.values() if t.name != TOKEN_EMBD)
    return {
        "test": case.name,
        "n": case.n,
        "depth": case.depth,
        "tokens_per_second": _rounded(rate),
        "min": _rounded(min(rates)),
        "max": _rounded(max(rates)),
        "runs": _rounded(rates),
        "gbytes_per_second": _rounded(nbytes / case.n * rate / 1e9),
        "gops_per_second": _rounded(2 * products / case.n * rate / 1e9),
        "attention_share": _rounded(attention / products),
        "peak_memory_bytes": resident_peak(),
    }


def _rounded(value):
    return [round(v, 4) for v in value] if isinstance(value, list) else round(value, 4)


def _go_to(engine, cache, ids: list[int], depth: int) -> None:
    """Make `cache` hold exactly `ids[:depth]`. Truncation may go back to the start of a chunk; the rest is evaluated again."""
    reached = cache.truncate(depth)
    if reached < depth:
        engine.forward(ids[reached:depth], cache)


def _fill(engine, cache, ids: list[int], depth: int) -> None:
    """Make an empty `cache` hold `depth` positions: those of the first tokens, and copies of them; what is left of a segment is
    evaluated.
    """
    end = depth - depth % (segment(engine.config) or 1)
    if n := min(COPIED, engine.config.chunk_size or COPIED, end):  # a chunked layer holds no more than a chunk of them
        engine.forward(ids[:n], cache)
        _copy(engine, cache, n, end)
    _go_to(engine, cache, ids, depth)


def _copy(engine, cache, n: int, depth: int) -> None:
    """Repeat the `n` positions that a cache holds until it holds `depth`."""
    first = {layer: cache.export(layer, 0, n) for layer in range(engine.config.n_layers)}
    cache.reserve(depth - n)
    chunk = engine.config.chunk_size
    for layer, rows in first.items():
        chunked = chunk and engine.config.uses_rope(layer)
        at = max(n, (depth - 1) // chunk * chunk) if chunked else n
        while at < depth:
            end = min(at + n, depth, (at // chunk + 1) * chunk if chunked else depth)
            cache.restore(layer, at, *(side[:, : end - at] for side in rows))
            at = end
    cache.pos = depth


def _seconds(engine, cache, ids: list[int], case: Case) -> float:
    _go_to(engine, cache, ids, case.depth)
    following = ids[case.depth : case.depth + case.n]
    engine.take_io_stats()  # what came before does not count
    began = perf_counter()
    for part in [[token] for token in following] if case.decode else [following]:
        engine.forward(part, cache)
    return perf_counter() - began


def _profile(engine, cache, ids: list[int], case: Case) -> dict:
    """Seconds of one prompt or of one decoded token: {"operations": {name: seconds}, "layers": [seconds, ...]}.

    Each step is timed with the barrier after it. The fused run has fewer barriers, so the sum is a little more than its time.
    """
    _go_to(engine, cache, ids, case.depth)
    following = ids[case.depth : case.depth + min(case.n, PROFILED if case.decode else case.n)]
    operations, layers = {}, {}
    for part in [[token] for token in following] if case.decode else [following]:
        for layer, operation, seconds in engine.profile(part, cache):
            operations[operation] = operations.get(operation, 0.0) + seconds
            if layer is not None:
                layers[layer] = layers.get(layer, 0.0) + seconds
    n = len(following) if case.decode else 1
    return {
        "operations": {name: round(s / n, 9) for name, s in sorted(operations.items(), key=lambda item: -item[1])},
        "layers": [round(s / n, 9) for s in layers.values()],
    }
