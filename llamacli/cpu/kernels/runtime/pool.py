"""A pool of threads that run programs (program.py) in compiled code.

`Pool.run` lets every thread walk the rows from `first` to `last` and call each kernel with (arguments, thread, threads). After
a row with a barrier the threads wait for each other. A run is one compiled call: a signal such as Ctrl-C is seen before or
after it, never in between.

Waiting, for the barrier and for the next run: spin, then sleep in the kernel (waiting.py). A barrier among running threads
costs well under a microsecond; a parallel region of Numba's costs 4 to 45. An idle pool uses no CPU.
"""

import os
import threading
import weakref
from time import perf_counter

import numpy as np
from numpy import int64

from llamacli.cpu.kernels.jit.intrinsics import (
    atomic_add,
    atomic_load,
    atomic_store,
    call,
    device_function,
    kernel,
    pointer,
    run,
)
from llamacli.cpu.kernels.runtime.program import Program
from llamacli.cpu.kernels.runtime.waiting import (
    ARRIVED,
    JOB,
    PHASE,
    STOP,
    TICKET,
    await_change,
    new_control,
    prefer_fast_cores,
    wake,
)
from llamacli.errors import UsageError

AT_BARRIER = 50_000  # nanoseconds that a thread spins for the others before it sleeps
BETWEEN_RUNS = 2_000_000  # nanoseconds that a worker spins for the next run: a sampler's time, or a short read's


@device_function
def _barrier(control, thread, threads):
    phase = atomic_load(control + PHASE)
    if atomic_add(control + ARRIVED, 1) == threads - 1:
        atomic_store(control + ARRIVED, 0)
        atomic_store(control + PHASE, phase + 1)
        wake(control, PHASE)
        return
    await_change(control, PHASE, phase, thread, AT_BARRIER)


@device_function
def _run_steps(control, thread, threads):
    job = pointer(control + JOB, int64)
    rows, first, last = job[0], job[1], job[2]
    for step in range(first, last):
        row = pointer(rows + 24 * step, int64)
        call(row[0], (row[1], thread, threads))
        if row[2] and threads > 1:
            _barrier(control, thread, threads)


@kernel(None)
def worker_loop(control, thread, threads):
    """What a worker thread runs: it waits for runs and takes part in each, until the pool is closed."""
    ticket = 0
    while True:
        await_change(control, TICKET, ticket, thread, BETWEEN_RUNS)
        ticket += 1
        if atomic_load(control + STOP):
            return
        _run_steps(control, thread, threads)


@kernel(None)
def run_program(control, thread, threads):
    """The caller's part of a run: start the workers and run the steps with them."""
    atomic_add(control + TICKET, 1)
    wake(control, TICKET)
    _run_steps(control, thread, threads)


@kernel(None)
def stop_workers(control, thread, threads):
    """Let all workers return."""
    atomic_store(control + STOP, 1)
    atomic_add(control + TICKET, 1)
    wake(control, TICKET)


def _stop_workers(control: np.ndarray) -> None:
    stop_workers(control.ctypes.data, 0, 0)


class Pool:
    """`threads` threads, the caller's included. One caller at a time.

    A child process made by fork has none of the threads; its pool starts new ones on the next run.
    """

    def __init__(self, threads: int):
        """UsageError if the system cannot start that many threads; those that were started are ended."""
        self.threads = threads
        self._start()
        _pools.add(self)

    def _start(self) -> None:
        control, entry = new_control(self.threads), worker_loop.address  # compiled before any thread needs it
        _ = run_program.address, stop_workers.address
        self._control, self._workers = control, []
        self._finalizer = weakref.finalize(self, _stop_workers, control)
        try:
            for thread in range(1, self.threads):
                # the array is an argument so that it outlives the thread
                worker = threading.Thread(target=_work, args=(entry, control, thread, self.threads), daemon=True)
                worker.start()
                self._workers.append(worker)
        except RuntimeError as error:
            started = len(self._workers) + 1
            self.close()
            raise UsageError(f"threads: expected to start {self.threads}, found room for {started}; use fewer (-t)") from error

    def close(self) -> None:
        """End the workers. Closing twice is allowed, running afterwards is not."""
        self._finalizer()
        for worker in self._workers:
            worker.join()
        self._workers = []

    def run(self, program: Program, first: int = 0, last: int | None = None) -> None:
        """Run rows first..last on all threads; returns when all are done. The last of them must have a barrier."""
        last = len(program) if last is None else last
        assert first < last and program.table[last - 1, 2], "a run needs a step, and its last step a barrier"
        self._run_program(program.table, first, last)

    def run_timed(self, program: Program, first: int = 0, last: int | None = None) -> list[float]:
        """The same one step at a time; returns the seconds of each, the barrier after it included."""
        table, seconds = program.table.copy(), []
        table[:, 2] = 1
        for step in range(first, len(program) if last is None else last):
            began = perf_counter()
            self._run_program(table, step, step + 1)
            seconds.append(perf_counter() - began)
        return seconds

    def _run_program(self, table: np.ndarray, first: int, last: int) -> None:
        if self._control is None:
            self._start()
        if not self._finalizer.alive:
            raise UsageError("the threads of this model are gone: it was closed; load it again")
        job = JOB // 8
        self._control[job : job + 3] = table.ctypes.data, first, last
        run_program(self._control.ctypes.data, 0, self.threads)

    def _forget(self) -> None:
        """In a forked child: the workers are the parent's."""
        self._finalizer.detach()
        self._control, self._workers = None, []


def _work(entry: int, control: np.ndarray, thread: int, threads: int) -> None:
    prefer_fast_cores()
    run(entry, control.ctypes.data, thread, threads)


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


def _after_fork() -> None:
    for pool in list(_pools):
        pool._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
