"""The header of a GGUF (version 3, little-endian), and small files written atomically.

In: metadata and tensor descriptions; for a file, the bytes of each tensor in order. Out: the header's bytes, or the file. It
grows as NAME.PID.part, is synced and renamed; on any failure, Ctrl-C included, the part is removed (journal.py keeps the parts
of long conversions). OutputError: a file cannot be written.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import contextlib
import fcntl
import os
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from llamacli.errors import OutputError
from llamacli.files.ggml import TensorType

ALIGNMENT = 32
_CODES = {"u1": 0, "i1": 1, "u2": 2, "i2": 3, "u4": 4, "i4": 5, "f4": 6, "b1": 7, "u8": 10, "i8": 11, "f8": 12}  # value types
_STRING, _ARRAY = 8, 9


def header(metadata: dict[str, object], tensors: list[tuple[str, TensorType, tuple[int, ...], int]]) -> bytes:
    """Everything before the data, padded to the alignment.

    Integers become uint32 if they fit, floats float32; arrays keep their dtype; bytes are written as a string. Shapes are in
    NumPy's order, offsets count from the start of the data. OutputError for text that cannot be encoded.
    """
    out = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        try:
            out += _string(key) + _value(value)
        except UnicodeEncodeError as error:
            found = f"{error.object[:40]!r}; repair the source"
            raise OutputError(f"metadata {key[:60]!r}: expected valid Unicode, found {found}") from None
    for name, kind, shape, offset in tensors:
        out += _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind.id, offset)
    out += bytes(-len(out) % ALIGNMENT)
    return bytes(out)


def _string(text: str | bytes) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value) -> bytes:
    if isinstance(value, (str, bytes)):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, np.ndarray):
        code = _CODES[value.dtype.str[1:]]
        return struct.pack("<IIQ", _ARRAY, code, len(value)) + value.astype(value.dtype.newbyteorder("<")).tobytes()
    if isinstance(value, list):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))
    dtype = _scalar_dtype(value)
    return struct.pack("<I", _CODES[dtype.str[1:]]) + np.array(value, dtype).tobytes()


def _scalar_dtype(value) -> np.dtype:
    """The types that llama.cpp expects: uint32 if it fits, float32."""
    if isinstance(value, np.generic):
        return value.dtype
    if isinstance(value, bool):
        return np.dtype(bool)
    if isinstance(value, int):
        return np.dtype(next(d for d in ("<u4", "<i4", "<u8", "<i8") if np.iinfo(d).min <= value <= np.iinfo(d).max))
    return np.dtype("<f4")


def output_path(text: str) -> Path:
    """The path of a file to write, as a user gives it; OutputError for what can only be a mistake."""
    if text in ("", "-") or text.endswith(("/", "/.", "/..")):
        raise OutputError(f"expected the name of a file to write, found {text!r}; name a file")
    return Path(text)


def check_not_input(path: Path, inputs: Iterable[Path]) -> None:
    """OutputError if writing `path` would destroy one of the inputs, whatever name it goes by."""
    if path.exists() and any(read.exists() and path.samefile(read) for read in inputs):
        raise OutputError(f"{path}: expected another file than the source, found the source itself; choose a new name")


def check_output(path: Path, nbytes: int, force: bool) -> None:
    """OutputError unless a file of `nbytes` can be written at `path`."""
    if path.is_dir():
        raise OutputError(f"{path}: expected the name of a file to write, found a folder; add a file name")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path}: expected the name of a file to write, found a device or a pipe; choose another name")
    if path.exists() and not force:
        raise OutputError(f"{path}: expected no such file, found one; choose another name or add --force")
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent}: expected a folder to write into, found none; create it first")
    free = shutil.disk_usage(path.parent).free
    if 0 < free < nbytes:  # some FUSE file systems always report 0; a full disk is found on writing
        raise OutputError(f"{path}: expected {nbytes} bytes of room on the disk, found {free}; free some or write elsewhere")


def write_file(path: Path, head: bytes, tensors: Iterable[tuple[str, int, Iterable]], force: bool) -> None:
    """Write `head`, then each tensor (name, planned bytes, chunks of bytes) padded to the alignment; rename when synced."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # a name that no other program or run uses
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(head)
            for name, nbytes, chunks in tensors:
                written = 0
                for chunk in chunks:
                    file.write(chunk)
                    written += len(chunk)
                if written != nbytes:
                    raise OutputError(f"{path}: expected {nbytes} bytes of {name}, made {written}; please report this")
                file.write(bytes(-nbytes % ALIGNMENT))
            file.flush()
            sync(file.fileno())
        if path.exists() and not force:
            raise OutputError(f"{path}: expected no such file, found one made meanwhile; choose another name or add --force")
        part.replace(path)
        sync_folder(path.parent)
    except FileExistsError:
        raise OutputError(f"{part}: expected no such file, found one; move it away") from None
    except OSError as error:
        _remove(part)
        kept = "the file of that name is as it was" if path.exists() else "nothing was kept"
        raise OutputError(f"{path}: expected to write it, found: {error.strerror or error}; {kept}") from None
    except BaseException:
        _remove(part)
        raise


def _remove(part: Path) -> None:
    with contextlib.suppress(OSError):  # the error that led here is the one to report
        part.unlink(missing_ok=True)


def sync(file: int) -> None:
    """Put a descriptor's data on the disk. macOS's fsync stops at the drive's cache; F_FULLFSYNC goes on, where supported."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        with contextlib.suppress(OSError):  # SMB, exFAT
            fcntl.fcntl(file, fcntl.F_FULLFSYNC)
            return
    os.fsync(file)


def sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    with contextlib.suppress(OSError):
        sync(handle)
    os.close(handle)
