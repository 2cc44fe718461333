"""Windows of a mapped file for a GPU: whole pages, adopted where that is possible, else copied."""

import json
import mmap
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from installed import needed

mx = needed("mlx.core")
import cpp  # noqa: E402

from llamacli.files.gguf import open_gguf  # noqa: E402
from llamacli.mlx import memory  # noqa: E402
from quantize import shapes  # noqa: E402


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


LOADING = """
import json, re, sys
from pathlib import Path
import cpp
import mlx.core as mx
from llamacli.engine import Engine
from llamacli.files.gguf import open_gguf
from llamacli.llama4.config import Config
from llamacli.mlx import kernels, memory


def held(key):
    return 1024 * int(re.search(rf"{key}:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])


kernels.dialect = cpp.dialect
if sys.argv[2] == "adopted":
    window = memory.window
    memory.window = lambda tensor, adopts: window(tensor, True)
    mx.asarray = lambda array, copy: array
gguf = open_gguf(sys.argv[1])
config = Config.from_gguf(gguf)
engine = Engine(gguf, config, 2, gpu_layers=config.n_layers)
cache = engine.new_cache(16)
logits = [engine.forward([token], cache).tolist() for token in (1, 2)]
print(json.dumps({"peak": held("VmHWM"), "own": held("RssAnon"), "logits": logits}))
"""


@pytest.mark.slow
@pytest.mark.skipif(cpp.COMPILER is None or not sys.platform.startswith("linux"), reason="needs a C++ compiler and /proc")
def test_a_file_of_4_gb_is_held_once(tmp_path):
    """Adopted, the process holds the file's pages and nothing of its own; copied, the copy, and the pages are given back.

    The kernels run as C++, and NumPy's view of the pages stands in for Metal's adoption.
    """
    path, found = tmp_path / "large.gguf", {}
    shape = {"n_embd": 2560, "n_heads": 20, "n_kv_heads": 4, "n_ff": 8192, "n_ff_exp": 4096, "n_vocab": 128256}
    shapes.write(replace(shapes.SCOUT, **shape), 12, path)
    size = path.stat().st_size
    assert size > 4e9
    for way in ("adopted", "copied"):
        where = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2]))}
        done = subprocess.run([sys.executable, "-c", LOADING, path, way], capture_output=True, text=True, env=where)
        assert done.returncode == 0, done.stderr
        found[way] = json.loads(done.stdout)
        print(f"{way}: peak {found[way]['peak'] / 1e9:.2f} GB of a file of {size / 1e9:.2f}, own {found[way]['own'] / 1e9:.2f}")
    assert found["adopted"]["peak"] <= size + 300e6
    assert found["adopted"]["own"] <= 200e6
    assert found["copied"]["peak"] <= 1.1 * size
    assert found["adopted"]["logits"] == found["copied"]["logits"]
