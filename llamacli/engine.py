"""The engine: a row of stages that turns tokens into logits.

In: token ids, or rows that stand in for embeddings, and a cache. Out: float32 logits. A prompt goes through in batches that end
at chunk edges; within a batch, layer after layer, tokens are grouped by expert, so that an expert's bytes are read once.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from llamacli.caches import Cache
from llamacli.cpu import buffers
from llamacli.cpu.buffers import MAX_BATCH
from llamacli.cpu.experts import slots_per_layer
from llamacli.cpu.kernels import sources_digest
from llamacli.cpu.kernels.cores import default_threads
from llamacli.cpu.kernels.jit.loader import chosen_target
from llamacli.cpu.kernels.ops import matmul
from llamacli.cpu.kvfile import KVFile
from llamacli.cpu.operations import Inputs
from llamacli.cpu.stage import CHECK_EVERY, cpu_stages
from llamacli.device import IoStats, Run, Stage, Tokens
from llamacli.errors import MemoryLimitError, PromptError, UsageError
from llamacli.files.gguf import GGUF
from llamacli.llama4.config import Config
from llamacli.plan.machine import memory_short
from llamacli.positions import segment
from llamacli.prompt import FeatureRow

PARTS = 4  # parts of a batch on a cluster: of equal size, they pass from node to node; results have the same bits as without
_engines: weakref.WeakSet = weakref.WeakSet()


def _after_fork() -> None:
    """In a forked child the parent's threads do not exist, but one may have held a lock or been inside a call."""
    for engine in _engines:
        engine._lock = threading.RLock()
        for stage in engine.stages:
            stage.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Engine:
    """A bound model as a row of stages. Threads may share it: calls wait for each other."""

    def __init__(
        self,
        gguf: GGUF,
        config: Config,
        threads: int | None = None,
        slots: int = 0,
        max_batch: int = MAX_BATCH,
        cuts: Iterable[int] = (),
        gpu_layers: int = 0,
        kv_file: KVFile | None = None,
        cluster: Stage | None = None,
    ):
        """`slots`: how many routed experts of all layers are kept in memory, the others being read when they are needed; 0: all
        are used where the file is mapped. `max_batch`: pairs of a token and an expert that go through a layer together. `cuts`:
        layers at which another stage begins; 0 separates the embedding from the layers, n_layers the head. `gpu_layers`: the
        number of last layers that run on MLX, with the head; the others and the embedding run on the CPU. Slots hold experts of
        the CPU's layers, or of MLX's if all layers run there. `kv_file`: where caches keep keys and values that memory does not
        hold; None: all are in memory. `cluster`: a stage of all layers, which runs them elsewhere.
        """
        self.config, self.threads, self.gpu_layers = config, threads or default_threads(), gpu_layers
        self._path, self._closed, self._interrupted = gguf.path, False, False
        self._most, self._cluster = buffers.tokens(config, max_batch), cluster
        # the batch size, in tokens, from which results do not depend on it: all products use panels
        mixture = any(map(config.is_moe, range(config.n_layers)))
        all_groups = -(-matmul.FEW * config.n_experts // max(1, config.n_experts_used)) if mixture else 0
        self._steady = max(buffers.MIN_BATCH, matmul.few_tokens(), all_groups)
        if gpu_layers and config.kv_type != "F16":
            kind = config.kv_type.lower()
            raise UsageError(f"--kv: expected f16 with layers on a GPU, found {kind}; leave it out or use --device cpu")
        if gpu_layers and kv_file:
            raise UsageError("--kv-file: expected all layers on the CPU with it, found some on a GPU; leave one of the two out")
        on_cpu = config.n_layers - gpu_layers if gpu_layers else None
        here = () if cluster else (gguf, config, self.threads, slots, self._max_batch, sorted(set(cuts)), on_cpu, kv_file)
        self.stages: list[Stage] = [*cpu_stages(*here)] if here else [cluster]
        if gpu_layers:
            from llamacli.mlx.stage import MlxStage

            routed = [i for i in range(config.n_layers) if config.is_moe(i)]
            own = dict(zip(routed, slots_per_layer(slots, len(routed)), strict=True)) if slots and routed and not on_cpu else {}
            self.stages.append(MlxStage(gguf, config, range(on_cpu, config.n_layers), slots=own))
        # Whether experts are read from the file while it computes.
        self.fetches = (slots > 0 or getattr(cluster, "fetches", False)) and mixture
        self._parts = PARTS if cluster and not self.fetches else 1
        self._lock = threading.RLock()
        _engines.add(self)
        # Called after each batch: its first position; its experts, int64 [n_layers, n_tokens * n_experts_used], a view.
        self.follow_routing: Callable[[int, np.ndarray], None] | None = None
        # Called when `forward` begins, now and then within a batch and after it: the tokens evaluated so far, where those of a
        # batch count by the share of the layers that is done; and all of that call.
        self.follow_progress: Callable[[int, int], None] | None = None

    def close(self) -> None:
        """Give back threads and memory; any later call is a UsageError."""
        with self._lock:
            self._closed = True
            for stage in self.stages:
                stage.close()

    def interrupt(self) -> None:
        """From another thread: have a `forward` that is under way end soon, by a KeyboardInterrupt. The cache stays sound.

        The main thread handles no signal while it is in compiled code, so the signal watcher calls this.
        """
        self._interrupted = True
        for stage in self.stages:
            stage.interrupt()

    def new_cache(self, ctx: int) -> Cache:
        """An empty cache for at most `ctx` tokens."""
        self._check_open()
        return Cache([stage.new_cache(ctx) for stage in self.stages], ctx)

    def watch(self) -> list[Inputs]:
        """Start to sum the squares of all inputs to the layers' products; another call starts again (CpuStage.watch)."""
        with self._lock:
            self._check_open()
            return [inputs for stage in self.stages for inputs in stage.watch()]

    def take_io_stats(self) -> IoStats | None:
        """What was read since the last call, None if all experts are mapped, or if a call is under way in another thread."""
        if not self._lock.acquire(blocking=False):  # a forgotten answer may end in a thread that this call waits for
            return None
        try:
            found = [io for stage in self.stages if (io := stage.take_io_stats()) is not None]
        finally:
            self._lock.release()
        return sum(found[1:], start=found[0]) if found else None

    @property
    def _max_batch(self) -> int:
        """The most tokens of a batch. On a cluster, whose nodes may change, at most what every node has planned memory for."""
        return min(self._most, self._cluster.most) if self._cluster else self._most

    @property
    def notices(self) -> list[str]:
        """What a user should know about this file and how it is read."""
        return list(dict.fromkeys(notice for stage in self.stages for notice in stage.notices))

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights read to decode one token: everything always used, and the routed experts' share."""
        return sum(stage.bytes_per_token for stage in self.stages)

    @property
    def products_per_token(self) -> int:
        """Multiply-adds of weights for one token, without the output matrix: a prompt needs that one only once."""
        return sum(stage.products_per_token for stage in self.stages)

    # A token's keys, values and logits have the same bits in all batches of at least `_steady` tokens; in smaller ones kernels
    # add in another order. So what is left of a prompt can be evaluated as in a whole one if its batches end where those do.

    @property
    def arithmetic(self) -> str:
        """A text that names everything except the model that changes the last bits of keys and values."""
        kernels = sources_digest(Path(matmul.__file__).parents[1])
        keys = f"{self.config.kv_type} {segment(self.config)}"
        return f"{kernels} {chosen_target().name} {keys} {min(self._steady, self._max_batch)} {self.gpu_layers}"

    def batch_of(self, pos: int) -> range:
        """Positions of the batch that contains `pos` when a long prompt is evaluated from its start."""
        chunk = self.config.chunk_size
        at = pos % chunk if chunk else pos
        start = pos - at % self._max_batch
        return range(start, start + self._batch_size(start, self._max_batch))

    def may_begin(self, pos: int, n: int) -> bool:
        """Whether a prompt of `n` tokens has the same bits evaluated from `pos` on as evaluated from its start."""
        batch = self.batch_of(pos)
        return pos == batch.start or min(batch.stop, n) - pos >= self._steady

    def steady_end(self, n: int) -> int:
        """How many of a prompt's `n` positions have the same bits in every longer prompt."""
        batch = self.batch_of(n)
        return n if n == batch.start or n - batch.start >= self._steady else batch.start

    def forward(self, ids: Sequence, cache: Cache, all_logits: bool = False, first: int = 0, alone: bool = False) -> np.ndarray:
        """Evaluate tokens after what `cache` holds and remember them. A token is an id or a prompt.FeatureRow.

        Returns the last token's logits, float32 [n_vocab], or with `all_logits` those of every token from ids[first] on,
        [len(ids) - first, n_vocab]. The cache moves on only when a batch is through, so it is valid after an interrupted call.
        A cache with segments (positions.py) may need `truncate` before the next call, which raises UsageError otherwise.
        `alone`: each token's result has the bits of a call of its own; for a few tokens, on the CPU only.
        """
        tokens = self._tokens(ids)
        with self._calling(alone):
            return self._forward(tokens, cache, all_logits, first)

    @contextmanager
    def _calling(self, alone: bool = False) -> Iterator[None]:
        """Allow one call at a time; discard the pending work of a call that fails."""
        with self._lock:
            self._check_open()
            for stage in self.stages:
                stage.alone = alone
            try:
                yield
            except BaseException:
                for stage in self.stages:
                    stage.abandon()
                raise

    def forward_each(self, ids: Sequence[Sequence], caches: Sequence[Cache]) -> np.ndarray:
        """`forward` for several sequences at once, which share the reading of weights: ids[i] after what caches[i] holds.

        Returns the last token's logits of each, float32 [n_sequences, n_vocab]. One token each of at most `alike` sequences has
        the bits of each alone; in larger batches products add in the order of a prompt's.
        """
        if len(ids) == 1:
            return self.forward(ids[0], caches[0])[None]
        return self.begin_each(ids, caches)()

    def begin_each(self, ids: Sequence[Sequence], caches: Sequence[Cache]) -> Callable[[], np.ndarray]:
        """Begin a `forward_each`; returns a function that waits for the logits.

        Up to `depth` such calls may be under way at a time, each with its own caches. The function raises Abandoned if another
        call failed meanwhile.
        """
        tokens = [self._tokens(some) for some in ids]
        with self._calling():
            finish = self._begin_each(tokens, caches)

        def wait() -> np.ndarray:
            with self._calling():
                return finish()

        return wait

    @property
    def alike(self) -> int:
        """How many sequences, one token each, can be evaluated together with the bits of separate calls."""
        return min(stage.alike for stage in self.stages)

    @property
    def depth(self) -> int:
        """How many calls of `begin_each` keep all stages busy: more than one if the stages are on several machines."""
        return getattr(self.stages[0], "depth", 1)

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("the model is closed: load it again")

    def _tokens(self, ids: Sequence) -> Tokens:
        if len(ids) == 1 and type(ids[0]) is int and 0 <= ids[0] < self.config.n_vocab:
            return Tokens(ids, {})
        rows = {}
        if not isinstance(ids, np.ndarray):
            rows = {at: token.row for at, token in enumerate(ids) if isinstance(token, FeatureRow)}
        ids = np.ascontiguousarray(ids, np.int64)
        if ids.ndim != 1 or not len(ids) or ids.min() < 0 or ids.max() >= self.config.n_vocab:
            raise PromptError(f"expected token ids from 0 to {self.config.n_vocab - 1}, at least one")
        if any(np.shape(row) != (self.config.n_embd,) for row in rows.values()):
            raise PromptError(f"expected rows of {self.config.n_embd} features in place of embeddings")
        return Tokens(ids, rows)

    def _forward(self, tokens: Tokens, cache: Cache, all_logits: bool, first: int) -> np.ndarray:
        ids, done, batch, parts, result = tokens.ids, 0, 0, 0, None
        self._begin([cache], len(ids) > 1 or cache.pos % CHECK_EVERY == 0)
        cache.reserve(len(ids))
        if self.follow_progress:
            self.follow_progress(0, len(ids))
        while done < len(ids):
            if not batch:
                batch = self._batch_size(cache.pos, len(ids) - done)
                parts = max(1, min(self._parts, batch // self._steady))
            n = batch // parts
            batch, parts = batch - n, parts - 1
            if self.follow_progress:
                self._follow_batch(done, n, len(ids))
            x = tokens
            if n < len(ids):
                rows = {at - done: row for at, row in tokens.rows.items() if done <= at < done + n}
                x = Tokens(ids[done : done + n], rows)
            x = self._run_stages(x, [(cache, n)])
            if all_logits and done + n > first:
                row = max(0, first - done)
                found = self.stages[-1].logits(x, row)
                if len(found) == len(ids) - first:  # all from one batch: not copied, since they may take hundreds of megabytes
                    result = found
                else:
                    result = np.empty((len(ids) - first, self.config.n_vocab), np.float32) if result is None else result
                    result[done + row - first : done + n - first] = found
            elif done + n == len(ids):
                result = self.stages[-1].logits(x, n - 1)[0]
            if self._interrupted:
                raise KeyboardInterrupt
            cache.pos += n
            done += n
            if self.follow_progress:
                self.follow_progress(done, len(ids))
        return result

    def _begin_each(self, tokens: Sequence[Tokens], caches: Sequence[Cache]) -> Callable[[], np.ndarray]:
        found: np.ndarray | None = None
        begun: list[tuple] = []  # the stream after a batch, its runs that end a sequence, these sequences, the runs' last rows

        def finish() -> np.ndarray:
            nonlocal found
            for x, ending, sequences, ends in begun:
                if hasattr(x, "ends"):  # a cluster sends only these
                    x = x.ends()[ending]
                elif len(ending) < len(x):
                    x = np.array(x)[ends[ending]]
                rows = self.stages[-1].logits(x)
                if len(sequences) == len(tokens):  # all from one batch, as a rule: not copied
                    found = rows
                else:
                    found = np.empty((len(tokens), self.config.n_vocab), np.float32) if found is None else found
                    found[sequences] = rows
            begun.clear()
            return found

        self._begin(caches, True)
        for some, cache in zip(tokens, caches, strict=True):
            cache.reserve(len(some.ids))
        done = [0] * len(tokens)
        while left := [i for i, some in enumerate(tokens) if done[i] < len(some.ids)]:
            ids, rows, runs, last = [], {}, [], {}  # last: sequences that end in this batch, by the number of their run
            for i in left:
                n = min(self._batch_size(caches[i].pos, len(tokens[i].ids) - done[i]), self._max_batch - len(ids))
                if n == 0:
                    break
                rows |= {len(ids) + at - done[i]: row for at, row in tokens[i].rows.items() if done[i] <= at < done[i] + n}
                ids.extend(tokens[i].ids[done[i] : done[i] + n])
                runs.append((caches[i], n))
                done[i] += n
                if done[i] == len(tokens[i].ids):
                    last[len(runs) - 1] = i
            x = self._run_stages(Tokens(np.array(ids, np.int64), rows), runs)
            if last:
                begun.append((x, list(last), list(last.values()), np.cumsum([n for _, n in runs]) - 1))
            if self.depth == 1:  # `x` lasts until the next call
                finish()
            if self._interrupted:
                raise KeyboardInterrupt
            for cache, n in runs:
                cache.pos += n
        return finish

    def _begin(self, caches: Sequence[Cache], make_room: bool) -> None:
        """Before a call: clear earlier interrupts."""
        self._interrupted = False
        for stage in self.stages:
            stage.resume()
            stage.follow = None
        for cache in caches:
            cache.agree()
        if make_room:
            self._make_room()

    def _run_stages(self, x: Tokens, runs: Sequence[tuple[Cache, int]]) -> np.ndarray:
        """The residual stream after all stages, for runs of the given numbers of tokens."""
        for k, stage in enumerate(self.stages):
            x = stage.forward(x, [Run(cache.parts[k], n) for cache, n in runs])
        if self.follow_routing:
            chosen = [stage.chosen(sum(n for _, n in runs)) for stage in self.stages if stage.layers]
            chosen, at = chosen[0] if len(chosen) == 1 else np.concatenate(chosen), 0
            for cache, n in runs:
                end = at + n * self.config.n_experts_used
                self.follow_routing(cache.pos, chosen[:, at:end])
                at = end
        return x

    def _follow_batch(self, done: int, n: int, total: int) -> None:
        """Have the stages report a batch of `n` tokens while it is under way; `done` of `total` come before it."""
        follow, before, layers = self.follow_progress, 0, max(1, self.config.n_layers)
        for stage in self.stages:

            def report(share: float, before: int = before, own: int = len(stage.layers)) -> None:
                follow(done + int(n * (before + share * own) / layers), total)

            stage.follow = report
            before += len(stage.layers)

    def shrink(self, nbytes: int) -> int:
        """Release slots of up to `nbytes` bytes; returns the bytes released."""
        given = 0
        with self._lock:
            for stage in self.stages:
                given += stage.shrink(max(0, nbytes - given))
        return given

    def _make_room(self) -> None:
        """Give slots back if the limit of memory has been lowered."""
        if not self.fetches or not (short := memory_short()):
            return
        if (short := short - self.shrink(short)) > 0:
            raise MemoryLimitError(
                f"{self._path}: expected the memory that was free when it was loaded, found {short / 1e9:.2f} GB more in "
                f"use than a limit now allows, by this program or others in its group; raise it, or start again with a "
                f"smaller context"
            )

    def profile(self, ids: Sequence[int], cache: Cache) -> list[tuple[int | None, str, float]]:
        """`forward` with every step run by itself: (layer or None, operation, seconds), in order of first use.

        The threads meet after every step, so the sum is a little more than `forward` takes.
        """
        with self._lock:
            total: Counter = Counter()
            for stage in self.stages:
                stage.timings = total
            try:
                self.forward(ids, cache)
            finally:
                for stage in self.stages:
                    stage.timings = None
            return [(*label, seconds) for label, seconds in total.items()]

    def _batch_size(self, pos: int, left: int) -> int:
        chunk = self.config.chunk_size
        return min(left, self._max_batch, chunk - pos % chunk if chunk else left)
