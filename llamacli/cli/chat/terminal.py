"""The terminal while no prompt reads it: typed keys are not echoed and not lost.

Also the control sequence for the clipboard. In: a terminal's descriptor. Out: the bytes typed meanwhile; text for the
clipboard. Suspending (Ctrl-Z) restores the shell's mode of the terminal.
"""

import base64
import contextlib
import os
import select
import signal
import sys
from collections.abc import Callable

from llamacli.cli import signals
from llamacli.errors import UsageError

try:
    import termios
except ImportError:  # a system without POSIX terminals
    termios = None

PASTE_ON, PASTE_OFF = "\x1b[?2004h", "\x1b[?2004l"  # the terminal marks pasted text
MOST_COPIED = 100_000  # bytes in base64; terminals drop more, some silently


class Quiet:
    """A context without echo. `raw`: single keys, as an editor needs them, which `take` returns; else the system keeps the
    typed lines. `moved` is called when the process continues after it was suspended.
    """

    def __init__(self, raw: bool, write: Callable[[str], None], moved: Callable[[], None]):
        self._raw, self._write, self._moved = raw, write, moved
        self._before = self._handler = None
        self._typed, self._end = b"", contextlib.ExitStack()

    def __enter__(self) -> "Quiet":
        with contextlib.suppress(OSError, ValueError, termios.error if termios else OSError):
            if termios and sys.stdin is not None and os.isatty(0):
                self._before = termios.tcgetattr(0)
                self._end.enter_context(signals.at_forced_end(self._give_back))
                self._silence()
                self.drain()
                self._typed = self._typed.replace(b"\n", b"\r")  # until then the system translated the key Enter
                self._handler = signal.signal(signal.SIGTSTP, self._suspend)
        return self

    def _silence(self) -> None:
        mode = termios.tcgetattr(0)
        mode[3] &= ~termios.ECHO
        mode[3] |= termios.NOFLSH  # Ctrl-C stops the answer and keeps typed text
        if self._raw:
            mode[0] &= ~termios.ICRNL
            mode[3] &= ~termios.ICANON
            mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
        termios.tcsetattr(0, termios.TCSANOW, mode)
        if self._raw:
            self._write(PASTE_ON)

    def mark_pastes(self) -> None:
        """Ask the terminal again to mark what is pasted: the prompt's end has stopped it."""
        if self._before and self._raw:
            self._write(PASTE_ON)

    def _restore(self) -> None:
        if self._raw:
            self._write(PASTE_OFF)
        termios.tcsetattr(0, termios.TCSANOW, self._before)

    def _give_back(self) -> None:
        """Restore the terminal before the watching thread ends the process: the main thread may hold the locks of stdout."""
        termios.tcsetattr(0, termios.TCSANOW, self._before)
        if self._raw:
            os.write(0, PASTE_OFF.encode())

    def _suspend(self, signum, frame) -> None:
        self._restore()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)  # the process stops and continues here
        signal.signal(signal.SIGTSTP, self._suspend)
        self._silence()
        self._moved()

    @contextlib.contextmanager
    def paused(self):
        """A context with the terminal's original mode, for work that may end the process at once."""
        if self._before:
            self._restore()
        try:
            yield
        finally:
            if self._before:
                self._silence()

    def take(self) -> bytes:
        """The bytes typed since the last call."""
        self.drain()
        typed, self._typed = self._typed, b""
        return typed

    def drain(self) -> None:
        """Read the typed bytes before the system's buffer is full."""
        if self._before and self._raw:
            with contextlib.suppress(OSError):
                while select.select([0], [], [], 0)[0] and (data := os.read(0, 4096)):
                    self._typed += data

    def __exit__(self, *error) -> None:
        if self._before:
            signal.signal(signal.SIGTSTP, self._handler)
            with contextlib.suppress(OSError, termios.error):
                self._restore()
            self._end.close()
            self._before = None


@contextlib.contextmanager
def unbroken():
    """A context that defers Ctrl-C until a drawing is complete, since half of one would garble the screen."""
    came = []
    before = signal.signal(signal.SIGINT, lambda *signal: came.append(signal))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came and callable(before):
        before(*came[0])


def copying(text: str, environ=os.environ) -> str:
    """The sequence (OSC 52) that makes a terminal copy `text`, over ssh too. UsageError if that is impossible.

    GNU screen forwards only sequences that are wrapped for it, in parts.
    """
    data = base64.b64encode(text.encode()).decode()
    if environ.get("TERM", "dumb") in ("dumb", "unknown"):
        raise UsageError("/copy: expected a terminal with a clipboard, found a dumb one; /export FILE writes the conversation")
    if len(data) > MOST_COPIED:
        raise UsageError(f"/copy: expected at most {MOST_COPIED // 4 * 3} bytes, found {len(text.encode())}; use /export FILE")
    sequence = f"\x1b]52;c;{data}\x07"
    if environ.get("TERM", "").startswith("screen") and not environ.get("TMUX"):
        return "".join(f"\x1bP{sequence[i : i + 250]}\x1b\\" for i in range(0, len(sequence), 250))
    return sequence
