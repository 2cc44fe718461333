"""Starts, finds and stops Ray's processes on this machine, for the command line.

In: addresses. Out: a record for each node started here, in the state folder; errors with the end of Ray's log. Only processes
that were started here are stopped, and only their folders are removed.
"""

import glob
import ipaddress
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from llamacli import environment
from llamacli.cluster.control import PORT, environ, library, parse_address
from llamacli.cluster.launch import record
from llamacli.errors import DeviceError, OutputError, UsageError

STARTED = "Ray runtime started"
PATIENCE = 90.0  # seconds for Ray to start
ENDING = 10.0  # seconds in which Ray's processes must have ended; those of a cluster that has died take long
LEAVING = 3.0  # seconds in which the last process must have left a session's folder
ROOM = 32_000_000  # least free bytes on the disk of Ray's files
STORE = 80_000_000  # bytes of Ray's object store: the least it accepts, since nothing large goes through it


class Running(NamedTuple):
    """A node that was started here. `address`: the cluster's; `host`: its own."""

    pid: int
    address: str
    host: str
    head: bool


def start(host: str = "127.0.0.1", port: int = PORT) -> Running:
    """Start a cluster whose first node is this machine, reachable at `host`, and make a secret if there is none."""
    _check_host(host)
    library()
    with suppress(OSError):
        socket.create_connection((host, port), 1).close()
        raise UsageError(
            f"{host}:{port}: expected a free port, found a program that listens there; `llamacli cluster stop` or --port"
        )
    if environment.cluster_secret() is None:
        _make_secret(environment.cluster_secret_file())
    return _launch(["--head", f"--port={port}", "--include-dashboard=false"], f"{host}:{port}", host, True)


def join(address: str, host: str | None = None) -> Running:
    """Make this machine a node of the cluster at `address`; `host`: its own address, default the one from which the cluster is
    reached.
    """
    name, port = parse_address(address)
    library()
    if environment.cluster_secret() is None:
        raise UsageError(
            f"expected the cluster's secret in {environment.cluster_secret_file()}, found none; copy it from the machine on "
            f"which `llamacli cluster start` ran"
        )
    try:
        with socket.create_connection((name, port), 5) as there:
            host = host or there.getsockname()[0]
            name = there.getpeername()[0]
    except OSError as error:
        raise DeviceError(
            f"{address}: expected a cluster, found: {error.strerror or error}; start one there with "
            f"`llamacli cluster start --host ADDRESS`"
        ) from None
    _check_host(host)
    return _launch([f"--address={name}:{port}"], f"{name}:{port}", host, False)


def running() -> list[Running]:
    """The running nodes that were started here; records of ended ones are removed. The first node of a cluster comes last."""
    found, records = [], [*_records()]
    commands = {one.pid: one.command for one in _processes()} if records else {}
    for path, node in records:
        if "llamacli.cluster.launch" in commands.get(node.pid, ""):
            found.append(node)
        else:
            path.unlink(missing_ok=True)
    return sorted(found, key=lambda node: node.head)


def stop() -> list[Running]:
    """Stop the nodes that were started here, within ENDING seconds, and remove their Ray files; returns them."""
    found = running()
    sessions = [(session, node) for node in found for session in _sessions(node.pid)]
    for node in found:
        with suppress(ProcessLookupError):
            os.kill(node.pid, signal.SIGTERM)
    until = time.monotonic() + ENDING
    while running() and time.monotonic() < until:
        time.sleep(0.1)
    for node in running():
        _kill(node.pid)
    for session, node in sessions:
        _remove(session, node.address)
    return found


def _folder() -> Path:
    return environment.state_folder() / "cluster"


def _ray_folder() -> Path:
    """Ray's folder for sockets and logs, inside a folder that only this user can enter, since Ray lets every user write to its
    own.

    The path is short because the paths of sockets are limited.
    """
    return Path("/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir()) / f"llamacli-ray-{os.getuid()}" / "ray"


def _made_ray_folder() -> Path:
    """Make that folder and return it. OutputError if the disk is full: Ray would join, but start no process."""
    folder = _ray_folder().parent
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid() or folder.is_symlink():
            raise OutputError(f"{folder}: expected a folder of this user, found another's; remove it")
        folder.chmod(0o700)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise OutputError(f"{folder}: expected a folder for Ray's files, found: {error.strerror}; make room there") from None
    if free < ROOM:
        raise OutputError(
            f"{folder}: expected {ROOM / 1e6:.0f} MB free for Ray's files, found {free / 1e6:.1f} MB; make room there"
        )
    return _ray_folder()


def _records() -> Iterator[tuple[Path, Running]]:
    for path in sorted(_folder().glob("*.json")) if _folder().is_dir() else ():
        with suppress(OSError, ValueError, TypeError):
            yield path, Running(**json.loads(path.read_text()))


def _check_host(host: str) -> None:
    try:
        at = ipaddress.ip_address(host)
        private = at.is_private and not (at.is_unspecified or at.is_reserved or at.is_multicast)
    except ValueError:
        raise UsageError(f"--host: expected an address such as 10.0.0.5, found {host!r}") from None
    if not private:
        raise UsageError(f"--host: expected a private address, found {host}, which others may reach; use a private network")


def _make_secret(path: Path) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(secrets.token_hex(32) + "\n")
    except OSError as error:
        raise OutputError(
            f"{path}: expected to write the cluster's secret, found: {error.strerror}; check the folder"
        ) from None


class _Process(NamedTuple):
    """A process of this machine."""

    pid: int
    parent: int
    group: int
    command: str


def _processes() -> list[_Process]:
    """All running processes. -ww: commands are not cut at the width of a terminal."""
    listed = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,ppid=,pgid=,command="], capture_output=True, text=True).stdout
    rows = [line.split(None, 3) for line in listed.splitlines()]
    return [_Process(int(pid), int(parent), int(group), *command) for pid, parent, group, *command in rows if command]


def _family(pid: int) -> list[_Process]:
    """A process and its descendants."""
    rows, below = _processes(), {pid}
    while more := {one.pid for one in rows if one.parent in below} - below:
        below |= more
    return [one for one in rows if one.pid in below]


def _kill(pid: int) -> None:
    """Kill a node's first process and its descendants. On macOS Ray puts those of a joined node into another process group."""
    others = {one.group for one in _family(pid)} - {pid}
    for group in (pid, *others):  # the first process would restart the others
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def _sessions(pid: int) -> set[Path]:
    """The folders of Ray's sessions that a node's processes name in their commands."""
    folder = _ray_folder()
    names = re.compile(rf"{re.escape(str(folder))}/(session_\d[\w-]*)")
    return {folder / name for one in _family(pid) for name in names.findall(one.command)}


def _remove(session: Path, address: str) -> None:
    """Remove the folder of a session that a node of the cluster at `address` had, unless another process may use it."""
    until = time.monotonic() + LEAVING
    while _in_use(session, address):
        if time.monotonic() > until:
            return
        time.sleep(0.1)
    with suppress(OSError):
        if session.is_symlink() or session.stat().st_uid != os.getuid():
            return
        shutil.rmtree(session)
        latest = session.with_name("session_latest")
        if latest.is_symlink() and not latest.exists():  # Ray would not replace it
            latest.unlink()


def _in_use(session: Path, address: str) -> bool:
    """Whether a process may use the session: its command names it, it has a file of it open (if the system shows that), or it
    starts or keeps a node of the same cluster.
    """
    port = address.rpartition(":")[2]
    starting = re.compile(rf"llamacli\.cluster\.launch .*(--port={port}|--address=\S*:{port})( |$)")
    if any(str(session) in one.command or starting.search(one.command) for one in _processes()):
        return True
    for file in glob.iglob("/proc/[0-9]*/fd/*"):  # unlike Path.glob of Python 3.11, it allows that a process ends meanwhile
        with suppress(OSError):
            if os.readlink(file).startswith(f"{session}/"):
                return True
    return False


def _launch(words: list[str], address: str, host: str, head: bool) -> Running:
    words += [f"--temp-dir={_made_ray_folder()}"]
    _folder().mkdir(mode=0o700, parents=True, exist_ok=True)
    log = _folder() / f"{'head' if head else 'node'}-{os.getpid()}.log"
    words += ["--block", f"--node-ip-address={host}", "--disable-usage-stats", "--num-cpus=0"]
    words += [f"--object-store-memory={STORE}", "--include-log-monitor=false", "--no-monitor"]
    with open(log, "wb") as out:
        process = subprocess.Popen(  # -P: do not import from the working folder
            [sys.executable, "-P", "-m", "llamacli.cluster.launch", "start", *words],
            env=dict(os.environ) | environ(environment.cluster_secret()),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    began = time.monotonic()
    try:
        while STARTED not in (said := log.read_text(errors="replace")):
            if process.poll() is not None or time.monotonic() - began > PATIENCE:
                reason = next((line for line in reversed(said.splitlines()) if "rror" in line), said.strip()[-200:])
                said = f"{reason.strip()[:200]}; all of it is in {log}" if reason else f"nothing in {log}; is its disk full?"
                raise DeviceError(f"{address}: expected Ray to start, found: {said}")
            time.sleep(0.1)
        node = Running(process.pid, address, host, head)
        record(process.pid).write_text(json.dumps(node._asdict()))
    except BaseException:  # Ctrl-C must not leave processes running, either
        _kill(process.pid)
        raise
    return node
