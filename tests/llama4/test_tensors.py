"""The table of tensors: it is what the small model, its checkpoint and the tests' own files hold, and every change is found."""

import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import tiny
from recipe_cases import CASES
from recipe_cases import shapes as case_shapes

from llamacli.cpu.weights import bind
from llamacli.errors import ModelFileError, UnsupportedModelError
from llamacli.files.gguf import open_gguf
from llamacli.llama4.config import Config
from llamacli.llama4.tensors import TABLE, Role, check, find, kinds, role_of, tensors
from quantize.hf_config import read_config
from quantize.safetensors import open_checkpoint

SMALL = Path(__file__).parents[2] / "models" / "scout-tiny"


def shapes(gguf):
    return {name: tensor.shape for name, tensor in gguf.tensors.items()}


def required(config):
    return {spec.name: spec.shape for spec in tensors(config) if spec.required}


def test_the_small_models_gguf_is_the_table():
    gguf = open_gguf(SMALL / "scout-tiny.gguf")
    config = Config.from_gguf(gguf)
    found = check(gguf.path, shapes(gguf), tensors(config), complete=True)
    assert {spec.name for spec in found} == set(gguf.tensors)
    assert [spec.name for spec in found] == list(gguf.tensors)
    assert sum(prod(spec.shape) for spec in found) == sum(prod(shape) for shape in shapes(gguf).values())


def test_the_small_models_checkpoint_is_the_table():
    stored = open_checkpoint(SMALL / "hf")
    wanted = {spec.hf: spec.hf_shape for spec in tensors(read_config(SMALL / "hf").model) if spec.hf}
    assert wanted == {name: tuple(tensor.shape) for name, tensor in stored.items()}


@pytest.mark.parametrize(
    "shape", [tiny.SCOUT, tiny.MAVERICK, {"moe_step": 3, "rope_freqs": False}], ids=["scout", "maverick", "3"]
)
def test_files_written_without_the_table_hold_what_it_says(tmp_path, shape):
    gguf = open_gguf(tiny.tiny_gguf(tmp_path / "model.gguf", **shape))
    freqs = {"rope_freqs.weight": (8,)} if "rope_freqs.weight" in gguf.tensors else {}
    assert required(Config.from_gguf(gguf)) | freqs == shapes(gguf)


@pytest.mark.parametrize("case", CASES)
def test_shapes_and_order_of_the_published_models_and_of_odd_ones(case):
    c = CASES[case]
    config = Config(
        *(c["layers"], c["hidden"], c["heads"], c["kv_heads"], c["head"], c["dense"], c["expert"], c["experts"]),
        *(min(1, c["experts"]), c["step"], c["vocab"], 8192, 5e5, 1e-5, 8192, 4, 8192.0, 0.1, True, c["tied"]),
    )
    assert list(required(config).items()) == list(case_shapes(c).items())


def mutations():
    def drop(name):
        return name, lambda found: found.pop(name)

    def reshape(name, shape):
        return name, lambda found: found.update({name: shape})

    yield "a norm is missing", *drop("blk.3.attn_norm.weight")
    yield "an expert stack is missing", *drop("blk.2.ffn_down_exps.weight")
    yield "the last norm is missing", *drop("output_norm.weight")
    yield "one expert too few", *reshape("blk.1.ffn_up_exps.weight", (3, 48, 64))
    yield "transposed", *reshape("blk.0.ffn_down_shexp.weight", (48, 64))
    yield "an optional one of another shape", *reshape("rope_freqs.weight", (16,))
    yield "a layer too many", *reshape("blk.4.attn_q.weight", (64, 64))
    yield "a dense tensor in a mixture", *reshape("blk.0.ffn_gate.weight", (96, 64))
    yield "an unknown name", *reshape("blk.0.attn_sinks.weight", (4,))
    yield "a name that is not canonical", *reshape("blk.00.attn_q.weight", (64, 64))


@pytest.mark.parametrize(("name", "change"), [case[1:] for case in mutations()], ids=[case[0] for case in mutations()])
def test_every_change_of_a_file_is_found_and_named(tmp_path, name, change):
    gguf = open_gguf(tiny.tiny_gguf(tmp_path / "model.gguf"))
    found, specs = shapes(gguf), list(tensors(Config.from_gguf(gguf)))
    check("model.gguf", found, specs, complete=True)
    change(found)
    with pytest.raises(ModelFileError, match=name.replace(".", r"\.")):
        check("model.gguf", found, specs, complete=True)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_every_row_is_found_by_its_name(row):
    layered = row.name not in required(SOME) and not row.name.startswith(("rope", "output"))
    name = f"blk.17.{row.name}" if layered else row.name
    assert find(name) == (row, 17 if layered else None)
    assert role_of(name) is row.role
    assert find(name + "s") is None
    assert row.kind in kinds(row.role)


SOME = Config(4, 64, 4, 2, 16, 96, 48, 4, 1, 2, 288, 8192, 5e5, 1e-5, 8192, 4, 8192.0, 0.1, True)


def test_names_outside_of_the_table_have_no_role_and_vision_has_its_own():
    assert role_of("blk.0.attn_sinks.weight") is None
    assert role_of("blk.007.attn_q.weight") is None
    assert role_of("blk.0.output.weight") is None
    assert role_of("") is None
    assert role_of("v.blk.0.attn_q.weight") is role_of("mm.model.fc.weight") is Role.VISION


def test_stored_shapes_are_those_of_x_at_w():
    found = {spec.name: spec for spec in tensors(SOME)}
    gate, up, down = (found[f"blk.1.ffn_{part}_exps.weight"] for part in ("gate", "up", "down"))
    assert gate.hf == up.hf == "model.layers.1.feed_forward.experts.gate_up_proj"
    assert gate.hf_shape == up.hf_shape == (4, 64, 96)
    assert down.hf_shape == (4, 48, 64)
    assert "blk.0.ffn_gate_exps.weight" not in found
    assert "blk.0.ffn_gate.weight" in found


# --- binding


def test_some_layers_are_bound_with_the_addresses_that_storage_gives(tmp_path):
    gguf = open_gguf(tiny.tiny_gguf(tmp_path / "model.gguf"))
    config, asked = Config.from_gguf(gguf), []

    def address(tensor):
        asked.append(tensor.name)
        return 4096 * len(asked)

    weights = bind(gguf, config, address, range(1, 3), embedding=False, head=False)
    assert (weights.token_embd, weights.output_norm, weights.output) == (None, None, None)
    matrices = [
        m for layer in weights.layers for part in (layer[1:5], layer.ffn[:1], layer.ffn.exps, layer.ffn.shexp) for m in part
    ]
    assert len(weights.layers) == 2
    assert {m.name: m.address for m in matrices} == {name: 4096 * (i + 1) for i, name in enumerate(asked)}
    assert {name.split(".")[1] for name in asked} == {"1", "2"}
    whole = bind(gguf, config)
    assert [m.name for m in (whole.token_embd, whole.output)] == ["token_embd.weight", "output.weight"]
    assert [layer.attn_q.name for layer in whole.layers[1:3]] == [layer.attn_q.name for layer in weights.layers]
    assert (weights.rope_freqs == whole.rope_freqs).all()


def test_a_head_without_output_is_the_embedding(tmp_path):
    gguf = open_gguf(tiny.tiny_gguf(tmp_path / "model.gguf", edit=lambda found: found.pop("output.weight")))
    config = Config.from_gguf(gguf)
    head = bind(gguf, config, layers=range(0), embedding=False)
    assert head.token_embd is None
    assert head.output.name == "token_embd.weight"
    assert head.layers == []


def test_a_broken_layer_is_found_where_it_is_bound(tmp_path):
    gguf = open_gguf(tiny.tiny_gguf(tmp_path / "model.gguf", edit=lambda found: found.pop("blk.2.attn_k.weight")))
    config = Config.from_gguf(gguf)
    bind(gguf, config, layers=range(2))
    with pytest.raises(ModelFileError, match=r"blk\.2\.attn_k\.weight \[32, 64\], found none"):
        bind(gguf, config, layers=range(2, 4))


def test_a_bias_is_refused_because_no_kernel_adds_it(tmp_path):
    """llama.cpp adds it: to pass it over would give other answers without a word."""

    def edit(found):
        found["blk.1.attn_k.bias"] = found["output_norm.weight"][:32]

    gguf = open_gguf(tiny.tiny_gguf(tmp_path / "model.gguf", edit=edit))
    with pytest.raises(UnsupportedModelError, match=r"blk\.1\.attn_k\.bias"):
        bind(gguf, Config.from_gguf(gguf))


def test_the_table_needs_no_numpy():
    program = "import sys; import llamacli.llama4.tensors; print('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
