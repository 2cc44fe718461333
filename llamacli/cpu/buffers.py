"""Buffers of a CPU stage: one list of names, shapes and types, from which they are allocated and their bytes are counted.

In: a Config, the layers, the most tokens of a batch, threads. Out: `shapes`, and `Buffers` that hold them. A buffer of
activation rows is padded to superblocks of 256 columns; `NAME.codes` beside it is the int8 form for quantized weights.
"""

from math import prod

import numpy as np

from llamacli.cpu.kernels.formats.layout import ACT_BYTES
from llamacli.cpu.kernels.ops import attention, matmul
from llamacli.cpu.kernels.ops.matmul import Rows
from llamacli.llama4.config import Config
from llamacli.positions import segment

MAX_BATCH = 2048  # tokens that go through a layer together: an expert's bytes are read once for all of them
MIN_BATCH = 16  # tokens that there are always buffers for
LOGITS_BATCH = 64  # rows of logits made at a time, so that a long prompt does not ask for gigabytes
ALIGNMENT = 64  # bytes; of a cache line and of the widest vector

Shapes = dict[str, tuple[tuple[int, ...], type]]


def shapes(
    c: Config,
    layers: range,
    n: int,
    threads: int,
    *,
    embeds: bool = True,
    heads: bool = True,
    slots: bool = False,
    kv_file: bool = False,
) -> Shapes:
    """Every buffer of a stage for up to `n` tokens: name to (shape, type).

    `embeds`, `heads`: whether the stage looks up embeddings, makes logits. `slots`: whether its experts are fetched. `kv_file`:
    whether keys and values are (kvfile.py).
    """
    mixtures = [c.is_moe(i) for i in layers]
    used = c.n_experts_used if any(mixtures) else 0
    n_experts, n_ff_exp = (c.n_experts, c.n_ff_exp) if used else (0, 0)
    n_ff = max((c.n_ff_exp if mixture else c.n_ff for mixture in mixtures), default=0)
    pairs, q, kv = n * max(1, used), c.n_q, c.n_kv
    found: Shapes = {}

    def rows(name: str, count: int, width: int, codes: bool = False) -> None:
        supers = -(-width // 256)
        found[name] = (count, supers * 256), np.float32
        if codes:
            found[name + ".codes"] = (count, supers * ACT_BYTES), np.int8

    rows("x", n, c.n_embd)
    rows("h", n, c.n_embd, codes=True)
    if embeds:
        found |= {"ids": ((n,), np.int64), "rows": ((n,), np.int64)}
    if layers:
        rows("q", n, q)
        rows("k", n, kv)
        rows("v", n, kv)
        rows("attended", n, q, codes=True)
        rows("gate", n, n_ff, codes=True)
        rows("up", n, n_ff)
        found["angles"] = (n, c.head_dim), np.float32
        found |= {name: ((n,), np.int64) for name in ("positions", "tables")}
        found["blocks"] = (n, 4), np.int64
        found["attention_scratch"] = (threads, attention.Scratch.of(c.head_dim, segment(c)).end), np.uint8
        if kv_file:
            found["carried"] = (n, c.n_heads, 2), np.float32
    if used:
        rows("router", n, n_experts)
        rows("gate_exps", pairs, n_ff_exp, codes=True)
        rows("up_exps", pairs, n_ff_exp)
        found |= {"scores": ((pairs,), np.float32), "moe": ((n_experts + 1 + pairs,), np.int64)}
        found["chosen"] = (len(layers), pairs), np.int64
    if used and slots:
        found |= {"window": ((2,), np.int64), "guess": ((pairs,), np.int64)}
        found["guess_table"] = (n_experts + 1 + pairs,), np.int64
    if heads:
        found["logits"] = (min(n, LOGITS_BATCH), c.n_vocab), np.float32
    found |= {"state": ((8,), np.int64), "dense": ((n + 2,), np.int64)}
    found["scratch"] = (threads, matmul_scratch(c, layers, n, heads).end), np.uint8
    return found


def matmul_scratch(c: Config, layers: range, n: int, heads: bool) -> matmul.Scratch:
    """The layout of each thread's scratch for the products of a stage."""
    mixture = any(c.is_moe(i) for i in layers)
    widest = max(c.n_embd, c.n_q, *(c.n_ff_exp if c.is_moe(i) else c.n_ff for i in layers), 0)
    tallest = max(widest, c.n_experts if mixture else 0, c.n_vocab if heads else 0)
    return matmul.Scratch.of(n * (c.n_experts_used if mixture else 1), tallest, widest)


def tokens(c: Config, pairs: int) -> int:
    """Tokens of a batch of at most `pairs` pairs of a token and one of its experts; MIN_BATCH at least."""
    used = c.n_experts_used if any(map(c.is_moe, range(c.n_layers))) else 0
    return max(MIN_BATCH, pairs // max(1, used))


def nbytes(shapes: Shapes) -> int:
    """Bytes of all buffers."""
    return sum(prod(shape) * np.dtype(dtype).itemsize for shape, dtype in shapes.values())


class Buffers:
    """Zeroed arrays by name, aligned to cache lines."""

    def __init__(self, shapes: Shapes):
        self.arrays = {name: _aligned(shape, dtype) for name, (shape, dtype) in shapes.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def address(self, name: str) -> int:
        """Where a buffer begins."""
        return self.arrays[name].ctypes.data

    def rows(self, name: str) -> Rows:
        """A buffer of activation rows and its codes, for kernels."""
        values, codes = self.arrays[name], self.arrays.get(name + ".codes")
        beside = (0, 0) if codes is None else (codes.ctypes.data, codes.strides[0])
        return Rows(values.ctypes.data, values.strides[0], *beside)


def _aligned(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    size = prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)
