"""quantize: damaged or strange sources, importance matrices and outputs are refused; strange names and values do no harm."""

import json
import os
import shutil

import checkpoint
import numpy as np
import pytest
import tiny
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from llamacli.errors import CheckpointError, ModelFileError, OutputError
from llamacli.files.gguf import open_gguf
from quantize.convert import convert
from quantize.imatrix import Imatrix, checked, write_imatrix


def tell(kind, *args, **options):
    with pytest.raises(kind) as caught:
        convert(*args, threads=2, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def poke(path, name, value, at=0):
    """Overwrite a tensor's first bytes in the file."""
    tensor = open_gguf(path).tensors[name]
    with path.open("r+b") as file:
        file.seek(tensor.offset + at)
        file.write(np.asarray(value).tobytes())


@pytest.fixture
def source(tmp_path):
    return tiny.tiny_gguf(tmp_path / "source.gguf", types=lambda name: "F16")


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [("blk.0.attn_norm.weight", np.float32("nan"), "Q8_0"), ("blk.1.attn_q.weight", np.float16("inf"), "F16")],
)
def test_a_weight_that_is_not_finite_is_named_even_where_the_type_stays(source, tmp_path, name, value, kind):
    poke(source, name, value)
    assert tell(CheckpointError, source, tmp_path / "out.gguf", kind).startswith(f"tensor {name}: expected finite weights")
    assert not (tmp_path / "out.gguf").exists()


def test_a_scale_that_is_not_finite_is_named_in_blocks_that_are_kept(source, tmp_path):
    convert(source, tmp_path / "q.gguf", "Q4_0")
    poke(tmp_path / "q.gguf", "blk.0.attn_q.weight", np.float16("nan"))
    assert "blk.0.attn_q.weight: expected finite" in tell(CheckpointError, tmp_path / "q.gguf", tmp_path / "out.gguf", "Q4_0")


def test_tensors_that_are_kept_count_as_exact(source, tmp_path):
    report = convert(source, tmp_path / "out.gguf", "F16")
    assert {t["rmse"] for t in report["tensors"]} == {0.0}
    assert all(t["energy"] > 0 for t in report["tensors"])


def rewritten(path, out, change):
    """A copy of a GGUF with other tensors, through gguf-py."""
    reader, writer = GGUFReader(path), GGUFWriter(out, "llama4")
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    tensors = {t.name: (np.array(t.data), t.tensor_type) for t in reader.tensors}
    change(tensors)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_a_gguf_must_hold_the_tensors_of_its_metadata_and_no_others(source, tmp_path):
    copy, f32 = tmp_path / "copy.gguf", GGMLQuantizationType.F32
    rewritten(source, copy, lambda tensors: None)
    convert(copy, tmp_path / "out.gguf", "Q8_0")
    for change, words in (
        (lambda t: t.pop("blk.1.attn_q.weight"), "expected tensor blk.1.attn_q.weight "),
        (lambda t: t.pop("output_norm.weight"), "expected tensor output_norm.weight "),
        (lambda t: t.update({"blk.0.evil.weight": (np.ones((3, 7), np.float32), f32)}), "found 'blk.0.evil.weight'"),
        (lambda t: t.update({"blk.0.attn_norm.weight": (np.ones(7, np.float32), f32)}), "found [7]"),
    ):
        assert words in tell(ModelFileError, rewritten(source, copy, change), tmp_path / "never.gguf", "Q8_0")


def test_an_importance_matrix_beyond_float32_is_refused(tmp_path):
    entry = checked(tmp_path, "x", np.full((1, 64), 3e38), np.full(1, 1e-3))
    matrix = Imatrix(tmp_path / "m.gguf", {"x": entry}, [], 1, 1)
    with pytest.raises(ModelFileError, match="expected mean squares up to 1e"):
        matrix.weights("x", (32, 64))


@pytest.mark.parametrize(
    "generation", ['{"top_k": Infinity}', '{"top_k": 1%s}' % ("0" * 30), '{"temperature": NaN}', '{"temperature": 1e400}']
)
def test_sampling_values_out_of_range_are_left_out_with_a_notice(tmp_path, generation):
    folder = tmp_path / "hf"
    checkpoint.write(folder)
    (folder / "generation_config.json").write_text(generation)
    notices = convert(folder, tmp_path / "out.gguf", "Q8_0")["notices"]
    assert any("generation_config.json" in notice and "left out" in notice for notice in notices)
    assert not any(key.startswith("general.sampling") for key in open_gguf(tmp_path / "out.gguf").metadata)


@pytest.mark.parametrize("key", ["use_qk_norm", "tie_word_embeddings"])
def test_a_string_is_not_taken_for_a_boolean(tmp_path, key):
    checkpoint.write(tmp_path / "hf", **{key: "false"})
    assert f"expected true or false as {key}" in tell(CheckpointError, tmp_path / "hf", tmp_path / "out.gguf", "Q8_0")


def test_odd_names_of_folders_do_no_harm(tmp_path):
    folder = tmp_path / "x-7\N{KELVIN SIGN}"
    checkpoint.write(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": "a/"}))
    convert(folder, tmp_path / "out.gguf", "Q8_0")
    assert open_gguf(tmp_path / "out.gguf").metadata["general.name"]


def test_a_shard_is_never_written_over_whatever_it_is_called(tmp_path):
    folder = tmp_path / "hf"
    checkpoint.write(folder)
    shutil.move(folder / "model.safetensors", folder / "w.gguf")
    raw = (folder / "w.gguf").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    index = {"weight_map": {name: "w.gguf" for name in header if name != "__metadata__"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "found the source itself" in tell(OutputError, folder, folder / "w.gguf", "Q8_0", force=True)
    assert (folder / "w.gguf").read_bytes() == raw


def test_what_is_no_regular_file_is_not_replaced(source, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "found a device or a pipe" in tell(OutputError, source, tmp_path / "pipe", "Q8_0", force=True)
    assert (tmp_path / "pipe").is_fifo()


def test_a_link_stays_and_its_target_is_written(source, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out.gguf").symlink_to(tmp_path / "disk" / "real.gguf")
    convert(source, tmp_path / "out.gguf", "Q8_0")
    assert (tmp_path / "out.gguf").is_symlink()
    assert (tmp_path / "disk" / "real.gguf").stat().st_size


def test_metadata_about_an_importance_matrix_are_not_kept_by_the_next_conversion(source, tmp_path):
    name = "blk.0.attn_q.weight"
    entries = {name: checked(tmp_path, name, np.ones((1, open_gguf(source).tensors[name].shape[-1])), np.ones(1))}
    write_imatrix(Imatrix(tmp_path / "m.gguf", entries, ["text"], 1, 1))
    convert(source, tmp_path / "a.gguf", "Q8_0", imatrix=tmp_path / "m.gguf")
    assert "quantize.imatrix.file" in open_gguf(tmp_path / "a.gguf").metadata
    convert(tmp_path / "a.gguf", tmp_path / "b.gguf", "Q8_0")
    assert "quantize.imatrix.file" not in open_gguf(tmp_path / "b.gguf").metadata


@pytest.mark.parametrize("change", [{"a": {"k" * 5000: 0}}, {"a": "9" * 5000}, {"x" * 5000: 5, "y" * 5000: 5}])
def test_a_strange_vocabulary_is_refused_in_a_short_line(tmp_path, change):
    checkpoint.write(tmp_path / "hf")
    path = tmp_path / "hf" / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["model"]["vocab"].update(change)
    path.write_text(json.dumps(raw))
    told = tell(CheckpointError, tmp_path / "hf", tmp_path / "out.gguf", "Q8_0", dry_run=True)
    assert "tokenizer.json: expected" in told
    assert len(told) < 1000
