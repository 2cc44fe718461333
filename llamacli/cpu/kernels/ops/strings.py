"""Lists of strings as files keep them, each behind its length in eight bytes, little-endian: find the end, put them together.

A vocabulary has hundreds of thousands; Python takes a third of a second for them, this a few milliseconds. In: addresses
and sizes. Out: an end that was checked, or bytes with separators. Knows nothing of text.
"""

from typing import NamedTuple

import numpy as np
from numpy import int64, uint8

from llamacli.cpu.kernels.jit.intrinsics import Address, Count, kernel, pointer

LENGTH = 8  # bytes of a length


class _EndArguments(NamedTuple):
    start: Address
    size: Count
    count: Count
    result: Address


@kernel(_EndArguments)
def _end(a, thread, threads):
    """result = bytes that `count` strings take, -1 if they do not fit into `size`."""
    start, size = a.start, a.size
    result, pos = pointer(a.result, int64), int64(0)
    for _ in range(a.count):
        if size - pos < LENGTH:
            result[0] = -1
            return
        length = pointer(start + pos, int64)[0]
        pos += LENGTH
        if length < 0 or length > size - pos:  # a length past 2^63 is negative here
            result[0] = -1
            return
        pos += length
    result[0] = pos


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


def end(buffer: np.ndarray, count: int) -> int:
    """Bytes that the first `count` strings of `buffer` (uint8) take, or -1 if it does not hold so many."""
    return _run(_end, buffer.ctypes.data, buffer.nbytes, min(count, buffer.nbytes // LENGTH + 1))


def join(buffer: np.ndarray, separator: int) -> bytes:
    """The strings that make up `buffer` (uint8; measured by `end`), each followed by the byte `separator`."""
    out = np.empty(buffer.nbytes, np.uint8)  # a separator is shorter than a length
    return out[: _run(_join, buffer.ctypes.data, buffer.nbytes, separator, out.ctypes.data)].tobytes()


def _run(driver, *arguments: int) -> int:
    result = np.zeros(1, np.int64)
    packed = driver.pack(driver.arguments(*arguments, result.ctypes.data))
    driver(packed.ctypes.data, 0, 1)
    return int(result[0])
