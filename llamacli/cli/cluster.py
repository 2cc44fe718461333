"""`llamacli cluster`: divide a model's layers over several machines: start, join, status, stop.

In: an action and an address. Out: lines, a table of nodes or JSON on stdout.
"""

import json
import time
from enum import StrEnum
from typing import Annotated

from llamacli.cli import settings
from llamacli.cli.console import amount
from llamacli.cli.grammar import argument, option
from llamacli.cli.nodes import NONE, cluster_address
from llamacli.cli.options import Json, ModelName, Output, find_model
from llamacli.errors import UsageError


class Action(StrEnum):
    """What to do."""

    start = "start"
    join = "join"
    status = "status"
    stop = "stop"


def cluster(
    action: Annotated[Action, argument("start|join|status|stop", "What to do.")] = ...,
    address: Annotated[str | None, argument("[ADDRESS]", "With join and status: the cluster, HOST[:PORT].")] = None,
    host: Annotated[
        str | None,
        option(
            "--host", metavar="ADDRESS", help="This machine's private address, by which others reach it (start: 127.0.0.1)."
        ),
    ] = None,
    port: Annotated[
        int | None, option("--port", metavar="N", least=1, most=65535, help="With start: the cluster's port (6479).")
    ] = None,
    model: ModelName = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Run a model's layers on several machines: start, join, status, stop.

    `start` makes this machine the first node and writes the secret that other machines need. `stop` ends what was started on
    this machine. `status` shows the nodes; with -m also which have the file, and how fast its disk is.

    Examples:
    llamacli cluster start --host 10.0.0.5
    llamacli cluster join 10.0.0.5
    llamacli cluster status -m maverick.gguf
    llamacli run --cluster 10.0.0.5 -m maverick.gguf "Name three rivers"
    llamacli cluster stop
    """
    from llamacli.cluster import processes  # late: help needs no engine

    console = output.console()
    if address is not None and action in (Action.start, Action.stop):
        raise UsageError(f"cluster {action}: expected no address after it, found {address}; --host names this machine's")
    if port is not None and action is not Action.start:
        raise UsageError(f"--port: expected cluster start with it, found {action}; write the address as HOST:PORT")
    if host is not None and action not in (Action.start, Action.join):
        raise UsageError(f"--host: expected cluster start or join with it, found {action}; leave it out")
    if model is not None and action is not Action.status:
        raise UsageError(f"-m: expected cluster status with it, found {action}; leave it out")
    if as_json and action is not Action.status:
        raise UsageError(f"--json: expected cluster status with it, found {action}; leave it out")
    if action is Action.start:
        node = processes.start(host or "127.0.0.1", port or processes.PORT)
        from llamacli.environment import cluster_secret_file

        console.result(f"the cluster runs at {node.address}; `llamacli cluster stop` ends it")
        if node.host == "127.0.0.1":
            console.note("only this machine can join; --host with a private address opens it for others")
        else:
            console.note(f"on other machines: copy {cluster_secret_file()} there, then `llamacli cluster join {node.address}`")
    elif action is Action.join:
        if address is None:
            raise UsageError("cluster join: expected the cluster's address after it, found none; it is HOST or HOST:PORT")
        node = processes.join(address, host)
        console.result(f"this machine is a node of {node.address} as {node.host}; `llamacli cluster stop` leaves it")
    elif action is Action.stop:
        until = time.monotonic() + processes.ENDING
        with console.waiting(
            lambda: f"waiting for Ray's processes to end; killed in {max(0, until - time.monotonic()):.0f} s ..."
        ):
            found = processes.stop()
        console.result(f"stopped {len(found)} node{'s' * (len(found) != 1)} of this machine")
    else:
        _status(address, model, as_json, console)


def _status(address: str | None, model: str | None, as_json: bool, console) -> None:
    from llamacli.cluster import processes
    from llamacli.cluster.control import Cluster

    path = None if model is None else find_model(model, console).absolute()
    where = address or next((node.address for node in processes.running()), None)
    if where is None:
        where = cluster_address(str(settings.current("cluster")[0] or NONE), "cluster")
    if where is None:
        raise UsageError("cluster status: expected an address, found none and no node of this machine; name it as HOST[:PORT]")
    cluster = Cluster(where)
    try:
        with console.waiting(lambda: "measuring the nodes ..."):
            nodes = cluster.describe(path and str(path))
    finally:
        cluster.close()
    if as_json:
        console.result(json.dumps(nodes))
        return
    rows = []
    for name, node in nodes.items():
        if "error" in node:
            rows.append((name, node["address"], node["error"], "", "", "", ""))
            continue
        held = ", ".join(f"layers {at[0]}-{at[1] - 1}, {copy}" if at else copy for copy, at in node["copies"].items())
        copy = "" if path is None else f"{_speed(node['disk'])}, {held}" if held else "no copy"
        memory = f"{amount(node['memory'])} of {amount(node['memory_total'])}"
        disk = copy or f"{amount(node['disk_free'])} free"
        rows.append((name, node["address"], memory, _speed(node["bandwidth"]), disk, node["device"], node["version"]))
    console.table(f"cluster at {where}", rows, ("node", "address", "memory free", "its speed", "disk", "device", "llamacli"))


def _speed(bytes_per_second: float | None) -> str:
    return f"{bytes_per_second / 1e9:.1f} GB/s" if bytes_per_second else "not measured"
