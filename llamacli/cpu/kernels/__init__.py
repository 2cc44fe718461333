"""Compiled code: everything that reads or writes weights, activations or the KV cache element by element.

There are two kinds. Microkernels (formats/, ops/vectors.py) are LLVM vector IR. Drivers (ops/matmul.py, ops/attention.py,
runtime/pool.py ...) are Python functions compiled through Numba; they split work over threads and call microkernels by
address. Both take addresses and sizes and write to buffers that the caller owns. GGUF names, layers and text belong elsewhere.

Importing the package or a module of it has no side effects: the cache folder is made, LLVM is set up and the CPU variant is
chosen when something is first compiled or loaded.
"""

import hashlib
import os
import re
import stat
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from llamacli import __version__, environment

KEPT = 4  # cache folders of other versions and of this one that are kept
UNUSED = 24 * 3600  # seconds after which a folder beyond those is removed: before, a running process may still need it
notices: list[str] = []  # at most one line for the user, why compiled code is not kept; the caller that shows it removes it
_noted = False  # whether there was such a line


def sources_digest(folder: Path) -> str:
    """A short hash of this version and of a folder's modules, which an installation may have as bytecode alone, or hidden."""
    digest = hashlib.blake2b(__version__.encode(), digest_size=8)
    for source in sorted(folder.rglob("*.py")) or sorted(folder.rglob("*.pyc")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


@cache
def cache_folder() -> Path | None:
    """The folder of compiled code, made on the first call; None where it cannot be made or others could write to it.

    Its name holds a hash of the sources: Numba checks only the file that holds a function, not the files it calls into, and
    would load stale code. A folder that exists but cannot be written is returned, since it may have been filled before. Without
    a folder, code is compiled in memory at each start, and `notices` says why.
    """
    root = environment.cache_root()
    folder = root / f"kernels-{sources_digest(Path(__file__).parent)}"
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        for path in (root, folder):
            path.mkdir(mode=0o700, exist_ok=True)
            _check_owner(path, shared=stat.S_ISVTX if path == root else 0)
    except OSError as error:
        not_kept(error)
        return None
    _remove_unused(root, folder)
    return folder


def not_kept(error: OSError) -> None:
    """Note once in a process that compiled code is not kept, and why."""
    global _noted
    if not _noted:
        _noted = True
        where = error.filename or environment.cache_root()
        notices.append(
            f"compiled kernels are not kept, so each start compiles again: {where}: {error.strerror or error}; "
            "name another folder with LLAMACLI_CACHE"
        )


def _check_owner(path: Path, shared: int) -> None:
    """PermissionError if another user could put code there. `shared`: the mode bit that protects entries in a shared folder."""
    info = path.stat()
    if info.st_uid not in (0, os.geteuid()):
        raise PermissionError(0, "it belongs to another user", str(path))
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not info.st_mode & shared:
        raise PermissionError(0, "others can write to it (chmod go-w)", str(path))


def _remove_unused(root: Path, current: Path) -> None:
    """Mark `current` as used; remove other versions' folders but the newest few. Errors are ignored."""
    with suppress(OSError):
        os.utime(current)
    try:
        with os.scandir(root) as entries:
            others = [
                (entry.stat(follow_symlinks=False).st_mtime, entry.path)
                for entry in entries
                if re.fullmatch(r"kernels-[0-9a-f]{16}", entry.name)
                and entry.name != current.name
                and entry.is_dir(follow_symlinks=False)
            ]
    except OSError:
        return
    for used, path in sorted(others, reverse=True)[KEPT - 1 :]:
        if time.time() - used > UNUSED:
            import shutil

            shutil.rmtree(path, ignore_errors=True)
