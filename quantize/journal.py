"""Write large files so that no finished work is lost: complete under their final names or not there at all, and resumable.

In: for each file its header and its tensors; a `Maker` that produces a tensor's bytes. Out: the files.

Each file grows as NAME.part. The log, NAME.part.log beside the first one, names the job and holds a line for every finished
tensor: its checksum, what it was made from, a note of the maker's. The same job started again verifies the finished tensors
and continues after the last good one. Whatever stops a conversion (Ctrl-C, a kill, a full disk, a bad tensor), part and log
stay as soon as one tensor is finished, and the error says how to continue. Files of others under these names are never touched.
OutputError: a file cannot be written.
"""

import contextlib
import fcntl
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple
from zlib import crc32

from llamacli.errors import LlamacliError, OutputError
from quantize.writer import ALIGNMENT, sync, sync_folder

PIECE = 1 << 23  # bytes per read while finished tensors are verified
MAGIC = b"llamacli conversion "  # the first bytes of a log, followed by the job
SYNC = 1 << 28  # bytes of finished tensors after which the disk begins to write them


class File(NamedTuple):
    """One file to write: the header, then tensors as (name, bytes), each padded to the alignment."""

    path: Path
    head: bytes
    tensors: list[tuple[str, int]]


def _no_source(name: str) -> str:
    return ""


class Maker(NamedTuple):
    """Produces tensors: `make(name)` yields the bytes, `note(name)` is stored with them in the log.

    `skip(name, note)` is called for a finished tensor that is kept. `source(name)` identifies what a tensor is made from: if it
    differs from what the log says, the tensor is made again.
    """

    make: Callable[[str], Iterable[memoryview]]
    note: Callable[[str], str]
    skip: Callable[[str, str], None]
    source: Callable[[str], str] = _no_source


class _Finished(NamedTuple):
    """What the log says of one tensor."""

    checksum: int
    note: str
    source: str


class _Log(NamedTuple):
    """The valid beginning of a log: `nbytes` of it.

    `complete` holds the identity of every part, written once all are complete: after a crash between two renames it tells our
    files from others.
    """

    nbytes: int
    finished: dict[str, _Finished]
    complete: list[list[int]]


class _MakerError(Exception):
    """Carries an OSError of the maker past the handler of output errors: a failing cache folder is no failing output disk."""


def part_of(path: Path) -> Path:
    """The name under which a file grows."""
    return path.with_name(path.name + ".part")


def log_of(files: Sequence[File]) -> Path:
    """The log of a conversion to these files."""
    part = part_of(files[0].path)
    return part.with_name(part.name + ".log")


def left_over(files: Sequence[File], job: str) -> list[Path]:
    """Files of an earlier attempt that this one continues or replaces: parts, and files that were renamed already."""
    parts = [part for file in files if (part := part_of(file.path)).is_file()]
    try:
        return parts + _renamed(files, _read(log_of(files).read_bytes(), job)) if log_of(files).is_file() else parts
    except OSError:
        return parts


def write_files(files: Sequence[File], job: str, maker: Maker, force: bool) -> None:
    """Write all files, or continue with them if the log names the same `job` (one line); then rename them.

    OutputError if they cannot be written; errors of the maker keep their type and say how to continue.
    """
    log = log_of(files)
    try:
        _check_ours(files, log, job, force)
        with _locked(log, files[0].path) as journal:
            kept = ""
            try:
                _write(files, job, journal, maker, force)
                log.unlink()
            except Exception as error:
                kept = _clean_up(files, job, log)
                if kept and isinstance(error, (LlamacliError, MemoryError)):
                    error.args = (f"{error}; {kept}",)
                raise
    except _MakerError as error:
        raise error.__cause__ from None
    except OSError as error:
        reason = f"{error.strerror or error}; {kept or 'nothing was kept'}"
        raise OutputError(f"{files[0].path}: expected to write it, found: {reason}") from None


def _clean_up(files: Sequence[File], job: str, log: Path) -> str:
    """After an error: remove parts and log if no tensor is finished, else say how to continue."""
    parts = [part_of(file.path) for file in files]
    try:
        found = _read(log.read_bytes(), job)
    except OSError:
        return ""
    if found.finished:
        count = sum(len(file.tensors) for file in files)
        return f"{len(found.finished)} of {count} tensors are kept in {parts[0].name}, the same command continues there"
    if found.nbytes:  # the log is this job's; another job's parts and log are kept
        for path in (*parts, log):
            with contextlib.suppress(OSError):  # the error that led here is the one to report
                path.unlink(missing_ok=True)
    return ""


def _check_ours(files: Sequence[File], log: Path, job: str, force: bool) -> None:
    """OutputError if the name of the log or a part is taken by a link or a pipe, or, unless `force`, by another's file or by
    finished tensors of another job.
    """
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
    if count := _finished_by_another(log, job):
        raise OutputError(
            f"{parts[0]}: expected what an earlier run of the same conversion left, found {count} finished tensors of one with "
            f"other options, another source or another version; complete that one, choose another name, or add --force"
        )


def _finished_by_another(log: Path, job: str) -> int:
    """Tensors that the log of another job says are finished."""
    if not log.exists():
        return 0
    raw = log.read_bytes()
    other = raw.partition(b"\n")[0].removeprefix(MAGIC).decode("ascii", "replace")
    return 0 if other == job else len(_read(raw, other).finished)


def _head(log: Path) -> bytes:
    """Its first bytes; none if it is empty or missing."""
    if not log.exists():
        return b""
    with log.open("rb") as file:
        return file.read(len(MAGIC))


@contextlib.contextmanager
def _locked(log: Path, path: Path) -> Iterator[BinaryIO]:
    """The log, open and locked. The system releases the lock when the process ends, however it ends."""
    busy = OutputError(f"{path}: expected to write it alone, found another llamacli writing it; wait for that one")
    with os.fdopen(os.open(log, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666), "a+b") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        except OSError:
            pass  # a file system without locks
        if not log.exists() or not os.path.samestat(os.fstat(journal.fileno()), log.stat()):
            raise busy  # the holder finished between our open and our lock, and removed the log
        yield journal


def _write(files: Sequence[File], job: str, journal: BinaryIO, maker: Maker, force: bool) -> None:
    journal.seek(0)
    log = _read(journal.read(), job)
    if not log.nbytes:  # parts go first: as long as one exists, a log must say whose it is
        for file in files:
            part_of(file.path).unlink(missing_ok=True)
    journal.truncate(log.nbytes)
    if not log.nbytes:
        journal.write(MAGIC + job.encode() + b"\n")
        journal.flush()
    for path in _renamed(files, log):
        path.replace(part_of(path))  # to be verified as every part is
    for file in files:
        _write_part(file, journal, log.finished, maker)
    for file in files:
        if file.path.exists() and not force:
            raise OutputError(f"{file.path}: expected no such file, found one made meanwhile; choose a new name or add --force")
    _append(journal, {"complete": [_identity(part_of(file.path)) for file in files]})
    sync(journal.fileno())
    for file in files:
        part_of(file.path).replace(file.path)
    sync_folder(files[0].path.parent)


def _read(raw: bytes, job: str) -> _Log:
    """The log of this job up to its first cut or damaged line; empty for another job."""
    first, *lines = raw.split(b"\n")
    log = _Log(0, {}, [])
    if first != MAGIC + job.encode() or not lines:
        return log
    log = log._replace(nbytes=len(first) + 1)
    for line in lines[:-1]:
        checksum, _, text = line.partition(b" ")
        if checksum != b"%08x" % crc32(text):
            break
        try:
            record = json.loads(text)
            if "complete" in record:
                log = log._replace(complete=list(record["complete"]))
            else:
                log.finished[record["tensor"]] = _Finished(record["checksum"], record["note"], record["source"])
        except (ValueError, TypeError, KeyError, RecursionError):  # a valid checksum under a line that is not ours
            break
        log = log._replace(nbytes=log.nbytes + len(line) + 1)
    return log


def _append(journal: BinaryIO, record: dict) -> None:
    text = json.dumps(record).encode()
    journal.write(b"%08x %b\n" % (crc32(text), text))
    journal.flush()


def _renamed(files: Sequence[File], log: _Log) -> list[Path]:
    """Files that had been renamed when the job was killed.

    Renaming keeps inode, size and time on most file systems; on others (FAT, SMB) the contents decide.
    """
    pairs = zip(files, log.complete, strict=False)
    return [f.path for f, identity in pairs if _identity(f.path) == identity or _has_contents(f, log.finished)]


def _has_contents(file: File, finished: dict[str, _Finished]) -> bool:
    """Whether the file is byte for byte what the log says."""
    nbytes = len(file.head) + sum(n + -n % ALIGNMENT for _, n in file.tensors)
    try:
        if not file.path.is_file() or file.path.stat().st_size != nbytes:
            return False
        with file.path.open("rb") as found:
            if found.read(len(file.head)) != file.head:
                return False
            return all(name in finished and _matches(found, n, finished[name].checksum) for name, n in file.tensors)
    except OSError:
        return False


def _identity(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def _write_part(file: File, journal: BinaryIO, finished: dict[str, _Finished], maker: Maker) -> None:
    """Complete the part, keeping the good tensors at its beginning."""
    # `disk` syncs finished tensors while the next ones are made, so that little is left to write at the end.
    with (
        os.fdopen(os.open(part_of(file.path), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b") as out,
        ThreadPoolExecutor(1, "sync") as disk,
    ):
        left = deque(file.tensors)
        if out.read(len(file.head)) == file.head:
            while left and _kept(out, *left[0], finished, maker):
                maker.skip(left[0][0], finished[left[0][0]].note)
                left.popleft()
        else:
            out.seek(0)
            out.write(file.head)
        out.truncate(out.tell())
        unsynced, syncing = 0, None
        for name, nbytes in left:
            checksum, written = 0, 0
            for chunk in _made(maker, name):
                out.write(chunk)
                checksum, written = crc32(chunk, checksum), written + len(chunk)
            if written != nbytes:
                raise OutputError(f"{file.path}: expected {nbytes} bytes of {name}, made {written}; please report this")
            out.write(bytes(-nbytes % ALIGNMENT))
            out.flush()
            unsynced += nbytes
            if unsynced >= SYNC and (syncing is None or syncing.done()):
                if syncing is not None:
                    syncing.result()  # its error, if any
                syncing, unsynced = disk.submit(sync, out.fileno()), 0
            record = {"tensor": name, "checksum": checksum, "note": maker.note(name), "source": maker.source(name)}
            _append(journal, record)
        out.flush()
        if syncing is not None:
            syncing.result()
        sync(out.fileno())


def _made(maker: Maker, name: str) -> Iterator[memoryview]:
    """The maker's chunks; its OSErrors wrapped, since they say nothing about the output."""
    try:
        yield from maker.make(name)
    except OSError as error:
        raise _MakerError from error


def _kept(file: BinaryIO, name: str, nbytes: int, finished: dict[str, _Finished], maker: Maker) -> bool:
    """Whether the next tensor is finished and was made from the same source."""
    known = finished.get(name)
    return known is not None and known.source == maker.source(name) and _matches(file, nbytes, known.checksum)


def _matches(file: BinaryIO, nbytes: int, expected: int) -> bool:
    """Whether the next tensor and its padding have this checksum; if not, `file` stays where it is."""
    start, left, checksum = file.tell(), nbytes, 0
    while left and (piece := file.read(min(PIECE, left))):
        checksum, left = crc32(piece, checksum), left - len(piece)
    padding = bytes(-nbytes % ALIGNMENT)
    if not left and checksum == expected and file.read(len(padding)) == padding:
        return True
    file.seek(start)
    return False
