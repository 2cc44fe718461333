"""The KV cache of a CPU stage: keys and values of its layers for one sequence.

A chunked layer keeps at most one chunk (a ring, slot = position mod chunk); a global layer keeps everything. Both grow by
doubling, so memory follows the conversation, never the file's context length. Head-major, in the type `config.kv_type`: keys
[n_kv_heads, capacity, head_dim] in float16, or [n_kv_heads, capacity, kv_row_bytes] of blocks; values alike. Where there are
segments (positions.py), the newest two are float16 [keys and values, n_kv_heads, 2 segments, head_dim], a ring. `table` is what
kernels read: int64 [n_layers, 4], key address, value address, capacity, the address of the newest segments.
"""

from functools import lru_cache

import numpy as np

from llamacli.llama4.config import Config
from llamacli.positions import Positions, segment


@lru_cache(4096)
def nbytes(config: Config, ctx: int, chunked: bool = True) -> int:
    """Bytes that a cache of `ctx` tokens holds when it is full; `chunked` False: as if no layer were capped at a chunk."""
    per_token = 2 * config.n_kv_heads * config.kv_row_bytes
    chunk = config.chunk_size if chunked else 0
    rows = sum(per_token * (min(ctx, chunk) if chunk and config.uses_rope(i) else ctx) for i in range(config.n_layers))
    return rows + (segment_bytes(config) * config.n_layers if ctx else 0)


def segment_bytes(config: Config) -> int:
    """Bytes of a layer's newest segments."""
    return 2 * config.n_kv_heads * 2 * segment(config) * config.head_dim * 2


class KVCache(Positions):
    """Keys and values in memory that kernels address (see device.Cache)."""

    def __init__(self, config: Config, ctx: int, layers: range | None = None):
        """`layers`: those of the stage; None: all."""
        super().__init__(config, ctx, layers)
        half = config.kv_type == "F16"
        self._row = (np.float16, config.head_dim) if half else (np.uint8, config.kv_row_bytes)  # type and length of a row
        self._heads = config.n_kv_heads
        self._layers = [(self._empty(0), self._empty(0)) for _ in self._chunks]
        newest = 2, self._heads, 2 * self.segment, config.head_dim
        self._segments = [np.zeros(newest, np.float16) for _ in self.layers]
        self.table = np.zeros((len(self.layers), 4), np.int64)
        self.table_address = self.table.ctypes.data
        self._room = 0 if self.layers else ctx  # positions for which every layer has room and the table is right

    def _empty(self, capacity: int) -> np.ndarray:
        dtype, length = self._row
        return np.empty((self._heads, capacity, length), dtype)

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return sum(side.nbytes for layer in [*self._layers, self._segments] for side in layer)

    def reserve(self, n: int) -> None:
        """Make room for `n` more tokens; ContextFullError past ctx."""
        need = self._claim(n)
        if need <= self._room:
            return
        self._room = 0  # an interrupt below leaves table and layers inconsistent: the next call must set all of them
        for i, (number, layer) in enumerate(zip(self.layers, self._layers, strict=True)):
            held = layer[0].shape[1]
            if (capacity := self._capacity(number, held, need)) > held:
                grown = tuple(self._empty(capacity) for _ in layer)
                for old, new in zip(layer, grown, strict=True):
                    new[:, :held] = old
                self._layers[i] = grown
            keys, values = self._layers[i]
            self.table[i] = keys.ctypes.data, values.ctypes.data, keys.shape[1], self._segments[i].ctypes.data
        held = zip(self._layers, self._chunks, strict=True)  # a layer that holds nothing is kept elsewhere (kvfile.py)
        growing = (keys.shape[1] for (keys, _), chunk in held if keys.shape[1] not in (0, chunk))
        self._room = min([self.ctx, *growing])

    def tables(self, n: int) -> int:
        """The address of the cache table of each of the next `n` positions."""
        return self.table_address

    def export(self, layer: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of positions start to end - 1: copies, [n_kv_heads, end - start, ...].

        ValueError if the layer no longer holds one of them.
        """
        slots = self._held_slots(layer, start, end)
        return tuple(side[:, slots].copy() for side in self._layers[self.layers.index(layer)])

    def restore(self, layer: int, start: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Write keys and values, as `export` gives them, from position `start` on; `reserve` has made room for them.

        In a chunked layer all positions must be in one chunk: that of the last position that will be held.
        """
        for side, rows in zip(self._layers[self.layers.index(layer)], (keys, values), strict=True):
            side[:, self._slots(layer, start, start + keys.shape[1])] = rows

    def export_segments(self, layer: int) -> np.ndarray:
        """The newest segments of a layer, float16 [2, n_kv_heads, 2 segments, head_dim]: a copy."""
        return self._segments[self.layers.index(layer)].copy()

    def restore_segments(self, layer: int, rows: np.ndarray) -> None:
        """Write what `export_segments` returned."""
        self._segments[self.layers.index(layer)][:] = rows
