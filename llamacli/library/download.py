"""Downloads one file from a hub: it is complete and checked, or absent.

In: a `Remote` (address, size, SHA-256) and where it belongs. Out: the file under its name, or a DownloadError. Until it is
whole it is NAME.part, with NAME.part.json beside it; then NAME.json keeps its checksum. Bytes received are kept when the
connection ends, at Ctrl-C and at a kill; the next try asks only for the rest. The checksum is computed as bytes are written; a
file with another checksum never gets the name.
"""

import fcntl
import hashlib
import http.client
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from llamacli.errors import DownloadError, OutputError
from llamacli.library.checksums import BLOCK, keep
from llamacli.library.http import Busy, Hub
from llamacli.library.hub import Remote

SYNC = 64 << 20  # bytes between two fsyncs: what a power cut may spoil
SLOW, WINDOW = 1024, 60.0  # bytes a second below which a connection counts as dead, and the seconds that are looked at


class Download:
    """`follow(done, total)` is called with bytes. Only one process at a time can download a file."""

    def __init__(self, hub: Hub, remote: Remote, target: Path, follow: Callable[[int, int], None] = lambda done, total: None):
        self._hub, self._remote, self._target, self._follow = hub, remote, target, follow
        self._part = target.with_name(f"{target.name}.part")
        self._state = target.with_name(f"{target.name}.part.json")
        self.received = 0  # bytes that this object got over the network
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise _unwritable(self._part, error) from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise DownloadError(f"{self._part}: expected it free, found another process that downloads it; wait") from None
        except OSError:  # a file system without locks
            pass
        self._synced = self._trusted()
        if self._synced is None or self.have > remote.size:
            self._restart()
        # a power cut may have spoiled what an earlier process wrote last: where it is to be fetched again from, else 0
        self._sure = self._synced if self._synced < self.have else 0

    def __enter__(self) -> "Download":
        return self

    def __exit__(self, *_) -> None:
        os.close(self._fd)
        if not self._target.exists() and self._part.exists() and self._part.stat().st_size == 0:
            self.forget()

    @property
    def have(self) -> int:
        """Bytes received so far."""
        return os.fstat(self._fd).st_size

    def head(self, n: int) -> bytes:
        """The first `n` bytes, or the whole file if it is shorter."""
        n = min(n, self._remote.size)
        self._fetch_to(n, None)
        return os.pread(self._fd, n, 0)

    def finish(self) -> None:
        """Fetch the rest, check the file and give it its name. DownloadError if its checksum is not the hub's."""
        while True:
            sha256 = self._hashed()
            self._fetch_to(self._remote.size, sha256)
            if sha256.hexdigest() == self._remote.sha256:
                break
            if not self._sure:
                self.forget()
                raise DownloadError(
                    f"{self._target.name}: expected SHA-256 {self._remote.sha256}, found {sha256.hexdigest()}; removed, "
                    f"run the command again to fetch it anew"
                )
            os.ftruncate(self._fd, self._sure)
            self._synced, self._sure = self._sure, 0
        try:
            os.fsync(self._fd)
            os.replace(self._part, self._target)
            _sync_folder(self._target.parent)
        except OSError as error:
            raise _unwritable(self._target, error) from None
        keep(self._target, self._remote.sha256)
        self._state.unlink(missing_ok=True)

    def forget(self) -> None:
        """Remove the bytes received."""
        for path in (self._part, self._state):
            path.unlink(missing_ok=True)

    def _trusted(self) -> int | None:
        """Bytes that are surely on the disk; None if the part is of another file."""
        try:
            state = json.loads(self._state.read_bytes()[:4096])
            if (state["sha256"], state["size"]) == (self._remote.sha256, self._remote.size):
                return max(0, min(int(state["synced"]), self.have))
        except (OSError, ValueError, TypeError, KeyError, OverflowError):
            pass
        return None

    def _restart(self) -> None:
        os.ftruncate(self._fd, 0)
        self._synced = 0
        self._note()

    def _note(self) -> None:
        """Write down what the part is of, and how much of it is surely on the disk."""
        text = json.dumps(
            {"url": self._remote.url, "size": self._remote.size, "sha256": self._remote.sha256, "synced": self._synced}
        )
        new = self._state.with_name(f"{self._state.name}.new")
        try:
            new.write_text(text)
            os.replace(new, self._state)
        except OSError as error:
            raise _unwritable(self._state, error) from None

    def _hashed(self):
        """The checksum of the bytes received so far."""
        sha256, at = hashlib.sha256(), 0
        while data := os.pread(self._fd, BLOCK, at):
            sha256.update(data)
            at += len(data)
            self._follow(at, self._remote.size)
        return sha256

    def _fetch_to(self, end: int, sha256) -> None:
        while self.have < end:
            self._hub.patiently(lambda: self._fetch_once(end, sha256), lambda: self.received)
        self._sync()

    def _fetch_once(self, end: int, sha256) -> None:
        """One connection, as far as it goes. Busy where it broke off."""
        start, size = self.have, self._remote.size
        with self._hub.open(self._remote.url, Range=f"bytes={start}-{end - 1}") as response:
            if response.status == 200 and start:
                raise DownloadError(
                    f"{self._target.name}: expected the bytes from {start} on, found a server that gives the whole file only; "
                    f"remove {self._part} to begin anew"
                )
            self._check(response, start, size)
            at, began, before = start, time.monotonic(), start
            while at < end:
                try:
                    data = response.read1(min(BLOCK, end - at))
                except (OSError, http.client.HTTPException) as error:
                    raise Busy(f"{self._target.name}: the connection broke off at byte {at} ({error})"[:200]) from None
                if not data:
                    raise Busy(f"{self._target.name}: the connection ended at byte {at} of {size}")
                self._write(data, at)
                if sha256 is not None:
                    sha256.update(data)
                at += len(data)
                self.received += len(data)
                self._follow(at, size)
                if at - self._synced >= SYNC:
                    self._sync()
                if (now := time.monotonic()) - began > WINDOW:
                    if at - before < SLOW * WINDOW:
                        raise Busy(f"{self._target.name}: under {SLOW} bytes a second")
                    began, before = now, at

    def _check(self, response, start: int, size: int) -> None:
        """DownloadError unless the answer is what was asked for."""
        said, encoding = response.headers.get("Content-Range"), response.headers.get("Content-Encoding", "identity")
        if response.status == 206:
            right = said is not None and said.startswith(f"bytes {start}-") and said.endswith((f"/{size}", "/*"))
        else:
            right, said = response.status == 200 and response.length in (None, size), f"{response.length} bytes in all"
        if not right or encoding != "identity":
            raise DownloadError(
                f"{self._target.name}: expected bytes from {start} on of {size}, found {said!r:.60}, HTTP {response.status}; "
                f"the file on the hub has changed, run the command again"
            )

    def _write(self, data: bytes, at: int) -> None:
        try:
            while data:
                n = os.pwrite(self._fd, data, at)
                data, at = data[n:], at + n
        except OSError as error:
            raise _unwritable(self._part, error) from None

    def _sync(self) -> None:
        if self.have > self._synced:
            with suppress(OSError):  # a file system that cannot
                os.fsync(self._fd)
            self._synced = self.have
            self._note()


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(fd)
    finally:
        os.close(fd)


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{path}: expected to write it, found: {error.strerror or error}; free some room or choose LLAMACLI_MODELS"
    )
