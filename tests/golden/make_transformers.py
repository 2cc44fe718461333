"""Golden logits of transformers' Llama4ForCausalLM (float32, eager attention) for tiny random models.

    python tests/golden/make_transformers.py        needs the `train` extra; writes transformers.npz next to this file

The weights come from tests/tiny.py by seed, so only ids and logits are stored: for each case `NAME.ids`, `NAME.logits` and
`NAME.checksum` (of the weights), and `cases` as JSON. Prompts of 45 tokens cross three chunks or more; the small temperature
length makes the temperature matter.
"""

import json
import sys
import zlib
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import tiny

HERE = Path(__file__).resolve().parent
TEMPERATURE = {"temperature_length": 5.0, "temperature_scale": 0.5}
WIDE = {"head_dim": 32, "n_embd": 96, "n_layers": 8, "experts": 16}
CASES = {
    "scout": TEMPERATURE | {"seed": 11},
    "scout-2-1": TEMPERATURE | {"seed": 12, "heads": 2, "kv_heads": 1, "chunk": 11},
    "scout-5-1": TEMPERATURE | WIDE | {"seed": 13, "heads": 5, "kv_heads": 1, "chunk": 14},
    "scout-4-4-top-2": TEMPERATURE | {"seed": 14, "heads": 4, "kv_heads": 4, "chunk": 5, "used": 2},
    "scout-heads-of-128": TEMPERATURE | {"seed": 15, "heads": 5, "kv_heads": 1, "head_dim": 128},
    "maverick": TEMPERATURE | tiny.MAVERICK | {"seed": 21},
    "maverick-2-1": TEMPERATURE | tiny.MAVERICK | {"seed": 22, "heads": 2, "kv_heads": 1, "chunk": 11},
    "maverick-5-1": TEMPERATURE | WIDE | tiny.MAVERICK | {"seed": 23, "heads": 5, "kv_heads": 1, "chunk": 14},
}


def checksum(tensors):
    """Of all bytes, in the order of writing."""
    total = 0
    for values in tensors.values():
        total = zlib.crc32(values.tobytes(), total)
    return total


def ids_of(case, n=45):
    return np.random.RandomState(case["seed"] + 1000).randint(0, 257, n)


def reference(case, ids, rows=None):
    """transformers' logits, [len(ids), n_vocab], in one pass; and the least margin by which an expert was chosen.

    `rows`: by position, what stands in for the embedding.
    """
    import torch
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    shape = {key: value for key, value in case.items() if key != "seed"}
    s = tiny.Shape(**shape)
    rope = {"rope_type": "default", "rope_theta": s.rope_theta}
    if s.rope_freqs:
        rope |= {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0}
        rope |= {"original_max_position_embeddings": 8192}
    config = Llama4TextConfig(
        **{"vocab_size": s.vocab, "hidden_size": s.n_embd, "num_hidden_layers": s.n_layers, "head_dim": s.head_dim},
        **{"intermediate_size": s.n_ff_exp, "intermediate_size_mlp": s.n_ff, "interleave_moe_layer_step": s.moe_step},
        **{"num_attention_heads": s.heads, "num_key_value_heads": s.kv_heads, "rms_norm_eps": s.rms_eps},
        **{"num_local_experts": s.experts, "num_experts_per_tok": s.used, "use_qk_norm": s.use_qk_norm},
        **{"attention_chunk_size": s.chunk, "floor_scale": int(s.temperature_length), "attn_scale": s.temperature_scale},
        **{"rope_parameters": rope, "max_position_embeddings": 1 << 17, "attn_temperature_tuning": True},
    )
    config._attn_implementation = "eager"
    model = Llama4ForCausalLM(config).to(torch.float32).eval()
    state = {name: torch.from_numpy(values) for name, values in _names(tiny.tensors(case["seed"], **shape), s)}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:  # every parameter must be ours: transformers leaves experts uninitialized
        raise RuntimeError(f"parameters without values {missing}, values without parameters {unexpected}")
    margins = [np.inf]

    def watch(router, args, output):
        best = output[1].topk(min(router.top_k + 1, s.experts), dim=1).values
        margins.append(float((best[:, -2] - best[:, -1]).min()))

    for name, module in model.named_modules():
        if name.endswith("router"):
            module.register_forward_hook(watch)
    with torch.no_grad():
        embeds = model.model.embed_tokens(torch.from_numpy(ids)[None])
        for at, row in (rows or {}).items():
            embeds[0, at] = torch.from_numpy(row)
        return model(inputs_embeds=embeds, use_cache=False).logits[0].numpy(), min(margins)


def _names(tensors, s):
    """GGUF names and layouts to Hugging Face's."""
    plain = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_output": "self_attn.o_proj",
        "ffn_gate_inp": "feed_forward.router",
        **{f"attn_{w}": f"self_attn.{w}_proj" for w in "qkv"},
        **{f"ffn_{w}": f"feed_forward.{w}_proj" for w in ("gate", "up", "down")},
        **{f"ffn_{w}_shexp": f"feed_forward.shared_expert.{w}_proj" for w in ("gate", "up", "down")},
    }
    yield "model.embed_tokens.weight", tensors["token_embd.weight"]
    yield "model.norm.weight", tensors["output_norm.weight"]
    yield "lm_head.weight", tensors["output.weight"]
    for i in range(s.n_layers):
        layer = {name.split(".")[2]: values for name, values in tensors.items() if name.startswith(f"blk.{i}.")}
        for name, values in layer.items():
            if name in plain:
                yield f"model.layers.{i}.{plain[name]}.weight", values
        if s.is_moe(i):
            gate_up = np.concatenate([layer["ffn_gate_exps"], layer["ffn_up_exps"]], axis=1)
            for name, values in (("gate_up_proj", gate_up), ("down_proj", layer["ffn_down_exps"])):
                yield f"model.layers.{i}.feed_forward.experts.{name}", np.ascontiguousarray(values.transpose(0, 2, 1))


def main():
    stored = {"cases": np.array(json.dumps(CASES))}
    for name, case in CASES.items():
        ids = ids_of(case)
        shape = {key: value for key, value in case.items() if key != "seed"}
        logits, margin = reference(case, ids)
        stored |= {f"{name}.ids": ids.astype(np.int32), f"{name}.logits": logits}
        stored[f"{name}.checksum"] = np.array(checksum(tiny.tensors(case["seed"], **shape)))
        print(f"{name}: {logits.shape}, experts chosen by {margin:.4f} or more")
    np.savez_compressed(HERE / "transformers.npz", **stored)


if __name__ == "__main__":
    main()
