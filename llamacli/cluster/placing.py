"""Places a model's layers on the nodes of a cluster.

In: a model's file, an address. Out: an Engine whose layers are on the nodes; advice about nodes that cannot be used.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from llamacli.cluster import copies, host
from llamacli.cluster.control import Cluster
from llamacli.cluster.row import NodeLost, Place
from llamacli.cluster.stage import ClusterStage
from llamacli.cpu.kernels.cores import default_threads
from llamacli.cpu.stage import cpu_part
from llamacli.cpu.weights import held_bytes
from llamacli.engine import Engine
from llamacli.errors import DeviceError, LlamacliError
from llamacli.files.gguf import GGUF
from llamacli.llama4.config import Config
from llamacli.llama4.tensors import needed
from llamacli.plan import nodes as planning

TWICE = 2  # a node lost this often is not used for a while (stage.FORGET)


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
        more_sessions: int = 0,
    ):
        """`sessions`, `more_sessions`: as for Model.load. The attribute `sessions` is the total once layers are placed."""
        self._cluster, self._gguf, self._config, self._ctx = cluster, gguf, config, ctx
        self._threads, self._memory, self._slots, self._layers = threads, memory, slots, layers
        self.sessions, self._least_sessions, self._more_sessions = sessions, sessions, more_sessions
        plain = replace(config, kv_type="F16")
        self._digest = lambda layers: copies.digest(gguf, plain, layers)
        self._model = planning.model(config, [(t.name, held_bytes(t)) for t in gguf.tensors.values()])
        self.left_out: Callable[[str], None] = lambda words: None  # called with the reason why a node is not used
        self._opened = False
        self._answered: set[str] = set()  # nodes that answered when the layers were placed
        self._distrusted: set[str] = set()  # nodes that were not asked at that time

    def __call__(self, losses: Counter) -> list[Place]:
        """Place all layers and return the places. MemoryLimitError or DeviceError if that is not possible."""
        self._distrusted = _distrusted(losses)
        skip = set(self._distrusted)
        for name in losses:
            self._cluster.drop(name)
        while True:
            usable = self._usable(skip)
            machines = [self._machine(name, facts) for name, facts in usable.items()]
            others = skip or (self._opened and len(machines) != len(self._layers))
            layers = () if others else self._layers  # of nodes that are left: chosen anew
            if not self._opened:  # later the number is fixed
                self.sessions = self._least_sessions
            split = self._split(machines, layers)
            if not self._opened and self._more_sessions and not self._slots:
                self.sessions += planning.more_contexts(self._model, split, self._ctx, self._more_sessions, self.sessions)
            asked = {}
            for part in split.parts:
                facts, placed = usable[part.machine.name], part.placement
                asked[part.machine.name] = self._cluster.open(
                    part.machine.name,
                    copy=_copy(facts["copies"], part.layers),
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
        """Nodes that accept connections now but did not answer when the layers were placed."""
        return sorted(set(self._cluster.reached()[0]) - self._answered - _distrusted(losses))

    def _machine(self, name: str, facts: dict) -> planning.Machine:
        held = [range(*layers) for layers in facts["copies"].values() if layers]
        return planning.Machine(
            name,
            self._memory or facts["memory"],
            facts["bandwidth"],
            facts["disk"] or planning.ASSUMED_DISK,
            facts["threads"],
            () if range(self._config.n_layers) in held else tuple(held),
        )

    def _split(self, machines: Sequence[planning.Machine], layers: Sequence[int]) -> planning.Split:
        return planning.split(
            self._model,
            machines,
            self._ctx,
            latency=self._cluster.latency,
            slots=self._slots,
            layers=layers,
            sessions=self.sessions,
            name=str(self._gguf.path),
        )

    def _advice(self, name: str, nodes: dict[str, dict]) -> str:
        """Advice how a node gets the file, or the layers that it would have."""
        machines = [self._machine(other, facts) for other, facts in nodes.items() if facts.get("version") == host.version()]
        with suppress(LlamacliError):
            split = self._split(machines, ())
            if layers := next((part.layers for part in split.parts if part.machine.name == name), None):
                words = f"llamacli quantize {self._gguf.path.name} --layers {layers.start}-{layers.stop - 1}"
                return f"copy the file there, or what `{words}` makes here"
        return "copy the file there"

    def _usable(self, skip: set[str]) -> dict[str, dict]:
        """Facts about nodes that have the file and the same version. DeviceError if there are none."""
        found, why = {}, [f"node {name}: lost twice, not used for some minutes" for name in sorted(self._distrusted)]
        nodes = self._cluster.describe(str(self._gguf.path.absolute()), self._threads, tuple(skip))
        answered = {name for name, facts in nodes.items() if "error" not in facts}
        self._answered = answered | (self._answered & (skip - self._distrusted))  # at once: another thread reads it
        for name, facts in nodes.items():
            if "error" in facts:
                problem = facts["error"]
            elif facts["version"] != host.version():
                problem = f"expected llamacli {host.version()}, found {facts['version']}; install the same version"
            elif not facts["copies"]:
                where = f"{facts['models']} or at the same path as here"
                problem = f"expected a copy of {self._gguf.path.name} in {where}, found none; {self._advice(name, nodes)}"
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


def _copy(copies: dict[str, list[int] | None], layers: range) -> str:
    """The copy that has these layers, else the first; opening it then reports what it lacks."""
    fits = (path for path, held in copies.items() if held and held[0] <= layers.start and layers.stop <= held[1])
    return next(fits, next(iter(copies)))


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
        opened["alike"],
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
    more_sessions: int = 0,
) -> tuple[Engine, int]:
    """An Engine whose layers are on the nodes of a cluster. `memory`: of each node. `told`: called with a line about a node
    that is left out or lost. `layers`: how many each node gets; empty: chosen by speed and memory. `sessions`: how many will
    hold `ctx` tokens at a time; `more_sessions`: the most sessions beyond these, for which nodes have memory left when all
    weights are in memory. Returns the engine and the number of all sessions.

    Closing the engine ends this program's processes on the nodes.
    """
    needed(gguf, config)
    cluster = Cluster(address)
    placing = Placing(cluster, gguf, config, ctx, threads, memory, experts == "slots", layers, sessions, more_sessions)
    placing.left_out = told
    try:
        local = cpu_part(gguf, config, range(0), threads or default_threads(), ends=True)
        stage = ClusterStage(local, config, placing, cluster.secret.encode(), cluster.close, placing.there_again)
    except NodeLost as error:
        cluster.close()
        raise DeviceError(f"{error}; start it again, `llamacli cluster status` shows the nodes") from None
    except BaseException:
        cluster.close()
        raise
    stage.lost = told
    return Engine(gguf, config, threads, cluster=stage), placing.sessions
