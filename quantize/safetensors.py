"""Reads the tensors of a Hugging Face checkpoint as zero-copy views of its safetensors files.

In: a folder with model.safetensors, or with shards and perhaps model.safetensors.index.json. Out: tensors by name.
Headers are hostile: length, JSON, dtype, shape and offsets are checked against the size of the file before anything is
allocated; CheckpointError if they do not fit. A tensor of an unknown dtype or of size 0 is an error only when it is used, since
checkpoints hold such tensors beside the model (vision, positions).

Format: https://huggingface.co/docs/safetensors: 8 bytes with the length of the header, a JSON header, the data.
"""

import mmap
import re
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from llamacli.errors import CheckpointError, next_step
from llamacli.files.pages import map_file
from quantize.folder import parse_json, read_json

DTYPES = {  # NumPy has no bfloat16 and no FP8: their bits
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
}
MAX_DIMS = 8  # of a stored tensor
MAX_HEADER = 100_000_000  # the format's own limit
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PART = re.compile(r"(?P<stem>.*)-(?P<no>\d+)-of-(?P<count>\d+)\.safetensors", re.DOTALL)


class Stored(NamedTuple):
    """One tensor. `values` has the tensor's shape and holds the bits of BF16 and FP8; read-only, perhaps unaligned.

    `problem`: why it cannot be used, "" if it can.
    """

    name: str
    dtype: str
    values: np.ndarray
    path: Path
    problem: str = ""

    @property
    def data(self) -> np.ndarray:
        """`values`; CheckpointError if they cannot be used."""
        if self.problem:
            raise CheckpointError(self.problem)
        return self.values

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored, outermost first; CheckpointError as for `data`."""
        return self.data.shape


class Checkpoint(dict[str, Stored]):
    """Tensors by name. `maps`: the mapped files, by path."""

    def __init__(self, tensors: dict[str, Stored], maps: dict[Path, mmap.mmap]):
        super().__init__(tensors)
        self.maps = maps


def open_checkpoint(folder: Path) -> Checkpoint:
    """Map every shard; CheckpointError if one is missing, cut short or malformed."""
    shards, maps = {}, {}
    for path in shard_paths(folder):
        shards[path.name], maps[path] = _open_shard(path)
    if (folder / SINGLE).exists():
        return Checkpoint(shards[SINGLE], maps)
    found: dict[str, Stored] = {}
    if (folder / INDEX).exists():
        for name, file in _weight_map(folder).items():
            if name not in shards[file]:
                raise CheckpointError(f"{folder / file}: expected tensor {name!r:.80} in it, found none; download it again")
            found[name] = shards[file][name]
        return Checkpoint(found, maps)
    for file, tensors in shards.items():
        if twice := found.keys() & tensors.keys():
            name = min(twice)
            raise CheckpointError(f"{folder / file}: expected tensor {name!r:.80} once, found it in two files")
        found |= tensors
    return Checkpoint(found, maps)


def shard_paths(folder: Path) -> list[Path]:
    """The files that hold the tensors; CheckpointError unless all of them exist."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if not (folder / INDEX).exists():
        return _shards_by_name(folder)
    paths = [folder / file for file in sorted(set(_weight_map(folder).values()))]
    for path in paths:
        if not path.exists():
            raise CheckpointError(f"{path}: expected this shard of the checkpoint, found none; finish the download")
    return paths


def _shards_by_name(folder: Path) -> list[Path]:
    """Without an index: the one safetensors file, or NAME-00001-of-00002 and so on, none missing."""
    files = sorted(folder.glob("*.safetensors"))
    parts = [(path, match) for path in files if (match := _PART.fullmatch(path.name))]
    if len(files) == 1 and not parts:
        return files
    if not parts:
        found = "neither" if not files else f"{len(files)} safetensors files without an index"
        raise CheckpointError(f"{folder}: expected {SINGLE} or {INDEX}, found {found}; name a folder with safetensors")
    sets = {(match["stem"], int(match["count"])) for _, match in parts}
    if len(sets) > 1:
        raise CheckpointError(f"{folder}: expected {INDEX} or the shards of one model, found {len(sets)} models; add the index")
    ((_, count),) = sets
    missing = set(range(1, count + 1)) - {int(match["no"]) for _, match in parts} if count <= 99_999 else {count}
    if missing:
        found = f"no shard {min(missing)}; finish the download"
        raise CheckpointError(f"{folder}: expected {INDEX} or all {count} shards, found {found}")
    return [path for path, _ in parts]


def _weight_map(folder: Path) -> dict[str, str]:
    """The index: from the name of a tensor to that of a file in the folder."""
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX}: expected a weight_map from tensor to file, found none; download it again")
    for file in weight_map.values():
        if not file or Path(file).name != file:
            raise CheckpointError(f"{folder / INDEX}: expected plain file names, found {file!r:.80}; the index is damaged")
    return weight_map


def _open_shard(path: Path) -> tuple[dict[str, Stored], mmap.mmap]:
    try:
        size = path.stat().st_size
        if size < 8 or not path.is_file():
            raise CheckpointError(f"{path}: expected a safetensors file, found {size} bytes; download it again")
        with path.open("rb") as file:
            start, header = _header(path, file, size)
            mapped = map_file(file, size)
    except (OSError, ValueError) as error:
        found = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{path}: expected a readable file, found: {found}; {next_step(error, 'check the disk')}"
        ) from None
    header.pop("__metadata__", None)
    return {name: _view(path, mapped, start, name, entry) for name, entry in header.items()}, mapped


def _header(path: Path, file: BinaryIO, size: int) -> tuple[int, dict]:
    """Where the data starts, and the header. It is read, not mapped: a failing disk is an OSError then, no SIGBUS."""
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, MAX_HEADER):
        raise CheckpointError(f"{path}: expected a header of {length} bytes, found {size - 8} bytes in all; download it again")
    return 8 + length, parse_json(file.read(length), f"{path} (header)")


def _view(path: Path, mapped: mmap.mmap, start: int, name: str, entry) -> Stored:
    tensor = f"tensor {name!r:.80}"

    def refuse(expected: str, found) -> CheckpointError:
        return CheckpointError(f"{path}: expected {expected} for {tensor}, found {found!r:.60}; download it again")

    if not isinstance(entry, dict):
        raise refuse("dtype, shape and offsets", type(entry).__name__)
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str):
        raise refuse("a dtype", dtype)
    if not _counts(shape) or len(shape) > MAX_DIMS:
        raise refuse(f"a shape of up to {MAX_DIMS} sizes", shape)
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse("a begin and an end", offsets)
    left = len(mapped) - start
    if offsets[1] > left:
        raise CheckpointError(
            f"{path}: expected {offsets[1]} bytes of data ({tensor}), found {left}; it is cut short, download it again"
        )
    if problem := _problem(dtype, shape):
        return Stored(name, dtype, np.empty(0), path, f"{path}: expected {problem[0]} for {tensor}, found {problem[1]}")
    count = 1
    for n in shape:
        count *= n  # Python integers do not overflow
    nbytes = count * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise refuse(f"{nbytes} bytes", offsets[1] - offsets[0])
    return Stored(name, dtype, np.frombuffer(mapped, DTYPES[dtype], count, start + offsets[0]).reshape(shape), path)


def _problem(dtype: str, shape: list[int]) -> tuple[str, str] | None:
    """What was expected and found of a tensor that cannot be converted but may not be needed."""
    if 0 in shape:
        return "weights", f"none (shape {shape}); saved under DeepSpeed ZeRO-3? gather the weights and save them again"
    if dtype in ("F64", "I64", "I32", "I16", "BOOL"):
        return f"dtype {', '.join(DTYPES)}", f"{dtype}; save the model in BF16"
    if dtype not in DTYPES:
        hint = "packed formats such as NVFP4 are not read, use the BF16 or FP8 checkpoint"
        return f"dtype {', '.join(DTYPES)}", f"{dtype[:20]!r}; {hint}"
    return None


def _counts(values) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in values)
