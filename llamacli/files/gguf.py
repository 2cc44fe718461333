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
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llamacli.errors import ModelFileError, UnsupportedModelError
from llamacli.files.ggml import BY_ID, TensorType

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct codes
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
_MAX_NAME = 1 << 16
_LEAST_VALUE = 8 + 4 + 1  # an empty key, a value type, one byte
_LEAST_TENSOR = 8 + 4 + 8 + 4 + 8  # an empty name, one dimension, type, offset
_HEADER = 24
_PART = re.compile(r"(?P<stem>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_DAMAGED = "the file is cut short or damaged"


class Tensor(NamedTuple):
    """One tensor. `shape` is NumPy's order, row length last; `data` is a read-only uint8 view of the map, `path` and `offset`
    say where it lies.
    """

    name: str
    type: TensorType
    shape: tuple[int, ...]
    data: np.ndarray
    path: Path
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.data.nbytes


class GGUF(NamedTuple):
    """An open model file, all parts together. `metadata` is the first part's."""

    path: Path
    version: int
    metadata: Mapping[str, object]
    tensors: dict[str, Tensor]
    nbytes: int
    maps: list[mmap.mmap]  # kept open as long as anything points into them
    paths: list[Path]  # of the maps


def open_gguf(path: str | Path) -> GGUF:
    """Map the file, and with it the further parts of a split model.

    Raises ModelFileError, which says what is wrong, or UnsupportedModelError for a tensor type that nobody here knows.
    """
    path = Path(path)
    version, values, tensors, mapped = _open_part(path)
    maps, paths, nbytes = [mapped], [path], len(mapped)
    count = _count(path, values, "split.count", 1)
    if count > 1:
        for no, part in enumerate(_further_parts(path, values, count), 1):
            _, more_values, more, mapped = _open_part(part)
            found = _count(part, more_values, "split.no", -1), _count(part, more_values, "split.count", -1)
            if found != (no, count):
                raise _wrong(part, f"split.no {no} and split.count {count}", f"{found[0]} and {found[1]}", "download it again")
            twice = tensors.keys() & more.keys()
            if twice:
                raise _wrong(part, "each tensor in one part", f"{_show(min(twice))} in two", "the parts do not belong together")
            tensors |= more
            maps.append(mapped)
            paths.append(part)
            nbytes += len(mapped)
        expected = _count(path, values, "split.tensors.count", len(tensors))
        if expected != len(tensors):
            raise _wrong(path, f"{expected} tensors in all parts", f"{len(tensors)}", "a part is of another model")
    return GGUF(path, version, _Metadata(path, values), tensors, nbytes, maps, paths)


class _Strings(NamedTuple):
    """Where a list of strings stands; its bounds are checked, its text is decoded on demand."""

    buffer: np.ndarray  # uint8
    count: int

    def decode(self) -> list[str]:
        from llamacli.cpu.kernels.ops.strings import LENGTH, join

        found = join(self.buffer, 0).decode().split("\0")
        if len(found) == self.count + 1:
            return found[: self.count]
        raw, found, pos = self.buffer.tobytes(), [], 0  # a string holds a zero byte
        while pos < len(raw):
            end = pos + LENGTH + int.from_bytes(raw[pos : pos + LENGTH], "little")
            found.append(raw[pos + LENGTH : end].decode())
            pos = end
        return found


class _Values(dict):
    """Key to value, and beside them the struct codes of the numbers."""

    def __init__(self):
        self.codes: dict[str, str] = {}


class _Metadata(Mapping):
    """The key-value section; string lists are decoded when first read."""

    def __init__(self, path: Path, values: "_Values"):
        self._path, self._values = path, values

    def typed(self, key: str) -> object:
        """The value; a number as the NumPy scalar of the type that the file gives it."""
        value, code = self[key], self._values.codes.get(key)
        return np.dtype(code).type(value) if code else value

    def __getitem__(self, key: str) -> object:
        value = self._values[key]
        if isinstance(value, _Strings):
            try:
                value = self._values[key] = value.decode()
            except UnicodeDecodeError:
                raise _wrong(self._path, f"UTF-8 in {_show(key)}", "other bytes") from None
        return value

    def __contains__(self, key: object) -> bool:
        return key in self._values

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
            raise _wrong(self.path, f"{n} more bytes for {_show(what)} at byte {self.pos}", f"{left}")

    def number(self, code: str, what: str):
        self.need(struct.calcsize("<" + code), what)
        (value,) = struct.unpack_from("<" + code, self.buffer, self.pos)
        self.pos += struct.calcsize("<" + code)
        return value

    def string(self, what: str, most: int | None = None) -> str:
        """`most` bytes; None for free text, where bytes that are no UTF-8 do not make the model unusable."""
        n = self.number("Q", what)
        if most is not None and n > most:
            raise _wrong(self.path, f"{what} of at most {most} bytes", f"{n}")
        self.need(n, what)
        raw = self.buffer[self.pos : self.pos + n]
        self.pos += n
        try:
            return str(raw, "utf-8", "replace" if most is None else "strict")
        except UnicodeDecodeError:
            raise _wrong(self.path, f"UTF-8 in {what}", "other bytes") from None

    def value(self, kind: int, key: str):
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind], key)
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            return self.array(key)
        raise _wrong(self.path, f"a value type from 0 to 12 for {_show(key)}", f"{kind}")

    def array(self, key: str) -> np.ndarray | _Strings:
        kind, count = self.number("I", key), self.number("Q", key)
        if kind in _NUMBERS:
            dtype = np.dtype("<" + _NUMBERS[kind].replace("?", "B"))
            self.need(count * dtype.itemsize, key)
            values = np.array(self.buffer[self.pos : self.pos + count * dtype.itemsize]).view(dtype)
            self.pos += values.nbytes
            return values != 0 if _NUMBERS[kind] == "?" else values
        if kind != _STRING:
            raise _wrong(self.path, f"numbers or strings in the list {_show(key)}", f"values of type {kind}")
        from llamacli.cpu.kernels.ops.strings import end

        left = np.frombuffer(self.buffer, np.uint8, offset=self.pos)
        size = end(left, count)
        if size < 0:
            raise _wrong(self.path, f"{count} strings for {_show(key)} at byte {self.pos}", "fewer")
        self.pos += size
        return _Strings(left[:size], count)


def _open_part(path: Path) -> tuple[int, dict, dict[str, Tensor], mmap.mmap]:
    mapped = _map(path)
    cursor = _Cursor(path, memoryview(mapped))
    magic, version = mapped[:4], struct.unpack_from("<I", mapped, 4)[0]
    if magic != b"GGUF":
        raise _wrong(path, "a GGUF file", f"one that starts with {magic!r}", "make one with llamacli quantize")
    if version not in (2, 3):
        found = "a big-endian one" if version in (2 << 24, 3 << 24) else f"version {version}"
        raise _wrong(path, "GGUF version 2 or 3, little-endian", found, "convert the model again")
    cursor.pos = 8
    n_tensors, n_values = cursor.number("Q", "the tensor count"), cursor.number("Q", "the metadata count")
    cursor.need(_LEAST_TENSOR * n_tensors + _LEAST_VALUE * n_values, f"{n_tensors} tensors and {n_values} metadata values")
    values = _Values()
    for _ in range(n_values):
        key = cursor.string("a metadata key", _MAX_NAME)
        if key in values:
            raise _wrong(path, f"metadata key {_show(key)} once", "it twice")
        kind = cursor.number("I", key)
        values[key] = cursor.value(kind, key)
        if kind in _NUMBERS:
            values.codes[key] = _NUMBERS[kind]
    infos = [_info(cursor) for _ in range(n_tensors)]
    return version, values, _views(cursor, infos, _alignment(path, values)), mapped


def _map(path: Path) -> mmap.mmap:
    try:
        if path.is_dir():
            raise _wrong(path, "a GGUF file", "a folder", "name the .gguf file in it")
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise _wrong(path, "a GGUF file", "something that is not a file", "name a .gguf file")
        with path.open("rb") as file:
            if path.stat().st_size < _HEADER:
                raise _wrong(path, f"a GGUF of at least {_HEADER} bytes", f"{path.stat().st_size}", "download it again")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise _wrong(path, "a GGUF file", "nothing of that name", "check the path") from None
    except PermissionError:
        raise _wrong(path, "a GGUF file", "one that may not be read", "change its permissions") from None
    except (OSError, ValueError) as error:
        found = f"one that cannot be read ({getattr(error, 'strerror', None) or error})"
        raise _wrong(path, "a GGUF file", found, "check the path") from None


def _count(path: Path, values: dict, key: str, default: int) -> int:
    value = values.get(key, default)
    if not isinstance(value, int) or not -1 <= value <= 1 << 31:
        raise _wrong(path, f"a count in {key}", _show(repr(value)))
    return value


def _further_parts(path: Path, values: dict, count: int) -> list[Path]:
    """Paths of parts 2 to `count` of a split model, all of them there."""
    if count > 99_999:
        raise _wrong(path, "split.count up to 99999", f"{count}")
    name = _PART.fullmatch(path.name)
    if not name or int(name["count"]) != count:
        raise _wrong(path, f"a name like model-00001-of-{count:05}.gguf", "another", "give the parts their names back")
    parts = [path.with_name(f"{name['stem']}-{no:05}-of-{count:05}.gguf") for no in range(1, count + 1)]
    if int(name["no"]) != 1 or _count(path, values, "split.no", 0) != 0:
        raise _wrong(path, "the first part of a split model", f"part {int(name['no'])}", f"open {parts[0].name}")
    for no, part in enumerate(parts, 1):
        if not part.exists():
            raise _wrong(part, f"part {no} of a model of {count}", "nothing of that name", "put all parts into one folder")
    return parts[1:]


def _alignment(path: Path, values: dict) -> int:
    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise _wrong(path, "general.alignment to be a power of two up to 2^20", _show(repr(alignment)))
    return alignment


def _info(cursor: _Cursor) -> tuple[str, TensorType, tuple[int, ...], int]:
    name = cursor.string("a tensor's name", _MAX_NAME)
    n_dims = cursor.number("I", name)
    if not 1 <= n_dims <= _MAX_DIMS:
        raise _wrong(cursor.path, f"1 to {_MAX_DIMS} dimensions for tensor {_show(name)}", f"{n_dims}")
    shape = tuple(cursor.number("Q", name) for _ in range(n_dims))[::-1]
    kind, offset = cursor.number("I", name), cursor.number("Q", name)
    if kind not in BY_ID:
        expected = f"{cursor.path}: expected a known type for tensor {_show(name)}"
        raise UnsupportedModelError(f"{expected}, found type id {kind}; convert it to another type")
    return name, BY_ID[kind], shape, offset


def _views(cursor: _Cursor, infos: list, alignment: int) -> dict[str, Tensor]:
    """Tensors as views of the data section, which starts at the next aligned byte."""
    path, start = cursor.path, -(-cursor.pos // alignment) * alignment
    left = max(0, len(cursor.buffer) - start)
    tensors, ends = {}, []
    for name, kind, shape, offset in infos:
        size = 1
        for n in shape:
            size *= n  # Python's integers do not overflow
        if min(shape) < 1 or shape[-1] % kind.block:
            raise _wrong(path, f"rows of whole {kind.name} blocks of {kind.block} in {_show(name)}", f"shape {list(shape)}")
        nbytes = size // kind.block * kind.nbytes
        if offset % alignment:
            raise _wrong(path, f"tensor {_show(name)} at a multiple of {alignment} bytes", f"it at {offset}")
        if offset + nbytes > left:
            raise _wrong(path, f"{nbytes} bytes of {_show(name)} at byte {offset} of the tensor data", f"{left} bytes in all")
        if name in tensors:
            raise _wrong(path, f"tensor {_show(name)} once", "it twice")
        tensors[name] = Tensor(
            name, kind, shape, np.frombuffer(cursor.buffer, np.uint8, nbytes, start + offset), path, start + offset
        )
        ends.append((offset, offset + nbytes, name))
    ends.sort()
    for (_, end, name), (begin, _, other) in pairwise(ends):
        if begin < end:
            raise _wrong(path, f"tensor {_show(other)} behind {_show(name)}", "them overlapping")
    return tensors


def _wrong(path: Path, expected: str, found: str, hint: str = _DAMAGED) -> ModelFileError:
    return ModelFileError(f"{path}: expected {expected}, found {found}; {hint}")


def _show(text: str) -> str:
    """A name out of a file that may be hostile, fit for one line of a terminal."""
    shown = text if text.isprintable() else ascii(text)
    return shown if len(shown) <= 80 else shown[:77] + "..."
