"""Pages of memory and of mapped files: large ones, and in memory before they are needed.

In: addresses and sizes. Out: memory; else nothing that a program must see: what the system cannot do is left undone. Knows
nothing of tensors.
"""

import ctypes
import mmap
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress

LARGE = 2 << 20  # bytes of a large page
_POPULATE_READ = 22  # Linux 5.14 and newer: read the pages and enter them into the page table, many at a time
_POPULATE_WRITE = 23  # the same for pages that will be written to
_RANDOM, _WILLNEED, _DONTNEED = 1, 3, 4
_PIECE = 64 << 20  # bytes of one call, which cannot be broken off


def populate(ranges: Iterable[tuple[int, int]]) -> threading.Thread:
    """Begin to bring (address, bytes) ranges into memory, beside whatever else goes on."""
    libc, advice = _libc(), _POPULATE_READ if sys.platform == "linux" else _WILLNEED

    def work() -> None:
        for address, size in ranges:
            for start in range(address // mmap.PAGESIZE * mmap.PAGESIZE, address + size, _PIECE):
                libc.madvise(start, min(_PIECE, address + size - start), advice)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def memory(nbytes: int) -> mmap.mmap:
    """Memory of its own, on large pages where the system has them; none of it is held before it is written to.

    A disk fills large pages nearly twice as fast as small ones, which it is handed one by one.
    """
    new = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    on_large_pages([new])
    return new


def clear(address: int, size: int) -> None:
    """Hold new memory now, which the system clears, rather than when it is first written to."""
    if sys.platform == "linux":
        for start in range(address // mmap.PAGESIZE * mmap.PAGESIZE, address + size, _PIECE):
            _libc().madvise(start, min(_PIECE, address + size - start), _POPULATE_WRITE)


def lock(address: int, size: int) -> bool:
    """Keep a range of whole pages from being swapped out or compressed, if the system's limit allows it."""
    return _libc().mlock(address, size) == 0


def on_large_pages(maps: Iterable[mmap.mmap]) -> None:
    """What comes into memory here from now on comes in pages of 2 MB, where the system has them, for files too: a page table
    of a five-hundredth, so that reading weights front to back hardly misses it. What is in memory already stays as it is.
    """
    for mapped in maps:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):
                mapped.madvise(mmap.MADV_HUGEPAGE)


def random_access(address: int, size: int) -> None:
    """A range of which single pages are needed: bring no neighbours with them."""
    start = address // mmap.PAGESIZE * mmap.PAGESIZE
    _libc().madvise(start, address + size - start, _RANDOM)


def let_go(address: int, size: int) -> None:
    """Pages of a mapped file that are not needed for now: they do not count as held; touched again, they come back.

    Of other memory the contents would be lost.
    """
    if sys.platform == "linux":
        start = address // mmap.PAGESIZE * mmap.PAGESIZE
        _libc().madvise(start, address + size - start, _DONTNEED)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mlock.argtypes = ctypes.c_void_p, ctypes.c_size_t
    return libc
