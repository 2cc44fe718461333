"""Plans the output before a byte of it is written: each tensor's type, size, file and offset.

In: rows by tensor name, their types, metadata. Out: `Plan`.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llamacli.errors import UsageError
from llamacli.files.ggml import TensorType
from quantize.sources import Rows
from quantize.writer import ALIGNMENT, header

MAX_PARTS = 65535
PLACE, INFO = 256, 64  # upper bounds, in bytes: the keys of a split; one tensor's entry without its name


class Planned(NamedTuple):
    """One tensor of the file. `offset` counts from the start of the data."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    nbytes: int
    offset: int
    source: Rows

    @property
    def n_weights(self) -> int:
        """Number of weights."""
        return self.nbytes // self.type.nbytes * self.type.block


class Part(NamedTuple):
    """One file: `head` is everything before the data, `nbytes` the size of the whole."""

    head: bytes
    tensors: list[Planned]
    nbytes: int


class Plan(NamedTuple):
    """The output: one file, or several of which the first is the one to open."""

    parts: list[Part]

    @property
    def tensors(self) -> list[Planned]:
        """All of them, in order."""
        return [tensor for part in self.parts for tensor in part.tensors]

    @property
    def nbytes(self) -> int:
        """Bytes of all files together."""
        return sum(part.nbytes for part in self.parts)

    def paths(self, out: Path) -> list[Path]:
        """The names of the files: `out`, or NAME-00001-of-00003.gguf and so on."""
        count = len(self.parts)
        if count == 1:
            return [out]
        stem, suffix = out.name.removesuffix(".gguf"), ".gguf"
        return [out.with_name(f"{stem}-{no:05d}-of-{count:05d}{suffix}") for no in range(1, count + 1)]


def make_plan(
    metadata: dict[str, object], rows: dict[str, Rows], types: dict[str, TensorType], split_max_size: int | None = None
) -> Plan:
    """Lay tensors out one after another, each at an aligned offset, in files of at most `split_max_size` bytes.

    A larger tensor gets a file of its own. The first file carries the metadata; the others carry only their place in the split,
    as llama.cpp's llama-gguf-split writes it. UsageError: more files than a name can number.
    """
    sized = []
    for name, source in rows.items():
        kind = types[name]
        sized.append((name, kind, source, kind.row_bytes(source.shape[-1]) * math.prod(source.shape[:-1])))
    groups = [sized] if split_max_size is None else _groups(metadata, sized, split_max_size)
    if len(groups) > MAX_PARTS:
        raise UsageError(f"--split-max-size: expected at most {MAX_PARTS} files, found {len(groups)}; allow larger ones")
    if len(groups) == 1:
        return Plan([_part(metadata, groups[0])])
    parts = []
    for no, group in enumerate(groups):
        place = {"split.no": np.uint16(no), "split.count": np.uint16(len(groups)), "split.tensors.count": np.int32(len(sized))}
        parts.append(_part((metadata if no == 0 else {}) | place, group))
    return Plan(parts)


def _groups(metadata: dict[str, object], sized: list[tuple], most: int) -> list[list[tuple]]:
    """Tensors in order, each file filled as far as `most` bytes allow."""
    groups, size = [[]], len(header(metadata, [])) + PLACE
    for one in sized:
        nbytes = -(-one[3] // ALIGNMENT) * ALIGNMENT + len(one[0]) + INFO
        if groups[-1] and size + nbytes > most:
            groups.append([])
            size = PLACE
        groups[-1].append(one)
        size += nbytes
    return groups


def _part(metadata: dict[str, object], group: list[tuple]) -> Part:
    tensors, offset = [], 0
    for name, kind, source, nbytes in group:
        tensors.append(Planned(name, kind, source.shape, nbytes, offset, source))
        offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
    head = header(metadata, [(t.name, t.type, t.shape, t.offset) for t in tensors])
    return Part(head, tensors, len(head) + offset)
