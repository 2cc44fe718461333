"""Linear maps on MLX, one matrix or one for each expert: raw GGUF blocks that our kernels read, or plain arrays.

In: rows of activations, float32. Out: products, float32. `Blocks` needs a GPU; `Wide` runs everywhere and is what MLX's CPU
build is given. Long prompts on the GPU widen one matrix at a time to float16 and leave the product to MLX.
"""

import ctypes
import math
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from llamacli.cpu.kernels.ops.matmul import microkernels
from llamacli.cpu.weights import as_half, has_kernels
from llamacli.files.gguf import GGUF, Tensor
from llamacli.mlx import kernels
from llamacli.mlx.memory import Window

WIDENED = 256 << 20  # bytes of a matrix that are widened at a time
FEW = 8  # rows that are multiplied with blocks; more of them are worth widening the matrix


class Wide:
    """Weights as an array [n_groups, n_rows, n_cols] in float32 or float16."""

    def __init__(self, values: mx.array, nbytes: int):
        """`nbytes`: what one group takes in the file, for counts of work."""
        self.values, self.nbytes, (self.n_groups, self.n_rows, self.n_cols) = values, nbytes, values.shape

    @classmethod
    def of(cls, gguf: GGUF, tensor: Tensor, dtype: mx.Dtype) -> "Wide":
        """All matrices of a tensor, widened and evaluated."""
        *groups, n_rows, n_cols = tensor.shape
        count = math.prod(tensor.shape)
        values = dequantized(tensor.data, tensor.type.name, count) if has_kernels(tensor) else as_half(gguf, tensor)
        array = mx.array(values.reshape(-1, n_rows, n_cols)).astype(dtype)
        mx.eval(array)
        return cls(array, tensor.nbytes // math.prod(groups))

    @classmethod
    def at(cls, window: Window, type_name: str, shape: tuple[int, int], nbytes: int) -> "Wide":
        """One matrix of a type with kernels, widened; of float32 the bytes themselves, which are read when it is evaluated."""
        if type_name == "F32":
            flat = window.array.reshape(-1)[window.offset : window.offset + nbytes].view(mx.float32)
        else:
            blocks = np.array(window.array, copy=False).reshape(-1)[window.offset :]
            flat = mx.array(dequantized(blocks, type_name, math.prod(shape)))
        return cls(flat.reshape(1, *shape), nbytes)

    def times(self, x: mx.array, expert: int = 0) -> mx.array:
        """x [n, n_cols] times a group's matrix: [n, n_rows]."""
        w = self.values[expert : expert + 1].squeeze(0)  # an int as the index would copy
        return multiply(x, w)

    def times_chosen(self, x: mx.array, experts: mx.array) -> mx.array:
        """Each row of x times the matrix of its own group: [n, n_rows]. Copies the matrices; meant for few rows."""
        return multiply(x[:, None], self.values[experts])[:, 0]


class Blocks:
    """Weights as they lie in a GGUF, of a type that kernels.py has a text for."""

    def __init__(self, window: Window, type_name: str, n_groups: int, n_rows: int, n_cols: int, nbytes: int):
        self.window, self.type_name, self.nbytes = window, type_name, nbytes
        self.n_groups, self.n_rows, self.n_cols = n_groups, n_rows, n_cols
        where = kernels.place(window.offset, n_rows, n_cols, nbytes)
        self.told = kernels.Matrices(type_name, window.array, where, n_rows)
        step, row_bytes = max(1, WIDENED // (2 * n_cols)), nbytes // n_rows
        self._pieces = [
            (kernels.place(window.offset + row * row_bytes, n, n_cols, nbytes), n)
            for row in range(0, n_rows, step)
            for n in [min(step, n_rows - row)]
        ]

    def times(self, x: mx.array, expert: int = 0) -> mx.array:
        """x [n, n_cols] times a group's matrix: [n, n_rows]."""
        if len(x) <= FEW:
            return kernels.matvec(self.told, kernels.number(expert), x, len(x))
        found = []
        for where, n in self._pieces:
            w = kernels.widen(self.type_name, self.window.array, where, kernels.number(expert), n, self.n_cols)
            found.append(multiply(x, w))
            if len(self._pieces) > 1:
                mx.eval(found[-1])  # releases the widened rows
        return found[0] if len(found) == 1 else mx.concatenate(found, 1)

    def times_chosen(self, x: mx.array, experts: mx.array) -> mx.array:
        """Each row of x times the matrix of its own group, which only the device knows: [n, n_rows]."""
        return kernels.matvec(self.told, experts, x, 1)


def dequantized(blocks: np.ndarray, type_name: str, n: int) -> np.ndarray:
    """`n` weights of a type that the CPU has kernels for, float32."""
    values = np.empty(n, np.float32)
    call = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    call(microkernels(type_name).dequantize)(blocks.ctypes.data, n, values.ctypes.data)
    return values


class Fetched(NamedTuple):
    """Weights of a layer's experts that are read when they are needed (streaming.py)."""

    n_groups: int
    n_rows: int
    n_cols: int
    nbytes: int  # of one expert's


def add_product(base: mx.array, w: Blocks | Wide, x: mx.array, experts: mx.array | None = None) -> mx.array:
    """base + x times w, or each row times the matrix of its own group."""
    if isinstance(w, Blocks) and (experts is not None or len(x) in kernels.ROWS):
        tokens = len(x) if experts is None else 1
        return kernels.added(w.told, kernels.number(0) if experts is None else experts, x, tokens, base)
    return base + (w.times(x) if experts is None else w.times_chosen(x, experts))


def gate_up(gate: Blocks | Wide, up: Blocks | Wide, x: mx.array, expert: int = 0, scores: mx.array | None = None) -> mx.array:
    """silu(s x gate) * (s x up), s being a row's score: [n, n_rows]. `scores`: float32 [n, 1]."""
    if len(x) <= FEW and _alike(gate, up):
        return kernels.gated(gate.told, up.told, kernels.number(expert), x, len(x), scores)
    return _swiglu(gate.times(x, expert), up.times(x, expert), scores)


def gate_up_chosen(gate: Blocks | Wide, up: Blocks | Wide, x: mx.array, experts: mx.array, scores: mx.array) -> mx.array:
    """The same, each row through the matrices of its own group."""
    if _alike(gate, up):
        return kernels.gated(gate.told, up.told, experts, x, 1, scores)
    return _swiglu(gate.times_chosen(x, experts), up.times_chosen(x, experts), scores)


def _alike(gate: Blocks | Wide, up: Blocks | Wide) -> bool:
    """Whether one kernel multiplies with both."""
    return isinstance(gate, Blocks) and isinstance(up, Blocks) and gate.type_name == up.type_name


def _swiglu(gate: mx.array, up: mx.array, scores: mx.array | None) -> mx.array:
    if scores is not None:
        gate, up = scores * gate, scores * up
    return gate * mx.sigmoid(gate) * up


def multiply(x: mx.array, w: mx.array) -> mx.array:
    """x w^T, float32. In float16 each row of x is divided by its largest element before, so that nothing overflows."""
    w = w.swapaxes(-1, -2)
    if w.dtype == mx.float32:
        return x @ w
    scale = mx.maximum(mx.abs(x).max(-1, keepdims=True), np.finfo(np.float32).tiny)
    return ((x / scale).astype(w.dtype) @ w).astype(mx.float32) * scale
