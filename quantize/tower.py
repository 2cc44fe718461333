"""The vision tower of a source, as a GGUF of its own that llama.cpp reads too (mmproj).

In: a Hugging Face folder's vision tensors and sizes, or a GGUF in llama.cpp's or Ollama's dialect. Out: `Tower`: rows by
llama.cpp's names, metadata and types. Nothing is turned or reordered: the rows are transformers'.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from llamacli.errors import CheckpointError, UsageError
from llamacli.files.ggml import BY_NAME, TensorType
from llamacli.files.gguf import GGUF
from llamacli.llama4.tensors import check
from llamacli.llama4.vision import MOST_TILES, ROPE_THETA, SHUFFLE, VisionConfig, renamed, tensors
from quantize.folder import read_json
from quantize.safetensors import Stored
from quantize.sources import Dequantized, Plain, Rows

DEFAULT = "Q8_0"
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}  # types of the matrices; llama.cpp's numbers
FULL = ("v.position_embd.weight", "v.patch_embd.weight")  # stay F32, as vectors do: small, and rows of odd lengths


class Tower(NamedTuple):
    """A tower to be written."""

    config: VisionConfig
    rows: dict[str, Rows]

    def metadata(self, name: object, type_name: str) -> dict[str, object]:
        """The fields of its file. `name`: of the model."""
        general = {"architecture": "clip", "type": "mmproj"} | ({"name": name} if name else {})
        general |= {"file_type": FILE_TYPES[type_name], "quantization_version": 2}
        return {f"general.{key}": value for key, value in general.items()} | self.config.metadata

    def types(self, type_name: str) -> dict[str, TensorType]:
        """Every tensor's type; F16 where rows are no whole number of blocks."""
        kind = BY_NAME[type_name]

        def of(name: str, shape: tuple[int, ...]) -> TensorType:
            if len(shape) < 2 or name in FULL:
                return BY_NAME["F32"]
            return kind if shape[-1] % kind.block == 0 else BY_NAME["F16"]

        return {name: of(name, source.shape) for name, source in self.rows.items()}


def tower_type(name: str) -> str:
    """The type of a tower's matrices by its name in any case; UsageError for others."""
    if name.upper() not in FILE_TYPES:
        raise UsageError(f"--mmproj-type: expected {', '.join(FILE_TYPES)} or none, found {name!r}")
    return name.upper()


def beside(out: Path) -> Path:
    """The name of the tower's file beside a model's."""
    return out.with_name(f"mmproj-{out.name.removesuffix('.gguf')}.gguf")


def of_gguf(gguf: GGUF) -> Tower:
    """The tower of a GGUF that has one. ModelFileError or UnsupportedModelError if it is unsound."""
    config, found = VisionConfig.from_gguf(gguf), renamed(gguf)
    specs = check(gguf.path, {name: tensor.shape for name, tensor in found.items()}, tensors(config))
    return Tower(config, {spec.name: Dequantized(found[spec.name]) for spec in specs})


def of_folder(folder: Path, stored: Mapping[str, Stored], n_text: int) -> Tower | None:
    """The tower of a checkpoint; `stored`: its vision tensors, without the prefix `model.`. None if config.json has none.

    CheckpointError: sizes that do not go together, a tensor that is missing or of another shape.
    """
    raw = read_json(folder / "config.json").get("vision_config")
    if not stored or not isinstance(raw, dict):
        return None
    config = _config(folder, raw, n_text)
    rows, left = {}, dict(stored)
    for spec in tensors(config):
        tensor = left.pop(spec.hf, None)
        if tensor is None:
            raise CheckpointError(
                f"{folder}: expected tensor {spec.hf}, found none; the checkpoint's vision tower is incomplete"
            )
        if tuple(tensor.shape) != spec.shape or tensor.dtype not in ("BF16", "F16", "F32"):
            raise CheckpointError(
                f"{folder}: expected {spec.hf} as {list(spec.shape)} in BF16, F16 or F32, found {list(tensor.shape)} in "
                f"{tensor.dtype}; config.json does not fit"
            )
        rows[spec.name] = Plain(tensor)
    if left:
        raise CheckpointError(f"{folder}: expected tensors of Llama 4's vision tower, found {min(left)[:80]!r}")
    return Tower(config, rows)


def _config(folder: Path, raw: dict, n_text: int) -> VisionConfig:
    """The sizes by config.json; the most tiles by the file of the picture processor, if there is one."""
    where = f"{folder / 'config.json'}: vision_config"

    def count(key: str, default: int) -> int:
        value = raw.get(key, default)
        if type(value) is not int:
            raise CheckpointError(f"{where}: expected a whole number as {key}, found {value!r:.40}; it cannot be converted")
        return value

    rope = raw.get("rope_parameters") or raw
    theta = rope.get("rope_theta", ROPE_THETA) if isinstance(rope, dict) else None
    if type(theta) not in (int, float) or not 1.0 <= theta <= 1e12:
        raise CheckpointError(f"{where}: expected a number as rope_theta, found {theta!r:.40}; it cannot be converted")
    if raw.get("pixel_shuffle_ratio", 1 / SHUFFLE) != 1 / SHUFFLE:
        raise CheckpointError(
            f"{where}: expected a pixel_shuffle_ratio of {1 / SHUFFLE}, found another; it cannot be converted"
        )
    config = VisionConfig(
        n_layers=count("num_hidden_layers", 34),
        n_embd=count("hidden_size", 768),
        n_heads=count("num_attention_heads", 16),
        n_ff=count("intermediate_size", 5632),
        image_size=count("image_size", 448),
        patch_size=count("patch_size", 14),
        n_mlp=count("projector_input_dim", 4096),
        n_out=count("vision_output_dim", 7680),
        n_text=n_text,
        most_tiles=_most_tiles(folder),
        rope_theta=float(theta),
    )
    if min(config.n_layers, config.n_embd, config.n_heads, config.image_size, config.patch_size) < 1:
        raise CheckpointError(f"{where}: expected sizes from 1, found others; it cannot be converted")
    config.check(where, CheckpointError)
    return config


def _most_tiles(folder: Path) -> int:
    """max_patches of transformers' processor, whichever file its version wrote."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            found = read_json(folder / name)
            inner = found.get("image_processor")
            value = (inner if isinstance(inner, dict) else found).get("max_patches")
            if type(value) is int and 1 <= value <= 64:
                return value
    return MOST_TILES
