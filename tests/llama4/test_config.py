"""Config: what the file says, in both dialects; else Meta's numbers; absurd numbers are refused."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from llamacli.errors import ModelFileError, UnsupportedModelError
from llamacli.llama4.config import Config

SCOUT = {
    "block_count": 48,
    "context_length": 10_485_760,
    "embedding_length": 5120,
    "feed_forward_length": 16384,
    "expert_feed_forward_length": 8192,
    "attention.head_count": 40,
    "attention.head_count_kv": 8,
    "attention.key_length": 128,
    "attention.value_length": 128,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.dimension_count": 128,
    "rope.freq_base": 500_000.0,
    "expert_count": 16,
    "expert_used_count": 1,
    "interleave_moe_layer_step": 1,
    "vocab_size": 202_048,
}
MAVERICK = SCOUT | {"expert_count": 128, "interleave_moe_layer_step": 2, "context_length": 1_048_576}
ABSENT = object()


def read(base=SCOUT, arch="llama4", rows=202_048, **changes):
    """`changes` with _ for - and __ for . in keys."""
    values = base | {key.replace("__", "."): value for key, value in changes.items()}
    metadata = {f"llama4.{key}": value for key, value in values.items() if value is not ABSENT}
    if arch is not None:
        metadata["general.architecture"] = arch
    tensors = {"token_embd.weight": SimpleNamespace(shape=(rows, 5120))} if rows else {}
    return Config.from_gguf(SimpleNamespace(path="model.gguf", metadata=metadata, tensors=tensors))


def test_scouts_metadata_give_scouts_sizes():
    config = read()
    assert (config.n_layers, config.n_embd, config.n_heads, config.n_kv_heads, config.head_dim) == (48, 5120, 40, 8, 128)
    assert (config.n_ff, config.n_ff_exp, config.n_experts, config.n_experts_used) == (16384, 8192, 16, 1)
    assert (config.n_vocab, config.context_length) == (202_048, 10_485_760)
    assert (config.rope_theta, config.rms_eps) == (500_000.0, 1e-5)
    assert (config.chunk_size, config.no_rope_step, config.use_qk_norm) == (8192, 4, True)
    assert (config.temperature_length, config.temperature_scale) == (8192.0, 0.1)
    assert all(map(config.is_moe, range(48)))


def test_maverick_has_no_qk_norm_and_experts_in_every_second_layer():
    config = read(MAVERICK)
    assert not config.use_qk_norm
    assert [config.is_moe(i) for i in range(4)] == [False, True, False, True]


def test_every_fourth_layer_does_not_rotate():
    assert [i for i in range(48) if not read().uses_rope(i)] == list(range(3, 48, 4))


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        read().n_layers = 3


@pytest.mark.parametrize("key", ["attention__sliding_window", "attention__chunk_size"])
def test_the_chunk_size_is_read_in_both_dialects(key):
    assert read(**{key: 64}).chunk_size == 64
    assert read(**{key: 64}).no_rope_step == 4


def test_chunk_size_0_turns_chunks_nope_and_temperature_off():
    config = read(attention__sliding_window=0)
    assert config.chunk_size == 0
    assert all(map(config.uses_rope, range(48)))
    assert config.temperature_length == 0


@pytest.mark.parametrize("prefix", ["attention__", ""])
def test_the_temperature_is_read_from_the_file(prefix):
    config = read(**{f"{prefix}temperature_length": 16, f"{prefix}temperature_scale": 0.25})
    assert (config.temperature_length, config.temperature_scale) == (16.0, 0.25)


@pytest.mark.parametrize("value", [True, False, 1, 0])
def test_the_switch_of_the_qk_norm_is_read_from_the_file(value):
    assert read(use_qk_norm=value).use_qk_norm is bool(value)
    assert read(MAVERICK, use_qk_norm=value).use_qk_norm is bool(value)


def test_absent_optional_keys_get_their_defaults():
    config = read(
        attention__key_length=ABSENT,
        attention__value_length=ABSENT,
        rope__dimension_count=ABSENT,
        rope__freq_base=ABSENT,
        vocab_size=ABSENT,
        rows=1234,
    )
    assert (config.head_dim, config.rope_theta, config.n_vocab) == (128, 500_000.0, 1234)


def test_a_model_may_have_no_experts():
    config = read(
        expert_count=ABSENT, expert_used_count=ABSENT, expert_feed_forward_length=ABSENT, interleave_moe_layer_step=ABSENT
    )
    assert config.n_experts == 0
    assert not any(map(config.is_moe, range(48)))
    assert not any(map(read(interleave_moe_layer_step=0).is_moe, range(48)))


def test_a_list_of_equal_numbers_is_one_number():
    assert read(expert_feed_forward_length=np.full(48, 8192, np.uint32)).n_ff_exp == 8192
    with pytest.raises(ModelFileError):
        read(expert_feed_forward_length=np.arange(48, dtype=np.uint32))


@pytest.mark.parametrize("arch", ["llama", "clip", "", 7, None])
def test_another_architecture_is_refused(arch):
    with pytest.raises(UnsupportedModelError, match="expected architecture llama4, found"):
        read(arch=arch)


@pytest.mark.parametrize(
    "key",
    [
        "block_count",
        "embedding_length",
        "feed_forward_length",
        "attention__head_count",
        "attention__layer_norm_rms_epsilon",
        "expert_feed_forward_length",
        "interleave_moe_layer_step",
    ],
)
def test_a_missing_required_key_is_named(key):
    with pytest.raises(ModelFileError, match=rf"llama4.{key.replace('__', '.')} to be there"):
        read(**{key: ABSENT})


NONSENSE = [-1, 2**40, 2**63, 0.5, float("nan"), "8", True, np.arange(3), np.empty(0, np.int32), ["8"]]
WHOLE = [key for key in SCOUT if key not in ("rope.freq_base", "attention.layer_norm_rms_epsilon", "context_length")]


@pytest.mark.parametrize("key", [*WHOLE, "attention.sliding_window", "attention.chunk_size"])
@pytest.mark.parametrize("value", NONSENSE, ids=repr)
def test_absurd_counts_are_refused(key, value):
    with pytest.raises(ModelFileError) as caught:
        read(SCOUT | {key: value})
    assert f"llama4.{key}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key, values",
    [
        ("block_count", [0, 1025]),
        ("attention.head_count", [0, 7]),
        ("attention.head_count_kv", [0, 7, 41]),
        ("attention.key_length", [0, 127, 2048]),
        ("attention.value_length", [64]),
        ("rope.dimension_count", [64]),
        ("expert_used_count", [0, 17]),
        ("expert_count", [4097]),
        ("embedding_length", [0]),
        ("vocab_size", [202_047]),
        ("rope.freq_base", [0.0, -1.0, float("nan"), float("inf"), "1"]),
        ("attention.layer_norm_rms_epsilon", [0.0, -1e-5, float("nan"), 1.0]),
        ("attention.temperature_length", [-1.0, 0.5, float("nan"), float("inf")]),
        ("attention.temperature_scale", [-1.0, float("nan")]),
        ("use_qk_norm", [2, 0.5, "true"]),
        ("context_length", [0, -1, "many"]),
    ],
)
def test_numbers_that_do_not_fit_together_are_refused(key, values):
    for value in values:
        with pytest.raises(ModelFileError, match=r"model\.gguf: expected llama4"):
            read(SCOUT | {key: value})


@pytest.mark.parametrize("rows", [0, 5])
def test_the_embedding_must_be_there_and_as_high_as_the_vocabulary(rows):
    with pytest.raises(ModelFileError):
        read(rows=rows)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention__chunk_size": 64, "attention__temperature_length": 4.0, "attention__temperature_scale": 0.5},
        {"attention__temperature_length": 0.0},
        {"attention__sliding_window": 0},
        {"use_qk_norm": False, "interleave_moe_layer_step": 2},
    ],
)
def test_a_config_read_from_its_own_metadata_is_equal(changes):
    config = read(**changes)
    metadata = config.metadata | {"general.architecture": "llama4"}
    tensors = {"token_embd.weight": SimpleNamespace(shape=(202_048, 5120))}
    assert Config.from_gguf(SimpleNamespace(path="model.gguf", metadata=metadata, tensors=tensors)) == config
    meta = {"llama4.attention.chunk_size", "llama4.attention.temperature_length", "llama4.attention.temperature_scale"}
    assert bool(meta & metadata.keys()) is any("temperature" in key or "chunk" in key for key in changes)
