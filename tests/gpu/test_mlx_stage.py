"""Layers on MLX beside layers on the CPU: caches that move and grow, several sequences, interrupts, threads."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import tiny
from installed import needed

mx = needed("mlx.core")

from stages import EXACT, MIXED, difference, engine, hand_over, in_pieces, one_pass, tokens  # noqa: E402

from llamacli.device import Run, Tokens  # noqa: E402
from llamacli.engine import Engine  # noqa: E402
from llamacli.errors import ContextFullError, UsageError  # noqa: E402
from llamacli.files.gguf import open_gguf  # noqa: E402
from llamacli.llama4.config import Config  # noqa: E402
from llamacli.mlx import operations  # noqa: E402
from llamacli.mlx.operations import Operations  # noqa: E402


@pytest.mark.parametrize("on_gpu", [1, 2, 3])
@pytest.mark.parametrize("shape", [tiny.SCOUT, tiny.MAVERICK], ids=["scout", "maverick"])
def test_some_layers_on_the_cpu_and_some_on_mlx(tmp_path, shape, on_gpu):
    path, ids = tiny.tiny_gguf(tmp_path / "tiny.gguf", seed=3, **shape), tokens(21)
    model, expected = engine(path, on_gpu), oracle.logits(path, ids)
    assert [len(stage.layers) for stage in model.stages] == [4 - on_gpu, on_gpu]
    for found in (one_pass(model, ids), in_pieces(model, ids, 1)):
        assert difference(found, expected) <= MIXED


@pytest.mark.parametrize(
    ("held", "back_to"), [(12, 12), (12, 9), (12, 8), (12, 7), (12, 0), (16, 15), (16, 8), (17, 16), (17, 15), (30, 3)]
)
def test_truncating_and_continuing_equals_starting_over(tmp_path, held, back_to):
    path = tiny.tiny_gguf(tmp_path / "tiny.gguf")
    model, ids, others = engine(path), tokens(held), tokens(20, seed=1)
    cache = model.new_cache(64)
    model.forward(ids, cache)
    reached = cache.truncate(back_to)
    again = np.concatenate([ids[:back_to], others])
    found = model.forward(again[reached:], cache, all_logits=True)
    assert difference(found, oracle.logits(path, again)[reached:]) <= EXACT


@pytest.mark.parametrize(("first", "second"), [(0, 4), (4, 0), (4, 2)], ids=["cpu to mlx", "mlx to cpu", "mlx to both"])
@pytest.mark.parametrize("length", [5, 8, 13, 21])
def test_a_cache_moves_between_devices(first, second, length, tmp_path):
    path, ids = tiny.tiny_gguf(tmp_path / "tiny.gguf"), tokens(30)
    one, other = engine(path, first), engine(path, second)
    cache, copy = one.new_cache(32), other.new_cache(32)
    one.forward(ids[:length], cache)
    hand_over(cache, copy)
    found = other.forward(ids[length:], copy, all_logits=True)
    assert difference(found, oracle.logits(path, ids)[length:]) <= MIXED


def test_a_position_that_a_ring_has_lost_is_not_exported(tmp_path):
    model = engine(tiny.tiny_gguf(tmp_path / "tiny.gguf"))
    cache = model.new_cache(32)
    model.forward(tokens(21), cache)
    with pytest.raises(ValueError, match="holds positions 16 to 20"):
        cache.export(0, 8, 16)
    keys, values = cache.export(3, 8, 16)
    assert keys.shape == values.shape == (2, 8, 16)
    assert keys.dtype == np.float16


def test_a_full_context_is_an_error_that_leaves_the_cache_sound(tmp_path):
    path, ids = tiny.tiny_gguf(tmp_path / "tiny.gguf"), tokens(20)
    model = engine(path)
    cache = model.new_cache(20)
    model.forward(ids[:18], cache)
    with pytest.raises(ContextFullError, match="21 tokens do not fit the limit of 20"):
        model.forward(ids[:3], cache)
    assert difference(model.forward(ids[18:], cache), oracle.logits(path, ids)[-1]) <= EXACT


def test_a_cache_grows_with_its_conversation(tmp_path):
    model = engine(tiny.tiny_gguf(tmp_path / "tiny.gguf", chunk=8))
    cache = model.new_cache(4096)
    assert cache.nbytes == 0
    sizes = [cache.nbytes for n in (5, 300, 400) if model.forward(tokens(n), cache) is not None]
    assert sizes == sorted(sizes)
    position = 2 * 2 * 16 * 4  # keys and values of two heads of 16 numbers in float32
    assert sizes[-1] == position * (3 * 8 + 1024)  # three layers keep a chunk, one doubles its room


def test_a_token_is_written_where_the_cache_is(tmp_path):
    """MLX copies an array on a write if anything else refers to it; a long context would be copied for every token."""
    model = engine(tiny.tiny_gguf(tmp_path / "tiny.gguf", chunk=64))
    cache = model.new_cache(200)
    model.forward(tokens(20), cache)

    def addresses():
        return [np.array(side, copy=False).ctypes.data for i in range(4) for side in cache.parts[1].arrays(i)]

    before = addresses()
    for ids in ([5], [6], [7, 8, 9]):
        model.forward(ids, cache)
        assert addresses() == before


def test_several_sequences_share_a_batch(tmp_path):
    path, starts, lengths = tiny.tiny_gguf(tmp_path / "tiny.gguf"), (2, 9, 15), (1, 4, 1)
    model, ids = engine(path), np.random.RandomState(3).randint(0, 257, (3, 24))
    caches = [model.new_cache(32) for _ in starts]
    for row, start, cache, n in zip(ids, starts, caches, lengths, strict=True):
        model.forward(row[:start], cache)
        cache.reserve(n)
    embed, stage = model.stages
    batch = np.concatenate([row[start : start + n] for row, start, n in zip(ids, starts, lengths, strict=True)])
    x = embed.forward(Tokens(batch, {}), [Run(cache.parts[0], n) for cache, n in zip(caches, lengths, strict=True)])
    found = stage.logits(stage.forward(x, [Run(cache.parts[1], n) for cache, n in zip(caches, lengths, strict=True)]))
    expected = [oracle.logits(path, row[: s + n])[s:] for row, s, n in zip(ids, starts, lengths, strict=True)]
    assert difference(found, np.concatenate(expected)) <= EXACT


@pytest.mark.parametrize("on_gpu", [4, 2])
@pytest.mark.parametrize("count", [2, 5])
def test_several_conversations_share_a_token(tmp_path, count, on_gpu):
    path = tiny.tiny_gguf(tmp_path / "tiny.gguf", seed=3)
    model, texts = engine(path, on_gpu), [tokens(9 + n, n) for n in range(count)]
    caches = [model.new_cache(32) for _ in texts]
    model.forward_each([ids[:-1] for ids in texts], caches)
    found = model.forward_each([ids[-1:] for ids in texts], caches)
    for row, ids in zip(found, texts, strict=True):
        assert difference(row, oracle.logits(path, ids)[-1]) <= (EXACT if on_gpu == 4 else MIXED)


# running


def test_chosen_experts_are_reported(tmp_path):
    path = tiny.tiny_gguf(tmp_path / "tiny.gguf", **tiny.MAVERICK)
    ids, seen = tokens(9), []
    for model in (engine(path, 0), engine(path), engine(path, 2)):
        log = []
        model.follow_routing = lambda first, chosen, log=log: log.append(chosen.copy())
        one_pass(model, ids)
        in_pieces(model, ids, 1)
        seen.append(log)
    for log in seen[1:]:
        for found, expected in zip(log, seen[0], strict=True):
            np.testing.assert_array_equal(found, expected)


def test_one_token_is_one_evaluation(tmp_path, monkeypatch):
    """No value goes to the host before the logits do: neither a choice of experts nor the stream."""
    model = engine(tiny.tiny_gguf(tmp_path / "tiny.gguf", used=2))
    cache, calls, real = model.new_cache(32), [], mx.eval
    model.forward(tokens(5), cache)
    monkeypatch.setattr(mx, "eval", lambda *arrays: calls.append("eval") or real(*arrays))
    monkeypatch.setattr(operations, "np", SimpleNamespace(**vars(np) | {"array": lambda *_: pytest.fail("read back")}))
    model.forward([7], cache)
    assert calls == ["eval"]


def test_an_interrupt_ends_a_prompt_and_harms_nothing(tmp_path, monkeypatch):
    path, ids = tiny.tiny_gguf(tmp_path / "tiny.gguf"), tokens(40)
    model, real, calls = engine(path), mx.eval, []
    cache = model.new_cache(64)
    model.forward(ids[:10], cache)

    def interrupted(*arrays):
        calls.append(1)
        if len(calls) == 6:
            model.interrupt()
        real(*arrays)

    with monkeypatch.context() as patch:
        patch.setattr(mx, "eval", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.forward(ids[10:], cache)
    assert cache.truncate(10) <= 10
    found = model.forward(ids[cache.pos :], cache)
    assert difference(found, oracle.logits(path, ids)[-1]) <= EXACT


def test_two_threads_on_one_model_get_right_answers(tmp_path):
    path = tiny.tiny_gguf(tmp_path / "tiny.gguf")
    model, prompts = engine(path), [tokens(20, seed) for seed in range(2)]

    def ask(ids):
        assert threading.current_thread() is not threading.main_thread()
        return [in_pieces(model, ids, 5) for _ in range(3)]

    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(ask, prompts, timeout=300))
    for answers, ids in zip(found, prompts, strict=True):
        assert all(difference(answer, oracle.logits(path, ids)) <= EXACT for answer in answers)


@pytest.mark.parametrize("pairs", [1, 40, 100])
def test_attention_over_many_positions_goes_in_parts(tmp_path, monkeypatch, pairs):
    """So that no part keeps a GPU longer than its driver allows."""
    monkeypatch.setattr(operations, "PAIRS", pairs)
    path, ids = tiny.tiny_gguf(tmp_path / "tiny.gguf"), tokens(37)
    model, asked, real = engine(path), [], mx.fast.scaled_dot_product_attention

    def watched(q, k, v, **how):
        asked.append(q.shape[2] * k.shape[2])
        return real(q, k, v, **how)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", watched)
    assert difference(in_pieces(model, ids, 20), oracle.logits(path, ids)) <= EXACT
    assert max(asked) <= max(pairs, 37)


@pytest.mark.parametrize("slots", [0, 4])
def test_a_conversation_may_go_from_thread_to_thread(tmp_path, slots, monkeypatch):
    """As in a server, and though MLX's streams end with their threads; after an interrupt, too."""
    path, ids = tiny.tiny_gguf(tmp_path / "tiny.gguf"), tokens(12)

    def elsewhere(call, *args):
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(call, *args).result(timeout=300)

    def load():
        file = open_gguf(path)
        return Engine(file, Config.from_gguf(file), 2, slots=slots, gpu_layers=4)

    model = elsewhere(load)
    cache = elsewhere(model.new_cache, 32)
    found = [elsewhere(lambda: model.forward(ids[:8], cache).copy())]
    real = Operations.route

    def interrupted(ops, h, w):
        if ops.layer == 2:
            raise KeyboardInterrupt
        return real(ops, h, w)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Operations, "route", interrupted)
        elsewhere(model.forward, ids[8:9], cache)
    found += [elsewhere(lambda token=token: model.forward([token], cache).copy()) for token in ids[8:]]
    assert difference(np.array(found), oracle.logits(path, ids)[7:]) <= EXACT
    sides, copy = elsewhere(cache.export, 0, 8, 12), elsewhere(model.new_cache, 32)
    elsewhere(copy.reserve, 12)
    elsewhere(copy.restore, 0, 8, *sides)
    copy.pos = 12
    for held, side in zip(elsewhere(copy.export, 0, 8, 12), sides, strict=True):
        np.testing.assert_array_equal(held, side)
    elsewhere(model.close)


def test_inputs_are_not_watched_on_a_gpu(tmp_path):
    model = engine(tiny.tiny_gguf(tmp_path / "tiny.gguf"))
    with pytest.raises(UsageError, match="--device cpu"):
        model.watch()


def test_a_closed_engine_says_so(tmp_path):
    model = engine(tiny.tiny_gguf(tmp_path / "tiny.gguf"))
    cache = model.new_cache(8)
    model.forward([1, 2], cache)
    model.close()
    model.close()
    with pytest.raises(UsageError, match="closed"):
        model.forward([3], cache)
