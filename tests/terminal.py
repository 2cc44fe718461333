"""A process on a pseudo-terminal, and the screen that it draws with its scrollback; a test types and reads."""

import codecs
import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import termios
import time
from contextlib import suppress
from pathlib import Path

import pyte

SETTLED = 0.02  # seconds without output of an idle process after which its output counts as complete


class Screen(pyte.HistoryScreen):
    def draw(self, data):
        if data.isascii():
            super().draw(data)
        else:
            for character in data:  # pyte drops text after an emoji joiner in one piece
                super().draw(character)


class Terminal:
    """`lines` are the screen with its scrollback; `raw` is all output.

    `start(command, tty, env)` starts the process with the terminal `tty` and returns it, as subprocess.Popen.
    """

    def __init__(self, command, columns=80, rows=24, start=None, **environment):
        self.screen = Screen(columns, rows, history=20_000, ratio=0.5)
        self.raw, self._coming = "", []
        self._stream, self._decoder = pyte.Stream(self.screen), codecs.getincrementaldecoder("utf-8")("replace")
        plain = {
            name: value for name, value in os.environ.items() if name not in ("TMUX", "NO_COLOR", "LC_ALL", "VISUAL", "EDITOR")
        }
        env = {**plain, "TERM": "xterm-256color", "LANG": "C.UTF-8", **environment}
        self._fd, tty = os.openpty()
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.process = (start or _start)(command, tty, env)
        os.close(tty)
        self.screen.write_process_input = self.type  # the answer to "where is the cursor?"

    @property
    def lines(self):
        width = self.screen.columns
        past = ["".join(line[x].data for x in range(width)) for line in self.screen.history.top]
        lines = [line.rstrip() for line in [*past, *self.screen.display]]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    @property
    def text(self):
        return "\n".join(self.lines)

    def _read(self, seconds):
        """Read output for up to `seconds`, but stop where a line is redrawn, so that a slow test sees every state of the
        screen. None without output, False at the end of the process's output.
        """
        if not self._coming:
            if not select.select([self._fd], [], [], seconds)[0]:
                return None
            try:
                data = os.read(self._fd, 1 << 16)
            except OSError:  # the other side is closed
                return False
            self._coming = re.split(r"(?=\r(?!\n))", self._decoder.decode(data))
            if not data:
                return False
        text = self._coming.pop(0)
        self.raw += text
        self._stream.feed(text)
        return True

    def pump(self, seconds=SETTLED):
        """Read for `seconds`, and then until there is no output for a moment; False at the end of the process's output."""
        began = time.monotonic()
        while (came := self._read(SETTLED)) or (came is None and (time.monotonic() < began + seconds or self._at_work())):
            if time.monotonic() > began + seconds + 60:
                raise AssertionError(f"expected a screen that comes to rest, found\n{self.text}")
        return came is None

    def _at_work(self):
        """Whether a thread of the process runs or is ready to run: then the lack of output does not mean that it is idle."""
        try:
            for stat in Path(f"/proc/{self.process.pid}/task").glob("*/stat"):
                if stat.read_text().rpartition(")")[2].split()[0] == "R":
                    return True
        except OSError:  # it ended, or this system does not show it
            pass
        return False

    def wait(self, *texts, times=1, seconds=300):
        """Wait until each of `texts` is on the screen or in the scrollback, `times` times."""
        until = time.monotonic() + seconds
        while not all(self.text.count(text) >= times for text in texts):
            alive = self._read(0.5) is not False
            if (not alive or time.monotonic() > until) and not all(self.text.count(text) >= times for text in texts):
                raise AssertionError(f"expected {texts} {times} times, found\n{self.text}")
        self.pump()

    def type(self, *keys):
        for key in keys:
            data = key.encode()
            while data:
                data = data[os.write(self._fd, data) :]

    def ends(self, seconds=300):
        """Wait for the process; returns its exit status, or minus the signal that ended it."""
        until = time.monotonic() + seconds
        while self._read(0.1) is not False and time.monotonic() < until:
            pass
        return self.process.wait(max(1.0, until - time.monotonic()))

    def close(self):
        """End the process without typing anything."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGKILL)
        self.process.wait(300)
        self.hang_up()

    def hang_up(self):
        """Close the terminal while the process runs."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def resize(self, columns, rows):
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.screen.resize(rows, columns)


def _start(command, tty, env):
    return subprocess.Popen(
        command,
        stdin=tty,
        stdout=tty,
        stderr=tty,
        env=env,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
