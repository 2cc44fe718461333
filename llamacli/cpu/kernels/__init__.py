"""Compiled code: everything that reads or writes weights, activations or the KV cache element by element.

There are two kinds. Microkernels (formats/, ops/vectors.py) are LLVM vector IR. Drivers (ops/matmul.py, ops/attention.py,
runtime/pool.py ...) are Python functions compiled through Numba; they split work over threads and call microkernels by
address. Both take addresses and sizes and write to buffers that the caller owns. GGUF names, layers and text belong elsewhere.

Importing the package or a module of it has no side effects: the cache folder is made, LLVM is set up and the CPU variant is
chosen when something is first compiled or loaded.
"""

import hashlib
import os
from functools import cache
from pathlib import Path


def sources_digest(folder: Path) -> str:
    """A short hash of a folder's modules."""
    digest = hashlib.blake2b(digest_size=8)
    for source in sorted(folder.rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


@cache
def cache_folder() -> Path:
    """The folder of compiled code; made on the first call.

    Its name holds a hash of the sources: Numba checks only the file that holds a function, not the files it calls into, and
    would load stale code.
    """
    root = Path(
        os.environ.get("LLAMACLI_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llamacli"
    )
    folder = root / f"kernels-{sources_digest(Path(__file__).parent)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        import tempfile

        folder = Path(tempfile.mkdtemp(prefix="llamacli-kernels-"))
    return folder
