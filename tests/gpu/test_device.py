"""Choosing a device: what fits on a GPU, what is refused, and the commands that ask for one. MLX itself may be missing."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from installed import needed

from llamacli import Model
from llamacli.cli import main
from llamacli.errors import DeviceError, MemoryLimitError, UsageError
from llamacli.files.gguf import open_gguf
from llamacli.llama4.config import Config
from llamacli.mlx import runtime
from llamacli.mlx.runtime import Runtime
from llamacli.plan.offload import place_layers, plan_offload, remains
from llamacli.plan.placement import plan_residency

METAL = Runtime("0.32.4", "Metal", "Apple M4", 72 << 30, 48 << 30)


@pytest.fixture(autouse=True)
def fresh_runtime():
    real = runtime.start
    real.cache_clear()
    yield
    real.cache_clear()


@pytest.fixture
def small(tmp_path):
    return tiny.tiny_gguf(tmp_path / "tiny.gguf")


def with_gpu(monkeypatch, **fields):
    monkeypatch.setattr(runtime, "start", lambda: METAL._replace(**fields))


def absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    monkeypatch.setitem(sys.modules, "mlx", None)


def too_old(monkeypatch):
    needed("mlx.core")
    import mlx.core as mx

    monkeypatch.setattr(mx, "__version__", "0.31.9")


def broken(monkeypatch):
    class Finder:
        @staticmethod
        def find_spec(name, *_):
            if name == "mlx":
                raise ImportError("libmlx.so: cannot open shared object file\nand more")

    for name in [name for name in sys.modules if name.partition(".")[0] == "mlx"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])


MISSING = {
    "absent": (absent, "expected the package mlx, found none"),
    "too old": (too_old, "expected mlx 0.32.1 or newer, found 0.31.9"),
    "broken": (broken, "expected a working package mlx, found: libmlx.so: cannot open shared object file;"),
}


@pytest.mark.parametrize(("spoil", "words"), MISSING.values(), ids=MISSING)
def test_without_a_usable_mlx_one_line_says_so(spoil, words, small, monkeypatch, capfd):
    spoil(monkeypatch)
    assert main(["run", "-m", str(small), "--device", "mlx", "--no-stdin", "hello"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert words in err
    assert "pip install 'llamacli[mlx]'" in err
    assert "--device cpu" in err


@pytest.mark.parametrize("spoil", [spoil for spoil, _ in MISSING.values()], ids=MISSING)
def test_without_a_usable_mlx_auto_means_the_cpu(spoil, small, monkeypatch):
    spoil(monkeypatch)
    with Model.load(small, threads=1, ctx=16, device="auto") as model:
        assert model.engine.gpu_layers == 0


def test_auto_takes_a_gpu_of_metal_only(small, monkeypatch):
    gguf = open_gguf(small)
    config = Config.from_gguf(gguf)
    for gpu, layers in (("Metal", 4), ("CUDA", 0), (None, 0)):
        with_gpu(monkeypatch, gpu=gpu)
        assert plan_offload(gguf, config, 64, "auto").layers == layers


def test_mlx_is_not_imported_unless_it_is_asked_for(small, monkeypatch):
    absent(monkeypatch)
    with Model.load(small, threads=1, ctx=16) as model:
        assert np.isfinite(model.logits([1, 2, 3])).all()


def test_without_a_gpu_mlx_computes_on_the_cpu_and_says_so(small):
    needed("mlx.core")
    with Model.load(small, threads=1, ctx=16, device="mlx") as model, Model.load(small, threads=1, ctx=16) as plain:
        assert model.engine.gpu_layers == 4
        assert any("no GPU" in notice and "slower than --device cpu" in notice for notice in model.engine.notices)
        expected = plain.logits([1, 2, 3])
        np.testing.assert_allclose(model.logits([1, 2, 3]), expected, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize(("asked", "wired"), [(None, []), ("40", [40 * 10**9]), ("500", [72 << 30]), ("much", []), ("-1", [])])
def test_a_mac_tells_its_budget_and_wires_nothing_unless_asked(asked, wired, monkeypatch):
    """Metal's answers are simulated; the keys are those of MLX's documentation."""
    mx = needed("mlx.core")
    calls, told = [], {"device_name": "Apple M4 Max", "memory_size": 96 << 30, "max_buffer_length": 54 << 30}
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda device: told | {"max_recommended_working_set_size": 72 << 30})
    monkeypatch.setattr(mx, "set_wired_limit", calls.append)
    monkeypatch.delenv("LLAMACLI_WIRED_GB", raising=False)
    if asked:
        monkeypatch.setenv("LLAMACLI_WIRED_GB", asked)
    here = runtime.start()
    assert (here.gpu, here.name, here.budget, here.largest) == ("Metal", "Apple M4 Max", 72 << 30, 54 << 30)
    assert calls == wired


# what fits


def sizes(small):
    gguf = open_gguf(small)
    return Config.from_gguf(gguf), [(t.name, t.nbytes) for t in gguf.tensors.values()], gguf


def test_as_many_of_the_last_layers_as_fit_go_to_the_gpu(small):
    config, tensors, _ = sizes(small)
    everything = place_layers(config, tensors, 64, 1 << 40)
    assert everything.layers == 4
    head = sum(nbytes for name, nbytes in tensors if name == "output.weight")
    layers = [sum(nbytes for name, nbytes in tensors if name.startswith(f"blk.{i}.")) for i in range(4)]
    assert everything.weights == head + sum(layers)
    assert place_layers(config, tensors, 64, everything.nbytes).layers == 4
    some = place_layers(config, tensors, 64, everything.nbytes - 1)
    assert (some.layers, some.weights) == (3, head + sum(layers[1:]))
    with pytest.raises(MemoryLimitError, match=r"for 4 layers on the GPU .* use --gpu-layers 3"):
        place_layers(config, tensors, 64, everything.nbytes - 1, 4)
    with pytest.raises(MemoryLimitError, match="use --gpu-layers 0 or --device cpu"):
        place_layers(config, tensors, 64, 1000)
    assert place_layers(config, tensors, 64, 1000, needed=False).layers == 0
    assert place_layers(config, tensors, 64, 1 << 40, 99).layers == 4


def test_a_longer_context_leaves_room_for_fewer_layers(tmp_path):
    """Layer 3 of 5 keeps every position, the others a chunk of 8."""
    config, tensors, _ = sizes(tiny.tiny_gguf(tmp_path / "tiny.gguf", n_layers=5))
    budget = place_layers(config, tensors, 64, 1 << 40).nbytes
    assert place_layers(config, tensors, 1 << 16, budget).layers == 1


def test_what_the_gpu_holds_is_not_planned_for_the_cpu_again(small, monkeypatch):
    config, _, gguf = sizes(small)
    with_gpu(monkeypatch)
    offload = plan_offload(gguf, config, 64, "mlx", 3)
    left = {name for name in gguf.tensors if remains(name, config, offload)}
    assert {name.split(".")[1] for name in left if name.startswith("blk")} == {"0"}
    assert "token_embd.weight" in left
    assert "output.weight" not in left
    alone = plan_residency(gguf, config, 64, 1, None, "mapped").nbytes
    beside = plan_residency(gguf, config, 64, 1, None, "mapped", 0, offload).nbytes
    assert beside < alone + offload.working


def test_layers_of_the_cpu_may_stream_beside_layers_on_mlx(small):
    needed("mlx.core")
    with Model.load(small, threads=1, ctx=32, device="mlx", gpu_layers=1, experts="slots") as model:
        found = model.logits([1, 2, 3, 4, 5])
        assert model.engine.take_io_stats().misses > 0
    with Model.load(small, threads=1, ctx=32) as plain:
        expected = plain.logits([1, 2, 3, 4, 5])
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


def test_a_model_beyond_the_memory_streams_on_the_gpu(small, monkeypatch):
    config, tensors, gguf = sizes(small)
    with_gpu(monkeypatch)
    whole = sum(nbytes for _, nbytes in tensors)
    assert not plan_offload(gguf, config, 64, "mlx", None, "auto", 1 << 40).streams
    assert plan_offload(gguf, config, 64, "mlx", None, "auto", whole).streams
    assert plan_offload(gguf, config, 64, "auto", None, "slots", 1 << 40).streams
    assert not plan_offload(gguf, config, 64, "mlx", None, "mapped", whole).streams
    assert not plan_offload(gguf, config, 64, "mlx", 2, "slots", whole).streams  # the CPU's layers do
    with_gpu(monkeypatch, budget=1 << 30)
    offload = plan_offload(gguf, config, 64, "mlx", None, "slots", 1 << 40)
    slots, _, _, held, _ = plan_residency(gguf, config, 64, 1, 1 << 40, "slots", 0, offload)
    assert slots == 16
    assert held <= 1 << 30


# errors of the device


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (
            "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallback)",
            MemoryLimitError,
        ),
        ("[malloc] Unable to allocate 8589934592 bytes.", MemoryLimitError),
        (
            "[metal::malloc] Attempting to allocate 1 bytes which is greater than the maximum allowed buffer size",
            MemoryLimitError,
        ),
        ("[METAL] Command buffer execution failed: Caused GPU Hang Error", DeviceError),
        ("cudaGraphLaunch failed: unspecified launch failure", DeviceError),
    ],
)
def test_errors_of_the_gpu_are_one_line_of_ours_and_the_cache_stays_sound(found, kind, small, monkeypatch):
    mx = needed("mlx.core")
    with Model.load(small, threads=1, ctx=32, device="mlx") as model:
        cache = model.engine.new_cache(32)
        model.engine.forward([1, 2, 3], cache)

        def failing(*_):
            raise RuntimeError(found)

        for ids in ([4], [4, 5, 6]):
            with monkeypatch.context() as patch:
                patch.setattr(mx, "eval", failing)
                with pytest.raises(kind) as error:
                    model.engine.forward(ids, cache)
            assert "\n" not in str(error.value)
            assert str(small) in str(error.value)
            assert cache.pos == 3
        again = model.engine.forward([4, 5, 6], cache)
        expected = model.logits([1, 2, 3, 4, 5, 6])[-1]
        np.testing.assert_allclose(again, expected, atol=1e-5 * np.abs(expected).max())


# the command line


def asked(model, monkeypatch, *words):
    """What a command hands to load_model for the device."""
    from llamacli.cli import bench, options, perplexity

    seen = {}

    def load(path, threads, ctx, console, **more):
        seen.update({key: more[key] for key in ("device", "gpu_layers") if key in more})
        return model

    for module in (options, bench, perplexity):
        monkeypatch.setattr(module, "load_model", load)
    code = main([*words])
    return code, SimpleNamespace(**seen)


@pytest.mark.parametrize(
    ("words", "device", "layers"),
    [
        ([], "cpu", None),
        (["--device", "mlx"], "mlx", None),
        (["--device", "auto", "--gpu-layers", "12"], "auto", 12),
        (["-ngl", "99"], "mlx", 99),
        (["--n-gpu-layers", "0"], "cpu", 0),
        (["--gpu-layers", "all"], "mlx", 1 << 20),
    ],
)
def test_run_hands_the_device_on(model, monkeypatch, words, device, layers):
    code, seen = asked(model, monkeypatch, "run", "--no-stdin", *words, "hello")
    assert (code, seen.device, seen.gpu_layers) == (0, device, layers)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "gpu"], "--device: expected cpu, mlx or auto, found 'gpu'"),
        (["--gpu-layers", "-1"], "--gpu-layers: expected a number of layers or all, found '-1'"),
        (["--device", "cpu", "-ngl", "4"], "expected --device mlx or auto with it, found cpu"),
    ],
)
def test_contradictions_are_refused(model, words, message, capfd):
    assert main(["run", "--no-stdin", *words, "hello"]) == 2
    assert message in capfd.readouterr().err


def test_python_callers_hear_of_wrong_values(small):
    with pytest.raises(UsageError, match="expected cpu, mlx or auto, found gpu"):
        Model.load(small, device="gpu")
    with pytest.raises(UsageError, match="at least 0, found -1"):
        Model.load(small, device="mlx", gpu_layers=-1)
