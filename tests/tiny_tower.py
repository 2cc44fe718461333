"""Small random vision towers as GGUF, in llama.cpp's names, and the same weights under transformers' names.

In: sizes, a seed, a type for the matrices. Out: a file written by gguf-py, which shares no code with the engine.
"""

from typing import NamedTuple

import gguf
import numpy as np
from gguf.quants import quantize


class Shape(NamedTuple):
    """A tower's sizes."""

    n_layers: int = 3
    n_embd: int = 64
    heads: int = 4
    n_ff: int = 256  # 4 n_embd, as transformers' adapter needs
    image_size: int = 56
    patch_size: int = 14
    n_mlp: int = 96
    n_out: int = 96
    n_text: int = 64
    most_tiles: int = 16


def tensors(seed=0, **shape):
    """Every tensor: dict from llama.cpp's name to float32 array, row length last."""
    s, random = Shape(**shape), np.random.RandomState(seed)

    def matrix(rows, columns):
        return (random.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    def vector(n, centre=0.0):
        return (centre + 0.2 * random.standard_normal(n)).astype(np.float32)

    positions = (s.image_size // s.patch_size) ** 2 + 1
    found = {
        "v.class_embd": vector(s.n_embd),
        "v.patch_embd.weight": matrix(s.n_embd, 3 * s.patch_size**2),
        "v.position_embd.weight": vector((positions, s.n_embd)),
        "v.pre_ln.weight": vector(s.n_embd, 1.0),
        "v.pre_ln.bias": vector(s.n_embd),
        "v.post_ln.weight": vector(s.n_embd, 1.0),
        "v.post_ln.bias": vector(s.n_embd),
        "mm.model.mlp.1.weight": matrix(s.n_mlp, 4 * s.n_embd),
        "mm.model.mlp.2.weight": matrix(s.n_out, s.n_mlp),
        "mm.model.fc.weight": matrix(s.n_text, s.n_out),
    }
    for i in range(s.n_layers):
        p = f"v.blk.{i}."
        for name in ("ln1", "ln2"):
            found |= {f"{p}{name}.weight": vector(s.n_embd, 1.0), f"{p}{name}.bias": vector(s.n_embd)}
        for name, rows, columns in (
            *((f"attn_{part}", s.n_embd, s.n_embd) for part in ("q", "k", "v", "out")),
            *(("ffn_up", s.n_ff, s.n_embd), ("ffn_down", s.n_embd, s.n_ff)),
        ):
            found |= {f"{p}{name}.weight": matrix(rows, columns), f"{p}{name}.bias": vector(rows)}
    return found


def metadata(s):
    """The metadata, with llama.cpp's keys."""
    whole = {
        "image_size": s.image_size,
        "patch_size": s.patch_size,
        "embedding_length": s.n_embd,
        "feed_forward_length": s.n_ff,
        "block_count": s.n_layers,
        "attention.head_count": s.heads,
        "projection_dim": s.n_text,
        "projector.scale_factor": 2,
        "preproc_max_tiles": s.most_tiles,
    }
    return {f"clip.vision.{key}": value for key, value in whole.items()}


def tower_gguf(path, *, type_name="F32", seed=0, rename=lambda name: name, edit=None, **shape):
    """Write a tower and return its path. Matrices have `type_name` where their rows allow it; `rename` changes names."""
    s = Shape(**shape)
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "llama4")
    writer.add_bool("clip.use_gelu", True)
    for key, value in metadata(s).items():
        writer.add_uint32(key, value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    for key in ("image_mean", "image_std"):
        writer.add_array(f"clip.vision.{key}", [0.5] * 3)
    found = tensors(seed, **shape)
    if edit:
        edit(found)
    for name, values in found.items():
        small = values.ndim == 1 or name in ("v.position_embd.weight", "v.patch_embd.weight")
        kind = "F32" if small or (type_name.startswith("Q") and values.shape[-1] % 32) else type_name
        data = values if kind == "F32" else quantize(values, gguf.GGMLQuantizationType[kind])
        writer.add_tensor(rename(name), data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


HF = {
    "v.class_embd": "vision_model.class_embedding",
    "v.patch_embd.weight": "vision_model.patch_embedding.linear.weight",
    "v.position_embd.weight": "vision_model.positional_embedding_vlm",
    "v.pre_ln": "vision_model.layernorm_pre",
    "v.post_ln": "vision_model.layernorm_post",
    "mm.model.mlp.1": "vision_model.vision_adapter.mlp.fc1",
    "mm.model.mlp.2": "vision_model.vision_adapter.mlp.fc2",
    "mm.model.fc": "multi_modal_projector.linear_1",
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"},
    "attn_out": "self_attn.o_proj",
    "ln1": "input_layernorm",
    "ln2": "post_attention_layernorm",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}


def hf_name(name):
    """transformers' name of a tensor."""
    if name in HF:
        return HF[name]
    stem, end = name.rsplit(".", 1)
    if stem in HF:
        return f"{HF[stem]}.{end}"
    _, _, layer, kind = stem.split(".", 3)
    return f"vision_model.model.layers.{layer}.{HF[kind]}.{end}"


def hf_config(s):
    """The fields of a Llama4VisionConfig."""
    return {
        "hidden_size": s.n_embd,
        "num_hidden_layers": s.n_layers,
        "num_attention_heads": s.heads,
        "intermediate_size": s.n_ff,
        "image_size": s.image_size,
        "patch_size": s.patch_size,
        "projector_input_dim": s.n_mlp,
        "projector_output_dim": s.n_out,
        "vision_output_dim": s.n_out,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
