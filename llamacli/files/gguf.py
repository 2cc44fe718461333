"""Opens a GGUF: checked metadata, tensors as zero-copy views of the mapped files.

In: the path of a file, or of the first part of a split model. Out: `GGUF` with `.metadata` and `.tensors`. The header is read,
not mapped, so that a failing disk raises an error instead of SIGBUS. Every count is checked against a limit and against the
bytes that are left before anything is allocated: a hostile or cut file leads to a ModelFileError, never to a large allocation.
Lists of strings (vocabularies) are only measured on opening and decoded on first use.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

import mmap
import re
import struct
import sys
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from llamacli.errors import ModelFileError, UnsupportedModelError, next_step
from llamacli.files.ggml import BY_ID, TensorType
from llamacli.files.pages import map_file

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct codes
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4
_MAX_NAME = 1 << 16
_MAX_KEYS, _MAX_TENSORS, _MAX_STRINGS = 1 << 14, 1 << 16, 1 << 22  # real files: under 100, 10,000 and 500,000
_MAX_HEADER = 1 << 28  # bytes; a vocabulary of 200,000 tokens takes 10 MB
_LEAST_VALUE = 8 + 4 + 1  # bytes: an empty key, a value type, one byte
_LEAST_TENSOR = 8 + 4 + 8 + 4 + 8  # bytes: an empty name, one dimension, type, offset
_FIXED = 24  # bytes before the metadata
_BLOCK = 1 << 20  # bytes read at a time
_LENGTH = struct.Struct("<Q")  # of a string, before it
_COMPILED = "llamacli.cpu.kernels.jit.loader"  # its kernels are used only where it is imported already: importing it is slow
_PART = re.compile(r"(?P<stem>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_DAMAGED = "the file is cut short or damaged"


class Tensor(NamedTuple):
    """One tensor. `shape` is in NumPy's order, row length last; `data` is a read-only uint8 view of the map; `path` and
    `offset` say where the same bytes lie on disk.
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

    def read(self) -> bytes:
        """The bytes by an ordinary read: on a cut file or a failing disk a ModelFileError, where touching `data` is SIGBUS."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                raw = file.read(self.nbytes)
        except OSError as error:
            raise _wrong(self.path, f"to read {_show(self.name)}", f"{error.strerror}", "check the disk") from None
        if len(raw) < self.nbytes:
            raise _wrong(self.path, f"{self.nbytes} bytes of {_show(self.name)}", f"{len(raw)}")
        return raw


class GGUF(NamedTuple):
    """An open model, all parts together. `metadata` is the first part's; `maps` are the mapped files, `paths` their paths."""

    path: Path
    version: int
    metadata: Mapping[str, object]
    tensors: dict[str, Tensor]
    nbytes: int
    maps: list[mmap.mmap]
    paths: list[Path]


def text_of(metadata: Mapping[str, object], key: str) -> str | None:
    """The value of a key if it is a string, else None. Comparing an array with a string would raise an error."""
    value = metadata.get(key)
    return value if isinstance(value, str) else None


def zero_ended(metadata: Mapping[str, object], key: str) -> bytes:
    """The undecoded strings of a list, each followed by a zero byte; b"" without it. ValueError: one holds a zero byte."""
    value = metadata.stored(key) if isinstance(metadata, _Metadata) else metadata.get(key)
    if not isinstance(value, (_Strings, list)):
        return b""
    joined = value.joined() if isinstance(value, _Strings) else "\0".join([*value, ""]).encode()
    if joined.count(0) != (value.count if isinstance(value, _Strings) else len(value)):
        raise ValueError(f"{key} holds a zero byte in a string")
    return joined


def open_gguf(path: str | Path) -> GGUF:
    """Map the file and the further parts of a split model.

    ModelFileError if a file is missing, unreadable or damaged; UnsupportedModelError for an unknown tensor type.
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
    """A list of strings as it lies in the file, each behind its length; bounds are checked, text is decoded on demand."""

    raw: bytes
    count: int

    def split(self) -> list[bytes]:
        """The strings, undecoded."""
        raw, found, pos = self.raw, [], 0
        for _ in range(self.count):
            start = pos + _LENGTH.size
            pos = start + _LENGTH.unpack_from(raw, pos)[0]
            found.append(raw[start:pos])
        return found

    def joined(self) -> bytes:
        """The undecoded strings, each followed by a zero byte."""
        if _COMPILED not in sys.modules:
            return b"\0".join([*self.split(), b""])
        from llamacli.cpu.kernels.ops.strings import join  # three times as fast

        return join(np.frombuffer(self.raw, np.uint8), 0)

    def decode(self) -> list[str]:
        """The strings; UnicodeDecodeError if one of them is not UTF-8."""
        joined = self.joined()
        if joined.count(0) == self.count:
            return joined.decode().split("\0")[: self.count]
        return [text.decode() for text in self.split()]  # a zero byte in a string is no separator


class _Values(dict):
    """Key to value; `codes` are the struct codes of numbers, `undecodable` the bytes of strings that are not UTF-8."""

    def __init__(self):
        self.codes: dict[str, str] = {}
        self.undecodable: dict[str, bytes] = {}


class _Metadata(Mapping):
    """The key-value section; lists of strings are decoded when first read."""

    def __init__(self, path: Path, values: "_Values"):
        self._path, self._values = path, values

    def stored(self, key: str) -> object:
        """The value of a key, None if there is none. A list of strings that has not been decoded yet is a `_Strings`."""
        return self._values.get(key)

    def typed(self, key: str) -> object:
        """The value, fit to be written again: a number as the NumPy scalar of its type in the file, text that is not UTF-8 as
        bytes (in a list, all of them).
        """
        value, code = self._values[key], self._values.codes.get(key)
        if isinstance(value, _Strings):
            try:
                return self[key]
            except ModelFileError:
                return value.split()
        return np.dtype(code).type(value) if code else self._values.undecodable.get(key, value)

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
    """Reads the head of a file forward, a block at a time, and never past its end or _MAX_HEADER."""

    def __init__(self, path: Path, file: BinaryIO, size: int):
        self.path, self.size, self.pos, self._file, self._read = path, size, 0, file, bytearray()

    def need(self, n: int, what: str) -> None:
        """Have the next `n` bytes in `_read`; ModelFileError if the file is too short."""
        left = self.size - self.pos
        if n > left:
            raise _wrong(self.path, f"{n} more bytes for {_show(what)} at byte {self.pos}", f"{left}")
        self._fill(self.pos + n)

    def _fill(self, end: int) -> None:
        if end > _MAX_HEADER:
            raise _wrong(self.path, f"metadata of at most {_MAX_HEADER >> 20} MB", "more")
        missing = end - len(self._read)
        if missing > 0:
            self._read += self._file.read(min(max(missing, _BLOCK), self.size - len(self._read)))
            if len(self._read) < end:
                raise _wrong(self.path, f"{self.size} bytes", f"{len(self._read)}")

    def number(self, code: str, what: str):
        size = struct.calcsize("<" + code)
        self.need(size, what)
        (value,) = struct.unpack_from("<" + code, self._read, self.pos)
        self.pos += size
        return value

    def raw(self, what: str) -> bytes:
        """A string's bytes."""
        n = self.number("Q", what)
        self.need(n, what)
        self.pos += n
        return self._copied(self.pos - n)

    def _copied(self, start: int) -> bytes:
        """The bytes from `start` to here, copied once: a slice of the array would be another copy."""
        with memoryview(self._read) as read:
            return bytes(read[start : self.pos])

    def name(self, what: str) -> str:
        """A string that must be short and UTF-8."""
        start = self.pos
        n = self.number("Q", what)
        if n > _MAX_NAME:
            raise _wrong(self.path, f"{what} of at most {_MAX_NAME} bytes", f"{n}")
        self.pos = start
        try:
            return self.raw(what).decode()
        except UnicodeDecodeError:
            raise _wrong(self.path, f"UTF-8 in {what}", "other bytes") from None

    def value(self, kind: int, key: str):
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind], key)
        if kind == _STRING:
            return self.raw(key)
        if kind == _ARRAY:
            return self.array(key)
        raise _wrong(self.path, f"a value type from 0 to 12 for {_show(key)}", f"{kind}")

    def array(self, key: str) -> np.ndarray | _Strings:
        kind, count = self.number("I", key), self.number("Q", key)
        if kind in _NUMBERS:
            dtype = np.dtype("<" + _NUMBERS[kind].replace("?", "B"))
            self.need(count * dtype.itemsize, key)
            values = np.frombuffer(bytes(self._read[self.pos : self.pos + count * dtype.itemsize]), dtype)
            self.pos += values.nbytes
            return values != 0 if _NUMBERS[kind] == "?" else values
        if kind != _STRING:
            raise _wrong(self.path, f"numbers or strings in the list {_show(key)}", f"values of type {kind}")
        if count > _MAX_STRINGS:
            raise _wrong(self.path, f"at most {_MAX_STRINGS} strings in the list {_show(key)}", f"{count}")
        start = self.pos
        self._skip_strings(count, key)
        return _Strings(self._copied(start), count)

    def _skip_strings(self, count: int, key: str) -> None:
        """Move past `count` strings."""
        pos, left = self.pos, count
        while left:
            left, pos = _skipped(self._read, left, pos)
            end = pos + _LENGTH.size if left else pos
            if end > self.size:
                raise _wrong(self.path, f"{count} strings for {_show(key)} at byte {self.pos}", "fewer")
            self._fill(end)
        self.pos = pos


def _skipped(read: bytearray, left: int, pos: int) -> tuple[int, int]:
    """Move past the strings from `pos` on whose lengths are in `read`: how many are left, and where the next one begins."""
    if _COMPILED in sys.modules:
        from llamacli.cpu.kernels.ops.strings import skip

        return skip(np.frombuffer(read, np.uint8), left, pos)
    length, rest, left = _LENGTH.unpack_from, range(left, 0, -1), 0
    try:
        for left in rest:  # noqa: B007 - the strings that are left when a block ends
            pos += _LENGTH.size + length(read, pos)[0]
    except (struct.error, OverflowError):  # beyond what has been read
        return left, pos
    return 0, pos


def _open_part(path: Path) -> tuple[int, dict, dict[str, Tensor], mmap.mmap]:
    try:
        if path.is_dir():
            raise _wrong(path, "a GGUF file", "a folder", "name the .gguf file in it")
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise _wrong(path, "a GGUF file", "something that is not a file", "name a .gguf file")
        with path.open("rb") as file:
            size = path.stat().st_size
            if size < _FIXED:
                raise _wrong(path, f"a GGUF of at least {_FIXED} bytes", f"{size}", "download it again")
            cursor = _Cursor(path, file, size)
            version, values, infos = _header(cursor)
            mapped = map_file(file, size)
    except FileNotFoundError:
        raise _wrong(path, "a GGUF file", "no file of that name", "check the path") from None
    except PermissionError:
        raise _wrong(path, "a GGUF file", "one that may not be read", "change its permissions") from None
    except (OSError, ValueError) as error:
        found = f"one that cannot be read ({getattr(error, 'strerror', None) or error})"
        raise _wrong(path, "a GGUF file", found, next_step(error, "check the path and the disk")) from None
    return version, values, _views(path, memoryview(mapped), cursor.pos, infos, _alignment(path, values)), mapped


def _header(cursor: _Cursor) -> tuple[int, _Values, list]:
    """Version, metadata and what the file says of each tensor."""
    path = cursor.path
    magic, version = cursor.number("4s", "the magic bytes"), cursor.number("I", "the version")
    if magic != b"GGUF":
        raise _wrong(path, "a GGUF file", f"one that starts with {magic!r}", "make one with llamacli quantize")
    if version not in (2, 3):
        found = "a big-endian one" if version in (2 << 24, 3 << 24) else f"version {version}"
        raise _wrong(path, "GGUF version 2 or 3, little-endian", found, "convert the model again")
    n_tensors, n_values = cursor.number("Q", "the tensor count"), cursor.number("Q", "the metadata count")
    least = _LEAST_TENSOR * n_tensors + _LEAST_VALUE * n_values
    if least > cursor.size - cursor.pos:
        expected = f"{least} more bytes for {n_tensors} tensors and {n_values} metadata values"
        raise _wrong(path, expected, f"{cursor.size - cursor.pos}")
    if n_tensors > _MAX_TENSORS or n_values > _MAX_KEYS:
        expected = f"at most {_MAX_TENSORS} tensors and {_MAX_KEYS} metadata values"
        raise _wrong(path, expected, f"{n_tensors} and {n_values}")
    values = _Values()
    for _ in range(n_values):
        key = cursor.name("a metadata key")
        if key in values:
            raise _wrong(path, f"metadata key {_show(key)} once", "it twice")
        kind = cursor.number("I", key)
        value = cursor.value(kind, key)
        if kind in _NUMBERS:
            values.codes[key] = _NUMBERS[kind]
        elif kind == _STRING:  # free text: bytes that are not UTF-8 do not make the model unusable
            raw, value = value, value.decode("utf-8", "replace")
            if "\ufffd" in value and value.encode() != raw:
                values.undecodable[key] = raw
        values[key] = value
    return version, values, [_info(cursor) for _ in range(n_tensors)]


def _count(path: Path, values: dict, key: str, default: int) -> int:
    value = values.get(key, default)
    if not isinstance(value, int) or not -1 <= value <= 1 << 31:
        raise _wrong(path, f"a count in {key}", _show(repr(value)))
    return value


def _further_parts(path: Path, values: dict, count: int) -> list[Path]:
    """Paths of parts 2 to `count` of a split model; ModelFileError unless all exist."""
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
            raise _wrong(part, f"part {no} of a model of {count}", "no file of that name", "put all parts into one folder")
    return parts[1:]


def _alignment(path: Path, values: dict) -> int:
    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise _wrong(path, "general.alignment to be a power of two up to 2^20", _show(repr(alignment)))
    return alignment


def _info(cursor: _Cursor) -> tuple[str, TensorType, tuple[int, ...], int]:
    name = cursor.name("a tensor's name")
    n_dims = cursor.number("I", name)
    if not 1 <= n_dims <= _MAX_DIMS:
        raise _wrong(cursor.path, f"1 to {_MAX_DIMS} dimensions for tensor {_show(name)}", f"{n_dims}")
    shape = tuple(cursor.number("Q", name) for _ in range(n_dims))[::-1]
    kind, offset = cursor.number("I", name), cursor.number("Q", name)
    if kind not in BY_ID:
        expected = f"{cursor.path}: expected a known type for tensor {_show(name)}"
        raise UnsupportedModelError(f"{expected}, found type id {kind}; convert it to another type")
    return name, BY_ID[kind], shape, offset


def _views(path: Path, buffer: memoryview, end: int, infos: list, alignment: int) -> dict[str, Tensor]:
    """Tensors as views of the data section, which starts at the first aligned byte from `end` on."""
    start = -(-end // alignment) * alignment
    left = max(0, len(buffer) - start)
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
        data = np.frombuffer(buffer, np.uint8, nbytes, start + offset)
        tensors[name] = Tensor(name, kind, shape, data, path, start + offset)
        ends.append((offset, offset + nbytes, name))
    ends.sort()
    for (_, end, name), (begin, _, other) in pairwise(ends):
        if begin < end:
            raise _wrong(path, f"tensor {_show(other)} behind {_show(name)}", "them overlapping")
    return tensors


def _wrong(path: Path, expected: str, found: str, hint: str = _DAMAGED) -> ModelFileError:
    return ModelFileError(f"{path}: expected {expected}, found {found}; {hint}")


def _show(text: str) -> str:
    """A name from a hostile file, fit for one line of a terminal."""
    shown = text if text.isprintable() else ascii(text)
    return shown if len(shown) <= 80 else shown[:77] + "..."
