"""quantize: a checkpoint becomes a GGUF with the bytes that gguf-py makes of its weights; what is planned and told."""

import checkpoint
import numpy as np
import pytest
from conversions import TYPES, made
from gguf import GGUFReader

from llamacli.errors import UsageError
from llamacli.files.gguf import open_gguf
from llamacli.llama4.config import Config
from quantize import pieces
from quantize.convert import convert
from quantize.hf_config import read_config


@pytest.mark.parametrize("type_name", TYPES)
def test_every_tensor_has_the_references_bytes(scout, type_name):
    gguf, report = made(*scout, type_name)
    types = {name: tensor.type.name for name, tensor in gguf.tensors.items()}
    full = {name for name in types if name.endswith(("_norm.weight", "ffn_gate_inp.weight", "rope_freqs.weight"))}
    assert {types.pop(name) for name in full} == {"F32"}
    assert types.pop("output.weight") == ("Q8_0" if type_name == "Q4_0" else type_name)  # Q6_K, were rows multiples of 256
    assert set(types.values()) == {type_name}
    assert report["nbytes"] == gguf.nbytes == gguf.path.stat().st_size
    assert report["type"] == type_name
    assert gguf.metadata["general.file_type"] == {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}[type_name]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "interleave_moe_layer_step": 2},
        {"attention_chunk_size": 64, "floor_scale": 16, "attn_scale": 0.5},
        {"attn_temperature_tuning": False},
        {"no_rope_layers": [1] * 4, "layer_types": ["full_attention"] * 4},
    ],
)
def test_the_gguf_is_read_as_the_model_that_config_json_describes(tmp_path, changes):
    checkpoint.write(tmp_path / "hf", rms_norm_eps=2**-16, **changes)
    convert(tmp_path / "hf", tmp_path / "out.gguf", "Q8_0")
    assert Config.from_gguf(open_gguf(tmp_path / "out.gguf")) == read_config(tmp_path / "hf").model


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_checkpoints_of_other_dtypes(tmp_path, dtype):
    made(tmp_path / "hf", checkpoint.write(tmp_path / "hf", dtype))


def test_a_maverick_has_dense_layers_between(tmp_path):
    changes = {"interleave_moe_layer_step": 2, "moe_layers": [1, 3], "use_qk_norm": False, "rope_scaling": None}
    gguf, _ = made(tmp_path / "hf", checkpoint.write(tmp_path / "hf", **changes))
    config = Config.from_gguf(gguf)
    assert [config.is_moe(i) for i in range(4)] == [False, True, False, True]
    assert not config.use_qk_norm
    assert "rope_freqs.weight" not in gguf.tensors
    assert gguf.tensors["blk.0.ffn_gate.weight"].shape == (160, 64)


def test_shards_in_any_order_give_the_same_file(scout, tmp_path):
    folder = tmp_path / scout[0].parent.name / "hf"  # the file holds the folder's name
    folder.parent.mkdir()
    gguf, _ = made(folder, checkpoint.write(folder, shards=3))
    single, _ = made(*scout)
    assert gguf.path.read_bytes() == single.path.read_bytes()


def test_a_multimodal_checkpoint_gives_its_text_model(tmp_path):
    vision = {"vision_model.class_embedding": np.ones(8), "multi_modal_projector.linear_1.weight": np.ones((8, 8))}
    outer = {"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4"}
    extra = checkpoint.stored(vision)
    weights = checkpoint.write(tmp_path / "hf", prefix="language_model.", extra=extra, outer=outer, shards=2)
    _, report = made(tmp_path / "hf", weights)
    assert any("2 vision tensors left out" in notice for notice in report["notices"])


def test_a_tied_output_is_kept_once_and_with_the_outputs_type(tmp_path):
    weights = checkpoint.write(tmp_path / "hf", tie_word_embeddings=True)
    gguf, _ = made(tmp_path / "hf", weights, "Q4_0")
    assert "output.weight" not in gguf.tensors
    assert gguf.tensors["token_embd.weight"].type.name == "Q8_0"


def test_rows_that_are_no_whole_blocks_stay_f16_with_a_notice(tmp_path):
    gguf, report = made(tmp_path / "hf", checkpoint.write(tmp_path / "hf", intermediate_size=33), "Q4_0")
    assert gguf.tensors["blk.0.ffn_down_exps.weight"].type.name == "F16"
    assert gguf.tensors["blk.0.ffn_up_exps.weight"].type.name == "Q4_0"
    assert any("F16 instead of Q4_0" in notice for notice in report["notices"])
    assert gguf.tensors["blk.0.ffn_up_exps.weight"].nbytes % 32  # so what comes after it had to be aligned


def test_tensors_larger_than_a_piece_are_put_together_rightly(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "CHUNK", 1 << 11)
    gguf, _ = made(tmp_path / "hf", checkpoint.write(tmp_path / "hf"), "Q8_0")
    copy = tmp_path / "copy.gguf"
    convert(gguf.path, copy, "Q8_0")
    assert copy.read_bytes() == gguf.path.read_bytes()


def test_some_layers_of_a_gguf_are_copied_as_they_are(scout, tmp_path):
    convert(scout[0], tmp_path / "whole.gguf", "Q8_0", split_max_size=200_000)
    whole = next(tmp_path.glob("whole-00001-*.gguf"))
    report = convert(whole, tmp_path / "part.gguf", "F32", layers=range(1, 3))
    a, b = open_gguf(whole), open_gguf(tmp_path / "part.gguf")
    assert set(b.tensors) == {name for name in a.tensors if not name.startswith(("blk.0.", "blk.3."))}
    for name, tensor in b.tensors.items():
        assert tensor.type == a.tensors[name].type and np.array_equal(tensor.data, a.tensors[name].data)
    described = [{k: v for k, v in f.metadata.items() if not k.startswith("split.")} for f in (a, b)]
    assert str(described[0]) == str(described[1])
    assert Config.from_gguf(b) == Config.from_gguf(a)
    assert report["notices"] == []
    for source, layers in ((whole, range(2, 5)), (scout[0], range(2))):
        with pytest.raises(UsageError, match="--layers: expected"):
            convert(source, tmp_path / "no.gguf", "F32", layers=layers)


def test_gguf_py_reads_the_same(scout):
    gguf, _ = made(*scout, "Q4_0")
    reader = GGUFReader(gguf.path)
    assert {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}.keys() == gguf.metadata.keys()
    for tensor in reader.tensors:
        ours = gguf.tensors[tensor.name]
        assert tensor.tensor_type == ours.type.id
        assert tuple(reversed(tensor.shape.tolist())) == ours.shape
        np.testing.assert_array_equal(tensor.data.view(np.uint8).reshape(-1), ours.data)
        assert tensor.data_offset % 32 == 0
    for key in ("llama4.block_count", "tokenizer.ggml.bos_token_id", "general.file_type"):
        assert reader.fields[key].types[0].name == "UINT32"  # llama.cpp insists
    for key in ("llama4.attention.layer_norm_rms_epsilon", "llama4.rope.freq_base"):
        assert reader.fields[key].types[0].name == "FLOAT32"


# --- planning and progress


def test_a_dry_run_reports_everything_and_writes_nothing(scout, tmp_path):
    report = convert(scout[0], tmp_path / "out.gguf", "Q4_0", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    assert not report["written"]
    gguf, done = made(*scout, "Q4_0")
    assert report["nbytes"] == gguf.nbytes
    assert report["tensors"] == [t | {"rmse": None, "energy": None} for t in done["tensors"]]
    nbytes = sum(t["nbytes"] for t in report["tensors"])
    assert nbytes == sum(t.nbytes for t in gguf.tensors.values())
    assert report["bits_per_weight"] == pytest.approx(8 * nbytes / report["n_weights"], abs=1e-3)


def test_the_plan_is_reported_before_the_first_byte_is_written(scout, tmp_path):
    told, out = [], tmp_path / "out.gguf"

    def planned(report):
        told.append(dict(report))
        assert list(tmp_path.iterdir()) == []

    done = convert(scout[0], out, "Q8_0", planned=planned)
    assert len(told) == 1
    assert told[0] | {"written": True, "seconds": done["seconds"]} == done
    assert all(0 <= t["rmse"] < 0.01 for t in done["tensors"])
    assert sum(t["weights"] for t in done["tensors"]) == done["n_weights"]
    convert(scout[0], out, "Q8_0", planned=planned, dry_run=True)
    assert len(told) == 1


def test_types_by_tensor_name_and_the_recipes_own_key(scout, tmp_path):
    gguf, report = made(*scout, "Q8_0", tensor_types=[("attn_q", "q4_0"), ("attn_", "F16")])
    types = {name: tensor.type.name for name, tensor in gguf.tensors.items()}
    assert [types[f"blk.1.{name}.weight"] for name in ("attn_q", "attn_k", "ffn_up_exps")] == ["Q4_0", "F16", "Q8_0"]
    assert "llamacli.recipe" not in gguf.metadata
    assert not [notice for notice in report["notices"] if "licence" not in notice]
    experts, _ = made(*scout, "Q4_EXPERTS", tensor_types=[("", "Q8_0")])
    assert experts.metadata["llamacli.recipe"] == "Q4_EXPERTS"
    convert(experts.path, tmp_path / "again.gguf", "Q8_0")
    assert "llamacli.recipe" not in open_gguf(tmp_path / "again.gguf").metadata


def test_progress_grows_to_the_whole_and_names_the_tensors(scout):
    calls = []
    gguf, report = made(*scout, "Q8_0", progress=lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert calls[-1][:2] == (report["nbytes"], report["nbytes"])
    assert {call[2] for call in calls} >= set(gguf.tensors)
