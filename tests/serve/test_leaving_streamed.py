"""A client that leaves during a long prompt of a model whose experts are read from the file: the engine becomes free."""

import time
from dataclasses import replace

import numpy as np
import pytest
from serving import post, raw, serving, until

from llamacli import Model
from llamacli.serve.app import Limits
from quantize.shapes import SCOUT, write

SHAPE = replace(SCOUT, n_experts=32, n_embd=1024, n_heads=8, n_kv_heads=2, n_ff=2048, n_ff_exp=2048, n_vocab=4096)
LAYERS, TOKENS = 4, 5000


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    path = tmp_path_factory.mktemp("streamed") / "streamed.gguf"
    write(SHAPE, LAYERS, path)
    memory = path.stat().st_size * 2 // 3  # a third of the experts
    with Model.load(path, ctx=TOKENS + 100, memory=memory, experts="slots", sessions=2) as model:
        assert model.engine.fetches
        with serving(model, Limits(places=2)) as made:
            yield made


def asking(seed):
    """A request to continue ids whose beginning differs from all other requests."""
    ids = np.random.default_rng(seed).integers(300, SHAPE.n_vocab, TOKENS).tolist()
    return {"prompt": ids, "max_tokens": 2, "stream": bool(seed % 2), "ignore_eos": True}


@pytest.mark.slow
@pytest.mark.parametrize(("beside", "moments"), [(False, 10), (True, 4)], ids=["alone", "beside an answer"])
def test_experts_are_not_read_for_a_client_that_left_during_its_prompt(client, beside, moments):
    """At several places of the prompt: the engine continues for less than a layer of a batch. -s shows the seconds."""
    scheduler, engine = client.server.scheduler, client.server.model.engine
    answering = raw(
        client, post({"prompt": [300], "max_tokens": TOKENS, "ignore_eos": True, "stream": True}, "/v1/completions")
    )
    until(lambda: scheduler.totals.completion_tokens, 60)
    if not beside:
        answering.close()
        until(lambda: scheduler.active == 0)
    batch, worst = len(engine.batch_of(0)), 0.0
    for n in range(moments):
        prompt_tokens, cancelled = scheduler.totals.prompt_tokens, scheduler.totals.cancelled
        made = raw(client, post(asking(n), "/v1/completions"))
        until(lambda: scheduler._prompt, 60)
        job = scheduler._prompt[0]
        until(lambda job=job, n=n: job.evaluated > TOKENS * n // moments, 300)
        left, began = job.evaluated, time.perf_counter()
        made.close()
        until(lambda c=cancelled: scheduler.totals.cancelled == c + 1, 60)
        worst = max(worst, time.perf_counter() - began)
        assert job.evaluated - left < batch / LAYERS + 1
        assert scheduler.active == beside and scheduler.totals.prompt_tokens == prompt_tokens
    if beside:
        said = scheduler.totals.completion_tokens
        until(lambda: scheduler.totals.completion_tokens > said, 60)  # the other request continues
        answering.close()
    until(lambda: scheduler.active == 0, 60)
    print(f"free again after at most {worst:.2f} s")
