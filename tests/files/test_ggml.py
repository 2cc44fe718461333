"""The type table: every number as gguf-py has it."""

import sys

import gguf
import numpy as np
import pytest

from llamacli.errors import UnsupportedModelError, UsageError
from llamacli.files.ggml import BY_ID, BY_NAME, TYPES, TensorType, dequantize


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_a_type_is_as_gguf_py_has_it(kind):
    theirs = gguf.GGMLQuantizationType[kind.name]
    assert (kind.id, kind.block, kind.nbytes) == (theirs.value, *gguf.GGML_QUANT_SIZES[theirs])


def test_ids_and_names_are_unique():
    assert len(BY_ID) == len(BY_NAME) == len(TYPES)


def test_whatever_gguf_py_dequantizes_is_in_the_table():
    from gguf.quants import _type_traits

    assert {kind.name for kind in _type_traits} | {"F32", "F16", "BF16"} <= BY_NAME.keys() | {"NVFP4"}


def test_row_bytes():
    assert BY_NAME["Q4_K"].row_bytes(512) == 288
    assert BY_NAME["F32"].row_bytes(3) == 12
    with pytest.raises(ValueError, match="256"):
        BY_NAME["Q4_K"].row_bytes(300)


def test_rare_types_are_read_back_by_gguf_py():
    kind = BY_NAME["IQ3_S"]
    rows = np.random.default_rng(0).integers(0, 256, (2, kind.row_bytes(512)), np.uint8)
    rows[:, [1, kind.nbytes + 1]] &= 0x3B  # a sane exponent of each block's scale
    expected = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType.IQ3_S)
    assert dequantize(rows, kind, "file: tensor").shape == (2, 512)
    np.testing.assert_array_equal(dequantize(rows, kind, "file: tensor"), expected)


def test_without_gguf_py_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r"file: tensor: expected the package gguf.*IQ3_S.*pip install gguf"):
        dequantize(np.zeros((1, 110), np.uint8), BY_NAME["IQ3_S"], "file: tensor")


def test_a_type_that_gguf_py_cannot_read_is_named():
    with pytest.raises(UnsupportedModelError, match=r"file: tensor: .*Q8_1"):
        dequantize(np.zeros((1, 36), np.uint8), TensorType(9, "Q8_1", 32, 36), "file: tensor")
