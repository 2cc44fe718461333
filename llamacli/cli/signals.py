"""Ctrl-C, SIGTERM and SIGHUP: heard wherever the program is, and the process then dies of them.

The first signal raises KeyboardInterrupt (SIGINT) or SystemExit (SIGTERM, and SIGHUP, which comes when the terminal is closed
or the connection to it lost) in the main thread, so that a command can keep what it has. Compiled code hears none. So a thread
of its own watches the descriptor to which the interpreter writes the number of each signal. It asks the engines to end their
calls. Where the main thread does not answer within GRACE seconds all the same, it ends the process, unless the command said
that it goes on (`chat`); a second signal ends it at once. Ending means: restore the terminal, then die of the signal, so that a
shell's loop stops as well.
"""

import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import contextmanager, suppress

GRACE, TURN = 0.3, 0.005  # seconds for the main thread to run a handler; after which it is looked at again
UNWINDING = 3.0  # seconds for it to end then: an exception raised in a callback is lost
_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _State:
    """What the handlers and the watching thread share."""

    writer = -1  # the descriptor that the interpreter writes to
    watching = False
    answers = 0  # times that the main thread ran a handler
    obeying: int | None = None  # the answer to the signal that is being obeyed
    survived = False  # whether the command went on after that one
    survives = False  # the command goes on after a first Ctrl-C
    unhurried = False  # the command may take its time to end
    engines = weakref.WeakSet()  # noqa: RUF012  whose calls are to end
    last_words: list[Callable[[], None]] = []  # noqa: RUF012  called before the process ends from the watching thread


def install() -> None:
    """Take the signals over. One that was ignored when the program started, as under nohup, stays ignored."""
    for number in _NUMBERS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)
    arm()


def arm() -> None:
    """Watch again, after a library such as asyncio took the descriptor away."""
    if not _State.watching:
        reader, _State.writer = os.pipe()
        os.set_blocking(_State.writer, False)
        threading.Thread(target=_watch, args=(reader,), daemon=True, name="signals").start()
        _State.watching = True
    with suppress(ValueError):  # not the main thread
        signal.set_wakeup_fd(_State.writer, warn_on_full_buffer=False)


def interrupts(engine) -> None:
    """Have a signal end the engine's call, which may be in compiled code for seconds (Engine.interrupt)."""
    _State.engines.add(engine)


def die(number: int) -> None:
    """End this process by the signal itself."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(number, signal.SIG_DFL)
    else:  # where the interpreter lets no handler be set
        import ctypes

        ctypes.CDLL(None).signal(int(number), None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    os.kill(os.getpid(), number)


@contextmanager
def last_words(say: Callable[[], None]):
    """While inside, `say` is called if the process must end while the main thread is in compiled code."""
    _State.last_words.append(say)
    try:
        yield
    finally:
        _State.last_words.remove(say)


@contextmanager
def surviving():
    """While inside, a first Ctrl-C that the main thread does not hear is left to it: the command goes on afterwards."""
    before, _State.survives = _State.survives, True
    if _State.watching:
        arm()  # the editor's event loop takes the descriptor away
    try:
        yield
    finally:
        _State.survives = before
        obeyed()


@contextmanager
def unhurried():
    """While inside, a command that has heard the first signal may take its time: it writes what it has to disk."""
    _State.unhurried = True
    try:
        yield
    finally:
        _State.unhurried = False


def obeyed() -> None:
    """The command has dealt with the signal and goes on; the next one is a first one again."""
    _State.obeying = None


@contextmanager
def at_once():
    """While inside, the first signal ends the process: by the system itself, or, where there are last words, after these.

    A library that is called here may hold the interpreter's lock for a third of a second, in which no thread of ours hears
    anything. The compiler calls back into Python where an exception cannot travel on: it would be printed, and the interrupt
    lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _NUMBERS}
    ending = (lambda number, frame: _end(number)) if _State.last_words else signal.SIG_DFL
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, ending)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _handle(number, frame):
    _State.answers += 1
    if _State.obeying is None:
        _State.obeying, _State.survived = _State.answers, _State.survives
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _watch(reader: int) -> None:
    """Answers are counted, since the main thread may be through with a signal before this thread has read of it."""
    seen, deaf = 0, False  # answers to earlier signals; whether the last one had none in time
    while data := os.read(reader, 1):
        number = data[0]
        if number not in _NUMBERS or signal.getsignal(number) is signal.SIG_IGN:
            continue
        if (_State.obeying is not None and _State.obeying <= seen) or (deaf and _State.answers == seen):
            _end(number)
        if deaf:
            seen, deaf = _State.answers, False
        survives = _State.survives
        for engine in list(_State.engines):
            engine.interrupt()
        for _ in range(round(GRACE / TURN)):  # where others leave this process little of the processor, each turn lasts longer
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
    """Die of the signal from any thread: the last words first, then a fresh line on a terminal."""
    for say in reversed(_State.last_words):
        with suppress(Exception):
            say()
    _tell("" if sys.stderr is None else "\n")
    die(number)
