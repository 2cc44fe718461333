"""Speed of single kernels for each tensor type: `python tests/leaves.py [TYPE ...] [--ggml libggml-cpu.so] [-t 2] ...`.

Out, a table: "decode", GB/s of rows that one token is multiplied with, of more bytes than a cache holds; "prefill", Gop/s (a
multiply-add is two) of products with many tokens, unpacking included, one column for each count of `--tokens`. `LLAMACLI_SIMD`
chooses the variant. Above the table are the limits that `llamacli bench` measures. With --ggml the same for `vec_dot` of ggml's
CPU library, on as many threads, its products with 16 rows by 16 tokens from the nearest cache: llama.cpp uses these without a
repacked copy of the weights. Measurements alternate, and the median of the rounds is shown.
"""

import argparse
import ctypes
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from time import perf_counter

import numpy as np

from llamacli.bench.limits import multiply_gops, read_gbps
from llamacli.cpu.kernels.formats import layout
from llamacli.cpu.kernels.jit.intrinsics import call, compiled, run
from llamacli.cpu.kernels.jit.loader import chosen_target, load
from llamacli.cpu.kernels.ops import matmul, vectors
from llamacli.cpu.kernels.runtime.pool import Pool
from llamacli.cpu.kernels.runtime.program import Program
from llamacli.files.ggml import BY_NAME
from quantize.encoders import encoder

COLS, PANEL_ROWS, SIDE = 2560, 2048, 16
LEAST_SECONDS = 0.02  # of one measurement
ACTIVATIONS = {8: (34, 32), 9: (36, 32), 15: (292, 256)}  # bytes and values of blocks of Q8_0, Q8_1, Q8_K (ggml-common.h)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("types", nargs="*", default=[*layout.QUANTIZED])
    parser.add_argument("--ggml", help="path of libggml-cpu.so")
    parser.add_argument("--tokens", default="240,32")
    parser.add_argument("--megabytes", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-t", "--threads", type=int, default=2)
    asked = parser.parse_args()
    counts = [int(n) for n in asked.tokens.split(",")]
    print(f"{chosen_target().name}, {asked.threads} threads; limits: {read_gbps(asked.threads):.1f} GB/s, "
          f"{multiply_gops(asked.threads):.0f} Gop/s\n")  # fmt: skip
    ggml = Ggml(asked.ggml, asked.threads) if asked.ggml else None
    heads = ["type", "decode, GB/s", *(f"prefill {n}, Gop/s" for n in counts)]
    heads += ["ggml decode", "ratio", "ggml prefill", "ratio"] if ggml else []
    print("|", " | ".join(heads), "|\n" + "|---" * len(heads) + "|")
    for name in asked.types:
        rows = _rows(name, asked.megabytes << 20)
        works = {"decode": _product(name, rows, 1, asked.threads)}
        works |= {n: _product(name, rows[:PANEL_ROWS], n, asked.threads) for n in counts}
        works |= {"ggml decode": ggml.decode(name, rows), "ggml prefill": ggml.products(name, rows)} if ggml else {}
        speeds = {work: [] for work in works}
        for n in range(asked.rounds + 1):
            for work, (function, amount) in works.items():
                speed = _speed(function, amount)
                if n:  # the first round warms up
                    speeds[work].append(speed)
        found = {work: median(v) / 1e9 for work, v in speeds.items()}
        cells = [name, f"{found['decode']:.1f}", *(f"{found[n]:.0f}" for n in counts)]
        for ours, theirs in (("decode", "ggml decode"), (counts[0], "ggml prefill")) if ggml else ():
            cells += [
                f"{found[theirs]:.0f}" if ours in counts else f"{found[theirs]:.1f}",
                f"{found[ours] / found[theirs]:.2f}",
            ]
        print("|", " | ".join(cells), "|", flush=True)


def _speed(function, amount):
    start, times = perf_counter(), 0
    while (seconds := perf_counter() - start) < LEAST_SECONDS:
        function()
        times += 1
    return amount * times / seconds


def _rows(name, nbytes):
    """Rows of normal weights of this type, repeated up to `nbytes` bytes."""
    some = encoder(name).encode(np.random.default_rng(0).standard_normal((64, COLS)).astype(np.float32), None)
    return np.ascontiguousarray(np.resize(some, (max(PANEL_ROWS, nbytes // some.shape[1] // 64 * 64), some.shape[1])))


def _product(name, rows, n, threads):
    """(function, bytes of weights for one token or else operations) of the product of all rows with n tokens."""
    n_rows = len(rows)
    quantize = load("vectors-128", vectors.build(128), vectors.SYMBOLS)["quantize"]
    x = np.random.default_rng(1).standard_normal((n, COLS)).astype(np.float32)
    codes, out = np.zeros((n, COLS // 256 * layout.ACT_BYTES), np.int8), np.zeros((n, n_rows), np.float32)
    for t in range(n):
        run(quantize, x[t].ctypes.data, COLS // 256, codes[t].ctypes.data)
    offsets, program, pool = matmul.Scratch.of(n, n_rows, COLS), Program(), Pool(threads)
    memory = np.zeros(threads * offsets.end + 64, np.uint8)
    scratch = memory[-memory.ctypes.data % 64 :][: threads * offsets.end].reshape(threads, -1)
    table, flags = np.array([0, n, *range(n)], np.int64), np.zeros(2, np.int64)
    program.keep(x, codes, out, memory, table, flags, rows)
    matrix = matmul.Matrix(rows.ctypes.data, name, 1, n_rows, COLS, rows.shape[1])
    given = matmul.Rows(x.ctypes.data, x.strides[0], codes.ctypes.data, codes.strides[0])
    to, stop = matmul.Rows(out.ctypes.data, out.strides[0]), flags.ctypes.data
    arguments = matmul.arguments(matrix, given, to, table.ctypes.data, scratch, offsets, program.counter(), stop, stop + 8)
    program.add(matmul.matmul, arguments)
    program.seal()
    return lambda: pool.run(program), rows.nbytes if n == 1 else 2 * n_rows * COLS * n


class _Traits(ctypes.Structure):
    """ggml_type_traits_cpu of ggml-cpu.h."""

    _fields_ = (
        ("from_float", ctypes.c_void_p), ("vec_dot", ctypes.c_void_p),
        ("vec_dot_type", ctypes.c_int), ("nrows", ctypes.c_int64),
    )  # fmt: skip


class Ggml:
    """The products of ggml's CPU library at `path`."""

    def __init__(self, path, threads):
        self.library, self.threads, self.pool = ctypes.CDLL(path), threads, ThreadPoolExecutor(threads)
        self.library.ggml_cpu_init()
        self.library.ggml_get_type_traits_cpu.restype = ctypes.POINTER(_Traits)

    def _prepared(self, name, n):
        """(vec_dot's address, n rows of activations in its format)."""
        traits = self.library.ggml_get_type_traits_cpu(BY_NAME[name].id).contents
        size = COLS * ACTIVATIONS[traits.vec_dot_type][0] // ACTIVATIONS[traits.vec_dot_type][1]
        x, codes = np.random.default_rng(1).standard_normal((n, COLS)).astype(np.float32), np.zeros((n, size), np.uint8)
        from_float = self.library.ggml_get_type_traits_cpu(traits.vec_dot_type).contents.from_float
        for t in range(n):
            run(from_float, x[t].ctypes.data, codes[t].ctypes.data, COLS)
        return traits.vec_dot, codes

    def decode(self, name, rows):
        """(function, bytes) of the product of all rows with one token."""
        vec_dot, codes = self._prepared(name, 1)
        shares = np.array_split(rows, self.threads)
        out = np.zeros(len(rows) + 1, np.float32)

        def one(share):
            _vec_dots(vec_dot, share.ctypes.data, share.shape[1], len(share), codes.ctypes.data, 0, 1, out.ctypes.data, 1)

        return lambda: list(self.pool.map(one, shares)), rows.nbytes

    def products(self, name, rows, times=50):
        """(function, operations) of products of a few rows with a few tokens, on every thread."""
        vec_dot, codes = self._prepared(name, SIDE)
        out = np.zeros((self.threads, 64), np.float32)

        def one(thread):
            to = out[thread].ctypes.data
            _vec_dots(vec_dot, rows.ctypes.data, rows.shape[1], SIDE, codes.ctypes.data, codes.shape[1], SIDE, to, times)

        return lambda: list(self.pool.map(one, range(self.threads))), 2 * COLS * SIDE * SIDE * times * self.threads


@compiled()
def _vec_dots(vec_dot, rows, row_bytes, n_rows, xs, x_bytes, n_tokens, out, times):
    for _ in range(times):
        for t in range(n_tokens):
            for r in range(n_rows):
                call(vec_dot, (COLS, out, 0, rows + r * row_bytes, 0, xs + t * x_bytes, 0, 1))


if __name__ == "__main__":
    main()
