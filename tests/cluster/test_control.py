"""Ray's processes on this machine and the connection to a cluster, tested without Ray: processes and files are cleaned up."""

import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from llamacli.cluster import control, processes
from llamacli.errors import DeviceError, UsageError

STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:  # as launch.py, whose child Ray puts into a group of its own
    os.setpgrp()
    print(os.getppid(), os.getpid(), flush=True)
time.sleep(200)
"""


@pytest.fixture
def state(tmp_path, monkeypatch):
    """The folder of records, of this test alone."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("LLAMACLI_CLUSTER_SECRET", "of this test")
    found = tmp_path / "llamacli" / "cluster"
    found.mkdir(parents=True)
    return found


def ended(pids, seconds=60):
    """Whether these processes end by themselves in this time; else they are killed."""
    until = time.monotonic() + seconds
    while True:
        rows = subprocess.run(["ps", "-A", "-o", "pid=,stat="], capture_output=True, text=True).stdout.splitlines()
        left = [pid for pid, stat in map(str.split, rows) if pid in pids and not stat.startswith("Z")]
        if not left or time.monotonic() > until:
            break
        time.sleep(0.05)
    for pid in left:
        os.kill(int(pid), signal.SIGKILL)
    return not left


def test_stop_kills_what_does_not_end_whatever_group_it_is_in(state, monkeypatch):
    monkeypatch.setattr(processes, "ENDING", 0.1)
    words = [sys.executable, "-c", STUBBORN, "llamacli.cluster.launch"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    begun = process.stdout.readline().split()
    node = processes.Running(process.pid, "127.0.0.1:1", "127.0.0.1", False)
    monkeypatch.setattr(processes, "_records", lambda: [(state / "no record", node)])
    stopped = processes.stop()
    assert ended(begun)
    assert stopped == [node] and process.wait() == -signal.SIGKILL


SLEEPING = """
import os, sys, time
parent, (name, *words) = os.getpid(), sys.argv[1:]
if words and os.fork() == 0:  # as launch.py, whose children name the session and end with it
    os.execv(sys.executable, [sys.executable, "-c", FOLLOWING, str(parent), *words])
elif not words:
    print(flush=True)
time.sleep(200)
"""
FOLLOWING = """
import os, sys, time
print(flush=True)
while str(os.getppid()) == sys.argv[1]:
    time.sleep(0.02)
"""


def sleeping(*words, **how):
    """A process of that name and, with `words`, a child process with these arguments."""
    code = f"FOLLOWING = {FOLLOWING!r}\n{SLEEPING}"
    process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE, start_new_session=True, **how)
    process.stdout.readline()
    return process


def test_a_process_that_ends_while_its_open_files_are_listed_stops_nothing(state, tmp_path, monkeypatch):
    scandir = os.scandir

    def ended_meanwhile(path="."):
        if str(path).endswith("/fd"):  # else perhaps a descriptor
            raise FileNotFoundError(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", ended_meanwhile)
    monkeypatch.setattr(processes, "_ray_folder", lambda: tmp_path / "ray")
    session = tmp_path / "ray" / "session_2026-11-29_10-01-00_123456_1"
    session.mkdir(parents=True)
    process = sleeping("llamacli.cluster.launch", f"--session-dir={session}")
    node = processes.Running(process.pid, "127.0.0.1:7001", "127.0.0.1", True)
    monkeypatch.setattr(processes, "_records", lambda: [(state / "no record", node)])
    assert processes.stop() == [node]
    assert process.wait() == -signal.SIGTERM and not session.exists()


@pytest.mark.parametrize("other", ["nobody", "names it", "has a file open", "starts a node there", "starts another cluster"])
def test_stop_removes_the_folder_of_the_node_s_session_unless_another_process_may_use_it(state, tmp_path, monkeypatch, other):
    monkeypatch.setattr(processes, "_ray_folder", lambda: tmp_path / "ray")
    monkeypatch.setattr(processes, "LEAVING", 2, raising=False)
    session, elsewhere = (tmp_path / "ray" / f"session_2026-11-29_10-0{k}-00_123456_{k}" for k in (1, 2))
    for folder in (session, elsewhere):
        (folder / "logs").mkdir(parents=True)
        (folder / "logs" / "gcs.log").touch()
    latest = tmp_path / "ray" / "session_latest"
    latest.symlink_to(session)
    process = sleeping("llamacli.cluster.launch", f"--session-dir={session}")
    node = processes.Running(process.pid, "127.0.0.1:7001", "127.0.0.1", True)
    monkeypatch.setattr(processes, "_records", lambda: [(state / "no record", node)])
    words = {
        "names it": [f"--session-dir={session}"],
        "starts a node there": ["llamacli.cluster.launch start --address=127.0.0.1:7001"],
        "starts another cluster": ["llamacli.cluster.launch start --head --port=70010"],
    }
    with open(session / "logs" / "gcs.log") as log:
        beside = None if other == "nobody" else sleeping(*words.get(other, ["x"]), stdin=log if "open" in other else None)
    try:
        assert processes.stop() == [node]
    finally:
        process.wait()
        if beside:
            beside.kill()
            beside.wait()
    removed = other in ("nobody", "starts another cluster") or (other == "has a file open" and not os.path.isdir("/proc"))
    assert (session.exists(), latest.is_symlink()) == (not removed, not removed)
    assert (elsewhere / "logs" / "gcs.log").exists()


def test_a_start_that_fails_leaves_nothing_behind_whatever_group_it_is_in(state, tmp_path, monkeypatch, nobody):
    program, begun = tmp_path / "python", []
    program.write_text(f"#!{sys.executable}\n{STUBBORN}")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(processes, "library", lambda: None)

    def sleep(seconds):
        (log,) = state.glob("*.log")
        begun.extend(log.read_text().split())
        if begun:
            raise KeyboardInterrupt
        time.sleep(seconds)

    monkeypatch.setattr(processes, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    with pytest.raises(KeyboardInterrupt):
        processes.start(port=int(nobody.rpartition(":")[2]))
    assert len(begun) == 2 and ended(begun)


@pytest.fixture
def ray(state, monkeypatch):
    """In place of Ray: one node, whose processes answer with what `ray.get` returns."""
    ray = MagicMock()
    ray.job_config.JobConfig, ray.exceptions.RayError, ray.exceptions.RayTaskError = JobConfig, OSError, Told
    ray.is_initialized.return_value = False
    ray.init.side_effect = lambda job_config, **how: job_config._serialize()
    ray.nodes.return_value = [node("1")]
    ray.wait.side_effect = lambda references, **how: (references, [])
    monkeypatch.setattr(control, "library", lambda: ray)
    monkeypatch.setattr(control, "environ", lambda secret: {})
    monkeypatch.setattr(control, "keep_loopback", lambda: None)
    monkeypatch.setattr(control, "_reached", lambda node: 0.001)
    monkeypatch.setattr(control, "LEAVING", 0.1)
    monkeypatch.setattr(control.socket, "create_connection", lambda *_: MagicMock())
    return ray


class JobConfig:
    """The parts of Ray's JobConfig that llamacli uses."""

    def __init__(self):
        self._py_driver_sys_path = []

    def _serialize(self):
        return ""


class Told(OSError):
    """The exception that Ray raises for an error of a node."""

    def __init__(self, cause):
        super().__init__()
        self.cause = cause


def node(number):
    where = {"NodeManagerAddress": "127.0.0.1", "NodeManagerHostname": "here", "NodeManagerPort": 1}
    return {"Alive": True, "NodeID": number} | where


def renamed(ray):
    ray.job_config.JobConfig = type("JobConfig", (), {"_py_driver_sys_path": []})


def without_paths(ray):
    ray.job_config.JobConfig = type("JobConfig", (), {"_serialize": lambda self: ""})


def not_asked(ray):
    ray.init.side_effect = None


@pytest.mark.parametrize("change", [renamed, without_paths, not_asked])
def test_a_ray_that_would_have_nodes_import_from_the_program_s_folders_is_refused(ray, change):
    pytest.importorskip("ray")
    change(ray)
    with pytest.raises(DeviceError, match=r"^ray 2.*: expected a version with .*; install ray 2"):
        control.Cluster("127.0.0.1:1")


def test_a_second_connection_is_refused_and_the_first_one_stays(ray):
    control.Cluster("127.0.0.1:1")
    ray.is_initialized.return_value = True
    ray.init.side_effect = None  # as Ray does where there is a connection
    with pytest.raises(UsageError, match=r"expected no other connection .* close it first"):
        control.Cluster("127.0.0.1:1")
    assert not ray.shutdown.called


STARTED = """
import sys
import ray.scripts.scripts
from llamacli.cluster import launch
from ray._private.utils import get_ray_client_dependency_error
assert get_ray_client_dependency_error() is None
ray.scripts.scripts.main = lambda: print(get_ray_client_dependency_error())
sys.argv = ["ray", "start", "--head"]
launch.main()
"""


def test_ray_client_is_not_started_where_its_package_is_installed(tmp_path):
    pytest.importorskip("ray")
    (tmp_path / "grpc.py").touch()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", STARTED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "grpc" in done.stdout


@pytest.mark.parametrize("names", [None, ["here"]], ids=["looked out for", "opened again"])
@pytest.mark.parametrize(
    "error, asked",
    [
        (Told(DeviceError("install the same version")), 1),
        (Told(TypeError("encode() of another version")), 1),
        (OSError("its memory is full"), 2),
    ],
    ids=["refused", "failed", "died"],
)
def test_a_node_that_refused_to_encode_gets_no_other_process_before_it_has_joined_anew(ray, names, error, asked):
    cluster = control.Cluster("127.0.0.1:1")
    made = ray.remote.return_value.options.return_value.remote
    ray.get.side_effect = error
    for _ in range(2):
        (found,) = cluster.encode(names, ()).values()
        assert isinstance(found, DeviceError)
        cluster.drop("here")
    assert made.call_count == asked
    ray.nodes.return_value, ray.get.side_effect, ray.get.return_value = [node("2")], None, {"pid": 1}
    assert cluster.encode(names, ()) == {"here": {"pid": 1}}
    assert made.call_count == asked + 1


def test_closing_does_not_wait_for_a_call_to_ray_that_hangs(ray):
    waiting, over = threading.Event(), threading.Event()
    ray.get.return_value = {"pid": 1}
    cluster = control.Cluster("127.0.0.1:1")
    assert cluster.describe() == {"here": {"address": "127.0.0.1", "pid": 1}}

    def nodes():
        waiting.set()
        over.wait()
        return []

    ray.nodes.side_effect = nodes
    looks, leaves = (threading.Thread(target=work, daemon=True) for work in (cluster.alive, cluster.close))
    looks.start()
    waiting.wait()
    leaves.start()
    leaves.join(60)
    left = not leaves.is_alive()
    over.set()
    looks.join()
    assert left
    assert ray.kill.call_count == ray.shutdown.call_count == 1
    with pytest.raises(DeviceError, match="it was closed"):
        cluster.alive()
