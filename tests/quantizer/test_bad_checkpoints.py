"""quantize: a checkpoint that makes no sense is refused in one line that names the place."""

import json
import os
import signal

import checkpoint
import numpy as np
import pytest
from conversions import made, refusal, spoil, with_entries

from llamacli.errors import (
    CheckpointError,
    LlamacliError,
    ModelFileError,
    OutputError,
    UnsupportedModelError,
    UsageError,
)
from quantize.convert import convert

BAD_CONFIGS = {
    "another architecture": ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
    "no architecture": ({"architectures": None}, "architecture"),
    "text where a count belongs": ({"hidden_size": "64"}, "hidden_size"),
    "a negative count": ({"num_hidden_layers": -1}, "num_hidden_layers"),
    "an absurd count": ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "num_key_value_heads"),
    "a theta that is no number": ({"rope_theta": float("nan")}, "rope_theta"),
    "a number beyond every float": ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
    "a factor that float32 rounds to 0": (
        {"rope_scaling": checkpoint.CONFIG["rope_scaling"] | {"factor": 1e-300, "high_freq_factor": 4.0}},
        "rope_scaling",
    ),
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


SMALL_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("chat_template.jinja", "chat_template.json", "model.safetensors.index.json", "preprocessor_config.json"),
)


@pytest.fixture(scope="module")
def no_hang():
    """A conversion that still reads after a minute fails the test."""

    def end(*_):
        raise AssertionError("still reading after a minute")

    before = signal.signal(signal.SIGALRM, end)
    yield lambda: signal.alarm(60)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", ["endless", "pipe", "folder", "huge"])
@pytest.mark.parametrize("name", SMALL_FILES)
def test_what_is_no_small_file_is_refused_and_neither_waited_for_nor_read_whole(tmp_path, no_hang, name, kind):
    folder = tmp_path / "hf"
    checkpoint.write(folder, vision_config={} if name == "preprocessor_config.json" else None)
    if name == "model.safetensors.index.json":
        (folder / "model.safetensors").unlink()
    if name == "tokenizer.model":
        (folder / "tokenizer.json").unlink()
    file = folder / name
    file.unlink(missing_ok=True)
    match kind:
        case "endless":
            file.symlink_to("/dev/zero")
        case "pipe":
            os.mkfifo(file)
        case "folder":
            file.mkdir()
        case "huge":
            file.touch()
            os.truncate(file, 1 << 40)
    no_hang()
    if name == "preprocessor_config.json":  # without a tower it is not read
        convert(folder, tmp_path / "out.gguf", "F32", dry_run=True)
    else:
        assert name in refusal(CheckpointError, folder, tmp_path / "out.gguf", "F32", dry_run=True)


def test_a_readme_that_is_a_pipe_is_not_waited_for(tmp_path, no_hang):
    checkpoint.write(tmp_path / "hf")
    os.mkfifo(tmp_path / "hf" / "README.md")
    no_hang()
    assert convert(tmp_path / "hf", tmp_path / "out.gguf", "F32", dry_run=True)["notices"]


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


def test_text_that_no_file_can_hold_is_refused_with_its_field(tmp_path):
    checkpoint.write(tmp_path / "hf")
    spoil(tmp_path / "hf", "tokenizer_config.json", json.dumps({"chat_template": "{{ messages }}\ud800"}))
    assert "tokenizer.chat_template" in refusal(OutputError, tmp_path / "hf", tmp_path / "out.gguf", "F32")
