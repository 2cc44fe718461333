"""Windows of a mapped file for a GPU: whole pages, adopted where that is possible, else copied."""

import mmap

import numpy as np
import pytest
import tiny
from installed import needed

mx = needed("mlx.core")

from llamacli.files.gguf import open_gguf  # noqa: E402
from llamacli.mlx import memory  # noqa: E402


@pytest.fixture
def gguf(tmp_path):
    return open_gguf(tiny.tiny_gguf(tmp_path / "tiny.gguf"))


def bytes_of(window, tensor):
    return np.array(window.array).reshape(-1)[window.offset : window.offset + tensor.nbytes]


def test_pages_around_a_tensor_are_adopted(gguf, monkeypatch):
    """As Metal does: it takes whole pages only, the last of a file too, and makes no copy."""
    asked = []

    def adopt(array, copy):
        assert copy is False
        assert array.ctypes.data % mmap.PAGESIZE == 0
        assert array.nbytes % mmap.PAGESIZE == 0
        assert max(array.shape) < 1 << 31
        asked.append(array)
        return mx.array(array)

    monkeypatch.setattr(mx, "asarray", adopt)
    for tensor in gguf.tensors.values():
        window = memory.window(tensor, adopts=True)
        assert window.adopted
        np.testing.assert_array_equal(bytes_of(window, tensor), tensor.data)
    assert len(asked) == len(gguf.tensors)


def test_pages_that_are_not_adopted_are_copied(gguf):
    """MLX's CPU build refuses, as Metal may."""
    for adopts in (True, False):
        for tensor in gguf.tensors.values():
            window = memory.window(tensor, adopts)
            assert not window.adopted
            np.testing.assert_array_equal(bytes_of(window, tensor), tensor.data)


def test_a_tensor_at_an_odd_byte_is_copied_since_kernels_read_two_at_a_time(gguf, monkeypatch):
    monkeypatch.setattr(mx, "asarray", lambda *_, **__: pytest.fail("adopted"))
    whole = np.frombuffer(gguf.maps[0], np.uint8)
    for tensor in gguf.tensors.values():
        moved = tensor._replace(data=whole[tensor.offset - 1 : tensor.offset - 1 + tensor.nbytes])
        window = memory.window(moved, adopts=True)
        assert (window.offset, window.adopted) == (0, False)
        np.testing.assert_array_equal(bytes_of(window, moved), moved.data)
