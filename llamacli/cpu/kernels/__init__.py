"""Compiled code: everything that touches weights, activations or the KV cache element by element.

Two kinds of code live here. Leaves (simd.py, q4_k.py, dots.py, tiles.py, vectors.py ...) are LLVM vector IR, compiled by jit.py
for the CPU at hand; drivers (matmul.py, attention.py, elementwise.py, pool.py) are Numba functions that split work over threads
and call the leaves by address. In: addresses and sizes. Out: numbers written to buffers that the caller owns. Nothing here
knows of GGUF names, layers or text.

Importing this package decides where compiled code is cached, so it comes before the first import of numba. The folder's name
holds a hash of the sources: Numba watches only the file that holds a kernel, not the files it calls into, and would serve
stale code.
"""

import hashlib
import os
from pathlib import Path


def sources_digest(folder: Path) -> str:
    """A short hash of a folder's modules."""
    digest = hashlib.blake2b(digest_size=8)
    for source in sorted(folder.rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _cache_folder() -> Path:
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


CACHE = _cache_folder()
os.environ["NUMBA_CACHE_DIR"] = str(CACHE)
