"""The type table: every number as gguf-py has it."""

import gguf
import pytest

from llamacli.files.ggml import BY_ID, BY_NAME, TYPES


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
