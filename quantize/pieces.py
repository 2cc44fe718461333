"""Tensors in pieces of a few rows, each read, checked and encoded by itself, on threads of this machine or elsewhere.

In: planned tensors, perhaps weights of their columns. Out: the bytes of the pieces in file order, each with its error: the sums
of (x - q)^2 and of x^2. What a piece becomes depends on nothing but its rows, so that it does not matter who encodes it.
"""

import mmap
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from llamacli.cpu.kernels.runtime.faults import Guard
from llamacli.errors import ModelFileError
from llamacli.files.ggml import TensorType
from quantize import sources
from quantize.encoders import encoder, widen
from quantize.plan import Planned

CHUNK = 1 << 19  # weights of a piece: its floats fit a core's L2 cache
LARGEST = float(np.finfo(np.float32).max)

Encoded = tuple[np.ndarray, tuple[float, float]]  # bytes, and the error


class Piece(NamedTuple):
    """Rows of a group."""

    group: int
    first: int
    count: int


def pieces(source: sources.Rows, part: Piece | None = None) -> Iterator[Piece]:
    """All pieces, of about CHUNK weights, in file order; with `part`, which begins and ends as pieces do, those of it."""
    n_groups, n_rows = sources.groups_and_rows(source.shape)
    parts = [part] if part else (Piece(group, 0, n_rows) for group in range(n_groups))
    step = max(1, CHUNK // source.shape[-1] // source.unit) * source.unit
    for group, start, count in parts:
        for first in range(start, start + count, step):
            yield Piece(group, first, min(step, start + count - first))


class Elsewhere(Protocol):
    """Encodes on other machines (llamacli/cluster/tasks.py)."""

    done: dict[str, int]  # bytes that each machine has made

    def begin(self, path: Path, source, encode: "PieceEncoder") -> int:
        """Find machines with the same source (opening.Source); the bytes that its results take here at most."""

    def encoded(self, tensor: Planned, weights: np.ndarray | None) -> Iterator[Encoded]:
        """As Threads.encoded."""


_scratch = threading.local()


class PieceEncoder:
    """Reads, checks and encodes pieces; threads may share it."""

    def __init__(self, maps: dict[Path, mmap.mmap]):
        """`maps`: the source's mapped files."""
        self._paths, self._guard = list(maps), Guard(list(maps.values()))

    def __call__(self, name: str, kind: TensorType, source: sources.Rows, piece: Piece, weights: np.ndarray | None) -> Encoded:
        """`weights`: the group's. CheckpointError: a weight cannot be encoded. ModelFileError: a file was cut."""
        group, first, count = piece
        row, size = source.shape[-1], count * source.shape[-1]
        if getattr(_scratch, "floats", np.empty((2, 0))).shape[1] < size:
            _scratch.floats = np.empty((2, size), np.float32)
        values, back = (floats[:size].reshape(count, -1) for floats in _scratch.floats)
        raw = source.raw(kind.name)  # bytes to be copied, once their values are checked
        format = encoder(kind.name) if raw is None else None
        source.read(group, first, values)
        sources.check(values, format.limit if format else LARGEST, name, kind.name)
        if format is None:
            start, nbytes = group * sources.groups_and_rows(source.shape)[1] + first, kind.row_bytes(row)
            found = raw[start * nbytes : (start + count) * nbytes].copy()  # no view: the file may be cut
            errors = widen.squares(values, values)
        else:
            found = format.encode(values, weights)
            errors = widen.error(kind.name, found, values, back)
        if (part := self._guard.broken) is not None:
            path = self._paths[part]
            raise ModelFileError(f"{path}: expected to read all of {name}, found the file cut or its disk failing; restore it")
        return found, errors


class Threads:
    """Encodes on threads of this process, which end with `close`."""

    def __init__(self, encode: PieceEncoder, threads: int):
        self._encode, self._threads = encode, threads
        self._pool = ThreadPoolExecutor(threads, "encode")

    def encoded(self, tensor: Planned, weights: np.ndarray | None) -> Iterator[Encoded]:
        """The tensor's pieces; encoding runs ahead by up to two pieces a thread. `weights`: float32 [n_groups, n_cols]."""
        waiting = deque()
        for piece in pieces(tensor.source):
            own = None if weights is None else weights[piece.group]
            waiting.append(self._pool.submit(self._encode, tensor.name, tensor.type, tensor.source, piece, own))
            if len(waiting) > 2 * self._threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def close(self) -> None:
        """Wait for the pieces in progress and cancel the others."""
        self._pool.shutdown(wait=True, cancel_futures=True)
