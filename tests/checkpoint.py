"""Writes tiny random Hugging Face checkpoints of Llama 4 byte by byte, without the code under test.

In: a folder, changes to the config. Out: the files in the folder, and the weights as float32 by their stored names.
"""

import json

import numpy as np

PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = ("begin_of_text", "end_of_text", "header_start", "header_end", "eom", "eot", "finetune_right_pad")
CONFIG = {
    "architectures": ["Llama4ForCausalLM"],
    "vocab_size": 288,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "intermediate_size_mlp": 160,
    "num_local_experts": 3,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
    "use_qk_norm": True,
    "tie_word_embeddings": False,
    "eos_token_id": [266, 269, 270],
}
SCOUT = {  # the fields that a real config has instead
    **{"vocab_size": 202048, "hidden_size": 5120, "num_hidden_layers": 48, "num_attention_heads": 40, "head_dim": 128},
    **{"num_key_value_heads": 8, "intermediate_size": 8192, "intermediate_size_mlp": 16384, "num_local_experts": 16},
    "max_position_embeddings": 10485760,
}


def shapes(c):
    """Stored names and shapes of a text model."""
    h, i, e, d = c["hidden_size"], c["intermediate_size"], c["num_local_experts"], c["intermediate_size_mlp"]
    q, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    found = {"model.embed_tokens.weight": (c["vocab_size"], h), "model.norm.weight": (h,)}
    if not c["tie_word_embeddings"]:
        found["lm_head.weight"] = (c["vocab_size"], h)
    for n in range(c["num_hidden_layers"]):
        layer = {
            "input_layernorm.weight": (h,),
            "self_attn.q_proj.weight": (q, h),
            "self_attn.k_proj.weight": (kv, h),
            "self_attn.v_proj.weight": (kv, h),
            "self_attn.o_proj.weight": (h, q),
            "post_attention_layernorm.weight": (h,),
        }
        if (n + 1) % c["interleave_moe_layer_step"] == 0:
            layer |= {
                "feed_forward.router.weight": (e, h),
                "feed_forward.experts.gate_up_proj": (e, h, 2 * i),
                "feed_forward.experts.down_proj": (e, i, h),
                "feed_forward.shared_expert.gate_proj.weight": (i, h),
                "feed_forward.shared_expert.up_proj.weight": (i, h),
                "feed_forward.shared_expert.down_proj.weight": (h, i),
            }
        else:
            layer |= {f"feed_forward.{name}_proj.weight": (d, h) for name in ("gate", "up")}
            layer["feed_forward.down_proj.weight"] = (h, d)
        found |= {f"model.layers.{n}.{name}": shape for name, shape in layer.items()}
    return found


def to_bf16(x):
    """float32 to bfloat16's bits, truncated."""
    return (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def from_bf16(bits):
    """bfloat16's bits to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def stored(weights, dtype="BF16"):
    """float32 weights as safetensors entries: name -> (dtype, array)."""
    make = {"BF16": to_bf16, "F16": np.float16, "F32": np.float32}[dtype]
    return {name: (dtype, make(x)) for name, x in weights.items()}


def write_safetensors(path, entries, pad=8):
    """A safetensors file: header length, JSON header padded with spaces to a multiple of `pad`, data."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, data) in entries.items():
        header[name] = {"dtype": dtype, "shape": list(data.shape), "data_offsets": [offset, offset + data.nbytes]}
        offset += data.nbytes
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % pad)
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"".join(data.tobytes() for _, data in entries.values()))


def byte_alphabet():
    """GPT-2's letters for the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return [chr(b) for b in plain] + [chr(256 + n) for n in range(len(others))]


def tokenizer_json(merges_as_lists=True):
    """256 bytes, 9 merges, 7 special tokens from id 265 on."""
    vocab = {text: i for i, text in enumerate(byte_alphabet())}
    merges = [pair.split() for pair in ("h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "Ġwor l", "Ġworl d")]
    for a, b in merges:
        vocab[a + b] = len(vocab)
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    bos = [{"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    added = [{"id": len(vocab) + i, "content": f"<|{name}|>", "special": True} for i, name in enumerate(SPECIALS)]
    return {
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel", "use_regex": False}]},
        "post_processor": {
            "type": "Sequence",
            "processors": [{"type": "ByteLevel"}, {"type": "TemplateProcessing", "single": bos}],
        },
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": vocab, "merges": [m if merges_as_lists else " ".join(m) for m in merges]},
    }


def write(folder, dtype="BF16", seed=0, prefix="", shards=1, merges_as_lists=True, extra=(), outer=None, **changes):
    """A whole checkpoint. `prefix` stands before every name, `extra` adds entries, `outer` takes the config as its text_config.

    Returns the weights as float32, exactly as stored, by name without prefix.
    """
    config, random = CONFIG | changes, np.random.RandomState(seed)
    weights = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes(config).items()}
    entries = stored({prefix + name: x for name, x in weights.items()}, dtype) | dict(extra)
    folder.mkdir(exist_ok=True)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", entries)
    else:
        names, index = list(entries), {}
        for n in range(shards):
            file = f"model-{n + 1:05}-of-{shards:05}.safetensors"
            index |= dict.fromkeys(names[n::shards], file)
            write_safetensors(folder / file, {name: entries[name] for name in names[n::shards]})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config if outer is None else outer | {"text_config": config}))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(merges_as_lists)))
    settings = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|eot|>"}, "pad_token": "<|finetune_right_pad|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ bos_token }}hello"}))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.9}))
    return {name: read_back(to) for name, to in stored(weights, dtype).items()}


def read_back(entry):
    """A safetensors entry as float32."""
    dtype, data = entry
    return from_bf16(data) if dtype == "BF16" else data.astype(np.float32)
