"""A cluster of two nodes on this machine, started by `llamacli cluster`: its answers equal those of one process."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from terminal import Terminal

from llamacli.files.gguf import open_gguf
from quantize.convert import convert

pytest.importorskip("ray", reason="expected the package ray, which has no wheel for every Python")

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "models" / "scout-tiny" / "scout-tiny.gguf"
SOURCE = ROOT / "models" / "scout-tiny" / "hf"
QUESTION = [
    "--temp",
    "0",
    "-n",
    "60",
    "--raw",
    "--no-stdin",
    "-p",
    "Once upon a time there was a king who had three rivers and",
]


class Two:
    """The environment of commands, and the address."""

    def __init__(self, folder: Path):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self.folder = folder
        self.env = dict(os.environ) | {
            "XDG_STATE_HOME": str(folder / "state"),
            "XDG_CONFIG_HOME": str(folder / "config"),
            "PYTHONPATH": str(ROOT),
        }
        self.env.pop("LLAMACLI_CLUSTER_SECRET", None)

    def models(self, k: int) -> Path:
        """The models folder of node k, which has a copy of its own."""
        folder = self.folder / f"models{k}"
        if not folder.exists():
            folder.mkdir()
            shutil.copy(TINY, folder)
        return folder

    def llamacli(self, *args: str, folder: Path = ROOT, **more: str) -> subprocess.CompletedProcess:
        """Run a command in a folder; as the installed one, it imports nothing from there."""
        words = [sys.executable, "-P", "-m", "llamacli", *args]
        return subprocess.run(words, env=self.env | more, capture_output=True, text=True, timeout=280, cwd=folder)

    def python(self, code: str, **more: str) -> dict:
        """The output of a program, whose `ADDRESS` and `FILE` are the cluster's address and the model."""
        words = {"ADDRESS": self.address, "FILE": str(TINY)} | more
        done = subprocess.run(
            [sys.executable, "-c", code], env=self.env | words, capture_output=True, text=True, timeout=280, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    cluster = Two(tmp_path_factory.mktemp("cluster"))
    port = cluster.address.split(":")[1]
    typed = another_project(tmp_path_factory.mktemp("project"))
    started = cluster.llamacli("cluster", "start", "--port", port, folder=typed, LLAMACLI_MODELS=str(cluster.models(0)))
    try:
        assert started.returncode == 0, started.stderr
        joined = cluster.llamacli("cluster", "join", cluster.address, folder=typed, LLAMACLI_MODELS=str(cluster.models(1)))
        assert joined.returncode == 0, joined.stderr
        yield cluster
    finally:
        stopped = cluster.llamacli("cluster", "stop").stdout
    assert "stopped 2 nodes" in stopped


def another_project(folder: Path) -> Path:
    """A folder whose modules must not be imported."""
    for name in ("quantize", "ray", "llamacli"):
        (folder / f"{name}.py").write_text("raise RuntimeError('of another project')\n")
    return folder


def test_run_gives_the_text_of_one_process_and_nodes_import_nothing_from_the_folder_in_which_it_is_typed(two, tmp_path):
    one = two.llamacli("run", "-m", str(TINY), *QUESTION)
    words = ("run", "-m", str(TINY), "--cluster", two.address, "--cluster-layers", "2,2")
    both = two.llamacli(*words, *QUESTION, folder=another_project(tmp_path))
    assert both.returncode == 0, both.stderr
    assert both.stdout == one.stdout
    assert both.stderr == ""


def test_lines_of_a_batch_are_answered_side_by_side_with_the_bytes_of_one_process(two, tmp_path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(f'"Tell me about {word}"\n' for word in ("rivers", "kings", "a fox", "bread")))
    asked = ["run", "-m", str(TINY), "--temp", "0", "-n", "20", "--batch", str(questions), "--parallel"]
    one = two.llamacli(*asked, "1")
    both = two.llamacli(*asked[:-1], "--cluster", two.address, "--cluster-layers", "2,2")
    assert both.returncode == 0, both.stderr
    assert both.stdout == one.stdout
    held = two.python(SEVERAL)
    assert held == [8, True]


SEVERAL = """
import json, os
from llamacli import Model
with Model.load(os.environ["FILE"], threads=1, ctx=512, cluster=os.environ["ADDRESS"], more_sessions=7) as model:
    print(json.dumps([model.sessions, model.engine.alike > 1]))
"""


LOGITS = """
import json, os, numpy as np
from llamacli import Model
ids = np.random.default_rng(0).integers(0, 200, 700).tolist()
one = Model.load(os.environ["FILE"], threads=1, ctx=1024)
two = Model.load(os.environ["FILE"], threads=1, ctx=1024, cluster=os.environ["ADDRESS"], cluster_layers=[2, 2])
a, b = one.engine.new_cache(1024), two.engine.new_cache(1024)
parts = (ids, *([i] for i in ids[:20]), ids[:90])
same = [(one.engine.forward(part, a) == two.engine.forward(part, b)).all() for part in parts]
same.append((one.logits(ids[:80]) == two.logits(ids[:80])).all())
print(json.dumps([all(map(bool, same)), [[p.layers.start, p.layers.stop] for p in two.engine.stages[0].places]]))
two.close()
"""


def test_logits_have_the_bytes_of_one_process_and_the_layers_are_on_both_nodes(two):
    assert two.python(LOGITS) == [True, [[0, 2], [2, 4]]]


KILLED = """
import json, os, signal
from llamacli import Model
said = []
ids = None
def answer(model, kill_at=()):
    global ids
    ids = ids or model.tokenizer.encode("Once upon a time there was a king who had three rivers and")
    text, n = [], 0
    for piece in model.session().stream(ids, model.sampler(temp=0), max_tokens=40):
        text.append(piece.text)
        n += 1
        if n in kill_at:
            os.kill(model.engine.stages[0].places[kill_at[n]].pid, signal.SIGKILL)
    return "".join(text)
one = answer(Model.load(os.environ["FILE"], threads=1, ctx=512))
where = {"cluster": os.environ["ADDRESS"], "cluster_layers": [2, 2], "told": said.append}
model = Model.load(os.environ["FILE"], threads=1, ctx=512, **where)
two = answer(model, {7: 0, 23: 1})
print(json.dumps([one == two, len(one), said]))
model.close()
"""


def test_a_node_killed_in_the_middle_of_an_answer_changes_no_letter(two):
    same, length, said = two.python(KILLED)
    assert same and length > 40
    died = [words for words in said if "died" in words]
    assert len(died) == 2 and all(words.startswith("node ") for words in died), said
    assert sum("continues after" in words for words in said) == 2, said


def test_another_file_on_a_node_is_named_and_the_other_node_takes_the_layers(two):
    path = two.models(1) / TINY.name
    whole = path.read_bytes()
    other = bytearray(whole)
    for layer in (1, 3):  # a fine-tuned file has the same sizes and other weights
        at = open_gguf(TINY).tensors[f"blk.{layer}.attn_q.weight"].offset
        other[at : at + 64] = bytes(64)
    path.write_bytes(other)
    try:
        done = two.llamacli("run", "-m", str(TINY), "--cluster", two.address, "--cluster-layers", "2,2", *QUESTION)
    finally:
        path.write_bytes(whole)
    assert done.returncode == 0
    assert done.stdout == two.llamacli("run", "-m", str(TINY), *QUESTION).stdout
    assert "expected the same file as here, found another" in done.stderr and done.stderr.count("\n") == 1


def test_status_shows_both_nodes_with_their_copies(two):
    nodes = json.loads(two.llamacli("cluster", "status", two.address, "-m", str(TINY), "--json").stdout)
    assert len(nodes) == 2
    found = sorted(sorted(node["copies"].items()) for node in nodes.values())
    assert found == sorted([(str(two.models(k) / TINY.name), [0, 4])] for k in (0, 1))
    assert all(node["memory"] > 0 and node["bandwidth"] > 0 and node["version"] for node in nodes.values())


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The result of one machine."""
    out = tmp_path_factory.mktemp("converted") / "one.gguf"
    convert(SOURCE, out, "Q4_K_M")
    return out.read_bytes()


def test_quantize_makes_the_file_of_one_machine_and_says_what_each_node_made(two, converted, tmp_path):
    words = ("--type", "Q4_K_M", "--cluster", two.address, "--json")
    done = two.llamacli("quantize", str(SOURCE), str(tmp_path / "out.gguf"), *words)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.gguf").read_bytes() == converted
    nodes = json.loads(done.stdout)["nodes"]
    assert len(nodes) == 2 and min(nodes.values()) > 0


ENCODED = """
import json, os, signal, time
from llamacli.cluster.control import encoders
from quantize.convert import convert
said, hurt = [], []
with encoders(os.environ["ADDRESS"], 1, said.append) as nodes:
    def follow(done, total, name):
        time.sleep(0.01)
        if done > total // 3 and not hurt:
            worker = next(iter(nodes.workers.values()))
            hurt.append(worker.name)
            os.kill(worker.pid if os.environ["KILL"] == "node" else os.getpid(), signal.SIGKILL)
    convert(os.environ["SOURCE"], os.environ["OUT"], "Q4_K_M", elsewhere=nodes, progress=follow)
print(json.dumps([said, hurt]))
"""


def test_a_node_killed_in_the_middle_of_a_conversion_changes_no_byte(two, converted, tmp_path):
    said, (hurt,) = two.python(ENCODED, KILL="node", SOURCE=str(SOURCE), OUT=str(tmp_path / "out.gguf"))
    assert (tmp_path / "out.gguf").read_bytes() == converted
    assert f"node {hurt}: it died; others do its part" in said


LEFT = """
import json, os, signal, threading, time
from pathlib import Path
from llamacli.cluster import control
from quantize.opening import open_source
from quantize.pieces import PieceEncoder
opening, true = threading.Event(), control._reached
def reached(node):
    opening.set()
    time.sleep(0.5)
    return true(node)
with control.encoders(os.environ["ADDRESS"], 1, lambda words: None) as nodes:
    source = open_source(Path(os.environ["SOURCE"]))
    nodes.begin(Path(os.environ["SOURCE"]), source, PieceEncoder(source.maps))
    control._reached = reached
    for worker in list(nodes.workers.values()):
        os.kill(worker.pid, signal.SIGKILL)
    opening.wait()
ours = ("_read_all", "_write_all", "(_open_again)", "(_ping)", "(_give)", "(_take)", "(_look_out)")
end = time.monotonic() + 60
while (left := [t.name for t in threading.enumerate() if t.name.endswith(ours)]) and time.monotonic() < end:
    time.sleep(0.1)
import ray
print(json.dumps([ray.is_initialized(), left]))
"""


def test_a_program_that_ends_while_nodes_are_opened_leaves_no_processes(two):
    assert two.python(LEFT, SOURCE=str(SOURCE)) == [False, []]
    end = time.monotonic() + 60
    while (held := holders(two)) and time.monotonic() < end:
        time.sleep(0.2)
    assert held == []


def holders(two):
    """Processes that programs have on the nodes of this cluster."""
    rows = [
        line.split(None, 2)
        for line in subprocess.run(["ps", "-ww", "-eo", "pid=,ppid=,args="], capture_output=True, text=True).stdout.splitlines()
    ]
    own = {
        pid for pid, _, words in rows if f":{two.address.split(':')[1]}" in words or f"={two.address.split(':')[1]}" in words
    }
    assert own
    for _ in range(9):  # children of these, and theirs
        own |= {pid for pid, parent, _ in rows if parent in own}
    return [words for pid, _, words in rows if pid in own and words.startswith("ray::Host")]


@pytest.mark.slow
def test_a_conversion_that_was_killed_goes_on_where_it_stopped(two, converted, tmp_path):
    out = tmp_path / "out.gguf"
    words = {"KILL": "program", "SOURCE": str(SOURCE), "OUT": str(out)}
    with pytest.raises(AssertionError):
        two.python(ENCODED, **words)
    assert not out.exists()
    done = two.llamacli("quantize", str(SOURCE), str(out), "--type", "Q4_K_M", "--cluster", two.address, "--json")
    assert json.loads(done.stdout)["resumed_bytes"] > 0, done.stderr
    assert out.read_bytes() == converted


def test_a_node_with_other_weights_encodes_nothing_and_is_named(two, converted, tmp_path):
    folder = two.models(1) / SOURCE.name
    shutil.copytree(SOURCE, folder)
    try:
        with (folder / "model.safetensors").open("r+b") as file:
            file.seek(-64, os.SEEK_END)
            file.write(bytes(64))
        words = ("--type", "Q4_K_M", "--cluster", two.address, "--json")
        done = two.llamacli("quantize", str(SOURCE), str(tmp_path / "out.gguf"), *words)
    finally:
        shutil.rmtree(folder)
    assert (tmp_path / "out.gguf").read_bytes() == converted
    (refused,) = [line for line in done.stderr.splitlines() if "expected the same weights as here, found others" in line]
    (only,) = json.loads(done.stdout)["nodes"]
    assert f"node {only}" not in refused and "it is left out" in refused


@pytest.mark.slow
def test_a_node_that_has_some_layers_only_runs_these(two):
    nodes = json.loads(two.llamacli("cluster", "status", two.address, "-m", str(TINY), "--json").stdout)
    folder = Path(*[*nodes.values()][1]["copies"]).parent  # of the node that gets the last layers
    whole, some = folder / TINY.name, folder / "scout-tiny-layers-2-3.gguf"
    convert(TINY, some, "F32", layers=range(2, 4))
    whole.unlink()
    try:
        both = two.llamacli("run", "-m", str(TINY), "--cluster", two.address, "--cluster-layers", "2,2", *QUESTION)
    finally:
        some.unlink()
        shutil.copy(TINY, whole)
    assert (both.returncode, both.stderr) == (0, "")
    assert both.stdout == two.llamacli("run", "-m", str(TINY), *QUESTION).stdout


@pytest.mark.slow
def test_stop_says_what_it_waits_for_and_kills_what_does_not_end(tmp_path):
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(999)"
    words = [sys.executable, "-c", stubborn, "llamacli.cluster.launch"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, start_new_session=True)
    process.stdout.readline()
    record = tmp_path / "llamacli" / "cluster" / f"{process.pid}.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"pid": process.pid, "address": "127.0.0.1:1", "host": "127.0.0.1", "head": False}))
    terminal = Terminal([sys.executable, "-m", "llamacli", "cluster", "stop"], columns=120, XDG_STATE_HOME=str(tmp_path))
    try:
        terminal.wait("waiting for Ray's processes to end; killed in")
        terminal.wait("stopped 1 node of this machine")
        assert terminal.ends() == 0
        assert process.wait(60) == -signal.SIGKILL
    finally:
        terminal.close()
        process.kill()


@pytest.mark.slow
def test_bench_measures_the_cluster(two):
    words = ("-p", "64", "-n", "8", "-r", "1", "--cluster", two.address, "--cluster-layers", "1,3", "--json")
    done = two.llamacli("bench", "-m", str(TINY), *words)
    assert [record["test"] for record in json.loads(done.stdout)] == ["pp64", "tg8"], done.stderr


def test_another_secret_is_refused_in_one_line(two):
    done = two.llamacli("cluster", "status", two.address, LLAMACLI_CLUSTER_SECRET="another" * 6)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "secret" in done.stderr


def test_everything_listens_on_the_loopback_alone(two):
    done = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True)
    mine = [line.split()[3] for line in done.stdout.splitlines() if "raylet" in line or "gcs_server" in line]
    assert [address for address in mine if "127.0.0.1" not in address] == []
