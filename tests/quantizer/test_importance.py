"""quantize: importance matrices with sums of any size, and the metadata that a file has of them."""

import numpy as np
import pytest
from conversions import made, refusal

from llamacli.errors import ModelFileError
from llamacli.files.gguf import open_gguf
from quantize.convert import convert
from quantize.imatrix import Imatrix, checked, write_imatrix


def importance(path, gguf, sums, counts):
    """An importance matrix of one matrix and one stack of a model."""
    entries = {}
    for name in ("blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight"):
        shape = gguf.tensors[name].shape
        n = shape[0] if len(shape) == 3 else 1
        entries[name] = checked(path, name, np.tile(np.linspace(0.1, 1, shape[-1]) * sums, (n, 1)), np.full(n, counts))
    write_imatrix(Imatrix(path, entries, ["text"], 1, 512), force=True)
    return path


def test_importance_beyond_float32_is_refused_before_anything_is_written(scout, tmp_path):
    path = importance(tmp_path / "im.gguf", made(*scout)[0], 3e38, 1e-3)
    message = refusal(ModelFileError, scout[0], tmp_path / "out.gguf", "Q4_1", imatrix=path)
    assert "im.gguf" in message
    assert "blk.0.attn_q.weight" in message
    assert {path.name for path in tmp_path.iterdir()} == {"im.gguf"}


def test_scaling_importance_does_not_change_the_file(scout, tmp_path):
    gguf, files = made(*scout)[0], []
    for i, (sums, counts) in enumerate(((1.0, 1.0), (2.0**127, 2.0**30), (2.0**-100, 2.0**10))):
        path = importance(tmp_path / "im.gguf", gguf, sums, counts)
        convert(scout[0], tmp_path / f"{i}.gguf", "Q4_1", imatrix=path)
        files.append((tmp_path / f"{i}.gguf").read_bytes())
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize("sums, counts", [(0.0, 0.0), (0.0, 5.0)])
def test_importance_without_any_input_is_reported(scout, tmp_path, sums, counts):
    path = importance(tmp_path / "im.gguf", made(*scout)[0], sums, counts)
    notices = convert(scout[0], tmp_path / "out.gguf", "Q4_1", imatrix=path)["notices"]
    assert any("2 of 2 tensors saw no text" in notice for notice in notices)
    assert not any("as the others" in notice for notice in notices)


def test_metadata_about_importance_are_those_of_the_last_conversion(scout, tmp_path):
    path = importance(tmp_path / "im.gguf", made(*scout)[0], 1.0, 1.0)
    convert(scout[0], tmp_path / "with.gguf", "Q4_1", imatrix=path)
    assert open_gguf(tmp_path / "with.gguf").metadata["quantize.imatrix.entries_count"] == 2
    convert(tmp_path / "with.gguf", tmp_path / "without.gguf", "Q8_0")
    assert not [key for key in open_gguf(tmp_path / "without.gguf").metadata if "imatrix" in key]
