"""Write large files that survive being killed: complete under their names or not there at all, and taken up where they stopped.

In: the files' heads and tensors, and a function that makes a tensor's bytes. Out: the files. Each grows as NAME.part; beside
the first, NAME.part.log says that it is one of ours, which job this is and, for every finished tensor, its checksum and a note
of the maker's. The same job started again checks the finished tensors against their checksums and goes on behind the last good
one; another job begins anew; what others left under these names stays. Killed or interrupted, parts and log stay; after any
error nothing does. What cannot be written is an OutputError. Knows nothing of types or weights.
"""

import contextlib
import fcntl
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple
from zlib import crc32

from llamacli.errors import OutputError
from quantize.writer import ALIGNMENT, sync_folder

PIECE = 1 << 23  # bytes read at a time to check what was written before
MAGIC = b"llamacli conversion "  # a log's first bytes, before the job
SYNC = 1 << 32  # bytes at most that a power cut may take from what the log calls finished


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


class _Log(NamedTuple):
    """A log as far as it is sound: `nbytes` of it. `finished` has checksum and note by tensor; `complete` tells all parts apart
    from other files once they need nothing but their names.
    """

    nbytes: int
    finished: dict[str, tuple[int, str]]
    complete: list[list[int]]


def part_of(path: Path) -> Path:
    """Where a file grows."""
    return path.with_name(path.name + ".part")


def left_over(files: Sequence[File], job: str) -> list[Path]:
    """What an earlier attempt left and this one goes on with or replaces: parts, and files that it had named already."""
    parts = [part for file in files if (part := part_of(file.path)).is_file()]
    try:
        return parts + _named(files, _read(log_of(files).read_bytes(), job)) if log_of(files).is_file() else parts
    except OSError:
        return parts


def write_files(files: Sequence[File], job: str, maker: Maker, force: bool) -> None:
    """Write all files, or go on with them if `job` (one line) is what the log says; then give them their names."""
    log = log_of(files)
    try:
        _check_ours(files, log, force)
        with _locked(log, files[0].path) as journal:
            try:
                _write(files, job, journal, maker, force)
                log.unlink()
            except Exception:  # Ctrl-C and SIGTERM are none: what they stop goes on later
                for path in (*(part_of(file.path) for file in files), log):
                    with contextlib.suppress(OSError):  # the error that led here is the one to tell
                        path.unlink(missing_ok=True)
                raise
    except OSError as error:
        reason = error.strerror or error
        raise OutputError(f"{files[0].path}: expected to write it, found: {reason}; nothing was kept") from None


def _check_ours(files: Sequence[File], log: Path, force: bool) -> None:
    """OutputError where the name of the log or of a part is another's: a file only without `force`, a link or a pipe always."""
    parts = [part_of(file.path) for file in files]
    for path in (log, *parts):
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            raise OutputError(f"{path}: expected to write this file, found a link, a pipe or a folder; move it away")
    if force:
        return
    head = _head(log)
    if head not in (b"", MAGIC):
        raise OutputError(f"{log}: expected the log of a conversion, found another file; move it away or add --force")
    found = next((part for part in parts if part.exists()), None)
    if found and not head:
        raise OutputError(f"{found}: expected no such file, found one without its log; move it away or add --force")


def _head(log: Path) -> bytes:
    """Its first bytes; none where it is empty or not there."""
    if not log.exists():
        return b""
    with log.open("rb") as file:
        return file.read(len(MAGIC))


def log_of(files: Sequence[File]) -> Path:
    """Where it is written down how far they are."""
    part = part_of(files[0].path)
    return part.with_name(part.name + ".log")


@contextlib.contextmanager
def _locked(log: Path, path: Path) -> Iterator[BinaryIO]:
    """The log, open. The system lets go of its lock when its holder ends, however that happens."""
    busy = OutputError(f"{path}: expected to write it alone, found another llamacli writing it; wait for that one")
    with os.fdopen(os.open(log, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666), "a+b") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError:
            pass  # a file system without locks: nothing can be guarded there
        if not log.exists() or not os.path.samestat(os.fstat(journal.fileno()), log.stat()):
            raise busy  # its holder ended between our opening and our locking, and took the log along
        yield journal


def _write(files: Sequence[File], job: str, journal: BinaryIO, maker: Maker, force: bool) -> None:
    journal.seek(0)
    log = _read(journal.read(), job)
    if not log.nbytes:  # as long as a part is there, a log says whose it is
        for file in files:
            part_of(file.path).unlink(missing_ok=True)
    journal.truncate(log.nbytes)
    if not log.nbytes:
        journal.write(MAGIC + job.encode() + b"\n")
        journal.flush()
    for path in _named(files, log):
        path.replace(part_of(path))  # so that it is checked as every part is
    for file in files:
        _grow(file, journal, log.finished, maker)
    for file in files:
        if file.path.exists() and not force:
            raise OutputError(f"{file.path}: expected no such file, found one made meanwhile; choose a new name or add --force")
    _tell(journal, {"complete": [_identity(part_of(file.path)) for file in files]})
    os.fsync(journal.fileno())
    for file in files:
        part_of(file.path).replace(file.path)
    sync_folder(files[0].path.parent)


def _read(raw: bytes, job: str) -> _Log:
    """What the log says of this job, up to the first line that is cut short or damaged; of another job nothing."""
    first, *lines = raw.split(b"\n")
    log = _Log(0, {}, [])
    if first != MAGIC + job.encode() or not lines:
        return log
    log = log._replace(nbytes=len(first) + 1)
    for line in lines[:-1]:
        checksum, _, text = line.partition(b" ")
        if checksum != b"%08x" % crc32(text):
            break
        record = json.loads(text)
        if "complete" in record:
            log = log._replace(complete=record["complete"])
        else:
            log.finished[record["tensor"]] = record["checksum"], record["note"]
        log = log._replace(nbytes=log.nbytes + len(line) + 1)
    return log


def _tell(journal: BinaryIO, record: dict) -> None:
    text = json.dumps(record).encode()
    journal.write(b"%08x %b\n" % (crc32(text), text))
    journal.flush()


def _named(files: Sequence[File], log: _Log) -> list[Path]:
    """Files that had their names already when the job was killed: renaming keeps what `_identity` tells."""
    return [file.path for file, identity in zip(files, log.complete, strict=False) if _identity(file.path) == identity]


def _identity(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def _grow(file: File, journal: BinaryIO, finished: dict[str, tuple[int, str]], maker: Maker) -> None:
    """Make the part whole, keeping the sound tensors that it begins with."""
    with os.fdopen(os.open(part_of(file.path), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b") as out:
        left = deque(file.tensors)
        if out.read(len(file.head)) == file.head:
            while left and (known := finished.get(left[0][0])) and _sound(out, left[0][1], known[0]):
                maker.skip(left.popleft()[0], known[1])
        else:
            out.seek(0)
            out.write(file.head)
        out.truncate(out.tell())
        unsynced = 0
        for name, nbytes in left:
            checksum, written = 0, 0
            for chunk in maker.make(name):
                out.write(chunk)
                checksum, written = crc32(chunk, checksum), written + len(chunk)
            if written != nbytes:
                raise OutputError(f"{file.path}: expected {nbytes} bytes of {name}, made {written}; please report this")
            out.write(bytes(-nbytes % ALIGNMENT))
            out.flush()
            unsynced += nbytes
            if unsynced >= SYNC:
                os.fsync(out.fileno())
                unsynced = 0
            _tell(journal, {"tensor": name, "checksum": checksum, "note": maker.note(name)})
        out.flush()
        os.fsync(out.fileno())


def _sound(file: BinaryIO, nbytes: int, expected: int) -> bool:
    """Whether the next tensor and its padding are there as they were written; if not, `file` stays where it is."""
    start, left, checksum = file.tell(), nbytes, 0
    while left and (piece := file.read(min(PIECE, left))):
        checksum, left = crc32(piece, checksum), left - len(piece)
    padding = bytes(-nbytes % ALIGNMENT)
    if not left and checksum == expected and file.read(len(padding)) == padding:
        return True
    file.seek(start)
    return False
