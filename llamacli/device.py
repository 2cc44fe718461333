"""The interface of devices: a stage runs some layers, a cache keeps their keys and values.

The engine is a row of stages. The first looks up embeddings, the last makes logits; both may have layers as well or none.
Between two stages goes the residual stream, float32 [n_tokens, n_embd], and nothing else. How a device stores weights, which
threads or queues it uses and where its experts come from is its own business.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import NamedTuple, Protocol

import numpy as np

from llamacli.errors import DeviceError


class Abandoned(DeviceError):
    """A batch was given up because another call failed: evaluate it again."""


class Tokens(NamedTuple):
    """Input of the first stage: ids, int64 [n], and for some of them a row that is used in place of the embedding."""

    ids: Sequence[int]
    rows: dict[int, np.ndarray]  # position in `ids` to float32 [n_embd]


class Cache(Protocol):
    """Keys and values of some layers for one sequence, up to `ctx` positions."""

    layers: range
    pos: int  # positions held: 0 to pos - 1; the next token gets position `pos`
    segment: int  # positions of a segment (positions.py), 0: there are none

    @property
    def nbytes(self) -> int:
        """Bytes held."""

    def reserve(self, n: int) -> None:
        """Make room for `n` more positions; ContextFullError past ctx."""

    def truncate(self, pos: int) -> int:
        """Forget positions from `pos` on. Returns the position reached, which may be smaller: evaluate again from there."""

    def sound(self, pos: int) -> int:
        """The largest position up to `pos` from which evaluation can continue without `truncate`."""

    def held(self, layer: int) -> range:
        """Positions whose keys and values of a layer can be exported."""

    def export(self, layer: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of positions start to end - 1, a copy: float16 [n_kv_heads, end - start, head_dim] each, or, of a
        cache in blocks (config.kv_type), uint8 [n_kv_heads, end - start, kv_row_bytes]. Caches of one type can exchange them.
        """

    def restore(self, layer: int, start: int, keys: np.ndarray, values: np.ndarray) -> None:
        """Write what `export` returned, from position `start` on, after `reserve`. Set `pos` when all layers are restored."""

    def export_segments(self, layer: int) -> np.ndarray:
        """The newest segments of a layer, a copy; empty where there are none."""

    def restore_segments(self, layer: int, rows: np.ndarray) -> None:
        """Write what `export_segments` returned."""

    def in_blocks(self, end: int) -> None:
        """Note that positions below `end` were restored in blocks, without their segments."""

    def copied_from(self, other: "Cache") -> None:
        """Copy the state of `other` except its keys and values, which were restored here."""


class Run(NamedTuple):
    """`n` consecutive tokens of one sequence in a batch, the first at position `cache.pos`.

    A run does not cross the edge of a chunk, and the cache has room for it.
    """

    cache: Cache
    n: int


@dataclass
class IoStats:
    """Counts of cache hits, prefetches and reads."""

    hits: int = 0  # experts that were in a slot when a layer's tokens chose them
    misses: int = 0
    bytes_read: int = 0
    guesses: int = 0  # experts prefetched for a single token, and how many of them it then chose
    good_guesses: int = 0
    stall_s: float = 0.0  # waiting for reads
    reading_s: float = 0.0  # with at least one read in flight
    kv_bytes: int = 0  # of keys and values that were read from their file; the seconds count for these as well

    def __add__(self, other: "IoStats") -> "IoStats":
        return IoStats(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __str__(self) -> str:
        nbytes = self.bytes_read + self.kv_bytes
        speed = f" at {nbytes / self.reading_s / 1e9:.2f} GB/s" if self.reading_s else ""
        asked = f"{self.hits} found in memory, {self.misses} not" if self.hits + self.misses else "no experts asked for"
        keys = f", {self.kv_bytes / 1e6:.0f} of it keys and values" if self.kv_bytes else ""
        if self.guesses:
            asked += f", {self.good_guesses} of {self.guesses} guesses were right"
        return f"{asked}; {nbytes / 1e6:.0f} MB read{keys}{speed}, {self.stall_s:.2f} s waited"


class Stage(Protocol):
    """Layers i..j on one device. The engine calls a stage from one thread at a time, but for `interrupt`."""

    layers: range
    notices: list[str]  # what a user should know about the weights and how they are read
    bytes_per_token: int  # bytes of weights read to decode one token
    products_per_token: int  # multiply-adds of the layers' weights for one token
    alike: int  # sequences, one token each, that may share a call with results identical to separate calls; 1 if unknown
    alone: bool  # if set, each token's result should have the bits of a call of its own; a device may ignore it
    timings: Counter | None  # if set, seconds by (layer or None, operation) are added here
    follow: Callable[[float], None] | None  # if set, called now and then inside `forward`, with the share of it that is done

    def new_cache(self, ctx: int) -> Cache:
        """An empty cache of the stage's layers for one sequence."""

    def forward(self, x: Tokens | np.ndarray, runs: Sequence[Run]) -> np.ndarray:
        """The residual stream after the stage's layers, float32 [n, n_embd], for tokens of one or several sequences, one after
        the other.

        `x`: the stream before them, or Tokens for the first stage. Writes keys and values beyond `cache.pos` and leaves `pos`
        to the caller, so that an interrupted call leaves the cache as it was. The result may be a view that is valid until the
        stage's next call. The last stage may return a pending result, which `logits` or np.asarray waits for.
        """

    def logits(self, x: np.ndarray, first: int = 0) -> np.ndarray:
        """Logits of the rows x[first:] of the stream, float32 [len(x) - first, n_vocab]; of the last stage only."""

    def interrupt(self) -> None:
        """From another thread: make the running call raise KeyboardInterrupt soon."""

    def shrink(self, nbytes: int) -> int:
        """Release up to `nbytes` bytes of weights that can be read again; returns the bytes released."""

    def resume(self) -> None:
        """Clear an interrupt before the next call."""

    def abandon(self) -> None:
        """After a failure: discard batches whose results were not read, and set `pos` of their caches back to before them."""

    def chosen(self, n: int) -> np.ndarray:
        """The experts that the last batch's `n` tokens chose, int64 [layers, n * n_experts_used]."""

    def watch(self) -> list:
        """From now on sum the squares of all inputs to the layers' products; begins anew (cpu/operations.Inputs)."""

    def take_io_stats(self) -> IoStats | None:
        """The counts since the last call, None if nothing is fetched."""

    def after_fork(self) -> None:
        """In a forked child: drop state that a thread of the parent may have been changing."""

    def close(self) -> None:
        """Release threads and memory; no other call may follow."""
