"""Opens a source: a Hugging Face folder or a GGUF, checked, its tensors as rows.

In: a path. Out: `Source`. CheckpointError, ModelFileError or UnsupportedModelError: it cannot be converted.
"""

import mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llamacli.errors import CheckpointError, ModelFileError, UnsupportedModelError
from llamacli.files.ggml import BY_NAME
from llamacli.files.gguf import GGUF, Tensor, open_gguf, text_of
from llamacli.llama4.config import Config
from llamacli.llama4.tensors import ROPE_FREQS, TOKEN_EMBD, Role, check, role_of, tensors
from llamacli.llama4.vision import has_ollama_tower
from llamacli.text.tokenizer import Tokenizer
from quantize import names, sources, tower
from quantize.general import read_general
from quantize.hf_config import read_config
from quantize.safetensors import INDEX, open_checkpoint, shard_paths
from quantize.vocab import read_vocab

DESCRIPTIONS = (  # files of a folder that are read beside the weights
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "README.md"),
    *("chat_template.jinja", "chat_template.json", INDEX, "preprocessor_config.json", "processor_config.json"),
)


class Source(NamedTuple):
    """An open source. `rows` by GGUF name; `inputs`: every file that it is read from; `maps`: those that are mapped; `stored`:
    dtype and values of each tensor by the name that it is stored under.
    """

    metadata: dict[str, object]
    rows: dict[str, sources.Rows]
    notices: list[str]
    inputs: list[Path]
    maps: dict[Path, mmap.mmap]
    tower: tower.Tower | None
    stored: dict[str, tuple[str, np.ndarray]]

    @property
    def all_rows(self) -> dict[str, sources.Rows]:
        """`rows`, and those of the vision tower."""
        return self.rows | (self.tower.rows if self.tower else {})


def open_source(path: Path) -> Source:
    """A folder or a GGUF, open and checked."""
    return _of_folder(path) if path.is_dir() else _of_gguf(path)


def _of_folder(folder: Path) -> Source:
    config, checkpoint = read_config(folder), open_checkpoint(folder)
    rows, vision = names.match(folder, checkpoint, config)
    sight = tower.of_folder(folder, vision, config.model.n_embd)
    notices = []
    if vision and not sight:
        notices.append(f"{len(vision)} vision tensors left out: config.json has no vision_config")
    if config.rope_freqs is not None:
        rows[ROPE_FREQS] = sources.InMemory(config.rope_freqs)
    fields, more = read_vocab(folder, config.model.n_vocab, config.raw)
    _check_vocab(folder, fields, rows[TOKEN_EMBD].shape)
    general, licence = read_general(folder, rows)
    inputs = [*shard_paths(folder), *(path for name in DESCRIPTIONS if (path := folder / name).is_file())]
    metadata, notices = general | config.model.metadata | fields, config.notices + notices + more + licence
    stored = {name: (tensor.dtype, tensor.values) for name, tensor in checkpoint.items()}
    return Source(metadata, rows, notices, inputs, checkpoint.maps, sight, stored)


def _of_gguf(path: Path) -> Source:
    """Of the metadata everything but what describes this one file (its parts, its alignment)."""
    gguf = open_gguf(path)
    architecture, maps = text_of(gguf.metadata, "general.architecture"), dict(zip(gguf.paths, gguf.maps, strict=True))
    stored = {name: (tensor.type.name, tensor.data) for name, tensor in gguf.tensors.items()}
    if architecture == "clip":
        name = {key: value for key, value in gguf.metadata.items() if key == "general.name"}
        return Source(name, {}, [], gguf.paths, maps, tower.of_gguf(gguf), stored)
    if architecture != "llama4":
        found = str(architecture)[:40]
        raise UnsupportedModelError(f"{path}: expected architecture llama4, found {found!r}; only Llama 4 can be converted")
    if "tokenizer.ggml.tokens" in gguf.metadata:
        Tokenizer.from_gguf(gguf)  # an unsound vocabulary is an error now rather than when the new file is run
    kept = (k for k in gguf.metadata if not k.startswith(("split.", "llama4.vision.")) and k != "general.alignment")
    metadata = {key: gguf.metadata.typed(key) for key in kept}
    rows = {name: sources.Dequantized(tensor) for name, tensor in gguf.tensors.items() if role_of(name) is not Role.VISION}
    shapes = {name: source.shape for name, source in rows.items()}
    check(path, shapes, tensors(Config.from_gguf(gguf)), complete=True)
    notices, sight = [], tower.of_gguf(gguf) if has_ollama_tower(gguf) else None
    if len(rows) < len(gguf.tensors) and not sight:
        notices.append(f"{len(gguf.tensors) - len(rows)} vision tensors left out: the text model alone is converted")
    if any(tensor.type.block > 1 for tensor in gguf.tensors.values()):
        notices.append("the source is quantized already: quantizing twice loses more than quantizing the original once")
    return Source(metadata, rows, notices, gguf.paths, maps, sight, stored)


def _check_vocab(folder: Path, metadata: dict[str, object], shape: tuple[int, ...]) -> None:
    """Build the tokenizer that a reader of the file will build: CheckpointError before anything is written if it is unsound."""
    embedding = Tensor(TOKEN_EMBD, BY_NAME["F32"], shape, np.empty(0, np.uint8), folder, 0)
    try:
        Tokenizer.from_gguf(GGUF(folder / "tokenizer.json", 3, metadata, {embedding.name: embedding}, 0, [], []))
    except ModelFileError as error:
        raise CheckpointError(str(error)) from None
