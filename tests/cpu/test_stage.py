"""Stages: a model cut into stages gives the same bytes; caches are exported and restored; sequences share a batch."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import oracle
import pytest
import tiny

from llamacli.cpu.kernels.runtime.pool import Pool
from llamacli.cpu.stage import cpu_part
from llamacli.device import Run, Tokens
from llamacli.engine import Engine
from llamacli.errors import PromptError, UsageError
from llamacli.files.gguf import open_gguf
from llamacli.llama4.config import Config
from llamacli.prompt import Features, tokens

SHAPES = {"scout": tiny.SCOUT, "maverick": tiny.MAVERICK, "two experts": {"used": 2}, "five layers": {"n_layers": 5}}
CUTS = {"2": (2,), "3": (1, 3), "the ends apart": (0, 4), "every layer": range(6)}


def engine(path, slots=0, **more):
    file = open_gguf(path)
    config = Config.from_gguf(file)
    return Engine(file, config, 2, slots * sum(map(config.is_moe, range(config.n_layers))), **more)


def conversation(model):
    """Logits after a prompt over three chunks, some single tokens, a rewind and another prompt."""
    cache, ids = model.new_cache(64), np.random.RandomState(0).randint(0, 257, 50)
    found = [model.forward(ids[:21], cache, all_logits=True)]
    found += [model.forward([token], cache)[None] for token in ids[21:27]]
    reached = cache.truncate(25)
    found.append(model.forward(ids[reached:45], cache, all_logits=True))
    return np.concatenate(found)


@pytest.mark.parametrize("slots", [0, 1, 3], ids=["mapped", "1 slot", "3 slots"])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_any_number_of_stages_gives_the_same_bytes(shape, cuts, slots, tmp_path):
    path = tiny.tiny_gguf(tmp_path / "tiny.gguf", **shape)
    n_layers = shape.get("n_layers", 4)
    cut = engine(path, slots, cuts=[c for c in cuts if c <= n_layers])
    assert len(cut.stages) == 1 + len([c for c in cuts if c <= n_layers])
    assert np.array_equal(conversation(cut), conversation(engine(path)))


def test_a_rows_logits_do_not_depend_on_how_many_rows_follow_it():
    file = open_gguf(Path(__file__).resolve().parents[2] / "models" / "scout-tiny" / "scout-tiny.gguf")
    head = cpu_part(file, Config.from_gguf(file), range(0), 1, ends=True)
    x = np.random.default_rng(0).standard_normal((400, Config.from_gguf(file).n_embd)).astype(np.float32)
    every = head.logits(x)
    for n in (30, 63, 64, 65, 80, 129, 388):
        assert np.array_equal(head.logits(x[:n]), every[:n])
        assert np.array_equal(head.logits(x, 400 - n), every[400 - n :])
    head.close()


def test_embedding_and_head_can_be_stages_without_layers(tmp_path):
    stages = engine(tiny.tiny_gguf(tmp_path / "tiny.gguf"), cuts=(0, 4)).stages
    assert [list(stage.layers) for stage in stages] == [[], [0, 1, 2, 3], []]


@pytest.mark.parametrize("slots", [0, 3], ids=["mapped", "slots"])
@pytest.mark.parametrize("cuts", [(), (0, 2, 4), (1,)], ids=str)
def test_within_a_batch_progress_is_reported_as_layers_are_done(cuts, slots, tmp_path):
    model, reports = engine(tiny.tiny_gguf(tmp_path / "tiny.gguf", chunk=64), slots, cuts=cuts), []
    model.follow_progress = lambda done, total: reports.append((done, total))
    model.forward(range(40), model.new_cache(64))  # one batch of four layers
    assert {(done, 40) for done in (0, 10, 20, 30, 40)} <= set(reports)
    assert reports == sorted(reports)
    model.follow_progress = None
    model.forward(range(20), model.new_cache(64))
    assert reports[-1] == (40, 40)


def test_tokens_of_several_sequences_share_a_batch(tmp_path):
    """Three sequences at positions of their own, in different chunks, one token each and in runs; each as if it were alone."""
    model = engine(tiny.tiny_gguf(tmp_path / "tiny.gguf", vocab=288))
    stage, ids = model.stages[0], np.random.RandomState(3).randint(0, 257, (3, 24))
    starts, lengths = (2, 9, 15), (1, 4, 1)
    caches = [model.new_cache(32) for _ in starts]
    for row, start, cache in zip(ids, starts, caches, strict=True):
        model.forward(row[:start], cache)
    alone = []
    for row, start, n in zip(ids, starts, lengths, strict=True):
        cache = model.new_cache(32)
        model.forward(row[:start], cache)
        alone.append(model.forward(row[start : start + n], cache, all_logits=True))
    for cache, n in zip(caches, lengths, strict=True):
        cache.reserve(n)
    batch = np.concatenate([row[start : start + n] for row, start, n in zip(ids, starts, lengths, strict=True)])
    x = stage.forward(Tokens(batch, {}), [Run(cache.parts[0], n) for cache, n in zip(caches, lengths, strict=True)])
    together = stage.logits(x)
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-4 * np.abs(together).max())
    for cache, n in zip(caches, lengths, strict=True):
        cache.pos += n
    for row, cache, start, n in zip(ids, caches, starts, lengths, strict=True):  # what they wrote is right, too
        whole = oracle.logits(tmp_path / "tiny.gguf", row[: start + n + 1], kv=np.float16)[-1]
        np.testing.assert_allclose(model.forward(row[start + n : start + n + 1], cache), whole, atol=2e-3 * np.abs(whole).max())


def test_single_tokens_of_few_sequences_give_the_bytes_of_each_alone(tmp_path):
    model = engine(tiny.tiny_gguf(tmp_path / "tiny.gguf"))
    stage, caches, alone = model.stages[0], [], []
    for start in (1, 7, 12):
        for keep in (True, False):
            cache = model.new_cache(32)
            model.forward(list(range(start)), cache)
            if keep:
                caches.append(cache)
                cache.reserve(1)
            else:
                alone.append(model.forward([200], cache))
    x = stage.forward(Tokens(np.array([200] * 3), {}), [Run(cache.parts[0], 1) for cache in caches])
    assert np.array_equal(stage.logits(x), np.array(alone))


# rows in place of embeddings


def test_rows_that_stand_in_for_embeddings_are_used_as_they_are(tmp_path):
    found = tiny.tensors(0)
    path = tiny.tiny_gguf(tmp_path / "tiny.gguf")
    model, ids = engine(path, cuts=(0,)), list(range(40, 60))
    expected = model.forward(ids, model.new_cache(32), all_logits=True)
    given = tokens([ids[:5], Features(7, found["token_embd.weight"][45:52], b"picture"), ids[12:]])
    cache = model.new_cache(32)
    assert np.array_equal(model.forward(given, cache, all_logits=True), expected)
    assert not np.array_equal(model.forward(list(map(int, given)), model.new_cache(32)), expected[-1])


def test_a_row_of_another_width_is_refused(tmp_path):
    model = engine(tiny.tiny_gguf(tmp_path / "tiny.gguf"))
    with pytest.raises(PromptError, match="64 features"):
        model.forward(tokens([Features(7, np.zeros((1, 63), np.float32), b"")]), model.new_cache(8))


# caches


@pytest.mark.parametrize("cuts", [(), (1, 3)], ids=["1", "3"])
@pytest.mark.parametrize("length", [5, 8, 13, 21])
def test_an_exported_cache_goes_on_as_the_original_does(length, cuts, tmp_path):
    model, ids = engine(tiny.tiny_gguf(tmp_path / "tiny.gguf"), cuts=cuts), list(range(30))
    cache, copy = model.new_cache(32), model.new_cache(32)
    model.forward(ids[:length], cache)
    copy.reserve(length)
    for layer in range(4):
        held = cache.held(layer)
        assert held.stop == length
        assert (held.start == 0) == (layer == 3 or length <= 8)  # layer 3 keeps everything, the others a chunk of 8
        copy.restore(layer, held.start, *cache.export(layer, held.start, held.stop))
    copy.pos = length
    assert np.array_equal(model.forward(ids[length:], copy), model.forward(ids[length:], cache))


def test_a_position_that_a_ring_has_lost_is_not_exported(tmp_path):
    model = engine(tiny.tiny_gguf(tmp_path / "tiny.gguf"))
    cache = model.new_cache(32)
    model.forward(list(range(21)), cache)
    with pytest.raises(ValueError, match="holds positions 16 to 20"):
        cache.export(0, 8, 16)
    assert cache.export(3, 8, 16)[0].shape == (2, 8, 16)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_going_back_anywhere_and_on_again_gives_the_same_bytes(shape, tmp_path):
    """Layers that see everything keep their keys and values; of the others, one chunk of 8 is evaluated again, and no more."""
    model, ids = engine(tiny.tiny_gguf(tmp_path / "tiny.gguf", **shape)), np.random.RandomState(0).randint(0, 257, 50)
    cache, expected = model.new_cache(64), model.forward(ids, model.new_cache(64), all_logits=True)
    model.forward(ids, cache)
    for pos in reversed(range(50)):
        reached = cache.truncate(pos)
        assert reached == (pos if pos >= 48 else pos // 8 * 8)
        found = model.forward(ids[reached:], cache, all_logits=True)
        if reached % 8 == 0:
            assert np.array_equal(found, expected[reached:])
        np.testing.assert_allclose(found, expected[reached:], atol=1e-4 * np.abs(expected).max())


# threads, closing


def test_two_threads_on_one_model_get_right_answers(tmp_path):
    model = engine(tiny.tiny_gguf(tmp_path / "tiny.gguf"))
    prompts = [np.random.RandomState(n).randint(0, 257, 20) for n in range(2)]
    expected = [model.forward(ids, model.new_cache(32)) for ids in prompts]

    def ask(ids):
        return [model.forward(ids, model.new_cache(32)) for _ in range(30)]

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(ask, prompts, timeout=300))
    for answers, right in zip(found, expected, strict=True):
        assert all(np.array_equal(answer, right) for answer in answers)


FORKED = """
import os, sys, threading, time
import numpy as np
from llamacli import Model
from llamacli.errors import UsageError

model = Model.load(sys.argv[1], threads=2, experts=sys.argv[2])
expected = model.logits([1, 2, 3])
if sys.argv[3] == "held":  # another thread is in the middle of a call
    inside = threading.Event()
    model.engine.follow_progress = lambda *_: (inside.set(), time.sleep(60))
    threading.Thread(target=model.logits, args=([1, 2, 3],), daemon=True).start()
    inside.wait()
child = os.fork()
if not child:
    model.engine.follow_progress = None
    try:
        same = np.array_equal(model.logits([1, 2, 3]), expected)
        print("right" if same else "wrong", flush=True)
    except UsageError as error:
        print(error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
os._exit(0)
"""


def test_an_answer_that_ends_in_a_thread_which_a_call_waits_for_does_not_wait_for_that_call(tmp_path):
    """Where Python collects garbage, a forgotten answer ends, be it in a thread that reads experts."""
    model, others = engine(tiny.tiny_gguf(tmp_path / "tiny.gguf")), []

    def follow(done, total):
        others.append(threading.Thread(target=model.take_io_stats, daemon=True))
        others[-1].start()
        others[-1].join(20)
        assert not others[-1].is_alive()

    model.follow_progress = follow
    model.forward([1, 2, 3], model.new_cache(16))
    assert others


@pytest.mark.parametrize("held", ["free", "held"])
@pytest.mark.parametrize(("experts", "answer"), [("mapped", "right"), ("slots", "load the model again")])
def test_a_forked_child_gets_the_right_answer_or_an_error(experts, answer, held, tmp_path):
    path = tiny.tiny_gguf(tmp_path / "tiny.gguf")
    command = [sys.executable, "-c", FORKED, path, experts, held]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip().endswith(answer)


def test_parts_of_a_cache_agree_again_after_an_interrupt(tmp_path):
    model = engine(tiny.tiny_gguf(tmp_path / "tiny.gguf"), cuts=(2,))
    cache, ids = model.new_cache(32), list(range(12))
    model.forward(ids[:10], cache)
    cache.parts[1].pos = 9  # the last token has not reached this part
    cache.agree()
    assert [part.pos for part in cache.parts] == [9, 9]
    expected = model.forward(ids, model.new_cache(32))
    np.testing.assert_allclose(model.forward(ids[9:], cache), expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("slots", [0, 2], ids=["mapped", "slots"])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_an_interrupt_from_another_thread_ends_the_call_and_harms_nothing(at, slots, tmp_path, monkeypatch):
    """It comes while the threads are in compiled code: products end without results, and the call raises."""
    model, ids = engine(tiny.tiny_gguf(tmp_path / "tiny.gguf"), slots), list(range(40))
    expected = model.forward(ids, model.new_cache(64), all_logits=True)
    cache, real, runs = model.new_cache(64), Pool.run, []
    model.forward(ids[:10], cache)

    def interrupted(*arguments):
        runs.append(1)
        if len(runs) == at + 1:
            model.interrupt()
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Pool, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.forward(ids[10:], cache)
    assert len(runs) == at + 1
    assert cache.truncate(10) <= 10
    np.testing.assert_allclose(
        model.forward(ids[cache.pos :], cache, all_logits=True)[-1], expected[-1], atol=1e-4 * np.abs(expected).max()
    )


def test_after_an_interrupt_at_any_time_the_next_call_is_right(tmp_path):
    """The interrupts come from another thread while products are computed. The next call gives the same bytes."""
    model, ids = engine(tiny.tiny_gguf(tmp_path / "tiny.gguf", chunk=4096)), [i % 250 for i in range(1500)]
    expected = model.forward(ids, model.new_cache(2048))
    model.follow_progress = lambda done, total: model.interrupt()
    with pytest.raises(KeyboardInterrupt):  # this one always interrupts; those below may come too late on a busy machine
        model.forward(ids, model.new_cache(2048))
    model.follow_progress = None
    for delay in np.linspace(0, 0.05, 12):
        timer = threading.Timer(delay, model.interrupt)
        timer.start()
        with suppress(KeyboardInterrupt):
            model.forward(ids, model.new_cache(2048))
        timer.join()
    assert np.array_equal(model.forward(ids, model.new_cache(2048)), expected)


def test_an_interrupt_while_buffers_are_exchanged_leaves_the_model_usable(tmp_path):
    path, ids = tiny.tiny_gguf(tmp_path / "tiny.gguf", chunk=64), list(range(40))
    expected, model = engine(path).forward(ids[:3], engine(path).new_cache(64)), engine(path)

    def trace(frame, kind, argument):  # Ctrl-C at the first line at which the old buffers are gone
        if frame.f_code.co_name == "_reserve" and frame.f_locals["self"]._buffers is None:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with pytest.raises(KeyboardInterrupt):
            model.forward(ids, model.new_cache(64))
    finally:
        sys.settrace(before)
    assert np.array_equal(model.forward(ids[:3], model.new_cache(64)), expected)  # for which the old buffers sufficed


def test_a_closed_engine_says_so(tmp_path):
    model = engine(tiny.tiny_gguf(tmp_path / "tiny.gguf"), 2)
    cache = model.new_cache(8)
    model.forward([1, 2], cache)
    model.close()
    model.close()
    for call in (lambda: model.forward([3], cache), model.watch, lambda: model.new_cache(8)):
        with pytest.raises(UsageError, match="closed"):
            call()
