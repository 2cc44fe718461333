"""`llamacli plan --nodes`: the layers of each machine, and the expected speed. plan/nodes.py computes; this module prints.

In: the model of plan.py, sizes of memory, speeds. Out: tables or JSON on stdout. Needs neither a cluster nor Ray.
"""

import json
import re
from typing import Annotated

from llamacli.cli.console import amount, rate
from llamacli.cli.grammar import byte_count, option
from llamacli.errors import UsageError

LATENCY = 100e-6  # seconds one way, of a wired network
NETWORKS = (1.0, 10.0, 40.0)  # Gbit/s
MOST = 64  # nodes
MOST_VALUES = 16  # most values of a list, each of which makes a plan

Nodes = Annotated[
    str | None,
    option("--nodes", metavar="SIZE,...", help="Memory of each node, such as 128G,128G: shows how the layers are divided."),
]
Network = Annotated[
    str | None,
    option("--network", metavar="GBIT/S,...", help="With --nodes: speed of the network (1,10,40; 100 microseconds one way)."),
]


def show(model, nodes: str, network: str | None, disks, bandwidths, ctx: int, threads: int, as_json: bool, console) -> None:
    """Divide `model` (plan.Model). `disks`, `bandwidths`: GB/s, one for all nodes or one for each."""
    from llamacli.plan import nodes as planning

    memories = [byte_count(size, "--nodes") for size in nodes.split(",")]
    if len(memories) > MOST:
        raise UsageError(f"--nodes: expected at most {MOST} nodes, found {len(memories)}")
    bandwidths, disks = _each(bandwidths, len(memories), "--bandwidth"), _each(disks, len(memories), "--disk")
    networks = _networks(network)
    machines = [
        planning.Machine(f"node {k}", *facts, threads)
        for k, facts in enumerate(zip(memories, (1e9 * b for b in bandwidths), (1e9 * d for d in disks), strict=True), 1)
    ]
    known = planning.model(model.config, model.tensors)
    how = {"latency": LATENCY, "name": model.title}
    splits = [planning.split(known, machines, ctx, network=1e9 / 8 * speed, **how) for speed in networks]
    if as_json:
        console.result(json.dumps({"model": model.title, "ctx": ctx, "plans": list(map(_record, splits, networks))}))
        return
    rows = []
    for part in splits[-1].parts:
        p, m = part.placement, part.machine
        held = "all" if p.mode == "mapped" else f"{p.slots:.1f} of {p.sizes.n_experts} a layer"
        where = f"{part.layers.start}-{part.layers.stop - 1}", amount(p.resident), held, f"{amount(p.read_per_token)}"
        rows.append(
            (m.name, amount(m.memory), f"{m.bandwidth / 1e9:g}", f"{m.disk / 1e9:g}", *where, rate(1000 * part.seconds))
        )
    head = ("node", "memory", "its GB/s", "disk GB/s", "layers", "resident", "experts held", "read a token", "ms a token")
    console.table(f"{model.title}: {amount(sum(model.sizes.kinds.values()))}, context of {ctx} tokens", rows, head)
    rows = [
        (f"{speed:g} Gbit/s", rate(1000 * found.network), rate(1 / found.seconds))
        for speed, found in zip(networks, splits, strict=True)
    ]
    console.table("\nExpected, every expert being equally likely", rows, ("network", "hand-overs, ms a token", "tokens/s"))


def listed(text: str, where: str, most: int = MOST_VALUES) -> list[str]:
    """The parts of a list such as 1,3,7."""
    parts = text.split(",")
    if len(parts) > most:
        raise UsageError(f"{where}: expected at most {most} values, found {len(parts)}")
    return parts


def numbers(text: str | None, where: str, most: int = MOST_VALUES) -> list[float] | None:
    """Speeds such as 1,3.5,7; None if none are given."""
    if not text:
        return None
    try:
        values = [float(part) for part in listed(text, where, most)]
    except ValueError:
        values = []
    if not values or not all(1e-3 <= value <= 1e6 for value in values):
        raise UsageError(f"{where}: expected speeds in GB/s, such as 3.5 or 1,3,7, found {text!r}")
    return values


def _record(split, network: float) -> dict:
    return {
        "network_gbits": network,
        "tokens_per_second": round(1 / split.seconds, 3),
        "network_seconds": round(split.network, 6),
        "nodes": [
            {
                "name": part.machine.name,
                "first_layer": part.layers.start,
                "layers": len(part.layers),
                "resident_bytes": part.placement.resident,
                "mode": part.placement.mode,
                "slots": round(part.placement.slots, 2),
                "read_per_token_bytes": round(part.placement.read_per_token),
                "seconds": round(part.seconds, 6),
            }
            for part in split.parts
        ],
    }


def _each(values: list[float], n: int, where: str) -> list[float]:
    if len(values) not in (1, n):
        raise UsageError(f"{where}: expected one value or one for each of {n} nodes, found {len(values)}")
    return values * n if len(values) == 1 else values


def _networks(text: str | None) -> tuple[float, ...]:
    if text is None:
        return NETWORKS
    parts = [part.strip().upper().removesuffix("G") for part in text.split(",")]
    if not all(re.fullmatch(r"\d{1,5}(\.\d{1,3})?", part) and float(part) for part in parts) or len(parts) > MOST:
        raise UsageError(f"--network: expected speeds in Gbit/s, such as 10 or 1,10,40, found {text!r}")
    return tuple(map(float, parts))
