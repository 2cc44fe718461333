"""`llamacli doctor`: it runs anywhere, says what it could not check, and fails when a kernel or a model is wrong."""

import json
import sys

import pytest
import tiny
from installed import needed

needed("mlx.core")

import cpp  # noqa: E402

from llamacli.bench import doctor  # noqa: E402
from llamacli.cli import main  # noqa: E402
from llamacli.mlx import runtime  # noqa: E402
from quantize.encoders import encoder  # noqa: E402


@pytest.fixture(autouse=True)
def fresh_runtime():
    runtime.start.cache_clear()
    yield
    runtime.start.cache_clear()


@pytest.fixture
def small(tmp_path):
    return tiny.tiny_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def as_cpp(monkeypatch):
    if cpp.COMPILER is None:
        pytest.skip("needs a C++ compiler")
    from llamacli.mlx import checks, kernels

    monkeypatch.setattr(checks, "COLUMNS", 512)
    monkeypatch.setattr(kernels, "dialect", cpp.dialect)
    cpp.forget(kernels)
    yield kernels
    cpp.forget(kernels)


def findings(path):
    return {f.check: f for f in doctor.examine(path, lambda name: lambda rows: encoder(name).encode(rows, None), megabytes=0)}


def test_without_a_gpu_it_says_what_it_could_not_check(small, capfd):
    assert main(["doctor", str(small), "--json"]) == 0
    found = {one["check"]: one for one in json.loads(capfd.readouterr().out)}
    assert found["machine"]["figures"]["memory_bytes"] > 1 << 28
    assert found["versions"]["figures"]["python"] == sys.version.split()[0]
    assert found["kernels against the CPU"]["state"] == "not checked"
    assert found["model on the CPU"]["figures"]["tokens_per_second"] > 0
    assert any("llamacli bench" in one["text"] for one in found.values() if one["state"] == "not checked")


def test_without_mlx_it_checks_the_rest(small, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    assert main(["doctor", "-m", str(small)]) == 0
    out = capfd.readouterr().out
    assert "expected the package mlx, found none" in out
    assert "model on the CPU" in out


def test_every_kernel_and_the_model_are_checked_against_the_cpu(as_cpp, small):
    from llamacli.mlx.blocks import FORMATS

    found = findings(small)
    for name in FORMATS:
        one = found[f"kernel {name}"]
        assert (one.state, one.figures["rate"] > 0) == (doctor.OK, True), one
    assert found["the file's pages on the GPU"].figures["different"] == []
    assert found["model on MLX"].figures["gpu_layers"] == 4
    assert found["logits of MLX and of the CPU"].state == doctor.OK
    assert found["logits of MLX with and without slots"].state == doctor.OK


def test_the_pages_that_a_gpu_would_read_are_compared_with_the_file(small, monkeypatch):
    """NumPy's view of the pages stands in for Metal's adoption."""
    import mlx.core as mx

    from llamacli.files.gguf import open_gguf
    from llamacli.mlx import checks

    gguf = open_gguf(small)
    count = len(gguf.tensors)
    assert checks.check_pages(gguf, adopts=True) == (count, 0, False, []), "MLX's CPU build copies"
    monkeypatch.setattr(mx, "asarray", lambda array, copy: array)
    for pages in (1, 64):
        monkeypatch.setattr(checks, "PAGES", pages)
        assert checks.check_pages(gguf, adopts=True) == (count, count, True, [])
    monkeypatch.setattr(mx, "asarray", lambda array, copy: array + 1)
    assert len(checks.check_pages(gguf, adopts=True).different) == count


def test_a_wrong_kernel_and_a_wrong_model_fail(as_cpp, small, monkeypatch, capfd):
    from llamacli.mlx import checks

    monkeypatch.setattr(checks, "FORMATS", ["Q4_K"])
    right = "even[1] += q[i + 16]"
    assert right in as_cpp.BODIES["matvec"]
    monkeypatch.setitem(as_cpp.BODIES, "matvec", as_cpp.BODIES["matvec"].replace(right, "even[1] += q[i]"))
    monkeypatch.setattr(doctor.examine, "__defaults__", (0,))
    assert main(["doctor", str(small)]) == 1
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert "kernel Q4_K" in err
    assert "logits of MLX and of the CPU" in err
