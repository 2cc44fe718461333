"""What this machine can do at best: the speed of reading memory, as the yardstick for decode.

Out: numbers in GB/s (1e9 bytes). Knows nothing of models.
"""

import time

import numpy as np
from llvmlite import ir

from llamacli.kernels.jit import call, kernel, load, unpack
from llamacli.kernels.pool import Pool, Program
from llamacli.kernels.simd import Simd, i32, i64, vec

STREAMS = 8  # vectors read at a time, enough to keep the core's line-fill buffers busy


def _module(target):
    module = ir.Module("bandwidth")
    s = Simd(module, target, "read", 3)
    start, nbytes, out = s.args
    span = STREAMS * s.width

    def step(i, sums):
        at = s.add(start, s.mul(i, span))
        s.prefetch(at, 4096, span)
        return [s.b.xor(v, s.load(vec(i32, s.lanes), at, k * s.width)) for k, v in enumerate(sums)]

    sums = s.loop(s.b.sdiv(nbytes, i64(span)), [s.zeros(i32)] * STREAMS, step)
    for v in sums[1:]:
        sums[0] = s.b.xor(sums[0], v)
    s.store(sums[0], out)
    s.done()
    return module


@kernel
def _read(at, thread, threads):
    start, nbytes, out, leaf = unpack(at, 4)
    share = nbytes // threads
    call(leaf, (start + thread * share, share, out + 64 * thread))


def read_gbps(threads: int, megabytes: int = 512, rounds: int = 5) -> float:
    """Bytes per second, in GB/s, at which `threads` threads read a buffer too large for any cache; the median round."""
    leaf = load("bandwidth", _module, ("read",))["read"]
    buffer = np.ones(megabytes << 20, np.uint8)
    out = np.zeros((threads, 64), np.uint8)
    program = Program()
    program.add(_read, [buffer.ctypes.data, buffer.nbytes, out.ctypes.data, leaf])
    pool, seconds = Pool(threads), []
    program.seal()
    for _ in range(rounds + 1):
        start = time.perf_counter()
        pool.run(program)
        seconds.append(time.perf_counter() - start)
    return buffer.nbytes / sorted(seconds[1:])[rounds // 2] / 1e9
