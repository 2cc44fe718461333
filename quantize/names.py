"""Finds the tensors of a GGUF in a Hugging Face checkpoint.

In: a checkpoint's tensors and its HFConfig. Out: `{GGUF name: Rows}` in file order, and the vision tower's tensors. Names,
shapes and layouts come from llama4/tensors.py. CheckpointError: a tensor is missing, has another shape, or has no place.

FP8 weights come with scales under names of their own. Experts are stored as one stack or, in Meta's FP8 checkpoint, each
alone as a matrix [rows, columns].
"""

import re
from pathlib import Path
from typing import NamedTuple

from llamacli.errors import CheckpointError
from llamacli.llama4.tensors import HF_VISION, Spec, tensors
from quantize.encoders.widen import FP8
from quantize.hf_config import HFConfig
from quantize.safetensors import Stored
from quantize.sources import Plain, Rows, Scaled, Stack, Transposed

_PREFIXES = {"language_model.": "", "model.language_model.": "model."}  # of the text model beside a vision model
# Computed, not learned; or scales of activations and of a KV cache, for which this engine has its own precision.
_UNUSED = re.compile(r"\.rotary_emb\.inv_freq$|[._]input_scale$|\.[kv]_scale$")


def match(folder: Path, stored: dict[str, Stored], config: HFConfig) -> tuple[dict[str, Rows], dict[str, Stored]]:
    """Name, check and lay out every tensor of the text model; and those of a vision tower, without the prefix `model.`."""
    found, vision = _Found(folder, {}, {}), {}
    for name, tensor in stored.items():
        plain = next((new + name.removeprefix(old) for old, new in _PREFIXES.items() if name.startswith(old)), name)
        if name.startswith(HF_VISION):
            vision[name.removeprefix("model.")] = tensor
        elif not _UNUSED.search(plain) and not (config.model.tied and plain == "lm_head.weight"):
            if plain in found.left:
                raise CheckpointError(f"{folder}: expected tensor {plain[:80]!r} once, found it under two names")
            found.left[plain] = tensor
    rows = {spec.name: found.rows(spec) for spec in tensors(config.model) if spec.hf}
    if found.left:
        name = min(found.left)
        raise CheckpointError(f"{folder}: expected tensors of Llama 4, found {name[:80]!r}, which has no place in a GGUF")
    return rows, vision


class _Found(NamedTuple):
    """The checkpoint's tensors by name: those `left` without a place, and those `taken` with their FP8 scales."""

    folder: Path
    left: dict[str, Stored]
    taken: dict[str, tuple[Stored, Stored | None]]

    def rows(self, spec: Spec) -> Rows:
        """The rows of one GGUF tensor."""
        if spec.single and spec.single.format(0) in self.left:
            n_experts, *shape = spec.shape
            return Stack([_plain(*self.take(spec.single.format(i), tuple(shape))) for i in range(n_experts)])
        tensor, scale = self.take(spec.hf, spec.hf_shape)
        return _plain(tensor, scale) if spec.row.part is None else Transposed(tensor, *spec.row.part, scale)

    def take(self, name: str, shape: tuple[int, ...]) -> tuple[Stored, Stored | None]:
        """A tensor of this shape and for FP8 its scale. Gate and up may take the same one."""
        if name not in self.taken:
            self.taken[name] = self._checked(name, list(shape))
        return self.taken[name]

    def _checked(self, name: str, shape: list[int]) -> tuple[Stored, Stored | None]:
        if name not in self.left:
            raise CheckpointError(f"{self.folder}: expected tensor {name}, found none; the checkpoint is incomplete")
        tensor = self.left.pop(name)
        if list(tensor.shape) != shape:
            raise CheckpointError(
                f"{self.folder}: expected {name} of shape {shape}, found {list(tensor.shape)}; config.json does not fit"
            )
        if tensor.dtype not in FP8:
            return tensor, None
        scale_name = name + ("_scale" if name.endswith(".weight") else "_weight_scale")
        if scale_name not in self.left:
            raise CheckpointError(f"{self.folder}: expected {scale_name} with FP8 weights, found none; it is incomplete")
        scale, fused = self.left.pop(scale_name), len(shape) == 3
        per_row = [[shape[0], 1, shape[2]], [shape[0], shape[2]]] if fused else [[shape[0]]]
        fits = list(scale.shape) in ([], [1], [1, 1], [1, 1, 1], shape[:1], [shape[0], 1], [shape[0], 1, 1], *per_row)
        if not fits or scale.dtype in FP8 or len(shape) == 1:
            raise CheckpointError(
                f"{self.folder}: expected {scale_name} to hold one scale, or one for each row or expert, in BF16, F16 or F32, "
                f"found {scale.dtype} {list(scale.shape)}; other FP8 and FP4 formats are not read"
            )
        return tensor, scale


def _plain(tensor: Stored, scale: Stored | None) -> Rows:
    return Plain(tensor) if scale is None else Scaled(tensor, scale)
