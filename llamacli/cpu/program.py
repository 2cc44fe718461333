"""Llama 4's forward pass: the order of operations, written once as a program of compiled steps over buffers of its own.

In: weights, sizes, threads. Out: `Steps`, whose `program` a thread pool runs for every batch of tokens. `_layer` reads like
the model's definition. Knows nothing of text, files, caches' contents or when what is run.

Sources: Meta's and Hugging Face's Llama 4 (router on raw logits, sigmoid score on the expert's input, interleaved rotary
pairs, QK norm after rotation, attention temperature where there is no rotation). down(silu(s g) * (s u)) equals feeding s x to
the expert, so one quantized x serves router, shared and routed experts.
"""

from bisect import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llamacli.cpu.experts import DOWN, GATE, UP, Slots
from llamacli.cpu.kernels.formats.layout import ACT_BYTES
from llamacli.cpu.kernels.jit.loader import chosen_target, load
from llamacli.cpu.kernels.ops import attention, elementwise, matmul
from llamacli.cpu.kernels.ops.elementwise import CACHE, COUNT, POS, ROW, N
from llamacli.cpu.kernels.ops.matmul import Matrix, Rows
from llamacli.cpu.kernels.ops.vectors import SYMBOLS, build, span
from llamacli.cpu.kernels.runtime.pool import Program
from llamacli.cpu.weights import Dense, Experts, Layer, Weights
from llamacli.llama4.config import Config

ALL_LOGITS_BATCH = 64  # rows of logits made at a time, so that a long prompt does not ask for gigabytes
STEPS_BEFORE = 2  # steps of a program before the first layer's


class Inputs(NamedTuple):
    """What has flowed into some products that share their input: per matrix, which is per expert, and per column."""

    names: tuple[str, ...]  # the tensors that these inputs were multiplied with
    square_sums: np.ndarray  # float64 [n_matrices, n_cols]
    counts: np.ndarray  # int64 [n_matrices], inputs that each has seen


class Stops(NamedTuple):
    """Steps of a layer with experts in slots, each number the step after the last."""

    guessed: int  # the router has been asked before attention, with what it will see but for attention's part
    routed: int  # the experts are chosen
    shared: int  # the shared expert's gate and up are done
    multiplied: int  # a routed expert's gate and up, for the experts in `window`
    joined: int  # the shared expert's down
    end: int  # a routed expert's down, for the experts in `window`


class Steps:
    """The program for up to `capacity` tokens, its buffers, and where it can be cut.

    `cuts`: the step after each layer's last. `visits`: by layer, if there are `slots`. `window`: int64 [2], the experts that
    the products of a visit are for. `chosen`: int64 [n_layers, tokens * n_experts_used]; `guess`, int64
    [tokens * n_experts_used]: what a layer's tokens will probably choose; `router`: the scores that were last given, float32
    [tokens, n_experts, padded]. `logits`: float32 [rows, n_vocab].
    """

    def __init__(
        self,
        weights: Weights,
        config: Config,
        capacity: int,
        threads: int,
        slots: Slots | None = None,
        watched: dict[tuple[str, ...], Inputs] | None = None,
    ):
        self.weights, self.config, self.capacity = weights, config, capacity
        self._slots, self._watched = slots, watched
        c, n = config, capacity
        self._leaves = load(f"vectors-{c.head_dim}", build(c.head_dim), SYMBOLS)
        self._f16_tile = matmul.leaves("F16").tile
        self._state = np.zeros(8, np.int64)
        self._floats = np.array(
            [1.0, c.rms_eps, c.head_dim**-0.5, c.temperature_length or 1.0, c.temperature_scale], np.float32
        )
        factors = 1.0 if weights.rope_freqs is None else weights.rope_freqs.astype(np.float64)
        self._frequencies = c.rope_theta ** (-np.arange(0, c.head_dim, 2, dtype=np.float64) / c.head_dim) / factors
        self.choices = c.n_experts_used if weights.has_experts else 0
        n_experts, n_ff_exp = (c.n_experts, c.n_ff_exp) if self.choices else (0, 0)
        n_ff = max([n_ff_exp if c.is_moe(i) else c.n_ff for i in range(c.n_layers)])
        self._pairs = pairs = n * max(1, self.choices)
        self.arrays: list[np.ndarray] = []
        self._ids = self._array(n, np.int64)
        self._dense = self._array(n + 2, np.int64)
        self._dense[2:] = np.arange(n)
        self.window = self._array(2, np.int64)
        self._moe = self._array(n_experts + 1 + pairs, np.int64)
        self.chosen, self._scores = self._array((c.n_layers, pairs), np.int64), self._array(pairs)
        self._guess_table = self._array(n_experts + 1 + pairs if slots else 0, np.int64)
        self.guess = self._array(pairs if slots else 0, np.int64)
        self._rope = self._array((n, c.head_dim))
        widest = max(n_ff, n_ff_exp, c.n_embd, c.n_heads * c.head_dim)
        scratch = matmul.scratch_bytes(pairs, max(widest, c.n_vocab, n_experts), widest)
        self._scratch = self._array((threads, scratch), np.uint8)
        self._attn_scratch = self._array((threads, attention.scratch_bytes(c.head_dim)), np.uint8)
        self._x, self._xn = self._rows(n, c.n_embd), self._rows(n, c.n_embd, codes=True)
        self._q, self._k, self._v = (self._rows(n, w * c.head_dim) for w in (c.n_heads, c.n_kv_heads, c.n_kv_heads))
        self._att = self._rows(n, c.n_heads * c.head_dim, codes=True)
        self._gate, self._up = self._rows(n, n_ff, codes=True), self._rows(n, n_ff)
        self._gate_exps, self._up_exps = self._rows(pairs, n_ff_exp, codes=True), self._rows(pairs, n_ff_exp)
        self.router = self._array((n, -(-n_experts // 256) * 256))
        self._router = Rows(self.router.ctypes.data, self.router.strides[0])
        self.logits = self._array((min(n, ALL_LOGITS_BATCH), c.n_vocab))
        self.cuts: list[int] = []
        self.visits: dict[int, Stops] = {}
        self.program = self._compose()

    def set_tokens(self, ids: np.ndarray, pos: int, cache_table: np.ndarray) -> None:
        """What the layers are run for: `ids`, int64, the first at position `pos`."""
        n = len(ids)
        self._ids[:n] = ids
        self._state[[N, POS, ROW, COUNT, CACHE]] = n, pos, 0, n, cache_table.ctypes.data
        self._dense[1] = n

    def set_rows(self, row: int, count: int) -> None:
        """Which tokens' logits the steps after the last layer make."""
        self._state[[ROW, COUNT]] = row, count
        self._dense[1] = count

    def operations(self) -> list[tuple[int | None, str]]:
        """What each step of the program is for, told from its kernel and the matrix or buffer that it works on."""
        w, p = self.weights, self.program
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
            layer = bisect(self.cuts, step) if STEPS_BEFORE <= step < self.cuts[-1] else None
            if name == "gate_up" and at == self._gate.address:
                operation = "shared expert" if isinstance(w.layers[layer].ffn, Experts) else "dense"
            else:
                operation = by_kernel.get(name) or (purpose[at] if name in ("matmul", "gate_up") else "attention")
            found.append((layer, operation))
        return found

    # buffers

    def _array(self, shape, dtype=np.float32) -> np.ndarray:
        array = np.zeros(shape, dtype)
        self.arrays.append(array)
        return array

    def _rows(self, n: int, width: int, codes: bool = False) -> Rows:
        """A buffer of n rows, padded to whole superblocks of 256."""
        supers = -(-width // 256)
        values = self._array((n, supers * 256))
        quantized = self._array((n, supers * ACT_BYTES if codes else 0), np.int8)
        return Rows(
            values.ctypes.data, values.strides[0], quantized.ctypes.data if codes else 0, quantized.strides[0] if codes else 0
        )

    # the order of operations

    def _compose(self) -> Program:
        """The whole model as steps."""
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
        for i in range(c.n_layers):
            self._layer(p, i)
            self.cuts.append(len(p))
        self._norm(p, w.output_norm)
        self._matmul(p, w.output, self._xn, Rows(self.logits.ctypes.data, self.logits.strides[0]))
        return p.seal()

    def _layer(self, p: Program, i: int) -> None:
        layer = self.weights.layers[i]
        if self._slots and isinstance(layer.ffn, Experts):
            self._guess(p, i, layer)
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
        elif self._slots:
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
        leaves = [self._f16_tile, *(self._leaves[name] for name in ("softmax", "weigh", "keys_aside", "widen", "product"))]
        tile = [span(c.head_dim, chosen_target()), chosen_target().tile]
        scratch = [self._attn_scratch.ctypes.data, self._attn_scratch.strides[0]]
        p.add(attention.attend, [*self._q[:2], *self._att[:2], *heads, chunk, i, *leaves, *tile, floats, state, *scratch])
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
        choice = [a.ctypes.data for a in (self._scores, self.chosen[i], self._moe, self._state)]
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
        self._matmul(p, ffn.shexp.down, self._gate, self._x, add=True)
        self._matmul(p, ffn.exps.down, self._gate_exps, self._x, self._moe, add=True, out_div=k)

    def _guess(self, p: Program, i: int, layer: Layer) -> None:
        """Which experts would be chosen if attention added nothing; so they can be read meanwhile."""
        self._norm(p, layer.ffn_norm)
        self._matmul(p, layer.ffn.gate_inp, self._xn, self._router)
        choice = [a.ctypes.data for a in (self._scores, self.guess, self._guess_table, self._state)]
        p.add(elementwise.route, [*self._router[:2], self.config.n_experts, self.choices, *choice])
        self.visits[i] = Stops(len(p), 0, 0, 0, 0, 0)

    def _visited_experts(self, p: Program, i: int, ffn: Experts) -> None:
        """The same sums, cut where experts may have to be waited for; the products of routed experts are run one by one."""
        c, k, scores = self.config, self.config.n_experts_used, self._scores.ctypes.data
        at = lambda part: {"where": self._slots.addresses(i, part), "window": self.window.ctypes.data}  # noqa: E731
        stops = [self.visits[i].guessed]
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
        self.visits[i] = Stops(*stops)
