"""Sources: FP8 in its three layouts, other types of GGUF and the tokenizer of Meta's own checkpoints."""

import base64

import checkpoint
import numpy as np
import pytest

from llamacli.errors import CheckpointError
from llamacli.files.gguf import open_gguf
from quantize.convert import convert


def fp8_values():
    """All 256 values of E4M3, by its definition."""
    bits = np.arange(256)
    sign, exponent, fraction = np.where(bits & 128, -1.0, 1.0), (bits >> 3) & 15, bits & 7
    values = sign * np.where(exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7.0))
    values[[127, 255]] = np.nan
    return values.astype(np.float32)


def fp8(rng, shape):
    """Random finite bits."""
    bits = rng.integers(0, 255, shape, np.uint8)
    bits[bits == 127] = 3
    return bits


def with_fp8(folder, layout, change=lambda entries: None, prefix=""):
    """A checkpoint with experts (and one attention matrix) in FP8; the values that the GGUF must hold, by its names."""
    weights, rng, values = checkpoint.write(folder), np.random.default_rng(1), fp8_values()
    entries, wanted = checkpoint.stored(weights), {}
    for layer in range(4):
        head = f"model.layers.{layer}.feed_forward.experts."
        for fused, parts in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
            n_experts, n_in, n_out = entries.pop(head + fused)[1].shape
            n_out //= len(parts)
            bits = fp8(rng, (n_experts, len(parts), n_out, n_in))
            scale = checkpoint.to_bf16(rng.random((n_experts, len(parts), n_out)) + 0.5)
            if layout == "a scale":
                scale[...] = scale[0, 0, 0]
            for p, part in enumerate(parts):
                whole = values[bits[:, p]] * checkpoint.from_bf16(scale[:, p, :, None])
                wanted[f"blk.{layer}.ffn_{part}_exps.weight"] = whole
                for e in range(n_experts if layout == "one by one" else 0):
                    entries[f"{head}{e}.{part}_proj.weight"] = ("F8_E4M3", bits[e, p])
                    entries[f"{head}{e}.{part}_proj.weight_scale"] = ("BF16", scale[e, p, :, None])
            if layout != "one by one":
                stack = np.ascontiguousarray(bits.reshape(n_experts, -1, n_in).transpose(0, 2, 1))
                scales = scale.reshape(-1)[0].reshape(()) if layout == "a scale" else scale.reshape(n_experts, 1, -1)
                entries |= {head + fused: ("F8_E4M3", stack), head + fused + "_weight_scale": ("BF16", np.array(scales))}
                entries[head + fused + "_input_scale"] = ("F32", np.float32([1]))
    q = "model.layers.0.self_attn.q_proj.weight"
    bits = fp8(rng, entries[q][1].shape)
    entries |= {q: ("F8_E4M3", bits), q + "_scale": ("F32", np.float32([0.25]))}
    wanted["blk.0.attn_q.weight"] = values[bits] * np.float32(0.25)
    change(entries)
    checkpoint.write_safetensors(folder / "model.safetensors", {prefix + name: entry for name, entry in entries.items()})
    return wanted


@pytest.mark.parametrize("prefix", ["", "language_model."])
@pytest.mark.parametrize("layout", ["one by one", "a scale", "a scale for each column"])
def test_fp8_is_weights_times_scales(tmp_path, layout, prefix):
    wanted = with_fp8(tmp_path / "hf", layout, prefix=prefix)
    convert(tmp_path / "hf", tmp_path / "out.gguf", "F32")
    tensors = open_gguf(tmp_path / "out.gguf").tensors
    for name, x in wanted.items():
        assert tensors[name].shape == x.shape
        np.testing.assert_array_equal(tensors[name].data.view(np.float32), x.reshape(-1), err_msg=name)


EXPERT = "model.layers.1.feed_forward.experts.2.up_proj.weight"
DAMAGE = {
    "a missing expert": (lambda e: e.pop(EXPERT), EXPERT),
    "a missing scale": (lambda e: e.pop(EXPERT + "_scale"), EXPERT + "_scale"),
    "an expert too many": (lambda e: e.update({EXPERT.replace(".2.", ".999999999."): e[EXPERT]}), "999999999"),
    "scales by block": (lambda e: e.update({EXPERT + "_scale": ("F32", np.ones((2, 2), np.float32))}), EXPERT + "_scale"),
    "a wrong shape": (lambda e: e.update({EXPERT: ("F8_E4M3", np.zeros((2, 2), np.uint8))}), EXPERT),
    "NVFP4": (lambda e: e.update({EXPERT: ("U8", np.zeros((2, 2), np.uint8))}), "NVFP4"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_fp8_is_refused_by_name(tmp_path, case):
    change, word = DAMAGE[case]
    with_fp8(tmp_path / "hf", "one by one", change)
    with pytest.raises(CheckpointError, match=word) as caught:
        convert(tmp_path / "hf", tmp_path / "out.gguf", "F32")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [0x7F, 0xFF])
def test_fp8_that_is_no_number_is_found(tmp_path, bad):
    with_fp8(tmp_path / "hf", "one by one", lambda e: e[EXPERT][1].__setitem__((1, 1), bad))
    with pytest.raises(CheckpointError, match="ffn_up_exps"):
        convert(tmp_path / "hf", tmp_path / "out.gguf", "F32")


def test_a_tiktoken_file_gives_the_same_vocabulary_as_tokenizer_json(tmp_path):
    """Merges are all pairs of tokens that make a token, so they include the merges of the training."""
    checkpoint.write(tmp_path / "hf", vocab_size=400)
    convert(tmp_path / "hf", tmp_path / "json.gguf", "F32")
    tokens = open_gguf(tmp_path / "json.gguf").metadata["tokenizer.ggml.tokens"][:265]
    values = {letter: byte for letter, byte in zip(checkpoint.byte_alphabet(), BYTES, strict=True)}
    lines = [base64.b64encode(bytes(values[c] for c in token)) + b" %d\n" % i for i, token in enumerate(tokens)]
    (tmp_path / "hf" / "tokenizer.model").write_bytes(b"".join(lines))
    (tmp_path / "hf" / "tokenizer.json").unlink()
    convert(tmp_path / "hf", tmp_path / "ranks.gguf", "F32")
    json, ranks = (dict(open_gguf(tmp_path / f"{name}.gguf").metadata) for name in ("json", "ranks"))
    assert ranks["tokenizer.ggml.tokens"][:265] == json["tokenizer.ggml.tokens"][:265]
    assert set(ranks["tokenizer.ggml.merges"]) >= set(json["tokenizer.ggml.merges"])
    specials = ["begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix", "header_start", "header_end", "eom"]
    assert ranks["tokenizer.ggml.tokens"][265:273] == [f"<|{name}|>" for name in specials]
    assert ranks["tokenizer.ggml.token_type"].tolist() == [1] * 265 + [3] * 135
    assert ranks["tokenizer.ggml.bos_token_id"] == 265


@pytest.mark.parametrize("raw", [b"\xff\xfe", b"YQ== 0\nYQ== 1\n", b"".join(b"YQ%d= %d\n" % (i, i) for i in range(9)), b""])
def test_errors_of_a_tiktoken_file_name_that_file(tmp_path, raw):
    checkpoint.write(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").unlink()
    many = b"".join(base64.b64encode(b"%d" % i) + b" %d\n" % i for i in range(3000))  # more than the vocabulary holds
    for text in (raw, many):
        (tmp_path / "hf" / "tokenizer.model").write_bytes(text)
        with pytest.raises(CheckpointError, match=r"tokenizer\.model: ") as caught:
            convert(tmp_path / "hf", tmp_path / "out.gguf", "F32")
        assert "\n" not in str(caught.value)


BYTES = [*range(33, 127), *range(161, 173), *range(174, 256), *range(33), *range(127, 161), 173]


def test_from_gguf_to_gguf_numbers_keep_their_types(tmp_path):
    checkpoint.write(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "a.gguf", "F32")
    raw = (tmp_path / "a.gguf").read_bytes()
    at = raw.index(b"llama4.rope.freq_base") + len(b"llama4.rope.freq_base")
    (tmp_path / "b.gguf").write_bytes(raw[:at] + b"\x05\0\0\0" + raw[at + 4 :])  # as int32
    convert(tmp_path / "b.gguf", tmp_path / "c.gguf", "F32")
    assert b"llama4.rope.freq_base\x05\0\0\0" in (tmp_path / "c.gguf").read_bytes()


def test_the_model_card_says_name_licence_and_origin(tmp_path):
    checkpoint.write(tmp_path / "Llama-4-Tiny-Instruct")
    card = "---\nlanguage:\n- ar\n- no\nbase_model:\n- meta-llama/Llama-4-Tiny\n"
    card += "extra: >-\n    **text**\n    name: x\ntags: [a, b]\n"
    (tmp_path / "Llama-4-Tiny-Instruct" / "README.md").write_text(card + "license: other\nlicense_name: llama4\n---\n# x\n")
    convert(tmp_path / "Llama-4-Tiny-Instruct", tmp_path / "out.gguf", "F32")
    m = open_gguf(tmp_path / "out.gguf").metadata
    assert (m["general.name"], m["general.basename"], m["general.finetune"]) == (
        "Llama 4 Tiny Instruct",
        "Llama-4-Tiny",
        "Instruct",
    )
    assert (m["general.license"], m["general.license.name"]) == ("other", "llama4")
    assert m["general.attribution"].startswith("Built with Llama")
    assert (m["general.languages"], m["general.tags"]) == (["ar", "no"], ["a", "b"])
    assert m["general.base_model.0.repo_url"] == "https://huggingface.co/meta-llama/Llama-4-Tiny"
