"""A model whose layers are on nodes: every logit has the bytes of one process, also when nodes are lost."""

import itertools
import socket
import threading
import time
from collections import Counter
from contextlib import closing, suppress

import numpy as np
import pytest
from row_of_nodes import IDS, SECRET, Nodes

from llamacli import Model
from llamacli.cluster import progress, row, stage
from llamacli.cluster.node import Node
from llamacli.cluster.row import NodeLost
from llamacli.cluster.wire import LinkClosed, connect
from llamacli.errors import DeviceError, UsageError
from llamacli.text.tokenizer import Tokenizer


def test_prompts_steps_guesses_and_several_sequences_have_the_bytes_of_one_process(nodes):
    assert nodes.same(IDS * 3)  # one batch and a short one, which must not grow into it
    assert all(nodes.same([id]) for id in IDS[:20])
    assert nodes.same(IDS[:90], all_logits=True)
    assert nodes.same(IDS[:5], all_logits=True, first=2, alone=True)
    others = nodes.new_caches()
    for parts in ([IDS[:20], IDS[3:10]], [[1], [2]]):
        ours, theirs = zip(nodes.caches, others, strict=True)
        assert np.array_equal(nodes.engine.forward_each(parts, ours), nodes.one.forward_each(parts, theirs))


def test_as_many_sequences_as_keep_their_bytes_on_every_node_have_those_of_each_alone(nodes):
    n = nodes.engine.alike
    assert n == nodes.one.alike
    together, alone = ([engine.new_cache(64) for _ in range(n)] for engine in (nodes.engine, nodes.one))
    for step in range(3):
        ids = [[id] for id in IDS[n * step : n * (step + 1)]]
        found = nodes.engine.forward_each(ids, together)
        assert np.array_equal(found, [nodes.one.forward(some, cache) for some, cache in zip(ids, alone, strict=True)])
    nodes.alike = 1  # of nodes with other processors
    nodes.made[-1].close()
    assert nodes.same([1])
    assert nodes.engine.alike == 1


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


@pytest.mark.parametrize("kv", ["F16", "Q4_0"])
@pytest.mark.parametrize("after", [0, 1, 3, 5], ids="after {} questions".format)
def test_a_loss_while_a_copy_is_made(kv, after):
    with closing(Nodes(kv_type=kv)) as nodes:
        assert nodes.same(IDS[:50])
        copies, stage, asked = nodes.new_caches(), nodes.engine.stages[0], itertools.count()
        true = stage.ask_for

        def ask_for(*how):
            if next(asked) == after:
                nodes.made[-1].close()
            return true(*how)

        stage.ask_for = ask_for
        for cache, copy in zip(nodes.caches, copies, strict=True):
            cache.copy_to(copy)
        assert nodes.same([3], copies) and nodes.same([4])
        assert nodes.losses == {"n2": 1}


def test_segments_in_half_precision_are_on_the_nodes(in_segments):
    nodes = in_segments
    assert nodes.same(IDS[:77]) and all(nodes.same([id]) for id in IDS[:30])
    assert {cache.truncate(97) for cache in nodes.caches} == {97}
    assert nodes.same(IDS[:5], all_logits=True, alone=True)
    copies = nodes.new_caches()
    for cache, copy in zip(nodes.caches, copies, strict=True):
        cache.copy_to(copy)
    assert nodes.same([3], copies) and nodes.same([4])
    assert {cache.truncate(45) for cache in (*nodes.caches, *copies)} == {32}
    assert nodes.same(IDS[:5]) and nodes.same([7])
    nodes.made[-2].close()
    assert nodes.same([8]) and nodes.same(IDS[:50])


def test_a_copy_at_the_start_of_a_chunk_goes_on_with_the_same_bytes():
    """There the chunked layers of the first node hold nothing."""
    with closing(Nodes(kv_type="Q4_0", chunk_size=64)) as nodes:
        assert nodes.same(IDS[:77])
        assert {cache.truncate(64) for cache in nodes.caches} == {64}
        copies = nodes.new_caches()
        for cache, copy in zip(nodes.caches, copies, strict=True):
            cache.copy_to(copy)
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


def test_a_node_that_is_silent_is_lost(nodes, monkeypatch):
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


def slowly(address, rate):
    """The address of a network that takes so many bytes a second on their way to a node."""
    own = socket.create_server(("127.0.0.1", 0))
    own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)

    def pass_on(source, target, pause):
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
                time.sleep(len(data) * pause)

    def serve():
        while True:
            near, far = own.accept()[0], socket.create_connection(address)
            for way in ((near, far, 1 / rate), (far, near, 0)):
                threading.Thread(target=pass_on, args=way, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return own.getsockname()


def test_a_node_that_keys_and_values_go_to_for_longer_than_the_patience_is_not_lost(nodes, monkeypatch):
    monkeypatch.setattr(row, "PATIENCE", 1.0)
    monkeypatch.setattr(row, "PING_EVERY", 0.1)
    monkeypatch.setattr(Node, "_op_restore", lambda self, frame: None)
    places = [place._replace(address=slowly(place.address, 16e6)) for place in nodes.open(Counter())]
    links = row.Row(places, SECRET)
    links.ask(1, "restore", {}, [np.zeros(48 << 20, np.uint8)])  # 3 s
    assert links.lost is None
    links.close()


@pytest.mark.parametrize("gets_on", [False, True])
def test_a_node_that_answers_pings_and_makes_no_progress_is_lost(nodes, monkeypatch, gets_on):
    monkeypatch.setattr(progress, "STALLED", 0.5)
    monkeypatch.setattr(row, "PING_EVERY", 0.05)
    assert nodes.same(IDS[:50])
    reads, stuck, over = itertools.count(), nodes.made[-1], threading.Event()
    stuck._progress = progress.Progress(lambda: (next(reads) if gets_on else 0, {}))
    true = stuck._stage.forward

    def forward(x, runs):
        over.wait(3 if gets_on else 20)  # as a read does where a disk is slow, or hangs
        return true(x, runs)

    stuck._stage.forward = forward
    assert nodes.same([9])
    assert [words.startswith("node n2: no progress") for words in nodes.said[:1]] == ([] if gets_on else [True])
    over.set()


@pytest.mark.parametrize(
    "lie",
    [
        lambda head, arrays: (head, ()),
        lambda head, arrays: (head, [arrays[0][:, :-1]]),
        lambda head, arrays: (head, [arrays[0][:0]]),
        lambda head, arrays: (head, [arrays[0].astype(np.float16)]),
        lambda head, arrays: (head | {"error": 7}, ()),
    ],
    ids=["nothing", "narrow", "no rows", "halves", "an error that is none"],
)
def test_a_node_that_sends_what_is_no_result_is_lost_or_ends_the_call(nodes, lie):
    assert nodes.same(IDS[:20])
    sink = nodes.made[-1]._next
    true = sink.send
    sink.send = lambda head, arrays=(): true(*lie(head, arrays))
    if "error" in lie({}, [np.zeros((1, 1))])[0]:
        with pytest.raises(DeviceError, match="a node failed"):
            nodes.engine.forward([5], nodes.caches[0])
        sink.send = true
        assert nodes.caches[0].pos == 20
    assert nodes.same([5])
    assert all(words.startswith(("node n2: it sent what is no result", "continues")) for words in nodes.said)


@pytest.mark.parametrize("head", [{}, {"id": "x"}, {"id": None}, {"id": [1]}, {"id": 1 << 40}])
def test_frames_that_make_no_sense_end_neither_node_nor_program(nodes, head):
    assert nodes.same(IDS[:20])
    stray = connect(nodes.made[0].address, SECRET, "stream")
    stray.send(head, [np.zeros((1, 4), np.float32)])
    control = nodes.made[-1]._controls[0]
    control.send({"call": [1]})
    control.send({"call": {}, "answer": 1})
    assert nodes.same([5]) and nodes.same(IDS[:9])
    assert nodes.said == []
    stray.close()


def test_a_batch_goes_through_the_nodes_in_equal_parts(nodes):
    assert nodes.same((IDS * 3)[:2048])
    assert nodes.batches == [512] * 8  # four parts, through two nodes


def test_no_batch_is_longer_than_what_a_nodes_memory_is_planned_for(nodes):
    assert nodes.same(IDS[:400])
    nodes.most = 128
    nodes.made[-1].close()
    nodes.batches.clear()
    assert nodes.same(IDS) and nodes.same(IDS[:90], all_logits=True)  # what was evaluated before the loss, too, in less memory
    assert max(nodes.batches) <= 128


def test_experts_of_a_batch_that_a_node_evaluates_in_parts_are_those_of_all_of_it(nodes):
    found = []
    for engine, cache in zip((nodes.engine, nodes.one), nodes.caches, strict=True):
        chosen = []
        engine.follow_routing = lambda pos, ids, chosen=chosen: chosen.append(ids.copy())
        for node in nodes.made:
            node._most = 50
        engine.forward(IDS[:120], cache)
        found.append(np.concatenate(chosen, axis=1))
    assert np.array_equal(*found)


def test_the_node_that_is_lost_is_named_and_not_the_one_that_was_asked(nodes, monkeypatch):
    monkeypatch.setattr(Node, "_op_held", lambda self, frame: time.sleep(3) or 7)
    assert nodes.same(IDS[:50])
    links = nodes.engine.stages[0]._row
    threading.Timer(0.2, nodes.made[0].close).start()
    with pytest.raises(NodeLost) as caught:
        links.ask(1, "held")
    assert caught.value.name == "n1"
    with pytest.raises(NodeLost) as caught:
        links.ask(1, "held")
    assert caught.value.name == "n1"


def test_a_node_that_its_neighbour_does_not_reach_is_lost(nodes, monkeypatch):
    from llamacli.cluster import node

    true, times = node.connect, []

    def connect(*where):
        times.append(where)
        if len(times) == 1:
            raise LinkClosed("no route to host")
        return true(*where)

    assert nodes.same(IDS[:50])
    monkeypatch.setattr(node, "connect", connect)
    nodes.made[-1].close()
    assert nodes.same(IDS[:20])
    assert nodes.losses == {"n2": 1, "n4": 1}
    assert any("node n4: node n3 does not reach it: no route to host" in words for words in nodes.said)


def test_a_loss_is_forgotten_and_a_node_that_is_there_again_gets_layers_when_a_prompt_begins(nodes, monkeypatch):
    monkeypatch.setattr(stage, "LOOK_EVERY", 0.05)
    assert nodes.same(IDS[:50])
    both, nodes.cuts = nodes.cuts, ()
    nodes.made[-1].close()
    assert nodes.same(IDS[:20]) and len(nodes.engine.stages[0].places) == 1
    nodes.cuts, nodes.waiting = both, ["n2"]
    until = time.monotonic() + 300
    while not nodes.engine.stages[0]._returned and time.monotonic() < until:
        time.sleep(0.05)
    assert nodes.same([5]) and len(nodes.engine.stages[0].places) == 1  # not in the middle of an answer
    monkeypatch.setattr(stage, "FORGET", 0.0)
    nodes.waiting = []
    assert nodes.same(IDS[:20]) and len(nodes.engine.stages[0].places) == 2
    assert nodes.losses == {}
    assert any(words.startswith("node n2 is available again") for words in nodes.said)
    assert nodes.same([7])


def test_where_layers_are_divided_anew_a_copy_is_made_again_from_what_its_original_evaluated(nodes):
    assert nodes.same(IDS[:50]) and all(nodes.same([id]) for id in IDS[:9])
    copies = nodes.new_caches()
    for cache, copy in zip(nodes.caches, copies, strict=True):
        cache.copy_to(copy)
        copy.truncate(40)
    nodes.engine.stages[0]._returned = ("n2",)
    nodes.cuts = (1, 2)
    assert nodes.same(IDS[:20], copies) and len(nodes.engine.stages[0].places) == 3
    assert nodes.same([7], copies) and nodes.same(IDS[:20])


def test_snapshots_are_refused_because_what_they_hold_could_not_be_made_again(nodes):
    model = Model(nodes.gguf, nodes.config, Tokenizer.from_gguf(nodes.gguf), nodes.engine, 512, 0)
    with pytest.raises(UsageError, match="--cache: expected a model on this machine alone, found a cluster"):
        model.snapshots()
