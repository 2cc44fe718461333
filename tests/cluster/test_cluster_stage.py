"""A model whose layers are on nodes: every logit has the bytes of one process, whatever happens to the nodes."""

import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from llamacli.cluster.node import Node
from llamacli.cluster.row import Place
from llamacli.cluster.stage import ClusterStage
from llamacli.cpu.stage import cpu_part
from llamacli.engine import Engine
from llamacli.errors import DeviceError
from llamacli.files.gguf import open_gguf
from llamacli.llama4.config import Config

TINY = Path(__file__).resolve().parents[2] / "models" / "scout-tiny" / "scout-tiny.gguf"
SECRET = b"of this test"
IDS = np.random.default_rng(0).integers(0, 200, 700).tolist()


class Nodes:
    """Two nodes in this process, opened anew whenever they are asked for; and the same model without them."""

    def __init__(self):
        self.gguf = open_gguf(TINY)
        self.config = Config.from_gguf(self.gguf)
        self.made: list[Node] = []
        self.said: list[str] = []
        self.losses = Counter()
        self.fail = False
        stage = ClusterStage(cpu_part(self.gguf, self.config, range(0), 1, ends=True), self.config, self.open, SECRET)
        stage.lost = self.said.append
        self.engine, self.one = Engine(self.gguf, self.config, 1, cluster=stage), Engine(self.gguf, self.config, 1)
        self.caches = self.new_caches()

    def open(self, losses):
        self.losses = Counter(losses)
        if self.fail:
            raise DeviceError("no memory on any node")
        half, places = self.config.n_layers // 2, []
        for layers in (range(half), range(half, self.config.n_layers)):
            stage = cpu_part(self.gguf, self.config, layers, 1)
            self.made.append(Node(stage, SECRET, "127.0.0.1", last=layers.stop == self.config.n_layers))
            places.append(Place(f"n{len(self.made)}", self.made[-1].address, layers))
        return places

    def new_caches(self):
        return self.engine.new_cache(4096), self.one.new_cache(4096)

    def same(self, ids, caches=None, **how) -> bool:
        """Evaluate with and without nodes."""
        ours, theirs = caches or self.caches
        return np.array_equal(self.engine.forward(ids, ours, **how), self.one.forward(ids, theirs, **how))

    def close(self):
        self.engine.close()
        self.one.close()
        for node in self.made:
            node.close()


@pytest.fixture
def nodes():
    found = Nodes()
    yield found
    found.close()


def test_prompts_steps_guesses_and_several_sequences_have_the_bytes_of_one_process(nodes):
    assert nodes.same(IDS * 3)  # one batch and a short one, which must not grow into it
    assert all(nodes.same([id]) for id in IDS[:20])
    assert nodes.same(IDS[:90], all_logits=True)
    assert nodes.same(IDS[:5], all_logits=True, first=2, alone=True)
    others = nodes.new_caches()
    for parts in ([IDS[:20], IDS[3:10]], [[1], [2]]):
        ours, theirs = zip(nodes.caches, others, strict=True)
        assert np.array_equal(nodes.engine.forward_each(parts, ours), nodes.one.forward_each(parts, theirs))


@pytest.mark.parametrize("which", [-2, -1], ids=["first", "last"])
def test_after_a_loss_the_answer_goes_on_with_the_same_bytes(nodes, which):
    assert nodes.same(IDS) and all(nodes.same([id]) for id in IDS[:30]) and nodes.same(IDS[:7], all_logits=True, alone=True)
    name = f"n{len(nodes.made) + which + 1}"
    nodes.made[which].close()
    assert all(nodes.same([id]) for id in IDS[:20])
    assert nodes.losses == {name: 1}
    assert [words for words in nodes.said if words.startswith(f"node {name}: it died")]


def test_a_loss_in_a_prompt(nodes):
    assert nodes.same(IDS[:100])
    threading.Timer(0.05, nodes.made[-1].close).start()
    assert nodes.same(IDS * 3)


def test_after_truncation_and_a_loss(nodes):
    assert nodes.same(IDS) and all(nodes.same([id]) for id in IDS[:30])
    assert {cache.truncate(715) for cache in nodes.caches} == {715}
    assert nodes.same([5])
    assert {cache.truncate(650) for cache in nodes.caches} == {650}
    nodes.made[-1].close()
    assert nodes.same(IDS[:20]) and nodes.same([7])


def test_a_copy_survives_a_loss(nodes):
    assert nodes.same(IDS[:50])
    copies = nodes.new_caches()
    for cache, copy in zip(nodes.caches, copies, strict=True):
        cache.copy_to(copy)
    nodes.made[-2].close()
    assert nodes.same([3], copies) and nodes.same([4])


def test_where_no_node_is_left_the_conversation_waits_for_one(nodes):
    assert nodes.same(IDS[:50])
    nodes.fail = True
    nodes.made[-1].close()
    with pytest.raises(DeviceError, match="no memory on any node"):
        nodes.engine.forward([1], nodes.caches[0])
    assert nodes.caches[0].pos == 50
    nodes.fail = False
    assert nodes.same([1])


def test_an_interrupt_leaves_the_cache_where_whole_batches_ended(nodes):
    assert nodes.same(IDS[:50])
    threading.Timer(0.03, nodes.engine.interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        for _ in range(100):
            nodes.engine.forward(IDS, nodes.caches[0])
            assert nodes.caches[0].truncate(50) == 50
    reached = nodes.caches[0].pos
    assert 50 <= reached < 50 + len(IDS)
    nodes.caches[0].truncate(50)
    assert nodes.same(IDS[:80])


def test_a_node_that_is_silent_is_lost(nodes, monkeypatch):
    from llamacli.cluster import row

    monkeypatch.setattr(row, "PATIENCE", 1.0)
    monkeypatch.setattr(row, "PING_EVERY", 0.1)
    assert nodes.same(IDS[:50])
    monkeypatch.setattr(Node, "_op_held", lambda self, frame: time.sleep(5), raising=True)
    stuck = nodes.made[-1]
    stuck._busy.acquire()  # it takes no batch, and its pings go unanswered
    for link in stuck._controls:
        link.send = lambda *_: None
    assert nodes.same([9])
    assert "no answer" in nodes.said[0]
    stuck._busy.release()


def test_keys_and_values_of_forgotten_sequences_are_released(nodes):
    assert nodes.same(IDS[:50])
    before = nodes.caches[0].nbytes
    nodes.caches = nodes.new_caches()
    assert nodes.same(IDS[:50])
    assert nodes.same(IDS[:1])
    assert nodes.caches[0].nbytes <= before
