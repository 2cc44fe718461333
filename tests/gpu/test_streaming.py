"""Experts on MLX that are read into slots when the router asks for them: the results of those that are all in memory."""

import numpy as np
import oracle
import pytest
import tiny
from installed import needed

mx = needed("mlx.core")

from stages import EXACT, difference, in_pieces, tokens  # noqa: E402

from llamacli import Model  # noqa: E402
from llamacli.engine import Engine  # noqa: E402
from llamacli.errors import ModelFileError, UnsupportedModelError, UsageError  # noqa: E402
from llamacli.files.gguf import open_gguf  # noqa: E402
from llamacli.llama4.config import Config  # noqa: E402
from llamacli.mlx import memory, streaming  # noqa: E402

WIDE = {"n_embd": 256, "head_dim": 64, "n_ff": 512, "n_ff_exp": 256}


def engine(path, slots, **more):
    """All layers on MLX; `slots` of a layer."""
    file = open_gguf(path)
    config = Config.from_gguf(file)
    total = slots * sum(map(config.is_moe, range(config.n_layers)))
    return Engine(file, config, 2, total, gpu_layers=config.n_layers, **more)


SHAPES = {"scout": tiny.SCOUT, "maverick": tiny.MAVERICK, "2 of 6 experts": {"used": 2, "experts": 6}}


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_are_the_oracles_whatever_is_cached(tmp_path, shape, slots):
    path, ids = tiny.tiny_gguf(tmp_path / "tiny.gguf", seed=3, **shape), tokens(25)
    model, expected = engine(path, slots), oracle.logits(path, ids)
    for size in (25, 1, 3):
        assert difference(in_pieces(model, ids, size), expected) <= EXACT
    io = model.take_io_stats()
    assert io.misses > 0
    assert io.bytes_read > 0
    assert io.hits > 0
    model.close()


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0"])
def test_kernels_read_blocks_from_slots(as_cpp, name, tmp_path):
    path, ids = tiny.tiny_gguf(tmp_path / "tiny.gguf", types=lambda _: name, n_layers=2, seed=2, **WIDE), tokens(9)
    model = engine(path, 2)
    assert difference(in_pieces(model, ids, 1), oracle.logits(path, ids)) <= EXACT
    model.close()


def test_without_waiting_a_buffer_is_filled_while_it_is_read(tmp_path, monkeypatch):
    """The hazard is real: MLX does not see reads into its memory. The guard is all that prevents it."""
    path, ids = tiny.tiny_gguf(tmp_path / "tiny.gguf", seed=3, experts=8, chunk=64), tokens(40)
    expected = oracle.logits(path, ids)
    assert difference(in_pieces(engine(path, 1), ids, 40), expected) <= EXACT
    monkeypatch.setattr(streaming.Fetch, "used", lambda self, values: None)
    assert difference(in_pieces(engine(path, 1), ids, 40), expected) > 100 * EXACT


def test_memory_that_is_read_into_is_what_the_device_sees():
    buffer, window = memory.bank(10_000, adopts=False)
    assert len(buffer) == 10_000
    buffer[:] = bytes(i % 251 for i in range(10_000))
    seen = np.array(window.array).reshape(-1)[window.offset : window.offset + 10_000]
    np.testing.assert_array_equal(seen, np.arange(10_000) % 251)
    buffer[5000] = 255
    assert np.array(window.array[...]).reshape(-1)[window.offset + 5000] == 255


def test_adopted_memory_begins_at_a_page(monkeypatch):
    monkeypatch.setattr(mx, "asarray", lambda array, copy: mx.array(array))
    buffer, window = memory.bank(10_000, adopts=True)
    address = np.frombuffer(buffer, np.uint8).ctypes.data
    assert (address % memory.mmap.PAGESIZE, window.offset, window.adopted) == (0, 0, True)


def test_an_interrupt_while_experts_are_read_harms_nothing(tmp_path, monkeypatch):
    path, ids = tiny.tiny_gguf(tmp_path / "tiny.gguf", seed=3), tokens(20)
    model, real, calls = engine(path, 1), streaming.Fetch.used, []
    cache = model.new_cache(32)
    model.forward(ids[:8], cache)

    def interrupted(self, values):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(self, values)

    with monkeypatch.context() as patch:
        patch.setattr(streaming.Fetch, "used", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.forward(ids[8:], cache)
    found = model.forward(ids[cache.truncate(8) :], cache, all_logits=True)
    assert difference(found, oracle.logits(path, ids)[8:]) <= EXACT
    model.close()


def test_a_file_that_is_cut_while_in_use_is_an_error(tmp_path):
    path = tiny.tiny_gguf(tmp_path / "tiny.gguf", seed=3)
    model = engine(path, 1)
    model.forward(tokens(8), model.new_cache(8))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 3)
    with pytest.raises(ModelFileError, match="cut while in use"):
        in_pieces(model, tokens(30), 1)
    model.close()


def test_experts_of_a_type_without_kernels_are_refused(tmp_path):
    path = tiny.tiny_gguf(tmp_path / "tiny.gguf", types=lambda name: "IQ3_S" if "exps" in name else "F32", n_layers=1, **WIDE)
    with pytest.raises(UnsupportedModelError, match="type with kernels, found IQ3_S"):
        engine(path, 1)


def test_slots_are_given_back(tmp_path):
    path, ids = tiny.tiny_gguf(tmp_path / "tiny.gguf", seed=3), tokens(12)
    model = engine(path, 3)
    in_pieces(model, ids, 1)
    assert model.stages[-1].shrink(1 << 30) > 0
    assert difference(in_pieces(model, ids, 1), oracle.logits(path, ids)) <= EXACT
    model.close()


def test_a_forked_child_is_told_that_the_gpu_is_not_its_own(tmp_path):
    model = engine(tiny.tiny_gguf(tmp_path / "tiny.gguf"), 0)
    cache = model.new_cache(8)
    model.forward([1, 2], cache)
    for stage in model.stages:
        stage.after_fork()
    with pytest.raises(UsageError, match="load the model again"):
        model.forward([3], cache)


def test_python_and_the_command_line_ask_for_slots(tmp_path):
    path = tiny.tiny_gguf(tmp_path / "tiny.gguf", seed=3)
    with Model.load(path, ctx=32, device="mlx", experts="slots") as model:
        assert model.engine.gpu_layers == 4
        assert difference(model.logits([1, 2, 3]), oracle.logits(path, [1, 2, 3])) <= EXACT
        assert model.engine.take_io_stats().misses > 0
