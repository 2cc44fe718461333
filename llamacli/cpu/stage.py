"""A stage on the CPU: some layers, and perhaps the embedding and the head, run by threads that stay in compiled code.

In: the residual stream or tokens, and caches. Out: the stream after the layers, or logits. A run of layers is one compiled
call, unless experts must be fetched or the batch is so long that Ctrl-C should be handled between two layers. Experts come from
the mapped file or, if there are slots, from memory that experts.py fills while the shared expert is computed.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from llamacli.cpu import buffers
from llamacli.cpu.buffers import LOGITS_BATCH, MAX_BATCH, MIN_BATCH, Buffers
from llamacli.cpu.experts import Slots, slots_per_layer
from llamacli.cpu.kernels.jit.loader import chosen_target
from llamacli.cpu.kernels.ops.attention import tokens_per_block
from llamacli.cpu.kernels.ops.elementwise import ALONE, BLOCKS, COUNT, ROW, N
from llamacli.cpu.kernels.ops.matmul import Matrix, few_tokens
from llamacli.cpu.kernels.runtime.faults import Guard
from llamacli.cpu.kernels.runtime.pool import Pool
from llamacli.cpu.kvcache import KVCache
from llamacli.cpu.kvfile import FileCache, KVFile, block_bytes, seeing_all
from llamacli.cpu.kvreads import BlockReader
from llamacli.cpu.operations import Inputs, Recorder
from llamacli.cpu.weights import Experts, bind, has_kernels, in_map
from llamacli.device import IoStats, Run, Tokens
from llamacli.errors import ModelFileError, UnsupportedModelError, UsageError
from llamacli.files.ggml import BY_NAME
from llamacli.files.gguf import GGUF, Tensor
from llamacli.files.pages import drop_pages, on_large_pages, populate, random_access
from llamacli.llama4.config import Config
from llamacli.llama4.tensors import Role, needed

CONFIDENT = 0.08  # the best score must lead the next by this share of the scores' range: then over 90 % of prefetches are right
CHECK_EVERY = 64  # decoded tokens after which pages of the embedding are dropped and the memory limit is checked


def cpu_stages(
    gguf: GGUF,
    config: Config,
    threads: int,
    n_slots: int,
    max_batch: int,
    cuts: Sequence[int] = (),
    n_layers: int | None = None,
    kv_file: KVFile | None = None,
) -> list["CpuStage"]:
    """A model as stages that share threads. `n_slots`: routed experts that these layers together cache; 0: all are mapped.

    `n_layers`: only the embedding and the first so many layers, without the head; None: the whole model. `cuts`: layers at
    which another stage begins; 0 parts the embedding from the layers, config.n_layers the head. Each stage that fetches experts
    has a ring of buffers, but `plan` counts only one ring; a stage without experts is mapped. `kv_file`: where caches keep what
    memory does not hold, None: nowhere. UnsupportedModelError if heads do not fill vectors, or experts are of a type without
    kernels.
    """
    lanes = chosen_target().lanes
    if config.head_dim % lanes:
        raise UnsupportedModelError(f"{gguf.path}: expected a head size that is a multiple of {lanes}, found {config.head_dim}")
    last = config.n_layers + 1 if n_layers is None else n_layers
    routed = [i for i in range(min(last, config.n_layers)) if config.is_moe(i)]
    share = dict(zip(routed, slots_per_layer(n_slots, len(routed)), strict=True)) if n_slots and routed else {}
    if config.head_dim % BY_NAME[config.kv_type].block:
        raise UnsupportedModelError(
            f"{gguf.path}: expected a head size that is a multiple of {BY_NAME[config.kv_type].block} for keys and values in "
            f"{config.kv_type}, found {config.head_dim}; use --kv f16"
        )
    pool, guard, found = Pool(threads), Guard(gguf.maps), []
    for first, end in zip([-1, *cuts], [*cuts, last], strict=True):
        layers = range(max(0, first), min(end, config.n_layers))
        ends = {"embeds": first < 0, "heads": end > config.n_layers}
        own = {i: share[i] for i in layers if i in share}
        found.append(CpuStage(gguf, config, layers, pool, guard, slots=own, most=max_batch, kv_file=kv_file, **ends))
    if not share:
        on_large_pages(gguf.maps)
    return found


def cpu_part(
    gguf: GGUF, config: Config, layers: range, threads: int, n_slots: int = 0, most: int = MAX_BATCH, ends: bool = False
) -> "CpuStage":
    """Some layers alone, for a model whose other layers are elsewhere; with `ends` the embedding and the head, too.

    `n_slots`, `most`: as `n_slots` and `max_batch` of `cpu_stages`.
    """
    routed = [i for i in layers if config.is_moe(i)]
    slots = dict(zip(routed, slots_per_layer(n_slots, len(routed)), strict=True)) if n_slots and routed else {}
    return CpuStage(gguf, config, layers, Pool(threads), Guard(gguf.maps), embeds=ends, heads=ends, slots=slots, most=most)


class CpuStage:
    """`layers` of a model (see device.Stage). Stages of one model share a pool and a guard; each has its own slots."""

    def __init__(
        self,
        gguf: GGUF,
        config: Config,
        layers: range,
        pool: Pool,
        guard: Guard,
        *,
        embeds: bool = True,
        heads: bool = True,
        slots: dict[int, int] | None = None,
        most: int = MAX_BATCH,
        kv_file: KVFile | None = None,
    ):
        """`embeds`, `heads`: whether the stage begins with the embedding, ends with the head. `guard`: over the file's maps.

        `slots`: for each layer with experts, how many of them it caches; the weights that every token uses are then read into
        memory here. None: all weights are used in the mapped file. `most`: tokens of a batch.
        """
        self.layers = layers
        self.alike = few_tokens() - 1
        self.alone = False  # whether each token's result is to have the bits that it has alone
        self.timings: Counter | None = None  # seconds by (layer, operation), if every step is to be timed by itself
        self.follow: Callable[[float], None] | None = None
        self._config, self._pool, self._guard, self._paths = config, pool, guard, gguf.paths
        self._embeds, self._heads, self._most = embeds, heads, most
        self._kv_file, self._seeing = kv_file, seeing_all(config, layers)
        self._reader = BlockReader(block_bytes(config, kv_file.block)) if kv_file and self._seeing else None
        self._reach = np.zeros(6, np.int64)  # attention's, over blocks of keys and values
        self._runs: list[tuple[Run, int, int]] = []  # of the batch: first and end of its blocks of tokens
        self.slots, resident = self._fetch(gguf, slots) if slots else (None, {})
        ends = {"embedding": embeds, "head": heads}
        self._weights = bind(gguf, config, lambda tensor: resident.get(tensor.name) or in_map(tensor), layers, **ends)
        self._lookup: Matrix | None = None  # the embedding, if it stays in the file and single rows of it are read
        embedding = self._weights.token_embd
        if slots and embeds and embedding.name not in resident and has_kernels(gguf.tensors[embedding.name]):
            self._lookup = embedding
            random_access(embedding.address, embedding.nbytes)
        self._stop = np.zeros(8, np.int64)  # not 0: the run is to end soon
        self._forked = False
        self._watched: dict[tuple[str, ...], Inputs] | None = None
        self._buffers: Buffers | None = None
        self._recorded: Recorder | None = None
        self._capacity = self._decoded = 0
        self._choices = config.n_experts_used if any(config.is_moe(i) for i in layers) else 0
        self._reserve(MIN_BATCH)
        used = list(self._used())
        row = self._weights.token_embd.row_bytes if embeds else 0
        self.notices = [*self._weights.notices, *(self.slots.notices if self.slots else ())]
        self.bytes_per_token = row + sum(m.nbytes * times for m, times in used)
        self.products_per_token = sum(m.n_rows * m.n_cols * times for m, times in used if m is not self._weights.output)
        if not slots:
            populate([(m.address, m.nbytes) for m, _ in used if m.n_groups == 1])
        self._check()  # norms were copied from the map

    def _fetch(self, gguf: GGUF, share: dict[int, int]) -> tuple[Slots, dict[str, int]]:
        """(slots for the routed experts, addresses of the weights that every token uses, which are read into memory)."""
        routed: dict[int, tuple[Tensor, ...]] = {}
        resident = []
        for spec in needed(gguf, self._config, self.layers, self._embeds, self._heads).values():
            tensor = gguf.tensors[spec.name]
            if spec.role is Role.EXPERTS:
                if not has_kernels(tensor):
                    raise UnsupportedModelError(
                        f"{gguf.path}: expected experts in a type with kernels, found {tensor.type.name} in {spec.name}, which "
                        f"only runs if it fits into memory; quantize it again"
                    )
                routed[spec.layer] = (*routed.get(spec.layer, ()), tensor)
            elif len(spec.shape) == 2 and has_kernels(tensor) and (spec.role is not Role.EMBEDDING or self._config.tied):
                resident.append(tensor)
        slots = Slots(routed, self._config.n_experts, share)
        return slots, slots.load_resident(resident)

    def _used(self) -> Iterator[tuple[Matrix, int]]:
        """The matrices of the layers and of the head, each with the number of its groups that one token uses."""
        for layer in self._weights.layers:
            yield from ((m, 1) for m in (layer.attn_q, layer.attn_k, layer.attn_v, layer.attn_output))
            if isinstance(layer.ffn, Experts):
                yield from ((m, 1) for m in (layer.ffn.gate_inp, *layer.ffn.shexp))
                yield from ((m, self._config.n_experts_used) for m in layer.ffn.exps)
            else:
                yield from ((m, 1) for m in layer.ffn)
        if self._heads:
            yield self._weights.output, 1

    def new_cache(self, ctx: int) -> KVCache:
        """An empty cache for at most `ctx` tokens."""
        if self._reader:
            return FileCache(self._config, ctx, self.layers, self._kv_file, self._most, self._reader.files)
        return KVCache(self._config, ctx, self.layers)

    def forward(self, x: Tokens | np.ndarray, runs: Sequence[Run]) -> np.ndarray:
        """The stream after the layers, float32 [n, n_embd]: a view that the next call overwrites.

        ModelFileError if the file was cut during the call, since the result is wrong then.
        """
        n = sum(run.n for run in runs)
        if self._forked and (self.slots or self._reader):
            raise UsageError("a forked process cannot read files, its reading threads are gone: load the model again")
        self._reserve(n)
        if self._embeds:
            self._look_up(x, n)
        else:
            self._place(x)
        if self.layers:
            self._set_runs(runs)
        self._set_rows(n, 0, n)
        if self._embeds or self.layers:
            try:
                if self._reader:
                    self._reader.start(runs, self._seeing)
                self._run_layers(n)
            except BaseException:  # Ctrl-C too: no read may still write to a buffer that is free
                if self._reader:
                    self._reader.stop()
                raise
            finally:
                self._runs = []  # do not keep caches alive that nobody else holds
        if n > 1 or not self._heads:  # for a single token `logits` follows, which checks the file as well
            self._check()
        if self._lookup is not None:
            self._decoded += n
            if n > 1 or self._decoded % CHECK_EVERY == 0:
                drop_pages(self._lookup.address, self._lookup.nbytes)
        self._stream = self._buffers["x"][:n, : self._config.n_embd]
        return self._stream

    def logits(self, x: np.ndarray, first: int = 0) -> np.ndarray:
        """Logits of the rows x[first:] of the stream, float32 [len(x) - first, n_vocab]."""
        self._reserve(len(x))
        self._place(x)
        total = len(x) - first
        found, parts = np.empty((total, self._config.n_vocab), np.float32), -(-total // LOGITS_BATCH)
        for part in range(parts):  # equal parts: kernels for few rows add in another order
            start, end = total * part // parts, total * (part + 1) // parts
            self._set_rows(len(x), first + start, end - start)
            self._run(self._head, len(self._recorded.program))
            found[start:end] = self._buffers["logits"][: end - start]
        self._check()
        return found

    def chosen(self, n: int) -> np.ndarray:
        """The experts that the last batch's `n` tokens chose, int64 [layers, n * n_experts_used], a view; 0 in dense layers."""
        if "chosen" not in self._buffers:
            return np.zeros((len(self.layers), n * self._config.n_experts_used), np.int64)
        return self._buffers["chosen"][:, : n * self._choices]

    def watch(self) -> list[Inputs]:
        """Start to sum up the squares of all inputs to the layers' products; another call starts from zero.

        The arrays returned grow with every batch. A routed expert sees its input times the router's score.
        """
        self._watched, self._capacity = {}, 0
        self._reserve(MIN_BATCH)
        return list(self._watched.values())

    def take_io_stats(self) -> IoStats | None:
        """What was read since the last call, None if all experts are mapped."""
        found = self.slots.take_io_stats() if self.slots else None
        if self._reader:
            nbytes, reading, stalled = self._reader.take_counts()
            keys = IoStats(kv_bytes=nbytes, reading_s=reading, stall_s=stalled)
            found = found + keys if found else keys
        return found

    def interrupt(self) -> None:
        """Make the call that runs in another thread raise KeyboardInterrupt, within one work item of a product."""
        self._stop[0] = 1

    def abandon(self) -> None:
        """Every call has waited for its result."""

    def resume(self) -> None:
        """Forget an interrupt."""
        self._stop[0] = 0

    def shrink(self, nbytes: int) -> int:
        """Release slots of up to `nbytes` bytes; returns the bytes released."""
        return self.slots.shrink(nbytes) if self.slots else 0

    def close(self) -> None:
        """Release threads, buffers, slots and weights. Stages of one model share the pool, so the engine closes all of them."""
        self._pool.close()
        if self.slots:
            self.slots.close()
        if self._reader:
            self._reader.close()
        self._recorded = self._buffers = self._stream = self._state = self._dense = self._weights = self._watched = (
            self.slots
        ) = None
        self._given, self._capacity = {}, 0

    def after_fork(self) -> None:
        """In a forked child: drop state that another thread of the parent may have left half written."""
        self._recorded = self._buffers = self._stream = None
        self._capacity, self._forked = 0, True

    # input

    def _reserve(self, n: int) -> None:
        """Buffers for `n` tokens at a time, and the program over them."""
        if n <= self._capacity:
            return
        self._capacity = 0  # first: an interrupt from here on has the next call make all of them
        self._recorded = self._buffers = self._stream = None  # the old buffers make room for the new ones
        capacity = max(n, min(self._most, 1 << (n - 1).bit_length()))
        kind = {"embeds": self._embeds, "heads": self._heads}
        fetched = {"slots": self.slots is not None, "kv_file": self._reader is not None}
        self._buffers = Buffers(buffers.shapes(self._config, self.layers, capacity, self._pool.threads, **fetched, **kind))
        self._state, self._dense = self._buffers["state"], self._buffers["dense"]
        self._dense[2:] = np.arange(capacity)
        self._recorded = Recorder(
            self._weights,
            self._config,
            self.layers,
            self._buffers,
            self._stop.ctypes.data,
            self.slots,
            self._watched,
            self._reach.ctypes.data if self._reader else 0,
        )
        self._recorded.compose(**kind)
        self._layer_ends = self._recorded.layer_ends or [self._recorded.embedded]
        self._head = self._layer_ends[-1]  # the step after the last layer's
        self._capacity = capacity

    def _set_rows(self, n: int, row: int, count: int) -> None:
        """Set the number of tokens in the batch, and the rows that norms work on."""
        state = self._state
        state[N], state[ROW], state[COUNT], self._dense[1] = n, row, count, count
        state[ALONE] = self.alone

    def _look_up(self, x: Tokens, n: int) -> None:
        """Set ids, and the addresses of rows that stand in for embeddings."""
        self._buffers["ids"][:n] = x.ids
        rows = self._buffers["rows"]
        rows[:n] = 0
        if not x.rows:
            return
        self._given = {at: np.ascontiguousarray(row, np.float32) for at, row in x.rows.items()}  # kept until the next batch
        for at, row in self._given.items():
            rows[at] = row.ctypes.data

    def _place(self, x: np.ndarray) -> None:
        """Copy the stream into its buffer, unless it is this stage's own result and there already."""
        if x is not self._stream:
            self._buffers["x"][: len(x), : self._config.n_embd] = x

    def _set_runs(self, runs: Sequence[Run]) -> None:
        """Set each token's position and cache, and the blocks of neighbouring tokens that attention works on."""
        b, first, blocks, self._runs = self._buffers, 0, [], []
        most = tokens_per_block(self._config.n_heads, self._config.n_kv_heads)
        for run in runs:
            pos, end, before = run.cache.pos, first + run.n, len(blocks)
            b["positions"][first:end] = range(pos, pos + run.n)
            b["tables"][first:end] = run.cache.tables(run.n)
            size = run.cache.segment or run.n
            inner = range(first + size - pos % size, end, size) if run.cache.segment else ()
            for start, stop in pairwise((first, *inner, end)):
                parts = -(-(stop - start) // most)
                edges = [start + (stop - start) * i // parts for i in range(parts + 1)]
                blocks += [(a, z - a, first, end) for a, z in pairwise(edges)]
            self._runs.append((run, before, len(blocks)))
            first = end
        b["blocks"][: len(blocks)] = blocks
        self._state[BLOCKS] = len(blocks)

    # running

    def _run(self, first: int, last: int) -> None:
        for step, layer in self._recorded.over_blocks.items():
            if first <= step < last:
                self._run_steps(first, step)
                self._attend_blocks(step, layer)
                first = step + 1
        self._run_steps(first, last)

    def _attend_blocks(self, step: int, layer: int) -> None:
        """Run a step of attention as often as it takes to pass over all blocks, whatever their number in memory."""
        for run, first, end in self._runs:
            for start, stop in self._reader.visits(run, layer):
                self._reach[:] = first, end, start, stop, run.cache.block, run.cache.table_of(layer)
                self._run_steps(step, step + 1)

    def _run_steps(self, first: int, last: int) -> None:
        program = self._recorded.program
        if first == last:
            return
        if self.timings is None:
            self._pool.run(program, first, last)
        else:
            for label, seconds in zip(program.labels[first:last], self._pool.run_timed(program, first, last), strict=True):
                self.timings[label] += seconds
        if self._stop[0]:
            raise KeyboardInterrupt

    def _run_layers(self, n: int) -> None:
        ends = self._layer_ends
        if self._recorded.expert_cuts:
            self._run_fetching(n)
        elif n < MIN_BATCH:
            self._run(0, ends[-1])
        else:
            for layer, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
                self._run(first, last)
                self._report(layer + 1)

    def _run_fetching(self, n: int) -> None:
        """Run all layers; each layer's missing experts are read while its shared expert is computed."""
        done, b = 0, self._buffers
        for i, at in self._recorded.expert_cuts.items():
            try:
                self._run(done, at.guessed)
                # with several experts per token, a prompt adds them up in their order, so they are not fetched as they come
                if self._confident() if n == 1 else self._choices == 1:
                    self.slots.prefetch(i, b["guess"][:n].tolist())
                self._run(at.guessed, at.routed)
                chosen = b["chosen"][i - self.layers.start, : n * self._choices].tolist()
                fetch = self.slots.fetch(i, chosen, in_order=self._choices > 1)
                self._run(at.routed, at.shared)
                for visit, expert in enumerate(fetch.gate_up):
                    b["window"][:] = expert, expert + 1
                    self._run(at.shared, at.multiplied)
                    self._report(i - self.layers.start + (visit + 1) / (self._config.n_experts + 1))
                down = fetch.down()
                self._run(at.multiplied, at.joined)
                for expert in down:
                    b["window"][:] = expert, expert + 1
                    self._run(at.joined, at.end)
            except BaseException:  # Ctrl-C too: no half-read expert may count as present
                self.slots.reset(i)
                raise
            done = at.end
            self._report(i - self.layers.start + 1)
        self._run(done, self._layer_ends[-1])

    def _report(self, layers: float) -> None:
        """Call `follow` with the share of the layers that is done."""
        if self.follow:
            self.follow(layers / max(1, len(self.layers)))

    def _confident(self) -> bool:
        """Whether a prefetch for a single token is worth it: a wrong one costs more time than a right one saves."""
        scores = sorted(self._buffers["router"][0, : self._config.n_experts].tolist())
        return len(scores) == 1 or scores[-1] - scores[-2] > CONFIDENT * (scores[-1] - scores[0])

    def _check(self) -> None:
        """ModelFileError if the mapped file changed: the result is wrong."""
        if (part := self._guard.broken) is not None:
            raise ModelFileError(
                f"{self._paths[part]}: expected the file as it was opened, found it cut short or its disk failing; put it back "
                f"and load it again"
            )
