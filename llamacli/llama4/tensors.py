"""Every tensor of a Llama 4 text model, once: its names, role, shape and layer.

`TABLE` has one row for each tensor of the model or of a layer. `tensors(config)` expands it to the tensors of one model, in the
order of a converted file; `find` and `role_of` look a GGUF name up; `check` compares a file with the table; `needed` gives the
tensors of a stage. Binding, conversion, random files, placement and the tables of the CLI are derived from it.

Shapes are in NumPy's order: the length of a row comes last. A GGUF stores the experts of a layer as one tensor
[n_experts, rows, columns]. Hugging Face stores them as x @ W, so the last two axes change places, and joins gate and up into
one tensor whose columns are the gate's rows followed by up's. Some checkpoints store each expert alone, as [rows, columns].

Sources: llama.cpp's tensor names (gguf-py, `MODEL_ARCH.LLAMA4`) and transformers' `Llama4ForCausalLM`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from llamacli.errors import ModelFileError, UnsupportedModelError

if TYPE_CHECKING:
    from llamacli.files.gguf import GGUF
    from llamacli.llama4.config import Config


class Role(StrEnum):
    """What a tensor does in the model."""

    EMBEDDING = "embedding"
    OUTPUT = "output"
    ATTENTION = "attention"
    ROUTER = "router"
    EXPERTS = "routed experts"
    SHARED = "shared experts"
    DENSE = "dense layers"
    NORM = "norms"
    ROPE = "rope"
    VISION = "vision"  # the image encoder and its projector, which are no part of the text model


class Row(NamedTuple):
    """One row of the table. `shape` names sizes in Config.

    In a layer, `name` follows `blk.N.` and `hf` follows `model.layers.N.`. `hf` is None for what no checkpoint stores.
    """

    name: str
    hf: str | None
    role: Role
    shape: tuple[str, ...]
    required: bool = True
    part: tuple[int, int] | None = None  # (i, n): part i of n of the columns of a stack of x @ W; None: stored as it is
    single: str | None = None  # the name of expert {} alone

    @property
    def kind(self) -> str:
        """The name without `.weight`, such as attn_q or ffn_down_exps."""
        return self.name.removesuffix(".weight")


class Spec(NamedTuple):
    """One tensor of a model, with full names. `single` names expert {} alone; `layer` is None outside of the layers."""

    name: str
    hf: str | None
    single: str | None
    shape: tuple[int, ...]
    layer: int | None
    row: Row

    @property
    def role(self) -> Role:
        """What it does in the model."""
        return self.row.role

    @property
    def kind(self) -> str:
        """Its name without layer and `.weight`."""
        return self.row.kind

    @property
    def required(self) -> bool:
        """Whether the model is incomplete without it."""
        return self.row.required

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of the Hugging Face tensor that holds it."""
        if self.row.part is None:
            return self.shape
        n_experts, rows, columns = self.shape
        return n_experts, columns, rows * self.row.part[1]


def _row(name: str, hf: str | None, role: Role, shape: str, **more) -> Row:
    return Row(name, hf, role, tuple(shape.split()), **more)


def _stack(name: str, stored: str, single: str, part: tuple[int, int], shape: str) -> Row:
    head = "feed_forward.experts."
    return _row(name, head + stored, Role.EXPERTS, shape, part=part, single=f"{head}{{}}.{single}.weight")


TOKEN_EMBD, OUTPUT, ROPE_FREQS = "token_embd.weight", "output.weight", "rope_freqs.weight"  # which other modules ask for

# fmt: off
FIRST = (
    _row(TOKEN_EMBD, "model.embed_tokens.weight", Role.EMBEDDING, "n_vocab n_embd"),
)
LAYER = (
    _row("attn_norm.weight", "input_layernorm.weight", Role.NORM, "n_embd"),
    _row("attn_q.weight", "self_attn.q_proj.weight", Role.ATTENTION, "n_q n_embd"),
    _row("attn_k.weight", "self_attn.k_proj.weight", Role.ATTENTION, "n_kv n_embd"),
    _row("attn_v.weight", "self_attn.v_proj.weight", Role.ATTENTION, "n_kv n_embd"),
    _row("attn_output.weight", "self_attn.o_proj.weight", Role.ATTENTION, "n_embd n_q"),
    _row("attn_q.bias", None, Role.ATTENTION, "n_q", required=False),
    _row("attn_k.bias", None, Role.ATTENTION, "n_kv", required=False),
    _row("attn_v.bias", None, Role.ATTENTION, "n_kv", required=False),
    _row("attn_output.bias", None, Role.ATTENTION, "n_embd", required=False),
    _row("ffn_norm.weight", "post_attention_layernorm.weight", Role.NORM, "n_embd"),
)
DENSE = (
    _row("ffn_gate.weight", "feed_forward.gate_proj.weight", Role.DENSE, "n_ff n_embd"),
    _row("ffn_up.weight", "feed_forward.up_proj.weight", Role.DENSE, "n_ff n_embd"),
    _row("ffn_down.weight", "feed_forward.down_proj.weight", Role.DENSE, "n_embd n_ff"),
)
MOE = (
    _row("ffn_gate_inp.weight", "feed_forward.router.weight", Role.ROUTER, "n_experts n_embd"),
    _stack("ffn_gate_exps.weight", "gate_up_proj", "gate_proj", (0, 2), "n_experts n_ff_exp n_embd"),
    _stack("ffn_up_exps.weight", "gate_up_proj", "up_proj", (1, 2), "n_experts n_ff_exp n_embd"),
    _stack("ffn_down_exps.weight", "down_proj", "down_proj", (0, 1), "n_experts n_embd n_ff_exp"),
    _row("ffn_gate_shexp.weight", "feed_forward.shared_expert.gate_proj.weight", Role.SHARED, "n_ff_exp n_embd"),
    _row("ffn_up_shexp.weight", "feed_forward.shared_expert.up_proj.weight", Role.SHARED, "n_ff_exp n_embd"),
    _row("ffn_down_shexp.weight", "feed_forward.shared_expert.down_proj.weight", Role.SHARED, "n_embd n_ff_exp"),
)
LAST = (
    _row("output_norm.weight", "model.norm.weight", Role.NORM, "n_embd"),
    _row(OUTPUT, "lm_head.weight", Role.OUTPUT, "n_vocab n_embd"),  # absent where the embedding is used again
    _row(ROPE_FREQS, None, Role.ROPE, "n_rot", required=False),  # divisors of the frequencies; computed, not stored
    _row("rope_factors_long.weight", None, Role.ROPE, "n_rot", required=False),
    _row("rope_factors_short.weight", None, Role.ROPE, "n_rot", required=False),
)
# fmt: on
TABLE = (*FIRST, *LAYER, *DENSE, *MOE, *LAST)
VISION = ("v.", "mm.")  # how GGUF names of the vision tower begin
HF_VISION = ("vision_model.", "multi_modal_projector.", "model.vision_model.", "model.multi_modal_projector.")

_IN_LAYERS = {row.name: row for row in (*LAYER, *DENSE, *MOE)}
_OUTSIDE = {row.name: row for row in (*FIRST, *LAST)}
_LAYER_NAME = re.compile(r"blk\.(\d{1,9})\.(.+)", re.DOTALL)


def tensors(config: "Config") -> Iterator[Spec]:
    """Every tensor that a model of this config has or, where not `required`, may have; in the order of a converted file."""

    def expand(rows: tuple[Row, ...], layer: int | None = None) -> Iterator[Spec]:
        head, hf_head = ("", "") if layer is None else (f"blk.{layer}.", f"model.layers.{layer}.")
        for row in rows:
            shape = tuple(getattr(config, size) for size in row.shape)
            yield Spec(head + row.name, row.hf and hf_head + row.hf, row.single and hf_head + row.single, shape, layer, row)

    yield from expand(FIRST)
    for layer in range(config.n_layers):
        yield from expand(LAYER + (MOE if config.is_moe(layer) else DENSE), layer)
    yield from expand(tuple(row for row in LAST if not (config.tied and row.role is Role.OUTPUT)))


def find(name: str) -> tuple[Row, int | None] | None:
    """The row and the layer (None outside of the layers) of a GGUF name of any model; None for an unknown name."""
    if found := _LAYER_NAME.fullmatch(name):
        row, layer = _IN_LAYERS.get(found[2]), int(found[1])
        return (row, layer) if row and name == f"blk.{layer}.{row.name}" else None
    return (_OUTSIDE[name], None) if name in _OUTSIDE else None


def role_of(name: str) -> Role | None:
    """The role of a GGUF name of any model; None for an unknown name."""
    if name.startswith(VISION):
        return Role.VISION
    found = find(name)
    return found[0].role if found else None


def kinds(*roles: Role) -> tuple[str, ...]:
    """The kinds of tensors of some roles, such as attn_q or ffn_down_exps."""
    return tuple(row.kind for row in TABLE if row.role in roles)


def check(where: object, shapes: Mapping[str, tuple[int, ...]], specs: Iterable[Spec], complete: bool = False) -> list[Spec]:
    """Compare a file's tensors with `specs`; returns those that are present, in order.

    `where` names the file in messages, `shapes` are its tensors by GGUF name. `complete` refuses every name that is not in
    `specs`. ModelFileError: a required tensor is missing, one has another shape, or one has no place.
    """
    specs = list(specs)
    found = [spec for spec in specs if spec.name in shapes]
    for spec in specs:
        if spec.name not in shapes and spec.required:
            raise ModelFileError(f"{where}: expected tensor {spec.name} {list(spec.shape)}, found none; the file is incomplete")
        if spec.name in shapes and tuple(shapes[spec.name]) != spec.shape:
            raise ModelFileError(
                f"{where}: expected {spec.name} as {list(spec.shape)}, found {list(shapes[spec.name])}; "
                f"metadata and tensors disagree"
            )
    if complete and (more := sorted(shapes.keys() - {spec.name for spec in specs})):
        raise ModelFileError(f"{where}: expected tensors of Llama 4, found {more[0][:80]!r}, which has no place in its GGUF")
    return found


def layer_of(name: str) -> int | None:
    """The layer of a tensor of the text model; None if it belongs to none."""
    found = find(name)
    return found[1] if found else None


def needed(
    gguf: "GGUF", config: "Config", layers: range | None = None, embedding: bool = True, head: bool = True
) -> dict[str, Spec]:
    """The tensors of a file that a stage of these layers binds, by name, checked before a byte of them is read.

    `layers`: None for all. `embedding`, `head`: whether the stage looks up embeddings, makes logits. A model whose embedding is
    also the output (`config.tied`) needs it for both. ModelFileError: a tensor is missing or has another shape than the
    metadata ask for, or the file has other layers only. UnsupportedModelError: attention has biases, which would change the
    result and which no device adds.
    """
    layers = range(config.n_layers) if layers is None else layers
    ends = {"rope_freqs": True, "token_embd": embedding or (head and config.tied), "output_norm": head, "output": head}
    wanted = [spec for spec in tensors(config) if (ends.get(spec.kind) if spec.layer is None else spec.layer in layers)]
    held = {layer for name in gguf.tensors if (layer := layer_of(name)) is not None}
    if held and not held.issuperset(layers) and len(held) == max(held) - min(held) + 1:
        raise ModelFileError(
            f"{gguf.path}: expected layers {layers.start} to {layers.stop - 1}, found {min(held)} to {max(held)} only; such a "
            f"file, made by quantize --layers, is for a node of a cluster: give the whole file"
        )
    found = check(gguf.path, {name: tensor.shape for name, tensor in gguf.tensors.items()}, wanted)
    if more := [spec.name for spec in found if spec.role is Role.ATTENTION and not spec.required]:
        raise UnsupportedModelError(f"{gguf.path}: expected attention without biases, found {more[0]}; this engine has none")
    return {spec.name: spec for spec in found}
