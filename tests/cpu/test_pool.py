"""The pool of threads: each step runs on all threads, in order, with any number of cores; nothing is left behind."""

import os
import signal
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from llamacli.cpu.kernels.jit.intrinsics import Address, kernel, pointer
from llamacli.cpu.kernels.runtime import waiting
from llamacli.cpu.kernels.runtime.pool import Pool
from llamacli.cpu.kernels.runtime.program import Program
from llamacli.errors import UsageError

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class Counting(NamedTuple):
    source: Address
    out: Address


@kernel(Counting)
def _count(step, thread, threads):
    """Each thread adds one to what its neighbour held before the last barrier: a step that is run early or twice is seen."""
    pointer(step.out, np.int64)[thread] = pointer(step.source, np.int64)[(thread + 1) % threads] + 1


def counting(threads: int, steps: int) -> tuple[Program, np.ndarray]:
    """A program whose last step leaves the number of steps in each thread's place."""
    buffers, program = np.zeros((2, threads), np.int64), Program()
    for step in range(steps):
        source, out = step % 2, (step + 1) % 2
        program.add(_count, Counting(buffers[source].ctypes.data, buffers[out].ctypes.data), [source], [out])
    return program.seal(), buffers


def assert_counts(pool: Pool, steps: int = 40) -> None:
    program, buffers = counting(pool.threads, steps)
    pool.run(program)
    assert buffers[steps % 2].tolist() == [steps] * pool.threads


def in_child(action) -> int:
    """The exit code of a forked process that runs `action`; killed after five minutes."""
    pid = os.fork()
    if not pid:
        signal.alarm(300)
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture(params=["as the system does", "by naps"])
def sleeping(request, monkeypatch):
    """Threads sleep as they do here, and as on a system without a wait for a change of memory."""
    if request.param == "by naps":
        system = waiting._system()
        monkeypatch.setattr(waiting, "_system", lambda: system | {waiting.HOW: waiting.BY_NAP, waiting.YIELD: 0})


@pytest.mark.parametrize("threads", [1, 2, 3, 4 * CORES])
def test_all_threads_do_every_step_after_the_one_before(threads, sleeping):
    pool = Pool(threads)
    for _ in range(3):
        assert_counts(pool)
    pool.close()


def workers_of(make) -> tuple[Pool, list[threading.Thread]]:
    """The pool that `make` returns, and the threads that it started."""
    before = set(threading.enumerate())
    pool = make()
    return pool, [thread for thread in threading.enumerate() if thread not in before]


def sleeps(thread: threading.Thread) -> bool:
    """Whether the system has put a thread to sleep, as /proc tells."""
    stat = Path(f"/proc/self/task/{thread.native_id}/stat").read_text()
    return stat.rpartition(")")[2].split()[0] == "S"


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
def test_workers_that_sleep_are_woken(sleeping):
    pool, workers = workers_of(lambda: Pool(3))
    assert len(workers) == 2
    for _ in range(3):
        while not all(map(sleeps, workers)):  # after some milliseconds
            os.sched_yield()
        assert_counts(pool)
    pool.close()


def test_a_hundred_pools_leave_no_thread_behind():
    before = threading.active_count()
    for _ in range(100):
        pool = Pool(4)
        assert_counts(pool, 2)
        pool.close()
        pool.close()
        assert threading.active_count() <= before  # threads of earlier tests may end meanwhile


def test_a_pool_that_is_dropped_ends_its_threads():
    pool, workers = workers_of(lambda: Pool(4))
    assert len(workers) == 3
    del pool
    for worker in workers:
        worker.join(300)
        assert not worker.is_alive()


def test_a_pool_that_cannot_start_all_threads_ends_those_it_started(monkeypatch):
    start, started = threading.Thread.start, []

    def third_fails(self):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(self)
        start(self)

    monkeypatch.setattr(threading.Thread, "start", third_fails)
    with pytest.raises(UsageError, match="expected to start 8, found room for 3; use fewer"):
        Pool(8)
    assert not any(worker.is_alive() for worker in started)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
def test_a_forked_child_computes_with_threads_of_its_own():
    pool = Pool(3)
    assert_counts(pool)
    assert in_child(lambda: assert_counts(pool)) == 0
    assert in_child(lambda: pool.close()) == 0
    assert_counts(pool)
    pool.close()


def test_lines_of_the_control_block_are_aligned():
    for threads in range(1, 9):
        control = waiting.new_control(threads)
        assert control.ctypes.data % waiting.LINE == 0
        assert control.nbytes >= waiting.OWN + threads * waiting.LINE


OS_SYNC = ("os_sync_wait_on_address", "os_sync_wake_by_address_all")
ULOCK = ("__ulock_wait", "__ulock_wake")


class FakeLibc:
    """A libc with these functions, at made-up addresses."""

    def __init__(self, *names):
        callback = waiting.ctypes.CFUNCTYPE(None)
        for name in names:
            setattr(self, name, callback(lambda: None))


@pytest.mark.parametrize(
    ("platform", "machine", "names", "how", "offers"),
    [
        ("linux", "x86_64", ["syscall", "sched_yield"], waiting.BY_FUTEX, True),
        ("linux", "aarch64", ["syscall", "sched_yield"], waiting.BY_FUTEX, True),
        ("linux", "unheard-of", ["syscall", "sched_yield"], waiting.BY_NAP, True),
        (
            "darwin",
            "arm64",
            ["sched_yield", *OS_SYNC],
            waiting.BY_OS_SYNC,
            False,
        ),
        ("darwin", "arm64", ["sched_yield", *ULOCK], waiting.BY_ULOCK, False),
        ("darwin", "x86_64", ["sched_yield"], waiting.BY_NAP, False),
        ("freebsd14", "amd64", ["sched_yield"], waiting.BY_NAP, False),
    ],
)
def test_each_system_sleeps_its_own_way_and_macos_never_yields(platform, machine, names, how, offers, monkeypatch):
    libc = FakeLibc("usleep", "clock_gettime", *names)
    monkeypatch.setattr(waiting.sys, "platform", platform)
    monkeypatch.setattr(waiting.platform, "machine", lambda: machine)
    monkeypatch.setattr(waiting.ctypes, "CDLL", lambda name: libc)
    found = waiting._system()
    assert found[waiting.HOW] == how
    assert bool(found.get(waiting.YIELD)) == offers
    assert found[waiting.CLOCK] and found[waiting.NAP]


def test_workers_on_macos_ask_for_the_fast_cores(monkeypatch):
    asked = []

    class Libc:
        def pthread_set_qos_class_self_np(self, *arguments):
            asked.append(arguments)

    monkeypatch.setattr(waiting.ctypes, "CDLL", lambda name: Libc())
    waiting.prefer_fast_cores()
    assert asked == []
    monkeypatch.setattr(waiting.sys, "platform", "darwin")
    waiting.prefer_fast_cores()
    assert asked == [(0x19, 0)]
