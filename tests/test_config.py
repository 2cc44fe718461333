"""Config: Scout, Maverick and small files in llama.cpp's and in Ollama's words; nonsense is refused."""

from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import numpy as np
import pytest

from llamacli.config import Config
from llamacli.errors import ModelFileError, UnsupportedModelError

# Scout's metadata as llama.cpp's converter writes them.
SCOUT = {
    "block_count": 48,
    "context_length": 10485760,
    "embedding_length": 5120,
    "feed_forward_length": 16384,
    "expert_feed_forward_length": 8192,
    "attention.head_count": 40,
    "attention.head_count_kv": 8,
    "attention.key_length": 128,
    "attention.value_length": 128,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 500000.0,
    "rope.dimension_count": 128,
    "expert_count": 16,
    "expert_used_count": 1,
    "interleave_moe_layer_step": 1,
    "vocab_size": 202048,
}


def config(rows=202048, arch="llama4", shape=None, **changes):
    """`changes`: a_b=... for key a.b; None leaves the key out."""
    values = dict(SCOUT)
    for key, value in changes.items():
        values[key.replace("__", ".")] = value
    metadata = {f"llama4.{key}": value for key, value in values.items() if value is not None}
    if arch is not None:
        metadata["general.architecture"] = arch
    tensors = {} if rows is None else {"token_embd.weight": SimpleNamespace(shape=shape or (rows, 5120))}
    return Config.from_gguf(SimpleNamespace(path="m.gguf", metadata=metadata, tensors=tensors))


def test_scout():
    scout = config()
    assert (scout.n_layers, scout.n_embd, scout.n_heads, scout.n_kv_heads, scout.head_dim) == (48, 5120, 40, 8, 128)
    assert (scout.n_ff, scout.n_ff_exp, scout.n_experts, scout.n_experts_used) == (16384, 8192, 16, 1)
    assert (scout.n_vocab, scout.context_length, scout.rope_theta) == (202048, 10485760, 500000.0)
    assert scout.rms_eps == pytest.approx(1e-5)
    assert (scout.chunk_size, scout.no_rope_step, scout.temperature_length, scout.temperature_scale) == (8192, 4, 8192.0, 0.1)
    assert scout.use_qk_norm
    assert all(map(scout.is_moe, range(48)))
    assert [i for i in range(12) if not scout.uses_rope(i)] == [3, 7, 11]


def test_maverick():
    maverick = config(expert_count=128, interleave_moe_layer_step=2)
    assert [maverick.is_moe(i) for i in range(4)] == [False, True, False, True]
    assert not maverick.use_qk_norm


def test_ollama_s_words():
    ollama = config(attention__chunk_size=4096, use_qk_norm=True, vocab_size=None, attention__use_qk_norm=None)
    assert (ollama.chunk_size, ollama.use_qk_norm, ollama.n_vocab) == (4096, True, 202048)
    assert not config(use_qk_norm=False).use_qk_norm
    assert config(expert_count=128, use_qk_norm=True).use_qk_norm


def test_a_sliding_window_of_0_turns_chunks_nope_and_temperature_off():
    small = config(attention__sliding_window=0)
    assert (small.chunk_size, small.no_rope_step, small.temperature_length) == (0, 0, 0.0)
    assert all(map(small.uses_rope, range(48)))


def test_a_model_without_experts():
    dense = config(expert_count=None, expert_used_count=None, expert_feed_forward_length=None, interleave_moe_layer_step=None)
    assert not any(map(dense.is_moe, range(48)))


def test_the_head_size_follows_from_the_width_if_need_be():
    keys = {"attention__key_length": None, "attention__value_length": None, "rope__dimension_count": None}
    assert config(**keys).head_dim == 128


def test_nobody_changes_a_config():
    with pytest.raises(FrozenInstanceError):
        config().n_layers = 1


@pytest.mark.parametrize("arch", ["llama", "qwen3moe", None, 7])
def test_other_architectures_are_not_for_this_engine(arch):
    with pytest.raises(UnsupportedModelError, match="llama4"):
        config(arch=arch)


@pytest.mark.parametrize(
    "changes",
    [
        {"block_count": None},
        {"block_count": 0},
        {"block_count": 2**40},
        {"block_count": -1},
        {"block_count": "48"},
        {"block_count": 48.5},
        {"block_count": True},
        {"embedding_length": 0},
        {"embedding_length": 2**63},
        {"feed_forward_length": None},
        {"feed_forward_length": np.array([1, 2])},
        {"attention__head_count": 0},
        {"attention__head_count_kv": 7},
        {"attention__head_count_kv": 80},
        {"attention__key_length": 127, "attention__value_length": 127, "rope__dimension_count": 127},
        {"attention__value_length": 64},
        {"rope__dimension_count": 64},
        {"rope__freq_base": float("nan")},
        {"rope__freq_base": -1.0},
        {"attention__layer_norm_rms_epsilon": float("inf")},
        {"attention__layer_norm_rms_epsilon": 0.0},
        {"expert_count": 2**31},
        {"expert_used_count": 17},
        {"expert_used_count": 0},
        {"interleave_moe_layer_step": -1},
        {"attention__sliding_window": -1},
        {"attention__chunk_size": 2**60},
        {"attention__temperature_length": float("nan")},
        {"context_length": 0},
        {"vocab_size": 7},
        {"use_qk_norm": "yes"},
        {"rows": None},
        {"shape": (202048,)},
    ],
    ids=str,
)
def test_numbers_that_make_no_sense_are_refused_in_one_line(changes):
    with pytest.raises(ModelFileError) as caught:
        config(**changes)
    assert str(caught.value).startswith("m.gguf: expected")
    assert "\n" not in str(caught.value)
