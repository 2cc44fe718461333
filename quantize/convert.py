"""The one door: a Hugging Face folder or a GGUF to a GGUF of one type.

In: paths and a type's name. Out: the file, and a report of what was done, fit for JSON. Order: read the header and check
everything, plan the whole file, check the output, then stream it a few rows at a time; memory stays at some megabytes for each
thread whatever the size of the model. Prints nothing.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

import numpy as np

from llamacli.errors import CheckpointError, UnsupportedModelError
from llamacli.gguf import open_gguf
from quantize import names, sources
from quantize.encoders import encoder
from quantize.general import read_general
from quantize.hf_config import read_config
from quantize.plan import Plan, Planned, make_plan
from quantize.recipe import FILE_TYPES, asked_type
from quantize.safetensors import open_checkpoint
from quantize.vocab import read_vocab
from quantize.writer import check_output, write_file

CHUNK = 1 << 19  # weights a thread takes at a time: its floats fit a core's second cache
RAW_CHUNK = 1 << 23  # bytes copied at a time where nothing changes
VISION = ("v.", "mm.")

Progress = Callable[[int, int, str], None]


class TensorReport(TypedDict):
    """One tensor of the file."""

    name: str
    type: str
    shape: list[int]
    nbytes: int


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


def convert(
    src: str | Path,
    out: str | Path,
    type_name: str,
    *,
    force: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
) -> Report:
    """Make `out`. `progress(done, total, tensor)` gets bytes of the file; `threads` None means every core this process may use.

    CheckpointError or ModelFileError: the source is not fit. OutputError: `out` exists without `force`, or cannot be written.
    UsageError: an unknown type. On every error, and on KeyboardInterrupt, no file is left behind.
    """
    start, src, out = time.perf_counter(), Path(src), Path(out)
    asked = asked_type(type_name)
    metadata, rows, notices = _open_folder(src) if src.is_dir() else _open_gguf(src)
    metadata |= {"general.file_type": FILE_TYPES[asked.name], "general.quantization_version": 2}
    plan = make_plan(metadata, rows, asked)
    notices += _fallbacks(plan, asked)
    if not dry_run:
        check_output(out, plan.nbytes, force)
        _write(plan, out, force, threads or _cores(), progress)
    n_weights = sum(t.n_weights for t in plan.tensors)
    return Report(
        source=str(src),
        out=str(out),
        type=asked.name,
        tensors=[TensorReport(name=t.name, type=t.type.name, shape=list(t.shape), nbytes=t.nbytes) for t in plan.tensors],
        n_weights=n_weights,
        nbytes=plan.nbytes,
        bits_per_weight=round(8 * sum(t.nbytes for t in plan.tensors) / n_weights, 3),
        notices=notices,
        written=not dry_run,
        seconds=round(time.perf_counter() - start, 3),
    )


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


def _fallbacks(plan: Plan, asked) -> list[str]:
    """A notice for rows that are no whole number of blocks."""
    odd = [t.name for t in plan.tensors if t.type.name == "F16" and asked.block > 1]
    return [f"{len(odd)} tensors stay F16, their rows are no multiple of {asked.block}: {odd[0]} first"] if odd else []


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
        sources.check(values, self._encoder.LIMIT, tensor.name, tensor.type.name)
        return self._encoder.encode(values)
