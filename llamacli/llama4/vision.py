"""Llama 4's vision tower: its sizes, and every tensor of it once, in the names of three kinds of file.

In: a GGUF in llama.cpp's dialect (a file of its own, `mmproj-NAME.gguf`) or in Ollama's (the tower inside the model's file).
Out: a frozen `VisionConfig` within `BOUNDS`; `tensors(config)` with names and shapes. `VisionConfig.metadata` is the way back.

`TABLE` has the names of llama.cpp, Ollama and Hugging Face. Shapes are in NumPy's order, the length of a row last.
Sources: llama.cpp's `tools/mtmd/clip.cpp`, Ollama's `convert_llama4.go`, transformers' `Llama4VisionModel`. The epsilon of the
layer norms is 1e-5 in every model, whatever a configuration says: transformers does not read it.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llamacli.errors import ModelFileError, UnsupportedModelError
from llamacli.files.gguf import GGUF, Tensor, text_of

EPS, ROPE_THETA, SHUFFLE, MOST_TILES = 1e-5, 10000.0, 2, 16
BOUNDS = {  # least and most of what is read from a file
    "n_layers": (1, 1 << 8),
    "n_embd": (4, 1 << 14),
    "n_heads": (1, 1 << 8),
    "n_ff": (1, 1 << 16),
    "image_size": (1, 1 << 11),
    "patch_size": (1, 1 << 8),
    "n_text": (1, 1 << 17),
    "most_tiles": (1, 64),
}


MOST_PIXELS = 1 << 25  # of all tiles of a picture; Llama 4's have 1 << 21


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of a tower and its projector."""

    n_layers: int
    n_embd: int
    n_heads: int
    n_ff: int
    image_size: int  # pixels of a tile's side
    patch_size: int
    n_mlp: int  # between the adapter's two products
    n_out: int  # width of the adapter's result
    n_text: int  # width of the text model's embedding
    most_tiles: int = MOST_TILES
    rope_theta: float = ROPE_THETA

    @property
    def head_dim(self) -> int:
        """Elements of a head."""
        return self.n_embd // self.n_heads

    @property
    def side(self) -> int:
        """Patches along a side of a tile."""
        return self.image_size // self.patch_size

    @property
    def n_patches(self) -> int:
        """Patches of a tile."""
        return self.side**2

    @property
    def n_positions(self) -> int:
        """Rows of a tile in the tower: its patches, then the class token."""
        return self.n_patches + 1

    @property
    def n_pixels(self) -> int:
        """Numbers of a patch."""
        return 3 * self.patch_size**2

    @property
    def n_shuffled(self) -> int:
        """Width of SHUFFLE x SHUFFLE patches side by side."""
        return self.n_embd * SHUFFLE**2

    @property
    def n_rows(self) -> int:
        """Rows of features of a tile."""
        return self.n_patches // SHUFFLE**2

    @property
    def products(self) -> int:
        """Multiply-adds for one tile, attention included."""
        layer = 4 * self.n_embd**2 + 2 * self.n_embd * self.n_ff + 2 * self.n_positions * self.n_embd
        adapter = self.n_shuffled * self.n_mlp + self.n_mlp * self.n_out + self.n_out * self.n_text
        return self.n_positions * (layer * self.n_layers + self.n_pixels * self.n_embd) + self.n_rows * adapter

    @property
    def metadata(self) -> dict[str, object]:
        """The fields of a file that llama.cpp reads, without name and type, and two that only llamacli reads, at the end."""
        fields = {
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "embedding_length": self.n_embd,
            "feed_forward_length": self.n_ff,
            "block_count": self.n_layers,
            "attention.head_count": self.n_heads,
            "projection_dim": self.n_text,
            "attention.layer_norm_epsilon": EPS,
            "image_mean": np.full(3, 0.5, np.float32),
            "image_std": np.full(3, 0.5, np.float32),
            "projector.scale_factor": SHUFFLE,
            "preproc_max_tiles": self.most_tiles,
            "rope.freq_base": self.rope_theta,
        }
        head = {"clip.has_vision_encoder": True, "clip.projector_type": "llama4", "clip.use_gelu": True}
        return head | {f"clip.vision.{key}": value for key, value in fields.items()}

    @classmethod
    def from_gguf(cls, gguf: GGUF) -> "VisionConfig":
        """Read and check the metadata; UnsupportedModelError for another tower, ModelFileError for impossible numbers."""
        read = _Reader(gguf)
        head = "llama4.vision." if has_ollama_tower(gguf) else "clip.vision."
        if head == "clip.vision.":
            kind = text_of(gguf.metadata, "clip.projector_type") or text_of(gguf.metadata, "clip.vision.projector_type")
            if text_of(gguf.metadata, "general.architecture") != "clip" or kind != "llama4":
                raise UnsupportedModelError(f"{gguf.path}: expected a vision tower of Llama 4, found {_found(gguf, kind)}")
        tensors = renamed(gguf)
        fc1, fc2 = (_matrix(gguf, tensors, f"mm.model.mlp.{n}.weight") for n in (1, 2))
        text = _matrix(gguf, tensors, "mm.model.fc.weight")
        config = cls(
            **{
                name: read.count(head + key, *BOUNDS[name])
                for name, key in {
                    "n_layers": "block_count",
                    "n_embd": "embedding_length",
                    "n_heads": "attention.head_count",
                    "n_ff": "feed_forward_length",
                    "image_size": "image_size",
                    "patch_size": "patch_size",
                }.items()
            },
            n_mlp=fc1[0],
            n_out=fc2[0],
            n_text=text[0],
            most_tiles=read.count("clip.vision.preproc_max_tiles", *BOUNDS["most_tiles"], default=MOST_TILES),
            rope_theta=read.real(head + "rope.freq_base", 1.0, 1e12, default=ROPE_THETA),
        )
        if head == "clip.vision.":
            for key, value in (("image_mean", 0.5), ("image_std", 0.5)):
                found = gguf.metadata.get(head + key)
                numbers = isinstance(found, np.ndarray) and found.shape == (3,)
                if found is not None and not (numbers and np.allclose(found.astype(float), value)):
                    raise UnsupportedModelError(f"{gguf.path}: expected {head}{key} of 0.5, found {found!r:.40}")
            read.same(head + "projector.scale_factor", SHUFFLE)
        config.check(gguf.path)
        return config

    def check(self, where: object, error: type[Exception] = ModelFileError) -> None:
        """Raise `error` if the sizes do not fit together."""
        for name, (least, most) in BOUNDS.items():
            if not least <= getattr(self, name) <= most:
                raise error(f"{where}: expected {name} of the vision tower from {least} to {most}, found {getattr(self, name)}")
        if (pixels := self.most_tiles * self.image_size**2) > MOST_PIXELS:
            raise error(f"{where}: expected tiles of at most {MOST_PIXELS} pixels in all, found {pixels}")
        if self.n_embd % self.n_heads or self.head_dim % 4:
            raise error(f"{where}: expected heads of a multiple of 4 elements, found {self.n_embd} in {self.n_heads} heads")
        if self.image_size % self.patch_size or self.side % SHUFFLE:
            raise error(
                f"{where}: expected tiles of an even number of patches, found {self.image_size} pixels in patches of "
                f"{self.patch_size}"
            )


def has_ollama_tower(gguf: GGUF) -> bool:
    """Whether a model's file has the tower inside, as Ollama writes it."""
    return text_of(gguf.metadata, "general.architecture") == "llama4" and "llama4.vision.block_count" in gguf.metadata


def has_tower(gguf: GGUF) -> bool:
    """Whether a file has a tower, in either dialect."""
    return text_of(gguf.metadata, "general.architecture") == "clip" or has_ollama_tower(gguf)


class Row(NamedTuple):
    """One row of the table. In a layer, names follow `v.blk.N.` and `vision_model.model.layers.N.`."""

    name: str  # llama.cpp's
    ollama: str
    hf: str
    shape: tuple[str, ...]  # sizes in VisionConfig


class Spec(NamedTuple):
    """One tensor of a tower, with full names."""

    name: str
    ollama: str
    hf: str
    shape: tuple[int, ...]
    required: bool = True

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Its shape in a checkpoint."""
        return self.shape


def _row(name: str, ollama: str, hf: str, shape: str) -> Row:
    return Row(name, ollama, hf, tuple(shape.split()))


# fmt: off
FIRST = (
    _row("v.class_embd", "v.class_embedding", "class_embedding", "n_embd"),
    _row("v.patch_embd.weight", "v.patch_embedding.weight", "patch_embedding.linear.weight", "n_embd n_pixels"),
    _row("v.position_embd.weight", "v.positional_embedding_vlm", "positional_embedding_vlm", "n_positions n_embd"),
    *(_row(f"v.pre_ln.{p}", f"v.layernorm_pre.{p}", f"layernorm_pre.{p}", "n_embd") for p in ("weight", "bias")),
)
LAYER = tuple(
    _row(f"{name}.{p}", f"{ollama}.{p}", f"{hf}.{p}", shape if p == "weight" else shape.split()[0])
    for name, ollama, hf, shape in (
        ("ln1", "attn_norm", "input_layernorm", "n_embd"),
        ("attn_q", "attn_q", "self_attn.q_proj", "n_embd n_embd"),
        ("attn_k", "attn_k", "self_attn.k_proj", "n_embd n_embd"),
        ("attn_v", "attn_v", "self_attn.v_proj", "n_embd n_embd"),
        ("attn_out", "attn_output", "self_attn.o_proj", "n_embd n_embd"),
        ("ln2", "ffn_norm", "post_attention_layernorm", "n_embd"),
        ("ffn_up", "mlp.fc1", "mlp.fc1", "n_ff n_embd"),
        ("ffn_down", "mlp.fc2", "mlp.fc2", "n_embd n_ff"),
    )
    for p in ("weight", "bias")
)
LAST = (
    *(_row(f"v.post_ln.{p}", f"v.layernorm_post.{p}", f"layernorm_post.{p}", "n_embd") for p in ("weight", "bias")),
    _row("mm.model.mlp.1.weight", "v.vision_adapter.mlp.fc1.weight", "vision_adapter.mlp.fc1.weight", "n_mlp n_shuffled"),
    _row("mm.model.mlp.2.weight", "v.vision_adapter.mlp.fc2.weight", "vision_adapter.mlp.fc2.weight", "n_out n_mlp"),
    _row("mm.model.fc.weight", "mm.linear_1.weight", "multi_modal_projector.linear_1.weight", "n_text n_out"),
)
# fmt: on


def tensors(config: VisionConfig) -> Iterator[Spec]:
    """Every tensor of a tower and its projector, in the order of a converted file. `Spec.hf` has no prefix of the model."""

    def expand(row: Row, layer: int | None = None) -> Spec:
        head, hf = ("", "") if layer is None else (f"v.blk.{layer}.", f"model.layers.{layer}.")
        name = hf + row.hf if row.hf.startswith("multi_modal") else f"vision_model.{hf}{row.hf}"
        return Spec(head + row.name, head + row.ollama, name, tuple(getattr(config, size) for size in row.shape))

    yield from map(expand, FIRST)
    for layer in range(config.n_layers):
        yield from (expand(row, layer) for row in LAYER)
    yield from map(expand, LAST)


def renamed(gguf: GGUF) -> dict[str, Tensor]:
    """The tower's tensors of a file by llama.cpp's names.

    llama.cpp's converter writes `ln2` as `attn_post_norm`, because its table of names lists one name twice. Such a tensor is
    returned as `ln2`.
    """
    found = {name: tensor for name, tensor in gguf.tensors.items() if name.startswith(("v.", "mm."))}
    if not has_ollama_tower(gguf):
        return {_repaired(name, found): tensor for name, tensor in found.items()}
    outside = {row.ollama: row.name for row in (*FIRST, *LAST)}
    inside = {row.ollama: row.name for row in LAYER}

    def name_of(name: str) -> str:
        head, layer, rest = (*name.split(".", 3)[1:], "", "", "")[:3]
        if head == "blk":
            return f"v.blk.{layer}.{inside.get(rest, rest)}"
        return outside.get(name, outside.get(name.removesuffix(".weight"), name))

    return {name_of(name): tensor for name, tensor in found.items()}


def _repaired(name: str, names: Mapping) -> str:
    proper = name.replace(".attn_post_norm.", ".ln2.")
    return name if proper in names else proper


def _matrix(gguf: GGUF, tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    found = tensors.get(name)
    if found is None or len(found.shape) != 2:
        raise ModelFileError(f"{gguf.path}: expected a matrix {name}, found none; the file has no whole vision tower")
    return found.shape


def _found(gguf: GGUF, kind: object) -> str:
    architecture = str(gguf.metadata.get("general.architecture"))[:40]
    return f"architecture {architecture!r}" + (f" with projector {str(kind)[:40]!r}" if kind is not None else "")


class _Reader:
    """Checked values of the metadata."""

    def __init__(self, gguf: GGUF):
        self._gguf = gguf

    def count(self, key: str, least: int, most: int, default: int | None = None) -> int:
        """A whole number in bounds."""
        value = self._gguf.metadata.get(key, default)
        if type(value) is not int or not least <= value <= most:
            raise self._wrong(key, f"a whole number from {least} to {most}", value)
        return value

    def real(self, key: str, least: float, most: float, default: float) -> float:
        """A finite number in bounds."""
        value = self._gguf.metadata.get(key, default)
        if type(value) not in (int, float) or not math.isfinite(value) or not least <= value <= most:
            raise self._wrong(key, f"a number from {least:g} to {most:g}", value)
        return float(value)

    def same(self, key: str, value: int) -> None:
        """ModelFileError if the file has another value."""
        found = self._gguf.metadata.get(key, value)
        if type(found) is not int or found != value:
            raise self._wrong(key, str(value), found)

    def _wrong(self, key: str, expected: str, found: object) -> ModelFileError:
        shown = "no such key" if found is None else repr(found)[:60]
        return ModelFileError(f"{self._gguf.path}: expected {key} to be {expected}, found {shown}; the file is damaged")
