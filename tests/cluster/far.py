"""Nodes in network namespaces of this machine, with a chosen delay between them, and commands on the first node.

For root on Linux. Every node has its own host name, models folder and network; memory, disks and processors are shared.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from link import PREFIX, Network
from test_cluster_ray import ROOT, TINY, Two

ROOT_ONLY = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0 or not shutil.which("ip") or not os.path.exists("/dev/net/tun"),
    reason="needs root, ip and TUN devices",
)


class Far(Two):
    """A cluster of `n` nodes; the first one starts it."""

    def __init__(self, folder: Path, n: int):
        super().__init__(folder)
        self.port = 20000 + os.getpid() % 10000
        self.address, self.spaces = f"{PREFIX}1:{self.port}", [f"llamacli-{os.getpid()}-{k}" for k in range(1, n + 1)]
        self.names = [f"n{k}" for k in range(1, n + 1)]
        self.network = None

    def open(self) -> None:
        """Make the namespaces and start a node in each."""
        self.network = Network(self.spaces)
        for k in range(1, len(self.spaces) + 1):
            tries = (self.join(k) for _ in range(3))  # on a busy machine Ray may not start in its time
            assert any(done.returncode == 0 for done in tries), self.join(k).stderr

    def close(self) -> None:
        """End all nodes and their network."""
        if self.network is None:
            return
        self.network.set()
        self.llamacli("cluster", "stop")
        for k in range(1, len(self.spaces) + 1):
            self.signal(k, signal.SIGKILL)
        self.network.close()

    def join(self, k: int, before: str = "", **more: str) -> subprocess.CompletedProcess:
        """Start node k. `before`: shell commands that see the node's own mounts."""
        words = ("start", "--port", str(self.port)) if k == 1 else ("join", self.address)
        more = {"LLAMACLI_MODELS": str(self.models(k - 1))} | more
        return self.llamacli("cluster", *words, "--host", f"{PREFIX}{k}", on=k, before=before, **more)

    def llamacli(self, *args: str, on: int = 1, before: str = "", **more: str) -> subprocess.CompletedProcess:
        words = self.words(on, sys.executable, "-m", "llamacli", *args, before=before)
        return subprocess.run(words, env=self.env | more, capture_output=True, text=True, timeout=280, cwd=ROOT)

    def python(self, code: str, *args: str, **more: str) -> str:
        """Run a program on the first node; returns its last line and shows all of its output."""
        env = self.env | {"ADDRESS": self.address, "FILE": str(TINY)} | more
        words = self.words(1, sys.executable, "-c", code, *args)
        done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=280, cwd=ROOT)
        print(done.stdout, done.stderr)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    def words(self, on: int, *command: str, before: str = "") -> list[str]:
        """A command on node `on`."""
        space, name = self.spaces[on - 1], self.names[on - 1]
        script = f'hostname "$0"; {before}\nexec "$@"'
        return ["ip", "netns", "exec", space, "unshare", "--uts", "sh", "-c", script, name, *command]

    def processes(self, k: int, begins: str = "") -> list[int]:
        """Processes of node k whose command line begins so."""
        found = subprocess.run(["ip", "netns", "pids", self.spaces[k - 1]], capture_output=True, text=True).stdout.split()
        with_words = []
        for pid in map(int, found):
            with suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").startswith(begins):
                    with_words.append(pid)
        return with_words

    def signal(self, k: int, number: int) -> None:
        """Send a signal to all processes of node k."""
        send(self.processes(k), number)


def send(pids: Sequence[int], number: int) -> None:
    """Send a signal to processes, of which some may have ended."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


class Command:
    """A running command on the first node: its output with times."""

    def __init__(self, far: Far, *args: str, **more: str):
        words = far.words(1, sys.executable, "-m", "llamacli", *args)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(words, env=far.env | more, cwd=ROOT, bufsize=0, **pipes)
        self.text, self.said, self.times = "", "", []
        self._threads = [threading.Thread(target=self._read, args=(name,)) for name in ("stdout", "stderr")]
        for thread in self._threads:
            thread.start()

    def _read(self, name: str) -> None:
        while data := os.read(getattr(self.process, name).fileno(), 1 << 16):
            if name == "stdout":
                self.times.append(time.monotonic())
                self.text += data.decode(errors="replace")
            else:
                self.said += data.decode(errors="replace")

    def until(self, met, seconds: float = 120) -> bool:
        """Wait until `met()`; False if the command ends before."""
        end = time.monotonic() + seconds
        while not met():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() < end, f"waited {seconds} s\n{self.text}\n{self.said}"
            time.sleep(0.002)
        return True

    def has(self, n: int) -> bool:
        """Wait for `n` characters of the answer."""
        return self.until(lambda: len(self.text) >= n)

    def type(self, line: str) -> None:
        """Write a line to its stdin."""
        os.write(self.process.stdin.fileno(), line.encode() + b"\n")

    def waited(self, since: float = 0) -> float:
        """The longest pause between two pieces of output that ended after `since`, in seconds."""
        return max((b - max(a, since) for a, b in zip(self.times, self.times[1:], strict=False) if b > since), default=0.0)

    def end(self, seconds: float = 120) -> "Command":
        """Wait for its end."""
        self.process.stdin.close()
        try:
            self.process.wait(seconds)
        finally:
            self.process.kill()
            for thread in self._threads:
                thread.join()
        return self


def told(command: Command) -> str:
    """The notes of the command in one line for a table."""
    return " | ".join(command.said.splitlines())
