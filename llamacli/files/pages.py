"""Memory pages: files as memory, allocation on huge pages, and hints to the kernel about prefetching and dropping them.

In: open files, addresses and sizes in bytes. Hints are best effort: what the system cannot do is skipped without an error.
"""

import ctypes
import errno
import mmap
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import BinaryIO

LARGE = 2 << 20  # bytes of a huge page
_POPULATE_READ = 22  # Linux 5.14 and newer: fault the pages in, many in one call
_POPULATE_WRITE = 23  # the same for pages that will be written to
_RANDOM, _WILLNEED, _DONTNEED = 1, 3, 4
_PIECE = 64 << 20  # bytes of one call, which cannot be interrupted


def map_file(file: BinaryIO, nbytes: int) -> mmap.mmap:
    """The first `nbytes` of an open file as read-only memory. OSError or ValueError if it cannot be mapped.

    Some file systems have private maps only: FUSE with direct_io, as some network drives are mounted.
    """
    try:
        return mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_READ)
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        return mmap.mmap(file.fileno(), nbytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)


def populate(ranges: Iterable[tuple[int, int]]) -> None:
    """Prefetch (address, bytes) ranges in a background thread, if the system gives one."""
    libc, advice = _libc(), _POPULATE_READ if sys.platform == "linux" else _WILLNEED

    def work() -> None:
        for address, size in ranges:
            for start in range(address // mmap.PAGESIZE * mmap.PAGESIZE, address + size, _PIECE):
                libc.madvise(start, min(_PIECE, address + size - start), advice)

    with suppress(RuntimeError):
        threading.Thread(target=work, daemon=True).start()


def memory(nbytes: int) -> mmap.mmap:
    """Anonymous memory on huge pages where the system has them; it becomes resident when it is written to.

    Direct reads into huge pages are nearly twice as fast as into small ones, which the kernel pins one by one.
    """
    new = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    on_large_pages([new])
    return new


def clear(address: int, size: int) -> None:
    """Make new memory resident (and zero) now rather than on the first write."""
    if sys.platform == "linux":
        for start in range(address // mmap.PAGESIZE * mmap.PAGESIZE, address + size, _PIECE):
            _libc().madvise(start, min(_PIECE, address + size - start), _POPULATE_WRITE)


def lock(address: int, size: int) -> bool:
    """Keep a range of whole pages from being swapped or compressed. Returns whether the system's limit allowed it."""
    return _libc().mlock(address, size) == 0


def on_large_pages(maps: Iterable[mmap.mmap]) -> None:
    """Ask for huge pages for these maps, file maps included: reading weights front to back then rarely misses the TLB.

    Pages that are resident already stay as they are. Where a page has more than 4 KiB, a huge one has 32 or 512 MB, and
    touching a part of it would hold all of it.
    """
    for mapped in maps:
        if hasattr(mmap, "MADV_HUGEPAGE") and mmap.PAGESIZE <= 4096:
            with suppress(OSError):
                mapped.madvise(mmap.MADV_HUGEPAGE)


def random_access(address: int, size: int) -> None:
    """Switch read-ahead off for a range of which single pages are needed."""
    start = address // mmap.PAGESIZE * mmap.PAGESIZE
    _libc().madvise(start, address + size - start, _RANDOM)


def drop_pages(address: int, size: int) -> None:
    """Drop the pages of a mapped file from this process; the next access reads them again.

    Anonymous memory loses its contents; its address must be that of a page then.
    """
    if sys.platform == "linux":
        start = address // mmap.PAGESIZE * mmap.PAGESIZE
        _libc().madvise(start, address + size - start, _DONTNEED)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mlock.argtypes = ctypes.c_void_p, ctypes.c_size_t
    return libc
