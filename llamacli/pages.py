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
_WILLNEED = 3
_PIECE = 64 << 20  # bytes of one call, which cannot be broken off


def populate(ranges: Iterable[tuple[int, int]]) -> threading.Thread:
    """Begin to bring (address, bytes) ranges into memory, beside whatever else goes on."""
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    advice = _POPULATE_READ if sys.platform == "linux" else _WILLNEED

    def work() -> None:
        for address, size in ranges:
            for start in range(address // mmap.PAGESIZE * mmap.PAGESIZE, address + size, _PIECE):
                libc.madvise(start, min(_PIECE, address + size - start), advice)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread
