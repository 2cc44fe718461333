"""Threads that stay in compiled code and run programs (program.py). `Pool.run` lets every thread walk the rows from
`first` to `last` and call each kernel with (arguments, thread, threads); after a row with `meet` they wait for each other at a
spin barrier, which costs well under a microsecond where a parallel region of Numba's costs 4 to 45. Between runs the workers
spin for about two milliseconds, then nap for longer and longer, so that a waiting prompt costs next to no CPU. A run is one
compiled call: a signal such as Ctrl-C is seen before or after it, never in between. Knows nothing of what the kernels do.
"""

import ctypes
import threading
import weakref
from time import perf_counter

import numpy as np
from numpy import int64

from llamacli.cpu.kernels.jit.intrinsics import atomic_add, atomic_load, atomic_store, call, kernel, part, pause, pointer, run
from llamacli.cpu.kernels.runtime.program import Program

# int64 slots of the control block, a cache line apart
TICKET, ARRIVED, PHASE, JOB, STOP, LIBC = 0, 8, 16, 24, 32, 40
PATIENCE = 30_000  # spins before a worker starts to nap
LONGEST_NAP = 5_000  # microseconds


def _libc() -> tuple[int, int]:
    """Addresses of a function that gives the core away and of one that sleeps for some microseconds."""
    libc = ctypes.CDLL(None)
    return tuple(ctypes.cast(f, ctypes.c_void_p).value for f in (libc.sched_yield, libc.usleep))


@part
def _barrier(control, threads):
    phase = atomic_load(control + 8 * PHASE)
    if atomic_add(control + 8 * ARRIVED, 1) == threads - 1:
        atomic_store(control + 8 * ARRIVED, 0)
        atomic_store(control + 8 * PHASE, phase + 1)
        return
    spins = 0
    while atomic_load(control + 8 * PHASE) == phase:
        pause()
        spins += 1
        if spins & 1023 == 0:  # somebody else wants this core: let them have it rather than spin against them
            call(pointer(control + 8 * LIBC, int64)[0], ())


@part
def _walk(control, thread, threads):
    job = pointer(control + 8 * JOB, int64)
    rows, first, last = job[0], job[1], job[2]
    for step in range(first, last):
        row = pointer(rows + 24 * step, int64)
        call(row[0], (row[1], thread, threads))
        if row[2] and threads > 1:
            _barrier(control, threads)


@kernel(None)
def work(control, thread, threads):
    """A worker's whole life."""
    ticket, spins, nap = 0, 0, 50
    while not atomic_load(control + 8 * STOP):
        if atomic_load(control + 8 * TICKET) != ticket:
            ticket += 1
            _walk(control, thread, threads)
            spins, nap = 0, 50
        elif spins < PATIENCE:
            pause()
            spins += 1
        else:
            call(pointer(control + 8 * LIBC, int64)[1], (nap,))
            nap = min(LONGEST_NAP, nap + nap // 64 + 1)


@kernel(None)
def lead(control, thread, threads):
    """The caller's part of a run: call the workers, and walk with them."""
    atomic_add(control + 8 * TICKET, 1)
    _walk(control, thread, threads)


def _close(control):
    control[STOP] = 1


class Pool:
    """`threads` threads, the caller's included."""

    def __init__(self, threads: int):
        self.threads = threads
        self._control = np.zeros(64, np.int64)
        self._control[LIBC : LIBC + 2] = _libc()
        entry = work.address  # before any thread needs it
        for thread in range(1, threads):
            arguments = (self._control.ctypes.data, thread, threads)
            # the array travels along so that it outlives the thread
            threading.Thread(target=lambda a, keep: run(entry, *a), args=(arguments, self._control), daemon=True).start()
        self._finalizer = weakref.finalize(self, _close, self._control)

    def close(self) -> None:
        """End the workers."""
        self._finalizer()

    def run(self, program: Program, first: int = 0, last: int | None = None) -> None:
        """Run rows first..last on all threads; returns when all are done. The last of them must meet."""
        last = len(program) if last is None else last
        assert first < last and program.table[last - 1, 2], "a run needs a step, and its last step must meet"
        self._lead(program.table, first, last)

    def run_timed(self, program: Program, first: int = 0, last: int | None = None) -> list[float]:
        """The same one step at a time; returns the seconds of each, the meeting of all threads after it included."""
        table, seconds = program.table.copy(), []
        table[:, 2] = 1
        for step in range(first, len(program) if last is None else last):
            began = perf_counter()
            self._lead(table, step, step + 1)
            seconds.append(perf_counter() - began)
        return seconds

    def _lead(self, table: np.ndarray, first: int, last: int) -> None:
        self._control[JOB : JOB + 3] = table.ctypes.data, first, last
        lead(self._control.ctypes.data, 0, self.threads)
