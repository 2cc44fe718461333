"""Converts a Hugging Face folder or a GGUF to a GGUF by a recipe.

In: paths and the name of a recipe. Out: the file, and a report ready for JSON. `convert` reads and checks all headers, plans
the whole file, checks the output and then streams it a few rows at a time. Memory stays at a few megabytes a thread for any
model. Nothing is printed.
"""

import math
import mmap
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np

from llamacli.cpu.kernels import sources_digest
from llamacli.cpu.kernels.cores import usable_cpus
from llamacli.cpu.kernels.runtime.faults import Guard
from llamacli.errors import CheckpointError, ModelFileError, OutputError, UnsupportedModelError, UsageError
from llamacli.files.ggml import BY_NAME
from llamacli.files.gguf import GGUF, Tensor, open_gguf, text_of
from llamacli.llama4.config import Config
from llamacli.llama4.tensors import ROPE_FREQS, TOKEN_EMBD, Role, check, role_of, tensors
from llamacli.llama4.vision import has_ollama_tower
from llamacli.text.tokenizer import Tokenizer
from quantize import names, sources, tower
from quantize.encoders import encoder, widen
from quantize.general import printable, read_general
from quantize.hf_config import read_config
from quantize.imatrix import Imatrix, read_imatrix
from quantize.journal import File, Maker, left_over, log_of, part_of, write_files
from quantize.plan import Plan, Planned, make_plan
from quantize.recipe import RECIPE_KEY, choose_types, find_recipe
from quantize.safetensors import INDEX, open_checkpoint, shard_paths
from quantize.vocab import read_vocab
from quantize.writer import check_not_input, check_output

CHUNK = 1 << 19  # weights per task: its floats fit a core's L2 cache
PROGRAM = 200 << 20  # bytes of Python, NumPy and compiled code, measured
FIELDS = 20  # bytes in memory per byte of metadata, measured
LARGEST = float(np.finfo(np.float32).max)
DESCRIPTIONS = (  # files of a folder that are read beside the weights
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "README.md"),
    *("chat_template.jinja", "chat_template.json", INDEX, "preprocessor_config.json", "processor_config.json"),
)

Progress = Callable[[int, int, str], None]


class TensorReport(TypedDict):
    """One tensor of the file."""

    name: str
    type: str
    shape: list[int]
    weights: int
    nbytes: int
    rmse: float | None  # sqrt(sum (x - q)^2 / sum x^2); None if it was not measured, or all x are 0
    energy: float | None  # sum x^2


class Report(TypedDict):
    """What was written, or with dry_run would be."""

    source: str
    out: str
    type: str
    tensors: list[TensorReport]
    n_weights: int
    nbytes: int
    bits_per_weight: float
    notices: list[str]
    written: bool
    seconds: float
    files: list[str]  # one, or the parts of a split
    resumed_bytes: int  # of tensors that an earlier run had finished
    memory: int  # bytes that the conversion takes at most, beside the mapped pages of source and file
    mmproj: str | None  # the file of the vision tower, one of `files`


def convert(
    src: str | Path,
    out: str | Path,
    type_name: str,
    *,
    tensor_types: Sequence[tuple[str, str]] = (),
    imatrix: Path | None = None,
    split_max_size: int | None = None,
    mmproj_type: str | None = tower.DEFAULT,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    planned: Callable[[Report], None] | None = None,
    dry_run: bool = False,
) -> Report:
    """Make `out` by the recipe `type_name`; `tensor_types` are (regular expression, type), as `choose_types` takes them.

    A vision tower becomes a file of its own beside it (tower.py), its matrices of `mmproj_type`; None leaves it out. A source
    that is a tower alone becomes `out`.

    `planned` gets the report before a byte is written, `progress(done, total, tensor)` bytes of the file; `threads` None means
    every core this process may use.

    CheckpointError or ModelFileError: the source cannot be converted. OutputError: `out` exists without `force`, or cannot be
    written. UsageError: an unknown type, a bad regular expression, another model's importance matrix. Whatever stops it,
    finished tensors are kept and the same call continues after them (journal.py).
    """
    start, src, out = time.perf_counter(), Path(src), Path(out)
    importance = None if imatrix is None else read_imatrix(imatrix)
    recipe = find_recipe(type_name)
    metadata, rows, notices, inputs, maps, sight = _open_folder(src) if src.is_dir() else _open_gguf(src)
    for key in [key for key in metadata if key == RECIPE_KEY or key.startswith("quantize.imatrix.")]:
        del metadata[key]  # of another conversion
    metadata |= recipe.metadata | {"general.quantization_version": 2}
    types, more = choose_types(recipe, {name: source.shape for name, source in rows.items()}, tensor_types, imatrix is not None)
    notices += more
    if importance:
        notices += _check_imatrix(importance, rows, metadata)
    plan, mmproj = make_plan(metadata, rows, types, split_max_size) if rows else Plan([]), None
    paths = plan.paths(out) if rows else []
    if sight and rows and mmproj_type is None:
        notices.append(f"{len(sight.rows)} vision tensors left out: the text model alone is converted")
    elif sight:
        kind = mmproj_type if rows or recipe.name not in tower.FILE_TYPES else recipe.name
        mmproj = _target(tower.beside(out) if rows else out)
        more = make_plan(sight.metadata(text_of(metadata, "general.name"), kind), sight.rows, sight.types(kind))
        plan, paths = Plan([*plan.parts, *more.parts]), [*paths, mmproj]
    files = [
        File(_target(path), part.head, [(t.name, t.nbytes) for t in part.tensors])
        for path, part in zip(paths, plan.parts, strict=True)
    ]
    n_weights, threads = sum(t.n_weights for t in plan.tensors), threads or usable_cpus()
    report = Report(
        source=str(src),
        out=str(out),
        type=recipe.name,
        tensors=[_row(tensor) for tensor in plan.tensors],
        n_weights=n_weights,
        nbytes=plan.nbytes,
        bits_per_weight=round(8 * sum(t.nbytes for t in plan.tensors) / n_weights, 3),
        notices=notices,
        written=False,
        seconds=0.0,
        memory=_memory(plan, threads),
        files=[str(file.path) for file in files],
        resumed_bytes=0,
        mmproj=mmproj and str(mmproj),
    )
    if dry_run:
        return report | {"seconds": round(time.perf_counter() - start, 3)}
    inputs += [imatrix] if imatrix else []
    job = _job(plan, [path for path in inputs if path not in maps])
    _check_outputs(out, files, inputs, job, force, plan.nbytes)
    notices += _orphans(out, files)
    if planned:
        planned(report)
    maker = _TensorMaker(plan, importance, threads, progress, maps)
    maker.write(files, job, force)
    for tensor in report["tensors"]:
        tensor["rmse"], tensor["energy"] = maker.rmse(tensor["name"]), maker.errors[tensor["name"]][1]
    seconds = round(time.perf_counter() - start, 3)
    return report | {"written": True, "seconds": seconds, "resumed_bytes": maker.resumed}


def _target(path: Path) -> Path:
    """The file to write: a link is followed, not replaced."""
    try:
        return path.resolve() if path.is_symlink() else path
    except (OSError, RuntimeError):
        raise OutputError(f"{path}: expected a link to a file, found one that leads in a circle; choose another name") from None


def _check_outputs(out: Path, files: list[File], inputs: list[Path], job: str, force: bool, nbytes: int) -> None:
    """OutputError unless all files can be written; the files of an earlier attempt count as free room."""
    check_output(out, 0, force=True)
    left = left_over(files, job)
    nbytes -= sum(path.stat().st_size for path in left)
    for file in files:
        for path in (file.path, part_of(file.path), log_of(files)):
            check_not_input(path, inputs)
        check_output(file.path, nbytes, force or file.path in left)


def _orphans(out: Path, files: list[File]) -> list[str]:
    """A notice about files of a stopped conversion to `out` that had another number of parts, which this one cannot use."""
    names = {path.name for file in files for path in (part_of(file.path), log_of(files))}
    ours = re.compile(re.escape(out.name.removesuffix(".gguf")) + r"(-\d{5}-of-\d{5})?\.gguf\.part(\.log)?")
    found = sorted(path.name for path in out.parent.iterdir() if ours.fullmatch(path.name) and path.name not in names)
    if not found:
        return []
    return [f"left by a conversion in another number of files, to be removed by hand: {', '.join(found)}"]


def _check_imatrix(importance: Imatrix, rows: dict[str, sources.Rows], metadata: dict) -> list[str]:
    """Check an importance matrix against the model before anything is written, and name it in the metadata."""
    known = [name for name, source in rows.items() if importance.weights(name, source.shape) is not None]
    if not known:
        raise UsageError(f"{importance.path}: expected sums for this model's tensors, found none; make it of this model")
    metadata |= {
        "quantize.imatrix.file": printable(importance.path.name),
        "quantize.imatrix.dataset": ", ".join(importance.datasets),
        "quantize.imatrix.entries_count": len(known),
        "quantize.imatrix.chunks_count": importance.chunk_count,
    }
    notices, entries = [], importance.entries
    if empty := [name for name in known if not (entries[name].sums.any() and entries[name].counts.any())]:
        notices.append(f"{importance.path}: {len(empty)} of {len(known)} tensors saw no text; all their columns count alike")
    unseen = {name: experts for name, experts in importance.unseen.items() if name in known and name not in empty}
    if unseen:
        count = max(map(len, unseen.values()))
        notices.append(
            f"{importance.path}: up to {count} experts a layer saw no text; they are weighed like the others of their layer"
        )
    return notices


def _row(t: Planned) -> TensorReport:
    unknown = {"rmse": None, "energy": None}
    return TensorReport(name=t.name, type=t.type.name, shape=list(t.shape), weights=t.n_weights, nbytes=t.nbytes, **unknown)


def _memory(plan: Plan, threads: int) -> int:
    """The program, the vocabulary as Python objects, and for each thread the floats of a piece and its encoded pieces."""
    piece = max(count * t.shape[-1] for t in plan.tensors for _, _, count in islice(_pieces(t), 1))
    encoded = max(t.type.nbytes / t.type.block for t in plan.tensors)  # bytes a weight
    return PROGRAM + FIELDS * sum(len(part.head) for part in plan.parts) + threads * int(piece * (8 + 2 * encoded))


class _Source(NamedTuple):
    """An open source. `rows` by GGUF name; `inputs`: every file that it is read from; `maps`: those that are mapped."""

    metadata: dict[str, object]
    rows: dict[str, sources.Rows]
    notices: list[str]
    inputs: list[Path]
    maps: dict[Path, mmap.mmap]
    tower: tower.Tower | None


def _open_folder(folder: Path) -> _Source:
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
    return _Source(metadata, rows, notices, inputs, checkpoint.maps, sight)


def _open_gguf(path: Path) -> _Source:
    """Of the metadata everything but what describes this one file (its parts, its alignment)."""
    gguf = open_gguf(path)
    architecture, maps = text_of(gguf.metadata, "general.architecture"), dict(zip(gguf.paths, gguf.maps, strict=True))
    if architecture == "clip":
        name = {key: value for key, value in gguf.metadata.items() if key == "general.name"}
        return _Source(name, {}, [], gguf.paths, maps, tower.of_gguf(gguf))
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
    return _Source(metadata, rows, notices, gguf.paths, maps, sight)


def _check_vocab(folder: Path, metadata: dict[str, object], shape: tuple[int, ...]) -> None:
    """Build the tokenizer that a reader of the file will build: CheckpointError before anything is written if it is unsound."""
    embedding = Tensor(TOKEN_EMBD, BY_NAME["F32"], shape, np.empty(0, np.uint8), folder, 0)
    try:
        Tokenizer.from_gguf(GGUF(folder / "tokenizer.json", 3, metadata, {embedding.name: embedding}, 0, [], []))
    except ModelFileError as error:
        raise CheckpointError(str(error)) from None


class _TensorMaker:
    """Encodes tensors for journal.write_files and records each one's error: sums of (x - q)^2 and of x^2."""

    def __init__(
        self, plan: Plan, imatrix: Imatrix | None, threads: int, progress: Progress | None, maps: dict[Path, mmap.mmap]
    ):
        self._paths, self._guard, self._stamps = list(maps), Guard(list(maps.values())), {}
        self._tensors = {tensor.name: tensor for tensor in plan.tensors}
        self._nbytes, self._imatrix, self._threads, self._progress = plan.nbytes, imatrix, threads, progress
        self._done = sum(len(part.head) for part in plan.parts)
        self.errors: dict[str, tuple[float, float]] = {}
        self.resumed = 0

    def write(self, files: list[File], job: str, force: bool) -> None:
        with ThreadPoolExecutor(self._threads, "encode") as self._pool:
            try:
                write_files(files, job, Maker(self._make, self._note, self._skip, self._source), force)
            finally:
                self._pool.shutdown(wait=True, cancel_futures=True)
        self._tell(self._nbytes - self._done, files[0].path.name)

    def _make(self, name: str) -> Iterator[memoryview]:
        tensor = self._tensors[name]
        wrong, whole = 0.0, 0.0
        for chunk, errors in _encoded(tensor, self._imatrix, self._pool, self._threads):
            if (part := self._guard.broken) is not None:
                raise ModelFileError(
                    f"{self._paths[part]}: expected to read all of {name}, found the file cut or its disk failing; restore it"
                )
            yield memoryview(chunk).cast("B")
            wrong, whole = wrong + errors[0], whole + errors[1]
            self._tell(chunk.nbytes, name)
        self.errors[name] = wrong, whole

    def _note(self, name: str) -> str:
        return "{!r} {!r}".format(*self.errors[name])

    def _skip(self, name: str, note: str) -> None:
        wrong, whole = map(float, note.split())
        self.errors[name] = wrong, whole
        self.resumed += self._tensors[name].nbytes
        self._tell(self._tensors[name].nbytes, name)

    def _source(self, name: str) -> str:
        """Names, sizes and times of the mapped files that a tensor is read from."""
        paths = sorted(self._tensors[name].source.paths)
        for path in paths:
            if path not in self._stamps:
                self._stamps[path] = _stamp(path)
        return blake2b(b"".join(self._stamps[path] for path in paths), digest_size=16).hexdigest()

    def _tell(self, nbytes: int, name: str) -> None:
        self._done = min(self._done + nbytes, self._nbytes)
        if self._progress:
            self._progress(self._done, self._nbytes, name)

    def rmse(self, name: str) -> float | None:
        """Relative to the weights; None if they are all 0."""
        wrong, whole = self.errors[name]
        return math.sqrt(wrong / whole) if whole > 0 else None


def _job(plan: Plan, inputs: list[Path]) -> str:
    """What must be the same for a conversion to be continued: the program, the plan and the files other than weights.

    Each tensor's own source counts beside it (`_source`), so that a damaged shard can be replaced without starting again.
    """
    digest = blake2b(digest_size=16)
    for folder in (Path(__file__).parent, Path(__file__).parent / "encoders"):
        digest.update(sources_digest(folder).encode())
    for part in plan.parts:
        digest.update(part.head)
    for path in inputs:
        digest.update(_stamp(path))
    return digest.hexdigest()


def _stamp(path: Path) -> bytes:
    """Name, size and time of a file."""
    status = path.stat()
    return os.fsencode(path.name) + b" %d %d\n" % (status.st_size, status.st_mtime_ns)


def _encoded(
    tensor: Planned, imatrix: Imatrix | None, pool: ThreadPoolExecutor, threads: int
) -> Iterator[tuple[np.ndarray, tuple[float, float]]]:
    """The tensor's pieces in order, each with its error; encoding runs ahead of writing by up to two pieces a thread."""
    encode, waiting = _Task(tensor, imatrix.weights(tensor.name, tensor.shape) if imatrix else None), deque()
    for piece in _pieces(tensor):
        waiting.append(pool.submit(encode, *piece))
        if len(waiting) > 2 * threads:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _pieces(tensor: Planned) -> Iterator[tuple[int, int, int]]:
    """(group, first row, rows) of about CHUNK weights, in file order."""
    n_groups, n_rows = sources.groups_and_rows(tensor.shape)
    unit = tensor.source.unit
    step = max(1, CHUNK // tensor.shape[-1] // unit) * unit
    for group in range(n_groups):
        for first in range(0, n_rows, step):
            yield group, first, min(step, n_rows - first)


_scratch = threading.local()


class _Task:
    """Read, check and encode one piece; runs in a thread of the pool."""

    def __init__(self, tensor: Planned, weights: np.ndarray | None):
        self._tensor, self._weights = tensor, weights
        self._raw = tensor.source.raw(tensor.type.name)  # bytes to be copied, once their values are checked
        self._encoder = encoder(tensor.type.name) if self._raw is None else None

    def __call__(self, group: int, first: int, count: int) -> tuple[np.ndarray, tuple[float, float]]:
        tensor, size = self._tensor, count * self._tensor.shape[-1]
        if getattr(_scratch, "floats", np.empty((2, 0))).shape[1] < size:
            _scratch.floats = np.empty((2, size), np.float32)
        values, back = (floats[:size].reshape(count, -1) for floats in _scratch.floats)
        tensor.source.read(group, first, values)
        sources.check(values, self._encoder.limit if self._encoder else LARGEST, tensor.name, tensor.type.name)
        if self._encoder is None:
            row, n_rows = tensor.type.row_bytes(tensor.shape[-1]), sources.groups_and_rows(tensor.shape)[1]
            start = (group * n_rows + first) * row
            return self._raw[start : start + count * row].copy(), widen.squares(values, values)  # no view: the file may be cut
        encoded = self._encoder.encode(values, None if self._weights is None else self._weights[group])
        return encoded, widen.error(tensor.type.name, encoded, values, back)
