"""A model over nodes that are far from each other: delay and loss change no byte of its logits; what a token and a prompt cost.

Slow, and only for root on Linux (far.py). Run with -s to see the figures.
"""

import pytest
from far import ROOT_ONLY, Far

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
