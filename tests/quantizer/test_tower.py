"""The vision tower in conversions: a file of its own, the same rows whichever dialect it comes from."""

import json

import checkpoint
import gguf as peer
import numpy as np
import pytest
import tiny_tower

from llamacli import CheckpointError, UsageError
from llamacli.cli import main
from llamacli.files.gguf import open_gguf
from llamacli.llama4.vision import VisionConfig, tensors
from llamacli.vision.tower import Tower
from quantize.convert import convert

SHAPE = {"n_text": checkpoint.CONFIG["hidden_size"], "n_out": 96, "n_mlp": 96, "seed": 9}


def tower_tensors():
    return tiny_tower.tensors(SHAPE["seed"], **{key: value for key, value in SHAPE.items() if key != "seed"})


def folder(path, dtype="F32", drop=(), prefix="", **changes):
    """A checkpoint with a text model and a tower."""
    s = tiny_tower.Shape(**{key: value for key, value in SHAPE.items() if key != "seed"})
    vision = {prefix + tiny_tower.hf_name(name): values for name, values in tower_tensors().items() if name not in drop}
    outer = {"architectures": ["Llama4ForConditionalGeneration"], "vision_config": tiny_tower.hf_config(s) | changes}
    checkpoint.write(path, dtype=dtype, prefix="language_model.", extra=checkpoint.stored(vision, dtype), outer=outer)
    (path / "preprocessor_config.json").write_text(json.dumps({"max_patches": 4}))
    return path


def rows_of(path):
    tiles = np.random.RandomState(1).randint(0, 256, (2, 56, 56, 3)).astype(np.uint8)
    tower = Tower(open_gguf(path), 2)
    try:
        return tower.features(tiles)
    finally:
        tower.close()


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return rows_of(tiny_tower.tower_gguf(tmp_path_factory.mktemp("tower") / "a.gguf", **SHAPE))


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_folder_becomes_a_model_and_a_tower(tmp_path, expected, prefix):
    out = tmp_path / "small.gguf"
    report = convert(folder(tmp_path / "hf", prefix=prefix), out, "F32", mmproj_type="F32")
    assert report["files"] == [str(out), str(tmp_path / "mmproj-small.gguf")]
    assert report["mmproj"] == str(tmp_path / "mmproj-small.gguf")
    assert not [name for name in open_gguf(out).tensors if name.startswith(("v.", "mm."))]
    assert np.array_equal(rows_of(report["mmproj"]), expected)
    assert VisionConfig.from_gguf(open_gguf(report["mmproj"])).most_tiles == 4


def test_the_file_follows_llama_cpps_contract(tmp_path):
    report = convert(folder(tmp_path / "hf"), tmp_path / "small.gguf", "Q8_0")
    reader = peer.GGUFReader(report["mmproj"])
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "clip"
    assert fields["general.type"] == "mmproj"
    assert fields["clip.projector_type"] == "llama4"
    assert fields["clip.has_vision_encoder"] is True
    assert fields["clip.use_gelu"] is True
    for key in (
        *("image_size", "patch_size", "embedding_length", "feed_forward_length", "block_count", "attention.head_count"),
        *("projection_dim", "attention.layer_norm_epsilon", "image_mean", "image_std", "projector.scale_factor"),
    ):
        assert f"clip.vision.{key}" in fields
    assert fields["clip.vision.image_mean"] == [0.5] * 3
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert set(types) == set(tower_tensors())
    matrices = {name for name, values in tower_tensors().items() if values.ndim == 2}
    full = {"v.position_embd.weight", "v.patch_embd.weight"}
    assert {types[name] for name in matrices - full} == {"Q8_0"}
    assert {types[name] for name in types.keys() - matrices | full} == {"F32"}


def test_no_tower_is_written_if_none_is_wanted(tmp_path):
    out = tmp_path / "small.gguf"
    report = convert(folder(tmp_path / "hf"), out, "Q8_0", mmproj_type=None)
    assert report["files"] == [str(out)]
    assert any("vision tensors left out" in notice for notice in report["notices"])
    assert not (tmp_path / "mmproj-small.gguf").exists()


def ollama(path):
    """The text model and the tower in one file, as Ollama writes them."""
    text = open_gguf(convert(folder(path.parent / "hf2"), path.with_name("text.gguf"), "F32", mmproj_type=None)["out"])
    vision = open_gguf(tiny_tower.tower_gguf(path.with_name("t.gguf"), **SHAPE))
    names = {spec.name: spec.ollama for spec in tensors(VisionConfig.from_gguf(vision))}
    writer = peer.GGUFWriter(path, "llama4")
    reader = peer.GGUFReader(text.path)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    s = tiny_tower.metadata(tiny_tower.Shape(**{key: value for key, value in SHAPE.items() if key != "seed"}))
    for key, value in s.items():
        if "projection" not in key and "projector" not in key and "preproc" not in key:
            writer.add_uint32(key.replace("clip.", "llama4."), value)
    for name, tensor in [*text.tensors.items(), *((names[name], tensor) for name, tensor in vision.tensors.items())]:
        writer.add_tensor(name, np.frombuffer(tensor.data, np.float32).reshape(tensor.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_ollamas_file_becomes_both(tmp_path, expected):
    source = ollama(tmp_path / "ollama.gguf")
    assert np.array_equal(rows_of(source), expected), "it runs as it is"
    report = convert(source, tmp_path / "small.gguf", "F32", mmproj_type="F32")
    assert np.array_equal(rows_of(report["mmproj"]), expected)
    assert not [key for key in open_gguf(tmp_path / "small.gguf").metadata if "vision" in key]


def test_a_tower_alone_takes_another_type(tmp_path, expected):
    broken = tiny_tower.tower_gguf(tmp_path / "in.gguf", rename=lambda n: n.replace(".ln2.", ".attn_post_norm."), **SHAPE)
    report = convert(broken, tmp_path / "mmproj-new.gguf", "Q8_0")
    assert report["files"] == [str(tmp_path / "mmproj-new.gguf")]
    found = rows_of(tmp_path / "mmproj-new.gguf")
    assert np.abs(found - expected).max() <= 0.03 * np.abs(expected).max()
    assert "v.blk.0.ln2.weight" in open_gguf(tmp_path / "mmproj-new.gguf").tensors


def test_a_stopped_conversion_goes_on_with_the_tower(tmp_path):
    out, source = tmp_path / "small.gguf", folder(tmp_path / "hf")
    whole = convert(source, tmp_path / "whole.gguf", "Q8_0")

    def stop(done, total, name):
        if name.startswith("v.blk.1."):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, "Q8_0", progress=stop)
    assert not out.with_name("mmproj-small.gguf").exists()
    report = convert(source, out, "Q8_0")
    assert report["resumed_bytes"] > 0
    assert out.with_name("mmproj-small.gguf").read_bytes() == (tmp_path / "mmproj-whole.gguf").read_bytes()
    assert whole["nbytes"] == sum(path.stat().st_size for path in (out, out.with_name("mmproj-small.gguf")))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"drop": ["v.blk.1.ln2.weight"]}, "post_attention_layernorm"),
        ({"hidden_size": 48}, "does not fit"),
        ({"num_attention_heads": 3}, "heads"),
        ({"pixel_shuffle_ratio": 0.25}, "pixel_shuffle_ratio"),
        ({"image_size": 55}, "even number of patches"),
        ({"num_hidden_layers": "many"}, "whole number"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta"),
    ],
)
def test_a_tower_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, more, words):
    with pytest.raises(CheckpointError, match=words):
        convert(folder(tmp_path / "hf", **more), tmp_path / "small.gguf", "Q8_0")
    assert not list(tmp_path.glob("*.gguf*"))


def test_the_command_names_both_files(tmp_path, capfd):
    source, out = folder(tmp_path / "hf"), tmp_path / "small.gguf"
    assert main(["quantize", str(source), str(out), "--type", "Q8_0", "--mmproj-type", "f16", "-v"]) == 0
    said = capfd.readouterr().err
    assert f"{out} and {tmp_path / 'mmproj-small.gguf'}" in " ".join(said.split())
    assert "vision tower" in said
    assert main(["quantize", str(source), str(out), "--mmproj-type", "q9", "--force"]) == 2
    assert "--mmproj-type" in capfd.readouterr().err


def test_a_type_that_towers_do_not_have():
    from quantize.tower import tower_type

    with pytest.raises(UsageError, match="expected F32"):
        tower_type("Q4_K")
