"""Measures this machine's limits: the speed of reading memory, which limits decode, and of multiplying, which limits prefill.
Products with weights multiply bytes, attention multiplies float32.

Out: numbers in GB/s (1e9 bytes) and Gop/s (1e9 operations; a multiply-add is two).
"""

import time
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
from llvmlite import ir

from llamacli.cpu.kernels.jit.intrinsics import Address, Count, Microkernel, call, kernel
from llamacli.cpu.kernels.jit.loader import chosen_target, load
from llamacli.cpu.kernels.jit.simd import Simd, f32, i8, i16, i32, i64, vec
from llamacli.cpu.kernels.runtime.pool import Pool
from llamacli.cpu.kernels.runtime.program import Program
from llamacli.plan.machine import memory_free

STREAMS = 8  # vectors read at a time, enough to keep the core's line-fill buffers busy
SYMBOLS = ("read", "multiply", "multiply_floats")
LEAST_BUFFER = 48  # megabytes
LINES = 16  # vectors of first-level cache that `multiply` takes its left sides from


def sums(target) -> int:
    """Accumulators of `multiply`: enough to hide the instruction's latency, few enough for the registers."""
    return 12 if target.width == 64 else 4 if run(target) > 1 else 6


def run(target) -> int:
    """Products that are added in 16 bits before they are widened, as in a tile of 4-bit weights in groups of 32: 8 or 1."""
    return 8 if target.dot == "maddubs" and target.width == 32 else 1


def build(target):
    """The module of all microkernels."""
    module = ir.Module("limits")
    _read(module, target)
    _multiply(module, target)
    _multiply_floats(module, target)
    return module


def _read(module, target):
    """read(start, nbytes, out): xor of all vectors."""
    s = Simd(module, target, "read", 3)
    start, nbytes, out = s.args
    span = STREAMS * s.width

    def step(i, sums):
        at = s.add(start, s.mul(i, span))
        s.prefetch(at, 4096, span)
        return [s.b.xor(v, s.load(vec(i32, s.lanes), at, k * s.width)) for k, v in enumerate(sums)]

    _finish(s, s.loop(s.b.sdiv(nbytes, i64(span)), [s.zeros(i32)] * STREAMS, step), out)


def _multiply(module, target):
    """multiply(x, rounds, out): in each round `run` vectors of x times every one of as many right sides as there are sums.

    The left side comes from the nearest cache, as in a matrix product: a constant one would let the compiler take the
    multiplication out of the loop. Loads use other ports than products, so they do not slow them down.
    """
    s = Simd(module, target, "multiply", 3)
    x, rounds, out = s.args
    n, bytes_, multiply = sums(target), vec(i8, target.width), s.dot8 if target.step == 8 else s.dot4
    right = [s.load(bytes_, x, (LINES + k) * s.width) for k in range(n)]

    def step(i, totals):
        left = s.load(bytes_, s.add(x, s.mul(s.b.and_(i, i64(LINES - 1)), s.width)))
        return [multiply(total, left, r) for total, r in zip(totals, right, strict=True)]

    def step_in_16_bits(i, totals):
        at = s.add(x, s.mul(s.b.and_(s.mul(i, run(target)), i64(LINES - 1)), s.width))
        short = [s.zeros(i16, 2 * s.lanes)] * n
        for k in range(run(target)):
            left = s.load(bytes_, at, k * s.width)
            short = [s.b.add(total, s.pairs(left, r)) for total, r in zip(short, right, strict=True)]
        ones = s.fill(i16, 2 * s.lanes, 1)
        return [s.b.add(total, s.widen_pairs(v, ones)) for total, v in zip(totals, short, strict=True)]

    step = step_in_16_bits if run(target) > 1 else step
    _finish(s, s.loop(rounds, [s.zeros(i32)] * n, step), out)


def _multiply_floats(module, target):
    """multiply_floats(x, rounds, out): in each round one vector of x times every one of as many right sides as sums."""
    s = Simd(module, target, "multiply_floats", 3)
    x, rounds, out = s.args
    n, floats = sums(target), vec(f32, target.width // 4)
    right = [s.load(floats, x, (LINES + k) * s.width) for k in range(n)]

    def step(i, totals):
        left = s.load(floats, s.add(x, s.mul(s.b.and_(i, i64(LINES - 1)), s.width)))
        return [s.fma(left, r, total) for total, r in zip(totals, right, strict=True)]

    totals = s.loop(rounds, [s.zeros()] * n, step)
    _finish(s, [s.bits(total, i32) for total in totals], out)


def _finish(s, totals, out):
    """Write something that depends on every sum."""
    for v in totals[1:]:
        totals[0] = s.b.xor(totals[0], v)
    s.store(totals[0], out)
    s.done()


class _ShareArguments(NamedTuple):
    microkernel: Microkernel
    start: Address
    stride: Count
    count: Count
    out: Address


@kernel(_ShareArguments)
def _share(a, thread, threads):
    """One microkernel on every thread, each with its own part of the data and its own line of the result."""
    call(a.microkernel, (a.start + thread * a.stride, a.count, a.out + 64 * thread))


def _median_seconds(threads: int, rounds: int, microkernel: int, data: np.ndarray, stride: int, count: int) -> float:
    out = np.zeros((threads, 64), np.uint8)
    program, pool, seconds = Program(), Pool(threads), []
    program.add(_share, _ShareArguments(microkernel, data.ctypes.data, stride, count, out.ctypes.data))
    program.seal()
    for _ in range(rounds + 1):  # the first touches the pages and wakes the threads
        start = time.perf_counter()
        pool.run(program)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[1:])[rounds // 2]


def buffer_megabytes(threads: int, usual: int = 512) -> int:
    """Megabytes of a buffer that fits in no cache, even where each of many cores has several MB of cache.

    A loaded model may already hold nearly all memory that its limit allows. So the buffer takes at most half of what is free,
    but never less than LEAST_BUFFER, which is larger than most caches.
    """
    return min(max(LEAST_BUFFER, memory_free() // 2 >> 20), max(usual, 16 * threads))


def read_gbps(threads: int, megabytes: int = 512, rounds: int = 5) -> float:
    """Bytes per second, in GB/s, at which `threads` threads read a buffer too large for any cache; the median round."""
    data = np.ones(megabytes << 20, np.uint8)
    share = data.nbytes // threads
    return data.nbytes / _median_seconds(threads, rounds, microkernels()["read"], data, share, share) / 1e9


def multiply_gops(threads: int, steps: int = 4_000_000, rounds: int = 5) -> float:
    """Operations per second, in Gop/s, of int8 products (by the sequence that `tile` uses) from registers; the median round."""
    target = chosen_target()
    return _gops("multiply", threads, steps // run(target), rounds, target.width * target.step // 4 * run(target))


def multiply_floats_gops(threads: int, steps: int = 4_000_000, rounds: int = 5) -> float:
    """Operations per second, in Gop/s, of float32 products from registers; the median round."""
    return _gops("multiply_floats", threads, steps, rounds, chosen_target().width // 4)


def _gops(name: str, threads: int, steps: int, rounds: int, products: int) -> float:
    """`products`: multiply-adds of one sum in one step."""
    target = chosen_target()
    data = np.ones(((LINES + sums(target)) * target.width,), np.uint8)
    seconds = _median_seconds(threads, rounds, microkernels()[name], data, 0, steps)
    return 2 * products * sums(target) * steps * threads / seconds / 1e9


def microkernels() -> dict[str, int]:
    """Addresses of the microkernels, compiled or read from the cache on first use.

    The cache's folder is named by the sources of cpu/kernels, so a change of this file must change the name.
    """
    return load(f"limits-{crc32(Path(__file__).read_bytes()):08x}", build, SYMBOLS)
