"""quantize: a GGUF's metadata are those of its checkpoint: sizes, name, rotation, tokenizer, templates, sampling."""

import checkpoint
import numpy as np
import pytest
from conversions import changed, made, spoil

from llamacli.files.gguf import open_gguf
from llamacli.llama4.config import Config
from llamacli.text.tokenizer import Tokenizer
from quantize.convert import convert
from quantize.hf_config import rope_divisors


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


def test_llama_3s_rope_divisors_change_smoothly():
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


def test_what_a_gguf_cannot_express_of_a_tokenizer_is_reported(tmp_path):
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


def test_a_template_file_with_a_byte_order_mark_and_ends_of_lines_of_other_systems(tmp_path):
    weights = checkpoint.write(tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_bytes(b"\xef\xbb\xbffrom\r\nthe\rfile\n")
    assert made(tmp_path / "hf", weights)[0].metadata["tokenizer.chat_template"] == "from\nthe\nfile\n"


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
def test_unusable_sampling_values_are_left_out_with_a_notice(tmp_path, hint):
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
