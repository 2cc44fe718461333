"""safetensors: views of what a checkpoint holds, and one line about whatever is wrong with it."""

import json

import numpy as np
import pytest
from checkpoint import stored, write_safetensors
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llamacli.errors import CheckpointError
from quantize.safetensors import open_checkpoint

WEIGHTS = {"a.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "b.weight": np.float32([1.5, -2.5])}


def single(folder, **entry_changes):
    """A folder with one file, the header entry of a.weight changed."""
    write_safetensors(folder / "model.safetensors", stored(WEIGHTS, "F32"))
    if entry_changes:
        raw = (folder / "model.safetensors").read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        header["a.weight"] |= entry_changes
        head = json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + raw[8 + length :])
    return folder


def sharded(folder, weight_map=None):
    """A folder with two shards and their index."""
    for name, file in (("a.weight", "one.safetensors"), ("b.weight", "two.safetensors")):
        write_safetensors(folder / file, stored({name: WEIGHTS[name]}, "F32"))
    weight_map = weight_map or {"a.weight": "one.safetensors", "b.weight": "two.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def refusal(folder):
    """The one line that says why the folder cannot be opened."""
    with pytest.raises(CheckpointError) as caught:
        for tensor in open_checkpoint(folder).values():
            tensor.data  # noqa: B018
    assert "\n" not in str(caught.value)
    assert "expected" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_tensor_is_a_view_of_the_file(tmp_path, dtype):
    entries = stored(WEIGHTS, dtype)
    write_safetensors(tmp_path / "model.safetensors", entries)
    found = open_checkpoint(tmp_path)
    assert list(found) == list(WEIGHTS)
    for name, (_, data) in entries.items():
        assert found[name].dtype == dtype
        assert found[name].shape == data.shape
        assert not found[name].data.flags.owndata
        assert not found[name].data.flags.writeable
        np.testing.assert_array_equal(found[name].data, data)


def test_data_at_odd_addresses_can_be_read(tmp_path):
    entries = {"pad": ("BF16", np.zeros(1, np.uint16))} | stored(WEIGHTS, "F32")
    write_safetensors(tmp_path / "model.safetensors", entries, pad=1)
    np.testing.assert_array_equal(open_checkpoint(tmp_path)["a.weight"].data, WEIGHTS["a.weight"])


def test_shards_are_put_together_by_the_index(tmp_path):
    found = open_checkpoint(sharded(tmp_path))
    assert set(found) == set(WEIGHTS)
    np.testing.assert_array_equal(found["b.weight"].data, WEIGHTS["b.weight"])


def test_a_folder_without_weights_is_refused(tmp_path):
    assert "found neither" in refusal(tmp_path)


def test_shards_without_an_index_are_found_by_their_names(tmp_path):
    for i, name in enumerate(WEIGHTS, 1):
        write_safetensors(tmp_path / f"model-{i:05}-of-00002.safetensors", stored({name: WEIGHTS[name]}, "F32"))
    assert set(open_checkpoint(tmp_path)) == set(WEIGHTS)
    write_safetensors(tmp_path / "model-00002-of-00002.safetensors", stored(WEIGHTS, "F32"))
    assert "once" in refusal(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "no shard 2" in refusal(tmp_path)
    write_safetensors(tmp_path / "other-00001-of-00001.safetensors", stored(WEIGHTS, "F32"))
    assert "2 models" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["weights.safetensors", "model-00001-of-00001.safetensors"])
def test_one_file_of_any_name_is_the_checkpoint(tmp_path, name):
    write_safetensors(tmp_path / name, stored(WEIGHTS, "F32"))
    assert set(open_checkpoint(tmp_path)) == set(WEIGHTS)
    write_safetensors(tmp_path / "another.safetensors", stored(WEIGHTS, "F32"))
    if name.startswith("weights"):
        assert "2 safetensors files without an index" in refusal(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    sharded(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    assert "two.safetensors" in refusal(tmp_path)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path):
    assert "a.weight" in refusal(sharded(tmp_path, {"a.weight": "two.safetensors"}))


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "", 7])
def test_an_index_cannot_point_out_of_the_folder(tmp_path, file):
    refusal(sharded(tmp_path, {"a.weight": file}))


@pytest.mark.parametrize("index", [b"", b"[]", b"{", b"{}", b'{"weight_map": {}}', b'{"weight_map": []}', b"[" * 100_000])
def test_a_damaged_index_is_refused(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    assert "index.json" in refusal(tmp_path)


def test_a_file_cut_at_any_byte_is_refused(tmp_path):
    raw = (single(tmp_path) / "model.safetensors").read_bytes()
    for end in range(len(raw)):
        (tmp_path / "model.safetensors").write_bytes(raw[:end])
        assert "model.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 200_000_000, 5000])
def test_an_absurd_header_length_allocates_nothing(tmp_path, length):
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}" * 64)
    refusal(tmp_path)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"dtype": "U8"}, "NVFP4"),
        ({"dtype": None}, "dtype"),
        ({"dtype": ["F32"]}, "dtype"),
        ({"shape": [3, 5]}, "60 bytes"),
        ({"shape": [1 << 62, 1 << 62]}, "bytes"),
        ({"shape": [-3, -4]}, "shape"),
        ({"shape": [10**4000, 10**4000]}, "shape"),
        ({"data_offsets": [0, 10**4000]}, "begin and an end"),
        ({"shape": [0, 4]}, "ZeRO-3"),
        ({"dtype": "F64", "data_offsets": [0, 48]}, "save the model in BF16"),
        ({"shape": []}, "4 bytes"),
        ({"shape": [1] * 9}, "shape"),
        ({"shape": [3.0, 4.0]}, "shape"),
        ({"shape": "34"}, "shape"),
        ({"shape": [True, 12]}, "shape"),
        ({"data_offsets": [0, 44]}, "48 bytes"),
        ({"data_offsets": [48, 0]}, "begin and an end"),
        ({"data_offsets": [0]}, "begin and an end"),
        ({"data_offsets": [-48, 0]}, "begin and an end"),
        ({"data_offsets": [1 << 60, (1 << 60) + 48]}, "cut short"),
        ({"data_offsets": [12, 60]}, "cut short"),
    ],
)
def test_a_hostile_entry_is_refused_with_the_tensors_name(tmp_path, change, word):
    message = refusal(single(tmp_path, **change))
    assert "a.weight" in message
    assert word in message


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_any_header_opens_or_is_refused(tmp_path_factory, header):
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    try:
        open_checkpoint(folder)
    except CheckpointError as error:
        assert "\n" not in str(error)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200)
@given(json_values, json_values, json_values)
@example("F32", "\n\x1b[2J", None)
def test_any_entry_opens_or_is_refused(tmp_path_factory, dtype, shape, offsets):
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    header = json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    try:
        open_checkpoint(folder)
    except CheckpointError as error:
        assert "\n" not in str(error)
