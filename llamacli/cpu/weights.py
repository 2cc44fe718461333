"""Binds a GGUF's tensors to the fields that the CPU's program is composed of: checked, typed, with their addresses.

In: a GGUF, its Config, and a function that says where a tensor's bytes are. Out: `Weights`, whose matrices are addresses; only
norms and the rotary divisors are copied. A tensor of a type without kernels is dequantized to F16 by gguf-py and named in
`Weights.notices`. Names, roles and shapes come from llama4/tensors.py.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from llamacli.cpu.kernels.formats.layout import FLOATS, QUANTIZED
from llamacli.cpu.kernels.ops.matmul import Matrix
from llamacli.errors import ModelFileError, UnsupportedModelError
from llamacli.files.ggml import dequantize
from llamacli.files.gguf import GGUF, Tensor
from llamacli.llama4.config import Config
from llamacli.llama4.tensors import ROPE_FREQS, needed

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
    """One block. Norms are float32 [n_embd]; each device has its own type of matrix."""

    attn_norm: np.ndarray
    attn_q: Matrix  # [n_heads * head_dim, n_embd]
    attn_k: Matrix  # [n_kv_heads * head_dim, n_embd]
    attn_v: Matrix
    attn_output: Matrix  # [n_embd, n_heads * head_dim]
    ffn_norm: np.ndarray
    ffn: Dense | Experts


class Weights(NamedTuple):
    """The bound tensors. `keep` holds the memory that the addresses point into, where `bind` allocated it.

    `token_embd` is None when `bind` was called without `embedding`, `output_norm` and `output` without `head`.
    """

    token_embd: Matrix | None  # [n_vocab, n_embd]
    layers: list[Layer]  # in the order of `bind`'s `layers`
    output_norm: np.ndarray | None
    output: Matrix | None  # [n_vocab, n_embd]; the embedding's matrix where the file has no output.weight
    rope_freqs: np.ndarray | None  # float32 [head_dim / 2], divisors of the rotary frequencies
    notices: list[str]  # what a user should know about this file
    keep: list


def in_map(tensor: Tensor) -> int:
    """The address of a tensor's bytes in the mapped file."""
    return tensor.data.ctypes.data


def has_kernels(tensor: Tensor) -> bool:
    """Whether products run on the tensor's own blocks. Every other type becomes F16 when it is bound."""
    return tensor.type.name in QUANTIZED or tensor.type.name in FLOATS


def held_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor takes in memory: its blocks, or the float16 that it becomes."""
    return tensor.nbytes if has_kernels(tensor) else 2 * math.prod(tensor.shape)


def bind(
    gguf: GGUF,
    config: Config,
    address: Callable[[Tensor], int] = in_map,
    layers: range | None = None,
    *,
    embedding: bool = True,
    head: bool = True,
) -> Weights:
    """Check the model's tensors and give each matrix its address.

    `address(tensor)` says where the bytes of a matrix are, laid out as in the file; it is asked once for every matrix of a type
    with kernels, and the default is the mapped file. A caller that copies tensors elsewhere does so before: `needed` lists
    those that will be asked for. `layers`: the numbers of the layers to bind, None for all. `embedding`, `head`: whether to
    bind token_embd, and output_norm with output.

    Errors as for `assemble`. UnsupportedModelError: a type that gguf-py cannot dequantize.
    """
    keep: list = [gguf]
    converted: list[str] = []

    def matrix(tensor: Tensor) -> Matrix:
        return bind_matrix(gguf, tensor, address, keep, converted)

    weights = assemble(gguf, config, matrix, layers, embedding=embedding, head=head)
    return weights._replace(notices=conversion_notices(converted) + weights.notices, keep=keep)


def bind_matrix(gguf: GGUF, tensor: Tensor, address: Callable[[Tensor], int], keep: list, converted: list[str]) -> Matrix:
    """A tensor as a matrix: where `address` says, or as float16 if its type has no kernels. Then `keep` gets its memory and
    `converted` its name.
    """
    *groups, n_rows, n_cols = tensor.shape
    if has_kernels(tensor):
        at, kind, row_bytes = address(tensor), tensor.type.name, tensor.type.row_bytes(n_cols)
    else:
        halves = as_half(gguf, tensor)
        keep.append(halves)
        converted.append(f"{tensor.name} ({tensor.type.name})")
        at, kind, row_bytes = halves.ctypes.data, "F16", 2 * n_cols
    return Matrix(at, kind, groups[0] if groups else 1, n_rows, n_cols, row_bytes, tensor.name)


def assemble(
    gguf: GGUF,
    config: Config,
    matrix: Callable[[Tensor], Any],
    layers: range | None = None,
    *,
    embedding: bool = True,
    head: bool = True,
) -> Weights:
    """The tensors of `bind`'s arguments in their fields, whatever the device: `matrix(tensor)` makes what it calls a matrix.

    Errors as for `needed`. ModelFileError: a rotary divisor is not positive. UnsupportedModelError: a norm that is not F32.
    """
    by_layer: dict[int | None, dict[str, Any]] = {}
    for spec in needed(gguf, config, layers, embedding, head).values():
        tensor = gguf.tensors[spec.name]
        by_layer.setdefault(spec.layer, {})[spec.kind] = matrix(tensor) if len(spec.shape) > 1 else _vector(gguf, tensor)
    ends = by_layer.pop(None, {})
    token_embd, freqs = ends.get("token_embd"), ends.get("rope_freqs")
    if freqs is not None:
        _check_divisors(gguf, freqs)
    return Weights(
        token_embd if embedding else None,
        [_layer(fields) for fields in by_layer.values()],
        ends.get("output_norm"),
        ends.get("output", token_embd) if head else None,
        freqs,
        _frequency_notices(freqs),
        [gguf],
    )


def _layer(fields: dict[str, Any]) -> Layer:
    """One block of fields that are called as in the GGUF."""

    def ffn(suffix: str) -> Dense:
        return Dense(*(fields.pop(f"ffn_{part}{suffix}") for part in Dense._fields))

    if "ffn_gate_inp" in fields:
        return Layer(ffn=Experts(fields.pop("ffn_gate_inp"), ffn("_exps"), ffn("_shexp")), **fields)
    return Layer(ffn=ffn(""), **fields)


def _vector(gguf: GGUF, tensor: Tensor) -> np.ndarray:
    if tensor.type.name != "F32":
        raise UnsupportedModelError(
            f"{gguf.path}: expected {tensor.name} as F32, found {tensor.type.name}; convert the model again"
        )
    return np.frombuffer(tensor.data, np.float32).copy()  # copied: maps need not be aligned, and norms are tiny


def conversion_notices(converted: list[str]) -> list[str]:
    """What a user should know of tensors, named with their types, that `as_half` converted."""
    if not converted:
        return []
    some = ", ".join(converted[:3])
    return [f"{len(converted)} tensors have types without fast kernels and run as F16, slower and larger: {some} ..."]


def _frequency_notices(freqs: np.ndarray | None) -> list[str]:
    if freqs is None or np.isin(freqs, (1.0, LONG_FACTOR)).all():
        return []
    return [f"{ROPE_FREQS} is not Scout's published scaling; an early upload may answer badly at length"]


def _check_divisors(gguf: GGUF, factors: np.ndarray) -> None:
    """ModelFileError unless frequencies can be divided by all of these."""
    if not (np.isfinite(factors) & (factors > 0)).all():
        raise ModelFileError(f"{gguf.path}: expected positive numbers in {ROPE_FREQS}, found others; the file is damaged")


def as_half(gguf: GGUF, tensor: Tensor) -> np.ndarray:
    """A tensor of a type without kernels as float16, converted a few rows at a time."""
    rows = tensor.data.reshape(-1, tensor.type.row_bytes(tensor.shape[-1]))
    out = np.empty((len(rows), tensor.shape[-1]), np.float16)
    step = max(1, (1 << 22) // tensor.shape[-1])
    where = f"{gguf.path}: {tensor.name}"
    for r in range(0, len(rows), step):
        out[r : r + step] = dequantize(rows[r : r + step], tensor.type, where).clip(-65504, 65504)
    return out.reshape(-1)
