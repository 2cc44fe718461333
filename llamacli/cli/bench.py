"""`llamacli bench`: speed of prefill and decode beside what the machine allows, and beside llama.cpp.

In: a file, or the name of a shape, of which a random file with few layers is then made. Out: tables or JSON on stdout.
bench/measure.py measures; this module prints.
"""

import json
import re
from contextlib import ExitStack, closing, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from llamacli.cli import signals
from llamacli.cli.console import amount, rate
from llamacli.cli.grammar import argument, option, refuse
from llamacli.cli.nodes import OnCluster
from llamacli.cli.options import (
    KV,
    DeviceName,
    GpuLayers,
    Json,
    KvFile,
    KvType,
    Memory,
    ModelName,
    Output,
    Threads,
    find_model,
    load_model,
    memory_bytes,
    model_names,
    one_model,
    placement,
)
from llamacli.errors import OutputError, UsageError

LONGEST = 1 << 24  # tokens


class ShapeName(StrEnum):
    """Models whose shape a random file can have."""

    scout = "scout"
    maverick = "maverick"


def _counts(text: str, where: str) -> str:
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text) or any(int(n) > LONGEST for n in text.split(",")):
        raise UsageError(f"{where}: expected numbers from 0 to {LONGEST}, such as 512,4096, found {text!r}")
    return text


def _counted(names: tuple[str, ...], help: str, *aliases: str):
    return Annotated[str, option(*names, metavar="N,N,...", aliases=aliases, check=_counts, help=help)]


def bench(
    file: Annotated[
        str | None, argument("[MODEL]", "A GGUF file or a model's name, as after -m.", complete=lambda start: model_names())
    ] = None,
    model: ModelName = None,
    prompt: _counted(("-p", "--prompt"), "Tokens of the prompts to prefill; 0 leaves them out (512).", "--n-prompt") = "512",
    generate: _counted(("-n", "--generate"), "Tokens to decode; 0 leaves them out (128).", "--n-gen") = "128",
    depth: _counted(("-d", "--depth"), "Tokens that the context holds before (0).", "--n-depth") = "0",
    threads: Threads = None,
    kv: KvType = KV.f16,
    kv_file: KvFile = None,
    memory: Memory = None,
    device: DeviceName = None,
    gpu_layers: GpuLayers = None,
    nodes: OnCluster = None,
    repetitions: Annotated[
        int, option("-r", "--repetitions", metavar="N", least=1, most=1000, help="Runs of each test; the median counts (3).")
    ] = 3,
    startup: Annotated[bool, option("--startup", help="Time whole processes, `run -n 1` on the file, too.")] = False,
    profile: Annotated[bool, option("--profile", help="Show where the time goes, by operation and layer.")] = False,
    compare: Annotated[
        bool, option("--compare", help="Take turns with llama.cpp, by llama-cpp-python if it is installed.")
    ] = False,
    fill: Annotated[
        bool, option("--fill", help="Fill -d with copies of the first 512 tokens' keys and values: as much work, and sooner.")
    ] = False,
    against: Annotated[
        Path | None, option("--against", metavar="FILE", help="Show ratios to what --json printed earlier.")
    ] = None,
    plot: Annotated[Path | None, option("--plot", metavar="FILE", help="Draw speed against depth (needs matplotlib).")] = None,
    shape: Annotated[
        ShapeName | None, option("--shape", help="Measure a random file of this model's shape, to see what it would do here.")
    ] = None,
    layers: Annotated[int, option("--layers", metavar="N", least=1, most=48, help="Layers of the file of --shape (2).")] = 2,
    keep: Annotated[bool, option("--keep", help="Keep the file of --shape for the next time.")] = False,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Measure prefill and decode, after one run to warm up.

    GB/s counts the weights, keys and values that must be read, Gop/s two for each multiply-add. The limits are what the same
    threads read and multiply at best, measured here; "share" holds decode against the first, prefill against the second. Speeds
    are rounded to the digits that repeat from run to run; --json has all.

    Examples:
    llamacli bench scout.gguf
    llamacli bench scout.gguf -p 512,4096 -d 0,8192 --json > before.json
    llamacli bench scout.gguf -p 512 -n 16 -d 8192,65024 --fill --kv q8_0
    llamacli bench --shape maverick --layers 4
    """
    from llamacli.bench import measure

    console = output.console()
    tests = measure.plan(*(sorted({int(n) for n in text.split(",")}) for text in (prompt, generate, depth)))
    if not tests:
        raise UsageError("nothing to measure: expected -p or -n above 0")
    model = one_model(file, model)
    if nodes.cluster and (shape or profile or startup or fill):
        other = "--shape" if shape else "--profile" if profile else "--startup" if startup else "--fill"
        raise UsageError(
            f"--cluster and {other} exclude each other: expected a model on this machine for that; leave one out, or "
            f"add --cluster none"
        )
    if shape and model:
        raise UsageError("--shape and --model exclude each other: a shape is measured on a random file of its own")
    if shape and compare and layers < 4:
        raise UsageError("--shape with --compare: expected --layers 4 or more, llama.cpp stops if no layer sees everything")
    if shape is None:
        refuse(("layers", "keep"), "--shape with it, found none")
    if not any(test.depth for test in tests):
        refuse(("fill",), "-d above 0 with it, found none")
    earlier = _earlier(against) if against else {}
    if compare:
        from llamacli.bench import peer

        peer.check()
    if plot:
        from llamacli.bench import plot as picture

        picture.check(plot)
    with ExitStack() as stack:
        path = (
            stack.enter_context(_random_file(shape.value, layers, tests, keep, console))
            if shape
            else find_model(model, console)
        )
        longest = max(test.depth + test.n for test in tests)
        # before this process holds a model: two of them may not fit
        starts = [measure.startup(path, threads, repetitions)] if startup else []
        where = placement(device, gpu_layers) | ({} if memory is None else {"memory": memory_bytes(memory)})
        where |= nodes.on_cluster
        loaded = load_model(path, threads, longest + 1, console, kv=kv.value, kv_file=kv_file, **where)
        if kv_file is None and not nodes.cluster:
            _check_room(loaded.config, longest)
        peers = [stack.enter_context(closing(peer)) for peer in _peers(loaded, measure, longest, fill)] if compare else []
        on_gpu = f", {loaded.engine.gpu_layers} layers on the GPU" if loaded.engine.gpu_layers else ""
        title = f"{loaded.gguf.path.name}, {loaded.engine.threads} threads{on_gpu}"
        records: list[dict] = []
        try:
            with console.progress("bench") as update:
                measure.speed(loaded, tests, repetitions, update, peers, profile or shape is not None, records, fill)
        except (KeyboardInterrupt, SystemExit):
            if records and as_json:
                console.result(json.dumps([*starts, *(record | {"interrupted": True} for record in records)]))
            elif records:
                _show(records + starts, f"{title}, interrupted", console)
            raise
        records += starts
        for record in records:
            if record["test"] in earlier:
                record["ratio_to_earlier"] = round(_value(record) / earlier[record["test"]], 4)
        if shape:
            _extrapolate(records, shape.value, layers, measure)
    if as_json:
        console.result(json.dumps(records))
    else:
        _show(records, title, console)
        if profile:
            _show_profiles(records, console)
        if shape:
            _show_whole(records, shape.value, layers, console)
    if plot:  # last, so that the numbers are shown even if the image cannot be written
        picture.draw([record for record in records if "depth" in record], title, plot)


def _earlier(path: Path) -> dict[str, float]:
    """Test to its value in a file of an earlier run."""
    try:
        records = json.loads(path.read_text())
        found = {str(record["test"]): float(_value(record)) for record in records if float(_value(record)) > 0}
    except OSError as error:
        raise UsageError(
            f"{path}: expected output of `llamacli bench --json`, found: {error.strerror}; check the path"
        ) from None
    except (ArithmeticError, ValueError, KeyError, TypeError, RecursionError):
        raise UsageError(f"{path}: expected the output of `llamacli bench --json`, found another file; make it again") from None
    if not found:
        raise UsageError(f"{path}: expected measurements by `llamacli bench --json`, found nothing to compare; make it again")
    return found


def _value(record: dict) -> float:
    """The value that --against compares; larger is better."""
    return 1 / record["seconds"] if record["test"] == "startup" else record["tokens_per_second"]


def _check_room(config, longest: int) -> None:
    from llamacli.cpu.kvcache import nbytes
    from llamacli.plan.machine import memory_free

    need, free = nbytes(config, longest), memory_free()
    if need > free:
        raise UsageError(
            f"-d, -p and -n ask for a context of {longest} tokens: expected {amount(need)} of memory for it, "
            f"found {amount(free)} free; ask for less"
        )


def _peers(model, measure, longest: int, fill: bool):
    """Two settings of llama.cpp: its default, which keeps a repacked copy of the weights, if memory holds it; and without."""
    from llamacli.bench.peer import Peer
    from llamacli.files.ggml import BY_NAME
    from llamacli.plan.machine import memory_free

    ids, chunk = measure.tokens(model, longest), model.config.chunk_size or 0
    for repack in (True, False) if memory_free() > 2 * model.gguf.nbytes else (False,):
        yield Peer(
            model.gguf.path, model.engine.threads, ids, repack, BY_NAME[model.config.kv_type].id, chunk if fill else None
        )


@contextmanager
def _random_file(name: str, layers: int, tests, keep: bool, console):
    """The random file of a shape in the cache folder: made if absent, and removed afterwards unless it is to be kept."""
    from llamacli.cpu.kernels import cache_folder
    from quantize.shapes import SHAPES, write

    shape = SHAPES[name]
    period, chunk = shape.no_rope_step, shape.chunk_size
    if layers % period and max(test.depth + test.n for test in tests) > chunk:
        raise UsageError(
            f"--shape: expected depths up to {chunk} tokens, or a multiple of {period} as --layers: one layer of {period} sees "
            "beyond that"
        )
    folder = cache_folder()
    if folder is None:
        raise OutputError("--shape: expected a folder for the random model, found none; name one with LLAMACLI_CACHE")
    path = folder.parent / f"{name}-{layers}-layers.gguf"
    if not path.exists():
        with console.progress(f"writing {path}") as update:
            write(shape, layers, path, progress=update)
    if keep:
        yield path
        return
    try:
        with signals.at_forced_end(lambda: path.unlink(missing_ok=True)):  # gigabytes, if the process must end in compiled code
            yield path
    finally:
        path.unlink(missing_ok=True)


def _extrapolate(records: list[dict], name: str, layers: int, measure) -> None:
    from quantize.shapes import SHAPES, nbytes

    for record in records:
        if "profile" in record:
            shape = SHAPES[name]
            rate = measure.extrapolate(record, layers, shape.n_layers)
            record["whole_model"] = {
                "layers": shape.n_layers,
                "tokens_per_second": round(rate, 4),
                "weights_bytes": nbytes(shape, shape.n_layers),
            }


def _show(records: list[dict], title: str, console) -> None:
    speeds = [record for record in records if "depth" in record]
    peers, earlier = "peers" in speeds[0], any("ratio_to_earlier" in record for record in records)
    deep = any(record["depth"] for record in speeds)
    head = ["test", "tokens/s", "range", "GB/s", "Gop/s", "limit", "share", "peak memory", *["keys and values"] * deep]
    rows = []
    for r in speeds:
        rows.append([r["test"], rate(r["tokens_per_second"]), f"{rate(r['min'])} to {rate(r['max'])}"])
        rows[-1] += [rate(r["gbytes_per_second"]), rate(r["gops_per_second"])]
        if "share_of_limit" in r:
            limit = f"{rate(r['bandwidth_limit'])} GB/s" if r["test"].startswith("tg") else f"{rate(r['compute_limit'])} Gop/s"
            rows[-1] += [limit, f"{100 * r['share_of_limit']:.0f} %"]
        else:  # interrupted before the limits were measured
            rows[-1] += ["", ""]
        rows[-1] += [amount(r["peak_memory_bytes"]), *[amount(r["kv_bytes"])] * deep]
        if peers:
            rows[-1] += [_speed_and_memory(peer) for peer in r["peers"].values()] + [f"{r['ratio']:.2f}"]
    if peers:
        head += [*speeds[0]["peers"], "ratio to the faster" if len(speeds[0]["peers"]) > 1 else "ratio"]
    for r in records:
        if r["test"] == "startup":
            row = ["startup", f"{r['seconds']:.2f} s", f"{r['min']:.2f} to {r['max']:.2f}"]
            rows.append(row + [""] * (len(head) - len(row)))
    if any("kv_read_bytes_per_token" in r for r in speeds):
        head.append("keys and values read")
        for row, r in zip(rows, speeds, strict=False):
            row.append(f"{amount(r.get('kv_read_bytes_per_token', 0))} a token")
    if earlier:
        head.append("ratio to earlier")
        for row, r in zip(rows, records, strict=True):
            row.append(f"{r['ratio_to_earlier']:.2f}" if "ratio_to_earlier" in r else "")
    console.table(title, [tuple(row) for row in rows], tuple(head), spare=(7, 5, 4, 3, 2))


def _speed_and_memory(peer: dict) -> str:
    return f"{rate(peer['tokens_per_second'])} ({amount(peer['peak_memory_bytes'])})"


def _show_profiles(records: list[dict], console) -> None:
    """Milliseconds by operation and by layer, a column a test."""
    profiles = [(r["test"], r["profile"]) for r in records if "profile" in r]
    head = ("one prompt, or one token", *(test for test, _ in profiles))

    def cell(seconds: float | None, whole: float) -> str:
        return "" if seconds is None else f"{1e3 * seconds:.3f} ms {100 * seconds / whole:4.1f} %"

    totals = [sum(p["operations"].values()) for _, p in profiles]
    names = list(dict.fromkeys(name for _, p in profiles for name in p["operations"]))
    rows = [
        (name, *(cell(p["operations"].get(name), total) for (_, p), total in zip(profiles, totals, strict=True)))
        for name in names
    ]
    rows += [
        (f"layer {i}", *(cell(p["layers"][i], total) for (_, p), total in zip(profiles, totals, strict=True)))
        for i in range(len(profiles[0][1]["layers"]))
    ]
    rows.append(("all", *(f"{1e3 * total:.3f} ms" for total in totals)))
    console.table("\nWhere the time goes, steps timed one by one", rows, head, tuple(range(1, len(head))))


def _show_whole(records: list[dict], name: str, layers: int, console) -> None:
    from llamacli.plan.machine import memory_free

    rows = [(r["test"], rate(r["whole_model"]["tokens_per_second"])) for r in records if "whole_model" in r]
    whole, free = records[0]["whole_model"], memory_free()
    fits = ", which fits" if whole["weights_bytes"] < free else ", more than that: its disk will decide"
    console.table(f"\nWhat {name} with {whole['layers']} layers would do here", rows, ("test", "tokens/s"))
    console.result(
        f"  (time inside the {layers} layers x {whole['layers']}/{layers}, plus the time outside them, by the profile; weights "
        f"{amount(whole['weights_bytes'])}, {amount(free)} of memory free here{fits})"
    )
