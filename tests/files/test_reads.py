"""Direct reads: the bytes of the file arrive, whatever a file system does with a read; only the end of the file is an end."""

import errno
import os
from concurrent.futures import wait
from types import SimpleNamespace

import numpy as np
import pytest

from llamacli.errors import ModelFileError
from llamacli.files import pages, reads
from llamacli.files.ggml import BY_NAME
from llamacli.files.gguf import Tensor
from llamacli.files.reads import BLOCK, DirectReader, address

SIZE, N = 40_000, 3  # bytes of a slice, no multiple of a block; slices
OFFSET = 96


@pytest.fixture
def tensor(tmp_path):
    """A tensor of three slices in a file that ends with it."""
    data = np.random.default_rng(1).integers(0, 256, OFFSET + N * SIZE, np.uint8)
    path = tmp_path / "model.gguf"
    path.write_bytes(data.tobytes())
    return Tensor("x", BY_NAME["Q8_0"], (N, SIZE // 34), data[OFFSET:], path, OFFSET)


def read_all(tensor, reader=None):
    """Every slice through a reader, as it lies in the reader's memory."""
    reader = reader or DirectReader()
    slices, found = reader.slices(tensor, N), []
    for k in range(N):
        memory = pages.memory(slices.buffer_bytes)
        futures, at = reader.begin(slices, k, memory, 0)
        wait(futures)
        for future in futures:
            future.result()
        start = at - address(memory)
        found.append(np.frombuffer(memory, np.uint8)[start : start + SIZE])
    return np.concatenate(found)


@pytest.fixture
def preadv(monkeypatch):
    """Replace os.preadv by `change(real, fd, view, offset)`."""
    real = os.preadv

    def install(change):
        monkeypatch.setattr(
            os, "preadv", lambda fd, views, offset: change(lambda v: real(fd, [v], offset), fd, views[0], offset)
        )

    return install


def direct(fd):
    import fcntl

    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))


def test_slices_arrive_as_they_lie_in_the_file(tensor):
    np.testing.assert_array_equal(read_all(tensor), tensor.data)


@pytest.mark.parametrize("most", [100, BLOCK, BLOCK + 5])
def test_a_short_read_goes_on(tensor, preadv, monkeypatch, most):
    """FUSE, NFS and 9p may return fewer bytes than were asked for, with direct reads and without."""
    monkeypatch.setattr(reads, "PIECE", 1 << 14)
    preadv(lambda read, fd, view, offset: read(view[:most]) if not direct(fd) else min(most, read(view)))
    np.testing.assert_array_equal(read_all(tensor), tensor.data)


def test_without_direct_reads_a_short_read_goes_on_too(tensor, preadv, monkeypatch):
    def refused(path):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(reads, "open_direct", refused)
    preadv(lambda read, fd, view, offset: read(view[:777]))
    np.testing.assert_array_equal(read_all(tensor), tensor.data)


def test_a_file_system_that_opens_but_refuses_direct_reads_is_read_otherwise_with_one_notice(tensor, preadv, monkeypatch):
    """ZFS with other alignments, disks with sectors above 4 KiB, some FUSE: EINVAL comes with the first read."""
    monkeypatch.setattr(reads, "PIECE", 1 << 13)  # several reads find it out at once
    refused = []

    def change(read, fd, view, offset):
        if direct(fd):
            refused.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return read(view)

    reader = DirectReader()
    preadv(change)
    np.testing.assert_array_equal(read_all(tensor, reader), tensor.data)
    assert refused
    (notice,) = reader.notices
    assert str(tensor.path) in notice and "page cache" in notice
    assert not direct(reader.slices(tensor, N).file)
    np.testing.assert_array_equal(read_all(tensor, reader), tensor.data)
    assert len(reader.notices) == 1


def test_einval_of_an_ordinary_read_is_an_error(tensor, preadv):
    def refused(read, fd, view, offset):
        raise OSError(errno.EINVAL, "Invalid argument")

    preadv(refused)
    with pytest.raises(ModelFileError, match="read error"):
        read_all(tensor)


def test_a_disk_that_fails_is_named(tensor, preadv):
    def failing(read, fd, view, offset):
        raise OSError(errno.EIO, "Input/output error")

    preadv(failing)
    with pytest.raises(ModelFileError, match=r"model\.gguf: .*Input/output error.*check the disk"):
        read_all(tensor)


@pytest.mark.parametrize("length", [0, BLOCK, OFFSET + SIZE + 1, OFFSET + N * SIZE - 1])
def test_a_file_that_was_cut_is_an_error(tensor, length):
    os.truncate(tensor.path, length)
    with pytest.raises(ModelFileError, match="was cut while in use"):
        read_all(tensor)


@pytest.mark.parametrize(("size", "asked"), [(4096, True), (16384, False), (65536, False)])
def test_huge_pages_are_asked_for_where_they_are_not_too_huge(size, asked, monkeypatch):
    calls = []
    monkeypatch.setattr(pages.mmap, "PAGESIZE", size)
    monkeypatch.setattr(pages.mmap, "MADV_HUGEPAGE", 14, raising=False)
    pages.on_large_pages([SimpleNamespace(madvise=calls.append)])
    assert calls == ([14] if asked else [])
