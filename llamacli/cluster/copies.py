"""Whether a node's copy of a file is the same as another's, as far as some layers are concerned.

In: an open GGUF, layers. Out: a digest, the same for equal copies. It covers the model's sizes, the table of tensors (names,
types, shapes, places in the file) and of each tensor of these layers four pieces of 4 KiB: another model, another quantization
or a fine-tuned one differ in every piece. Reading all of a 229 GB file would take minutes; a single flipped bit is not found.
"""

from hashlib import blake2b
from pathlib import Path

from llamacli import environment
from llamacli.files.gguf import GGUF
from llamacli.llama4.config import Config
from llamacli.llama4.tensors import find

PIECES, PIECE = 4, 4096


def digest(gguf: GGUF, config: Config, layers: range) -> str:
    """The digest of the parts of a file that these layers need."""
    total = blake2b(repr(config).encode(), digest_size=16)
    for name, tensor in sorted(gguf.tensors.items()):
        total.update(repr((name, tensor.type.name, tensor.shape, tensor.offset)).encode())
        found = find(name)
        if found is None or (found[1] not in layers and found[0].kind != "rope_freqs"):
            continue
        for k in range(PIECES):
            at = (tensor.nbytes - PIECE) * k // (PIECES - 1)
            total.update(tensor.data.reshape(-1)[max(0, at) : max(0, at) + PIECE].tobytes())
    return total.hexdigest()


def own_copy(path: str) -> Path | None:
    """This machine's copy of a file that another machine calls `path`: by its name in the models folder, else at that path."""
    named = Path(path)
    return next((p for p in (environment.models_folder() / named.name, named) if p.is_file()), None)
