"""Conversions that several test files need.

In: a checkpoint's folder, its weights, a change. Out: a GGUF, every tensor of it held against gguf-py,
or the line of a refusal. Also one that was interrupted, and what it left.
"""

import json

import checkpoint
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import quantize as reference

from llamacli.files.gguf import open_gguf
from quantize.convert import convert

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0")

GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "feed_forward.router": "ffn_gate_inp",
    "feed_forward.shared_expert.gate_proj": "ffn_gate_shexp",
    "feed_forward.shared_expert.up_proj": "ffn_up_shexp",
    "feed_forward.shared_expert.down_proj": "ffn_down_shexp",
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
}

TOP_NAMES = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}


def wanted(weights):
    """What the GGUF must hold, as float32 by its names: computed independently, in plain NumPy."""
    found = {}
    for name, x in weights.items():
        if name in TOP_NAMES:
            found[TOP_NAMES[name] + ".weight"] = x
            continue
        _, _, i, rest = name.split(".", 3)
        if rest == "feed_forward.experts.gate_up_proj":
            gate, up = np.split(x.transpose(0, 2, 1), 2, axis=1)
            found |= {f"blk.{i}.ffn_gate_exps.weight": gate, f"blk.{i}.ffn_up_exps.weight": up}
        elif rest == "feed_forward.experts.down_proj":
            found[f"blk.{i}.ffn_down_exps.weight"] = x.transpose(0, 2, 1)
        else:
            found[f"blk.{i}.{GGUF_NAMES[rest.removesuffix('.weight')]}.weight"] = x
    return found


def made(folder, weights, type_name="F32", **options):
    """Convert, and hold every tensor against what gguf-py makes of the same weights."""
    out = folder.parent / "out.gguf"
    report = convert(folder, out, type_name, force=True, threads=2, **options)
    gguf, expected = open_gguf(out), wanted(weights)
    assert set(gguf.tensors) - {"rope_freqs.weight"} == set(expected)
    for name, x in expected.items():
        tensor = gguf.tensors[name]
        assert tensor.shape == x.shape, name
        encoded = np.ascontiguousarray(reference(np.ascontiguousarray(x), GGMLQuantizationType[tensor.type.name]))
        np.testing.assert_array_equal(tensor.data, encoded.view(np.uint8).reshape(-1), err_msg=name)
    return gguf, report


def refusal(kind, *args, **options):
    """The one line that a conversion ends with."""
    with pytest.raises(kind) as caught:
        convert(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(folder, file, change):
    """Change a JSON file of a checkpoint."""
    value = json.loads((folder / file).read_text())
    change(value)
    (folder / file).write_text(json.dumps(value))


def spoil(folder, file, text):
    """Write `text` over a file of the checkpoint, or remove it."""
    if text is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(text)


def with_entries(folder, change):
    """A checkpoint whose safetensors entries went through `change`."""
    weights = checkpoint.write(folder)
    entries = checkpoint.stored(weights)
    change(entries)
    checkpoint.write_safetensors(folder / "model.safetensors", entries)


def finished(out):
    """How many tensors the log calls finished."""
    log = out.with_name(out.name + ".part.log")
    return log.read_bytes().count(b"\n") - 1 if log.exists() else 0


def interrupted(folder, out, recipe="Q8_0", at=0.6, **options):
    """A conversion in this process that ends as by Ctrl-C once `at` of it is written."""

    def stop(done, total, name):
        if done > at * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(folder, out, recipe, progress=stop, **options)


def names(folder):
    """The files in a folder."""
    return {path.name for path in folder.iterdir()}


def opened(data, tmp_path):
    """The GGUF of these bytes; its file is gone."""
    (tmp_path / "copy.gguf").write_bytes(data)
    found = open_gguf(tmp_path / "copy.gguf")
    (tmp_path / "copy.gguf").unlink()
    return found
