"""A checkpoint's tensors as zero-copy views of mapped safetensors files, single or sharded.

In: a Hugging Face folder with model.safetensors, or with model.safetensors.index.json and its shards. Out: `{name: Stored}`.
Headers are hostile: length, JSON, dtype, shape and offsets are held against the bytes of the file before anything is made of
them; what does not fit is a CheckpointError. Knows nothing of tensor names.

Format: https://huggingface.co/docs/safetensors, 8 bytes of header length, JSON header, data.
"""

import mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llamacli.errors import CheckpointError
from quantize.folder import parse_json, read_json

DTYPES = {  # NumPy has no bfloat16 and no FP8: their bits
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
}
MAX_HEADER = 100_000_000  # the format's own limit
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Stored(NamedTuple):
    """One tensor. `data` has the tensor's shape; for BF16 and FP8 it holds the bits. Read-only, perhaps unaligned."""

    name: str
    dtype: str
    data: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored, outermost first."""
        return self.data.shape


def open_checkpoint(folder: Path) -> dict[str, Stored]:
    """Map every shard; CheckpointError when one is missing, cut short or holds what cannot be read."""
    shards = {path.name: _open_shard(path) for path in shard_paths(folder)}
    if (folder / SINGLE).exists():
        return shards[SINGLE]
    weight_map = _weight_map(folder)
    for name, file in weight_map.items():
        if name not in shards[file]:
            raise CheckpointError(f"{folder / file}: expected tensor {name} in this shard, found none; download it again")
    return {name: shards[file][name] for name, file in weight_map.items()}


def shard_paths(folder: Path) -> list[Path]:
    """The files that hold the tensors, all of them there; else a CheckpointError."""
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    paths = [folder / file for file in sorted(set(_weight_map(folder).values()))]
    for path in paths:
        if not path.exists():
            raise CheckpointError(f"{path}: expected this shard of the checkpoint, found none; finish the download")
    return paths


def _weight_map(folder: Path) -> dict[str, str]:
    """The index: from a tensor's name to that of a file in the folder."""
    if not (folder / INDEX).exists():
        raise CheckpointError(f"{folder}: expected {SINGLE} or {INDEX}, found neither; name a folder with safetensors")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX}: expected a weight_map from tensor to file, found none; download it again")
    for file in weight_map.values():
        if not file or Path(file).name != file:
            raise CheckpointError(f"{folder / INDEX}: expected plain file names, found {file!r}; the index is damaged")
    return weight_map


def _open_shard(path: Path) -> dict[str, Stored]:
    try:
        size = path.stat().st_size
        if size < 8:
            raise CheckpointError(f"{path}: expected a safetensors file, found {size} bytes; download it again")
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected a readable file, found: {getattr(error, 'strerror', None) or error}") from None
    length = int.from_bytes(mapped[:8], "little")
    if length > min(size - 8, MAX_HEADER):
        raise CheckpointError(f"{path}: expected a header of {length} bytes, found {size - 8} bytes in all; download it again")
    header = parse_json(mapped[8 : 8 + length], f"{path} (header)")
    header.pop("__metadata__", None)
    return {name: _view(path, mapped, 8 + length, name, entry) for name, entry in header.items()}


def _view(path: Path, mapped: mmap.mmap, start: int, name: str, entry) -> Stored:
    def refuse(expected: str, found) -> CheckpointError:
        return CheckpointError(f"{path}: expected {expected} for tensor {name}, found {str(found)[:60]}; download it again")

    if not isinstance(entry, dict):
        raise refuse("dtype, shape and offsets", type(entry).__name__)
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(
            f"{path}: expected dtype {', '.join(DTYPES)} for tensor {name}, found {str(dtype)[:20]}; packed formats such as "
            "NVFP4 are not read, use the BF16 or FP8 checkpoint"
        )
    if not _counts(shape) or len(shape) > 4 or 0 in shape:
        raise refuse("a shape of up to 4 sizes", shape)
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse("a begin and an end", offsets)
    count = 1
    for n in shape:
        count *= n  # Python integers do not overflow
    nbytes, left = count * DTYPES[dtype].itemsize, len(mapped) - start
    if offsets[1] - offsets[0] != nbytes:
        raise refuse(f"{nbytes} bytes", offsets[1] - offsets[0])
    if offsets[1] > left:
        raise CheckpointError(
            f"{path}: expected {offsets[1]} bytes of data (tensor {name}), found {left}; it is cut short, download it again"
        )
    return Stored(name, dtype, np.frombuffer(mapped, DTYPES[dtype], count, start + offsets[0]).reshape(shape))


def _counts(values) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)
