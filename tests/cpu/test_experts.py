"""Experts in slots: the same bytes come out as from a mapped file, whatever is read when, fails or is broken off."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tiny import MAVERICK, SCOUT, tiny_gguf

from llamacli import Model
from llamacli.cpu import experts
from llamacli.engine import Engine
from llamacli.errors import MemoryLimitError, ModelFileError, UsageError
from llamacli.files import reads
from llamacli.files.gguf import open_gguf
from llamacli.llama4.config import Config

SHAPES = {"scout": SCOUT, "maverick": MAVERICK, "two of eight": {"experts": 8, "used": 2}}
IDS = np.random.RandomState(1).randint(0, 288, 40)


@pytest.fixture(params=SHAPES)
def path(request, tmp_path):
    return tiny_gguf(tmp_path / "model.gguf", **SHAPES[request.param])


def engine(path, slots):
    """`slots`: of each layer."""
    gguf = open_gguf(path)
    config = Config.from_gguf(gguf)
    return Engine(gguf, config, 2, slots * sum(map(config.is_moe, range(config.n_layers))))


def conversation(engine, cache=None):
    """Logits after a prompt, some tokens, another prompt and some tokens."""
    cache = cache or engine.new_cache(64)
    found = []
    for part in (IDS[:17], *IDS[17:23, None], IDS[23:34], *IDS[34:, None]):
        found.append(engine.forward(part, cache).copy())
    return np.array(found)


@pytest.mark.parametrize("slots", [1, 2, 3, 8])
def test_the_same_bytes_come_out_as_from_a_mapped_file(path, slots):
    assert np.array_equal(conversation(engine(path, slots)), conversation(engine(path, 0)))


def test_only_guesses_that_are_clear_are_read_and_none_changes_a_byte(tmp_path, monkeypatch):
    path = tiny_gguf(tmp_path / "model.gguf", experts=8)
    wanted = conversation(engine(path, 0))

    def guesses(sure):
        monkeypatch.setattr("llamacli.cpu.stage.SURE", sure)
        here = engine(path, 1)
        assert np.array_equal(conversation(here), wanted)
        return here.take_traffic().guesses

    assert guesses(-1) > guesses(0.3) > guesses(2) == 0


def test_experts_of_many_pieces_are_put_together_right(path, monkeypatch):
    monkeypatch.setattr(reads, "PIECE", 8192)
    assert np.array_equal(conversation(engine(path, 2)), conversation(engine(path, 0)))


def test_what_a_layer_holds_is_not_read_again_and_the_least_used_goes_first(tmp_path):
    slots = engine(tiny_gguf(tmp_path / "model.gguf"), 2).stages[0].slots

    def ask(*chosen):
        fetch = slots.fetch(0, chosen)
        assert list(fetch.gate_up) == list(fetch.down()) == sorted(set(chosen))
        taken = slots.take_traffic()
        return taken.hits, taken.misses

    assert [ask(0), ask(1), ask(0), ask(2), ask(0), ask(1)] == [(0, 1), (0, 1), (1, 0), (0, 1), (1, 0), (0, 1)]
    assert ask(0, 1, 2, 3) == (2, 2)  # more than fit pass by ...
    assert [ask(0), ask(1)] == [(1, 0), (1, 0)]  # ... and leave what is held
    for _ in range(5):
        ask(0)
    assert [ask(2), ask(3), ask(0)] == [(0, 1), (0, 1), (1, 0)]  # used often, though not last
    for i in range(2 * experts.HALF_LIFE):
        ask(2 + i % 2)
    ask(1)
    assert ask(0) == (0, 1)  # but not for ever


def test_empty_slots_take_what_a_prompt_used_most(tmp_path):
    slots = engine(tiny_gguf(tmp_path / "model.gguf"), 2).stages[0].slots
    fetch = slots.fetch(0, [2, 0, 2, 0, 3, 1])
    assert [*fetch.gate_up, *fetch.down()] == [0, 2, 1, 3] * 2  # what passes by comes after what stays
    assert sorted(slots._layers[0].slots) == [0, 2]


def test_a_long_prompt_reads_ahead_into_the_next_layer_and_leaves_what_it_does_not_need(tmp_path):
    slots = engine(tiny_gguf(tmp_path / "model.gguf", experts=8), 1).stages[0].slots
    n_experts, (first, second) = 8, sorted(slots._layers)[:2]
    long = [*range(n_experts)] * experts.MANY

    def through(layer, chosen):
        fetch = slots.fetch(layer, chosen)
        list(fetch.gate_up)
        list(fetch.down())
        return {(one.layer, one.expert) for one in slots._passing}

    assert through(first, long[:-1]) == set()
    assert through(first, long) == {(second, e) for e in range(1, 1 + experts.RING)}
    assert list(slots._layers[second].slots) == [0]  # a slot that is free is used for it
    assert through(second, [n_experts - 1]) == set()
    assert len(slots._ring) == experts.RING


def test_a_short_prompts_experts_stay_as_guessed(tmp_path):
    slots = engine(tiny_gguf(tmp_path / "model.gguf"), 2).stages[0].slots
    slots.prefetch(0, [3, 1])
    assert sorted(slots._layers[0].slots) == [1, 3]
    assert len(slots._ring) == experts.RING


def test_a_read_that_failed_for_nobody_is_tried_again(tmp_path, monkeypatch):
    slots = engine(tiny_gguf(tmp_path / "model.gguf"), 2).stages[0].slots
    with monkeypatch.context() as disk:
        fail(disk, 1, OSError(errno.EIO, "Input/output error"))
        slots.prefetch(0, [3, 1])
        reads.settle(read for some in slots._layers[0].arriving.values() for read in some)
    fetch = slots.fetch(0, [1])
    assert list(fetch.gate_up) == list(fetch.down()) == [1]


def test_a_guess_that_failed_and_was_wrong_is_nobodys_error(tmp_path, monkeypatch):
    slots = engine(tiny_gguf(tmp_path / "model.gguf"), 2).stages[0].slots
    with monkeypatch.context() as disk:
        fail(disk, 1, OSError(errno.EIO, "Input/output error"))
        slots.prefetch(0, [3])
        reads.settle(read for some in slots._layers[0].arriving.values() for read in some)
    fetch = slots.fetch(0, [1])
    assert list(fetch.gate_up) == list(fetch.down()) == [1]


def test_what_was_read_ahead_and_then_guessed_too_is_read_once(tmp_path):
    """The ring is full of the next layer's experts, its slots hold others, and more are used than it has slots."""
    slots = engine(tiny_gguf(tmp_path / "model.gguf", experts=12), 7).stages[0].slots
    first, second = sorted(slots._layers)[:2]
    for layer, chosen in ((second, range(5, 12)), (first, [*range(12)] * experts.MANY)):
        fetch = slots.fetch(layer, [*chosen])
        for sweep in (fetch.gate_up, fetch.down()):
            list(sweep)
    assert {one.expert for one in slots._passing} == {0, 1, 2, 3}
    slots.prefetch(second, [*range(7)])
    fetch = slots.fetch(second, [*range(8)])
    assert sorted(fetch.gate_up) == sorted(fetch.down()) == [*range(8)]


def test_an_embedding_that_had_to_be_converted_stays(tmp_path):
    """Only pages of the file are let go between batches; a copy in another type has nowhere to come back from."""
    kinds = {"token_embd.weight": "IQ3_S"}
    path = tiny_gguf(tmp_path / "model.gguf", types=lambda name: kinds.get(name, "F32"), n_embd=256, heads=8, head_dim=32)
    here, wanted = engine(path, 2), conversation(engine(path, 0))
    assert np.isfinite(wanted).all()
    assert np.array_equal(conversation(here), wanted)


def test_only_free_slots_are_cleared_ahead(tmp_path, monkeypatch):
    """What was given back is not held again."""
    slots = engine(tiny_gguf(tmp_path / "model.gguf"), 3).stages[0].slots
    first, second = sorted(slots._layers)[:2]
    rooms = {i: here.room for i, here in slots._layers.items()}
    assert slots.shrink(2 * sum(rooms.values())) == 2 * sum(rooms.values())
    cleared, there = [], slots._layers[second]
    monkeypatch.setattr(experts.pages, "clear", lambda at, size: cleared.append((at, size)))
    fetch = slots.fetch(first, [0, 1, 2, 3])
    for sweep in (fetch.gate_up, fetch.down()):
        list(sweep)
    reads.settle(there.clearing)
    assert cleared == [(reads.address(there.memory) + there.numbers[0] * there.room, there.room)]


def test_a_second_interrupt_does_not_spoil_what_the_first_one_mends(path, monkeypatch):
    here, again, true = engine(path, 2), [KeyboardInterrupt], ThreadPoolExecutor.shutdown

    def shutdown(self, **how):
        if again:
            raise again.pop()
        true(self, **how)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shutdown)
    here.stages[0].slots.reset(min(here.stages[0].slots._layers))
    assert not again
    assert np.array_equal(conversation(here), conversation(engine(path, 0)))


def test_slots_are_given_back_when_the_limit_of_memory_is_lowered(path, monkeypatch):
    model, whole = engine(path, 3), conversation(engine(path, 0))
    cache = model.new_cache(64)
    assert np.array_equal(conversation(model, cache), whole)
    short = [1, 0]
    monkeypatch.setattr("llamacli.engine.memory_short", lambda: short.pop(0) if short else 0)
    assert np.array_equal(conversation(model), whole)
    assert sum(3 - len(here.numbers) for here in model.stages[0].slots._layers.values()) == 1


def test_a_limit_that_leaves_no_room_is_said_and_the_conversation_can_go_on(path, monkeypatch):
    model = engine(path, 2)
    cache = model.new_cache(64)
    first = model.forward(IDS[:17], cache).copy()
    short = [1 << 50]
    monkeypatch.setattr("llamacli.engine.memory_short", lambda: short.pop() if short else 0)
    with pytest.raises(MemoryLimitError, match="than a limit now allows"):
        model.forward(IDS[17:23], cache)
    assert cache.pos == 17 and {len(here.numbers) for here in model.stages[0].slots._layers.values()} == {1}
    cache.truncate(0)
    assert np.array_equal(model.forward(IDS[:17], cache), first)


def fail(monkeypatch, after, error):
    """os.preadv goes wrong from so many calls on; a single one might be for what nobody turns out to need."""
    true, calls = os.preadv, []

    def preadv(*how):
        calls.append(how)
        if len(calls) >= after:
            raise error
        return true(*how)

    monkeypatch.setattr(os, "preadv", preadv)


@pytest.mark.parametrize("after", [1, 2, 3, 5, 8, 13, 21, 34])
@pytest.mark.parametrize("slots", [1, 3])
def test_a_read_error_is_said_and_the_conversation_can_go_on(tmp_path, monkeypatch, after, slots):
    path = tiny_gguf(tmp_path / "model.gguf")
    wanted, here = conversation(engine(path, 0)), engine(path, slots)
    with monkeypatch.context() as disk:
        fail(disk, after, OSError(errno.EIO, "Input/output error"))
        with pytest.raises(ModelFileError, match=r"model\.gguf: expected \d+ bytes at byte \d+, found a read error"):
            conversation(here)
    assert np.array_equal(conversation(here), wanted)


@pytest.mark.parametrize("after", [1, 2, 3, 5, 8, 13])
@pytest.mark.parametrize("slots", [1, 3])
def test_an_interrupt_while_waiting_leaves_everything_sound(tmp_path, monkeypatch, after, slots):
    path = tiny_gguf(tmp_path / "model.gguf")
    wanted, here, true, calls = conversation(engine(path, 0)), engine(path, slots), experts.Slots._wait, []

    def wait(self, futures):
        calls.append(futures)
        if len(calls) == after:
            raise KeyboardInterrupt
        true(self, futures)

    monkeypatch.setattr(experts.Slots, "_wait", wait)
    with pytest.raises(KeyboardInterrupt):
        conversation(here)
    assert np.array_equal(conversation(here), wanted)


@pytest.mark.parametrize("method", ["_begin", "_slot", "_forget", "_read", "_pass", "_drop"])
@pytest.mark.parametrize("after", [1, 2, 5, 9, 20])
@pytest.mark.parametrize("before", [True, False])
def test_an_interrupt_amid_the_bookkeeping_leaves_everything_sound(tmp_path, monkeypatch, method, after, before):
    path = tiny_gguf(tmp_path / "model.gguf", experts=6)
    monkeypatch.setattr(experts, "MANY", 1)  # so that both prompts read ahead
    wanted, here, calls = conversation(engine(path, 0)), engine(path, 2), []
    true = getattr(experts.Slots, method)

    def broken(self, *how):
        calls.append(how)
        found = None if before and len(calls) == after else true(self, *how)
        if len(calls) == after:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(experts.Slots, method, broken)
    with pytest.raises(KeyboardInterrupt):
        conversation(here)
    assert np.array_equal(conversation(here), wanted)


@pytest.mark.parametrize("slots", [0, 1])
def test_a_file_that_is_cut_while_in_use_is_an_error_not_the_end_of_the_process(tmp_path, slots):
    here = engine(tiny_gguf(tmp_path / "model.gguf"), slots)
    cache = here.new_cache(64)
    here.forward(IDS[:3], cache)
    os.truncate(tmp_path / "model.gguf", 8192)
    for _ in range(2):
        with pytest.raises(ModelFileError, match=r"model\.gguf: .*cut"):
            here.forward(IDS[3:20], cache)
        assert cache.pos == 3


def test_a_file_system_without_direct_reads_does(path, monkeypatch):
    wanted, true = conversation(engine(path, 0)), os.open

    def no_direct(name, flags, *more):
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, "Invalid argument")
        return true(name, flags, *more)

    monkeypatch.setattr(os, "open", no_direct)
    assert np.array_equal(conversation(engine(path, 2)), wanted)


def test_an_unknown_way_is_refused(tmp_path):
    with pytest.raises(UsageError, match="expected mapped, slots or auto, found some"):
        Model.load("models/scout-tiny/scout-tiny.gguf", experts="some")
