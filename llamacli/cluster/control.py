"""Ray as the cluster's control plane: starts and joins nodes, places layers on them, notices which are alive.

In: the address of a cluster, a model's file. Out: an Engine whose layers are on the nodes; facts about the nodes. Ray is
imported here, in host.py's processes and in launch.py only, and only when a cluster is asked for. Hidden states do not go
through Ray (wire.py). Ray and the links ask for the same secret.
"""

import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace

from llamacli import environment
from llamacli.cluster import copies, host
from llamacli.cluster.launch import keep_loopback
from llamacli.cluster.row import NodeLost, Place
from llamacli.cluster.stage import ClusterStage
from llamacli.cluster.tasks import Tasks
from llamacli.cpu.kernels.cores import default_threads
from llamacli.cpu.stage import cpu_part
from llamacli.engine import Engine
from llamacli.errors import DeviceError, LlamacliError, UsageError
from llamacli.files.gguf import GGUF
from llamacli.llama4.config import Config
from llamacli.plan import nodes as planning

PORT = 6479
REACHED = 3.0  # seconds in which a node must take a connection
STARTING, OPENING = 40.0, 600.0  # seconds in which a node's process must answer, and must have opened its layers
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4" + bytes(5)  # a greeting that a server answers: RFC 9113, 3.4
TWICE = 2  # a node that was lost so often is not used for a while (stage.FORGET)


def environ(secret: str) -> dict[str, str]:
    """What Ray is told by variables: ask for the secret, send no statistics, be quiet."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secret,
        "RAY_NUM_REDIS_GET_RETRIES": "3",  # seconds in which a cluster must let this machine in
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }


def library():
    """The module ray. UsageError if it is not installed."""
    try:
        import ray
    except ImportError:
        raise UsageError("a cluster: expected the package ray, found none; install llamacli[cluster]") from None
    return ray


def parse_address(text: str) -> tuple[str, int]:
    """HOST[:PORT]."""
    name, _, port = text.strip().rpartition(":") if text.count(":") == 1 else (text.strip(), "", str(PORT))
    if not name or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"a cluster's address: expected HOST or HOST:PORT, found {text!r}")
    return name, int(port)


class Cluster:
    """A connection to a running cluster, as one of its nodes. One per process, as Ray has it."""

    def __init__(self, address: str):
        """DeviceError if no cluster answers there, or with another secret."""
        self.secret = environment.cluster_secret()
        if not self.secret:
            raise UsageError(
                f"--cluster: expected the cluster's secret in {environment.cluster_secret_file()}, found none; copy it from "
                f"the machine on which `llamacli cluster start` ran"
            )
        name, port = parse_address(address)
        try:
            socket.create_connection((name, port), 5).close()
        except OSError as error:
            raise DeviceError(
                f"{name}:{port}: expected a cluster, found: {error.strerror or error}; `llamacli cluster start` starts one"
            ) from None
        os.environ.update(environ(self.secret))
        self._ray = library()
        if name in ("127.0.0.1", "localhost"):
            keep_loopback()
        self._ray._private.worker.listen_error_messages = lambda *_: None  # it prints to stdout; losses are told by the links
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with _no_stderr():
                self._ray.init(
                    address=f"{name}:{port}", logging_level="CRITICAL", log_to_driver=False, ignore_reinit_error=True
                )
        except (ConnectionError, RuntimeError, ValueError, self._ray.exceptions.RayError) as error:
            raise DeviceError(
                f"{name}:{port}: expected a cluster that takes this machine, found: {_line(error)}; is its secret the one here?"
            ) from None
        finally:
            for number, handler in handlers.items():
                with suppress(ValueError):  # not the main thread
                    signal.signal(number, handler)
        self._hosts: dict[str, object] = {}
        self.latency = 0.0  # seconds one way to the farthest node, as `describe` found it

    def alive(self) -> dict[str, dict]:
        """Ray's facts about the nodes that are alive, by name; this machine's first."""
        here = self._ray.get_runtime_context().get_node_id()
        found = sorted((n for n in self._ray.nodes() if n["Alive"]), key=lambda n: (n["NodeID"] != here, n["NodeID"]))
        names = Counter(node["NodeManagerHostname"] for node in found)
        return {
            node["NodeManagerHostname"] + (f"/{node['NodeID'][:6]}" if names[node["NodeManagerHostname"]] > 1 else ""): node
            for node in found
        }

    def reached(self, skip: Sequence[str] = ()) -> tuple[dict[str, dict], dict[str, dict]]:
        """Ray's facts about the nodes that take connections; {"address", "error": words} of each that does not."""
        nodes = {name: node for name, node in self.alive().items() if name not in skip}
        with ThreadPoolExecutor(max(1, len(nodes))) as pool:  # Ray takes half a minute to notice a cable that was cut
            reached = dict(zip(nodes, pool.map(_reached, nodes.values()), strict=True))
        self.latency = max((seconds for seconds in reached.values() if seconds), default=0.0) / 2
        silent = {name: nodes.pop(name)["NodeManagerAddress"] for name, answers in reached.items() if answers is None}
        return nodes, {
            name: {"address": at, "error": f"expected an answer from {at}, found none; check its cable"}
            for name, at in silent.items()
        }

    def describe(self, path: str | None = None, threads: int | None = None, skip: Sequence[str] = ()) -> dict[str, dict]:
        """host.Host.describe of every node, {"error": words} for one that does not answer."""
        nodes, found = self.reached(skip)
        found |= {name: {"address": node["NodeManagerAddress"]} for name, node in nodes.items()}
        asked = {name: self._host(name, node).describe.remote(path, threads) for name, node in nodes.items()}
        for name, facts in self._gather(asked, STARTING).items():
            found[name] |= {"error": str(facts)} if isinstance(facts, Exception) else facts
        return found

    def open(self, name: str, **how) -> object:
        """A reference to host.Host.open on a node."""
        return self._hosts[name].open.remote(**how)

    def encode(self, names: Sequence[str] | None = None, **how) -> dict[str, dict | Exception]:
        """host.Host.encode on these nodes, or all; {} for those that are gone."""
        nodes, silent = self.reached()
        asked = {
            name: self._host(name, node).encode.remote(host=node["NodeManagerAddress"], **how)
            for name, node in nodes.items()
            if names is None or name in names
        }
        errors = {name: DeviceError(found["error"]) for name, found in silent.items() if names is None or name in names}
        return self._gather(asked, OPENING) | errors

    def gather(self, asked: dict[str, object]) -> dict[str, dict | Exception]:
        """What the references came to."""
        return self._gather(asked, OPENING)

    def drop(self, name: str) -> None:
        """End this program's process on a node."""
        if (held := self._hosts.pop(name, None)) is not None:
            with suppress(Exception):
                self._ray.kill(held)

    def close(self) -> None:
        """End this program's processes on all nodes, and leave."""
        for name in list(self._hosts):
            self.drop(name)
        self._ray.shutdown()

    def _host(self, name: str, node: dict):
        if name not in self._hosts:
            strategy = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            made = self._ray.remote(host.Host).options(num_cpus=0, scheduling_strategy=strategy, max_concurrency=1)
            self._hosts[name] = made.remote(self.secret)
        return self._hosts[name]

    def _gather(self, asked: dict[str, object], seconds: float) -> dict[str, dict | Exception]:
        ray, found = self._ray, {}
        if not asked:
            return found
        ready, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=seconds)
        for name, reference in asked.items():
            if reference not in ready:
                found[name] = DeviceError(f"no answer for {seconds:.0f} s")
                continue
            try:
                found[name] = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                cause = error.cause
                found[name] = (
                    cause if isinstance(cause, LlamacliError) else DeviceError(f"{type(cause).__name__}: {_line(cause)}")
                )
            except ray.exceptions.RayError as error:
                found[name] = DeviceError(f"its process ended: {_line(error)}")
        return found


class Placing:
    """Opens a model's layers on a cluster's nodes, and again when one is lost (stage.ClusterStage's `open_row`)."""

    def __init__(
        self,
        cluster: Cluster,
        gguf: GGUF,
        config: Config,
        ctx: int,
        threads: int | None,
        memory: int | None,
        slots: bool,
        layers: Sequence[int] = (),
        sessions: int = 1,
    ):
        self._cluster, self._gguf, self._config, self._ctx = cluster, gguf, config, ctx
        self._threads, self._memory, self._slots, self._layers, self._sessions = threads, memory, slots, layers, sessions
        plain = replace(config, kv_type="F16")
        self._digest = lambda layers: copies.digest(gguf, plain, layers)
        self._model = planning.model(config, [(t.name, t.nbytes) for t in gguf.tensors.values()])
        self.left_out: Callable[[str], None] = lambda words: None  # told why a node is not used
        self._opened = False
        self._answered: set[str] = set()  # nodes that had an answer when the layers were placed

    def __call__(self, losses: Counter) -> list[Place]:
        """Places of all layers. MemoryLimitError or DeviceError if there are none."""
        skip, self._answered = _distrusted(losses), set()
        for name in losses:
            self._cluster.drop(name)
        while True:
            usable = self._usable(skip)
            machines = [
                planning.Machine(
                    name,
                    self._memory or facts["memory"],
                    facts["bandwidth"],
                    facts["disk"] or planning.ASSUMED_DISK,
                    facts["threads"],
                )
                for name, facts in usable.items()
            ]
            others = skip or (self._opened and len(machines) != len(self._layers))
            layers = () if others else self._layers  # of nodes that are left: chosen anew
            split = planning.split(
                self._model,
                machines,
                self._ctx,
                latency=self._cluster.latency,
                slots=self._slots,
                layers=layers,
                sessions=self._sessions,
                name=str(self._gguf.path),
            )
            asked = {}
            for part in split.parts:
                facts, placed = usable[part.machine.name], part.placement
                asked[part.machine.name] = self._cluster.open(
                    part.machine.name,
                    copy=facts["copy"],
                    first=part.layers.start,
                    end=part.layers.stop,
                    digest=self._digest(part.layers),
                    kv=self._config.kv_type,
                    threads=facts["threads"],
                    slots=placed.n_slots if placed.mode == "slots" else 0,
                    batch=placed.batch,
                    host=facts["address"],
                )
            opened = self._cluster.gather(asked)
            failed = {name: found for name, found in opened.items() if isinstance(found, Exception)}
            if not failed:
                self._opened = True
                return [_place(part, opened[part.machine.name]) for part in split.parts]
            for name, error in failed.items():
                self._leave_out(name, str(error))
                self._cluster.drop(name)
                skip.add(name)

    def there_again(self, losses: Counter) -> list[str]:
        """Nodes that take connections and had no answer when the layers were placed."""
        return sorted(set(self._cluster.reached()[0]) - self._answered - _distrusted(losses))

    def _usable(self, skip: set[str]) -> dict[str, dict]:
        """Facts about nodes that have the file and the same version. DeviceError if there are none."""
        found, why = {}, []
        for name, facts in self._cluster.describe(str(self._gguf.path.absolute()), self._threads, tuple(skip)).items():
            if "error" not in facts:
                self._answered.add(name)
            if "error" in facts:
                problem = facts["error"]
            elif facts["version"] != host.version():
                problem = f"expected llamacli {host.version()}, found {facts['version']}; install the same version"
            elif not facts["copy"]:
                problem = (
                    f"expected a copy of {self._gguf.path.name} in {facts['models']} or at the same path as here, found none; "
                    f"copy the file there"
                )
            else:
                found[name] = facts
                continue
            why.append(f"node {name}: {problem}")
            self._leave_out(name, problem)
            self._cluster.drop(name)
            skip.add(name)
        if not found:
            raise DeviceError("; ".join(why) or "expected a node for the layers, found none; see `llamacli cluster status`")
        return found

    def _leave_out(self, name: str, why: str) -> None:
        self.left_out(f"node {name} is left out: {why}")


def _distrusted(losses: Counter) -> set[str]:
    return {name for name, n in losses.items() if n >= TWICE}


def _place(part: planning.Part, opened: dict) -> Place:
    placed = part.placement
    return Place(
        part.machine.name,
        tuple(opened["address"]),
        part.layers,
        opened["bytes_per_token"],
        opened["products_per_token"],
        placed.mode == "slots",
        tuple(opened["notices"]),
        opened["pid"],
        opened["batch"],
        part.seconds,
    )


def open_engine(
    gguf: GGUF,
    config: Config,
    address: str,
    ctx: int,
    threads: int | None = None,
    memory: int | None = None,
    experts: str = "auto",
    told: Callable[[str], None] = lambda words: None,
    layers: Sequence[int] = (),
    sessions: int = 1,
) -> Engine:
    """An Engine whose layers are on the nodes of a cluster. `memory`: of each node. `told`: hears of nodes that are left out
    or lost. `layers`: how many each node gets, none: chosen by speed and memory.
    `sessions`: how many will hold `ctx` tokens at a time.

    Closing the engine ends this program's processes on the nodes.
    """
    cluster = Cluster(address)
    placing = Placing(cluster, gguf, config, ctx, threads, memory, experts == "slots", layers, sessions)
    placing.left_out = told
    local = cpu_part(gguf, config, range(0), threads or default_threads(), ends=True)
    try:
        stage = ClusterStage(local, config, placing, cluster.secret.encode(), cluster.close, placing.there_again)
    except NodeLost as error:
        cluster.close()
        raise DeviceError(f"{error}; start it again, `llamacli cluster status` shows the nodes") from None
    except BaseException:
        cluster.close()
        raise
    stage.lost = told
    return Engine(gguf, config, threads, cluster=stage)


@contextmanager
def encoders(address: str, threads: int | None, told: Callable[[str], None]) -> Iterator[Tasks]:
    """The nodes of a cluster, for a conversion. `threads`: of each node. `told`: hears of nodes that are left out or lost."""
    cluster = Cluster(address)

    def open_nodes(names: Sequence[str] | None, **how) -> dict[str, dict | Exception]:
        for name in names or ():
            cluster.drop(name)
        return cluster.encode(names, threads=threads, **how)

    tasks = Tasks(open_nodes, cluster.secret.encode(), told)
    try:
        yield tasks
    finally:
        tasks.close()
        cluster.close()


def _reached(node: dict) -> float | None:
    """Seconds to Ray's process on a node and back, None if it does not answer: one that stands still takes connections."""
    try:
        began = time.monotonic()
        with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), REACHED) as there:
            took = time.monotonic() - began
            there.settimeout(REACHED)
            there.sendall(HTTP2)
            return took if there.recv(1) else None
    except OSError:
        return None


@contextmanager
def _no_stderr():
    """Ray's core writes there while it connects, whatever it is told."""
    kept, void = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(void, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(void)


def _line(error: BaseException) -> str:
    """The first line of an error that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
