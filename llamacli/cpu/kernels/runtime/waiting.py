"""Waiting for another thread inside compiled code: spin for a bounded time, then sleep until the word in memory changes.

In: a control block, an array of int64 in lines of LINE bytes. A word that threads wait for has the number of sleepers beside
it. Out: `await_change` returns when the word is no longer what was seen; who changes the word calls `wake` afterwards.

Spinning is bounded by time, since a pause lasts from 1 to 100 nanoseconds depending on the CPU. On Linux a spinning thread
also offers its core by `sched_yield`. If another thread took it, there are more threads than free cores. Spinning would then
only delay the thread that is waited for, so this one sleeps at once. macOS has no such offer: its `sched_yield` lowers the
caller's priority for several milliseconds.

Sleeping uses what the system compares and waits with: futex on Linux, os_sync_wait_on_address (macOS 14.4) or __ulock_wait on
macOS, short naps elsewhere.
"""

import ctypes
import platform
import sys

import numpy as np
from numpy import int64

from llamacli.cpu.kernels.jit.intrinsics import atomic_add, atomic_load, call, device_function, pause, pointer

LINE = 128  # bytes: Apple's cache line; x86 prefetches lines of 64 in pairs
TICKET, ARRIVED, PHASE, JOB, STOP, SYSTEM, OWN = (LINE * k for k in range(7))  # offsets; a line for each thread from OWN on
SLEEPERS = 8  # offset of the number of sleepers from the word that they wait for

# int64s of the SYSTEM line
HOW, WAIT, WAKE, CLOCK, CLOCK_ID, YIELD, NAP, FUTEX = range(8)
BY_NAP, BY_FUTEX, BY_OS_SYNC, BY_ULOCK = range(4)
FUTEX_NUMBERS = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221, "s390x": 238}  # of the system call
FUTEX_WAIT, FUTEX_WAKE = 128, 129  # private ones
COMPARE_AND_WAIT, WAKE_ALL = 1, 0x100  # of ulock, for 32 bits
ALL = (1 << 31) - 1  # sleepers to wake
CROWDED = 2  # int64 of a thread's own line, after the time: the last offer was accepted, so the next one comes sooner
LONGEST_NAP = 5_000  # microseconds

PAUSES = 32  # between two looks at the clock
OFFER_EVERY = 5_000  # nanoseconds of spinning, then the core is offered
TAKEN = 2_000  # nanoseconds, five times what an offer takes if no thread accepts it
USER_INITIATED = 0x19  # macOS's quality of service for work that a person waits for


def new_control(threads: int) -> np.ndarray:
    """A control block for `threads` threads: int64, aligned to a line."""
    n = LINE // 8
    block = np.zeros((OWN // LINE + threads + 1) * n, np.int64)
    control = block[-block.ctypes.data % LINE // 8 :]
    system = control[SYSTEM // 8 :]
    for where, value in _system().items():
        system[where] = value
    return control


def prefer_fast_cores() -> None:
    """macOS: keep this thread off the efficiency cores, where it would hold up all others. Elsewhere: nothing."""
    if sys.platform == "darwin":
        ctypes.CDLL(None).pthread_set_qos_class_self_np(USER_INITIATED, 0)


def _system() -> dict[int, int]:
    """How this system sleeps, and the addresses of the functions of libc for it."""
    libc = ctypes.CDLL(None)

    def address(name: str) -> int:
        return ctypes.cast(getattr(libc, name), ctypes.c_void_p).value if hasattr(libc, name) else 0

    found = {
        HOW: BY_NAP,
        NAP: address("usleep"),
        CLOCK: address("clock_gettime"),
        CLOCK_ID: 6 if sys.platform == "darwin" else 1,
    }
    if sys.platform == "linux":
        found[YIELD] = address("sched_yield")
        if (number := FUTEX_NUMBERS.get(platform.machine())) and sys.byteorder == "little" and sys.maxsize > 1 << 32:
            found |= {HOW: BY_FUTEX, FUTEX: number, WAIT: address("syscall")}
    elif sys.platform == "darwin":
        for how, wait, wake_all in (
            (BY_OS_SYNC, "os_sync_wait_on_address", "os_sync_wake_by_address_all"),
            (BY_ULOCK, "__ulock_wait", "__ulock_wake"),
        ):
            if address(wait) and address(wake_all):
                return found | {HOW: how, WAIT: address(wait), WAKE: address(wake_all)}
    return found


@device_function
def _now(control, thread):
    """Nanoseconds of a clock that never goes back."""
    system, at = pointer(control + SYSTEM, int64), control + OWN + LINE * thread
    call(system[CLOCK], (system[CLOCK_ID], at))
    time = pointer(at, int64)
    return time[0] * 1_000_000_000 + time[1]


@device_function
def await_change(control, offset, seen, thread, patience):
    """Return when the word at `control + offset` is not `seen` any more; after `patience` nanoseconds of spinning, sleep."""
    word = control + offset
    for _ in range(PAUSES):
        if atomic_load(word) != seen:
            return
        pause()
    system, own = pointer(control + SYSTEM, int64), pointer(control + OWN + LINE * thread, int64)
    now = _now(control, thread)
    end, offered = now + patience, now
    if own[CROWDED]:
        offered -= OFFER_EVERY
    while now < end:
        if system[YIELD] and now - offered >= OFFER_EVERY:
            call(system[YIELD], ())
            offered = _now(control, thread)
            own[CROWDED] = offered - now > TAKEN
            if own[CROWDED]:
                break
        for _ in range(PAUSES):
            if atomic_load(word) != seen:
                return
            pause()
        now = _now(control, thread)
    atomic_add(word + SLEEPERS, 1)  # before the word is read again: who changes it reads this afterwards
    nap = 50
    while atomic_load(word) == seen:
        if system[HOW] == BY_FUTEX:
            call(system[WAIT], (system[FUTEX], word, FUTEX_WAIT, seen, 0, 0))
        elif system[HOW] == BY_OS_SYNC:
            call(system[WAIT], (word, seen, 8, 0))
        elif system[HOW] == BY_ULOCK:
            call(system[WAIT], (COMPARE_AND_WAIT, word, seen, 0))
        else:
            call(system[NAP], (nap,))
            nap = min(LONGEST_NAP, nap + nap // 64 + 1)
    atomic_add(word + SLEEPERS, -1)


@device_function
def wake(control, offset):
    """Wake the threads that sleep on the word at `control + offset`, which has been changed."""
    word = control + offset
    if atomic_load(word + SLEEPERS) == 0:
        return
    system = pointer(control + SYSTEM, int64)
    if system[HOW] == BY_FUTEX:
        call(system[WAIT], (system[FUTEX], word, FUTEX_WAKE, ALL, 0, 0))
    elif system[HOW] == BY_OS_SYNC:
        call(system[WAKE], (word, 8, 0))
    elif system[HOW] == BY_ULOCK:
        call(system[WAKE], (COMPARE_AND_WAIT | WAKE_ALL, word, 0))
