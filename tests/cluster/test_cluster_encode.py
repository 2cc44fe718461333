"""A conversion on nodes: every byte equals that of one machine, also when nodes are lost."""

import re
import socket
import sys
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import checkpoint
import numpy as np
import pytest

from llamacli.cluster import encoding, host, progress, tasks
from llamacli.cluster.encoding import EncodingNode
from llamacli.errors import CheckpointError, DeviceError, ModelFileError
from llamacli.files.gguf import open_gguf
from quantize import pieces
from quantize.convert import convert
from quantize.imatrix import Entry, Imatrix, write_imatrix
from quantize.opening import open_source

SECRET = b"of this test"
SIZES = {"hidden_size": 256, "intermediate_size": 256, "intermediate_size_mlp": 256, "num_attention_heads": 8}


class Nodes:
    """Two nodes in this process, opened again whenever they are asked for."""

    def __init__(self, folder):
        self.folder, self.said, self.made = folder, [], {}
        self.gone = set()  # nodes that cannot be opened
        self.network = {}  # what is between here and a node
        self.tasks = tasks.Tasks(self.open, SECRET, self.said.append)

    def open(self, names, skip=(), **how):
        found = {}
        for name in names or sorted({"a", "b"} - {*skip}):
            if name in self.gone:
                found[name] = DeviceError("it is gone")
                continue
            self.made[name] = EncodingNode(open_source(self.folder), SECRET, "127.0.0.1", 1)
            address = self.network.get(name, tuple)(self.made[name].address)
            found[name] = {"address": address, "pid": 0}
        return found

    def close(self):
        self.tasks.close()
        for node in self.made.values():
            node.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "hf"
    checkpoint.write(path, **SIZES)
    return path


@pytest.fixture
def nodes(folder, monkeypatch):
    monkeypatch.setattr(pieces, "CHUNK", 1 << 12)  # so that a tensor has several pieces, and several tasks
    monkeypatch.setattr(tasks, "RESULT", 1 << 13)
    found = Nodes(folder)
    yield found
    found.close()


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The result of one machine: the file, and each tensor's error."""
    out = tmp_path_factory.mktemp("whole") / "out.gguf"
    report = convert(folder, out, "Q4_K_M", threads=1)
    return out.read_bytes(), {t["name"]: t["energy"] for t in report["tensors"]}


def on_nodes(nodes, out, after=None, do=lambda: None, **more):
    """Convert; after `after` tensors were reported, call a function."""
    seen = set()

    def follow(done, total, name):
        if name not in seen and len(seen) == after:
            do()
        seen.add(name)

    return convert(nodes.folder, out, "Q4_K_M", elsewhere=nodes.tasks, threads=1, progress=follow, **more)


def test_the_file_is_that_of_one_machine_and_both_nodes_made_some_of_it(nodes, whole, tmp_path):
    report = on_nodes(nodes, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == whole[0]
    assert set(report["nodes"]) == {"a", "b"} and min(report["nodes"].values()) > 0
    copied = sum(t["nbytes"] for t in report["tensors"] if t["type"] in ("F32", "F16"))
    assert sum(report["nodes"].values()) == sum(t["nbytes"] for t in report["tensors"]) - copied
    assert {t["name"]: t["energy"] for t in report["tensors"]}.keys() == whole[1].keys()
    assert nodes.said == []


def test_the_reported_errors_are_those_of_one_machine(nodes, tmp_path):
    one = convert(nodes.folder, tmp_path / "one.gguf", "Q4_K_M", threads=1)  # in the same pieces
    two = on_nodes(nodes, tmp_path / "two.gguf")
    assert two["tensors"] == one["tensors"]


def test_an_importance_matrix_weighs_on_nodes_too(nodes, tmp_path):
    rng, entries = np.random.default_rng(1), {}
    for name, rows in open_source(nodes.folder).rows.items():
        if len(rows.shape) > 1:
            n = rows.shape[0] if len(rows.shape) == 3 else 1
            sums = rng.exponential(size=(n, rows.shape[-1])).astype(np.float32)
            entries[name] = Entry(sums, np.ones(n, np.float32))
    path = tmp_path / "some.imatrix.gguf"
    write_imatrix(Imatrix(path, entries, ["text"], 1, 512))
    convert(nodes.folder, tmp_path / "one.gguf", "Q4_K_M", imatrix=path)
    on_nodes(nodes, tmp_path / "two.gguf", imatrix=path)
    assert (tmp_path / "two.gguf").read_bytes() == (tmp_path / "one.gguf").read_bytes()


def test_a_gguf_in_parts_and_its_tower_come_from_nodes_as_from_one_machine(nodes, tmp_path):
    convert(nodes.folder, tmp_path / "f16.gguf", "F16")
    nodes.folder = tmp_path / "f16.gguf"
    convert(nodes.folder, tmp_path / "one.gguf", "Q4_K_M", split_max_size=300_000)
    on_nodes(nodes, tmp_path / "two.gguf", split_max_size=300_000)
    ones, twos = (sorted(tmp_path.glob(f"{name}-*.gguf")) for name in ("one", "two"))
    assert len(ones) > 2 and [a.read_bytes() for a in ones] == [b.read_bytes() for b in twos]


@pytest.mark.parametrize("comes_back", [True, False])
def test_what_a_lost_node_held_is_done_by_others(nodes, whole, tmp_path, comes_back):
    def lose():
        nodes.gone = set() if comes_back else {"a"}
        nodes.made["a"].close()

    on_nodes(nodes, tmp_path / "out.gguf", after=5, do=lose)
    assert (tmp_path / "out.gguf").read_bytes() == whole[0]
    assert any(words.startswith("node a: it died") for words in nodes.said)


def test_a_node_that_is_silent_is_lost(nodes, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "PATIENCE", 1.0)
    monkeypatch.setattr(tasks, "PING_EVERY", 0.1)

    def stop():
        nodes.gone = {"a"}
        for link in nodes.made["a"]._links:
            link.send = lambda *_: None  # it reads and sends nothing

    on_nodes(nodes, tmp_path / "out.gguf", after=5, do=stop)
    assert (tmp_path / "out.gguf").read_bytes() == whole[0]
    assert [words for words in nodes.said if words.startswith("node a: no answer")]


def test_a_node_that_answers_pings_and_makes_no_progress_is_lost(nodes, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "STALLED", 0.5)
    monkeypatch.setattr(tasks, "PING_EVERY", 0.05)
    monkeypatch.setattr(encoding, "Progress", lambda: progress.Progress(lambda: (0, {})))
    over = threading.Event()

    def hang():
        nodes.gone = {"a"}
        true = nodes.made["a"]._encode
        nodes.made["a"]._encode = lambda *how: (over.wait(), true(*how))[1]  # as a read does where a disk hangs

    late = threading.Timer(20, over.set)
    late.start()
    on_nodes(nodes, tmp_path / "out.gguf", after=5, do=hang)
    over.set()
    late.cancel()
    assert (tmp_path / "out.gguf").read_bytes() == whole[0]
    assert nodes.said[0].startswith("node a: no progress")


def test_what_computes_or_reads_makes_progress(monkeypatch):
    seen = [(0, {}), (0, {7: 0.1}), (0, {7: 0.1 + progress.BUSY * progress.STALLED}), (1, {7: 0.8}), (1, {})]
    clock, looks = iter(range(10, 100, 10)), iter(seen)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    found = progress.Progress(lambda: next(looks))
    waits = [found.stalled(work) for work in (None, "a batch", "a batch", "a batch", "a batch", "a batch", None)]
    assert waits == [0, 0, 10, 0, 0, 10, 0]


def test_the_seconds_that_threads_compute_are_seen():
    if sys.platform != "linux":
        pytest.skip("only Linux tells of threads")
    begin, over = threading.Event(), threading.Event()

    def compute():
        begin.wait()
        while time.thread_time() < 0.2:
            sum(range(1000))
        over.set()
        begin.clear()
        begin.wait()

    thread = threading.Thread(target=compute)
    thread.start()
    before = progress._look()[1][thread.native_id]
    begin.set()
    over.wait()
    assert progress._look()[1][thread.native_id] - before > 0.15
    begin.set()
    thread.join()


def test_a_node_that_joins_later_is_used_from_then_on(nodes, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "LOOK_EVERY", 0.05)
    nodes.gone = {"b"}

    def join():
        nodes.gone = set()
        until = time.monotonic() + 300
        while "node b encodes, too" not in nodes.said and time.monotonic() < until:
            time.sleep(0.05)

    report = on_nodes(nodes, tmp_path / "out.gguf", after=3, do=join)
    assert (tmp_path / "out.gguf").read_bytes() == whole[0]
    assert nodes.said == ["node b: it is gone; it is left out", "node b encodes, too"]
    assert min(report["nodes"].values()) > 0 and set(report["nodes"]) == {"a", "b"}


def trickling(address, nbytes):
    """The address of a network that is so slow for the first bytes of an answer: 100 pieces, 30 ms each."""
    own = socket.create_server(("127.0.0.1", 0))

    def pass_on(source, target, pieces, size):
        with suppress(OSError):
            while data := source.recv(size if pieces else 1 << 16):
                target.sendall(data)
                if pieces and len(data) == size:
                    pieces -= 1
                    time.sleep(0.03)

    def serve():
        near, far = own.accept()[0], socket.create_connection(address)
        threading.Thread(target=pass_on, args=(near, far, 0, 0), daemon=True).start()
        pass_on(far, near, 100, nbytes // 100)

    threading.Thread(target=serve, daemon=True).start()
    return own.getsockname()


def test_a_node_whose_answer_takes_longer_than_the_patience_is_not_lost_while_bytes_come(nodes, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "PATIENCE", 1.5)
    monkeypatch.setattr(tasks, "PING_EVERY", 0.1)
    monkeypatch.setattr(tasks, "RESULT", 1 << 16)
    nodes.network = {"a": lambda address: trickling(address, 30_000)}
    report = on_nodes(nodes, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == whole[0]
    assert nodes.said == [] and report["nodes"]["a"] > 30_000


def test_where_no_node_is_left_the_conversion_ends_and_one_machine_goes_on_with_it(nodes, whole, tmp_path):
    def lose():
        nodes.gone = {"a", "b"}
        for node in nodes.made.values():
            node.close()

    with pytest.raises(DeviceError, match=r"found none left.*the same command continues there"):
        on_nodes(nodes, tmp_path / "out.gguf", after=9, do=lose)
    report = convert(nodes.folder, tmp_path / "out.gguf", "Q4_K_M")
    assert report["resumed_bytes"] > 0
    assert (tmp_path / "out.gguf").read_bytes() == whole[0]


def test_after_an_interrupt_the_nodes_go_on_where_it_stopped(nodes, whole, tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        on_nodes(nodes, tmp_path / "out.gguf", after=9, do=interrupt)
    assert not (tmp_path / "out.gguf").exists()
    nodes.tasks = tasks.Tasks(nodes.open, SECRET, nodes.said.append)  # of another program
    assert on_nodes(nodes, tmp_path / "out.gguf")["resumed_bytes"] > 0
    assert (tmp_path / "out.gguf").read_bytes() == whole[0]


def test_a_node_that_cannot_encode_what_this_machine_can_gets_no_more(nodes, whole, tmp_path, monkeypatch):
    def hurt():
        def fail(*_):
            raise ModelFileError("its disk fails")

        nodes.made["a"]._encode = fail

    on_nodes(nodes, tmp_path / "out.gguf", after=5, do=hurt)
    assert (tmp_path / "out.gguf").read_bytes() == whole[0]
    assert len(nodes.said) == 1 and re.match("node a is left out: .*its disk fails", nodes.said[0])


def test_an_answer_of_another_size_is_not_written(nodes, whole, tmp_path):
    def lie():
        true = nodes.made["a"]._encode
        nodes.made["a"]._encode = lambda *how: (true(*how)[0][:-1], (0.0, 0.0))

    on_nodes(nodes, tmp_path / "out.gguf", after=5, do=lie)
    assert (tmp_path / "out.gguf").read_bytes() == whole[0]
    assert "node a is left out" in nodes.said[0]


NAN = np.float16(np.nan).view(np.uint16)


@pytest.mark.parametrize(
    "lie",
    [
        lambda encoded, errors: (encoded, (float("nan"), errors[1])),
        lambda encoded, errors: (encoded, (-1.0, errors[1])),
        lambda encoded, errors: (encoded, errors[:1]),
        lambda encoded, errors: (encoded, 1),
        lambda encoded, errors: (encoded, ["much", "more"]),
        lambda encoded, errors: (np.full(encoded.nbytes // 2, NAN).view(np.uint8), errors),
        lambda encoded, errors: (np.zeros_like(encoded), errors),
    ],
    ids=["NaN", "negative", "one error", "no pair", "words", "bytes that decode to NaN", "bytes of other weights"],
)
def test_an_answer_that_cannot_be_is_not_written(nodes, whole, tmp_path, lie):
    def begin():
        true = nodes.made["a"]._encode
        nodes.made["a"]._encode = lambda *how: lie(*true(*how))

    report = on_nodes(nodes, tmp_path / "out.gguf", after=5, do=begin)
    assert (tmp_path / "out.gguf").read_bytes() == whole[0]
    assert len(nodes.said) == 1 and nodes.said[0].startswith("node a is left out")
    assert all(np.isfinite(t["rmse"]) for t in report["tensors"])


def test_a_damaged_source_is_named_as_on_one_machine(nodes, tmp_path):
    nodes.folder = tmp_path / "hf"
    checkpoint.write(nodes.folder, **SIZES)
    shard = next(nodes.folder.glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    at = len(raw) - 256 * 256
    raw[at : at + 64] = b"\xff\x7f" * 32  # NaN in BF16
    shard.write_bytes(raw)
    said = []
    for elsewhere in (None, nodes.tasks):
        with pytest.raises(CheckpointError) as caught:
            convert(nodes.folder, tmp_path / f"{len(said)}.gguf", "Q4_K_M", elsewhere=elsewhere)
        said.append(str(caught.value).replace("1.gguf", "0.gguf"))
    assert "expected finite weights" in said[0] and said[0] == said[1]


def test_other_weights_another_version_and_no_copy_are_refused(folder, tmp_path, monkeypatch):
    from llamacli.cluster.copies import source_digest

    monkeypatch.setenv("LLAMACLI_MODELS", str(tmp_path))
    other = tmp_path / folder.name
    checkpoint.write(other, **SIZES)
    shard = next(other.glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-64:] = bytes(64)
    shard.write_bytes(raw)
    node, right = host.Host(SECRET.decode()), source_digest(open_source(folder))
    asked = {"path": str(folder), "made_by": host.version(), "digest": right, "threads": 1, "host": "127.0.0.1"}
    with pytest.raises(ModelFileError, match="expected the same weights as here, found others"):
        node.encode(**asked)
    with pytest.raises(DeviceError, match="install the same version"):
        node.encode(**asked | {"made_by": "0.0"})
    with pytest.raises(DeviceError, match="expected a copy of nothing"):
        node.encode(**asked | {"path": "/nowhere/nothing"})
    monkeypatch.setenv("LLAMACLI_MODELS", str(tmp_path / "none"))
    assert node.encode(**asked)["address"]  # the one at the same path
    node.close()


def test_a_model_made_on_nodes_is_a_model(nodes, tmp_path):
    on_nodes(nodes, tmp_path / "out.gguf")
    assert open_gguf(tmp_path / "out.gguf").tensors["blk.0.ffn_up_exps.weight"].type.name == "Q4_K"
