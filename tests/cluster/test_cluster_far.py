"""A model on distant nodes: delay and packet loss change no byte of its logits; shows the cost of a token and of a prompt.

Slow, and only for root on Linux (far.py). Run with -s to see the figures.
"""

from dataclasses import replace

import pytest
from far import ROOT_ONLY, Far

from quantize.shapes import SHAPES, write

pytestmark = [pytest.mark.slow, ROOT_ONLY]


@pytest.fixture(scope="module", params=[2, 3])
def far(request, tmp_path_factory):
    cluster = Far(tmp_path_factory.mktemp("far"), request.param)
    try:
        cluster.open()
        yield cluster
    finally:
        cluster.close()


LOAD = """
import os, sys, time
import numpy as np
from llamacli import Model
nodes = int(sys.argv[1])
layers = {2: [2, 2], 3: [1, 1, 2]}[nodes]
one = Model.load(os.environ["FILE"], threads=1, ctx=2048)
model = Model.load(
    os.environ["FILE"], threads=1, ctx=2048, cluster=os.environ["ADDRESS"], cluster_layers=layers,
    told=lambda words: print("   ", words),
)
ids = np.random.default_rng(0).integers(0, 200, 900).tolist()
"""

LOGITS = (
    LOAD
    + """
a, b = one.engine.new_cache(2048), model.engine.new_cache(2048)
for part in (ids, *([i] for i in ids[:60])):
    assert np.array_equal(one.engine.forward(part, a), model.engine.forward(part, b))
def timed(engine, part, times):
    cache, took = engine.new_cache(2048), []
    engine.forward(ids[:20], cache)
    for _ in range(times):
        began = time.perf_counter()
        engine.forward(part, cache)
        took.append(1000 * (time.perf_counter() - began))
        if len(part) > 1:
            cache.truncate(20)
    return sorted(took)[times // 2], sum(took) / times
for part, times, what in ((ids[:1], 100, "a token"), (ids[:512], 5, "512 tokens")):
    far, near = timed(model.engine, part, times), timed(one.engine, part, times)
    print(f"{what}: median {far[0]:.2f}, mean {far[1]:.2f} ms; one process {near[0]:.2f}, {near[1]:.2f} ms; "
          f"{(far[0] - near[0]) / (nodes + 1):.2f} ms a hand-over", flush=True)
model.close()
print("same")
"""
)


@pytest.mark.parametrize("loss", [0, 0.01])
@pytest.mark.parametrize("delay", [0, 0.001, 0.01])
def test_logits_have_the_bytes_of_one_process(far, delay, loss):
    far.network.set(delay=delay, jitter=delay / 10, loss=loss, seed=1)
    print(f"\n{len(far.spaces)} nodes, {1000 * delay:g} ms one way, {100 * loss:g} % lost")
    assert far.python(LOGITS, str(len(far.spaces))) == "same"


SEVERAL = (
    LOAD
    + """
from llamacli.engine import Engine
from llamacli.together import Request, answer_together
def answers(model, n, depth=None):
    sampler = lambda: model.sampler(temp=0, ignore_eos=True)
    asked = [Request(model.session(), ids[30 * k : 30 * k + 30], sampler(), 40) for k in range(n)]
    found, began = [[] for _ in asked], 0
    for number, piece in answer_together(asked, n):
        if piece.id is not None:
            began = began or time.perf_counter()
            found[number].append(piece.id)
    return found, (40 * n - 1) / (time.perf_counter() - began)
alone, speed = answers(one, 1)
print(f"one process, one sequence: {speed:.1f} tokens/s", flush=True)
alone += [answers(one, 4)[0][k] for k in (1, 2, 3)]
found, speed = answers(model, 1)
assert found == alone[:1]
print(f"one sequence: {speed:.1f} tokens/s", flush=True)
found, speed = answers(model, 4)
assert found == alone
print(f"four in {model.engine.depth} groups: {speed:.1f} tokens/s", flush=True)
Engine.depth = 1
found, speed = answers(model, 4)
print(f"four in one group: {speed:.1f} tokens/s", flush=True)
model.close()
print("same")
"""
)


@pytest.fixture(scope="session")
def middling(tmp_path_factory):
    """A model whose layers take some milliseconds: 4 layers of 16 experts, 330 MB."""
    path = tmp_path_factory.mktemp("middling") / "middling.gguf"
    shape = replace(SHAPES["scout"], n_embd=2048, n_heads=16, n_kv_heads=4, n_ff=2048, n_ff_exp=1024, n_vocab=1000)
    write(shape, 4, path)
    return path


@pytest.mark.parametrize("delay", [0, 0.005])
def test_several_sequences_keep_all_nodes_busy(far, middling, delay):
    far.network.set(delay=delay)
    print(f"\n{len(far.spaces)} nodes, {1000 * delay:g} ms one way")
    assert far.python(SEVERAL, str(len(far.spaces)), FILE=str(middling)) == "same"


SLOW = """
import os, time
import numpy as np
from llamacli import Model
told = []
one = Model.load(os.environ["FILE"], threads=1, ctx=4096)
model = Model.load(os.environ["FILE"], threads=1, ctx=4096, cluster=os.environ["ADDRESS"], told=told.append,
                   cluster_layers={2: [2, 2], 3: [1, 1, 2]}[int(os.environ["NODES"])])
ids = np.random.default_rng(0).integers(0, 200, 2000).tolist()
began = time.monotonic()
same = np.array_equal(model.engine.forward(ids, model.engine.new_cache(4096), all_logits=True),
                      one.engine.forward(ids, one.engine.new_cache(4096), all_logits=True))
nbytes = 4 * len(ids) * model.config.n_embd
print(f"{len(ids)} tokens, {nbytes / 1e6:.1f} MB a hand-over: {time.monotonic() - began:.1f} s; told: {told}", flush=True)
model.close()
print("same" if same and not told else "another")
"""


def test_a_hand_over_that_takes_longer_than_the_patience_with_a_silent_node_loses_none(far):
    far.network.set(delay=0.005, bandwidth=125_000)  # 1 Mbit/s
    try:
        assert far.python(SLOW, NODES=str(len(far.spaces))) == "same"
    finally:
        far.network.set()
