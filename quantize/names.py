"""Hugging Face tensor names to GGUF tensors: a table of what each one is called, how large it must be and how it is laid out.

In: a checkpoint's tensors and the model's sizes. Out: `{gguf name: Rows}` in file order, and notices of what was left out. A
name that is not in the table, a wrong shape or a missing tensor is a CheckpointError. Knows nothing of types or files.

FP8 weights lie beside their scales. Experts may also be stored one by one, as [out, in] matrices (Meta's FP8 checkpoint).

Sizes in the table are words that `HFConfig.sizes` gives a number. Experts are stored as x @ W, so their last two axes change
places; the columns of gate_up_proj are the gate's rows and then up's.
"""

import re
from pathlib import Path
from typing import NamedTuple

from llamacli.errors import CheckpointError
from quantize.encoders.widen import FP8
from quantize.hf_config import HFConfig
from quantize.safetensors import Stored
from quantize.sources import Plain, Rows, Scaled, Stack, Transposed


class Part(NamedTuple):
    """One GGUF tensor made of a stored one: all of it, or with `of` > 1 the part `at` of its columns, turned into rows."""

    name: str
    transposed: bool = False
    at: int = 0
    of: int = 1


class Entry(NamedTuple):
    """What a stored tensor becomes, and the shape it must have."""

    shape: tuple[str, ...]
    parts: tuple[Part, ...]


def _same(name: str, *shape: str) -> Entry:
    return Entry(shape, (Part(name),))


ENDS = {
    "model.embed_tokens.weight": _same("token_embd.weight", "vocab", "hidden"),
    "model.norm.weight": _same("output_norm.weight", "hidden"),
    "lm_head.weight": _same("output.weight", "vocab", "hidden"),
}
ATTENTION = {
    "input_layernorm.weight": _same("attn_norm.weight", "hidden"),
    "self_attn.q_proj.weight": _same("attn_q.weight", "q", "hidden"),
    "self_attn.k_proj.weight": _same("attn_k.weight", "kv", "hidden"),
    "self_attn.v_proj.weight": _same("attn_v.weight", "kv", "hidden"),
    "self_attn.o_proj.weight": _same("attn_output.weight", "hidden", "q"),
    "post_attention_layernorm.weight": _same("ffn_norm.weight", "hidden"),
}
DENSE = {
    "feed_forward.gate_proj.weight": _same("ffn_gate.weight", "dense", "hidden"),
    "feed_forward.up_proj.weight": _same("ffn_up.weight", "dense", "hidden"),
    "feed_forward.down_proj.weight": _same("ffn_down.weight", "hidden", "dense"),
}
MOE = {
    "feed_forward.router.weight": _same("ffn_gate_inp.weight", "experts", "hidden"),
    "feed_forward.experts.gate_up_proj": Entry(
        ("experts", "hidden", "two expert"),
        (Part("ffn_gate_exps.weight", True, 0, 2), Part("ffn_up_exps.weight", True, 1, 2)),
    ),
    "feed_forward.experts.down_proj": Entry(("experts", "expert", "hidden"), (Part("ffn_down_exps.weight", True),)),
    "feed_forward.shared_expert.gate_proj.weight": _same("ffn_gate_shexp.weight", "expert", "hidden"),
    "feed_forward.shared_expert.up_proj.weight": _same("ffn_up_shexp.weight", "expert", "hidden"),
    "feed_forward.shared_expert.down_proj.weight": _same("ffn_down_shexp.weight", "hidden", "expert"),
}
VISION = ("vision_model.", "multi_modal_projector.", "model.vision_model.", "model.multi_modal_projector.")
PREFIX = "language_model."
# Computed, not learned; scales of activations and of a cache, which here have a precision of their own.
_UNUSED = re.compile(r"\.rotary_emb\.inv_freq$|[._]input_scale$|\.[kv]_scale$")
FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}  # and what the parts are called one by one


def expected(config: HFConfig) -> dict[str, tuple[Entry, str]]:
    """Every tensor of the model by its stored name without prefix: entry and prefix of the GGUF names; in file order."""
    found = {"model.embed_tokens.weight": (ENDS["model.embed_tokens.weight"], "")}
    for i in range(config.n_layers):
        for name, entry in (ATTENTION | (MOE if config.is_moe(i) else DENSE)).items():
            found[f"model.layers.{i}.{name}"] = (entry, f"blk.{i}.")
    found["model.norm.weight"] = (ENDS["model.norm.weight"], "")
    if not config.tied:
        found["lm_head.weight"] = (ENDS["lm_head.weight"], "")
    return found


def shapes(config: HFConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the GGUF, by config.json alone: name to shape, row length last, in file order."""
    found = {}
    for entry, prefix in expected(config).values():
        dims = [config.sizes[word] for word in entry.shape]
        for part in entry.parts:
            found[prefix + part.name] = (dims[0], dims[2] // part.of, dims[1]) if part.transposed else tuple(dims)
    return found


def match(folder: Path, stored: dict[str, Stored], config: HFConfig) -> tuple[dict[str, Rows], list[str]]:
    """Name, check and lay out every tensor of the checkpoint."""
    found, vision, notices = _Found(folder, {}, config), 0, []
    for name, tensor in stored.items():
        plain = name.removeprefix(PREFIX)
        if name.startswith(VISION):
            vision += 1
        elif not _UNUSED.search(plain) and not (config.tied and plain == "lm_head.weight"):
            found.tensors[plain] = tensor
    if vision:
        notices.append(f"{vision} vision tensors left out: the text model alone is converted")
    rows: dict[str, Rows] = {}
    for name, (entry, prefix) in expected(config).items():
        head, _, last = name.rpartition(".")
        if last in FUSED and f"{head}.0.{FUSED[last][0]}.weight" in found.tensors:
            for part, one in zip(entry.parts, FUSED[last], strict=True):
                rows[prefix + part.name] = found.experts(head, one)
            continue
        tensor, scale = found.take(name, entry.shape)
        for part in entry.parts:
            if part.transposed:
                rows[prefix + part.name] = Transposed(tensor, part.at, part.of, scale)
            else:
                rows[prefix + part.name] = Plain(tensor) if scale is None else Scaled(tensor, scale)
    if found.tensors:
        name = min(found.tensors)
        raise CheckpointError(f"{folder}: expected tensors of Llama 4, found {name[:80]!r}, which has no place in a GGUF")
    return rows, notices


class _Found(NamedTuple):
    """The tensors without a place yet."""

    folder: Path
    tensors: dict[str, Stored]
    config: HFConfig

    def take(self, name: str, words: tuple[str, ...]) -> tuple[Stored, Stored | None]:
        """A tensor of the shape that the words say, and for FP8 its scale; both have found their place."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder}: expected tensor {name}, found none; the checkpoint is incomplete")
        tensor = self.tensors.pop(name)
        shape, found = [self.config.sizes[word] for word in words], list(tensor.shape)
        if found != shape:
            raise CheckpointError(f"{self.folder}: expected {name} of shape {shape}, found {found}; config.json does not fit")
        if tensor.dtype not in FP8:
            return tensor, None
        scale_name = name + ("_scale" if name.endswith(".weight") else "_weight_scale")
        if scale_name not in self.tensors:
            raise CheckpointError(f"{self.folder}: expected {scale_name} with FP8 weights, found none; it is incomplete")
        scale, fused = self.tensors.pop(scale_name), len(shape) == 3
        per_row = [[shape[0], 1, shape[2]], [shape[0], shape[2]]] if fused else [[shape[0]]]
        fits = list(scale.shape) in ([], [1], [1, 1], [1, 1, 1], shape[:1], [shape[0], 1], [shape[0], 1, 1], *per_row)
        if not fits or scale.dtype in FP8 or len(shape) == 1:
            raise CheckpointError(
                f"{self.folder}: expected {scale_name} to hold one scale, or one for each row or expert, in BF16, F16 or F32, "
                f"found {scale.dtype} {list(scale.shape)}; other FP8 and FP4 formats are not read"
            )
        return tensor, scale

    def experts(self, head: str, one: str) -> Rows:
        """The matrices of one kind of all experts of a layer."""
        words = ("hidden", "expert") if one == "down_proj" else ("expert", "hidden")
        taken = (self.take(f"{head}.{i}.{one}.weight", words) for i in range(self.config.sizes["experts"]))
        return Stack([Plain(tensor) if scale is None else Scaled(tensor, scale) for tensor, scale in taken])
