"""A model split into files (`--split-max-size`): its parts hold the whole model, continue where a run stopped, and are not
overwritten unasked.
"""

from pathlib import Path

import numpy as np
import pytest
from conversions import interrupted, names, opened

from llamacli import Model
from llamacli.errors import OutputError
from llamacli.files.gguf import open_gguf
from quantize.convert import convert


def test_a_split_model_stopped_in_its_second_file_is_taken_up(folder, whole, tmp_path):
    options = {"split_max_size": len(whole) // 3}
    interrupted(folder, tmp_path / "out.gguf", **options)
    assert len(list(tmp_path.glob("*.part"))) > 1
    assert not list(tmp_path.glob("*.gguf"))
    report = convert(folder, tmp_path / "out.gguf", "Q8_0", **options)
    assert report["resumed_bytes"] > 0
    fresh = convert(folder, tmp_path / "fresh.gguf", "Q8_0", **options)
    for ours, theirs in zip(report["files"], fresh["files"], strict=True):
        assert Path(ours).read_bytes() == Path(theirs).read_bytes()


def test_parts_of_another_split_are_named_not_taken_up_and_not_removed(folder, whole, tmp_path):
    interrupted(folder, tmp_path / "out.gguf", split_max_size=len(whole) // 3)
    (tmp_path / "other-00001-of-00002.gguf.part").write_text("another's")
    left = names(tmp_path)
    report = convert(folder, tmp_path / "out.gguf", "Q8_0")
    (notice,) = (notice for notice in report["notices"] if "another number of files" in notice)
    assert set(notice.partition(": ")[2].split(", ")) == left - {"other-00001-of-00002.gguf.part"}
    assert names(tmp_path) == left | {"out.gguf"}


def test_a_folder_is_refused_as_the_name_of_a_split_model(folder, tmp_path):
    with pytest.raises(OutputError, match="found a folder"):
        convert(folder, tmp_path, "Q8_0", split_max_size=1000)


def test_a_split_model_is_the_whole_one_in_parts(folder, whole, tmp_path):
    size = len(whole) // 3
    report = convert(folder, tmp_path / "out.gguf", "Q8_0", split_max_size=size)
    files = [Path(name) for name in report["files"]]
    assert len(files) > 3
    assert names(tmp_path) == {path.name for path in files}
    assert files[0].name == f"out-00001-of-{len(files):05d}.gguf"
    one, parts = opened(whole, tmp_path), open_gguf(files[0])
    assert list(parts.tensors) == list(one.tensors)
    for name, tensor in one.tensors.items():
        np.testing.assert_array_equal(parts.tensors[name].data, tensor.data)
    assert [key for key in parts.metadata if not key.startswith("split.")] == list(one.metadata)
    for path in files:
        assert path.stat().st_size <= size or len(open_one(path).tensors) == 1
    again = convert(files[0], tmp_path / "joined.gguf", "Q8_0")
    assert again["resumed_bytes"] == 0
    assert opened((tmp_path / "joined.gguf").read_bytes(), tmp_path).tensors.keys() == one.tensors.keys()


def open_one(path):
    """One part by itself, as the format has it."""
    from gguf import GGUFReader

    return GGUFReader(path)


def test_parts_of_a_split_are_not_overwritten_unasked(folder, whole, tmp_path):
    size = len(whole) // 3
    files = convert(folder, tmp_path / "out.gguf", "Q8_0", split_max_size=size)["files"]
    Path(files[0]).unlink()
    with pytest.raises(OutputError, match="--force"):
        convert(folder, tmp_path / "out.gguf", "Q8_0", split_max_size=size)
    assert not Path(files[0]).exists()


def test_a_split_model_answers_as_the_whole_one(folder, whole, tmp_path):
    (tmp_path / "whole.gguf").write_bytes(whole)
    files = convert(folder, tmp_path / "out.gguf", "Q8_0", split_max_size=len(whole) // 3)["files"]
    one, parts = (Model.load(path, threads=1, ctx=32).logits([1, 2, 3]) for path in (tmp_path / "whole.gguf", files[0]))
    np.testing.assert_array_equal(one, parts)
