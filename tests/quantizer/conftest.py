"""Fixtures of these tests: a checkpoint of Scout's shape, and the bytes of its conversion to Q8_0."""

import checkpoint
import pytest

from quantize.convert import convert


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("scout") / "hf"
    checkpoint.write(path)
    return path


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out.gguf"
    convert(folder, out, "Q8_0")
    return out.read_bytes()
