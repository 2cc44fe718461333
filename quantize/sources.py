"""Reads rows of a source tensor as float32, however the source stores them.

In: a tensor of a checkpoint, a tensor of a GGUF, or a computed array. Out: `Rows`, with the shape that the tensor will have in
the GGUF. A tensor of three axes is a group of matrices (experts); every other tensor is one group. Nothing is cached: a read
touches only the mapped bytes that it needs, and several threads may read at once.
"""

import math
from pathlib import Path
from typing import Protocol

import numpy as np

from llamacli.errors import CheckpointError
from llamacli.files.ggml import dequantize
from llamacli.files.gguf import Tensor
from quantize.encoders import widen
from quantize.safetensors import Stored


class Rows(Protocol):
    """A source tensor. `shape` is in NumPy's order, row length last; rows are read fastest in multiples of `unit`; `paths` are
    the files that hold it.
    """

    shape: tuple[int, ...]
    unit: int
    paths: frozenset[Path]

    def read(self, group: int, first: int, out: np.ndarray) -> None:
        """Fill `out`, float32 [rows, row length], with the rows of one group from `first` on."""

    def raw(self, type_name: str) -> np.ndarray | None:
        """The bytes of the whole tensor if it is already stored in that type, else None."""


_WIDEN = {  # bytes or numbers of one dtype [rows, n] to float32 [rows, row length]
    "BF16": lambda block, out: widen.bf16(block.view(np.uint16), out.view(np.uint32)),
    "F16": lambda block, out: widen.f16(block.view(np.int16), out),
    "F32": lambda block, out: np.copyto(out, block.view(np.float32)),
}


def _scales(scale: Stored, first: int, count: int) -> np.ndarray:
    """float32 [count]: the scales of the rows from `first` on. `scale` holds one for the tensor, or one for each row."""
    flat = scale.data.reshape(1, -1)
    block = flat if flat.size == 1 else flat[:, first : first + count]
    found = np.empty(block.shape, np.float32)
    _WIDEN[scale.dtype](np.require(block, requirements="CA"), found)
    return np.ascontiguousarray(np.broadcast_to(found[0], count))


def groups_and_rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """The number of groups, and of rows in each."""
    return (shape[0], shape[1]) if len(shape) == 3 else (1, math.prod(shape[:-1]))


class InMemory:
    """An array in memory."""

    unit, paths = 1, frozenset()

    def __init__(self, values: np.ndarray):
        self.shape, self._values = values.shape, values.reshape(-1, values.shape[-1])

    def read(self, group: int, first: int, out: np.ndarray) -> None:
        out[...] = self._values[first : first + len(out)]

    def raw(self, type_name: str) -> None:
        return None


class Plain:
    """A vector or matrix of a checkpoint, stored in the order of the GGUF."""

    unit = 1

    def __init__(self, stored: Stored):
        self.shape, self._dtype, self.paths = stored.shape, stored.dtype, frozenset([stored.path])
        self._rows = stored.data.reshape(-1, stored.shape[-1])

    def read(self, group: int, first: int, out: np.ndarray) -> None:
        block = self._rows[first : first + len(out)]
        _WIDEN[self._dtype](np.require(block, requirements="CA"), out)

    def raw(self, type_name: str) -> None:
        return None


class Scaled:
    """An FP8 matrix with one scale, or with one for each row."""

    unit = 1

    def __init__(self, stored: Stored, scale: Stored):
        self.shape, self._stored, self._scale = stored.shape, stored, scale
        self.paths = frozenset([stored.path, scale.path])

    def read(self, group: int, first: int, out: np.ndarray) -> None:
        block = self._stored.data[first : first + len(out)]
        widen.fp8(block, *widen.FP8[self._stored.dtype], _scales(self._scale, first, len(out)), out)

    def raw(self, type_name: str) -> None:
        return None


class Stack:
    """Matrices of one shape, stored one by one, as the groups of one tensor."""

    unit = 1

    def __init__(self, matrices: list[Rows]):
        self.shape, self._matrices = (len(matrices), *matrices[0].shape), matrices
        self.paths = frozenset().union(*(matrix.paths for matrix in matrices))

    def read(self, group: int, first: int, out: np.ndarray) -> None:
        self._matrices[group].read(0, first, out)

    def raw(self, type_name: str) -> None:
        return None


class Transposed:
    """A stack of matrices x @ W [groups, row length, of * rows]: part `at` of `of` of their columns, read as rows.

    FP8 has one scale for the tensor, one for each group, or one for each group and column.
    """

    unit = widen.LINE

    def __init__(self, stored: Stored, at: int, of: int, scale: Stored | None = None):
        n_groups, n_cols, n_columns = stored.shape
        n_rows = n_columns // of
        self.shape, self._dtype = (n_groups, n_rows, n_cols), stored.dtype
        self.paths = frozenset([stored.path] if scale is None else [stored.path, scale.path])
        self._stack = stored.data[:, :, at * n_rows : (at + 1) * n_rows]
        if scale is not None:
            per_group = scale.data.reshape(n_groups if scale.data.size >= n_groups else 1, -1)
            per_group = per_group if per_group.shape[1] == 1 else per_group[:, at * n_rows : (at + 1) * n_rows]
            rows = np.broadcast_to(per_group, (n_groups, per_group.shape[1]))
            self._scales = [scale._replace(values=row) for row in rows]

    def read(self, group: int, first: int, out: np.ndarray) -> None:
        block = self._stack[group, :, first : first + len(out)]
        if self._dtype == "BF16":
            widen.bf16_transposed(np.require(block, requirements="A"), out.view(np.uint32))
        elif self._dtype in widen.FP8:
            scales = _scales(self._scales[group], first, len(out))
            widen.fp8_transposed(block, *widen.FP8[self._dtype], scales, out)
        else:
            out[...] = block.T

    def raw(self, type_name: str) -> None:
        return None


class Dequantized:
    """A tensor of a GGUF, in any type that the engine or gguf-py can dequantize."""

    unit = 1

    def __init__(self, tensor: Tensor):
        self.shape, self._tensor, self.paths = tensor.shape, tensor, frozenset([tensor.path])
        _, self._n_rows = groups_and_rows(tensor.shape)
        self._rows = tensor.data.reshape(-1, tensor.type.row_bytes(tensor.shape[-1]))

    def read(self, group: int, first: int, out: np.ndarray) -> None:
        start = group * self._n_rows + first
        block, kind = self._rows[start : start + len(out)], self._tensor.type
        if kind.name in _WIDEN:
            _WIDEN[kind.name](np.require(block, requirements="CA"), out)
            return
        if widen.blocks(kind.name, np.require(block, requirements="C"), out):
            return
        out[...] = dequantize(block, kind, f"tensor {self._tensor.name}")

    def raw(self, type_name: str) -> np.ndarray | None:
        return self._tensor.data if self._tensor.type.name == type_name else None


def check(values: np.ndarray, limit: float, name: str, type_name: str) -> None:
    """CheckpointError if a weight is NaN, infinite, or too large for the type that will be written."""
    largest = widen.largest(values.reshape(-1).view(np.uint32))
    if largest <= limit:
        return
    if not np.isfinite(largest):
        raise CheckpointError(f"tensor {name}: expected finite weights, found NaN or infinity; the checkpoint is damaged")
    raise CheckpointError(f"tensor {name}: expected weights up to {limit:g} in {type_name}, found {largest:g}; choose BF16")
