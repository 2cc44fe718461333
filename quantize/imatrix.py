"""Importance matrices: how large the inputs of each column of each weight were on some text.

In: a file of llama.cpp's (the GGUF of `llama-imatrix` and `llamacli imatrix`, or the older .dat), or sums that an engine
collected. Out: `Imatrix`, whose `weights` are the weights of squared errors in the encoders; and the GGUF. There a tensor NAME
has two of its own: NAME.in_sum2, float32 [n_matrices, n_cols], sums of squared inputs, and NAME.counts, float32
[n_matrices, 1]. A matrix is an expert, or the whole tensor.
"""

import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from llamacli.errors import ModelFileError, UsageError
from llamacli.files.ggml import BY_NAME
from llamacli.files.gguf import open_gguf
from quantize.general import printable
from quantize.writer import ALIGNMENT, header, write_file

SUMS, COUNTS = ".in_sum2", ".counts"
_MAX_NAME, _LEAST_ENTRY = 1 << 12, 4 + 1 + 4 + 4 + 4  # bytes in a .dat: a name of one letter, one value
MOST = 1e30  # mean square of an input; larger ones overflow float32 when they are divided by others
_HINT = "make it again with llamacli imatrix"


class Entry(NamedTuple):
    """Of one tensor: sums of squared inputs [n_matrices, n_cols] and the number of inputs [n_matrices], both float32.

    A .dat file has one row for all experts of a tensor.
    """

    sums: np.ndarray
    counts: np.ndarray


class Imatrix(NamedTuple):
    """`entries` by tensor name; `datasets` are names of texts, of which `chunk_count` windows of `chunk_size` tokens were used.

    `chunk_size` is 0 where the file does not say.
    """

    path: Path
    entries: dict[str, Entry]
    datasets: list[str]
    chunk_count: int
    chunk_size: int

    def weights(self, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """Mean squared inputs of a tensor of that shape, float32 [n_matrices, n_cols]; None if the file does not have it.

        An expert that saw no input gets the mean of those that did, all ones if none did. UsageError if the shape does not fit.
        """
        entry = self.entries.get(name)
        if entry is None:
            return None
        n_matrices, n_cols = shape[0] if len(shape) == 3 else 1, shape[-1]
        if entry.sums.size != n_matrices * n_cols or len(entry.counts) not in (1, n_matrices):
            expected = f"{n_matrices} x {n_cols} columns for {name}, as the model has"
            found = " x ".join(map(str, entry.sums.shape))
            raise UsageError(f"{self.path}: expected {expected}, found {found}; use the importance matrix of this model")
        sums = entry.sums.reshape(n_matrices, n_cols)
        counts = np.broadcast_to(entry.counts, n_matrices)
        seen = counts > 0
        means = np.ones((n_matrices, n_cols))
        means[seen] = sums[seen].astype(np.float64) / counts[seen, None]
        if seen.any():
            means[~seen] = means[seen].mean(0)
        if means.max() > MOST:
            raise ModelFileError(f"{self.path}: expected mean squares up to {MOST:g} for {name!r:.80}, found larger; {_HINT}")
        return means.astype(np.float32)

    @property
    def unseen(self) -> dict[str, list[int]]:
        """The experts without input, by tensor; tensors without such experts are left out."""
        found = {name: np.flatnonzero(entry.counts == 0).tolist() for name, entry in self.entries.items()}
        return {name: experts for name, experts in found.items() if experts}


def checked(path: Path, name: str, sums: np.ndarray, counts: np.ndarray) -> Entry:
    """An Entry of sums [n_matrices, n_cols] and counts [n_matrices]; ModelFileError unless all are finite and none negative."""
    with np.errstate(over="ignore"):  # overflow to infinity is refused below
        sums, counts = np.ascontiguousarray(sums, np.float32), np.ascontiguousarray(counts, np.float32)
    for values, what in ((sums, "sums of squares"), (counts, "counts")):
        if not (np.isfinite(values) & (values >= 0)).all():
            raise ModelFileError(
                f"{path}: expected {what} from 0 on for {name!r:.80}, found negative, infinite or NaN; {_HINT}"
            )
    return Entry(sums, counts)


def write_imatrix(imatrix: Imatrix, force: bool = False) -> None:
    """Write to `imatrix.path` as a GGUF that llama-quantize reads. OutputError if it exists, unless `force`."""
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": imatrix.datasets,
        "imatrix.chunk_count": imatrix.chunk_count,
        "imatrix.chunk_size": imatrix.chunk_size,
    }
    infos, data, offset = [], [], 0
    for name, entry in sorted(imatrix.entries.items()):
        for suffix, values in ((SUMS, entry.sums), (COUNTS, entry.counts[:, None])):
            infos.append((name + suffix, BY_NAME["F32"], values.shape, offset))
            data.append((name + suffix, values.nbytes, [memoryview(np.ascontiguousarray(values, "<f4")).cast("B")]))
            offset += -(-values.nbytes // ALIGNMENT) * ALIGNMENT
    write_file(imatrix.path, header(metadata, infos), data, force)


def read_imatrix(path: str | Path) -> Imatrix:
    """Read either format. ModelFileError if the file is neither, or damaged."""
    path = Path(path)
    if not path.is_file():
        return _read_gguf(path)  # raises the error
    with _opened(path) as file:
        legacy = file.read(4) != b"GGUF"
    return _read_dat(path) if legacy else _read_gguf(path)


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise ModelFileError(f"{path}: expected an importance matrix, found: {error.strerror}; check the file") from None


def _read_gguf(path: Path) -> Imatrix:
    file = open_gguf(path)
    names = {name.removesuffix(suffix) for suffix in (SUMS, COUNTS) for name in file.tensors if name.endswith(suffix)}
    others = [name for name in file.tensors if not name.endswith((SUMS, COUNTS))]
    if not names or others:
        found = f"tensor {others[0]!r:.80}" if others else "no tensors"
        raise ModelFileError(f"{path}: expected an importance matrix, found {found}; make one with llamacli imatrix")
    entries = {}
    for name in sorted(names):
        sums, counts = (_floats(path, file.tensors, name + suffix) for suffix in (SUMS, COUNTS))
        if counts.size != len(sums) and counts.size != 1:
            expected = f"{len(sums)} counts or one for {name!r:.80}"
            raise ModelFileError(f"{path}: expected {expected}, found {counts.size}; {_HINT}")
        entries[name] = checked(path, name, sums, counts.ravel())
    datasets = file.metadata.get("imatrix.datasets", [])
    chunks = (file.metadata.get(f"imatrix.chunk_{what}", 0) for what in ("count", "size"))
    return Imatrix(
        path, entries, datasets if isinstance(datasets, list) else [], *(n if type(n) is int and n > 0 else 0 for n in chunks)
    )


def _floats(path: Path, tensors: dict, name: str) -> np.ndarray:
    """A tensor as float32, its leading dimensions joined."""
    tensor = tensors.get(name)
    if tensor is None or tensor.type.name != "F32":
        found = "none" if tensor is None else tensor.type.name
        raise ModelFileError(f"{path}: expected {name!r:.80} as F32, found {found}; {_HINT}")
    return np.frombuffer(tensor.read(), "<f4").reshape(-1, tensor.shape[-1])


def _read_dat(path: Path) -> Imatrix:
    """The older format: int32 number of entries; each its name (int32 length), int32 calls, int32 count, float32 values; then
    perhaps int32 number of windows and the name of the text. Values are means times calls, those of all experts in a row.
    """
    with _opened(path) as file:
        left, entries = os.fstat(file.fileno()).st_size, {}
        damaged = ModelFileError(f"{path}: expected an importance matrix, found something else or half of one; {_HINT}")

        def take(n: int, least: int = 0, most: int | None = None) -> bytes:
            nonlocal left
            if not least <= n <= (left if most is None else min(most, left)):
                raise damaged
            left -= n
            return file.read(n)

        def number() -> int:
            return struct.unpack("<i", take(4))[0]

        n_entries = number()
        if not 0 < n_entries <= left // _LEAST_ENTRY:
            raise damaged
        for _ in range(n_entries):
            name = take(number(), 1, _MAX_NAME).decode("utf-8", "replace")
            calls = number()
            values = np.frombuffer(take(4 * number(), 4), "<f4")
            entries[name] = checked(path, name, values[None], np.array([max(1, calls)]))
        chunks = number() if left else 0
        datasets = [take(number()).decode("utf-8", "replace")] if left else []
    return Imatrix(path, entries, datasets, max(0, chunks), 0)


def collected(path: Path, inputs: Iterable, dataset: str, chunk_count: int, chunk_size: int) -> Imatrix:
    """An Imatrix of the sums that an engine collected (each of `inputs` has names, square_sums, counts).

    `dataset`: a file's name, whatever bytes it has.
    """
    entries = {name: checked(path, name, sums, counts) for names, sums, counts in inputs for name in names}
    return Imatrix(path, entries, [printable(dataset)], chunk_count, chunk_size)


def size_of(inputs: Iterable) -> int:
    """Bytes of a file of such sums, without its header."""
    return sum(4 * len(names) * (sums.size + counts.size) for names, sums, counts in inputs)
