"""The SHA-256 of models' files: the recorded one, and the one that is computed from a file.

In: a file. Out: the checksum that it had when it was whole, by the note NAME.json that a pull leaves beside it, or by the name
under which Ollama and the hub's cache keep it; the checksum that it has.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

BLOCK = 1 << 20  # bytes read at a time
_DIGEST = re.compile(r"(?:sha256-)?([0-9a-f]{64})")


def note(path: Path) -> Path:
    """Where the checksum of a pulled file is kept."""
    return path.with_name(f"{path.name}.json")


def keep(path: Path, sha256: str) -> None:
    """Record a file's checksum. If the note cannot be written, the file is read again when its checksum is needed."""
    found = path.stat()
    new = path.with_name(f"{path.name}.json.new")
    with suppress(OSError):
        new.write_text(json.dumps({"sha256": sha256, "size": found.st_size, "mtime_ns": found.st_mtime_ns}))
        os.replace(new, note(path))


def kept(path: Path) -> str | None:
    """The checksum that a file had, if by its size and time nobody has written to it since; None if it is not known."""
    sha256, size, mtime = _noted(path)
    found = path.stat()
    return sha256 if (size, mtime) == (found.st_size, found.st_mtime_ns) else None


def known(path: Path) -> str | None:
    """The checksum that a file should have; None if none is recorded."""
    by_name = _DIGEST.fullmatch(os.path.basename(os.path.realpath(path)))
    return by_name[1] if by_name else _noted(path)[0]


def sha256_of(path: Path, follow: Callable[[int, int], None] = lambda done, total: None) -> str:
    """The checksum that a file has; all of it is read.

    `follow(done, total)` is called with bytes. OSError if it cannot be read.
    """
    sha256, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        total = os.fstat(file.fileno()).st_size
        while data := file.read(BLOCK):
            sha256.update(data)
            done += len(data)
            follow(done, total)
    return sha256.hexdigest()


def _noted(path: Path) -> tuple[str | None, object, object]:
    """Checksum, size and time of a note; three times None if there is none that is sound."""
    try:
        with note(path).open("rb") as file:
            found = json.loads(file.read(4096))
        sha256 = found["sha256"]
        if isinstance(sha256, str) and re.fullmatch(r"[0-9a-f]{64}", sha256):
            return sha256, found.get("size"), found.get("mtime_ns")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    return None, None, None
