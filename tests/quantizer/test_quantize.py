"""quantize: a checkpoint or a GGUF becomes a GGUF that says the same, whole or not at all."""

import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import checkpoint
import numpy as np
import pytest
import tiny
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from gguf.quants import quantize as reference

import llamacli
from llamacli.errors import CheckpointError, LlamacliError, ModelFileError, OutputError, UnsupportedModelError, UsageError
from llamacli.files.ggml import BY_NAME
from llamacli.files.gguf import open_gguf
from llamacli.llama4.config import Config
from llamacli.text.tokenizer import Tokenizer
from quantize import pieces
from quantize.convert import convert
from quantize.hf_config import read_config, rope_divisors
from quantize.imatrix import Imatrix, checked, write_imatrix
from quantize.writer import header, write_file

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "feed_forward.router": "ffn_gate_inp",
    "feed_forward.shared_expert.gate_proj": "ffn_gate_shexp",
    "feed_forward.shared_expert.up_proj": "ffn_up_shexp",
    "feed_forward.shared_expert.down_proj": "ffn_down_shexp",
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
}
TOP_NAMES = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}


def wanted(weights):
    """What the GGUF must hold, as float32 by its names: written down once more, in plain NumPy."""
    found = {}
    for name, x in weights.items():
        if name in TOP_NAMES:
            found[TOP_NAMES[name] + ".weight"] = x
            continue
        _, _, i, rest = name.split(".", 3)
        if rest == "feed_forward.experts.gate_up_proj":
            gate, up = np.split(x.transpose(0, 2, 1), 2, axis=1)
            found |= {f"blk.{i}.ffn_gate_exps.weight": gate, f"blk.{i}.ffn_up_exps.weight": up}
        elif rest == "feed_forward.experts.down_proj":
            found[f"blk.{i}.ffn_down_exps.weight"] = x.transpose(0, 2, 1)
        else:
            found[f"blk.{i}.{GGUF_NAMES[rest.removesuffix('.weight')]}.weight"] = x
    return found


def made(folder, weights, type_name="F32", **options):
    """Convert, and hold every tensor against what gguf-py makes of the same weights."""
    out = folder.parent / "out.gguf"
    report = convert(folder, out, type_name, force=True, threads=2, **options)
    gguf, expected = open_gguf(out), wanted(weights)
    assert set(gguf.tensors) - {"rope_freqs.weight"} == set(expected)
    for name, x in expected.items():
        tensor = gguf.tensors[name]
        assert tensor.shape == x.shape, name
        encoded = np.ascontiguousarray(reference(np.ascontiguousarray(x), GGMLQuantizationType[tensor.type.name]))
        np.testing.assert_array_equal(tensor.data, encoded.view(np.uint8).reshape(-1), err_msg=name)
    return gguf, report


@pytest.fixture(scope="module")
def scout(tmp_path_factory):
    """A folder of Scout's shape and its weights."""
    folder = tmp_path_factory.mktemp("scout") / "hf"
    return folder, checkpoint.write(folder)


def refusal(kind, *args, **options):
    """The one line that a conversion ends with."""
    with pytest.raises(kind) as caught:
        convert(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what comes out


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


def test_rows_that_are_no_whole_blocks_stay_f16_and_are_told(tmp_path):
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


# --- metadata


def test_the_sizes_arrive_in_the_config(scout):
    gguf, _ = made(*scout)
    c = Config.from_gguf(gguf)
    assert (c.n_layers, c.n_embd, c.n_heads, c.n_kv_heads, c.head_dim) == (4, 64, 4, 2, 32)
    assert (c.n_ff, c.n_ff_exp, c.n_experts, c.n_experts_used, c.moe_step) == (160, 96, 3, 1, 1)
    assert (c.n_vocab, c.context_length, c.rope_theta, c.rms_eps) == (288, 4096, 500000.0, pytest.approx(1e-5))
    assert (c.chunk_size, c.no_rope_step, c.temperature_length, c.use_qk_norm) == (8192, 4, 8192.0, True)
    assert gguf.metadata["general.architecture"] == "llama4"
    assert gguf.metadata["general.quantization_version"] == 2


def test_the_name_is_the_folders(tmp_path):
    for folder, name in (("my-llama-17B", "My Llama 17B"), ("tiny/hf", "Tiny")):
        (tmp_path / folder).parent.mkdir(exist_ok=True)
        gguf, _ = made(tmp_path / folder, checkpoint.write(tmp_path / folder))
        assert gguf.metadata["general.name"] == name


def test_what_is_not_metas_is_written_under_keys_of_its_own(tmp_path):
    changes = {"attention_chunk_size": 16, "floor_scale": 4, "attn_scale": 0.5, "use_qk_norm": False}
    gguf, report = made(tmp_path / "hf", checkpoint.write(tmp_path / "hf", **changes))
    c = Config.from_gguf(gguf)
    assert (c.chunk_size, c.temperature_length, c.temperature_scale, c.use_qk_norm) == (16, 4.0, 0.5, False)
    assert sum("llama.cpp" in notice for notice in report["notices"]) == 2


def test_a_switched_off_temperature_stays_off(tmp_path):
    gguf, _ = made(tmp_path / "hf", checkpoint.write(tmp_path / "hf", attn_temperature_tuning=False))
    assert Config.from_gguf(gguf).temperature_length == 0


def test_full_attention_everywhere_is_llama_cpps_window_of_zero(tmp_path):
    changes = {"no_rope_layers": [1] * 4, "layer_types": ["full_attention"] * 4}
    gguf, _ = made(tmp_path / "hf", checkpoint.write(tmp_path / "hf", **changes))
    assert Config.from_gguf(gguf).chunk_size == 0
    assert all(Config.from_gguf(gguf).uses_rope(i) for i in range(4))


def test_rope_parameters_of_newer_configs_are_the_same(scout, tmp_path):
    new = checkpoint.CONFIG["rope_scaling"] | {"rope_theta": 10000.0}
    gguf, _ = made(tmp_path / "hf", checkpoint.write(tmp_path / "hf", rope_scaling=None, rope_parameters=new))
    assert gguf.metadata["llama4.rope.freq_base"] == 10000.0
    assert "rope_freqs.weight" in gguf.tensors


def test_scouts_rope_divisors_are_35_ones_and_29_sixteens():
    expected = np.float32([1] * 35 + [16] * 29)
    np.testing.assert_array_equal(rope_divisors(500000.0, 128, 16.0, 1.0, 1.0, 8192.0), expected)


def test_llama_3s_rope_divisors_pass_smoothly():
    """Against the definition in terms of frequencies."""
    theta, dim, factor, low, high, original = 500000.0, 128, 8.0, 1.0, 4.0, 8192.0
    divisors = rope_divisors(theta, dim, factor, low, high, original)
    frequency = theta ** -(np.arange(0, dim, 2) / dim)
    turns = original * frequency / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    np.testing.assert_allclose(frequency / divisors, (1 - smooth) * frequency / factor + smooth * frequency, rtol=1e-5)
    assert len(np.unique(divisors)) > 2


@pytest.mark.parametrize("as_lists", [True, False])
def test_the_tokenizer_arrives(tmp_path, as_lists):
    gguf, _ = made(tmp_path / "hf", checkpoint.write(tmp_path / "hf", merges_as_lists=as_lists))
    m = gguf.metadata
    assert (m["tokenizer.ggml.model"], m["tokenizer.ggml.pre"]) == ("gpt2", "llama4")
    tokens, types = m["tokenizer.ggml.tokens"], m["tokenizer.ggml.token_type"]
    assert tokens[:3] == ["!", '"', "#"]
    assert tokens[264:267] == ["Ġworld", "<|begin_of_text|>", "<|end_of_text|>"]
    assert tokens[272:] == [f"[PAD{i}]" for i in range(272, 288)]
    assert types.dtype == np.int32
    assert types.tolist() == [1] * 265 + [3] * 7 + [5] * 16
    assert m["tokenizer.ggml.merges"][:3] == ["h e", "l l", "he ll"]
    ids = {key: m[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos", "eot", "eom", "padding")}
    assert ids == {"bos": 265, "eos": 270, "eot": 270, "eom": 269, "padding": 271}
    assert m["tokenizer.ggml.add_bos_token"] is True
    assert m["tokenizer.chat_template"] == "{{ bos_token }}hello"
    assert m["general.sampling.temp"] == pytest.approx(0.6)


def test_a_template_file_wins(tmp_path):
    weights = checkpoint.write(tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text("\ufefffrom the file", "utf-8")  # its byte order mark is dropped
    assert made(tmp_path / "hf", weights)[0].metadata["tokenizer.chat_template"] == "from the file"


def test_without_tokenizer_config_the_ids_come_from_the_config(tmp_path):
    weights = checkpoint.write(tmp_path / "hf", bos_token_id=265)
    (tmp_path / "hf" / "tokenizer_config.json").unlink()
    gguf, report = made(tmp_path / "hf", weights)
    assert gguf.metadata["tokenizer.ggml.bos_token_id"] == 265
    assert gguf.metadata["tokenizer.ggml.eos_token_id"] == 270  # of [266, 269, 270] the one that ends a turn
    assert any("no chat template" in notice for notice in report["notices"])


# --- checkpoints as others save them


def changed(folder, file, change):
    """Change a JSON file of a checkpoint."""
    value = json.loads((folder / file).read_text())
    change(value)
    (folder / file).write_text(json.dumps(value))


@pytest.mark.parametrize("kind", ["no experts", "period 0", "no mixture layers"])
def test_a_dense_model(tmp_path, kind):
    """Llama Guard 4, MobileLLM-R1."""
    weights = checkpoint.write(tmp_path / "hf", interleave_moe_layer_step=99)
    odd = {"no experts": {"num_local_experts": 0, "num_experts_per_tok": 0, "moe_layers": []}, "period 0": {"moe_layers": None}}
    odd["period 0"]["interleave_moe_layer_step"] = odd["no experts"]["interleave_moe_layer_step"] = 0
    changed(tmp_path / "hf", "config.json", lambda c: c.update(odd.get(kind, {"moe_layers": []})))
    gguf, _ = made(tmp_path / "hf", weights)
    config = Config.from_gguf(gguf)
    assert (config.n_experts, config.n_experts_used, config.moe_step) == (0, 0, 0)
    assert not any(config.is_moe(i) for i in range(4))
    assert llamacli.Model.load(gguf.path, threads=1, ctx=16).logits([1, 2]).shape == (2, 288)


def test_experts_that_contradict_the_list_of_mixture_layers_are_refused(tmp_path):
    checkpoint.write(tmp_path / "hf", num_local_experts=0, moe_layers=[1])
    assert "moe_layers" in refusal(CheckpointError, tmp_path / "hf", tmp_path / "out.gguf", "F32")


def test_an_activation_that_the_engine_has_not_is_refused(tmp_path):
    checkpoint.write(tmp_path / "hf", hidden_act="gelu")
    assert "hidden_act" in refusal(CheckpointError, tmp_path / "hf", tmp_path / "out.gguf", "F32")


@pytest.mark.parametrize(("ending", "expected"), [([266, 269], [270, 266, 269]), (266, [270, 266]), ([270], None), ("x", None)])
def test_every_end_of_the_generation_config_ends_an_answer(tmp_path, ending, expected):
    checkpoint.write(tmp_path / "hf", eos_token_id=None)
    changed(tmp_path / "hf", "generation_config.json", lambda c: c.update(eos_token_id=ending))
    convert(tmp_path / "hf", tmp_path / "out.gguf", "F32")
    found = open_gguf(tmp_path / "out.gguf")
    ends = found.metadata.get("tokenizer.ggml.eos_token_ids")
    assert (ends if ends is None else ends.tolist()) == expected
    assert found.metadata["tokenizer.ggml.eos_token_id"] == 270
    assert Tokenizer.from_gguf(found).stop_ids >= set(expected or [270])


def test_two_ids_for_one_token_are_refused(tmp_path):
    checkpoint.write(tmp_path / "hf")
    changed(tmp_path / "hf", "tokenizer.json", lambda t: t["added_tokens"][-1].update(content="hello"))
    assert "found 259 and 271 for 'hello'" in refusal(CheckpointError, tmp_path / "hf", tmp_path / "out.gguf", "F32")


def test_a_token_named_like_a_filler_is_no_second_one(tmp_path):
    checkpoint.write(tmp_path / "hf")
    changed(tmp_path / "hf", "tokenizer.json", lambda t: t["added_tokens"][-1].update(content="[PAD280]"))
    gguf = convert(tmp_path / "hf", tmp_path / "out.gguf", "F32")
    tokens = open_gguf(gguf["out"]).metadata["tokenizer.ggml.tokens"]
    assert len(set(tokens)) == len(tokens) == 288 and tokens[271] == "[PAD280]"


def test_a_vocabulary_that_no_reader_takes_is_refused_before_anything_is_written(scout, tmp_path):
    checkpoint.write(tmp_path / "hf")
    changed(tmp_path / "hf", "tokenizer.json", lambda t: t["model"]["vocab"].pop("!"))
    assert "of 256 bytes" in refusal(CheckpointError, tmp_path / "hf", tmp_path / "out.gguf", "F32")
    convert(scout[0], tmp_path / "whole.gguf", "F32")
    raw = (tmp_path / "whole.gguf").read_bytes()
    word = len("Ġworld".encode()).to_bytes(8, "little") + "Ġworld".encode()
    (tmp_path / "odd.gguf").write_bytes(raw.replace(word, len(word[8:]).to_bytes(8, "little") + b"<|eom|>"[: len(word[8:])], 1))
    assert "tokenizer.ggml" in refusal(ModelFileError, tmp_path / "odd.gguf", tmp_path / "out.gguf", "F16")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "whole.gguf", "odd.gguf"}


def test_what_a_gguf_cannot_say_of_a_tokenizer_is_told(tmp_path):
    checkpoint.write(tmp_path / "hf")

    def change(t):
        t["normalizer"] = {"type": "NFC"}
        t["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True

    changed(tmp_path / "hf", "tokenizer.json", change)
    notices = convert(tmp_path / "hf", tmp_path / "out.gguf", "F32", dry_run=True)["notices"]
    assert any("NFC" in notice for notice in notices) and any("space before" in notice for notice in notices)


@pytest.mark.parametrize(
    ("template", "expected", "notice"),
    [
        ([{"name": "tool_use", "template": "x"}, {"name": "default", "template": "yes"}], "yes", None),
        ([{"name": "chat", "template": "yes"}, {"name": "tool_use", "template": "x"}], "yes", None),
        ({"default": "yes", "rag": "x"}, "yes", None),
        ({"mine": "yes"}, "yes", None),
        ({"one": "x", "two": "y"}, None, "named default, found one, two"),
        ("\ufeffyes", "yes", None),
        (" ", None, "no chat template"),
        ([], None, "named default, found none"),
        (7, None, "no chat template"),
    ],
)
def test_the_template_for_chat_is_found(tmp_path, template, expected, notice):
    checkpoint.write(tmp_path / "hf")
    changed(tmp_path / "hf", "tokenizer_config.json", lambda t: t.update(chat_template=template))
    report = convert(tmp_path / "hf", tmp_path / "out.gguf", "F32")
    assert open_gguf(tmp_path / "out.gguf").metadata.get("tokenizer.chat_template") == expected
    assert notice is None or any(notice in text for text in report["notices"])


def test_a_template_file_with_a_byte_order_mark(tmp_path):
    weights = checkpoint.write(tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_bytes(b"\xef\xbb\xbffrom the file")
    assert made(tmp_path / "hf", weights)[0].metadata["tokenizer.chat_template"] == "from the file"


def test_names_under_model_language_model(tmp_path):
    """As newer versions of transformers save a model that has a vision part."""
    weights = checkpoint.write(tmp_path / "hf")
    entries = checkpoint.stored(weights)
    new = {
        name.replace("model.", "model.language_model.") if name.startswith("model.") else name: x for name, x in entries.items()
    }
    checkpoint.write_safetensors(tmp_path / "hf" / "model.safetensors", new)
    made(tmp_path / "hf", weights)
    checkpoint.write_safetensors(tmp_path / "hf" / "model.safetensors", new | entries)
    assert "two names" in refusal(CheckpointError, tmp_path / "hf", tmp_path / "out2.gguf", "F32")


def test_tensors_beside_the_model_may_be_of_any_kind(tmp_path):
    extra = {"vision_model.position_ids": ("I64", np.arange(3)), "vision_model.empty": ("F32", np.empty(0, np.float32))}
    _, report = made(tmp_path / "hf", checkpoint.write(tmp_path / "hf", extra=extra))
    assert any("2 vision tensors left out" in notice for notice in report["notices"])


def test_a_source_whose_name_is_no_text(scout, tmp_path):
    source = Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.gguf"))
    convert(scout[0], source, "F16")
    convert(source, tmp_path / "out.gguf", "Q8_0")
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/f\xff"))
    checkpoint.write(folder)
    convert(folder, tmp_path / "from_folder.gguf", "Q8_0")
    assert open_gguf(tmp_path / "from_folder.gguf").metadata["general.name"].endswith("\ufffd")


# --- from a GGUF


@pytest.mark.parametrize("type_name", TYPES)
def test_a_gguf_becomes_what_its_checkpoint_would(scout, tmp_path, type_name):
    full, _ = made(*scout)
    source = tmp_path / "full.gguf"
    source.write_bytes(full.path.read_bytes())
    direct, _ = made(*scout, type_name)
    convert(source, tmp_path / "out.gguf", type_name)
    again = open_gguf(tmp_path / "out.gguf")
    assert dict(again.metadata).keys() == dict(direct.metadata).keys()
    for name, tensor in direct.tensors.items():
        assert again.tensors[name].type == tensor.type
        np.testing.assert_array_equal(again.tensors[name].data, tensor.data, err_msg=name)


def test_metadata_that_are_no_utf8_pass_unchanged(scout, tmp_path):
    made(*scout, "F16")
    raw = (scout[0].parent / "out.gguf").read_bytes()
    name = open_gguf(scout[0].parent / "out.gguf").metadata["general.name"].encode()
    odd = b"\xe9" * len(name)
    (tmp_path / "odd.gguf").write_bytes(
        raw.replace(len(name).to_bytes(8, "little") + name, len(name).to_bytes(8, "little") + odd)
    )
    convert(tmp_path / "odd.gguf", tmp_path / "copy.gguf", "F16")
    assert odd in (tmp_path / "copy.gguf").read_bytes()
    assert open_gguf(tmp_path / "copy.gguf").metadata["general.name"] == "\ufffd" * len(name)


def test_a_quantized_gguf_is_read_back_and_that_is_told(scout, tmp_path):
    quantized, _ = made(*scout, "Q4_0")
    report = convert(quantized.path, tmp_path / "f32.gguf", "F32")
    name = "blk.2.ffn_down_exps.weight"
    back = open_gguf(tmp_path / "f32.gguf").tensors[name]
    source = quantized.tensors[name]
    expected = dequantize(source.data.reshape(-1, source.type.row_bytes(source.shape[-1])), GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(back.data.view(np.float32), expected.reshape(-1))
    assert any("quantized already" in notice for notice in report["notices"])


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_what_has_its_type_already_keeps_its_bytes_and_is_measured_all_the_same(scout, tmp_path, type_name):
    source, _ = made(*scout, type_name)
    report = convert(source.path, tmp_path / "copy.gguf", type_name)
    copy = open_gguf(tmp_path / "copy.gguf")
    for t in report["tensors"]:
        np.testing.assert_array_equal(copy.tensors[t["name"]].data, source.tensors[t["name"]].data)
        assert t["rmse"] == 0.0
        assert t["energy"] == pytest.approx(np.square(values_of(source.tensors[t["name"]])).sum(), rel=1e-5)


def values_of(tensor):
    """A tensor as float64, by gguf-py."""
    rows = tensor.data.reshape(-1, tensor.type.row_bytes(tensor.shape[-1]))
    return dequantize(rows, GGMLQuantizationType[tensor.type.name]).astype(np.float64)


@pytest.mark.parametrize(
    "type_name, name, bad",
    [
        ("F16", "blk.0.attn_norm.weight", np.float32("nan")),  # a norm is F32 in every file
        ("F16", "blk.1.attn_q.weight", np.float16("inf")),
        ("BF16", "blk.1.attn_q.weight", np.uint16(0x7FC0)),
        ("Q4_0", "blk.3.ffn_up_exps.weight", np.float16("nan")),  # a block's scale
        ("Q8_0", "blk.3.ffn_up_exps.weight", np.float16("-inf")),
    ],
)
def test_what_is_no_number_is_named_though_its_bytes_would_be_copied(scout, tmp_path, type_name, name, bad):
    gguf, _ = made(*scout, type_name)
    raw = bytearray(gguf.path.read_bytes())
    at = gguf.tensors[name].offset
    raw[at : at + bad.nbytes] = bad.tobytes()
    (tmp_path / "bad.gguf").write_bytes(raw)
    assert name in refusal(CheckpointError, tmp_path / "bad.gguf", tmp_path / "copy.gguf", type_name)
    assert not (tmp_path / "copy.gguf").exists()


def test_errors_of_weights_whose_squares_leave_float32_are_numbers_all_the_same(tmp_path):
    with_entries(tmp_path / "hf", lambda e: e["lm_head.weight"][1].fill(checkpoint.to_bf16(np.float32([3e30]))[0]))
    for type_name in ("BF16", "F32"):
        report = convert(tmp_path / "hf", tmp_path / "out.gguf", type_name, force=True)
        assert all(math.isfinite(t["rmse"]) and 0 < t["energy"] < math.inf for t in report["tensors"])
        copied = convert(tmp_path / "out.gguf", tmp_path / "copy.gguf", type_name, force=True)
        assert [t["energy"] for t in copied["tensors"]] == pytest.approx([t["energy"] for t in report["tensors"]], rel=1e-4)


def rewritten(source, path, change):
    """A GGUF with the metadata of `source`, and of its tensors what `change` leaves of {name: (type, shape, bytes)}."""
    tensors = {name: (t.type, t.shape, t.data.tobytes()) for name, t in source.tensors.items()}
    metadata = {key: source.metadata.typed(key) for key in source.metadata}
    change(tensors, metadata)
    infos, offset = [], 0
    for name, (kind, shape, raw) in tensors.items():
        infos.append((name, kind, shape, offset))
        offset += -(-len(raw) // 32) * 32
    write_file(path, header(metadata, infos), [(name, len(raw), [raw]) for name, (_, _, raw) in tensors.items()], True)
    return path


def ones(*shape):
    return BY_NAME["F32"], shape, np.ones(shape, "<f4").tobytes()


FOREIGN_TENSORS = {
    "a missing matrix": (lambda t: t.pop("blk.1.attn_q.weight"), "blk.1.attn_q.weight", "none"),
    "a missing norm": (lambda t: t.pop("output_norm.weight"), "output_norm.weight", "none"),
    "a name in a layer": (lambda t: t.update({"blk.0.evil.weight": ones(4, 3, 32)}), "blk.0.evil.weight", "no place"),
    "a name like that of a rotation": (lambda t: t.update({"rope_evil.weight": ones(16)}), "rope_evil.weight", "no place"),
    "a layer too many": (lambda t: t.update({"blk.4.attn_norm.weight": ones(64)}), "blk.4.attn_norm.weight", "no place"),
    "a wrong shape": (lambda t: t.update({"blk.2.ffn_norm.weight": ones(32)}), "blk.2.ffn_norm.weight", "[32]"),
    "divisors of another size": (lambda t: t.update({"rope_freqs.weight": ones(17)}), "rope_freqs.weight", "[17]"),
}


@pytest.mark.parametrize("case", FOREIGN_TENSORS)
def test_a_gguf_whose_tensors_are_not_those_of_its_metadata_is_refused_by_name(scout, tmp_path, case):
    change, name, found = FOREIGN_TENSORS[case]
    source = rewritten(made(*scout)[0], tmp_path / "source.gguf", lambda tensors, metadata: change(tensors))
    message = refusal(ModelFileError, source, tmp_path / "out.gguf", "Q8_0")
    assert name in message
    assert found in message


def test_tensors_that_llama_cpp_takes_or_leaves_pass(scout, tmp_path):
    def without(tensors, metadata):
        del tensors["rope_freqs.weight"]

    def more(tensors, metadata):
        tensors |= {"rope_factors_long.weight": ones(16), "blk.1.attn_k.bias": ones(64), "v.blk.0.attn_q.weight": ones(8, 8)}

    for change in (without, more):
        source = rewritten(made(*scout)[0], tmp_path / "source.gguf", change)
        report = convert(source, tmp_path / "out.gguf", "Q8_0", force=True)
        assert {t["name"] for t in report["tensors"]} == {n for n in open_gguf(source).tensors if not n.startswith("v.")}


def test_a_gguf_without_mixtures_passes(tmp_path):
    source = tiny.tiny_gguf(tmp_path / "dense.gguf", moe_step=9)  # beyond its last layer
    convert(source, tmp_path / "out.gguf", "Q8_0")

    def dense(tensors, metadata):
        metadata |= {"llama4.expert_count": 0, "llama4.interleave_moe_layer_step": 0, "llama4.expert_used_count": 0}

    source = rewritten(open_gguf(source), tmp_path / "none.gguf", dense)
    convert(source, tmp_path / "out.gguf", "Q8_0", force=True)


# --- importance


def importance(path, gguf, sums, counts):
    """An importance matrix of one matrix and one stack of a model."""
    entries = {}
    for name in ("blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight"):
        shape = gguf.tensors[name].shape
        n = shape[0] if len(shape) == 3 else 1
        entries[name] = checked(path, name, np.tile(np.linspace(0.1, 1, shape[-1]) * sums, (n, 1)), np.full(n, counts))
    write_imatrix(Imatrix(path, entries, ["text"], 1, 512), force=True)
    return path


def test_importance_beyond_all_measure_is_refused_before_anything_is_written(scout, tmp_path):
    path = importance(tmp_path / "im.gguf", made(*scout)[0], 3e38, 1e-3)
    message = refusal(ModelFileError, scout[0], tmp_path / "out.gguf", "Q4_1", imatrix=path)
    assert "im.gguf" in message
    assert "blk.0.attn_q.weight" in message
    assert {path.name for path in tmp_path.iterdir()} == {"im.gguf"}


def test_importance_of_any_size_weighs_as_its_like_of_ordinary_size(scout, tmp_path):
    gguf, files = made(*scout)[0], []
    for i, (sums, counts) in enumerate(((1.0, 1.0), (2.0**127, 2.0**30), (2.0**-100, 2.0**10))):
        path = importance(tmp_path / "im.gguf", gguf, sums, counts)
        convert(scout[0], tmp_path / f"{i}.gguf", "Q4_1", imatrix=path)
        files.append((tmp_path / f"{i}.gguf").read_bytes())
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize("sums, counts", [(0.0, 0.0), (0.0, 5.0)])
def test_importance_of_no_text_at_all_is_called_that(scout, tmp_path, sums, counts):
    path = importance(tmp_path / "im.gguf", made(*scout)[0], sums, counts)
    notices = convert(scout[0], tmp_path / "out.gguf", "Q4_1", imatrix=path)["notices"]
    assert any("2 of 2 tensors saw no text" in notice for notice in notices)
    assert not any("as the others" in notice for notice in notices)


def test_a_file_says_of_importance_only_what_its_own_conversion_used(scout, tmp_path):
    path = importance(tmp_path / "im.gguf", made(*scout)[0], 1.0, 1.0)
    convert(scout[0], tmp_path / "with.gguf", "Q4_1", imatrix=path)
    assert open_gguf(tmp_path / "with.gguf").metadata["quantize.imatrix.entries_count"] == 2
    convert(tmp_path / "with.gguf", tmp_path / "without.gguf", "Q8_0")
    assert not [key for key in open_gguf(tmp_path / "without.gguf").metadata if "imatrix" in key]


# --- planning and progress


def test_a_dry_run_says_everything_and_writes_nothing(scout, tmp_path):
    report = convert(scout[0], tmp_path / "out.gguf", "Q4_0", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    assert not report["written"]
    gguf, done = made(*scout, "Q4_0")
    assert report["nbytes"] == gguf.nbytes
    assert report["tensors"] == [t | {"rmse": None, "energy": None} for t in done["tensors"]]
    nbytes = sum(t["nbytes"] for t in report["tensors"])
    assert nbytes == sum(t.nbytes for t in gguf.tensors.values())
    assert report["bits_per_weight"] == pytest.approx(8 * nbytes / report["n_weights"], abs=1e-3)


def test_the_plan_is_told_before_the_first_byte_is_written(scout, tmp_path):
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


# --- bad input


def spoil(folder, file, text):
    """Write `text` over a file of the checkpoint, or remove it."""
    if text is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(text)


BAD_CONFIGS = {
    "another architecture": ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
    "no architecture": ({"architectures": None}, "architecture"),
    "text where a count belongs": ({"hidden_size": "64"}, "hidden_size"),
    "a negative count": ({"num_hidden_layers": -1}, "num_hidden_layers"),
    "an absurd count": ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "num_key_value_heads"),
    "a theta that is no number": ({"rope_theta": float("nan")}, "rope_theta"),
    "an unknown rope type": ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
    "a number where a list belongs": ({"no_rope_layers": 1}, "no_rope_layers"),
    "another rhythm of NoPE layers": ({"no_rope_layers": [0, 1, 1, 1]}, "no_rope_layers"),
    "other kinds of layers": ({"layer_types": ["sliding_attention"] * 4}, "layer_types"),
    "another list of mixture layers": ({"moe_layers": [0, 2]}, "moe_layers"),
    "text where true or false belongs": ({"use_qk_norm": "false"}, "use_qk_norm"),
    "a number where true or false belongs": ({"tie_word_embeddings": 0}, "tie_word_embeddings"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_config_that_makes_no_sense_is_refused_by_name(scout, tmp_path, case):
    changes, word = BAD_CONFIGS[case]
    checkpoint.write(tmp_path / "hf")
    spoil(tmp_path / "hf", "config.json", json.dumps(checkpoint.CONFIG | changes))
    message = refusal(CheckpointError, tmp_path / "hf", tmp_path / "out.gguf", "F32")
    assert word in message
    assert "config.json" in message
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("text", [None, "", "[]", "{", "\x00", '{"model": {}}', '{"model": {"type": "Unigram", "vocab": {}}}'])
def test_a_damaged_tokenizer_is_refused(tmp_path, text):
    checkpoint.write(tmp_path / "hf")
    spoil(tmp_path / "hf", "tokenizer.json", text)
    assert "tokenizer.json" in refusal(CheckpointError, tmp_path / "hf", tmp_path / "out.gguf", "F32")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["model"]["vocab"].update({"x" * 9: 288}),
        lambda t: t["model"]["vocab"].update({"x" * 9: -1}),
        lambda t: t["model"]["vocab"].update({"x" * 9: 7}),
        lambda t: t["model"]["vocab"].update({"x" * 9: "7"}),
        lambda t: t["model"]["merges"].append(["a"]),
        lambda t: t["model"]["merges"].append("a b c"),
        lambda t: t["model"].update(merges=None),
        lambda t: t.update(added_tokens=True),
        lambda t: t["added_tokens"].append(7),
        lambda t: t["added_tokens"].append({"id": 1}),
        lambda t: (t.pop("pre_tokenizer"), t.pop("post_processor"), t.pop("decoder")),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, change):
    checkpoint.write(tmp_path / "hf")
    tokenizer = checkpoint.tokenizer_json()
    change(tokenizer)
    spoil(tmp_path / "hf", "tokenizer.json", json.dumps(tokenizer))
    assert "tokenizer.json" in refusal(CheckpointError, tmp_path / "hf", tmp_path / "out.gguf", "F32")


def with_entries(folder, change):
    """A checkpoint whose safetensors entries went through `change`."""
    weights = checkpoint.write(folder)
    entries = checkpoint.stored(weights)
    change(entries)
    checkpoint.write_safetensors(folder / "model.safetensors", entries)


def test_an_unknown_tensor_is_refused_by_name(tmp_path):
    bias = {"model.layers.0.self_attn.q_proj.bias": ("BF16", np.zeros(4, np.uint16))}
    with_entries(tmp_path / "hf", lambda e: e.update(bias))
    assert "self_attn.q_proj.bias" in refusal(CheckpointError, tmp_path / "hf", tmp_path / "out.gguf", "F32")


def test_a_missing_tensor_is_named(tmp_path):
    name = "model.layers.3.feed_forward.experts.down_proj"
    with_entries(tmp_path / "hf", lambda e: e.pop(name))
    assert name in refusal(CheckpointError, tmp_path / "hf", tmp_path / "out.gguf", "F32")


def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path):
    with_entries(tmp_path / "hf", lambda e: e.update({"lm_head.weight": ("BF16", np.zeros((64, 288), np.uint16))}))
    message = refusal(CheckpointError, tmp_path / "hf", tmp_path / "out.gguf", "F32")
    assert "lm_head.weight" in message
    assert "[288, 64]" in message
    assert "[64, 288]" in message


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["model.layers.1.feed_forward.experts.gate_up_proj", "model.norm.weight"])
def test_weights_that_are_no_numbers_are_named_and_no_file_is_made(tmp_path, name, bad):
    def change(entries):
        entries[name][1].reshape(-1)[-1] = checkpoint.to_bf16(np.float32([bad]))[0]

    with_entries(tmp_path / "hf", change)
    message = refusal(CheckpointError, tmp_path / "hf", tmp_path / "out.gguf", "Q4_0")
    assert "blk.1.ffn_up_exps.weight" in message or "output_norm.weight" in message
    assert not (tmp_path / "out.gguf").exists()


def test_weights_too_large_for_half_precision_are_refused_not_made_infinite(tmp_path):
    with_entries(tmp_path / "hf", lambda e: e["lm_head.weight"][1].fill(checkpoint.to_bf16(np.float32([1e5]))[0]))
    assert "output.weight" in refusal(CheckpointError, tmp_path / "hf", tmp_path / "out.gguf", "F16")
    convert(tmp_path / "hf", tmp_path / "out.gguf", "Q8_0", force=True)  # the finished tensors of the other type are given up


def test_sources_that_are_none_are_refused(scout, tmp_path):
    refusal(ModelFileError, tmp_path / "nothing", tmp_path / "out.gguf", "F32")
    (tmp_path / "empty").mkdir()
    refusal(CheckpointError, tmp_path / "empty", tmp_path / "out.gguf", "F32")
    (tmp_path / "text.gguf").write_text("not a model at all, not a model at all")
    refusal(ModelFileError, tmp_path / "text.gguf", tmp_path / "out.gguf", "F32")


def test_a_gguf_of_another_architecture_is_refused_by_name(scout, tmp_path):
    gguf, _ = made(*scout)
    source = tmp_path / "other.gguf"
    source.write_bytes(gguf.path.read_bytes().replace(b"llama4", b"gemma9", 1))
    assert "gemma9" in refusal(UnsupportedModelError, source, tmp_path / "out.gguf", "F32")


def test_an_unknown_type_is_a_usage_error(scout, tmp_path):
    assert "Q4_0" in refusal(UsageError, scout[0], tmp_path / "out.gguf", "Q9_Z")


HOSTILE_HINTS = [
    '{"top_k": Infinity}',
    '{"top_k": 1' + 30 * "0" + "}",
    '{"top_k": -7}',
    '{"top_k": true}',
    '{"temperature": NaN}',
    '{"temperature": 1e400}',
    '{"temperature": 1' + 320 * "0" + "}",
    '{"temperature": 99}',
    '{"top_p": "0.9"}',
    '{"top_p": 1.5}',
]


@pytest.mark.parametrize("hint", HOSTILE_HINTS, ids=lambda hint: hint[:20])
def test_sampling_values_that_are_none_are_left_out_and_that_is_told(tmp_path, hint):
    checkpoint.write(tmp_path / "hf")
    spoil(tmp_path / "hf", "generation_config.json", hint)
    report = convert(tmp_path / "hf", tmp_path / "out.gguf", "Q8_0")
    assert not [key for key in open_gguf(tmp_path / "out.gguf").metadata if key.startswith("general.sampling")]
    assert any("generation_config.json" in notice and "left out" in notice for notice in report["notices"])


@pytest.mark.parametrize("name", ["x-7\u212a", "x-7\u0663b", "x-" + 200 * "9" + "b", "x-v\u0661"])
def test_folders_of_any_name_convert(tmp_path, name):
    checkpoint.write(tmp_path / name)
    convert(tmp_path / name, tmp_path / "out.gguf", "F32", dry_run=True)


@pytest.mark.parametrize("origin", ["a/", "/a", "a/b/c", "./a", "/", "", "a/my-b"])
def test_an_origin_names_the_model_if_it_is_organization_and_name(tmp_path, origin):
    checkpoint.write(tmp_path / "the-folder", _name_or_path=origin)
    convert(tmp_path / "the-folder", tmp_path / "out.gguf", "Q8_0")
    metadata = open_gguf(tmp_path / "out.gguf").metadata
    assert metadata["general.name"] == ("My B" if origin == "a/my-b" else "The Folder")
    assert metadata.get("general.organization") == ("A" if origin == "a/my-b" else None)


def places(tree, path=()):
    """The path to every value of a JSON tree, of long lists and tables the first three."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in [*items][: 3 if len(path) > 1 or isinstance(tree, list) else None]:
        yield from places(value, (*path, key))


ODD = [None, True, -1, 2**70, 1.5, float("nan"), "x", "\ud800", [], [[1]], {}, {"type": 7}]


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_any_value_at_any_place_converts_or_is_refused_in_one_line(tmp_path, file):
    checkpoint.write(tmp_path / "hf")
    text, outcomes = (tmp_path / "hf" / file).read_text(), set()
    for path in places(json.loads(text)):
        for odd in ODD:
            tree = node = {"root": json.loads(text)}
            for key in ("root", *path)[:-1]:
                node = node[key]
            node[("root", *path)[-1]] = odd
            spoil(tmp_path / "hf", file, json.dumps(tree["root"]))
            try:
                convert(tmp_path / "hf", tmp_path / "out.gguf", "F32", dry_run=True)
                outcomes.add("converted")
            except LlamacliError as error:
                assert "\n" not in str(error)
                outcomes.add("refused")
    assert "refused" in outcomes


# --- writing


def test_an_existing_file_is_never_replaced_without_force(scout, tmp_path):
    out = tmp_path / "out.gguf"
    out.write_text("precious")
    work = []
    assert "--force" in refusal(OutputError, scout[0], out, "F32", progress=lambda *call: work.append(call))
    assert out.read_text() == "precious"
    assert not work
    convert(scout[0], out, "F32", force=True)
    assert open_gguf(out).metadata["general.architecture"] == "llama4"


def test_what_is_no_file_is_not_replaced_even_with_force(scout, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refusal(OutputError, scout[0], tmp_path / "pipe", "F32", force=True)
    assert (tmp_path / "pipe").is_fifo()
    refusal(OutputError, scout[0], "/dev/null", "F32", force=True)
    (tmp_path / "folder").mkdir()
    refusal(OutputError, scout[0], tmp_path / "folder", "F32", force=True)
    (tmp_path / "circle").symlink_to("circle")
    refusal(OutputError, scout[0], tmp_path / "circle", "F32", force=True)


@pytest.mark.parametrize("split", [None, 60_000])
def test_a_link_is_written_through(scout, tmp_path, split):
    (tmp_path / "disk").mkdir()
    names = [Path(name).name for name in convert(scout[0], tmp_path / "out.gguf", "Q8_0", split_max_size=split)["files"]]
    for name in names:
        (tmp_path / name).replace(tmp_path / "disk" / name)
        (tmp_path / name).symlink_to(f"disk/{name}")
    before = {name: (tmp_path / name).read_bytes() for name in names}
    assert "--force" in refusal(OutputError, scout[0], tmp_path / "out.gguf", "Q8_0", split_max_size=split)
    for name in names:
        (tmp_path / "disk" / name).write_text("old")
    (tmp_path / "disk" / names[0]).unlink()
    convert(scout[0], tmp_path / "out.gguf", "Q8_0", force=True, split_max_size=split)
    assert all((tmp_path / name).is_symlink() for name in names)
    assert {name: (tmp_path / "disk" / name).read_bytes() for name in names} == before


def test_places_that_cannot_be_written_are_refused(scout, tmp_path):
    refusal(OutputError, scout[0], tmp_path, "F32")
    refusal(OutputError, scout[0], tmp_path / "no" / "such" / "out.gguf", "F32")


def test_too_little_room_is_found_before_anything_is_written(scout, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "1000" in refusal(OutputError, scout[0], tmp_path / "out.gguf", "F32")
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_never_says_how_much_room_it_has_is_written_to(scout, tmp_path, monkeypatch):
    """Some FUSE file systems always report none."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    assert convert(scout[0], tmp_path / "out.gguf", "F32")["written"]


@pytest.mark.parametrize(("room", "kept"), [(20_000, False), (600_000, True)])
def test_a_disk_that_fills_up_costs_no_finished_tensor(scout, tmp_path, room, kept):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        message = refusal(OutputError, scout[0], tmp_path / "out.gguf", "F32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ("the same command continues" in message) is kept
    assert ("nothing was kept" in message) is not kept
    assert bool(list(tmp_path.iterdir())) is kept
    assert (convert(scout[0], tmp_path / "out.gguf", "F32")["resumed_bytes"] > 0) is kept


def test_a_tensor_that_cannot_be_converted_costs_no_finished_one_and_mending_its_shard_goes_on(tmp_path):
    checkpoint.write(tmp_path / "hf", shards=2)
    shard, good = tmp_path / "hf" / "model-00002-of-00002.safetensors", None
    good = shard.read_bytes()
    shard.write_bytes(good[:-2] + b"\xc0\x7f")  # the last weight is NaN
    message = refusal(CheckpointError, tmp_path / "hf", tmp_path / "out.gguf", "Q8_0")
    assert "NaN" in message and "tensors are kept in out.gguf.part" in message
    shard.write_bytes(good)
    assert convert(tmp_path / "hf", tmp_path / "out.gguf", "Q8_0")["resumed_bytes"] > 0
    convert(tmp_path / "hf", tmp_path / "fresh.gguf", "Q8_0")
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "fresh.gguf").read_bytes()


CUT = """
import os, sys
from quantize.convert import convert
def cut(done, total, name):
    if done > total // 2:
        os.truncate(sys.argv[3], os.path.getsize(sys.argv[3]) // 2)
convert(sys.argv[1], sys.argv[2], "Q8_0", threads=1, progress=cut)
"""


@pytest.mark.parametrize("kind", ["folder", "gguf", "same type"])
def test_a_source_cut_while_it_is_read_is_an_error_and_not_the_end_of_the_process(scout, tmp_path, kind):
    source = cut = tmp_path / "hf"
    if kind == "folder":
        checkpoint.write(source)
        cut = source / "model.safetensors"
    else:
        source = cut = tmp_path / "source.gguf"
        convert(scout[0], source, "F16" if kind == "gguf" else "Q8_0")
    child = subprocess.run([sys.executable, "-c", CUT, source, tmp_path / "out.gguf", cut], capture_output=True, text=True)
    assert child.returncode == 1, child.stderr
    error = child.stderr.splitlines()[-1]
    assert f"{cut}: expected to read all of" in error and "tensors are kept" in error
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_whatever_stops_it_an_older_file_stays_and_the_same_command_continues(scout, tmp_path, error):
    out = tmp_path / "out.gguf"
    out.write_text("precious")

    def stop(done, total, name):
        if done > total // 2:
            assert (tmp_path / "out.gguf.part").exists()
            raise error

    with pytest.raises(error):
        convert(scout[0], out, "F32", force=True, progress=stop)
    assert out.read_text() == "precious"
    assert convert(scout[0], out, "F32", force=True)["resumed_bytes"] > 0
