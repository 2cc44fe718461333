"""Write large files that survive being killed: complete under their names or not there at all, and taken up where they stopped.

In: the files' heads and tensors, and a function that makes a tensor's bytes. Out: the files. Each grows as NAME.part; beside
them NAME.part.log says which job this is and, for every finished tensor, its checksum and a note of the maker's. The same job
started again checks the finished tensors against their checksums and goes on behind the last good one; another job begins anew.
Killed or interrupted, parts and log stay; after any error nothing does. What cannot be written is an OutputError. Knows nothing
of types or weights.
"""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple
from zlib import crc32

from llamacli.errors import OutputError
from quantize.writer import ALIGNMENT, sync_folder

PIECE = 1 << 23  # bytes read at a time to check what was written before


class File(NamedTuple):
    """One file to write: everything before the data, then tensors as (name, bytes), each padded to the alignment."""

    path: Path
    head: bytes
    tensors: list[tuple[str, int]]


class Maker(NamedTuple):
    """`make(name)` yields a tensor's bytes; `note(name)` is a word kept with it; `skip(name, note)` is told of one kept."""

    make: Callable[[str], Iterable[memoryview]]
    note: Callable[[str], str]
    skip: Callable[[str, str], None]


def part_of(path: Path) -> Path:
    """Where a file grows."""
    return path.with_name(path.name + ".part")


def write_files(files: Sequence[File], job: str, maker: Maker, force: bool) -> None:
    """Write all files, or go on with them if `job` (one line) is what the log says; then give them their names."""
    log = part_of(files[0].path).with_suffix(".part.log")
    try:
        with log.open("a+b") as journal:
            _lock(journal, files[0].path)
            finished = _finished(journal, job)
            for file in files:
                _grow(file, journal, finished, maker)
            for file in files:
                if file.path.exists() and not force:
                    raise OutputError(f"{file.path}: expected no such file, found one made meanwhile; choose another name")
            for file in files:
                part_of(file.path).replace(file.path)
            sync_folder(files[0].path.parent)
            log.unlink()
    except KeyboardInterrupt:
        raise
    except _Busy as error:
        raise OutputError(str(error)) from None
    except OSError as error:
        _remove(files, log)
        raise OutputError(
            f"{files[0].path}: expected to write it, found: {error.strerror or error}; nothing was kept"
        ) from None
    except BaseException:
        _remove(files, log)
        raise


class _Busy(Exception):
    pass


def _lock(journal: BinaryIO, path: Path) -> None:
    """The system lets go of the lock when its holder ends, however that happens."""
    try:
        fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise _Busy(f"{path}: expected to write it, found another llamacli writing it; wait for that one") from None


def _finished(journal: BinaryIO, job: str) -> dict[str, tuple[int, str]]:
    """Checksum and note of each tensor that the log calls finished; none, and an empty log, for another job."""
    journal.seek(0)
    first, *lines = journal.read().split(b"\n")
    found: dict[str, tuple[int, str]] = {}
    if first == job.encode():
        for line in lines[:-1]:  # behind the last line end is a line cut short, or nothing
            with contextlib.suppress(ValueError):
                name, checksum, note = line.decode().split("\t")
                found[name] = int(checksum), note
        if lines:
            journal.truncate(journal.tell() - len(lines[-1]))
            return found
    journal.truncate(0)
    journal.write(job.encode() + b"\n")
    journal.flush()
    return {}


def _grow(file: File, journal: BinaryIO, finished: dict[str, tuple[int, str]], maker: Maker) -> None:
    path = part_of(file.path)
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as out:
        left = list(file.tensors)
        good = out.read(len(file.head)) == file.head
        while good and left and (known := finished.get(left[0][0])):
            name, nbytes = left[0]
            padded = -(-nbytes // ALIGNMENT) * ALIGNMENT
            start = out.tell()
            good = _checksum(out, nbytes) == known[0] and len(out.read(padded - nbytes)) == padded - nbytes
            if good:
                maker.skip(name, known[1])
                left.pop(0)
            else:
                out.seek(start)
        if not good and len(left) == len(file.tensors):
            out.seek(0)
            out.write(file.head)
        out.truncate(out.tell())
        for name, nbytes in left:
            checksum, written = 0, 0
            for chunk in maker.make(name):
                out.write(chunk)
                checksum, written = crc32(chunk, checksum), written + len(chunk)
            if written != nbytes:
                raise OutputError(f"{file.path}: expected {nbytes} bytes of {name}, made {written}; please report this")
            out.write(bytes(-nbytes % ALIGNMENT))
            out.flush()
            journal.write(f"{name}\t{checksum}\t{maker.note(name)}\n".encode())
            journal.flush()
        os.fsync(out.fileno())


def _checksum(file: BinaryIO, nbytes: int) -> int | None:
    """Of the next bytes; None if there are fewer."""
    checksum = 0
    while nbytes:
        piece = file.read(min(PIECE, nbytes))
        if not piece:
            return None
        checksum, nbytes = crc32(piece, checksum), nbytes - len(piece)
    return checksum


def _remove(files: Sequence[File], log: Path) -> None:
    for path in (*(part_of(file.path) for file in files), log):
        with contextlib.suppress(OSError):  # the error that led here is the one to tell
            path.unlink(missing_ok=True)
