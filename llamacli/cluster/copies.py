"""Whether a node's copy of a model is the same as another's.

In: an open GGUF and layers, or the source of a conversion. Out: a digest, the same for equal copies. It covers the model's
sizes and of each tensor, or each of these layers, name, type, shape and four pieces of 4 KiB: another model, another
quantization or a fine-tuned one differ in every piece. Reading all of a 229 GB file would take minutes. So a single flipped bit
is not detected. A copy may hold some layers only (`llamacli quantize --layers`).
"""

from glob import escape
from hashlib import blake2b
from pathlib import Path

import numpy as np

from llamacli import environment
from llamacli.errors import LlamacliError
from llamacli.files.gguf import GGUF, open_gguf
from llamacli.llama4.config import Config
from llamacli.llama4.tensors import ROPE_FREQS, layer_of
from quantize.opening import Source

PIECES, PIECE = 4, 4096


def digest(gguf: GGUF, config: Config, layers: range) -> str:
    """The digest of the parts of a file that these layers need."""
    total = blake2b(repr(config).encode(), digest_size=16)
    for name, tensor in sorted(gguf.tensors.items()):
        if layer_of(name) not in layers and name != ROPE_FREQS:
            continue
        total.update(repr((name, tensor.type.name, tensor.shape)).encode())
        _sample(total, tensor.data)
    return total.hexdigest()


def source_digest(source: Source) -> str:
    """The digest of a conversion's input: all weights, and the types that they are read as."""
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
    """This machine's copy of the file that another machine has at `path`: the file of that name in the models folder, else the
    one at that path.
    """
    named, folder = Path(path), environment.models_folder()
    return next((p for p in (folder / named.name, named) if p.exists()), None)


def own_copies(path: str) -> dict[str, range | None]:
    """This machine's copies of a model and the layers of each (held_layers): files in the models folder with its name, or with
    the names that `quantize --layers` gives to some of its layers, else the file at that path.
    """
    named, folder = Path(path), environment.models_folder()
    some = sorted(folder.glob(escape(named.stem) + "-layers-*.gguf")) if named.suffix == ".gguf" else []
    whole = own_copy(path)
    if some and whole != folder / named.name:
        found = {str(copy): held_layers(copy) for copy in some}
        return {copy: layers for copy, layers in found.items() if layers is not None} or found
    return {str(whole): held_layers(whole)} if whole else {}


def held_layers(path: Path) -> range | None:
    """The layers of a GGUF; None if it has none or cannot be read. The error is reported when the file is opened."""
    try:
        found = {layer for name in open_gguf(path).tensors if (layer := layer_of(name)) is not None}
    except LlamacliError:
        return None
    return range(min(found), max(found) + 1) if found else None
