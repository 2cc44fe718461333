"""A stage on MLX: the last layers of a model and its head, on the GPU.

In: the residual stream, and caches. Out: the stream, or logits. The graph of one token is handed over as it is built and waited
for once, when its logits are asked for; longer batches are evaluated layer by layer, which bounds their memory and lets Ctrl-C
be heard. Weights stay as they lie in the file where kernels read them; on a machine without a GPU they are widened when they
are loaded.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from time import perf_counter

import mlx.core as mx
import numpy as np

from llamacli.cpu.weights import Experts as Mixture
from llamacli.cpu.weights import Layer, Weights, assemble, conversion_notices, has_kernels
from llamacli.device import IoStats, Run
from llamacli.errors import UnsupportedModelError, UsageError
from llamacli.files.gguf import GGUF, Tensor
from llamacli.files.pages import populate
from llamacli.llama4 import layers as llama4
from llamacli.llama4.config import Config
from llamacli.llama4.tensors import Role, find
from llamacli.mlx import kernels, memory, runtime
from llamacli.mlx.cache import MlxCache
from llamacli.mlx.matrix import Blocks, Fetched, Wide
from llamacli.mlx.operations import Operations
from llamacli.mlx.streaming import Experts
from llamacli.plan.offload import working_bytes

LOGITS_BATCH = 64  # rows of logits made at a time
AHEAD = 4  # layers of a single token's graph that are handed to the GPU while the next ones are built


class MlxStage:
    """`layers` of a model and, with `heads`, its head (see device.Stage); never the embedding."""

    def __init__(
        self,
        gguf: GGUF,
        config: Config,
        layers: range,
        *,
        heads: bool = True,
        slots: dict[int, int] | None = None,
        dtype: mx.Dtype | None = None,
    ):
        """`slots`: by layer with experts, how many of them are kept in memory; none: they are used where the file is.

        `dtype`: of keys, values, attention and widened weights; None: float16 on a GPU, float32 without one.
        """
        here = runtime.start()
        self.layers, self._config, self._heads, self._path = layers, config, heads, gguf.path
        self.alike = 1  # how MLX adds up depends on the number of rows
        self.timings: Counter | None = None
        self.follow: Callable[[float], None] | None = None
        self._blocks = kernels.dialect() is not None  # whether kernels read blocks here
        self._gpu = here.gpu is not None
        self._adopts = here.gpu == "Metal"
        self._dtype = dtype or (mx.float16 if here.gpu else mx.float32)
        self._converted: list[str] = []
        self._windows: list[memory.Window] = []
        self._stopped = self._forked = False
        self._slots, self._routed = slots or {}, {}
        self._chosen: dict[int, mx.array] = {}
        self._pending: list[mx.array] = []  # keys and values that the last call wrote
        with self._working():
            self._weights: Weights = assemble(
                gguf, config, lambda tensor: self._matrix(gguf, tensor), layers, embedding=False, head=heads
            )
            self._layers = [
                w._replace(attn_norm=mx.array(w.attn_norm), ffn_norm=mx.array(w.ffn_norm)) for w in self._weights.layers
            ]
            self._output_norm = mx.array(self._weights.output_norm) if heads else None
            self._experts = self._fetching(gguf) if self._slots else None
            mx.set_cache_limit(working_bytes(config))
        populate([(w.owner.ctypes.data, w.owner.nbytes) for w in self._windows if w.adopted])
        self._frequencies = config.frequencies(self._weights.rope_freqs)
        used = [(m, times) for w in self._weights.layers for m, times in _used(w, config)]
        self.products_per_token = sum(m.n_rows * m.n_cols * times for m, times in used)
        self.bytes_per_token = sum(m.nbytes * times for m, times in [*used, *([(self._weights.output, 1)] if heads else [])])
        reading = self._experts.slots.notices if self._experts else ()
        self.notices = [*self._notices(here), *reading, *conversion_notices(self._converted), *self._weights.notices]

    def _matrix(self, gguf: GGUF, tensor: Tensor) -> Blocks | Wide | Fetched:
        *groups, n_rows, n_cols = tensor.shape
        n_groups = groups[0] if groups else 1
        row, layer = find(tensor.name)
        router = row.role is Role.ROUTER
        if row.role is Role.EXPERTS and layer in self._slots:
            self._routed[layer] = (*self._routed.get(layer, ()), tensor)
            return Fetched(n_groups, n_rows, n_cols, tensor.nbytes // n_groups)
        if self._blocks and not router and kernels.fits(tensor.type.name, n_cols):
            found = memory.window(tensor, self._adopts)
            self._windows.append(found)
            return Blocks(found, tensor.type.name, n_groups, n_rows, n_cols, tensor.nbytes // n_groups)
        if self._blocks and not router:
            self._converted.append(f"{tensor.name} ({tensor.type.name})")
        exact = router or self._dtype == mx.float32
        return Wide.of(gguf, tensor, mx.float32 if exact else mx.float16)

    def _fetching(self, gguf: GGUF) -> Experts:
        """Slots for the routed experts. UnsupportedModelError: a type that kernels do not read."""
        for tensor in (tensor for layer in self._routed.values() for tensor in layer):
            if not has_kernels(tensor):
                raise UnsupportedModelError(
                    f"{gguf.path}: expected experts in a type with kernels, found {tensor.type.name} in {tensor.name}, which "
                    f"only runs if it fits into memory; quantize it again"
                )
        return Experts(gguf, self._routed, self._config.n_experts, self._slots, self._adopts, self._blocks)

    def _notices(self, here: runtime.Runtime) -> list[str]:
        """What the device is, and where its weights are."""
        count = f"{len(self.layers)} of {self._config.n_layers} layers"
        if not here.gpu:
            return [f"{here}: {count} run on MLX's CPU build, with widened weights; it is slower than --device cpu"]
        copied = sum(window.array.nbytes for window in self._windows if not window.adopted)
        how = f"{copied / 1e9:.2f} GB of weights were copied to the GPU" if copied else "weights used where the file is mapped"
        return [f"{here}: {count} run on the GPU, {how}"]

    def new_cache(self, ctx: int) -> MlxCache:
        """An empty cache for at most `ctx` tokens."""
        with self._working():
            return MlxCache(self._config, ctx, self.layers, self._dtype, self._working)

    def _working(self) -> AbstractContextManager:
        """The device's turn for one call. UsageError in a forked process."""
        if self._forked:
            raise UsageError("a forked process cannot use the GPU of its parent: load the model again")
        return runtime.working(self._path, self._gpu)

    def forward(self, x: np.ndarray, runs: Sequence[Run]) -> mx.array:
        """The stream after the layers, float32 [n, n_embd]; of a single token not yet evaluated, if `logits` follows.

        NumPy evaluates it when it is read. KeyboardInterrupt after `interrupt`.
        """
        lazy = len(x) == 1 and self._heads and not self._experts  # slots may be filled again in the next call
        with self._working():
            x = mx.array(x)
            ops = Operations(self._config, self._frequencies, runs, self._dtype, self._experts, self._blocks)
            for i, weights in zip(self.layers, self._layers, strict=True):
                began = perf_counter()
                ops.layer = i
                try:
                    x = llama4.layer(ops, self._config, i, weights, x)
                    if not lazy or self.timings is not None:
                        mx.eval(x)
                    elif (i + 1) % AHEAD == 0:
                        mx.async_eval(x)
                except BaseException:  # Ctrl-C too: no expert may count as present before it has been read
                    if i in self._slots:
                        self._experts.slots.reset(i)
                    raise
                if self.timings is not None:
                    self.timings[i, "layer"] += perf_counter() - began
                if self._stopped:
                    raise KeyboardInterrupt
                if self.follow and not lazy:
                    self.follow((i + 1 - self.layers.start) / len(self.layers))
        self._chosen = ops.chosen
        self._pending = [side for run in runs for i in self.layers for side in run.cache.arrays(i)]
        return x

    def logits(self, x: mx.array | np.ndarray, first: int = 0) -> np.ndarray:
        """Logits of the rows x[first:] of the stream, float32 [len(x) - first, n_vocab]."""
        with self._working():
            began = perf_counter()
            h = mx.fast.rms_norm(mx.array(x)[first:], self._output_norm, self._config.rms_eps)
            found = np.empty((len(h), self._config.n_vocab), np.float32)
            for row in range(0, len(h), LOGITS_BATCH):
                part = self._weights.output.times(h[row : row + LOGITS_BATCH])
                mx.eval(part, self._pending)
                found[row : row + LOGITS_BATCH] = part
            if self.timings is not None:
                self.timings[None, "output"] += perf_counter() - began
        if self._stopped:
            raise KeyboardInterrupt
        return found

    def chosen(self, n: int) -> np.ndarray:
        """The experts that the last batch's `n` tokens chose, int64 [layers, n * n_experts_used]; 0 in dense layers."""
        found = np.zeros((len(self.layers), n * self._config.n_experts_used), np.int64)
        with self._working():
            for i, experts in self._chosen.items():
                found[i - self.layers.start] = np.array(experts).reshape(-1)
        return found

    def interrupt(self) -> None:
        """Make a call that runs in another thread end after its current layer or token; that call raises KeyboardInterrupt."""
        self._stopped = True

    def abandon(self) -> None:
        """Nothing to forget: every call waits for its result."""

    def resume(self) -> None:
        """Forget an interrupt."""
        self._stopped = False

    def shrink(self, nbytes: int) -> int:
        """Give back slots, up to so many bytes; returns how many."""
        return self._experts.slots.shrink(nbytes) if self._experts else 0

    def watch(self) -> list:
        """UsageError: inputs of products are summed up on the CPU only."""
        raise UsageError("expected all layers on the CPU, found some on the GPU; use --device cpu for this")

    def take_io_stats(self) -> IoStats | None:
        """What was read since the last call, None if all experts are where the file is."""
        return self._experts.slots.take_io_stats() if self._experts else None

    def after_fork(self) -> None:
        """In a forked child: refuse further calls, since the GPU's queues belong to the parent."""
        self._forked = True

    def close(self) -> None:
        """Drop weights and what MLX keeps of freed memory."""
        self._weights = self._layers = self._output_norm = self._chosen = self._pending = None
        if self._experts:
            self._experts.slots.close()
        self._windows, self._experts = [], None
        mx.clear_cache()


def _used(w: Layer, config: Config) -> list[tuple[Blocks | Wide | Fetched, int]]:
    """The matrices of a layer (one item for all experts), each with how many of them one token is multiplied with."""
    found = [(m, 1) for m in (w.attn_q, w.attn_k, w.attn_v, w.attn_output)]
    if not isinstance(w.ffn, Mixture):
        return found + [(m, 1) for m in w.ffn]
    found += [(m, 1) for m in (w.ffn.gate_inp, *w.ffn.shexp)]
    return found + [(m, config.n_experts_used) for m in w.ffn.exps]
