"""Reads the JSON files of a Hugging Face folder as hostile input.

In: a path. Out: a dict, or a CheckpointError that names the file.
"""

import json
from pathlib import Path

from llamacli.errors import CheckpointError

MAX_JSON = 1 << 28  # bytes; a tokenizer.json of 200,000 tokens takes 28 MB


def read_json(path: Path) -> dict:
    """The JSON object in `path`; CheckpointError if it is missing, unreadable, too large or no object."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON:
            raise CheckpointError(f"{path}: expected a JSON file of at most {MAX_JSON} bytes, found {size}; download it again")
        raw = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: expected this file in the checkpoint, found none; download the folder again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: expected a readable file, found: {error.strerror}") from None
    return parse_json(raw, str(path))


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
