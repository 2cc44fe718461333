"""The order of operations of llama4/layers.py on MLX: each call adds to a graph that is evaluated later.

In: arrays of a batch, caches of its runs. Out: arrays. The residual stream, norms, the router and the product of gate and up
are float32; keys, values and attention have the cache's type. What each token may see follows from its run: runs end at
chunk edges, so a run sees its chunk, or everything, and needs no mask beyond the causal one.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from llamacli.cpu.weights import Dense, Layer
from llamacli.device import Run
from llamacli.llama4.config import Config
from llamacli.mlx import kernels
from llamacli.mlx.matrix import Blocks, Fetched, Wide, add_product, gate_up, gate_up_chosen
from llamacli.mlx.streaming import Experts, Fetch

PAIRS = 1 << 26  # of a query and a key in one call of attention, some tenths of a second: a driver ends calls that take long
LAZY = 4  # choices of experts up to which the device alone knows them; beyond, they are read back and grouped by expert


class Routed(NamedTuple):
    """The experts that tokens chose, int32 [n, n_experts_used], and their scores, float32 [n, n_experts_used]."""

    experts: mx.array
    scores: mx.array


class Part(NamedTuple):
    """Activations of the rows (token * n_experts_used + choice) that go through one expert."""

    expert: int
    rows: mx.array
    values: mx.array


class Operations:
    """Operations over one batch (llama4.layers.Operations). `chosen` collects each layer's Routed.experts."""

    def __init__(
        self,
        config: Config,
        frequencies: np.ndarray,
        runs: Sequence[Run],
        dtype: mx.Dtype,
        experts: Experts | None = None,
        own_kernels: bool = False,
    ):
        """`frequencies`: radians that each pair of a head turns by per position; angles are computed here, in float64.
        `dtype`: of keys and values. `experts`: those that are fetched. `own_kernels`: whether kernels.py's run here.
        """
        self._config, self._runs, self._dtype, self._experts, self._own = config, runs, dtype, experts, own_kernels
        self._fetch: Fetch | None = None  # of the layer that is being computed
        self.chosen: dict[int, mx.array] = {}
        self.layer = -1  # the one that is being computed; set by the caller
        positions = np.concatenate([np.arange(run.cache.pos, run.cache.pos + run.n, dtype=np.float64) for run in runs])
        angles = positions[:, None] * frequencies
        self._cos, self._sin = mx.array(np.cos(angles).astype(np.float32)), mx.array(np.sin(angles).astype(np.float32))
        scales = np.ones(len(positions))
        if config.temperature_length:
            scales += config.temperature_scale * np.log1p(np.floor((positions + 1) / config.temperature_length))
        self._temperature = mx.array(scales.astype(np.float32))
        self._plain = mx.ones(len(positions))

    def norm(self, x: mx.array, w: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, w, self._config.rms_eps)

    def qkv(self, h: mx.array, w: Layer) -> tuple[mx.array, mx.array, mx.array]:
        return tuple(m.times(h) for m in (w.attn_q, w.attn_k, w.attn_v))

    def attend(self, i: int, q, k, v, *, rotate: bool, norm: bool, temperature: bool, chunk: int) -> mx.array:
        c, scales = self._config, self._temperature if temperature else self._plain
        q = self._heads(q, c.n_heads, rotate, norm, scales)
        k = self._heads(k, c.n_kv_heads, rotate, norm, self._plain)
        v = self._heads(v, c.n_kv_heads, False, False, self._plain)
        first, out = 0, []
        for run in self._runs:
            rows = slice(first, first + run.n)
            keys, values = run.cache.append(i, k[:, rows], v[:, rows])
            out += self._attended(q[:, rows], keys, values)
            first += run.n
        joined = out[0] if len(out) == 1 else mx.concatenate(out)
        return joined.reshape(first, -1).astype(mx.float32)

    def _attended(self, q: mx.array, keys: mx.array, values: mx.array) -> list[mx.array]:
        """Values for the last positions of `keys`, whose queries are q: parts of [n, n_heads, head_dim], in order."""
        n, n_keys, out = q.shape[1], keys.shape[1], []
        step = max(1, PAIRS // n_keys)
        for start in range(0, n, step):
            end = min(n, start + step)
            seen = n_keys - n + end
            found = mx.fast.scaled_dot_product_attention(
                q[None, :, start:end],
                keys[None, :, :seen],
                values[None, :, :seen],
                scale=self._config.head_dim**-0.5,
                mask="causal" if end - start > 1 else None,  # the queries are those of the last positions
            )
            out.append(found[0].swapaxes(0, 1))
            if step < n:
                mx.eval(out[-1])
        return out

    def _heads(self, x: mx.array, n_heads: int, rotate: bool, norm: bool, scales: mx.array) -> mx.array:
        """Heads as attention takes them, [n_heads, n, head_dim] in the cache's type."""
        eps = self._config.rms_eps
        if self._own:
            turns = self._cos, self._sin
            return kernels.heads(x, turns, scales, n_heads, eps, self._dtype, rotate=rotate, norm=norm)
        x = x.reshape(len(x), n_heads, -1)
        if rotate:
            x = self._rotated(x)
        if norm:
            x = mx.fast.rms_norm(x, None, eps)
        return (x * scales[:, None, None]).swapaxes(0, 1).astype(self._dtype)

    def _rotated(self, x: mx.array) -> mx.array:
        """Neighbouring elements of each head turned as pairs; x [n, n_heads, head_dim]."""
        a, b, cos, sin = x[..., ::2], x[..., 1::2], self._cos[:, None], self._sin[:, None]
        return mx.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)

    def add_matmul(self, x: mx.array, h: mx.array, w: Blocks | Wide) -> mx.array:
        return add_product(x, w, h)

    def gate_up(self, h: mx.array, w: Dense) -> mx.array:
        product = gate_up(w.gate, w.up, h)
        if self._experts and self.layer in self.chosen:
            mx.async_eval(product)
        return product

    def route(self, h: mx.array, w: Wide) -> Routed:
        logits, k = w.times(h), self._config.n_experts_used
        best = mx.argmax(logits, -1, keepdims=True) if k == 1 else mx.argpartition(-logits, k - 1, -1)[:, :k]
        routed = Routed(best.astype(mx.int32), mx.sigmoid(mx.take_along_axis(logits, best, -1)))
        self.chosen[self.layer] = routed.experts
        if self._experts:
            mx.async_eval(routed.experts)  # first, so that the choice is known while the shared expert is computed
        return routed

    def expert_gate_up(self, h: mx.array, w: Dense, routed: Routed) -> mx.array | list[Part]:
        if isinstance(w.gate, Fetched):
            return self._fetched_gate_up(h, routed)
        k, scores = self._config.n_experts_used, routed.scores.reshape(-1, 1)
        if routed.experts.size <= LAZY:
            rows, experts = h if k == 1 else mx.repeat(h, k, 0), routed.experts.reshape(-1)
            return gate_up_chosen(w.gate, w.up, rows, experts, scores)
        flat, parts = np.array(routed.experts).reshape(-1), []
        for e in np.unique(flat).tolist():
            rows = mx.array(np.flatnonzero(flat == e))
            x, score = h[rows // k], scores[rows]
            parts.append(Part(e, rows, gate_up(w.gate, w.up, x, e, score)))
            mx.eval(parts[-1].values)  # releases what was widened for this expert
        return parts

    def _fetched_gate_up(self, h: mx.array, routed: Routed) -> list[Part]:
        k, scores = self._config.n_experts_used, routed.scores.reshape(-1, 1)
        flat, parts = np.array(routed.experts).reshape(-1), []
        self._fetch = self._experts.fetch(self.layer, flat.tolist())
        for e, gate, up in self._fetch.gate_up():
            rows = mx.array(np.flatnonzero(flat == e))
            x, score = h[rows // k], scores[rows]
            parts.append(Part(e, rows, gate_up(gate, up, x, 0, score)))
            self._fetch.used(parts[-1].values)
        return parts

    def add_expert_matmul(self, x: mx.array, h: mx.array | list[Part], w: Blocks | Wide | Fetched, routed: Routed) -> mx.array:
        k = self._config.n_experts_used
        if isinstance(h, mx.array):
            experts = routed.experts.reshape(-1)
            if k == 1:
                return add_product(x, w, h, experts)
            return x + w.times_chosen(h, experts).reshape(len(x), k, -1).sum(1)
        if isinstance(w, Fetched):
            parts = {part.expert: part for part in h}
            for e, matrix in self._fetch.down():
                x = x.at[parts[e].rows // k].add(matrix.times(parts[e].values))
                self._fetch.used(x)
            return x
        for part in h:
            x = x.at[part.rows // k].add(w.times(part.values, part.expert))
            mx.eval(x)
        return x
