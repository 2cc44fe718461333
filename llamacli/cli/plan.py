"""`llamacli plan`: whether a model runs in a given memory, which part is resident, and the expected speed.

In: a GGUF, of which the header is read, or a Hugging Face folder, of which config.json is enough; memory, context, speeds.
Out: tables or one JSON object on stdout. placement.py computes, machine.py measures this machine, and this module prints. No
model is loaded.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, NamedTuple

from llamacli import DEFAULT_CTX, default_ctx
from llamacli.cli import split
from llamacli.cli.console import amount, count, rate
from llamacli.cli.grammar import argument, option, token_count, typed
from llamacli.cli.images import cost_rows
from llamacli.cli.options import (
    KV,
    DeviceName,
    GpuLayers,
    Json,
    KvType,
    ModelName,
    Output,
    Threads,
    byte_count,
    find_model,
    model_names,
    one_model,
)
from llamacli.cli.options import placement as placement_of
from llamacli.cli.split import Network, Nodes
from llamacli.errors import MemoryLimitError, UsageError

ASSUMED_DISK, ASSUMED_BANDWIDTH = 3.0, 50.0  # GB/s, assumed for an unknown machine
CONTEXTS = (8192, 32768, 131072, 1048576)
LARGEST = 10 << 20  # Scout's own limit, which config.json does not give
PROMPTS = (512, 4096)
LONGEST = 1 << 31  # tokens


class Model(NamedTuple):
    """The model to plan: `tensors`: names and bytes; `sizes`: the same as placement.Sizes; `notices`: lines for the user."""

    title: str
    config: object
    tensors: list[tuple[str, int]]
    sizes: object
    parameters: int
    notices: list[str]
    vision: dict | None = None  # the cost of the vision tower beside the file (vision/sight.py)


def _recipes(start: str) -> list[str]:
    from quantize.recipe import RECIPES

    return [*RECIPES]


def plan(
    source: Annotated[
        str | None,
        argument("[FILE|FOLDER]", "A GGUF, a model's name, or a Hugging Face folder.", complete=lambda start: model_names()),
    ] = None,
    model_option: ModelName = None,
    memory: Annotated[
        str | None,
        option(
            "--memory",
            metavar="SIZE,...",
            help="Memory allowed, such as 24G or 32G,64G (default: what is free). G is 10^9 bytes.",
        ),
    ] = None,
    ctx: Annotated[
        str | None,
        option(
            "-c",
            "--ctx",
            metavar="N",
            aliases=("--ctx-size",),
            help=f"Context in tokens, such as 128K or 1M (default: the model's, {DEFAULT_CTX} at most).",
        ),
    ] = None,
    disk: Annotated[
        str | None, option("--disk", metavar="GB/S,...", help="Speed of the disk (default: that of the file's, measured).")
    ] = None,
    bandwidth: Annotated[
        str | None, option("--bandwidth", metavar="GB/S,...", help="Speed of the memory (default: this machine's, measured).")
    ] = None,
    type_name: Annotated[
        str | None,
        option("--type", metavar="TYPE", complete=_recipes, help="For a folder: the type to convert to (Q4_EXPERTS)."),
    ] = None,
    plot: Annotated[
        Path | None, option("--plot", metavar="FILE", help="Draw the speeds as an image (needs matplotlib).")
    ] = None,
    threads: Threads = None,
    device: DeviceName = None,
    gpu_layers: GpuLayers = None,
    gpu_memory: Annotated[
        str | None,
        option(
            "--gpu-memory",
            metavar="SIZE",
            help="What a GPU may hold, for --device mlx on another machine; a Mac's driver allows about three quarters.",
        ),
    ] = None,
    kv: KvType = KV.f16,
    kv_file: Annotated[
        bool, option("--kv-file", group="Model", help="Keys and values that memory does not hold are in a file on the disk.")
    ] = False,
    nodes: Nodes = None,
    network: Network = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Say what will be resident and how fast it should be, before anything is loaded.

    Several sizes or speeds, such as --memory 32G,64G --disk 1,3,7, give a table of tokens per second. Speeds are estimates:
    memory and disk are measured in a moment, and other programs take their part.

    Examples:
    llamacli plan scout.gguf -c 128K
    llamacli plan Llama-4-Maverick-17B-128E-Instruct --type Q4_K_M --memory 64G,128G --disk 3,7
    llamacli plan scout.gguf --memory 96G --gpu-memory 72G
    llamacli plan scout.gguf --memory 24G -c 10M --kv q4_0 --kv-file
    llamacli plan maverick.gguf --nodes 128G,128G --network 10 --disk 5
    """
    from llamacli.cpu.kernels.cores import default_threads
    from llamacli.plan import placement

    if plot:
        from llamacli.bench import plot as picture

        picture.check(plot)
    console = output.console()
    source = one_model(source, model_option)
    path = find_model(source, console) if source is None or not Path(source).is_dir() else Path(source)
    many = {"threads": threads or default_threads(), "kv_files": int(kv_file)}
    model = _from_folder(path, type_name) if path.is_dir() else _from_file(path, type_name, many["threads"])
    model = model._replace(config=dataclasses.replace(model.config, kv_type=kv.value.upper()))
    for notice in model.notices:
        console.note(notice)
    most = split.MOST_VALUES if nodes is None else split.MOST
    disks, bandwidths = split.numbers(disk, "--disk", most), split.numbers(bandwidth, "--bandwidth", most)
    memories = _memories(memory)
    asked = min(token_count(ctx, "--ctx"), LONGEST) if ctx else default_ctx(model.config)
    if nodes is not None:
        if here := typed(("memory", "kv_file", "device", "gpu_layers", "gpu_memory", "plot")):
            raise UsageError(f"{here[0]} and --nodes exclude each other: nodes have their own memory, and CPUs; leave one out")
        assumed = disks or [ASSUMED_DISK], bandwidths or [ASSUMED_BANDWIDTH]
        split.show(model, nodes, network, *assumed, asked, many["threads"], as_json, console)
        return
    if network is not None:
        raise UsageError("--network: expected --nodes with it, found none; add it or leave this out")
    plans, refused = [], None
    for limit in memories:
        fits = placement.fit_ctx(model.config, model.sizes, limit, asked, **many)
        try:
            plans.append(placement.place(model.config, model.sizes, limit, fits or asked, name=model.title, **many))
        except MemoryLimitError as error:
            refused = error
            plans.append(None)
            continue
        if fits < asked:
            console.warn(
                f"context trimmed from {asked} to {fits} tokens: with more, {amount(limit)} would not hold the experts of a "
                f"token beside the KV cache{'' if kv_file else '; --kv-file keeps them in a file'}"
            )
    if not any(plans):
        raise refused
    share = _gpu_share(model, next(filter(None, plans)).ctx, placement_of(device, gpu_layers), gpu_memory)
    speeds = _speeds(path, disks, bandwidths, many["threads"])
    record = {"ctx_asked": asked} | _record(model, speeds, plans, memories, placement)
    if model.vision:
        for one in record["plans"]:
            one["with_pictures"] = _with_pictures(model, one, speeds, placement, many)
    if share:
        record["gpu"] = {f"{name}_bytes": n for name, n in share._asdict().items() if name not in ("layers", "streams")}
        record["gpu"]["layers"] = share.layers
    if as_json:
        console.result(json.dumps(record, ensure_ascii=False))
    elif len(record["plans"]) == 1:
        _show(model, plans[0], record, speeds, many, placement, console)
    else:
        _show_many(record, console)
    if share and not as_json:
        rows = [("layers", f"{share.layers} of {model.config.n_layers}, and the head"), ("weights", amount(share.weights))]
        rows += [("KV cache", amount(share.kv)), ("working memory", amount(share.working))]
        rows.append(("all", f"{amount(share.nbytes)} of {amount(share.budget)}"))
        console.table("\nOf it on the GPU; the speeds above are those of a CPU, no GPU having been measured", rows)
    if plot:  # last: if it cannot be written, the numbers have been shown
        picture.draw_plan(record["plans"], model.title, plot)


# what is asked for


def _from_file(path: Path, type_name: str | None, threads: int) -> Model:
    from llamacli.cpu.weights import has_kernels, held_bytes
    from llamacli.files.gguf import open_gguf
    from llamacli.llama4.config import Config
    from llamacli.plan.placement import size_by_kind

    if type_name is not None:
        raise UsageError("--type: expected a Hugging Face folder with it, found a file, whose types are fixed")
    gguf = open_gguf(path)
    config, notices = Config.from_gguf(gguf), []
    held = [(t.name, held_bytes(t)) for t in gguf.tensors.values()]
    if slow := sum(not has_kernels(t) for t in gguf.tensors.values()):
        notices.append(f"{slow} tensors have types without fast kernels and are counted as F16, which they become")
    total = sum(math.prod(t.shape) for t in gguf.tensors.values())
    from llamacli.vision.sight import cost_beside

    seeing = cost_beside(gguf, threads)
    return Model(str(gguf.path), config, held, size_by_kind(held, config), total, notices, seeing)


def _from_folder(folder: Path, type_name: str | None) -> Model:
    from llamacli.llama4.tensors import tensors
    from llamacli.plan.placement import size_by_kind
    from quantize.hf_config import read_config
    from quantize.recipe import DEFAULT, choose_types, find_recipe

    config, recipe = read_config(folder).model, find_recipe(type_name or DEFAULT)
    dims = {spec.name: spec.shape for spec in tensors(config) if spec.required}
    types, notices = choose_types(recipe, dims)
    held = [(name, types[name].row_bytes(shape[-1]) * math.prod(shape[:-1])) for name, shape in dims.items()]
    total = sum(map(math.prod, dims.values()))
    return Model(f"{folder} as {recipe.name}", config, held, size_by_kind(held, config), total, notices)


def _gpu_share(model: Model, ctx: int, asked: dict, gpu_memory: str | None):
    """The plan.offload.Offload that is asked for, None if none is. MemoryLimitError if it does not fit."""
    from llamacli.mlx import runtime
    from llamacli.plan.offload import place_layers

    if asked["device"] == "cpu" and not gpu_memory:
        return None
    if gpu_memory:
        budget = byte_count(gpu_memory, "--gpu-memory")
    elif not (budget := runtime.start().budget):
        raise UsageError("--device: expected a GPU here, or --gpu-memory SIZE for another machine's, found neither")
    return place_layers(model.config, model.tensors, ctx, budget, asked["gpu_layers"], name=model.title)


def _memories(text: str | None) -> list[int]:
    from llamacli.plan.machine import budget

    return [budget()] if text is None else [byte_count(size, "--memory") for size in split.listed(text, "--memory")]


def _speeds(path: Path, disk: list[float] | None, bandwidth: list[float] | None, threads: int) -> dict:
    """{"disk", "bandwidth", "compute": (values in GB/s or Gop/s, where from)}; measured only beside a file that is here."""
    from llamacli.plan.machine import disk_read_speed

    found, here = {}, path.is_file()
    if disk:
        found["disk"] = disk, "given"
    elif here and (measured := disk_read_speed(path)):
        found["disk"] = [measured / 1e9], "measured"
    else:
        found["disk"] = [ASSUMED_DISK], "assumed"
    read = multiply = None
    if here and not bandwidth:  # a given bandwidth is another machine's, whose arithmetic speed is unknown
        read, multiply = _limits(threads)
    found["bandwidth"] = (
        (bandwidth, "given") if bandwidth else ([read], "measured") if read else ([ASSUMED_BANDWIDTH], "assumed")
    )
    found["compute"] = [multiply], "measured" if multiply else "unknown"
    return found


def _limits(threads: int) -> tuple[float, float]:
    """GB/s and Gop/s of this machine, from a short measurement that takes little memory."""
    from llamacli.bench.limits import buffer_megabytes, multiply_gops, read_gbps

    return read_gbps(threads, buffer_megabytes(threads, 256), rounds=3), multiply_gops(threads, steps=1_000_000, rounds=3)


# what comes out


def _record(model: Model, speeds: dict, plans: list, memories: list[int], placement) -> dict:
    """Everything as one object fit for JSON; sizes in bytes, a plan for each memory, disk and bandwidth."""
    from llamacli.cpu.kvcache import nbytes

    config, sizes = model.config, model.sizes
    return {
        "model": model.title,
        "parameters": model.parameters,
        "vision": model.vision,
        "weights": sizes.kinds,
        "weights_bytes": sum(sizes.kinds.values()),
        "always_used_bytes": sizes.always,
        "experts": {"layers": len(sizes.experts), "each": sizes.n_experts, "bytes": max(sizes.experts, default=0)},
        "kv": [{"ctx": n, "bytes": nbytes(config, n)} for n in CONTEXTS],
        "speeds": {name: {"values": values, "from": origin} for name, (values, origin) in speeds.items()},
        "plans": [
            {"memory_bytes": memory, "disk_gbps": disk, "bandwidth_gbps": bandwidth}
            | (_planned(p, disk, bandwidth, speeds["compute"][0][0], placement) if p else {"mode": None})
            for p, memory in zip(plans, memories, strict=True)
            for bandwidth in speeds["bandwidth"][0]
            for disk in speeds["disk"][0]
        ],
    }


def _with_pictures(model: Model, planned: dict, speeds: dict, placement, many: dict) -> dict:
    """The plan with pictures: the tower's weights and buffers are resident, too."""
    tower = model.vision["weights_bytes"] + model.vision["working_bytes"]
    try:
        if planned["mode"] is None:
            return {"mode": None}
        p = placement.place(model.config, model.sizes, planned["memory_bytes"] - tower, planned["ctx"], **many)
    except MemoryLimitError:
        return {"mode": None}
    found = _planned(p, planned["disk_gbps"], planned["bandwidth_gbps"], speeds["compute"][0][0], placement)
    return found | {"tower_bytes": tower, "resident_bytes": p.resident + tower}


def _planned(p, disk: float, bandwidth: float, compute: float | None, placement) -> dict:
    multiply = compute * 1e9 if compute else None
    seconds = placement.decode_seconds(p, disk * 1e9, bandwidth * 1e9)
    return {
        "ctx": p.ctx,
        "mode": p.mode,
        "slots": round(p.slots, 2),
        "resident_bytes": p.resident,
        **{f"{part}_bytes": getattr(p, part) for part in ("weights", "experts", "kv", "working", "buffers", "rows")},
        "miss": round(p.miss, 4),
        "read_per_token_bytes": round(p.read_per_token),
        "tokens_per_second": round(1 / seconds, 3),
        **(_of_file(p, disk, bandwidth, placement) if p.kv_files else {}),
        "prefill_seconds": {n: round(placement.prefill_seconds(p, n, disk * 1e9, multiply), 3) for n in PROMPTS},
    }


def _of_file(p, disk: float, bandwidth: float, placement) -> dict:
    """The size and the cost of keys and values in a file when the context is full."""
    full = placement.decode_seconds(p, disk * 1e9, bandwidth * 1e9, p.ctx)
    return {
        "kv_window": p.window,
        "kv_file_bytes": p.kv_disk,
        "kv_read_per_token_bytes": p.kv_read_per_token(p.ctx),
        "full_tokens_per_second": round(1 / full, 4),
    }


def _show(model: Model, p, record: dict, speeds: dict, many: dict, placement, console) -> None:
    config, sizes, planned = model.config, model.sizes, record["plans"][0]
    console.result(_verdict(p, planned))
    rows = [(kind, amount(nbytes)) for kind, nbytes in sizes.kinds.items() if nbytes]
    rows.append(("all", f"{amount(record['weights_bytes'])}, {count(model.parameters)} parameters"))
    console.table(f"\n{model.title}: weights", rows)
    if model.vision:
        rows = [*cost_rows(model.vision), ("with it", _seeing(record["plans"][0]["with_pictures"], sizes))]
        console.table("\nVision, if pictures are shown, beside the rest", rows)
    rows = []
    for ctx in sorted({*CONTEXTS, p.ctx, *((LARGEST,) if p.kv_files else ())}):
        try:
            at = placement.place(config, sizes, p.memory, ctx, **many)
        except MemoryLimitError:
            rows.append((f"{ctx}", amount(_kv(config, ctx)), "does not fit", *[""] * (4 if p.kv_files else 2)))
            continue
        rates = [
            rate(1 / placement.decode_seconds(at, planned["disk_gbps"] * 1e9, planned["bandwidth_gbps"] * 1e9, depth))
            for depth in (0, ctx)
        ]
        file = (amount(at.kv_disk), amount(at.kv_read_per_token(ctx))) if p.kv_files else ()
        rows.append((f"{ctx}", amount(at.kv), _mode(at), *rates, *file))
    title = f"\nBy context, in {amount(p.memory)} of memory"
    head = ("tokens", "KV cache", "experts", "tokens/s", "when full")
    console.table(title, rows, (*head, "KV file", "read of it a token") if p.kv_files else head)
    rows = [("weights" if p.mode == "mapped" else "always-used weights", amount(p.weights))]
    if p.mode == "slots":
        rows.append(("experts", f"{amount(p.experts)}, {_mode(p)} of {amount(max(sizes.experts))}"))
        rows.append(("buffers for prompts", amount(p.buffers)))
        rows.append(("rows of the embedding", amount(p.rows)))
    if p.kv_files:
        rows.append(("positions in memory", f"{min(p.window, p.ctx)} of {p.ctx}"))
    rows += [("KV cache", amount(p.kv)), ("working memory", amount(p.working)), ("all", amount(p.resident))]
    console.table(f"\nResident with {p.ctx} tokens", rows)
    origins = {name: f"{values[0]:.1f} GB/s, {origin}" for name, (values, origin) in speeds.items() if name != "compute"}
    rows = [("disk", origins["disk"]), ("memory", origins["bandwidth"])]
    rows.append(("read from disk", f"{amount(planned['read_per_token_bytes'])} a token, {100 * p.miss:.0f} % of its experts"))
    rows.append(("decode", f"about {rate(planned['tokens_per_second'])} tokens/s"))
    if p.kv_files:
        full = f"{amount(planned['kv_read_per_token_bytes'])} of keys and values a token, from a file of {amount(p.kv_disk)}"
        rows.append(("when full", f"about {rate(planned['full_tokens_per_second'])} tokens/s; {full}"))
    least = "" if speeds["compute"][0][0] else "at least "
    rows += [
        (f"prompt of {n}", f"{least or 'about '}{rate(seconds)} s")
        for n, seconds in planned["prefill_seconds"].items()
        if seconds
    ]
    console.table("\nExpected, every expert being equally likely", rows)


def _verdict(p, planned: dict) -> str:
    """The summary line above the tables."""
    speed = f"about {rate(planned['tokens_per_second'])} tokens/s"
    if p.mode == "mapped":
        return f"It fits: {amount(p.resident)} of {amount(p.memory)} with a context of {p.ctx} tokens, {speed}."
    return (
        f"It runs in {amount(p.memory)} with a context of {p.ctx} tokens, {speed}: {_mode(p)} of the experts stay in memory, "
        f"the others are read when they are needed."
    )


def _seeing(planned: dict, sizes) -> str:
    if planned["mode"] is None:
        return "does not fit; use more memory or a smaller context"
    held = "all" if planned["mode"] == "mapped" else f"{int(10 * planned['slots']) / 10} of {sizes.n_experts} a layer"
    held = f"{held} experts stay, " if sizes.experts else ""
    return f"{amount(planned['resident_bytes'])} resident, {held}about {rate(planned['tokens_per_second'])} tokens/s"


def _kv(config, ctx: int) -> int:
    from llamacli.cpu.kvcache import nbytes

    return nbytes(config, ctx)


def _mode(p) -> str:
    return "all" if p.mode == "mapped" else f"{int(10 * p.slots) / 10} of {p.sizes.n_experts} a layer"


def _show_many(record: dict, console) -> None:
    """A table of tokens per second: a row for each memory and its speed, a column for each disk."""
    disks = record["speeds"]["disk"]["values"]
    rows, cells = [], iter(record["plans"])
    for first in cells:
        line = [first, *(next(cells) for _ in disks[1:])]
        where = {"mapped": "all", None: "does not fit"}.get(first["mode"], f"{first.get('slots', 0):.1f} a layer")
        rates = [rate(c.get("full_tokens_per_second", c["tokens_per_second"])) if c["mode"] else "" for c in line]
        rows.append((amount(first["memory_bytes"]), f"{first['bandwidth_gbps']:g} GB/s", where, *rates))
    head = ("memory", "its speed", "experts held", *(f"disk {disk:g} GB/s" for disk in disks))
    full = " when the context is full" if "kv_file_bytes" in record["plans"][0] else ""
    console.table(f"{record['model']}: expected tokens/s{full}", rows, head)
