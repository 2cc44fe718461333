"""The one door: a Hugging Face folder or a GGUF to a GGUF by a recipe.

In: paths and a recipe's name. Out: the file, and a report of what was done, fit for JSON. Order: read the header and check
everything, plan the whole file, check the output, then stream it a few rows at a time; memory stays at some megabytes for each
thread whatever the size of the model. Prints nothing.
"""

import math
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
from typing import TypedDict

import numpy as np

from llamacli.config import Config
from llamacli.errors import CheckpointError, OutputError, UnsupportedModelError, UsageError
from llamacli.gguf import open_gguf
from llamacli.kernels import sources_digest
from quantize import names, sources
from quantize.encoders import encoder, widen
from quantize.general import read_general
from quantize.hf_config import HFConfig, read_config
from quantize.imatrix import Imatrix, read_imatrix
from quantize.journal import File, Maker, left_over, part_of, write_files
from quantize.plan import Plan, Planned, make_plan
from quantize.recipe import RECIPE_KEY, choose_types, find_recipe
from quantize.safetensors import open_checkpoint, shard_paths
from quantize.vocab import read_vocab
from quantize.writer import check_output

CHUNK = 1 << 19  # weights a thread takes at a time: its floats fit a core's second cache
PROGRAM = 200 << 20  # bytes of Python, NumPy and compiled code, measured
FIELDS = 20  # bytes in memory for one of metadata, measured
VISION, ROPE = ("v.", "mm."), "rope_"
DESCRIPTIONS = (  # what a folder says beside the weights
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "README.md"),
    *("chat_template.jinja", "chat_template.json", "special_tokens_map.json", "model.safetensors.index.json"),
)

Progress = Callable[[int, int, str], None]


class TensorReport(TypedDict):
    """One tensor of the file."""

    name: str
    type: str
    shape: list[int]
    weights: int
    nbytes: int
    rmse: float | None  # sqrt(sum (x - q)^2 / sum x^2); None where it was not measured, or all x are 0
    energy: float | None  # sum x^2


class Report(TypedDict):
    """What was made, or with dry_run would be."""

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
    resumed_bytes: int  # of tensors that an interrupted run had finished
    memory: int  # bytes that making it takes at most, beside the mapped pages of source and file


def convert(
    src: str | Path,
    out: str | Path,
    type_name: str,
    *,
    tensor_types: Sequence[tuple[str, str]] = (),
    imatrix: Path | None = None,
    split_max_size: int | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    planned: Callable[[Report], None] | None = None,
    dry_run: bool = False,
) -> Report:
    """Make `out` by the recipe `type_name`; `tensor_types` are (regular expression, type), as `choose_types` takes them.

    `planned` gets the report before a byte is written, `progress(done, total, tensor)` bytes of the file; `threads` None means
    every core this process may use.

    CheckpointError or ModelFileError: the source is not fit. OutputError: `out` exists without `force`, or cannot be written.
    UsageError: an unknown type, what is no regular expression, another model's importance matrix. On every error no file is
    left behind; killed or interrupted, the same call goes on where it stopped (journal.py).
    """
    start, src, out = time.perf_counter(), Path(src), Path(out)
    out = out.resolve() if out.is_symlink() else out  # what the link stands for is written, not the link
    importance = None if imatrix is None else read_imatrix(imatrix)
    recipe = find_recipe(type_name)
    metadata, rows, notices = _open_folder(src) if src.is_dir() else _open_gguf(src)
    for key in [key for key in metadata if key == RECIPE_KEY or key.startswith("quantize.imatrix.")]:
        del metadata[key]  # of another conversion
    metadata |= recipe.metadata | {"general.quantization_version": 2}
    types, more = choose_types(recipe, {name: source.shape for name, source in rows.items()}, tensor_types, imatrix is not None)
    notices += more
    if importance:
        notices += _weigh(importance, rows, metadata)
    plan = make_plan(metadata, rows, types, split_max_size)
    files = [
        File(path, part.head, [(t.name, t.nbytes) for t in part.tensors])
        for path, part in zip(plan.paths(out), plan.parts, strict=True)
    ]
    n_weights, threads = sum(t.n_weights for t in plan.tensors), threads or _cores()
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
    )
    if dry_run:
        return report | {"seconds": round(time.perf_counter() - start, 3)}
    inputs = _inputs(src, imatrix)
    job = _job(plan, inputs)
    _check_outputs(out, files, inputs, job, force, plan.nbytes)
    if planned:
        planned(report)
    making = _Making(plan, importance, threads, progress)
    making.write(files, job, force)
    for tensor in report["tensors"]:
        tensor["rmse"], tensor["energy"] = making.rmse(tensor["name"]), making.errors[tensor["name"]][1]
    seconds = round(time.perf_counter() - start, 3)
    return report | {"written": True, "seconds": seconds, "resumed_bytes": making.resumed}


def _check_outputs(out: Path, files: list[File], inputs: list[Path], job: str, force: bool, nbytes: int) -> None:
    """OutputError unless all files can be made, what an earlier attempt left of them counted as room."""
    check_output(out, 0, force=True)
    left = left_over(files, job)
    nbytes -= sum(path.stat().st_size for path in left)
    for file in files:
        for path in (file.path, part_of(file.path)):
            if path.exists() and any(path.samefile(read) for read in inputs):
                raise OutputError(f"{path}: expected another file than the source, found the source itself; choose a new name")
        check_output(file.path, nbytes, force or file.path in left)


def _weigh(importance: Imatrix, rows: dict[str, sources.Rows], metadata: dict) -> list[str]:
    """Check an importance matrix against the model before anything is written, and say in the file that it was used."""
    known = [name for name, source in rows.items() if importance.weights(name, source.shape) is not None]
    if not known:
        raise UsageError(f"{importance.path}: expected sums for this model's tensors, found none; make it of this model")
    metadata |= {
        "quantize.imatrix.file": importance.path.name,
        "quantize.imatrix.dataset": ", ".join(importance.datasets),
        "quantize.imatrix.entries_count": len(known),
        "quantize.imatrix.chunks_count": importance.chunk_count,
    }
    unseen = {name: experts for name, experts in importance.unseen.items() if name in rows}
    if not unseen:
        return []
    count = max(map(len, unseen.values()))
    alone = all(len(experts) == len(importance.entries[name].counts) for name, experts in unseen.items())
    how = "without weights" if alone else "as the others of their layer are"
    return [f"{importance.path}: up to {count} experts a layer saw no text; they are weighed {how}"]


def _row(t: Planned) -> TensorReport:
    return TensorReport(
        name=t.name, type=t.type.name, shape=list(t.shape), weights=t.n_weights, nbytes=t.nbytes, rmse=None, energy=None
    )


def _memory(plan: Plan, threads: int) -> int:
    """The program, the vocabulary as Python's objects, and of each thread the floats of a piece and the pieces made of it."""
    piece = max(count * t.shape[-1] for t in plan.tensors for _, _, count in islice(_pieces(t), 1))
    encoded = max(t.type.nbytes / t.type.block for t in plan.tensors)  # bytes a weight
    return PROGRAM + FIELDS * sum(len(part.head) for part in plan.parts) + threads * int(piece * (8 + 2 * encoded))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _open_folder(folder: Path) -> tuple[dict, dict[str, sources.Rows], list[str]]:
    """A checkpoint's metadata, rows by GGUF name, and notices."""
    config = read_config(folder)
    rows, notices = names.match(folder, open_checkpoint(folder), config)
    if config.rope_freqs is not None:
        rows["rope_freqs.weight"] = sources.Made(config.rope_freqs)
    fields, more = read_vocab(folder, config.sizes["vocab"], config.raw)
    general, licence = read_general(folder, rows)
    return general | config.metadata | fields, rows, config.notices + notices + more + licence


def _open_gguf(path: Path) -> tuple[dict, dict[str, sources.Rows], list[str]]:
    """A GGUF's metadata without what only that file needs, rows by name, and notices."""
    gguf = open_gguf(path)
    architecture = gguf.metadata.get("general.architecture")
    if architecture != "llama4":
        found = str(architecture)[:40]
        raise UnsupportedModelError(f"{path}: expected architecture llama4, found {found!r}; only Llama 4 can be converted")
    kept = (key for key in gguf.metadata if not key.startswith("split.") and key != "general.alignment")
    metadata = {key: gguf.metadata.typed(key) for key in kept}
    rows = {name: sources.Dequantized(tensor) for name, tensor in gguf.tensors.items() if not name.startswith(VISION)}
    if not rows:
        raise CheckpointError(f"{path}: expected a model's tensors, found none; nothing to convert")
    _check_tensors(path, {name: source.shape for name, source in rows.items()}, Config.from_gguf(gguf))
    notices = []
    if len(rows) < len(gguf.tensors):
        notices.append(f"{len(gguf.tensors) - len(rows)} vision tensors left out: the text model alone is converted")
    if any(tensor.type.block > 1 for tensor in gguf.tensors.values()):
        notices.append("the source is quantized already: quantizing twice loses more than quantizing the original once")
    return metadata, rows, notices


def _check_tensors(path: Path, found: dict[str, tuple[int, ...]], c: Config) -> None:
    """CheckpointError unless a GGUF holds the tensors that its metadata speak of, and no others."""
    head = {"vocab": c.n_vocab, "hidden": c.n_embd, "q": c.n_heads * c.head_dim, "kv": c.n_kv_heads * c.head_dim}
    sizes = head | {"dense": c.n_ff, "experts": c.n_experts, "expert": c.n_ff_exp, "two expert": 2 * c.n_ff_exp}
    told = HFConfig(c.n_layers, c.n_experts, c.moe_step, "output.weight" not in found, sizes, {}, None, {}, [])
    wanted = names.shapes(told)
    for name, shape in wanted.items():
        if found.get(name) != shape:
            what = list(found[name]) if name in found else "none"
            raise CheckpointError(f"{path}: expected {name} as {list(shape)}, found {what}; the file is damaged")
    if more := sorted(name for name in found.keys() - wanted.keys() if not name.startswith(ROPE)):
        raise CheckpointError(f"{path}: expected tensors of Llama 4, found {more[0][:80]!r}, which has no place in its GGUF")


class _Making:
    """Makes tensors for journal.write_files and remembers each one's error: sums of (x - q)^2 and of x^2."""

    def __init__(self, plan: Plan, imatrix: Imatrix | None, threads: int, progress: Progress | None):
        self._tensors = {tensor.name: tensor for tensor in plan.tensors}
        self._nbytes, self._imatrix, self._threads, self._progress = plan.nbytes, imatrix, threads, progress
        self._done = sum(len(part.head) for part in plan.parts)
        self.errors: dict[str, tuple[float, float]] = {}
        self.resumed = 0

    def write(self, files: list[File], job: str, force: bool) -> None:
        with ThreadPoolExecutor(self._threads, "encode") as self._pool:
            try:
                write_files(files, job, Maker(self._make, self._note, self._skip), force)
            finally:
                self._pool.shutdown(wait=True, cancel_futures=True)
        self._tell(self._nbytes - self._done, files[0].path.name)

    def _make(self, name: str) -> Iterator[memoryview]:
        tensor = self._tensors[name]
        wrong, whole = 0.0, 0.0
        for chunk, errors in _encoded(tensor, self._imatrix, self._pool, self._threads):
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

    def _tell(self, nbytes: int, name: str) -> None:
        self._done = min(self._done + nbytes, self._nbytes)
        if self._progress:
            self._progress(self._done, self._nbytes, name)

    def rmse(self, name: str) -> float | None:
        """Relative to the weights; None where there is nothing to be relative to."""
        wrong, whole = self.errors[name]
        return math.sqrt(wrong / whole) if whole > 0 else None


def _inputs(src: Path, imatrix: Path | None) -> list[Path]:
    """The files that a conversion reads."""
    if src.is_dir():
        found = [path for path in (*shard_paths(src), *(src / name for name in DESCRIPTIONS)) if path.is_file()]
    else:
        found = [src, *(path for path in sorted(src.parent.glob("*.gguf")) if path != src and _same_model(path, src))]
    return [*found, imatrix] if imatrix else found


def _same_model(path: Path, src: Path) -> bool:
    """Whether `path` is `src` or another part of the same split model."""
    return re.sub(r"-\d{5}-of-", "-", path.name) == re.sub(r"-\d{5}-of-", "-", src.name)


def _job(plan: Plan, inputs: list[Path]) -> str:
    """What must be the same for a conversion to be taken up: the program, the plan and the files it reads."""
    digest = blake2b(digest_size=16)
    for folder in (Path(__file__).parent, Path(__file__).parent / "encoders"):
        digest.update(sources_digest(folder).encode())
    for part in plan.parts:
        digest.update(part.head)
    for path in inputs:
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _encoded(
    tensor: Planned, imatrix: Imatrix | None, pool: ThreadPoolExecutor, threads: int
) -> Iterator[tuple[np.ndarray, tuple[float, float]]]:
    """The tensor's bytes in order, each piece with its error, encoded ahead of the writing by up to two pieces a thread."""
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
        self._tensor, self._weights, self._encoder = tensor, weights, encoder(tensor.type.name)
        self._raw = tensor.source.raw(tensor.type.name)  # bytes that are right as they are, once their values are checked

    def __call__(self, group: int, first: int, count: int) -> tuple[np.ndarray, tuple[float, float]]:
        tensor, size = self._tensor, count * self._tensor.shape[-1]
        if getattr(_scratch, "floats", np.empty((2, 0))).shape[1] < size:
            _scratch.floats = np.empty((2, size), np.float32)
        values, back = (floats[:size].reshape(count, -1) for floats in _scratch.floats)
        tensor.source.read(group, first, values)
        sources.check(values, self._encoder.limit, tensor.name, tensor.type.name)
        if self._raw is not None:
            row, n_rows = tensor.type.row_bytes(tensor.shape[-1]), sources.groups_and_rows(tensor.shape)[1]
            start = (group * n_rows + first) * row
            return self._raw[start : start + count * row], (0.0, float(np.vdot(values, values)))
        encoded = self._encoder.encode(values, None if self._weights is None else self._weights[group])
        return encoded, widen.error(tensor.type.name, encoded, values, back)
