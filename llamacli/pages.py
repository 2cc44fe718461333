"""Pages of mapped files: bring them into memory before they are needed.

In: addresses and sizes. Out: nothing that a program must see: what the system cannot do is left undone. Knows nothing of
tensors.
"""

import ctypes
import mmap
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress

_POPULATE_READ = 22  # Linux 5.14 and newer: read the pages and enter them into the page table, many at a time
_RANDOM, _WILLNEED = 1, 3
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


def lock(address: int, size: int) -> bool:
    """Keep a range of whole pages from being swapped out or compressed, if the system's limit allows it."""
    return _libc().mlock(address, size) == 0


def on_large_pages(maps: Iterable[mmap.mmap]) -> None:
    """What is read from these files from now on comes in pages of 2 MB, where the file system has them: a page table of a
    five-hundredth, so that reading weights front to back hardly misses it. What is in memory already stays as it is.
    """
    for mapped in maps:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):
                mapped.madvise(mmap.MADV_HUGEPAGE)


def random_access(address: int, size: int) -> None:
    """A range of which single pages are needed: bring no neighbours with them."""
    start = address // mmap.PAGESIZE * mmap.PAGESIZE
    _libc().madvise(start, address + size - start, _RANDOM)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mlock.argtypes = ctypes.c_void_p, ctypes.c_size_t
    return libc
