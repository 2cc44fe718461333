"""The cluster's control plane, by Ray: the nodes that are alive, facts about them, and processes on them.

In: the address of a cluster. Out: the answers of host.py on each node; nodes that encode for a conversion. Ray is imported
here, in host.py's processes and in launch.py only, and only when a cluster is asked for. Hidden states do not go through Ray
(wire.py). Ray and the links require the same secret.
"""

import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

from llamacli import environment
from llamacli.cluster import host
from llamacli.cluster.launch import check_private, keep_loopback
from llamacli.cluster.tasks import Tasks
from llamacli.errors import DeviceError, LlamacliError, UsageError

PORT = 6479
REACHED = 3.0  # seconds in which a node must accept a connection
STARTING, OPENING = 40.0, 600.0  # seconds in which a node's process must answer, and must have opened its layers
LOOK_EVERY = 0.02  # seconds between checks whether it has
LEAVING = 5.0  # seconds in which a call of Ray must return
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4" + bytes(5)  # a greeting that a server answers: RFC 9113, 3.4


def environ(secret: str) -> dict[str, str]:
    """Ray's environment variables: require the secret, send no statistics, print nothing."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secret,
        "RAY_NUM_REDIS_GET_RETRIES": "3",  # seconds in which a cluster must accept this machine
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_ENABLE_AUTO_CONNECT": "0",  # a call after `close` must not start a new cluster
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


class NoAnswer(DeviceError):
    """A node gave no answer, or its process ended."""


class Cluster:
    """A connection to a running cluster, as one of its nodes. Ray allows one per process."""

    def __init__(self, address: str):
        """DeviceError if no cluster answers there, or with another secret. UsageError if this process has a connection."""
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
        if self._ray.is_initialized():
            raise UsageError(
                "--cluster: expected no other connection of this process to Ray, which allows one, found one; close it first"
            )
        if name in ("127.0.0.1", "localhost"):
            keep_loopback()
        check_private(self._ray, "_private")
        check_private(self._ray._private.worker, "listen_error_messages")
        self._ray._private.worker.listen_error_messages = lambda *_: None  # it prints to stdout; the links report losses
        job = _job(self._ray)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with _no_stderr():
                self._ray.init(
                    address=f"{name}:{port}",
                    logging_level="CRITICAL",
                    log_to_driver=False,
                    job_config=job,
                )
        except (ConnectionError, RuntimeError, ValueError, self._ray.exceptions.RayError) as error:
            raise DeviceError(
                f"{name}:{port}: expected a cluster that takes this machine, found: {_line(error)}; is its secret the one here?"
            ) from None
        finally:
            for number, handler in handlers.items():
                with suppress(ValueError):  # not the main thread
                    signal.signal(number, handler)
        if not job.made:  # nodes would import from this program's folders
            self._ray.shutdown()
            check_private(job, "JobConfig._serialize as it was")
        self._hosts: dict[str, object] = {}
        self._names: dict[str, str] = {}  # of nodes with a process of this program, by Ray's ids
        self._refused: dict[str, Exception] = {}  # the reasons of nodes that cannot encode, by Ray's ids
        self.latency = 0.0  # seconds one way to the farthest node, as `describe` found it
        self._busy, self._closed = threading.Lock(), False  # held during each call to Ray; none begins after `close`

    @contextmanager
    def _calls(self):
        """A context for calls to Ray that do not wait."""
        with self._busy:
            if self._closed:
                raise DeviceError("expected a connection to the cluster, found that it was closed")
            yield self._ray

    def alive(self) -> dict[str, dict]:
        """Ray's facts about the nodes that are alive, by name; this machine's first."""
        with self._calls() as ray:
            here = ray.get_runtime_context().get_node_id()
            found = sorted((n for n in ray.nodes() if n["Alive"]), key=lambda n: (n["NodeID"] != here, n["NodeID"]))
        return named(found, self._names)

    def reached(self, skip: Sequence[str] = ()) -> tuple[dict[str, dict], dict[str, dict]]:
        """Ray's facts about the nodes that accept connections; {"address", "error": words} for each that does not.

        After a node died and its machine joined again, Ray lists two nodes for a while; the dead one is left out.
        """
        nodes = {name: node for name, node in self.alive().items() if name not in skip}
        with ThreadPoolExecutor(max(1, len(nodes))) as pool:  # Ray takes half a minute to notice a lost connection
            reached = dict(zip(nodes, pool.map(_reached, nodes.values()), strict=True))
        self.latency = max((seconds for seconds in reached.values() if seconds), default=0.0) / 2
        silent = {name: nodes.pop(name) for name, answers in reached.items() if answers is None}
        there = {_machine(node) for node in nodes.values()}
        missing = {name: node["NodeManagerAddress"] for name, node in silent.items() if _machine(node) not in there}
        return nodes, {
            name: {"address": at, "error": f"expected an answer from {at}, found none; check the machine and its cable"}
            for name, at in missing.items()
        }

    def describe(self, path: str | None = None, threads: int | None = None, skip: Sequence[str] = ()) -> dict[str, dict]:
        """host.Host.describe of every node, {"error": words} for one that does not answer."""
        nodes, found = self.reached(skip)
        found |= {name: {"address": node["NodeManagerAddress"]} for name, node in nodes.items()}
        with self._calls():
            asked = {name: self._host(name, node).describe.remote(path, threads) for name, node in nodes.items()}
        for name, facts in self._gather(asked, STARTING).items():
            found[name] |= {"error": str(facts)} if isinstance(facts, Exception) else facts
        return found

    def open(self, name: str, **how) -> object:
        """A reference to host.Host.open on a node."""
        with self._calls():
            return self._hosts[name].open.remote(**how)

    def encode(self, names: Sequence[str] | None, skip: Sequence[str], **how) -> dict[str, dict | Exception]:
        """host.Host.encode on these nodes, or on all except `skip`; {} for nodes that are gone.

        A node that refused is not asked again, since each call starts a process there; when it joins again it has another id.
        """
        nodes, silent = self.reached(skip)
        found: dict[str, dict | Exception] = {name: NoAnswer(facts["error"]) for name, facts in silent.items()}
        found |= {name: self._refused[node["NodeID"]] for name, node in nodes.items() if node["NodeID"] in self._refused}
        with self._calls():
            asked = {
                name: self._host(name, node).encode.remote(host=node["NodeManagerAddress"], **how)
                for name, node in nodes.items()
                if name not in found and (names is None or name in names)
            }
        for name, facts in self._gather(asked, OPENING).items():
            found[name] = facts
            if isinstance(facts, Exception) and not isinstance(facts, NoAnswer):
                self._refused[nodes[name]["NodeID"]] = facts
        return {name: facts for name, facts in found.items() if names is None or name in names}

    def gather(self, asked: dict[str, object]) -> dict[str, dict | Exception]:
        """The results of references."""
        return self._gather(asked, OPENING)

    def drop(self, name: str) -> None:
        """End this program's process on a node."""
        self._names = {number: known for number, known in list(self._names.items()) if known != name}
        if (held := self._hosts.pop(name, None)) is not None:
            with suppress(Exception), self._calls() as ray:
                ray.kill(held)

    def close(self) -> None:
        """End this program's processes on all nodes and disconnect. Later calls of other threads raise DeviceError."""
        held = self._busy.acquire(timeout=LEAVING)  # do not wait for a call to Ray that hangs because the cluster has gone
        try:
            self._closed = True
            for there in list(self._hosts.values()):
                with suppress(Exception):
                    self._ray.kill(there)
            self._ray.shutdown()
        finally:
            if held:
                self._busy.release()

    def _host(self, name: str, node: dict):
        if name not in self._hosts:
            strategy = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            made = self._ray.remote(host.Host).options(num_cpus=0, scheduling_strategy=strategy, max_concurrency=1)
            self._hosts[name] = made.remote(self.secret)
            self._names[node["NodeID"]] = name
        return self._hosts[name]

    def _gather(self, asked: dict[str, object], seconds: float) -> dict[str, dict | Exception]:
        found, until = {}, time.monotonic() + seconds
        while asked:
            with self._calls() as ray:
                ready, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=0)
                found |= {name: _result(ray, reference) for name, reference in asked.items() if reference in ready}
            asked = {name: reference for name, reference in asked.items() if name not in found}
            if asked and time.monotonic() > until:
                return found | {name: NoAnswer(f"no answer for {seconds:.0f} s") for name in asked}
            time.sleep(LOOK_EVERY if asked else 0)
        return found


def _result(ray, reference) -> dict | Exception:
    """The result of a reference that is ready."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        return cause if isinstance(cause, LlamacliError) else DeviceError(f"{type(cause).__name__}: {_line(cause)}")
    except ray.exceptions.RayError as error:
        return NoAnswer(f"its process ended: {_line(error)}; is its memory or the disk of /tmp full?")


def _job(ray):
    """The configuration of Ray's job, changed so that nodes do not import modules from this program's folders before their own
    installation.

    Ray adds these folders itself; the public way to stop it would send the nodes another folder instead. `made`: whether Ray
    has used this configuration.
    """

    class Job(ray.job_config.JobConfig):
        made = False

        def _serialize(self):
            self.made = True
            self._py_driver_sys_path.clear()
            return super()._serialize()

    check_private(ray.job_config.JobConfig, "_serialize")
    job = Job()
    check_private(job, "_py_driver_sys_path")
    return job


def _machine(node: dict) -> tuple[str, str]:
    return node["NodeManagerAddress"], node["NodeManagerHostname"]


def named(nodes: Sequence[dict], known: dict[str, str]) -> dict[str, dict]:
    """Ray's nodes by the names of their machines, with a part of their id where several have one name.

    `known`: names by id; nodes keep these when others join or leave.
    """
    machines = Counter(node["NodeManagerHostname"] for node in nodes)
    found = {}
    for node in nodes:
        machine, number = node["NodeManagerHostname"], node["NodeID"]
        found[known.get(number) or (f"{machine}/{number[:6]}" if machines[machine] > 1 else machine)] = node
    return found


@contextmanager
def encoders(address: str, threads: int | None, told: Callable[[str], None]) -> Iterator[Tasks]:
    """The nodes of a cluster, for a conversion. `threads`: of each node. `told`: called with a line about a node that is left
    out or lost.
    """
    cluster = Cluster(address)

    def open_nodes(names: Sequence[str] | None, skip: Sequence[str] = (), **how) -> dict[str, dict | Exception]:
        for name in names or ():
            cluster.drop(name)
        found = cluster.encode(names, skip, threads=threads, **how)
        for name, facts in found.items():
            if isinstance(facts, Exception):
                cluster.drop(name)
        return found

    tasks = Tasks(open_nodes, cluster.secret.encode(), told)
    try:
        yield tasks
    finally:
        tasks.close()
        cluster.close()


def _reached(node: dict) -> float | None:
    """The round trip to Ray's process on a node in seconds, None if it does not answer: a stopped process still accepts
    connections.
    """
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
    """A context that discards stderr, since Ray's core writes there while it connects."""
    kept, void = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(void, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(void)


def _line(error: BaseException) -> str:
    """The first informative line of an error."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]
