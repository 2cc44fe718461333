"""Tensor names to typed, shape-checked fields, under GGUF's own words; the only place that says "blk.".

In: a GGUF and its Config. Out: `Weights`, addresses into the file's map (nothing is copied), or a ModelFileError that names
the tensor, the shape expected and the shape found. A type without leaves of its own is dequantized here once, by gguf-py, and
listed in `Weights.notices`. Knows nothing of threads or caches.
"""

from typing import NamedTuple

import numpy as np

from llamacli.cpu.kernels.formats.layout import FLOATS, QUANTIZED
from llamacli.cpu.kernels.ops.matmul import Matrix
from llamacli.errors import ModelFileError, UnsupportedModelError
from llamacli.files.gguf import GGUF, Tensor
from llamacli.llama4.config import Config

LONG_FACTOR = 16.0  # Scout divides the frequencies of wavelengths beyond 8192 by this; early uploads had other numbers


class Dense(NamedTuple):
    """A feed-forward network: gate and up [n_ff, n_embd], down [n_embd, n_ff]."""

    gate: Matrix
    up: Matrix
    down: Matrix


class Experts(NamedTuple):
    """A mixture layer: router [n_experts, n_embd], the routed experts (n_experts groups each) and the shared one."""

    gate_inp: Matrix
    exps: Dense
    shexp: Dense


class Layer(NamedTuple):
    """One block. Norms are float32 [n_embd]."""

    attn_norm: np.ndarray
    attn_q: Matrix  # [n_heads * head_dim, n_embd]
    attn_k: Matrix  # [n_kv_heads * head_dim, n_embd]
    attn_v: Matrix
    attn_output: Matrix  # [n_embd, n_heads * head_dim]
    ffn_norm: np.ndarray
    ffn: Dense | Experts


class Weights(NamedTuple):
    """The whole model. `keep` holds what the addresses point into."""

    token_embd: Matrix  # [n_vocab, n_embd]
    layers: list[Layer]
    output_norm: np.ndarray
    output: Matrix  # [n_vocab, n_embd]; token_embd again where the file has none
    rope_freqs: np.ndarray | None  # float32 [head_dim / 2], divisors of the rotary frequencies
    notices: list[str]  # what a user should know about this file
    keep: list

    @property
    def has_experts(self) -> bool:
        """Whether any layer is a mixture."""
        return any(isinstance(layer.ffn, Experts) for layer in self.layers)


def moved(part, addresses: dict[str, int]):
    """`part` of the weights (a tuple, a list or a Matrix) with the matrices of these names at other addresses."""
    if isinstance(part, Matrix):
        return part._replace(address=addresses.get(part.name, part.address))
    if isinstance(part, list):
        return [moved(one, addresses) for one in part]
    return type(part)(*(moved(one, addresses) for one in part)) if isinstance(part, Layer | Experts | Dense) else part


def bind(gguf: GGUF, config: Config) -> Weights:
    """Find, check and address every tensor of the model."""
    converted: list[str] = []
    notices: list[str] = []
    keep: list = [gguf]
    c = config

    def find(name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = gguf.tensors.get(name)
        if tensor is None:
            raise ModelFileError(f"{gguf.path}: expected tensor {name} {list(shape)}, found none; the file is incomplete")
        if tensor.shape != shape:
            raise ModelFileError(
                f"{gguf.path}: expected {name} as {list(shape)}, found {list(tensor.shape)}; metadata and tensors disagree"
            )
        return tensor

    def vector(name: str, n: int) -> np.ndarray:
        tensor = find(name, (n,))
        if tensor.type.name != "F32":
            raise UnsupportedModelError(
                f"{gguf.path}: expected {name} as F32, found {tensor.type.name}; convert the model again"
            )
        return np.frombuffer(tensor.data, np.float32).copy()  # copied: maps need not be aligned, and norms are tiny

    def matrix(name: str, *shape: int) -> Matrix:
        tensor = find(name, shape)
        data, type_name, row_bytes = tensor.data, tensor.type.name, tensor.type.row_bytes(shape[-1])
        if type_name not in QUANTIZED and type_name not in FLOATS:
            data, type_name, row_bytes = _as_half(gguf, tensor), "F16", 2 * shape[-1]
            keep.append(data)
            converted.append(f"{name} ({tensor.type.name})")
        n_groups = shape[0] if len(shape) == 3 else 1
        return Matrix(data.ctypes.data, type_name, n_groups, shape[-2], shape[-1], row_bytes, name)

    def dense(prefix: str, suffix: str, n_ff: int, *groups: int) -> Dense:
        return Dense(
            matrix(f"{prefix}ffn_gate{suffix}.weight", *groups, n_ff, c.n_embd),
            matrix(f"{prefix}ffn_up{suffix}.weight", *groups, n_ff, c.n_embd),
            matrix(f"{prefix}ffn_down{suffix}.weight", *groups, c.n_embd, n_ff),
        )

    def layer(i: int) -> Layer:
        p, q_rows, kv_rows = f"blk.{i}.", c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
        if c.is_moe(i):
            gate_inp = matrix(p + "ffn_gate_inp.weight", c.n_experts, c.n_embd)
            ffn = Experts(gate_inp, dense(p, "_exps", c.n_ff_exp, c.n_experts), dense(p, "_shexp", c.n_ff_exp))
        else:
            ffn = dense(p, "", c.n_ff)
        return Layer(
            vector(p + "attn_norm.weight", c.n_embd),
            matrix(p + "attn_q.weight", q_rows, c.n_embd),
            matrix(p + "attn_k.weight", kv_rows, c.n_embd),
            matrix(p + "attn_v.weight", kv_rows, c.n_embd),
            matrix(p + "attn_output.weight", c.n_embd, q_rows),
            vector(p + "ffn_norm.weight", c.n_embd),
            ffn,
        )

    token_embd = matrix("token_embd.weight", c.n_vocab, c.n_embd)
    has_freqs = "rope_freqs.weight" in gguf.tensors
    weights = Weights(
        token_embd,
        [layer(i) for i in range(c.n_layers)],
        vector("output_norm.weight", c.n_embd),
        matrix("output.weight", c.n_vocab, c.n_embd) if "output.weight" in gguf.tensors else token_embd,
        _rope_factors(gguf, vector("rope_freqs.weight", c.head_dim // 2)) if has_freqs else None,
        notices,
        keep,
    )
    if converted:
        some = ", ".join(converted[:3])
        notices.append(
            f"{len(converted)} tensors have types without fast kernels and run as F16, slower and larger: {some} ..."
        )
    if weights.rope_freqs is not None and not np.isin(weights.rope_freqs, (1.0, LONG_FACTOR)).all():
        notices.append("rope_freqs.weight is not Scout's published scaling; an early upload may answer badly at length")
    return weights


def _rope_factors(gguf: GGUF, factors: np.ndarray) -> np.ndarray:
    """The divisors of the rotary frequencies, checked: they divide."""
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise ModelFileError(f"{gguf.path}: expected positive numbers in rope_freqs.weight, found others; the file is damaged")
    return factors


def _as_half(gguf: GGUF, tensor: Tensor) -> np.ndarray:
    """A tensor of a type without leaves as float16, a few rows at a time."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    rows = tensor.data.reshape(-1, tensor.type.row_bytes(tensor.shape[-1]))
    out = np.empty((len(rows), tensor.shape[-1]), np.float16)
    step = max(1, (1 << 22) // tensor.shape[-1])
    try:
        for r in range(0, len(rows), step):
            out[r : r + step] = dequantize(rows[r : r + step], GGMLQuantizationType(tensor.type.id)).clip(-65504, 65504)
    except (NotImplementedError, ValueError) as error:
        raise UnsupportedModelError(
            f"{gguf.path}: {tensor.name} is {tensor.type.name}, which this engine cannot read"
        ) from error
    return out.reshape(-1)
