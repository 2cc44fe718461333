"""The one door: a Hugging Face folder or a GGUF to a GGUF by a recipe.

In: paths and a recipe's name. Out: the file, and a report of what was done, fit for JSON. Order: read the header and check
everything, plan the whole file, check the output, then stream it a few rows at a time; memory stays at some megabytes for each
thread whatever the size of the model. Prints nothing.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypedDict

import numpy as np

from llamacli.errors import CheckpointError, UnsupportedModelError, UsageError
from llamacli.gguf import open_gguf
from quantize import names, sources
from quantize.encoders import encoder
from quantize.general import read_general
from quantize.hf_config import read_config
from quantize.plan import Plan, Planned, make_plan
from quantize.recipe import RECIPE_KEY, choose_types, find_recipe
from quantize.safetensors import open_checkpoint
from quantize.vocab import read_vocab
from quantize.writer import check_output, write_file

CHUNK = 1 << 19  # weights a thread takes at a time: its floats fit a core's second cache
PROGRAM = 200 << 20  # bytes of Python, NumPy and compiled code, measured
FIELDS = 20  # bytes in memory for one of metadata, measured
RAW_CHUNK = 1 << 23  # bytes copied at a time where nothing changes
VISION = ("v.", "mm.")

Progress = Callable[[int, int, str], None]


class TensorReport(TypedDict):
    """One tensor of the file."""

    name: str
    type: str
    shape: list[int]
    weights: int
    nbytes: int
    rmse: float | None  # sqrt(sum (x - q)^2 / sum x^2); None where it was not measured


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
    UsageError: an unknown type, or what is no regular expression. On every error, and on KeyboardInterrupt, no file is left
    behind.
    """
    start, src, out = time.perf_counter(), Path(src), Path(out)
    if imatrix is not None or split_max_size is not None:
        raise UsageError("--imatrix, --split-max-size: not yet")
    recipe = find_recipe(type_name)
    metadata, rows, notices = _open_folder(src) if src.is_dir() else _open_gguf(src)
    metadata.pop(RECIPE_KEY, None)
    metadata |= recipe.metadata | {"general.quantization_version": 2}
    types, more = choose_types(recipe, {name: source.shape for name, source in rows.items()}, tensor_types, imatrix is not None)
    notices += more
    plan = make_plan(metadata, rows, types)
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
    )
    if not dry_run:
        check_output(out, plan.nbytes, force)
        if planned:
            planned(report)
        _write(plan, out, force, threads, progress)
    return report | {"written": not dry_run, "seconds": round(time.perf_counter() - start, 3)}


def _row(t: Planned) -> TensorReport:
    return TensorReport(name=t.name, type=t.type.name, shape=list(t.shape), weights=t.n_weights, nbytes=t.nbytes, rmse=None)


def _memory(plan: Plan, threads: int) -> int:
    """The program, the vocabulary as Python's objects, and of each thread the floats of a piece and the pieces made of it."""
    piece = max(count * t.shape[-1] for t in plan.tensors for _, _, count in islice(_pieces(t), 1))
    encoded = max(t.type.nbytes / t.type.block for t in plan.tensors)  # bytes a weight
    return PROGRAM + FIELDS * len(plan.head) + threads * int(piece * (4 + 2 * encoded))


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
    notices = []
    if len(rows) < len(gguf.tensors):
        notices.append(f"{len(gguf.tensors) - len(rows)} vision tensors left out: the text model alone is converted")
    if any(tensor.type.block > 1 for tensor in gguf.tensors.values()):
        notices.append("the source is quantized already: quantizing twice loses more than quantizing the original once")
    return metadata, rows, notices


def _write(plan: Plan, out: Path, force: bool, threads: int, progress: Progress | None) -> None:
    done = len(plan.head)

    def counted(tensor: Planned, chunks: Iterator[np.ndarray]) -> Iterator[memoryview]:
        nonlocal done
        for chunk in chunks:
            yield memoryview(chunk).cast("B")
            done += chunk.nbytes
            if progress:
                progress(min(done, plan.nbytes), plan.nbytes, tensor.name)

    pool = ThreadPoolExecutor(threads, "encode")
    try:
        tensors = ((t.name, t.nbytes, counted(t, _encoded(t, pool, threads))) for t in plan.tensors)
        write_file(out, plan.head, tensors, force)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    if progress:
        progress(plan.nbytes, plan.nbytes, out.name)


def _encoded(tensor: Planned, pool: ThreadPoolExecutor, threads: int) -> Iterator[np.ndarray]:
    """The tensor's bytes in order, encoded ahead of the writing by up to two pieces a thread."""
    raw = tensor.source.raw(tensor.type.name)
    if raw is not None:
        yield from (raw[i : i + RAW_CHUNK] for i in range(0, len(raw), RAW_CHUNK))
        return
    encode, waiting = _Task(tensor), deque()
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

    def __init__(self, tensor: Planned):
        self._tensor, self._encoder = tensor, encoder(tensor.type.name)

    def __call__(self, group: int, first: int, count: int) -> np.ndarray:
        tensor, size = self._tensor, count * self._tensor.shape[-1]
        if getattr(_scratch, "floats", np.empty(0)).size < size:
            _scratch.floats = np.empty(size, np.float32)
        values = _scratch.floats[:size].reshape(count, -1)
        tensor.source.read(group, first, values)
        sources.check(values, self._encoder.limit, tensor.name, tensor.type.name)
        return self._encoder.encode(values, None)
