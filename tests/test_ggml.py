"""The table of tensor types against gguf-py's, number by number."""

import gguf
import pytest

from llamacli import ggml


@pytest.mark.parametrize("row", ggml.TYPES, ids=lambda row: row.name)
def test_a_type_is_gguf_py_s(row):
    theirs = gguf.GGMLQuantizationType[row.name]
    assert row.id == theirs.value
    assert (row.block, row.nbytes) == gguf.GGML_QUANT_SIZES[theirs]


def test_every_id_and_name_once():
    assert len(ggml.BY_ID) == len(ggml.BY_NAME) == len(ggml.TYPES)


def test_the_weights_of_published_llama4_files_are_there():
    assert {"F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q2_K", "Q3_K", "IQ4_XS", "IQ4_NL"} <= set(
        ggml.BY_NAME
    )


def test_bytes_of_a_row():
    assert ggml.BY_NAME["Q4_K"].row_bytes(5120) == 20 * 144
    assert ggml.BY_NAME["F32"].row_bytes(3) == 12
    with pytest.raises(ValueError, match="multiple"):
        ggml.BY_NAME["Q4_K"].row_bytes(5121)
