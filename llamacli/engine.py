"""Runs the forward pass: token ids in, logits out.

In: token ids and a KVCache. Out: float32 logits. A prompt goes through one layer after the other, its tokens grouped by expert,
in batches that end at chunk edges; between the first and the last layer of a token no Python runs, unless experts must be
fetched. model.py says which steps there are. Knows nothing of text, sampling or terminals.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import numpy as np

from llamacli.cpu.experts import Slots, Traffic
from llamacli.cpu.kernels.jit.features import default_threads
from llamacli.cpu.kernels.jit.loader import chosen_target
from llamacli.cpu.kernels.ops.matmul import Matrix
from llamacli.cpu.kernels.runtime.faults import Guard
from llamacli.cpu.kernels.runtime.pool import Pool, Program
from llamacli.cpu.kvcache import KVCache
from llamacli.cpu.program import ALL_LOGITS_BATCH, Inputs, Steps
from llamacli.cpu.weights import Experts, bind, has_kernels, in_map, needed
from llamacli.errors import MemoryLimitError, ModelFileError, PromptError, UnsupportedModelError
from llamacli.files.gguf import GGUF, Tensor
from llamacli.files.pages import drop_pages, on_large_pages, populate, random_access
from llamacli.llama4.config import Config
from llamacli.llama4.tensors import Role, Spec
from llamacli.plan.machine import memory_short

MAX_BATCH = 2048  # tokens that go through a layer together: an expert's bytes are read once for all of them
LOOK_EVERY = 64  # tokens of an answer, after which memory is looked at: its limits, and what need not be held
SURE = 0.08  # of the scores' range the best must be ahead of the next: then more than nine guesses in ten are right
INTERRUPTIBLE = 16  # from this many tokens on, Python looks up between layers, so that Ctrl-C is heard


class Engine:
    """A bound model, its threads and its buffers. One caller at a time."""

    def __init__(self, gguf: GGUF, config: Config, threads: int | None = None, slots: int = 0, max_batch: int = MAX_BATCH):
        """`slots`: how many routed experts of all layers are kept in memory, the others being read when they are needed; 0: all
        are used where the file is mapped. `max_batch`: tokens that go through a layer together.
        """
        lanes = chosen_target().lanes
        if config.head_dim % lanes:
            raise UnsupportedModelError(
                f"{gguf.path}: expected a head size that is a multiple of {lanes}, found {config.head_dim}"
            )
        self.config, specs = config, needed(gguf, config)
        self._guard, self._paths = Guard(gguf.maps), gguf.paths
        self.threads = threads or default_threads()
        self._pool = Pool(self.threads)
        self._choices = config.n_experts_used if any(spec.role is Role.EXPERTS for spec in specs.values()) else 0
        self._max_batch = max(INTERRUPTIBLE, max_batch // max(1, self._choices))
        self._looked_up: Matrix | None = None  # the embedding, if single rows of it are read from the file
        self.slots: Slots | None = None
        resident: dict[str, int] = {}  # addresses of the tensors that were read into memory, by name
        if slots and self._choices:
            self.slots, resident = self._open_slots(gguf, specs, slots)
        self.weights = bind(gguf, config, lambda tensor: resident.get(tensor.name) or in_map(tensor))
        self.weights.notices.extend(self.slots.notices if self.slots else ())
        embedding = self.weights.token_embd
        if self.slots and embedding.name not in resident and has_kernels(gguf.tensors[embedding.name]):
            random_access(embedding.address, embedding.nbytes)
            self._looked_up = embedding
        self._watched: dict[tuple[str, ...], Inputs] | None = None
        # Called after each batch: its first position; its experts, int64 [n_layers, n_tokens * n_experts_used], a view.
        self.follow_routing: Callable[[int, np.ndarray], None] | None = None
        # Called after each batch of `forward`: the tokens evaluated so far, and all of that call.
        self.follow_progress: Callable[[int, int], None] | None = None
        self._steps: Steps | None = None
        self._reserve(INTERRUPTIBLE)
        if not self.slots:
            on_large_pages(gguf.maps)
            populate((m.address, m.nbytes) for m in self._always())

    def _open_slots(self, gguf: GGUF, specs: dict[str, Spec], n_slots: int) -> tuple[Slots, dict[str, int]]:
        """Slots for the routed experts, and the addresses of what every token uses, which is read into memory here."""
        routed: dict[int, tuple[Tensor, ...]] = {}
        resident = []
        for spec in specs.values():
            tensor = gguf.tensors[spec.name]
            if spec.role is Role.EXPERTS:
                if not has_kernels(tensor):
                    raise UnsupportedModelError(
                        f"{gguf.path}: expected experts in a type with kernels, found {tensor.type.name} in {spec.name}, which "
                        f"only runs if it fits into memory; quantize it again"
                    )
                routed[spec.layer] = (*routed.get(spec.layer, ()), tensor)
            elif len(spec.shape) == 2 and has_kernels(tensor) and (spec.role is not Role.EMBEDDING or self.config.tied):
                resident.append(tensor)
        slots = Slots(routed, self.config.n_experts, n_slots)
        return slots, slots.hold(resident)

    def new_cache(self, ctx: int) -> KVCache:
        """An empty cache for at most `ctx` tokens."""
        return KVCache(self.config, ctx)

    def watch(self) -> list[Inputs]:
        """From now on add up the squares of all inputs to the layers' products; a call more begins anew.

        The arrays returned grow with every `forward`. A routed expert sees its input times the router's score.
        """
        self._watched = {}
        self._steps = None
        self._reserve(INTERRUPTIBLE)
        return list(self._watched.values())

    def take_traffic(self) -> Traffic | None:
        """What was read since the last call, None if all experts are mapped."""
        return self.slots.take_traffic() if self.slots else None

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights read to decode one token: everything always used, and the routed experts' share."""
        w = self.weights
        return w.token_embd.row_bytes + w.output.nbytes + sum(m.nbytes * used for m, used in self._active())

    @property
    def products_per_token(self) -> int:
        """Multiply-adds of weights for one token, those of the output matrix apart: a prompt needs these once."""
        return sum(m.n_rows * m.n_cols * used for m, used in self._active())

    def _active(self) -> Iterator[tuple[Matrix, int]]:
        """The layers' matrices, each with how often one token goes through (one of) it."""
        for layer in self.weights.layers:
            yield from ((m, 1) for m in (layer.attn_q, layer.attn_k, layer.attn_v, layer.attn_output))
            if isinstance(layer.ffn, Experts):
                yield from ((m, 1) for m in (layer.ffn.gate_inp, *layer.ffn.shexp))
                yield from ((m, self.config.n_experts_used) for m in layer.ffn.exps)
            else:
                yield from ((m, 1) for m in layer.ffn)

    def _always(self) -> list[Matrix]:
        """Matrices that every token goes through as a whole."""
        return [*(m for m, _ in self._active() if m.n_groups == 1), self.weights.output]

    def forward(self, ids: Sequence[int], cache: KVCache, all_logits: bool = False, first: int = 0) -> np.ndarray:
        """Evaluate `ids` after what `cache` holds and remember them.

        Returns the last token's logits, float32 [n_vocab], a view that the next call overwrites; or with `all_logits` those of
        every token from ids[first] on, [len(ids) - first, n_vocab]. The cache moves on only when a batch is through, so an
        interrupted call leaves it sound.
        """
        ids = np.ascontiguousarray(ids, np.int64)
        if ids.ndim != 1 or not len(ids) or ids.min() < 0 or ids.max() >= self.config.n_vocab:
            raise PromptError(f"expected token ids from 0 to {self.config.n_vocab - 1}, at least one")
        if self.slots and (len(ids) > 1 or cache.pos % LOOK_EVERY == 0):
            self._make_room()
        cache.reserve(len(ids))
        result = np.empty((len(ids) - first, self.config.n_vocab), np.float32) if all_logits else None
        done = 0
        while done < len(ids):
            n = self._batch_size(cache.pos, len(ids) - done)
            self._run_layers(ids[done : done + n], cache)
            if self.follow_routing:
                self.follow_routing(cache.pos, self._steps.chosen[:, : n * self._choices])
            if all_logits:
                for row in range(max(0, first - done), n, ALL_LOGITS_BATCH):
                    count = min(ALL_LOGITS_BATCH, n - row)
                    at = done + row - first
                    result[at : at + count] = self._head(row, count)
            elif done + n == len(ids):
                result = self._head(n - 1, 1)[0]
            self._check()
            if self._looked_up and (n > 1 or cache.pos % LOOK_EVERY == 0):
                drop_pages(self._looked_up.address, self._looked_up.nbytes)
            cache.pos += n
            done += n
            if self.follow_progress:
                self.follow_progress(done, len(ids))
        return result

    def _make_room(self) -> None:
        """Give slots back if the limit of memory has been lowered."""
        short = memory_short()
        if short and (left := short - self.slots.shrink(short)) > 0:
            raise MemoryLimitError(
                f"{self._paths[0]}: expected the memory that was free when it was loaded, found {left / 1e9:.2f} GB more in "
                f"use than a limit now allows, by this program or others in its group; raise it, or start anew with a smaller "
                f"context"
            )

    def _check(self) -> None:
        """Throw away what was computed with a file that is no longer what it was."""
        if (part := self._guard.broken) is not None:
            raise ModelFileError(
                f"{self._paths[part]}: expected the file as it was opened, found it cut short or its disk failing; put it back "
                f"and load it again"
            )

    def profile(self, ids: Sequence[int], cache: KVCache) -> list[tuple[int | None, str, float]]:
        """`forward` with every step run by itself: (layer or None, operation, seconds) of each, in order.

        Several batches add up. The threads meet after every step, so the sum is a little more than `forward` takes.
        """
        pool, total = self._pool, Counter()

        def run(program: Program, first: int = 0, last: int | None = None) -> None:
            total.update(dict(enumerate(pool.run_timed(program, first, last), first)))

        self._pool = SimpleNamespace(run=run)
        try:
            self.forward(ids, cache)
        finally:
            self._pool = pool
        return [(*what, total[step]) for step, what in enumerate(self._steps.operations())]

    def _batch_size(self, pos: int, left: int) -> int:
        chunk = self.config.chunk_size
        return min(left, self._max_batch, chunk - pos % chunk if chunk else left)

    def _reserve(self, n: int) -> Steps:
        """Buffers for `n` tokens at a time, and the program over them."""
        if self._steps is None or self._steps.capacity < n:
            self._steps = None  # the old buffers make room for the new ones
            n = min(self._max_batch, 1 << (n - 1).bit_length())
            self._steps = Steps(self.weights, self.config, n, self.threads, self.slots, self._watched)
        return self._steps

    def _run_layers(self, ids: np.ndarray, cache: KVCache) -> None:
        n, steps = len(ids), self._reserve(len(ids))
        steps.set_tokens(ids, cache.pos, cache.table)
        if self.slots:
            self._run_visiting(n)
        elif n < INTERRUPTIBLE:
            self._pool.run(steps.program, 0, steps.cuts[-1])
        else:
            for first, last in zip([0, *steps.cuts], steps.cuts, strict=False):
                self._pool.run(steps.program, first, last)

    def _run_visiting(self, n: int) -> None:
        """All layers, with a visit to each layer's experts: they are read while the shared one is computed."""
        steps, done = self._steps, 0

        def run(first: int, last: int) -> None:
            if first < last:
                self._pool.run(steps.program, first, last)

        for i, at in steps.visits.items():
            try:
                run(done, at.guessed)
                # of several choices in a prompt, sums are made in the experts' order, not as they come
                if self._sure() if n == 1 else self._choices == 1:
                    self.slots.expect(i, steps.guess[:n].tolist())
                run(at.guessed, at.routed)
                visit = self.slots.visit(i, steps.chosen[i, : n * self._choices].tolist(), in_order=self._choices > 1)
                run(at.routed, at.shared)
                for expert in visit.gate_up:
                    steps.window[:] = expert, expert + 1
                    run(at.shared, at.multiplied)
                down = visit.down()
                run(at.multiplied, at.joined)
                for expert in down:
                    steps.window[:] = expert, expert + 1
                    run(at.joined, at.end)
            except BaseException:  # Ctrl-C too: nothing may be taken for read that is not
                self.slots.reset(i)
                raise
            done = at.end
        run(done, steps.cuts[-1])

    def _sure(self) -> bool:
        """Whether the guess for a single token is probably right; a wrong one costs more time than a right one saves."""
        scores = sorted(self._steps.router[0, : self.config.n_experts].tolist())
        return len(scores) == 1 or scores[-1] - scores[-2] > SURE * (scores[-1] - scores[0])

    def _head(self, row: int, count: int) -> np.ndarray:
        steps = self._steps
        steps.set_rows(row, count)
        self._pool.run(steps.program, steps.cuts[-1])
        return steps.logits[:count]
