"""quantize: a GGUF becomes a GGUF of another type or of the same; one whose tensors are not its metadata's is refused."""

import math

import checkpoint
import numpy as np
import pytest
import tiny
from conversions import TYPES, made, refusal, with_entries
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from llamacli.errors import CheckpointError, ModelFileError
from llamacli.files.ggml import BY_NAME
from llamacli.files.gguf import open_gguf
from quantize.convert import convert
from quantize.writer import header, write_file


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


def test_a_quantized_gguf_is_read_back_with_a_notice(scout, tmp_path):
    quantized, _ = made(*scout, "Q4_0")
    report = convert(quantized.path, tmp_path / "f32.gguf", "F32")
    name = "blk.2.ffn_down_exps.weight"
    back = open_gguf(tmp_path / "f32.gguf").tensors[name]
    source = quantized.tensors[name]
    expected = dequantize(source.data.reshape(-1, source.type.row_bytes(source.shape[-1])), GGMLQuantizationType.Q4_0)
    np.testing.assert_array_equal(back.data.view(np.float32), expected.reshape(-1))
    assert any("quantized already" in notice for notice in report["notices"])


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_tensors_that_have_their_type_already_keep_their_bytes_and_are_measured(scout, tmp_path, type_name):
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
def test_a_weight_that_is_not_finite_is_named_even_in_a_tensor_that_is_copied(scout, tmp_path, type_name, name, bad):
    gguf, _ = made(*scout, type_name)
    raw = bytearray(gguf.path.read_bytes())
    at = gguf.tensors[name].offset
    raw[at : at + bad.nbytes] = bad.tobytes()
    (tmp_path / "bad.gguf").write_bytes(raw)
    assert name in refusal(CheckpointError, tmp_path / "bad.gguf", tmp_path / "copy.gguf", type_name)
    assert not (tmp_path / "copy.gguf").exists()


def test_errors_of_weights_whose_squares_overflow_float32_are_finite(tmp_path):
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
