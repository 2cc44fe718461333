"""Direct reads: several in flight, from a file into the memory where the bytes are used, without the page cache.

In: a tensor that consists of equal slices in a file, and memory. Out: futures of the reads, and the address of a slice once its
reads are done. Direct reads leave no copy in the page cache, which would count against the memory limit. A file system that
refuses them (on opening or on the first read) is read through the page cache instead, and `notices` says so once.
"""

import errno
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

from llamacli.errors import ModelFileError, next_step
from llamacli.files import pages
from llamacli.files.gguf import Tensor

BLOCK = max(4096, mmap.PAGESIZE)  # alignment of direct reads, in the file and in memory; ZFS asks for whole pages
PIECE = pages.LARGE  # bytes of one read
IN_FLIGHT = 8  # reads in flight: an SSD needs several to reach its full speed
Memory = mmap.mmap | memoryview  # what files are read into
_F_NOCACHE = 48  # macOS: fcntl for reads that leave nothing in the page cache


def open_direct(path: os.PathLike | str) -> int:
    """A descriptor for direct reads. OSError if the file is missing or its file system has no direct reads."""
    file = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0) | os.O_CLOEXEC)
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(file, _F_NOCACHE, 1)
    return file


def make_buffered(file: int) -> None:
    """Switch a descriptor of `open_direct` to ordinary reads through the page cache."""
    import fcntl

    if sys.platform == "darwin":
        fcntl.fcntl(file, _F_NOCACHE, 0)
    else:
        fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) & ~getattr(os, "O_DIRECT", 0))


def make_direct(file: int) -> bool:
    """Switch a descriptor to direct reads and writes; False where its file system has none."""
    import fcntl

    try:
        if sys.platform == "darwin":
            fcntl.fcntl(file, _F_NOCACHE, 1)
        else:
            fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_DIRECT)
    except (OSError, AttributeError):
        return False
    return True


class TensorSlices(NamedTuple):
    """A tensor as equal slices that follow one another in the file: the experts of a layer, or one slice."""

    path: Path
    file: int
    offset: int
    nbytes: int  # of one slice

    def span(self, k: int) -> tuple[int, int, int]:
        """The aligned range of the file around slice k: its offset, its bytes, and where in it the slice begins."""
        first = self.offset + k * self.nbytes
        start = first // BLOCK * BLOCK
        return start, _up(first + self.nbytes) - start, first - start

    @property
    def buffer_bytes(self) -> int:
        """Bytes of a buffer that holds the span of any slice."""
        return _up(self.nbytes) + BLOCK


class DirectReader:
    """Open files and the threads that read them.

    `notices`: one line for each file that had to be read through the page cache.
    """

    def __init__(self):
        self.notices: list[str] = []
        self._files: dict[Path, int] = {}
        self._direct: dict[int, bool] = {}
        self._readers = ThreadPoolExecutor(IN_FLIGHT, "read")
        # Its own thread: in the queue of `_readers` the reads that need this memory come first.
        self._clearer = ThreadPoolExecutor(1, "clear")
        self._lock, self._reading, self._since, self._nbytes, self._seconds = Lock(), 0, 0.0, 0, 0.0
        self._close_files = weakref.finalize(self, _close, self._files)

    def slices(self, tensor: Tensor, n: int) -> TensorSlices:
        """A tensor as `n` slices. ModelFileError if its file cannot be opened."""
        if tensor.path not in self._files:
            self._files[tensor.path] = self._open(tensor.path)
        return TensorSlices(tensor.path, self._files[tensor.path], tensor.offset, tensor.nbytes // n)

    def adopt(self, path: Path, file: int, direct: bool, nbytes: int) -> TensorSlices:
        """Slices of `nbytes` bytes of a file that the caller has opened and will close.

        `direct`: whether its reads are direct.
        """
        self._direct[file] = direct
        return TensorSlices(path, file, 0, nbytes)

    def begin(self, slices: TensorSlices, k: int, memory: Memory, at: int) -> tuple[list[Future], int]:
        """Start to read slice k into `memory` from byte `at` on.

        Returns the reads, and the slice's address once they are done.
        """
        start, size, inside = slices.span(k)
        needed, view, first, done, reads = inside + slices.nbytes, memoryview(memory), address(memory) + at, 0, []
        while done < needed:
            n = min(PIECE - (first + done) % PIECE, size - done)  # no two reads into one huge page: both would clear it
            piece = view[at + done : at + done + n]
            reads.append(self._readers.submit(self._piece, slices, start + done, piece, min(n, needed - done)))
            done += n
        return reads, first + inside

    def clear(self, memory: Memory, size: int, slots: Sequence[int]) -> Future:
        """Start to fault in memory that will be read into; `slots` are numbers of ranges of `size` bytes."""
        readers = self._readers

        def work() -> None:
            for slot in slots:
                if self._readers is readers:  # `stop` replaces them
                    pages.clear(address(memory) + slot * size, size)

        return self._clearer.submit(work)

    def take_counts(self) -> tuple[int, float]:
        """Bytes read since the last call, and the seconds during which at least one read was in flight."""
        with self._lock:
            taken, self._nbytes, self._seconds = (self._nbytes, self._seconds), 0, 0.0
        return taken

    def stop(self) -> None:
        """Cancel reads that have not started and wait for the others, even if Ctrl-C is pressed meanwhile."""
        old, self._readers = self._readers, ThreadPoolExecutor(IN_FLIGHT, "read")
        while True:
            try:
                return old.shutdown(wait=True, cancel_futures=True)
            except KeyboardInterrupt:
                continue

    def close(self) -> None:
        """Wait for running reads, end the threads and close the files. Closing twice is allowed."""
        for threads in (self._readers, self._clearer):
            threads.shutdown(wait=True, cancel_futures=True)
        self._close_files()

    def _open(self, path: Path) -> int:
        try:
            file, direct = open_direct(path), True
        except OSError:  # a file system without direct reads, or no such file: the ordinary open tells which
            file, direct = _opened(path), False
        self._direct[file] = direct
        return file

    def _piece(self, slices: TensorSlices, offset: int, view: memoryview, needed: int) -> None:
        """Read at least `needed` bytes; the file may end before `view` is full.

        A read may be short for reasons other than the end of the file (FUSE, NFS, 9p, a signal): only 0 bytes are the end.
        """
        file, done, expected = slices.file, 0, f"{slices.path}: expected {needed} bytes at byte {offset}"
        with self._clock(len(view)):
            while True:
                direct = self._direct[file]
                try:
                    n = os.preadv(file, [view[done:]], offset + done)
                except OSError as error:
                    if error.errno == errno.EINVAL and direct:
                        self._fall_back(slices)
                        continue
                    raise ModelFileError(f"{expected}, found a read error ({error.strerror}); check the disk") from None
                if done + n >= needed:
                    break
                if n == 0:
                    raise ModelFileError(
                        f"{expected}, found {done}: the file was cut while in use; put it back and load it again"
                    )
                if not direct:
                    done += n
                elif n < BLOCK:
                    self._fall_back(slices)  # a direct read cannot continue in the middle of a block
                else:
                    done += n // BLOCK * BLOCK
        if not self._direct[file] and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file, offset, len(view), os.POSIX_FADV_DONTNEED)

    def _fall_back(self, slices: TensorSlices) -> None:
        """Read this file through the page cache from now on; other threads may have found out at the same time."""
        with self._lock:
            if not self._direct[slices.file]:
                return
            try:
                make_buffered(slices.file)
            except OSError as error:
                raise ModelFileError(
                    f"{slices.path}: expected direct or ordinary reads, found neither ({error.strerror}); copy the file"
                ) from None
            self._direct[slices.file] = False
            self.notices.append(f"{slices.path}: its file system has no direct reads; reading through the page cache, slower")

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
    """Wait for all of them, whether they succeed, fail or were cancelled."""
    for future in futures:
        if not future.cancelled():
            future.exception()


def failed(futures: Iterable[Future]) -> bool:
    """Whether any of these finished futures was cancelled or raised."""
    return any(future.cancelled() or future.exception() for future in futures)


def address(memory: Memory) -> int:
    """The address at which a map begins."""
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
            f"{path}: expected a GGUF file, found one that cannot be read ({error.strerror}); {next_step(error, 'check it')}"
        ) from None
