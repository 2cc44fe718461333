"""Llama 4 in NumPy and float64, written from its definition: the reference that tests compare the engine with.

In: a GGUF's path, token ids. Out: logits of every position. No cache, no batches, no code shared with the engine: gguf-py reads
and dequantizes. Slow; meant for tiny models.
"""

import gguf
import numpy as np
from gguf.quants import dequantize


def logits(path, ids, kv=np.float64, inputs=None, segment=0):
    """float64 [len(ids), n_vocab]. `kv` float16, or a function, rounds keys and values as a cache does, and nothing else; with
    `segment` a token sees those from the last multiple of `segment` on in float16.

    `inputs(x)` rounds the factors of quantized weights, as an engine with integer products does.
    """
    model, pos = _Model(path, kv, inputs, segment), np.arange(len(ids))
    x = model.weights["token_embd.weight"][ids]
    for i in range(model.n_layers):
        x = model.layer(i, x, pos)
    return model.head(x)


def logits_at(path, ids, at, kv=np.float64, chunk=None):
    """`logits` of the positions `at` of a long text, float64 [len(at), n_vocab], for a model of which only the last layer sees
    every position: the others are evaluated chunk by chunk. `chunk`: another size than the file's.
    """
    model, at = _Model(path, kv), np.asarray(at)
    model.chunk = chunk or model.chunk
    last = model.n_layers - 1
    assert model.chunk
    assert [model.rotary(i) for i in range(model.n_layers)] == [True] * last + [False]
    keys, values, found = [], [], {}
    for start in range(0, len(ids), model.chunk):
        pos = np.arange(start, min(start + model.chunk, len(ids)))
        x = model.weights["token_embd.weight"][ids[pos]]
        for i in range(last):
            x = model.layer(i, x, pos)
        q, k, v = model.heads(last, x, pos)
        keys.append(k)
        values.append(v)
        found |= {p: (x[p - start], q[p - start]) for p in at if start <= p < start + len(pos)}
    keys, values, rows = np.concatenate(keys), np.concatenate(values), []
    for p in at:
        x, q = found[p]
        mixed = attend(q[None], keys[: p + 1], values[: p + 1], True)
        rows.append(model.head(model.rest(last, x[None], mixed))[0])
    return np.array(rows)


class _Model:
    def __init__(self, path, kv, inputs=None, segment=0):
        self.segment = segment
        reader = gguf.GGUFReader(path)
        self.weights, read = {t.name: _values(t) for t in reader.tensors}, _metadata(reader)
        if inputs is not None:
            quantized = {t.name for t in reader.tensors if t.tensor_type.name[0] == "Q" and t.name != "token_embd.weight"}
            self.weights |= {name: Rounding(self.weights[name], inputs) for name in quantized}
        self.keep = kv if not isinstance(kv, type) else lambda x: x.astype(kv).astype(np.float64)
        self.eps, self.theta = read("attention.layer_norm_rms_epsilon"), read("rope.freq_base")
        self.n_heads, self.n_kv_heads, self.head_dim = (
            read("attention." + key) for key in ("head_count", "head_count_kv", "key_length")
        )
        self.chunk = read("attention.sliding_window", read("attention.chunk_size", 8192))
        self.length, self.scale = read("attention.temperature_length", 8192.0), read("attention.temperature_scale", 0.1)
        self.n_layers, self.used, self.qk_norm = read("block_count"), read("expert_used_count"), read("use_qk_norm")
        names = [f"blk.{i}." for i in range(self.n_layers)]
        self.layers = [{n.removeprefix(p): w for n, w in self.weights.items() if n.startswith(p)} for p in names]

    def rotary(self, i):
        return not self.chunk or (i + 1) % 4 != 0

    def heads(self, i, x, pos):
        """Queries, and keys and values as they are kept, of positions `pos`."""
        w, n = self.layers[i], len(x)
        h = rms_norm(x, self.eps) * w["attn_norm.weight"]
        q = (h @ w["attn_q.weight"].T).reshape(n, self.n_heads, self.head_dim)
        k = (h @ w["attn_k.weight"].T).reshape(n, self.n_kv_heads, self.head_dim)
        v = (h @ w["attn_v.weight"].T).reshape(n, self.n_kv_heads, self.head_dim)
        if self.rotary(i):
            factors = self.weights.get("rope_freqs.weight", 1.0)
            angles = pos[:, None] * self.theta ** (-np.arange(0, self.head_dim, 2) / self.head_dim) / factors
            q, k = rotate(q, angles), rotate(k, angles)
            if self.qk_norm:
                q, k = rms_norm(q, self.eps), rms_norm(k, self.eps)
        else:
            q = q * (1 + self.scale * np.log(1 + np.floor((pos + 1) / self.length)))[:, None, None]
        return q, self.keep(k), self.keep(v)

    def layer(self, i, x, pos):
        visible = pos[None, :] <= pos[:, None]
        if self.rotary(i) and self.chunk:
            visible &= pos[None, :] // self.chunk == pos[:, None] // self.chunk
        q, k, v = self.heads(i, x, pos)
        if self.segment:
            keep, self.keep = self.keep, lambda x: x.astype(np.float16).astype(np.float64)
            _, new_k, new_v = self.heads(i, x, pos)
            self.keep, own = keep, pos[None, :] // self.segment == pos[:, None] // self.segment
            known = visible & ~own, visible & own
            mixed = attend(q, np.concatenate([k, new_k]), np.concatenate([v, new_v]), np.concatenate(known, 1))
            return self.rest(i, x, mixed)
        return self.rest(i, x, attend(q, k, v, visible))

    def rest(self, i, x, mixed):
        """The part of the layer after attention."""
        w = self.layers[i]
        x = x + mixed @ w["attn_output.weight"].T
        h = rms_norm(x, self.eps) * w["ffn_norm.weight"]
        return x + (experts(h, w, self.used) if "ffn_gate_inp.weight" in w else ffn(h, w, ""))

    def head(self, x):
        return (rms_norm(x, self.eps) * self.weights["output_norm.weight"]) @ self.weights["output.weight"].T


class Rounding:
    """A matrix, or one for each expert, whose products first round the other factor."""

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
    """Attention. `visible`: the keys that each query may use, bool [n, n], none of them later than the query; or True. Queries
    are processed in parts, so that long texts take little memory.
    """
    n, n_heads, head_dim = q.shape
    group = n_heads // k.shape[1]
    out = np.empty_like(q)
    for start in range(0, n, 256):
        own = slice(start, min(n, start + 256))
        seen, known = (slice(None), True) if visible is True else (slice(None), visible[own])
        if visible is not True and len(k) == n:
            seen, known = slice(own.stop), visible[own, : own.stop]
        for head in range(n_heads):
            scores = q[own, head] @ k[seen, head // group].T / np.sqrt(head_dim)
            scores = np.where(known, scores, -np.inf)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            out[own, head] = p / p.sum(-1, keepdims=True) @ v[seen, head // group]
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
    chosen = np.argsort(-router)[:, :used]
    for e in range(router.shape[1]):
        t = np.nonzero(chosen == e)[0]
        out[t] += ffn(x[t] / (1 + np.exp(-router[t, e : e + 1])), w, "_exps", e)
    return out


def _values(tensor):
    return dequantize(tensor.data, tensor.tensor_type).astype(np.float64).reshape(tensor.shape[::-1])


def _metadata(reader):
    def read(key, default=None):
        field = reader.get_field("llama4." + key)
        return default if field is None else field.contents()

    return read
