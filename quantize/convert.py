"""Converts a Hugging Face folder or a GGUF to a GGUF by a recipe.

In: paths and the name of a recipe. Out: the file, and a report ready for JSON. `convert` reads and checks all headers, plans
the whole file, checks the output and then streams it a few rows at a time. Memory stays at a few megabytes a thread for any
model. Nothing is printed.
"""

import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TypedDict

from llamacli.cpu.kernels import sources_digest
from llamacli.cpu.kernels.cores import usable_cpus
from llamacli.errors import CheckpointError, OutputError, UsageError
from llamacli.files.ggml import BY_NAME, TensorType
from llamacli.files.gguf import text_of
from llamacli.llama4.tensors import layer_of
from quantize import sources, tower
from quantize.general import printable
from quantize.imatrix import Imatrix, read_imatrix
from quantize.journal import File, Maker, left_over, log_of, part_of, write_files
from quantize.opening import Source, open_source
from quantize.pieces import Elsewhere, PieceEncoder, Threads, pieces
from quantize.plan import Plan, Planned, make_plan
from quantize.recipe import RECIPE_KEY, choose_types, find_recipe
from quantize.sources import Rows
from quantize.writer import check_not_input, check_output

PROGRAM = 200 << 20  # bytes of Python, NumPy and compiled code, measured
FIELDS = 20  # bytes in memory per byte of metadata, measured

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
    nodes: dict[str, int]  # bytes that each node of a cluster made


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
    elsewhere: Elsewhere | None = None,
    layers: range | None = None,
) -> Report:
    """Make `out` by the recipe `type_name`; `tensor_types` are (regular expression, type), as `choose_types` takes them.

    A vision tower becomes a file of its own beside it (tower.py), its matrices of `mmproj_type`; None leaves it out. A source
    that is a tower alone becomes `out`.

    `planned` gets the report before a byte is written, `progress(done, total, tensor)` bytes of the file; `threads` None means
    every core this process may use. `elsewhere`: other machines, which encode the tensors that are not just copied. `layers`:
    copy these layers of a GGUF and the tensors outside of the layers in the types that they have, instead of applying a recipe;
    a node of a cluster needs only those.

    CheckpointError or ModelFileError: the source cannot be converted. OutputError: `out` exists without `force`, or cannot be
    written. UsageError: an unknown type, a bad regular expression, another model's importance matrix. Whatever stops it,
    finished tensors are kept and the same call continues after them (journal.py).
    """
    start, src, out = time.perf_counter(), Path(src), Path(out)
    importance = None if imatrix is None else read_imatrix(imatrix)
    recipe = find_recipe(type_name)
    source = open_source(src)
    metadata, rows, notices, inputs, maps, sight, _ = source
    if layers is None:
        for key in [key for key in metadata if key == RECIPE_KEY or key.startswith("quantize.imatrix.")]:
            del metadata[key]  # they describe the conversion that made the source
        metadata |= recipe.metadata | {"general.quantization_version": 2}
        shapes = {name: source.shape for name, source in rows.items()}
        types, more = choose_types(recipe, shapes, tensor_types, imatrix is not None)
        notices += more
    else:
        rows, types = _layers_of(src, source, layers)
        notices, sight = [], None
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
        type=recipe.name if layers is None else f"layers {layers.start} to {layers.stop - 1}",
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
        nodes={},
    )
    if dry_run:
        return report | {"seconds": round(time.perf_counter() - start, 3)}
    inputs += [imatrix] if imatrix else []
    job = _job(plan, [path for path in inputs if path not in maps])
    _check_outputs(out, files, inputs, job, force, plan.nbytes)
    notices += _orphans(out, files)
    if planned:
        planned(report)
    encode = PieceEncoder(maps)
    if elsewhere:
        report["memory"] += elsewhere.begin(src, source, encode)
    maker = _TensorMaker(plan, importance, encode, threads, elsewhere, progress)
    maker.write(files, job, force)
    for tensor in report["tensors"]:
        tensor["rmse"], tensor["energy"] = maker.rmse(tensor["name"]), maker.errors[tensor["name"]][1]
    seconds = round(time.perf_counter() - start, 3)
    nodes = dict(elsewhere.done) if elsewhere else {}
    return report | {"written": True, "seconds": seconds, "resumed_bytes": maker.resumed, "nodes": nodes}


def _layers_of(src: Path, source: Source, layers: range) -> tuple[dict[str, Rows], dict[str, TensorType]]:
    """Rows and types of these layers and of what belongs to no layer."""
    n_layers = source.metadata.get("llama4.block_count")
    if src.is_dir() or not source.rows:
        raise UsageError(f"--layers: expected the GGUF of a model, found {src}; convert it first")
    if not 0 <= layers.start < layers.stop <= n_layers:
        asked = f"{layers.start}-{layers.stop - 1}"
        raise UsageError(f"--layers: expected layers from 0 to {n_layers - 1}, found {asked}; choose from these")
    rows = {name: rows for name, rows in source.rows.items() if (at := layer_of(name)) is None or at in layers}
    return rows, {name: BY_NAME[source.stored[name][0]] for name in rows}


def _target(path: Path) -> Path:
    """The file to write: a link is followed, not replaced."""
    try:
        target = Path(os.path.realpath(path)) if path.is_symlink() else path
    except OSError as error:
        raise OutputError(f"{path}: expected a name for a file, found: {error.strerror}; choose another name") from None
    if target.is_symlink():
        raise OutputError(f"{path}: expected a link to a file, found one that leads in a circle; choose another name")
    return target


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
    piece = max(piece.count * t.shape[-1] for t in plan.tensors for piece in islice(pieces(t.source), 1))
    encoded = max(t.type.nbytes / t.type.block for t in plan.tensors)  # bytes a weight
    return PROGRAM + FIELDS * sum(len(part.head) for part in plan.parts) + threads * int(piece * (8 + 2 * encoded))


class _TensorMaker:
    """Encodes tensors for journal.write_files and records each one's error: sums of (x - q)^2 and of x^2."""

    def __init__(
        self, plan: Plan, imatrix: Imatrix | None, encode: PieceEncoder, threads: int, elsewhere: Elsewhere | None, progress
    ):
        self._tensors = {tensor.name: tensor for tensor in plan.tensors}
        paths = set().union(*(tensor.source.paths for tensor in plan.tensors))
        self._stamps, self._states = {path: _stamp(path) for path in paths}, {path: path.stat() for path in paths}
        self._nbytes, self._imatrix, self._progress = plan.nbytes, imatrix, progress
        self._here, self._elsewhere = Threads(encode, threads), elsewhere
        self._done = sum(len(part.head) for part in plan.parts)
        self.errors: dict[str, tuple[float, float]] = {}
        self.resumed = 0

    def write(self, files: list[File], job: str, force: bool) -> None:
        try:
            write_files(files, job, Maker(self._make, self._note, self._skip, self._source), force)
        finally:
            self._here.close()
        self._tell(self._nbytes - self._done, files[0].path.name)

    def _make(self, name: str) -> Iterator[memoryview]:
        tensor = self._tensors[name]
        where = self._elsewhere if self._elsewhere and _shrinks(tensor) else self._here
        wrong, whole = 0.0, 0.0
        for chunk, errors in where.encoded(tensor, self._imatrix and self._imatrix.weights(name, tensor.shape)):
            yield memoryview(chunk).cast("B")
            wrong, whole = wrong + errors[0], whole + errors[1]
            self._tell(chunk.nbytes, name)
        self._check_unchanged(tensor.source.paths)
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
        return blake2b(b"".join(self._stamps[path] for path in paths), digest_size=16).hexdigest()

    def _check_unchanged(self, paths: Iterable[Path]) -> None:
        """CheckpointError if a file was written to, for example by a download that is still running.

        A file that was removed or replaced can still be read through its map.
        """
        for path in paths:
            before = self._states[path]
            try:
                now = path.stat()
            except OSError:
                continue
            same_file = (now.st_dev, now.st_ino) == (before.st_dev, before.st_ino)
            if same_file and (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                raise CheckpointError(f"{path}: expected an unchanged file, found it changed meanwhile; convert it again")

    def _tell(self, nbytes: int, name: str) -> None:
        self._done = min(self._done + nbytes, self._nbytes)
        if self._progress:
            self._progress(self._done, self._nbytes, name)

    def rmse(self, name: str) -> float | None:
        """Relative to the weights; None if they are all 0."""
        wrong, whole = self.errors[name]
        return math.sqrt(wrong / whole) if whole > 0 else None


def _shrinks(tensor: Planned) -> bool:
    """Whether it is encoded rather than copied: a copy comes faster from this machine's disk than over a network."""
    return tensor.source.raw(tensor.type.name) is None and 8 * tensor.nbytes < 16 * tensor.n_weights


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
