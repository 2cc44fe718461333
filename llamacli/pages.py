"""Pages of mapped files: bring them into memory before they are needed.

In: addresses and sizes. Out: nothing that a program must see: what the system cannot do is left undone. Knows nothing of
tensors.
"""

import ctypes
import mmap
import sys
import threading
from collections.abc import Iterable

_POPULATE_READ = 22  # Linux 5.14 and newer: read the pages and enter them into the page table, many at a time
_RANDOM, _WILLNEED = 1, 3
_PIECE = 64 << 20  # bytes of one call, which cannot be broken off


def populate(ranges: Iterable[tuple[int, int]], lock: bool = False) -> threading.Thread:
    """Begin to bring (address, bytes) ranges into memory, beside whatever else goes on; with `lock`, to stay there if the
    system's limit allows it.
    """
    libc, advice = _libc(), _POPULATE_READ if sys.platform == "linux" else _WILLNEED

    def work() -> None:
        for address, size in ranges:
            for start in range(address // mmap.PAGESIZE * mmap.PAGESIZE, address + size, _PIECE):
                length = min(_PIECE, address + size - start)
                if not (lock and libc.mlock(start, length) == 0):
                    libc.madvise(start, length, advice)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def random_access(address: int, size: int) -> None:
    """A range of which single pages are needed: bring no neighbours with them."""
    start = address // mmap.PAGESIZE * mmap.PAGESIZE
    _libc().madvise(start, address + size - start, _RANDOM)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    libc.mlock.argtypes = ctypes.c_void_p, ctypes.c_size_t
    return libc
