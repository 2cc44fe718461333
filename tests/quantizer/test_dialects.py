"""quantize: checkpoints as others save them."""

import os
from pathlib import Path

import checkpoint
import numpy as np
import pytest
from conversions import changed, made, refusal

import llamacli
from llamacli.errors import CheckpointError, ModelFileError
from llamacli.files.gguf import open_gguf
from llamacli.llama4.config import Config
from quantize.convert import convert


@pytest.mark.parametrize("kind", ["no experts", "period 0", "no mixture layers"])
def test_a_dense_model_converts(tmp_path, kind):
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


def test_an_activation_that_the_engine_lacks_is_refused(tmp_path):
    checkpoint.write(tmp_path / "hf", hidden_act="gelu")
    assert "hidden_act" in refusal(CheckpointError, tmp_path / "hf", tmp_path / "out.gguf", "F32")


def test_two_ids_for_one_token_are_refused(tmp_path):
    checkpoint.write(tmp_path / "hf")
    changed(tmp_path / "hf", "tokenizer.json", lambda t: t["added_tokens"][-1].update(content="hello"))
    assert "found 259 and 271 for 'hello'" in refusal(CheckpointError, tmp_path / "hf", tmp_path / "out.gguf", "F32")


def test_a_token_named_like_a_filler_gives_no_token_twice(tmp_path):
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


def test_names_under_model_language_model_are_read(tmp_path):
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


def test_a_source_whose_name_is_not_utf8_converts(scout, tmp_path):
    source = Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.gguf"))
    convert(scout[0], source, "F16")
    convert(source, tmp_path / "out.gguf", "Q8_0")
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/f\xff"))
    checkpoint.write(folder)
    convert(folder, tmp_path / "from_folder.gguf", "Q8_0")
    assert open_gguf(tmp_path / "from_folder.gguf").metadata["general.name"].endswith("\ufffd")
