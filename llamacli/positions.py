"""Which positions of a sequence the layers of a stage hold: the part of a KV cache that is the same on every device.

In: a Config, a limit, layers. Out: `Positions`, from which caches derive. A chunked layer keeps at most one chunk (a ring,
slot = position mod chunk); a global layer keeps everything.

Rounding to four bits costs most at the newest tokens (docs/context.md). So positions of a cache in Q4_0 form segments: a token
sees keys and values of its own segment in half precision, older ones in blocks. Segments begin at multiples of a number that
divides a chunk, so what a token sees depends on its position alone, not on how a text was cut into batches. The newest two are
held in half precision, beside all positions in blocks, so that guesses across an edge can be taken back.
"""

from math import gcd

import numpy as np

from llamacli.errors import ContextFullError
from llamacli.llama4.config import Config

SEGMENT = 32  # positions
LEAST = 8  # positions of a segment, so that all guesses of a call can be taken back (speculation.py)


def segment(config: Config) -> int:
    """Positions of a segment; 0 where there are none: for a type that needs none, or if no LEAST positions divide a chunk."""
    size = gcd(SEGMENT, config.chunk_size)
    return size if config.kv_type == "Q4_0" and size >= LEAST else 0


class Positions:
    """Positions 0 to `pos` - 1 are held, at most `ctx`; derived classes keep the keys and values (see device.Cache)."""

    def __init__(self, config: Config, ctx: int, layers: range | None = None):
        """`layers`: those of the stage; None: all."""
        self.layers = range(config.n_layers) if layers is None else layers
        self.ctx, self.pos = ctx, 0
        self.segment, self._halves = segment(config), 0  # _halves: no position below it is held in half precision
        self._newest = -1  # the highest position that may ever have been written; survives truncation and interrupts
        self._chunks = [config.chunk_size if config.uses_rope(i) else 0 for i in self.layers]

    def _claim(self, n: int) -> int:
        """`n` more positions will be written; returns the number then held. ContextFullError past ctx."""
        need = self.pos + n
        if need > self.ctx:
            raise ContextFullError(f"the context is full: {need} tokens do not fit the limit of {self.ctx}; raise it with -c")
        if n:
            self._newest = need - 1
        if n and self.segment:
            held = min(self._halves, self.pos)  # later positions are written in half precision
            self._halves = max(held, (self._newest // self.segment - 1) * self.segment)
        return need

    def truncate(self, pos: int) -> int:
        """Forget tokens from `pos` on; returns the position reached, at most `pos`: evaluate again from there.

        A ring holds only the chunk that was last written to, even if its tokens have been forgotten since. To go back into an
        older one, its tokens must be evaluated again from its start. The same holds for segments.
        """
        pos = max(0, min(pos, self.pos))
        chunk = max(self._chunks, default=0)
        if chunk and pos < self.pos and max(self.pos - 1, self._newest) // chunk != pos // chunk:
            pos = pos // chunk * chunk
        self.pos = self.sound(pos)
        return self.pos

    def sound(self, pos: int) -> int:
        """The largest position up to `pos` from which evaluation can continue: `pos`, or the start of its segment if that is
        not held in half precision.
        """
        start = pos // self.segment * self.segment if self.segment else pos
        return start if start < self._halves else pos

    def in_blocks(self, end: int) -> None:
        """Note that positions below `end` were restored: none of them is held in half precision."""
        self._halves = max(self._halves, end)

    def copied_from(self, other: "Positions") -> None:
        """Copy the state of `other`, whose keys and values were copied here."""
        self._newest, self._halves = max(self._newest, other._newest), other._halves

    def export_segments(self, layer: int) -> np.ndarray:
        """The newest two segments of a layer; empty where there are none."""
        return np.empty(0, np.float16)

    def restore_segments(self, layer: int, rows: np.ndarray) -> None:
        """Write what `export_segments` returned."""

    def held(self, layer: int) -> range:
        """Positions of a layer that can be exported: all, or those of the chunk that was last written to."""
        chunk = self._chunks[self.layers.index(layer)]
        if not chunk or not self.pos:
            return range(self.pos)
        start = max(self.pos - 1, self._newest) // chunk * chunk
        return range(min(start, self.pos), self.pos)

    def _held_slots(self, layer: int, start: int, end: int) -> slice:
        """Slots of positions start to end - 1; ValueError if the layer no longer holds one of them."""
        held = self.held(layer)
        if start < end and not (held.start <= start and end <= held.stop):
            raise ValueError(f"layer {layer} holds positions {held.start} to {held.stop - 1}, not {start} to {end - 1}")
        return self._slots(layer, start, end)

    def _slots(self, layer: int, start: int, end: int) -> slice:
        """Slots of positions start to end - 1; ValueError if they are not of one chunk."""
        chunk = self._chunks[self.layers.index(layer)]
        if chunk and start < end and start // chunk != (end - 1) // chunk:
            raise ValueError(f"positions {start} to {end - 1} of layer {layer} are not of one chunk")
        first = start % chunk if chunk else start
        return slice(first, first + end - start)

    def _capacity(self, layer: int, held: int, need: int) -> int:
        """Slots to allocate for a layer that has `held` and needs `need`: twice as many, at most the number that it can use."""
        chunk = self._chunks[self.layers.index(layer)]
        if held >= need or (chunk and held == chunk):
            return held
        return min(max(need, 2 * held, 256), chunk or self.ctx, self.ctx)
