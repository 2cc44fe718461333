"""Tiny random Hugging Face checkpoints of Llama 4, written from the formats' descriptions, for tests of the converter.

In: a folder and a Shape. Out: the weights that were written, float32 by stored name. Knows nothing of the converter.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

N_VOCAB = 288
SPECIALS = ("begin_of_text", "end_of_text", "header_start", "header_end", "eom", "eot", "finetune_right_pad")
MERGES = (("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"))
FIRST_SPECIAL = 256 + len(MERGES)
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"


class Shape(NamedTuple):
    """A model's sizes; the defaults are Scout's pattern in small, `moe_step` 2 is Maverick's."""

    n_layers: int = 4
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    dense: int = 96
    expert: int = 32
    experts: int = 4
    moe_step: int = 1
    dtype: str = "BF16"
    prefix: str = ""
    shards: int = 1


SCOUT = Shape()
MAVERICK = Shape(moe_step=2, prefix="language_model.", shards=3, dense=128, expert=64)


def config(shape: Shape) -> dict:
    """config.json of the text model."""
    return {
        "architectures": ["Llama4ForCausalLM"],
        "vocab_size": N_VOCAB,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.expert,
        "intermediate_size_mlp": shape.dense,
        "num_local_experts": shape.experts,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": shape.moe_step,
        "no_rope_layers": [int((i + 1) % 4 != 0) for i in range(shape.n_layers)],
        "attention_chunk_size": 8192,
        "use_qk_norm": True,
        "attn_temperature_tuning": True,
        "attn_scale": 0.1,
        "floor_scale": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "bos_token_id": FIRST_SPECIAL,
        "eos_token_id": [FIRST_SPECIAL + 1, FIRST_SPECIAL + 4, FIRST_SPECIAL + 5],
    }


def shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor's stored shape by its name without prefix."""
    hidden, expert = shape.hidden, shape.expert
    found = {
        "model.embed_tokens.weight": (N_VOCAB, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (N_VOCAB, hidden),
    }
    for i in range(shape.n_layers):
        layer = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (shape.heads * shape.head_dim, hidden),
            "self_attn.k_proj.weight": (shape.kv_heads * shape.head_dim, hidden),
            "self_attn.v_proj.weight": (shape.kv_heads * shape.head_dim, hidden),
            "self_attn.o_proj.weight": (hidden, shape.heads * shape.head_dim),
        }
        if (i + 1) % shape.moe_step == 0:
            layer |= {
                "feed_forward.router.weight": (shape.experts, hidden),
                "feed_forward.experts.gate_up_proj": (shape.experts, hidden, 2 * expert),
                "feed_forward.experts.down_proj": (shape.experts, expert, hidden),
                "feed_forward.shared_expert.gate_proj.weight": (expert, hidden),
                "feed_forward.shared_expert.up_proj.weight": (expert, hidden),
                "feed_forward.shared_expert.down_proj.weight": (hidden, expert),
            }
        else:
            layer |= {
                "feed_forward.gate_proj.weight": (shape.dense, hidden),
                "feed_forward.up_proj.weight": (shape.dense, hidden),
                "feed_forward.down_proj.weight": (hidden, shape.dense),
            }
        found |= {f"model.layers.{i}.{name}": s for name, s in layer.items()}
    return found


def write(folder: Path, shape: Shape = SCOUT, seed: int = 0, **settings) -> dict[str, np.ndarray]:
    """Write a whole checkpoint; `settings` go into the text model's config.json."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    weights = {name: truncated(rng.standard_normal(s, np.float32) * np.float32(0.02)) for name, s in shapes(shape).items()}
    if settings.get("tie_word_embeddings"):
        del weights["lm_head.weight"]
    text = config(shape) | settings
    stored = {shape.prefix + name: (shape.dtype, w) for name, w in weights.items()}
    if shape.prefix:
        text = {"architectures": ["Llama4ForConditionalGeneration"], "text_config": text, "vision_config": {}}
        stored["vision_model.class_embedding"] = (shape.dtype, truncated(rng.standard_normal(16, np.float32)))
        stored["multi_modal_projector.linear_1.weight"] = (shape.dtype, truncated(rng.standard_normal((4, 16), np.float32)))
    write_json(folder / "config.json", text)
    write_tensors(folder, stored, shape.shards)
    write_tokenizer(folder)
    return weights


def truncated(x: np.ndarray) -> np.ndarray:
    """The float32s whose lower half is zero: what a bfloat16 holds."""
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def write_tensors(folder: Path, stored: dict[str, tuple[str, np.ndarray]], shards: int = 1) -> None:
    """(dtype, float32 values) by name, in one file or in shards with an index."""
    names = list(stored)
    if shards == 1:
        return _write_shard(folder / "model.safetensors", stored)
    weight_map = {}
    for i in range(shards):
        file, part = f"model-{i + 1:05}-of-{shards:05}.safetensors", names[i::shards]
        _write_shard(folder / file, {name: stored[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _write_shard(path: Path, stored: dict[str, tuple[str, np.ndarray]]) -> None:
    header, data = {"__metadata__": {"format": "pt"}}, bytearray()
    for name, (dtype, values) in stored.items():
        if dtype == "BF16":
            raw = (np.ascontiguousarray(values).view(np.uint32) >> 16).astype("<u2").tobytes()
        else:
            raw = values.astype({"F16": "<f2", "F32": "<f4"}[dtype]).tobytes()
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE with five merges and seven special tokens; the ids up to N_VOCAB stay empty."""
    vocab = {text: i for i, text in enumerate([*sorted(ByteLevel.alphabet()), *(a + b for a, b in MERGES)])}
    added = [
        {"id": FIRST_SPECIAL + i, "content": f"<|{name}|>", "special": True, "normalized": False}
        for i, name in enumerate(SPECIALS)
    ]
    added.append({"id": FIRST_SPECIAL + len(SPECIALS), "content": "plain added", "special": False, "normalized": False})
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": vocab, "merges": [list(m) for m in MERGES]},
    }
    settings = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot|>", "pad_token": "<|finetune_right_pad|>"}
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", settings | {"chat_template": TEMPLATE})
    write_json(folder / "generation_config.json", {"do_sample": True, "temperature": 0.6, "top_p": 0.9})


def write_json(path: Path, value) -> None:
    """As UTF-8."""
    path.write_text(json.dumps(value, ensure_ascii=False), "utf-8")
