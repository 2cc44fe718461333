"""The KV cache of a stage on MLX: keys and values of its layers for one sequence, as arrays of the device.

An array holds [n_kv_heads, capacity, head_dim] and is replaced on every write; MLX writes in place where nothing else refers to
it. Positions and rings are those of every device (positions.py).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import mlx.core as mx
import numpy as np

from llamacli.llama4.config import Config
from llamacli.positions import Positions


class MlxCache(Positions):
    """Keys and values in MLX's arrays (see device.Cache). `dtype`: float16, or float32 for exact tests."""

    def __init__(
        self,
        config: Config,
        ctx: int,
        layers: range,
        dtype: mx.Dtype,
        working: Callable[[], AbstractContextManager] = nullcontext,
    ):
        """`working`: the context in which calls of MLX run (runtime.working)."""
        super().__init__(config, ctx, layers)
        self._working = working
        self._shape, self._dtype = (config.n_kv_heads, config.head_dim), dtype
        self._sides = [[self._empty(0), self._empty(0)] for _ in layers]

    def _empty(self, capacity: int) -> mx.array:
        heads, dim = self._shape
        return mx.zeros((heads, capacity, dim), self._dtype)

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return sum(side.nbytes for sides in self._sides for side in sides)

    def arrays(self, layer: int) -> list[mx.array]:
        """Keys and values of a layer, to be evaluated."""
        return self._sides[self.layers.index(layer)]

    def reserve(self, n: int) -> None:
        """Make room for `n` more tokens; ContextFullError past ctx."""
        need = self._claim(n)
        with self._working():
            for layer, sides in zip(self.layers, self._sides, strict=True):
                held = sides[0].shape[1]
                if (capacity := self._capacity(layer, held, need)) > held:
                    more = self._empty(capacity - held)
                    sides[:] = [mx.concatenate([side, more], 1) for side in sides]
                    mx.eval(sides)

    def append(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write from position `pos` on, in the room that `reserve` made; returns what the last of these positions may see.

        `keys`, `values`: [n_kv_heads, n, head_dim], within one chunk.
        """
        slots = self._slots(layer, self.pos, self.pos + keys.shape[1])
        sides = self.arrays(layer)
        for side, new in enumerate((keys, values)):
            sides[side][:, slots] = new.astype(self._dtype)
        return sides[0][:, : slots.stop], sides[1][:, : slots.stop]

    def export(self, layer: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of positions start to end - 1: copies, float16 [n_kv_heads, end - start, head_dim].

        ValueError if the layer no longer holds one of them.
        """
        slots = self._held_slots(layer, start, end)
        with self._working():
            return tuple(np.array(side[:, slots].astype(mx.float16)) for side in self.arrays(layer))

    def restore(self, layer: int, start: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Write keys and values, float16 [n_kv_heads, n, head_dim], from position `start` on; `reserve` has made room for them.

        In a chunked layer all positions must be in one chunk: that of the last position that will be held.
        """
        slots, sides = self._slots(layer, start, start + keys.shape[1]), self.arrays(layer)
        with self._working():
            for side, rows in enumerate((keys, values)):
                sides[side][:, slots] = mx.array(np.ascontiguousarray(rows)).astype(self._dtype)
            mx.eval(sides)
