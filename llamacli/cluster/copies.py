"""Whether a node's copy of a model is the same as another's.

In: an open GGUF and layers, or the source of a conversion. Out: a digest, the same for equal copies. It covers the model's
sizes, the table of tensors (names, types, shapes, places in the file) and of each tensor, or each of these layers, four pieces
of 4 KiB: another model, another quantization or a fine-tuned one differ in every piece. Reading all of a 229 GB file would take
minutes; a single flipped bit is not found.
"""

from hashlib import blake2b
from pathlib import Path

import numpy as np

from llamacli import environment
from llamacli.files.gguf import GGUF
from llamacli.llama4.config import Config
from llamacli.llama4.tensors import find
from quantize.opening import Source

PIECES, PIECE = 4, 4096


def digest(gguf: GGUF, config: Config, layers: range) -> str:
    """The digest of the parts of a file that these layers need."""
    total = blake2b(repr(config).encode(), digest_size=16)
    for name, tensor in sorted(gguf.tensors.items()):
        total.update(repr((name, tensor.type.name, tensor.shape, tensor.offset)).encode())
        found = find(name)
        if found is None or (found[1] not in layers and found[0].kind != "rope_freqs"):
            continue
        _sample(total, tensor.data)
    return total.hexdigest()


def source_digest(source: Source) -> str:
    """The digest of what a conversion reads: all weights, and as what they are taken."""
    total = blake2b(digest_size=16)
    for name, rows in sorted(source.all_rows.items()):
        total.update(repr((name, rows.shape)).encode())
    for name, (kind, values) in sorted(source.stored.items()):
        total.update(repr((name, kind, values.shape)).encode())
        _sample(total, values)
    return total.hexdigest()


def _sample(total, values: np.ndarray) -> None:
    flat = values.reshape(-1).view(np.uint8)
    for k in range(PIECES):
        at = max(0, (flat.size - PIECE) * k // (PIECES - 1))
        total.update(flat[at : at + PIECE].tobytes())


def own_copy(path: str) -> Path | None:
    """This machine's copy of what another machine calls `path`: of that name in the models folder, else at that path."""
    named = Path(path)
    return next((p for p in (environment.models_folder() / named.name, named) if p.exists()), None)
