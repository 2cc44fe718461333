"""What `llamacli doctor` asks the GPU: whether each kernel computes what the CPU does, and how fast; what a wait costs.

In: blocks as an encoder made them. Out: numbers. Nothing here is used to answer.
"""

from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from llamacli.files.ggml import BY_NAME
from llamacli.files.gguf import GGUF
from llamacli.mlx import kernels, memory
from llamacli.mlx.blocks import FORMATS
from llamacli.mlx.matrix import dequantized

COLUMNS = 5120  # Scout's
WAITS = 50
PAGES = 64  # of a tensor that the GPU is asked to read
GROUP, BITS = 32, 4  # of MLX's own quantized product, for comparison


class KernelCheck(NamedTuple):
    """One type. `error`, `widened_error`: the largest, relative to the largest value; rates in bytes a second."""

    type_name: str
    error: float
    widened_error: float
    rate: float  # of products of one row with weights, bytes of blocks


def check_kernel(type_name: str, encode: Callable[[np.ndarray], np.ndarray], rows: int, experts: int) -> KernelCheck:
    """One row times each of `experts` matrices of [rows, COLUMNS]. `encode`: float32 rows to blocks, uint8 [n, row bytes]."""
    random, few = np.random.default_rng(0), min(rows, 64)
    encoded = np.ascontiguousarray(encode(random.standard_normal((few, COLUMNS), np.float32)))
    weights = dequantized(encoded, type_name, few * COLUMNS).reshape(few, COLUMNS).astype(np.float64)
    stride = rows * BY_NAME[type_name].row_bytes(COLUMNS)
    blocks = np.resize(encoded.reshape(-1).view(np.uint8), experts * stride)  # the same rows again and again
    window = mx.array(np.append(blocks, np.zeros(-blocks.size % 4096, np.uint8)).reshape(-1, 4096))
    matrices = kernels.Matrices(type_name, window, kernels.place(0, rows, COLUMNS, stride), rows)
    x = random.standard_normal((1, COLUMNS), np.float32)
    numbers, given = [mx.array([e], mx.int32) for e in range(experts)], mx.array(x)

    def products() -> list[mx.array]:
        found = [kernels.matvec(matrices, number, given, 1) for number in numbers]
        mx.eval(found)
        return found

    expected = np.resize(x @ weights.T, (1, rows))
    error = max(np.abs(np.array(found) - expected).max() for found in products()) / np.abs(expected).max()
    began = perf_counter()
    products()
    rate = blocks.size / (perf_counter() - began)
    widened = np.array(kernels.widen(type_name, window, matrices.place, numbers[-1], rows, COLUMNS)).astype(np.float64)
    widened_error = np.abs(widened - np.resize(weights, (rows, COLUMNS))).max() / np.abs(weights).max()
    return KernelCheck(type_name, float(error), float(widened_error), rate)


def check_kernels(encoder: Callable[[str], Callable[[np.ndarray], np.ndarray]], megabytes: int) -> list[KernelCheck]:
    """Every type, over about `megabytes` of weights each: more than caches hold."""
    found = []
    for type_name in FORMATS:
        rows = 4096 if megabytes else 64
        one = rows * BY_NAME[type_name].row_bytes(COLUMNS)
        found.append(check_kernel(type_name, encoder(type_name), rows, max(2, (megabytes << 20) // one)))
    return found


class PagesCheck(NamedTuple):
    """A file's tensors as the GPU sees them. `last`: whether the window with the file's last page is adopted.

    `different`: names of tensors of which the GPU read other bytes.
    """

    tensors: int
    adopted: int
    last: bool
    different: list[str]


def check_pages(gguf: GGUF, adopts: bool) -> PagesCheck:
    """Have the GPU compare the last pages of each tensor, where the file is mapped or in a copy, with the file's bytes."""
    adopted, last, different = 0, False, []
    for tensor in sorted(gguf.tensors.values(), key=lambda tensor: tensor.data.ctypes.data):
        window = memory.window(tensor, adopts)
        pages, size = window.array[-PAGES:], window.array.shape[1]
        begin = max(0, (window.array.shape[0] - len(pages)) * size - window.offset)  # of the pages in the tensor
        skipped = max(0, window.offset - (window.array.shape[0] - len(pages)) * size)
        read = mx.array(pages).reshape(-1)[skipped : skipped + tensor.nbytes - begin]
        if not mx.array_equal(read, mx.array(tensor.data.reshape(-1)[begin:])).item():
            different.append(tensor.name)
        adopted, last = adopted + window.adopted, window.adopted
    return PagesCheck(len(gguf.tensors), adopted, last, different)


def own_product_rate(megabytes: int) -> float:
    """Bytes a second of MLX's own product of a row with 4-bit weights in groups of 32, float16."""
    rows = 4096 if megabytes else 64
    count = max(2, (megabytes << 20) // (rows * COLUMNS * 5 // 8))
    w = mx.random.normal((rows, COLUMNS)).astype(mx.float16)
    matrices = [mx.quantize(w + i, group_size=GROUP, bits=BITS) for i in range(count)]
    x = mx.random.normal((1, COLUMNS)).astype(mx.float16)
    mx.eval(matrices, x)
    seconds = 0.0
    for _ in range(2):
        began = perf_counter()
        mx.eval([mx.quantized_matmul(x, *m, transpose=True, group_size=GROUP, bits=BITS) for m in matrices])
        seconds = perf_counter() - began
    return sum(part.nbytes for m in matrices for part in m) / seconds


def wait_seconds() -> float:
    """What one evaluation and the wait for it cost at least: a layer with experts that are fetched needs one."""
    x = mx.zeros(8)
    mx.eval(x + 1)
    began = perf_counter()
    for _ in range(WAITS):
        mx.eval(x + 1)
    return (perf_counter() - began) / WAITS


def memory_held() -> dict[str, int]:
    """Bytes that MLX holds, held at most, and keeps for reuse; adopted pages are not counted."""
    return {"active": mx.get_active_memory(), "peak": mx.get_peak_memory(), "cached": mx.get_cache_memory()}
