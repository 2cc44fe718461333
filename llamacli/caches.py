"""The engine's cache of one sequence: a device.Cache for each stage, with the same position in all of them.

In: the stages' caches. Out: `Cache`, which truncates, exports, restores and copies keys and values of all layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llamacli.errors import UsageError

COPIED = 4096  # positions of a layer that are copied at a time


class Cache:
    """One sequence's keys and values: a device.Cache for each stage, with the same position in all of them."""

    def __init__(self, parts: Sequence, ctx: int):
        self.parts, self.ctx = parts, ctx

    @property
    def pos(self) -> int:
        """Tokens held by all parts."""
        return min(part.pos for part in self.parts)

    @pos.setter
    def pos(self, pos: int) -> None:
        for part in self.parts:
            part.pos = pos

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return sum(part.nbytes for part in self.parts)

    def reserve(self, n: int) -> None:
        """Make room for `n` more tokens. ContextFullError past ctx. UsageError if an interrupted call has overwritten positions
        that the next token attends to; `truncate` returns the last position that is safe.
        """
        if n and any(part.sound(self.pos) < self.pos for part in self.parts):
            raise UsageError(f"expected a cache that holds {self.pos} positions, found an interrupted one: truncate it first")
        for part in self.parts:
            part.reserve(n)

    def truncate(self, pos: int) -> int:
        """Forget tokens from `pos` on; returns the position reached, at most `pos`: evaluate again from there."""
        reached = min(part.truncate(pos) for part in self.parts)
        if any(part.pos > reached for part in self.parts):
            return self.truncate(reached)
        return reached

    def copy_to(self, other: Cache) -> None:
        """Fill an empty cache with what this one holds."""
        layers = [layer for part in self.parts for layer in part.layers]
        held = {layer: self.held(layer) for layer in layers}
        empty = any(len(within) == 0 for within in held.values())  # an empty ring: the position is at a chunk's edge
        other.reserve(min(self.pos + empty, other.ctx))
        for layer, within in held.items():
            for start in range(within.start, within.stop, COPIED):
                other.restore(layer, start, *self.export(layer, start, min(start + COPIED, within.stop)))
            if other._part(layer).segment:
                other._part(layer).restore_segments(layer, self._part(layer).export_segments(layer))
        other.pos = self.pos
        for copy, part in zip(other.parts, self.parts, strict=True):
            copy.copied_from(part)

    def agree(self) -> None:
        """After an interrupt that advanced only some parts: set all to the smallest position."""
        if any(part.pos != self.pos for part in self.parts):
            lowest, self.pos = self.pos, max(part.pos for part in self.parts)
            self.truncate(lowest)

    def held(self, layer: int) -> range:
        """Positions of which a layer's keys and values can be exported."""
        return self._part(layer).held(layer)

    def export(self, layer: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of positions start to end - 1 (device.Cache)."""
        return self._part(layer).export(layer, start, end)

    def restore(self, layer: int, start: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Write what `export` returned; after all layers, set `pos`."""
        part = self._part(layer)
        part.restore(layer, start, keys, values)
        part.in_blocks(start + keys.shape[1])

    def _part(self, layer: int):
        return next(part for part in self.parts if layer in part.layers)
