"""Direct reads: several at a time, from a file on disk to where the bytes are used, past the page cache.

In: where equal parts of a tensor lie in a file, and memory. Out: futures of the reads, and the address at which a part will
begin. What is read leaves no copy in the page cache, which would count against a promise of memory. Knows nothing of experts or
slots.
"""

import mmap
import os
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from time import perf_counter
from typing import NamedTuple

import numpy as np

from llamacli.errors import ModelFileError
from llamacli.files import pages
from llamacli.files.gguf import Tensor

BLOCK = 4096  # direct reads begin and end at multiples of it, in the file and in memory
PIECE = pages.LARGE  # bytes of one read from disk
LANES = 8  # reads in flight: a disk needs some to be at its best
_F_NOCACHE = 48  # macOS's fcntl for reads that leave no pages behind


def open_direct(path: os.PathLike | str) -> int:
    """A file, to be read past the page cache. OSError if there is none, or its file system has no such reads."""
    file = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0) | os.O_CLOEXEC)
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(file, _F_NOCACHE, 1)
    return file


class Stack(NamedTuple):
    """A tensor's equal parts, one after the other in the file."""

    path: Path
    file: int
    offset: int
    nbytes: int  # of one part

    def span(self, part: int) -> tuple[int, int, int]:
        """The aligned stretch of the file around a part: offset, bytes; and where in it the part begins."""
        first = self.offset + part * self.nbytes
        start = first // BLOCK * BLOCK
        return start, _up(first + self.nbytes) - start, first - start

    @property
    def room(self) -> int:
        """Bytes that hold any part's span."""
        return _up(self.nbytes) + BLOCK


class Reads:
    """Open files and the threads that read them."""

    def __init__(self):
        self._files: dict[Path, int] = {}
        self._direct: dict[int, bool] = {}
        self._lanes = ThreadPoolExecutor(LANES, "read")
        self._clearer = ThreadPoolExecutor(1, "clear")  # in a lane it would wait behind reads that are to come into that memory
        self._lock, self._reading, self._since, self._nbytes, self._seconds = Lock(), 0, 0.0, 0, 0.0
        weakref.finalize(self, _close, self._files)

    def stack(self, tensor: Tensor, n: int) -> Stack:
        """A tensor as `n` parts."""
        if tensor.path not in self._files:
            self._files[tensor.path] = self._open(tensor.path)
        return Stack(tensor.path, self._files[tensor.path], tensor.offset, tensor.nbytes // n)

    def begin(self, stack: Stack, part: int, memory: mmap.mmap, at: int) -> tuple[list[Future], int]:
        """Begin to read a part into `memory` from byte `at` on: the reads, and the part's address once they are through."""
        start, size, inside = stack.span(part)
        needed, view, first, done, reads = inside + stack.nbytes, memoryview(memory), address(memory) + at, 0, []
        while done < needed:
            n = min(PIECE - (first + done) % PIECE, size - done)  # no two reads into one large page: both would clear it
            piece = view[at + done : at + done + n]
            reads.append(self._lanes.submit(self._piece, stack, start + done, piece, min(n, needed - done)))
            done += n
        return reads, first + inside

    def clear(self, memory: mmap.mmap, size: int, slots: Sequence[int]) -> Future:
        """Begin to have memory cleared that will be read into, given as numbers of stretches of `size` bytes."""
        lanes = self._lanes

        def work() -> None:
            for slot in slots:
                if self._lanes is lanes:  # or else it was told to stop
                    pages.clear(address(memory) + slot * size, size)

        return self._clearer.submit(work)

    def take(self) -> tuple[int, float]:
        """Bytes read since the last call, and the seconds in which anything was being read."""
        with self._lock:
            taken, self._nbytes, self._seconds = (self._nbytes, self._seconds), 0, 0.0
        return taken

    def stop(self) -> None:
        """Return when nothing is being read any more, Ctrl-C or not; what had not begun is cancelled."""
        old, self._lanes = self._lanes, ThreadPoolExecutor(LANES, "read")
        while True:
            try:
                return old.shutdown(wait=True, cancel_futures=True)
            except KeyboardInterrupt:
                continue

    def _open(self, path: Path) -> int:
        try:
            file, direct = open_direct(path), True
        except OSError:  # a file system without direct reads
            file, direct = _opened(path), False
        self._direct[file] = direct
        return file

    def _piece(self, stack: Stack, offset: int, view: memoryview, needed: int) -> None:
        """Read until `needed` bytes are there; the file may end before the view does."""
        done, expected = 0, f"{stack.path}: expected {needed} bytes at byte {offset}"
        with self._clock(len(view)):
            while done < needed:
                try:
                    n = os.preadv(stack.file, [view[done:]], offset + done)
                except OSError as error:
                    raise ModelFileError(f"{expected}, found a read error ({error.strerror}); check the disk") from None
                done += n
                if done < needed and (n == 0 or n % BLOCK):
                    raise ModelFileError(
                        f"{expected}, found {done}: the file was cut while in use; put it back and load it again"
                    )
        if not self._direct[stack.file] and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stack.file, offset, len(view), os.POSIX_FADV_DONTNEED)

    @contextmanager
    def _clock(self, nbytes: int) -> Iterator[None]:
        with self._lock:
            self._reading += 1
            if self._reading == 1:
                self._since = perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._reading -= 1
                self._nbytes += nbytes
                if not self._reading:
                    self._seconds += perf_counter() - self._since


def settle(futures: Iterable[Future]) -> None:
    """Return when none of them goes on any more, however they end."""
    for future in futures:
        if not future.cancelled():
            future.exception()


def failed(futures: Iterable[Future]) -> bool:
    """Whether any of these, which do not go on any more, has not brought what it should."""
    return any(future.cancelled() or future.exception() for future in futures)


def address(memory: mmap.mmap) -> int:
    """Where memory begins."""
    return np.frombuffer(memory, np.uint8).ctypes.data


def _close(files: dict[Path, int]) -> None:
    while files:
        os.close(files.popitem()[1])


def _up(n: int) -> int:
    return -(-n // BLOCK) * BLOCK


def _opened(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise ModelFileError(
            f"{path}: expected a GGUF file, found one that cannot be read ({error.strerror}); check it"
        ) from None
