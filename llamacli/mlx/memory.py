"""Bytes of a tensor where the GPU reads them: pages of the mapped file, adopted without a copy, or a copy where that fails; and
memory that files are read into.

In: a tensor of an open GGUF. Out: a `Window`. Metal adopts memory that begins and ends at a page. So a window spans the whole
pages around a tensor, and kernels are told the byte at which the tensor begins.
"""

import ctypes
import mmap
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from llamacli.files import pages
from llamacli.files.gguf import Tensor

ALIGNED = 2  # kernels read two bytes at a time; sizes of all block formats are even


class Window(NamedTuple):
    """A tensor's bytes begin at byte `offset` of `array`, uint8 [n_pages, page size]. `owner` keeps adopted memory alive."""

    array: mx.array
    offset: int
    adopted: bool
    owner: object


def window(tensor: Tensor, adopts: bool) -> Window:
    """The bytes of a tensor; `adopts`: whether the device can read this process's memory (Metal)."""
    address = tensor.data.ctypes.data
    if adopts and address % ALIGNED == 0:
        start = address // mmap.PAGESIZE * mmap.PAGESIZE
        n_pages = -(
            -(address + tensor.nbytes - start) // mmap.PAGESIZE
        )  # a map's last page is whole, behind the file's end too
        memory = (ctypes.c_uint8 * (n_pages * mmap.PAGESIZE)).from_address(start)
        whole = np.frombuffer(memory, np.uint8).reshape(n_pages, mmap.PAGESIZE)  # 2-D: sizes of one dimension end at 2^31
        try:
            return Window(mx.asarray(whole, copy=False), address - start, True, tensor.data)
        except (ValueError, RuntimeError):
            pass
    return copied(tensor)


def copied(tensor: Tensor) -> Window:
    """A copy of a tensor's bytes in memory of the device; the file's pages are dropped."""
    n_pages = -(-tensor.nbytes // mmap.PAGESIZE)
    array = mx.zeros((n_pages, mmap.PAGESIZE), mx.uint8)
    mx.eval(array)
    np.array(array, copy=False).reshape(-1)[: tensor.nbytes] = tensor.data
    pages.drop_pages(tensor.data.ctypes.data, tensor.nbytes)
    return Window(array, 0, False, None)


def bank(nbytes: int, adopts: bool) -> tuple[mmap.mmap | memoryview, Window]:
    """Memory of `nbytes` from a page on, which the host writes and the device reads; MLX does not see the writes."""
    n_pages = -(-nbytes // mmap.PAGESIZE)
    if adopts:
        buffer = pages.memory(n_pages * mmap.PAGESIZE)
        whole = np.frombuffer(buffer, np.uint8).reshape(n_pages, mmap.PAGESIZE)
        try:
            return buffer, Window(mx.asarray(whole, copy=False), 0, True, buffer)
        except (ValueError, RuntimeError):
            pass
    array = mx.zeros((n_pages + 1, mmap.PAGESIZE), mx.uint8)
    mx.eval(array)
    view = np.array(array, copy=False).reshape(-1)
    skipped = -view.ctypes.data % mmap.PAGESIZE
    return memoryview(view)[skipped : skipped + nbytes], Window(array, skipped, False, view)
