"""Ctrl-C, SIGTERM and SIGHUP: handled whatever code is running; the process then ends by the signal.

The first signal raises KeyboardInterrupt (SIGINT) or SystemExit (SIGTERM, and SIGHUP, which comes when the terminal is closed
or the connection to it lost) in the main thread, so that a command can keep what it has. Compiled code cannot be interrupted by
an exception. So a thread of its own watches the descriptor to which the interpreter writes the number of each signal. It asks
the engines to end their calls. If the main thread still does not run the handler within GRACE seconds, it ends the process,
unless the command continues after a signal (`chat`); a second signal ends it at once. A SIGHUP after a SIGTERM or another
SIGHUP does not count, since nobody means it: where a terminal is closed, the system sends one and the shell another. To end the
process, it restores the terminal and raises the signal with its default handling, so that a shell's loop stops as well.
"""

import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import contextmanager, suppress

GRACE, TURN = 0.3, 0.005  # seconds for the main thread to run a handler; seconds between checks
UNWINDING = 3.0  # seconds for it to end afterwards: an exception raised in a callback is lost
_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _State:
    """State shared by the handlers and the watching thread."""

    writer = -1  # the descriptor that the interpreter writes to
    watching = False
    answers = 0  # number of times that the main thread ran a handler
    obeying: int | None = None  # the value of `answers` for the signal that is being handled
    survived = False  # whether the command continued after that signal
    leaving = False  # whether the main thread has handled a SIGTERM or SIGHUP, after which no command continues
    survives = False  # the command continues after a first Ctrl-C
    unhurried = False  # the command may take its time to end
    engines = weakref.WeakSet()  # noqa: RUF012  whose calls are to end
    at_forced_end: list[Callable[[], None]] = []  # noqa: RUF012  called before the process ends from the watching thread


def install() -> None:
    """Install the handlers. A signal that was ignored when the program started, as under nohup, stays ignored."""
    for number in _NUMBERS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)
    arm()


def arm() -> None:
    """Set the wakeup descriptor again, after a library such as asyncio replaced it."""
    if not _State.watching:
        reader, _State.writer = os.pipe()
        os.set_blocking(_State.writer, False)
        threading.Thread(target=_watch, args=(reader,), daemon=True, name="signals").start()
        _State.watching = True
    with suppress(ValueError):  # not the main thread
        signal.set_wakeup_fd(_State.writer, warn_on_full_buffer=False)


def interrupts(engine) -> None:
    """Have signals end this engine's calls, which may be in compiled code for seconds (Engine.interrupt)."""
    _State.engines.add(engine)


def die(number: int) -> None:
    """End this process by the signal, with its default handling."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(number, signal.SIG_DFL)
    else:  # Python sets handlers in the main thread only
        import ctypes

        ctypes.CDLL(None).signal(int(number), None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    os.kill(os.getpid(), number)


@contextmanager
def at_forced_end(action: Callable[[], None]):
    """A context in which `action` is called if the process must end while the main thread is in compiled code."""
    _State.at_forced_end.append(action)
    try:
        yield
    finally:
        _State.at_forced_end.remove(action)


@contextmanager
def surviving():
    """A context in which a first Ctrl-C never ends the process: the main thread handles it when it can, and the command
    continues.
    """
    before, _State.survives = _State.survives, True
    if _State.watching:
        arm()  # the editor's event loop replaces the descriptor
    try:
        yield
    finally:
        _State.survives = before
        obeyed()


@contextmanager
def unhurried():
    """A context without a time limit after the first signal: the command writes its results to disk."""
    _State.unhurried = True
    try:
        yield
    finally:
        _State.unhurried = False


def obeyed() -> None:
    """Note that the command has handled the signal and continues; the next signal counts as the first."""
    _State.obeying = None


@contextmanager
def at_once():
    """A context in which the first signal ends the process: by default handling, after the functions of `at_forced_end`.

    A library that is called here may hold the interpreter's lock for a third of a second, so that no thread of ours can handle
    a signal. The compiler calls back into Python where an exception cannot propagate: it would be printed, and the interrupt
    lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _NUMBERS}
    ending = (lambda number, frame: _end(number)) if _State.at_forced_end else signal.SIG_DFL
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, ending)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _handle(number, frame):
    if number == signal.SIGHUP and _State.leaving:
        return
    _State.answers += 1
    _State.leaving = _State.leaving or number != signal.SIGINT
    if _State.obeying is None:
        _State.obeying, _State.survived = _State.answers, _State.survives
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _watch(reader: int) -> None:
    """Answers are counted, since the main thread may handle a signal before this thread has read its number."""
    seen, deaf = 0, False  # answers to earlier signals; whether the last signal had none in time
    leaving = False  # a SIGTERM or SIGHUP was read
    while data := os.read(reader, 1):
        number = data[0]
        if number not in _NUMBERS or signal.getsignal(number) is signal.SIG_IGN:
            continue
        if number == signal.SIGHUP and leaving:
            continue
        leaving = leaving or number != signal.SIGINT
        if (_State.obeying is not None and _State.obeying <= seen) or (deaf and _State.answers == seen):
            _end(number)
        if deaf:
            seen, deaf = _State.answers, False
        survives = _State.survives
        for engine in list(_State.engines):
            engine.interrupt()
        for _ in range(round(GRACE / TURN)):  # on a busy machine each turn takes longer than TURN
            if _State.answers != seen:
                break
            time.sleep(TURN)
        if _State.answers != seen:
            seen = _State.answers
            if not (_State.survived or _State.unhurried):
                timer = threading.Timer(UNWINDING, _end_unless_obeyed, [number])
                timer.daemon = True
                timer.start()
        elif survives and number == signal.SIGINT:
            deaf = True
            _tell("stopping ...; once more ends the program\n")
        else:
            _end(number)


def _end_unless_obeyed(number: int) -> None:
    if _State.obeying is not None:
        _end(number)


def _tell(text: str) -> None:
    with suppress(OSError):
        if os.isatty(2):
            os.write(2, f"\r\x1b[K{text}".encode())


def _end(number: int) -> None:
    """End the process by the signal, from any thread: call the functions of `at_forced_end`, then write a line end on a
    terminal.
    """
    for action in reversed(_State.at_forced_end):
        with suppress(Exception):
            action()
    _tell("" if sys.stderr is None else "\n")
    die(number)
