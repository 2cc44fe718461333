"""Open a GGUF: one or more mapped files, metadata through a bounds-checked cursor, tensors as zero-copy views.

In: the path of a file, or of the first part of a split model. Out: `GGUF` with `.metadata` and `.tensors`. Every count is held
against the bytes that are left before anything is allocated, so a hostile or cut file costs a ModelFileError and nothing else.
Lists of strings (vocabularies) are only measured on opening and decoded when asked for. Knows nothing of architectures.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llamacli.errors import ModelFileError, UnsupportedModelError
from llamacli.ggml import BY_ID, TensorType

_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}  # value type -> struct code
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
_MAX_NAME = 1 << 16
_PART = re.compile(r"^(?P<stem>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf$")


class Tensor(NamedTuple):
    """One tensor. `shape` is NumPy's order, row length last; `data` is a read-only uint8 view of the map."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    data: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.data.nbytes


class GGUF(NamedTuple):
    """An open model file, all parts together."""

    path: Path
    version: int
    metadata: Mapping[str, object]
    tensors: dict[str, Tensor]
    nbytes: int
    maps: list[mmap.mmap]  # kept open as long as anything points into them


class _Strings(NamedTuple):
    """Where a list of strings stands: decoded on demand."""

    buffer: memoryview
    start: int
    count: int

    def decode(self, path: Path, key: str) -> list[str]:
        found, pos, buffer, length = [], self.start, self.buffer, struct.Struct("<Q").unpack_from
        try:
            for _ in range(self.count):
                end = pos + 8 + length(buffer, pos)[0]
                found.append(str(buffer[pos + 8 : end], "utf-8"))
                pos = end
        except UnicodeDecodeError as error:
            raise ModelFileError(
                f"{path}: expected UTF-8 in {key}, found bytes that are not ({error.reason}); the file is damaged"
            ) from None
        return found


class _Metadata(Mapping):
    """The key-value section; string lists are decoded when first read."""

    def __init__(self, path: Path, values: dict[str, object]):
        self._path, self._values = path, values

    def __getitem__(self, key: str) -> object:
        value = self._values[key]
        if isinstance(value, _Strings):
            value = self._values[key] = value.decode(self._path, key)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class _Cursor:
    """Reads forward through a part's bytes and never past their end."""

    def __init__(self, path: Path, buffer: memoryview):
        self.path, self.buffer, self.pos = path, buffer, 0

    def need(self, n: int, what: str) -> None:
        left = len(self.buffer) - self.pos
        if n > left:
            raise ModelFileError(
                f"{self.path}: expected {n} more bytes for {what} at byte {self.pos}, found {left}; the file is cut short or damaged"
            )

    def number(self, code: str, what: str):
        size = struct.calcsize("<" + code)
        self.need(size, what)
        (value,) = struct.unpack_from("<" + code, self.buffer, self.pos)
        self.pos += size
        return value

    def string(self, what: str, limit: int | None = None) -> str:
        n = self.number("Q", f"the length of {what}")
        if limit is not None and n > limit:
            raise ModelFileError(f"{self.path}: expected {what} of at most {limit} bytes, found {n}; the file is damaged")
        self.need(n, what)
        raw = self.buffer[self.pos : self.pos + n]
        self.pos += n
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            raise ModelFileError(f"{self.path}: expected UTF-8 in {what}, found other bytes; the file is damaged") from None

    def value(self, kind: int, key: str):
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind], key)
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            return self.array(key)
        raise ModelFileError(f"{self.path}: expected a value type from 0 to 12 for {key}, found {kind}; the file is damaged")

    def array(self, key: str):
        kind, count = self.number("I", key), self.number("Q", key)
        if kind in _NUMBERS:
            dtype = np.dtype("<" + _NUMBERS[kind]) if _NUMBERS[kind] != "?" else np.dtype(bool)
            self.need(count * dtype.itemsize, key)
            values = np.frombuffer(self.buffer, dtype, count, self.pos).copy() if count else np.empty(0, dtype)
            self.pos += count * dtype.itemsize
            return values
        if kind != _STRING:
            raise ModelFileError(
                f"{self.path}: expected a list of numbers or strings for {key}, found type {kind}; cannot be read"
            )
        self.need(8 * count, key)
        start, pos, end, length = self.pos, self.pos, len(self.buffer), struct.Struct("<Q").unpack_from
        for _ in range(count):
            if pos + 8 > end or (after := pos + 8 + length(self.buffer, pos)[0]) > end:
                self.pos = pos
                self.need(end - pos + 1, key)
            pos = after
        self.pos = pos
        return _Strings(self.buffer, start, count)


def open_gguf(path: str | Path) -> GGUF:
    """Map the file, and with it the further parts of a split model; ModelFileError says what is wrong."""
    path = Path(path)
    version, values, tensors, mapped = _open_part(path)
    maps, nbytes = [mapped], len(mapped)
    count = values.get("split.count", 1)
    if isinstance(count, int) and count > 1:
        for part in _further_parts(path, values, count):
            _, more_values, more, mapped = _open_part(part)
            if more_values.get("split.count") != count:
                raise ModelFileError(f"{part}: expected a part of {count}, found split.count {more_values.get('split.count')}")
            twice = tensors.keys() & more.keys()
            if twice:
                raise ModelFileError(
                    f"{part}: expected each tensor in one part, found {min(twice)} twice; the parts do not belong together"
                )
            tensors |= more
            maps.append(mapped)
            nbytes += len(mapped)
        expected = values.get("split.tensors.count", len(tensors))
        if expected != len(tensors):
            raise ModelFileError(f"{path}: expected {expected} tensors in all parts, found {len(tensors)}; a part is wrong")
    return GGUF(path, version, _Metadata(path, values), tensors, nbytes, maps)


def _further_parts(path: Path, values: dict, count: int) -> list[Path]:
    match = _PART.match(path.name)
    if count > 99_999 or not match or int(match["count"]) != count:
        raise ModelFileError(
            f"{path}: expected a name like model-00001-of-{min(count, 99999):05}.gguf for a part of {count}; restore the name"
        )
    if values.get("split.no", 0) != 0 or int(match["no"]) != 1:
        first = path.with_name(f"{match['stem']}-00001-of-{count:05}.gguf")
        raise ModelFileError(
            f"{path}: expected the first part of a split model, found part {int(match['no'])}; open {first.name}"
        )
    return [path.with_name(f"{match['stem']}-{no:05}-of-{count:05}.gguf") for no in range(2, count + 1)]


def _map(path: Path) -> mmap.mmap:
    try:
        if path.is_dir():
            raise ModelFileError(f"{path}: expected a GGUF file, found a folder; name the .gguf file in it")
        with path.open("rb") as file:
            if path.stat().st_size < 24:
                raise ModelFileError(
                    f"{path}: expected a GGUF of at least 24 bytes, found {path.stat().st_size}; download it again"
                )
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ModelFileError(f"{path}: expected a GGUF file, found nothing there; check the name") from None
    except (OSError, ValueError) as error:
        raise ModelFileError(
            f"{path}: expected a readable GGUF file, found: {getattr(error, 'strerror', None) or error}"
        ) from None


def _open_part(path: Path):
    mapped = _map(path)
    cursor = _Cursor(path, memoryview(mapped))
    magic, version = bytes(cursor.buffer[:4]), struct.unpack_from("<I", cursor.buffer, 4)[0]
    if magic != b"GGUF":
        raise ModelFileError(
            f"{path}: expected a GGUF file, found one that starts with {magic!r}; convert it with `llamacli quantize`"
        )
    if version not in (2, 3):
        what = "a big-endian file" if version in (2 << 24, 3 << 24) else f"version {version}"
        raise ModelFileError(f"{path}: expected GGUF version 2 or 3, little-endian, found {what}; convert the model again")
    cursor.pos = 8
    n_tensors, n_values = cursor.number("Q", "the tensor count"), cursor.number("Q", "the metadata count")
    cursor.need(24 * n_tensors + 13 * n_values, f"{n_tensors} tensors and {n_values} metadata values")
    values = {}
    for _ in range(n_values):
        key = cursor.string("a metadata key", _MAX_NAME)
        values[key] = cursor.value(cursor.number("I", key), key)
    infos = [_info(cursor) for _ in range(n_tensors)]
    return version, values, _views(cursor, infos, _alignment(path, values)), mapped


def _alignment(path: Path, values: dict) -> int:
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment > 1 << 20 or alignment & (alignment - 1):
        raise ModelFileError(f"{path}: expected general.alignment to be a power of two, found {alignment}; the file is damaged")
    return alignment


def _info(cursor: _Cursor) -> tuple[str, TensorType, tuple[int, ...], int]:
    name = cursor.string("a tensor's name", _MAX_NAME)
    n_dims = cursor.number("I", name)
    if not 1 <= n_dims <= _MAX_DIMS:
        raise ModelFileError(
            f"{cursor.path}: expected 1 to {_MAX_DIMS} dimensions for {name}, found {n_dims}; the file is damaged"
        )
    dims = [cursor.number("Q", name) for _ in range(n_dims)]
    kind, offset = cursor.number("I", name), cursor.number("Q", name)
    if kind not in BY_ID:
        raise UnsupportedModelError(
            f"{cursor.path}: expected a known tensor type for {name}, found id {kind}; convert it to another type"
        )
    return name, BY_ID[kind], tuple(reversed(dims)), offset


def _views(cursor: _Cursor, infos: list, alignment: int) -> dict[str, Tensor]:
    """Tensors as views of the data section, which starts at the next aligned byte."""
    path, start = cursor.path, -(-cursor.pos // alignment) * alignment
    left = len(cursor.buffer) - start
    tensors = {}
    for name, kind, shape, offset in infos:
        size = 1
        for n in shape:
            size *= n  # Python integers do not overflow
        if min(shape) < 1 or shape[-1] % kind.block:
            raise ModelFileError(
                f"{path}: expected rows of whole {kind.name} blocks of {kind.block} in {name}, found shape {list(shape)}"
            )
        nbytes = size // kind.block * kind.nbytes
        if offset % alignment or offset + nbytes > left:
            raise ModelFileError(
                f"{path}: expected {nbytes} bytes of {name} at offset {offset} of the data, found {max(left, 0)} bytes of data in all;"
                " the file is cut short or damaged"
            )
        if name in tensors:
            raise ModelFileError(f"{path}: expected tensor {name} once, found it twice; the file is damaged")
        tensors[name] = Tensor(name, kind, shape, np.frombuffer(cursor.buffer, np.uint8, nbytes, start + offset))
    return tensors
