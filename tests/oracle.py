"""Llama 4 in NumPy and float64, written from its definition: the reference that tests compare the engine with.

In: a GGUF's path, token ids. Out: logits of every position. No cache, no batches, no code shared with the engine: gguf-py reads
and dequantizes. Slow; meant for tiny models.
"""

import gguf
import numpy as np
from gguf.quants import dequantize


def logits(path, ids, kv=np.float64, inputs=None):
    """float64 [len(ids), n_vocab]. `kv` float16, or a function, rounds keys and values as a cache does, and nothing else.

    `inputs(x)` rounds what is multiplied with quantized weights, as an engine does that multiplies with integers.
    """
    keep = kv if not isinstance(kv, type) else lambda x: x.astype(kv).astype(np.float64)
    reader = gguf.GGUFReader(path)
    weights = {t.name: _values(t) for t in reader.tensors}
    if inputs is not None:
        quantized = {t.name for t in reader.tensors if t.tensor_type.name[0] == "Q" and t.name != "token_embd.weight"}
        weights = {name: Rounding(values, inputs) if name in quantized else values for name, values in weights.items()}
    read = _metadata(reader)
    eps, theta = read("attention.layer_norm_rms_epsilon"), read("rope.freq_base")
    n_heads, n_kv_heads, head_dim = (read("attention." + key) for key in ("head_count", "head_count_kv", "key_length"))
    n, pos = len(ids), np.arange(len(ids))
    chunk = read("attention.sliding_window", read("attention.chunk_size", 8192))
    length, scale = read("attention.temperature_length", 8192.0), read("attention.temperature_scale", 0.1)
    temperature = 1 + scale * np.log(1 + np.floor((pos + 1) / length))
    factors = weights.get("rope_freqs.weight", 1.0)
    angles = pos[:, None] * theta ** (-np.arange(0, head_dim, 2) / head_dim) / factors
    causal = pos[None, :] <= pos[:, None]
    same_chunk = pos[None, :] // chunk == pos[:, None] // chunk if chunk else True

    x = weights["token_embd.weight"][ids]
    for i in range(read("block_count")):
        w = {name.removeprefix(f"blk.{i}."): values for name, values in weights.items() if name.startswith(f"blk.{i}.")}
        rotary = not chunk or (i + 1) % 4 != 0
        h = rms_norm(x, eps) * w["attn_norm.weight"]
        q = (h @ w["attn_q.weight"].T).reshape(n, n_heads, head_dim)
        k = (h @ w["attn_k.weight"].T).reshape(n, n_kv_heads, head_dim)
        v = (h @ w["attn_v.weight"].T).reshape(n, n_kv_heads, head_dim)
        if rotary:
            q, k = rotate(q, angles), rotate(k, angles)
            if read("use_qk_norm"):
                q, k = rms_norm(q, eps), rms_norm(k, eps)
        else:
            q = q * temperature[:, None, None]
        k, v = keep(k), keep(v)
        mixed = attend(q, k, v, causal & same_chunk if rotary else causal)
        x = x + mixed @ w["attn_output.weight"].T
        h = rms_norm(x, eps) * w["ffn_norm.weight"]
        x = x + (experts(h, w, read("expert_used_count")) if "ffn_gate_inp.weight" in w else ffn(h, w, ""))
    return (rms_norm(x, eps) * weights["output_norm.weight"]) @ weights["output.weight"].T


class Rounding:
    """A matrix, or one for each expert, whose products round their other factor first."""

    __array_ufunc__ = None  # so that NumPy asks __rmatmul__

    def __init__(self, values, inputs):
        self.values, self.inputs = values, inputs

    def __getitem__(self, expert):
        return Rounding(self.values[expert], self.inputs)

    @property
    def T(self):
        return Rounding(self.values.T, self.inputs)

    def __rmatmul__(self, x):
        return self.inputs(x) @ self.values


def q8(x, block):
    """Rounded to 8 bits with a scale for each `block` values, chosen as llama.cpp chooses Q8_K's (of 256)."""
    groups = x.reshape(-1, block)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(-1)[:, None], -1)
    scale = np.where(largest == 0, 1, largest) / -127
    return (np.minimum(np.rint(groups / scale), 127) * scale).reshape(x.shape)


def rms_norm(x, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def rotate(x, angles):
    """Interleaved pairs of [n, heads, head_dim], turned by [n, head_dim / 2]."""
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None, :]
    return np.stack([z.real, z.imag], -1).reshape(x.shape)


def attend(q, k, v, visible):
    n, n_heads, head_dim = q.shape
    group = n_heads // k.shape[1]
    out = np.empty_like(q)
    for head in range(n_heads):
        scores = q[:, head] @ k[:, head // group].T / np.sqrt(head_dim)
        scores = np.where(visible, scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, head] = p / p.sum(-1, keepdims=True) @ v[:, head // group]
    return out.reshape(n, -1)


def ffn(x, w, suffix, expert=None):
    gate, up, down = (w[f"ffn_{name}{suffix}.weight"] for name in ("gate", "up", "down"))
    if expert is not None:
        gate, up, down = gate[expert], up[expert], down[expert]
    g = x @ gate.T
    return (g / (1 + np.exp(-g)) * (x @ up.T)) @ down.T


def experts(x, w, used):
    """The shared expert on x, and the best `used` experts, each on x times the sigmoid of its own logit."""
    out = ffn(x, w, "_shexp")
    router = x @ w["ffn_gate_inp.weight"].T
    for t in range(len(x)):
        for e in np.argsort(-router[t])[:used]:
            out[t] += ffn(x[t] / (1 + np.exp(-router[t, e])), w, "_exps", e)
    return out


def _values(tensor):
    return dequantize(tensor.data, tensor.tensor_type).astype(np.float64).reshape(tensor.shape[::-1])


def _metadata(reader):
    def read(key, default=None):
        field = reader.get_field("llama4." + key)
        return default if field is None else field.contents()

    return read
