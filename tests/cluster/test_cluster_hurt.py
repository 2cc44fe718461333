"""Three nodes, one of which is killed, cut off, stopped, full, another version or has another file while a command answers.

Each time: the text is that of one machine, a line names the node, and the node is used again once it is whole. Slow, and only
for root on Linux (far.py). Run with -s to see what the user sees, and the seconds until an answer goes on.
"""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from far import ROOT_ONLY, Command, Far, send, told
from test_cluster_ray import QUESTION, ROOT, TINY

from llamacli.files.gguf import open_gguf

pytestmark = [pytest.mark.slow, ROOT_ONLY]

LAYERS = ["--threads", "1", "--cluster-layers", "1,1,2"]
MOMENTS = 10


@pytest.fixture(scope="module")
def far(tmp_path_factory):
    cluster = Far(tmp_path_factory.mktemp("hurt"), 3)
    try:
        cluster.open()
        cluster.network.set(delay=0.02)  # an answer takes long enough to be hurt in its middle
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(autouse=True)
def mended(far):
    """After each test all nodes are connected."""
    yield
    for k in list(far.network.down):
        far.network.mend(k)


@pytest.fixture(scope="module")
def alone(far):
    """The answer of one machine alone."""
    return far.llamacli("run", "-m", str(TINY), "--threads", "1", *QUESTION).stdout


def run(far, *more, **env):
    end = time.monotonic() + 60
    there = [k for k in (1, 2, 3) if k not in far.network.down]
    while any(far.processes(k, "ray::Host") for k in there):  # those of the command before end soon
        assert time.monotonic() < end, "processes of a command that has ended"
        time.sleep(0.2)
    return Command(far, "run", "-m", str(TINY), "--cluster", far.address, *(more or LAYERS), *QUESTION, **env)


def holders(far, command, k):
    """The processes of node k that hold layers, once there are some."""
    command.until(lambda: far.processes(k, "ray::Host"))
    return far.processes(k, "ray::Host")


def whole(far, alone):
    """Whether all three nodes answer without a note."""
    command = run(far).end()
    return command.text == alone and command.said == "" and command.process.returncode == 0


def until_whole(far, alone, seconds=60):
    """The seconds until all three nodes are used again."""
    began = time.monotonic()
    while not whole(far, alone):
        assert time.monotonic() < began + seconds, told(run(far).end())
    return time.monotonic() - began


def show(what, command, since):
    print(f"{what}: {command.waited(since):.1f} s; {told(command)}", flush=True)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_each_node_killed_at_ten_moments(far, alone, k):
    for moment in range(MOMENTS):
        command = run(far)
        pids = holders(far, command, k)
        if moment:
            command.has(max(1, len(alone) * moment // MOMENTS))
        since = time.monotonic()
        send(pids, signal.SIGKILL)
        command.end()
        show(f"kill -9 of node {k} at {moment}/{MOMENTS}", command, since)
        assert command.text == alone
        assert command.process.returncode == 0
        assert f"node {far.names[k - 1]}" in command.said and command.said.count("\n") <= 2


def test_a_machine_that_dies_and_joins_again(far, alone):
    command = run(far)
    command.has(len(alone) // 3)
    since = time.monotonic()
    far.signal(3, signal.SIGKILL)
    show("a machine died", command.end(), since)
    assert command.text == alone and f"node {far.names[2]}" in command.said
    assert far.join(3).returncode == 0
    assert whole(far, alone)


def test_a_cable_that_is_cut_and_put_back(far, alone):
    command = run(far)
    command.has(len(alone) // 3)
    since = time.monotonic()
    far.network.cut(3)
    show("cable cut", command.end(), since)
    assert command.text == alone and f"node {far.names[2]}" in command.said
    command = run(far).end()
    print("the next command:", told(command))
    assert command.text == alone and f"node {far.names[2]}" in command.said and "cable" in command.said
    far.network.mend(3)
    print(f"put back: used again after {until_whole(far, alone):.0f} s")


def test_a_cable_that_is_cut_until_ray_forgets_the_node(far, alone):
    far.network.cut(3)
    end = time.monotonic() + 120
    while len(json.loads(far.llamacli("cluster", "status", far.address, "--json").stdout)) == 3:
        assert time.monotonic() < end
        time.sleep(2)
    command = run(far, "--threads", "1").end()
    print("forgotten:", told(command))
    assert command.text == alone
    far.network.mend(3)
    print(f"put back: used again after {until_whole(far, alone, 120):.0f} s")


@pytest.mark.parametrize("what", ["process", "machine"])
def test_a_node_that_stalls_and_goes_on(far, alone, what):
    command = run(far)
    pids = holders(far, command, 2)
    if what == "machine":
        pids = far.processes(2)
    command.has(len(alone) // 3)
    since = time.monotonic()
    send(pids, signal.SIGSTOP)
    try:
        command.end()
    finally:
        send(pids, signal.SIGCONT)
    show(f"{what} stopped", command, since)
    assert command.text == alone and f"node {far.names[1]}" in command.said
    print(f"goes on: used again after {until_whole(far, alone):.0f} s")


def test_a_chat_goes_on_without_a_node_and_with_it_again(far):
    def chat(*more):
        return Command(far, "chat", "-m", str(TINY), "--threads", "1", "--temp", "0", "-n", "30", *more)

    def ask(command, line):
        before = len(command.times)
        command.type(line)
        command.until(lambda: len(command.times) > before and time.monotonic() - command.times[-1] > 1)

    one, several = chat(), chat("--cluster", far.address, "--cluster-layers", "1,1,2")
    for n, line in enumerate(("Tell me of a river.", "And of a king.", "And of the sea.")):
        for command in (one, several):
            ask(command, line)
        if n == 0:
            since = time.monotonic()
            far.signal(3, signal.SIGKILL)
        if n == 1:
            show("a node died between turns", several, since)
            assert far.join(3).returncode == 0
    assert one.end().text == several.end().text
    assert f"node {far.names[2]}" in several.said
    print(told(several))


def test_another_file_and_another_version(far, alone, tmp_path):
    path = far.models(1) / TINY.name
    kept, other = path.read_bytes(), bytearray(path.read_bytes())
    for layer in range(4):
        at = open_gguf(TINY).tensors[f"blk.{layer}.attn_q.weight"].offset
        other[at : at + 64] = bytes(64)
    for what, data in (("another", bytes(other)), ("cut", kept[: len(kept) // 2])):
        path.unlink()
        path.write_bytes(data)
        command = run(far).end()
        path.unlink()
        path.write_bytes(kept)
        print(f"{what} file: {told(command)}")
        assert command.text == alone
        assert f"node {far.names[1]}" in command.said and "copy it again" in command.said and command.said.count("\n") == 1
    far.signal(3, signal.SIGKILL)
    shutil.copytree(ROOT / "llamacli", tmp_path / "llamacli", ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / "llamacli" / "errors.py", "a") as file:
        file.write("# another version\n")
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    )  # before an installed one
    assert far.join(3, PYTHONPATH=str(tmp_path)).returncode == 0
    command = run(far).end()
    print("another version:", told(command))
    assert command.text == alone
    assert f"node {far.names[2]}" in command.said and "install the same version" in command.said
    assert command.said.count("\n") == 1
    far.signal(3, signal.SIGKILL)
    assert far.join(3).returncode == 0


def test_a_full_disk(far, alone, tmp_path):
    far.signal(3, signal.SIGKILL)
    folder = Path(f"/tmp/llamacli-ray-{os.getuid()}")
    full = far.join(3, before=f"mount -t tmpfs -o size=64k tmpfs {folder}")
    print("no room to join:", full.stderr)
    assert full.returncode == 1 and full.stderr.count("\n") == 1
    cache = tmp_path / "cache"
    cache.mkdir()
    mounts = f"mount -t tmpfs -o size=64m tmpfs {folder}; mount -t tmpfs -o size=64k tmpfs {cache}"
    assert far.join(3, before=mounts, LLAMACLI_CACHE=str(cache)).returncode == 0
    inside = Path(f"/proc/{far.processes(3)[0]}/root{folder}/fill")
    command = run(far)
    command.has(len(alone) // 3)
    with open(inside, "wb") as file:
        try:
            while True:
                file.write(bytes(1 << 20))
                file.flush()
        except OSError:
            pass
    show("disk full in an answer", command.end(), 0)
    assert command.text == alone
    command = run(far).end()
    print("the next command:", told(command))
    assert command.text == alone
    inside.unlink(missing_ok=True)
    print(f"room again: used again after {until_whole(far, alone):.0f} s")
