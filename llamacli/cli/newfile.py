"""Writes a text to a new file: it never replaces an existing file, and leaves no partial one.

In: a path, a text. Out: the file, or an OutputError.
"""

import os
from contextlib import suppress
from pathlib import Path

from llamacli.errors import OutputError


def check_new(path: Path) -> None:
    """OutputError unless a new file can be made there. Called before an answer is computed, which may take long."""
    if os.path.exists(path) or not os.path.isdir(path.parent):
        found = "one that exists" if os.path.exists(path) else "no such folder"
        raise OutputError(f"{path}: expected the name of a new file, found {found}; choose another name")
    _make(path).close()  # a name that is too long, a folder that is read-only
    path.unlink()


def write_new(path: Path, text: str) -> None:
    """Write `text` in UTF-8. OutputError if the file exists or cannot be written; nothing of it is left then."""
    file = _make(path)
    try:
        with file:
            file.write(text.encode("utf-8", "replace"))
    except BaseException as error:
        with suppress(OSError):
            os.unlink(path)
        if isinstance(error, OSError):
            raise _unwritable(path, error) from None
        raise


def _make(path: Path):
    try:
        return open(path, "xb")
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path}: expected the name of a new file, found: {error.strerror}; choose another place")
