"""Llama 4's forward pass: the order of operations, written once as a program of compiled steps and run for every batch of
tokens.

In: token ids and a KVCache. Out: float32 logits. `Engine` lays out the buffers, `_layer` reads like the model's definition,
and the thread pool runs the resulting table, so that between the first and the last layer of a token no Python runs at all. A
prompt goes through one layer after the other, its tokens grouped by expert, in batches that end at chunk edges. Knows nothing
of text, sampling or terminals.

Sources: Meta's and Hugging Face's Llama 4 (router on raw logits, sigmoid score on the expert's input, interleaved rotary
pairs, QK norm after rotation, attention temperature where there is no rotation). down(silu(s g) * (s u)) equals feeding s x to
the expert, so one quantized x serves router, shared and routed experts.
"""

from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from llamacli.config import Config
from llamacli.errors import ModelFileError, PromptError, UnsupportedModelError
from llamacli.experts import DOWN, GATE, UP, Slots, Traffic
from llamacli.gguf import GGUF
from llamacli.kernels import attention, cpu, elementwise, matmul
from llamacli.kernels.dots import ACT_BYTES
from llamacli.kernels.elementwise import CACHE, COUNT, POS, ROW, N
from llamacli.kernels.faults import Guard
from llamacli.kernels.jit import TARGET, load
from llamacli.kernels.matmul import Matrix, Rows
from llamacli.kernels.pool import Pool, Program
from llamacli.kernels.vectors import SYMBOLS, build
from llamacli.kvcache import KVCache
from llamacli.pages import populate, random_access
from llamacli.weights import Dense, Experts, bind

MAX_BATCH = 2048  # tokens that go through a layer together: an expert's bytes are read once for all of them
ALL_LOGITS_BATCH = 64  # rows of logits made at a time, so that a long prompt does not ask for gigabytes
STEPS_BEFORE = 2  # steps of a program before the first layer's
INTERRUPTIBLE = 16  # from this many tokens on, Python looks up between layers, so that Ctrl-C is heard


class Inputs(NamedTuple):
    """What has flowed into some products that share their input: per matrix, which is per expert, and per column."""

    names: tuple[str, ...]  # the tensors that these inputs were multiplied with
    square_sums: np.ndarray  # float64 [n_matrices, n_cols]
    counts: np.ndarray  # int64 [n_matrices], inputs that each has seen


class Engine:
    """A bound model, its threads and its buffers. One caller at a time."""

    def __init__(self, gguf: GGUF, config: Config, threads: int | None = None, slots: int = 0, max_batch: int = MAX_BATCH):
        """`slots`: how many routed experts of a layer are kept in memory, the others being read when they are needed; 0: all
        are used where the file is mapped. `max_batch`: tokens that go through a layer together.
        """
        if config.head_dim % TARGET.lanes:
            raise UnsupportedModelError(
                f"{gguf.path}: expected a head size that is a multiple of {TARGET.lanes}, found {config.head_dim}"
            )
        self.config, self.weights = config, bind(gguf, config)
        self._guard, self._paths = Guard(gguf.maps), gguf.paths
        self.threads = threads or cpu.default_threads()
        self._pool = Pool(self.threads)
        self._leaves = load(f"vectors-{config.head_dim}", build(config.head_dim), SYMBOLS)
        self._state = np.zeros(8, np.int64)
        c = config
        self._floats = np.array(
            [1.0, c.rms_eps, c.head_dim**-0.5, c.temperature_length or 1.0, c.temperature_scale], np.float32
        )
        factors = 1.0 if self.weights.rope_freqs is None else self.weights.rope_freqs.astype(np.float64)
        self._frequencies = c.rope_theta ** (-np.arange(0, c.head_dim, 2, dtype=np.float64) / c.head_dim) / factors
        self._f16_tile = matmul.leaves("F16").tile
        mixture = any(isinstance(layer.ffn, Experts) for layer in self.weights.layers)
        self._choices = config.n_experts_used if mixture else 0
        self._max_batch = max(INTERRUPTIBLE, max_batch // max(1, self._choices))
        self.slots = self._open_slots(gguf, slots) if slots and mixture else None
        self._watched: dict[tuple[str, ...], Inputs] | None = None
        # Called after each batch: its first position; its experts, int64 [n_layers, n_tokens * n_experts_used], a view.
        self.follow_routing: Callable[[int, np.ndarray], None] | None = None
        self._capacity = 0  # tokens that buffers and program are made for
        self._reserve(INTERRUPTIBLE)
        populate(((m.address, m.nbytes) for m in self._always()), lock=self.slots is not None)

    def _open_slots(self, gguf: GGUF, n_slots: int) -> Slots:
        routed = {i: layer.ffn.exps for i, layer in enumerate(self.weights.layers) if isinstance(layer.ffn, Experts)}
        tensors = {i: tuple(gguf.tensors[m.name] for m in exps) for i, exps in routed.items()}
        random_access(self.weights.token_embd.address, self.weights.token_embd.nbytes)
        return Slots(tensors, self.config.n_experts, n_slots)

    def new_cache(self, ctx: int) -> KVCache:
        """An empty cache for at most `ctx` tokens."""
        return KVCache(self.config, ctx)

    def watch(self) -> list[Inputs]:
        """From now on add up the squares of all inputs to the layers' products; a call more begins anew.

        The arrays returned grow with every `forward`. A routed expert sees its input times the router's score.
        """
        self._watched = {}
        self._capacity = 0  # have the program composed again
        self._reserve(INTERRUPTIBLE)
        return list(self._watched.values())

    def take_traffic(self) -> Traffic | None:
        """What was read since the last call, None if all experts are mapped."""
        if not self.slots:
            return None
        taken, self.slots.traffic = self.slots.traffic, Traffic()
        return taken

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
        cache.reserve(len(ids))
        result = np.empty((len(ids) - first, self.config.n_vocab), np.float32) if all_logits else None
        done = 0
        while done < len(ids):
            n = self._batch_size(cache.pos, len(ids) - done)
            self._run_layers(ids[done : done + n], cache)
            if self.follow_routing:
                self.follow_routing(cache.pos, self._chosen[:, : n * self._choices])
            if all_logits:
                for row in range(max(0, first - done), n, ALL_LOGITS_BATCH):
                    count = min(ALL_LOGITS_BATCH, n - row)
                    at = done + row - first
                    result[at : at + count] = self._head(row, count)
            elif done + n == len(ids):
                result = self._head(n - 1, 1)[0]
            self._check()
            cache.pos += n
            done += n
        return result

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
        return [(*what, total[step]) for step, what in enumerate(self._operations())]

    def _operations(self) -> list[tuple[int | None, str]]:
        """What each step of the program is for, told from its kernel and the matrix or buffer that it works on."""
        w, p = self.weights, self._program
        purpose = {w.output.address: "output", self._gate_exps.address: "experts"}
        for layer in w.layers:
            purpose |= {m.address: "projections" for m in (layer.attn_q, layer.attn_k, layer.attn_v, layer.attn_output)}
            if isinstance(layer.ffn, Experts):
                purpose[layer.ffn.gate_inp.address] = "router"
                purpose |= {m.address: "shared expert" for m in layer.ffn.shexp} | {
                    m.address: "experts" for m in layer.ffn.exps
                }
            else:
                purpose |= {m.address: "dense" for m in layer.ffn}
        by_kernel = {"embed": "embedding", "norm": "norms", "route": "router"}
        found = []
        for step, (name, at) in enumerate(zip(p.names, p.first_arguments(), strict=True)):
            layer = bisect(self._cuts, step) if STEPS_BEFORE <= step < self._cuts[-1] else None
            if name == "gate_up" and at == self._gate.address:
                operation = "shared expert" if isinstance(w.layers[layer].ffn, Experts) else "dense"
            else:
                operation = by_kernel.get(name) or (purpose[at] if name in ("matmul", "gate_up") else "attention")
            found.append((layer, operation))
        return found

    def _batch_size(self, pos: int, left: int) -> int:
        chunk = self.config.chunk_size
        return min(left, self._max_batch, chunk - pos % chunk if chunk else left)

    def _run_layers(self, ids: np.ndarray, cache: KVCache) -> None:
        n = len(ids)
        self._reserve(n)
        self._ids[:n] = ids
        self._state[[N, POS, ROW, COUNT, CACHE]] = n, cache.pos, 0, n, cache.table.ctypes.data
        self._dense[1] = n
        if self.slots:
            self._run_visiting(n)
        elif n < INTERRUPTIBLE:
            self._pool.run(self._program, 0, self._cuts[-1])
        else:
            for first, last in zip([0, *self._cuts], self._cuts, strict=False):
                self._pool.run(self._program, first, last)

    def _run_visiting(self, n: int) -> None:
        """All layers, with a visit to each layer's experts: read them while the shared one is computed."""
        run, window, done = self._pool.run, self._window, 0
        for i, stops in self._visits.items():
            routed, shared, multiplied, joined, end = stops
            run(self._program, done, routed)
            visit = self.slots.visit(i, self._chosen[i, : n * self._choices].tolist())
            run(self._program, routed, shared)
            for expert in visit.gate_up:
                window[:] = expert, expert + 1
                run(self._program, shared, multiplied)
            down = visit.down()
            run(self._program, multiplied, joined)
            for expert in down:
                window[:] = expert, expert + 1
                run(self._program, joined, end)
            done = end
        if done < self._cuts[-1]:
            run(self._program, done, self._cuts[-1])

    def _head(self, row: int, count: int) -> np.ndarray:
        self._state[[ROW, COUNT]] = row, count
        self._dense[1] = count
        self._pool.run(self._program, self._cuts[-1])
        return self._logits[:count]

    # buffers and program

    def _reserve(self, n: int) -> None:
        """Buffers for `n` tokens at a time, and the program over them."""
        if n <= self._capacity:
            return
        self._capacity = (
            0  # an interrupt from here on leaves the old program without its buffers: the next call must build anew
        )
        n = min(self._max_batch, 1 << (n - 1).bit_length())
        c, k = self.config, self._choices
        n_experts, n_ff_exp = (c.n_experts, c.n_ff_exp) if self._choices else (0, 0)
        n_ff = max([n_ff_exp if c.is_moe(i) else c.n_ff for i in range(c.n_layers)])
        pairs = n * max(1, k)
        self._keep: list[np.ndarray] = []
        self._ids = np.zeros(n, np.int64)
        self._dense = np.concatenate([np.zeros(2, np.int64), np.arange(n)])
        self._window = np.zeros(2, np.int64)
        self._moe = np.zeros(n_experts + 1 + pairs, np.int64)
        self._chosen, self._scores = np.zeros((c.n_layers, pairs), np.int64), np.zeros(pairs, np.float32)
        self._rope = np.zeros((n, c.head_dim), np.float32)
        widest = max(n_ff, n_ff_exp, c.n_embd, c.n_heads * c.head_dim)
        scratch = matmul.scratch_bytes(pairs, max(widest, c.n_vocab, n_experts), widest)
        self._scratch = np.empty((self.threads, scratch), np.uint8)
        self._attn_scratch = np.empty((self.threads, attention.scratch_bytes(c.head_dim)), np.uint8)
        self._pairs = pairs
        self._x, self._xn = self._rows(n, c.n_embd), self._rows(n, c.n_embd, codes=True)
        self._q, self._k, self._v = (self._rows(n, w * c.head_dim) for w in (c.n_heads, c.n_kv_heads, c.n_kv_heads))
        self._att = self._rows(n, c.n_heads * c.head_dim, codes=True)
        self._gate, self._up = self._rows(n, n_ff, codes=True), self._rows(n, n_ff)
        self._gate_exps, self._up_exps = self._rows(pairs, n_ff_exp, codes=True), self._rows(pairs, n_ff_exp)
        self._router = self._rows(n, n_experts)
        self._logits = np.zeros((min(n, ALL_LOGITS_BATCH), c.n_vocab), np.float32)
        self._program = self._compose()
        self._capacity = n

    def _rows(self, n: int, width: int, codes: bool = False) -> Rows:
        """A zeroed buffer of n rows; rows are padded to whole superblocks of 256."""
        supers = -(-width // 256)
        values = np.zeros((n, supers * 256), np.float32)
        quantized = np.zeros((n, supers * ACT_BYTES if codes else 0), np.int8)
        self._keep += [values, quantized]
        return Rows(
            values.ctypes.data, values.strides[0], quantized.ctypes.data if codes else 0, quantized.strides[0] if codes else 0
        )

    def _compose(self) -> Program:
        """The whole model as steps; `_cuts` are where one layer ends and the next begins."""
        w, c, p = self.weights, self.config, Program()
        e = w.token_embd
        dequantize = matmul.leaves(e.type_name).dequantize
        p.add(
            matmul.embed,
            [e.address, e.row_bytes, e.n_cols, dequantize, *self._x[:2], self._ids.ctypes.data, self._state.ctypes.data],
            meet=False,  # nobody reads x before the threads have met after the angles
        )
        angle_args = [self._frequencies.ctypes.data, c.head_dim // 2, self._rope.ctypes.data, self._state.ctypes.data]
        p.add(attention.angles, angle_args)
        assert len(p) == STEPS_BEFORE
        self._cuts, self._visits = [], {}
        for i in range(c.n_layers):
            self._layer(p, i)
            self._cuts.append(len(p))
        self._norm(p, w.output_norm)
        self._matmul(p, w.output, self._xn, Rows(self._logits.ctypes.data, self._logits.strides[0]))
        return p.seal()

    def _layer(self, p: Program, i: int) -> None:
        layer = self.weights.layers[i]
        self._norm(p, layer.attn_norm)
        self._inputs(p, (layer.attn_q, layer.attn_k, layer.attn_v), self._xn)
        self._matmul(p, layer.attn_q, self._xn, self._q, meet=False)
        self._matmul(p, layer.attn_k, self._xn, self._k, meet=False)
        self._matmul(p, layer.attn_v, self._xn, self._v)
        self._attention(p, i)
        self._inputs(p, (layer.attn_output,), self._att)
        self._matmul(p, layer.attn_output, self._att, self._x, add=True)
        self._norm(p, layer.ffn_norm)
        if not isinstance(layer.ffn, Experts):
            self._dense_ffn(p, layer.ffn)
        elif self.slots:
            self._visited_experts(p, i, layer.ffn)
        else:
            self._experts(p, i, layer.ffn)

    def _norm(self, p: Program, weight: np.ndarray) -> None:
        quantize, eps = self._leaves["quantize"], self._floats[attention.EPS :].ctypes.data
        args = [*self._x[:2], weight.ctypes.data, self.config.n_embd, *self._xn, quantize, eps, self._state.ctypes.data]
        p.add(elementwise.norm, args)

    def _matmul(
        self, p: Program, m: Matrix, x: Rows, out: Rows, table: np.ndarray | None = None, meet: bool = True, **how
    ) -> None:
        table = self._dense if table is None else table
        p.add(matmul.matmul, matmul.arguments(m, x, out, table.ctypes.data, self._scratch, self._pairs, **how), meet)

    def _inputs(
        self, p: Program, matrices: Sequence[Matrix], x: Rows, table: np.ndarray | None = None, x_div: int = 1, scores: int = 0
    ) -> None:
        """Where somebody watches, a step that adds up the squares of what goes into `matrices`; the product after it meets."""
        if self._watched is None:
            return
        names, m = tuple(m.name for m in matrices), matrices[0]
        fresh = Inputs(names, np.zeros((m.n_groups, m.n_cols)), np.zeros(m.n_groups, np.int64))
        _, sums, counts = self._watched.setdefault(names, fresh)  # a program for more tokens goes on with the same sums
        table = self._dense if table is None else table
        args = [*x[:2], m.n_cols, m.n_groups, table.ctypes.data, x_div, scores, sums.ctypes.data, counts.ctypes.data]
        p.add(elementwise.square_sums, args, meet=False)

    def _attention(self, p: Program, i: int) -> None:
        c, state, floats = self.config, self._state.ctypes.data, self._floats.ctypes.data
        rotary = c.uses_rope(i)
        chunk = c.chunk_size if rotary else 0
        heads = [c.n_heads, c.n_kv_heads, c.head_dim]
        rope = self._rope.ctypes.data if rotary else 0
        temperature = not rotary and c.temperature_length > 0
        to_half = self._leaves["to_half"]
        args = [
            *self._q[:2],
            self._k.address,
            self._v.address,
            self._k.stride,
            *heads,
            rope,
            c.use_qk_norm,
            temperature,
            chunk,
            i,
        ]
        p.add(attention.prepare_heads, [*args, to_half, floats, state])
        leaves = [self._f16_tile, self._leaves["softmax"], self._leaves["weigh"]]
        scratch = [self._attn_scratch.ctypes.data, self._attn_scratch.strides[0]]
        p.add(attention.attend, [*self._q[:2], *self._att[:2], *heads, chunk, i, *leaves, floats, state, *scratch])
        width = c.n_heads * c.head_dim
        p.add(elementwise.quantize_rows, [*self._att[:2], width, *self._att[2:], self._leaves["quantize"], state])

    def _gate_up(self, p: Program, gate: Rows, up: Rows, n: int, scores: int = 0, per_token: int = 1) -> None:
        leaves = [self._leaves["quantize"], self._leaves["swiglu"]]
        args = [gate.address, up.address, gate.stride, n, gate.codes, gate.codes_stride, *leaves]
        p.add(elementwise.gate_up, [*args, scores, self._floats.ctypes.data, per_token, self._state.ctypes.data])

    def _dense_ffn(self, p: Program, ffn: Dense) -> None:
        self._inputs(p, (ffn.gate, ffn.up), self._xn)
        self._matmul(p, ffn.gate, self._xn, self._gate, meet=False)
        self._matmul(p, ffn.up, self._xn, self._up)
        self._gate_up(p, self._gate, self._up, ffn.gate.n_rows)
        self._inputs(p, (ffn.down,), self._gate)
        self._matmul(p, ffn.down, self._gate, self._x, add=True)

    def _route(self, p: Program, i: int, ffn: Experts, meet: bool) -> None:
        self._inputs(p, (ffn.gate_inp, ffn.shexp.gate, ffn.shexp.up), self._xn)
        self._matmul(p, ffn.gate_inp, self._xn, self._router)
        choice = [a.ctypes.data for a in (self._scores, self._chosen[i], self._moe, self._state)]
        p.add(elementwise.route, [*self._router[:2], self.config.n_experts, self.config.n_experts_used, *choice], meet)

    def _experts(self, p: Program, i: int, ffn: Experts) -> None:
        c, k, scores = self.config, self.config.n_experts_used, self._scores.ctypes.data
        self._route(p, i, ffn, meet=False)
        self._matmul(p, ffn.shexp.gate, self._xn, self._gate, meet=False)
        self._matmul(p, ffn.shexp.up, self._xn, self._up)
        self._inputs(p, (ffn.exps.gate, ffn.exps.up), self._xn, self._moe, k, scores)
        self._matmul(p, ffn.exps.gate, self._xn, self._gate_exps, self._moe, meet=False, x_div=k)
        self._matmul(p, ffn.exps.up, self._xn, self._up_exps, self._moe, x_div=k)
        self._gate_up(p, self._gate, self._up, c.n_ff_exp)
        self._gate_up(p, self._gate_exps, self._up_exps, c.n_ff_exp, scores, k)
        self._inputs(p, (ffn.shexp.down,), self._gate)
        self._inputs(p, (ffn.exps.down,), self._gate_exps, self._moe)
        self._matmul(p, ffn.shexp.down, self._gate, self._x, meet=False, add=True)
        self._matmul(p, ffn.exps.down, self._gate_exps, self._x, self._moe, add=True, out_div=k)

    def _visited_experts(self, p: Program, i: int, ffn: Experts) -> None:
        """The same sums, cut where experts may have to be waited for; the products of routed experts are run one by one."""
        c, k, scores = self.config, self.config.n_experts_used, self._scores.ctypes.data
        at = lambda part: {"where": self.slots.addresses(i, part), "window": self._window.ctypes.data}  # noqa: E731
        stops = []
        self._route(p, i, ffn, meet=True)
        stops.append(len(p))
        self._inputs(p, (ffn.exps.gate, ffn.exps.up), self._xn, self._moe, k, scores)
        self._matmul(p, ffn.shexp.gate, self._xn, self._gate, meet=False)
        self._matmul(p, ffn.shexp.up, self._xn, self._up)
        self._gate_up(p, self._gate, self._up, c.n_ff_exp)
        stops.append(len(p))
        self._matmul(p, ffn.exps.gate, self._xn, self._gate_exps, self._moe, meet=False, x_div=k, **at(GATE))
        self._matmul(p, ffn.exps.up, self._xn, self._up_exps, self._moe, x_div=k, **at(UP))
        stops.append(len(p))
        self._gate_up(p, self._gate_exps, self._up_exps, c.n_ff_exp, scores, k)
        self._inputs(p, (ffn.shexp.down,), self._gate)
        self._inputs(p, (ffn.exps.down,), self._gate_exps, self._moe)
        self._matmul(p, ffn.shexp.down, self._gate, self._x, add=True)
        stops.append(len(p))
        self._matmul(p, ffn.exps.down, self._gate_exps, self._x, self._moe, add=True, out_div=k, **at(DOWN))
        stops.append(len(p))
        self._visits[i] = stops
