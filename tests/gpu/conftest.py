"""On request: the GPU's kernels as C++, so that a machine without a GPU computes with their text."""

import pytest


@pytest.fixture
def as_cpp(monkeypatch):
    import cpp

    from llamacli.mlx import kernels

    if cpp.COMPILER is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(kernels, "dialect", cpp.dialect)
    cpp.forget(kernels)
    yield
    cpp.forget(kernels)
