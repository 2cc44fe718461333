"""Joins a list of strings as a file stores it: each behind its length, 8 bytes little-endian.

In: bytes whose lengths have been checked. Out: the strings with a separator after each, ready to be decoded and split at once.
Python takes three times as long for a vocabulary of 400,000 strings.
"""

from typing import NamedTuple

import numpy as np
from numpy import int64, uint8

from llamacli.cpu.kernels.jit.intrinsics import Address, Count, kernel, pointer

LENGTH = 8  # bytes of a length


class _JoinArguments(NamedTuple):
    start: Address
    size: Count
    separator: Count
    out: Address
    result: Address


@kernel(_JoinArguments)
def _join(a, thread, threads):
    """out = the strings of `size` checked bytes, `separator` after each; result = bytes written."""
    start, size, separator = a.start, a.size, a.separator
    source, out, result = pointer(start, uint8), pointer(a.out, uint8), pointer(a.result, int64)
    pos, end = int64(0), int64(0)
    while pos < size:
        length = pointer(start + pos, int64)[0]
        pos += LENGTH
        for i in range(length):
            out[end + i] = source[pos + i]
        pos += length
        out[end + length] = separator
        end += length + 1
    result[0] = end


def join(buffer: np.ndarray, separator: int) -> bytes:
    """The strings that make up `buffer` (uint8; lengths checked), each followed by the byte `separator`."""
    out = np.empty(buffer.nbytes, np.uint8)  # a separator is shorter than a length
    return out[: _run(_join, buffer.ctypes.data, buffer.nbytes, separator, out.ctypes.data)].tobytes()


def _run(driver, *arguments: int) -> int:
    result = np.zeros(1, np.int64)
    packed = driver.pack(driver.arguments(*arguments, result.ctypes.data))
    driver(packed.ctypes.data, 0, 1)
    return int(result[0])
