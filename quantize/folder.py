"""Reads the small files of a Hugging Face folder as hostile input.

In: a path. Out: bytes or a dict, or a CheckpointError that names the file.
"""

import json
import os
import stat
from pathlib import Path

from llamacli.errors import CheckpointError

MAX_JSON = 1 << 28  # bytes; a tokenizer.json of 200,000 tokens takes 28 MB


def read_file(path: Path, most: int) -> bytes:
    """All of a file of at most `most` bytes; CheckpointError if it is missing, unreadable, larger, or a device or a pipe, which
    would be read without end or waited for.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:  # no wait for a writer
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path}: expected a file, found a device or a pipe; download it again")
            raw = file.read(min(status.st_size, most) + 1)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: expected this file in the checkpoint, found none; download the folder again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: expected a readable file, found: {error.strerror}; check the file") from None
    if len(raw) > most:
        raise CheckpointError(f"{path}: expected at most {most} bytes, found more; download it again")
    return raw


def read_json(path: Path) -> dict:
    """The JSON object in `path`; CheckpointError as for `read_file`, or if it is no object."""
    return parse_json(read_file(path, MAX_JSON), str(path))


def optional_json(path: Path) -> dict:
    """The same, or {} if there is no such file."""
    return read_json(path) if path.exists() else {}


def parse_json(raw: bytes, where: str) -> dict:
    """`raw` as a JSON object; `where` names it in the CheckpointError."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:80]
        raise CheckpointError(f"{where}: expected JSON, found something else ({reason}); download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {type(value).__name__}; download it again")
    return value
