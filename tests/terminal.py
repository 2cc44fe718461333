"""A person at a terminal: a process on a pseudo-terminal and the screen that it draws, its scrollback included."""

import os
import time

import pexpect
import pyte


class Screen(pyte.HistoryScreen):
    def draw(self, data):
        if data.isascii():
            super().draw(data)
        else:
            for character in data:  # pyte forgets what follows a joiner of emoji in one piece of text
                super().draw(character)


class Terminal:
    """`lines` are what a person sees who scrolls up; `raw` is every character that came."""

    def __init__(self, command, columns=80, rows=24, **environment):
        self.screen = Screen(columns, rows, history=20_000, ratio=0.5)
        self.raw = ""
        self._stream = pyte.Stream(self.screen)
        plain = {
            name: value for name, value in os.environ.items() if name not in ("TMUX", "NO_COLOR", "LC_ALL", "VISUAL", "EDITOR")
        }
        env = {**plain, "TERM": "xterm-256color", "LANG": "C.UTF-8", **environment}
        self.child = pexpect.spawn(command[0], command[1:], env=env, dimensions=(rows, columns), encoding="utf-8", timeout=0.05)
        self.child.delaybeforesend = None
        self.screen.write_process_input = self.child.send  # the answer to "where is the cursor?"

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

    def pump(self, seconds=0.0):
        """Read what comes; False at the end of the process's output."""
        until = time.monotonic() + seconds
        while True:
            try:
                data = self.child.read_nonblocking(1 << 16, 0.05)
                self.raw += data
                self._stream.feed(data)
            except pexpect.TIMEOUT:
                if time.monotonic() >= until:
                    return True
            except pexpect.EOF:
                return False

    def wait(self, *texts, times=1, seconds=40):
        """Until every one of `texts` is on the screen or above it, `times` times."""
        until = time.monotonic() + seconds
        while not all(self.text.count(text) >= times for text in texts):
            alive = self.pump()
            if (not alive or time.monotonic() > until) and not all(self.text.count(text) >= times for text in texts):
                raise AssertionError(f"expected {texts} {times} times, found\n{self.text}")

    def type(self, *keys):
        for key in keys:
            self.child.send(key)

    def ends(self, seconds=20):
        """Wait for the process; returns its exit status, or minus the signal that ended it."""
        until = time.monotonic() + seconds
        while self.pump(0.1) and time.monotonic() < until:
            pass
        self.child.close(force=False)
        return self.child.exitstatus if self.child.exitstatus is not None else -(self.child.signalstatus or 0)

    def resize(self, columns, rows):
        self.child.setwinsize(rows, columns)
        self.screen.resize(rows, columns)
