"""The cache of a sequence on a cluster: its positions and the tokens evaluated at them; the nodes hold its keys and values.

In: positions, and the batches in which tokens were evaluated. Out: `ClusterCache` (device.Cache); `parts`, the batches that
recompute keys and values with the same bits after a node was lost.
"""

import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from llamacli.device import Tokens
from llamacli.positions import Positions

FEW = 4  # batches of fewer tokens have the bits of single tokens on every processor (cpu/kernels/ops/matmul.py)
AGAIN = FEW - 1  # single tokens that are evaluated together when keys and values are recomputed


class Piece(NamedTuple):
    """Tokens of one batch, from `start` on: ids, rows in place of embeddings, whether the bits are those of single tokens."""

    start: int
    tokens: Tokens
    alone: bool


class ClusterCache(Positions):
    """The positions of a sequence whose keys and values the nodes hold (device.Cache)."""

    numbers = itertools.count(1)

    def __init__(self, stage, ctx: int):
        super().__init__(stage.config, ctx)
        self.number, self._stage = next(self.numbers), stage
        self.pieces: list[Piece] = []  # evaluated batches, in order
        self.opened = 0  # number of the row of nodes (ClusterStage.opened) that holds the keys and values
        self._reserved = 0
        weakref.finalize(self, stage.free, self.number)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values of all sequences on the nodes."""
        return self._stage.held_bytes()

    def reserve(self, n: int) -> None:
        """Count `n` more positions; the nodes make room when they are written. ContextFullError past ctx."""
        self._reserved = self._claim(n)

    def truncate(self, pos: int) -> int:
        """Forget tokens from `pos` on (device.Cache). Their record stays until other tokens replace them, as their keys and
        values stay on the nodes.
        """
        self._stage.abandon_after(self, pos)
        return super().truncate(pos)

    def take(self, piece: Piece) -> None:
        """Record an evaluated batch. Consecutive single tokens form one piece."""
        while self.pieces and self.pieces[-1].start >= piece.start:
            self.pieces.pop()
        if self.pieces and piece.alone and (last := self.pieces[-1]).alone:
            held = piece.start - last.start
            if len(last.tokens.ids) >= held and not last.tokens.rows and not piece.tokens.rows:
                del last.tokens.ids[held:]
                last.tokens.ids.extend(map(int, piece.tokens.ids))
                return
        self.pieces.append(piece._replace(tokens=Tokens([int(id) for id in piece.tokens.ids], piece.tokens.rows)))

    def export(self, layer: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of a layer, from its node."""
        where = {"cache": self.number, "ctx": self.ctx, "pos": self.pos, "layer": layer, "start": start, "end": end}
        keys, values = self._stage.ask_for(layer, "export", where).arrays
        return keys, values

    def restore(self, layer: int, start: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Write what `export` returned to the layer's node."""
        where = {"cache": self.number, "ctx": self.ctx, "pos": self.pos, "layer": layer, "start": start}
        self._stage.ask_for(layer, "restore", where | {"reserved": self._reserved - self.pos}, (keys, values))

    def export_segments(self, layer: int) -> np.ndarray:
        """The newest segments of a layer, from its node."""
        where = {"cache": self.number, "ctx": self.ctx, "layer": layer}
        (rows,) = self._stage.ask_for(layer, "export_segments", where).arrays
        return rows

    def restore_segments(self, layer: int, rows: np.ndarray) -> None:
        """Write what `export_segments` returned to the layer's node."""
        where = {"cache": self.number, "ctx": self.ctx, "layer": layer}
        self._stage.ask_for(layer, "restore_segments", where, (rows,))

    def copied_from(self, other: "ClusterCache") -> None:
        """Copy the record of `other`, whose keys and values were copied here."""
        super().copied_from(other)
        self.opened = other.opened
        self.pieces = [piece._replace(tokens=Tokens([*piece.tokens.ids], piece.tokens.rows)) for piece in other.pieces]


def covered(pieces: Sequence[Piece], end: int) -> bool:
    """Whether pieces, of which each may replace the end of those before it, make all positions below `end`."""
    reached = 0
    for start, tokens, _ in pieces:
        if start > reached:
            break
        reached = start + len(tokens.ids)
    return reached >= end


def parts(pieces: Sequence[Piece], end: int, chunk: int) -> Iterator[tuple[Tokens, int, bool]]:
    """The batches of pieces below `end`: tokens, first position, whether the bits are those of single tokens."""
    for start, tokens, alone in pieces:
        at, n = 0, len(tokens.ids)
        while at < n and start + at < end:
            step = n - at
            if alone and not tokens.rows:
                step = min(step, AGAIN, end - start - at, chunk - (start + at) % chunk if chunk else AGAIN)
            yield Tokens(tokens.ids[at : at + step], tokens.rows), start + at, alone
            at += step
