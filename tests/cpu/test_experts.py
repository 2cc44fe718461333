"""Experts in slots: the same bytes come out as from a mapped file, whatever is read when, fails or is broken off."""

import errno
import os
import signal
import sys
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
from interrupts import run_traced
from tiny import MAVERICK, SCOUT, tiny_gguf

from llamacli import Model
from llamacli.cpu import experts
from llamacli.engine import Engine
from llamacli.errors import MemoryLimitError, ModelFileError, UsageError
from llamacli.files import reads
from llamacli.files.gguf import open_gguf
from llamacli.llama4.config import Config
from llamacli.llama4.tensors import Role
from llamacli.llama4.tensors import tensors as specs

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


def largest_shrink(engine):
    """Bytes of all slots that can be given back; they are."""
    return engine.stages[0].shrink(1 << 50)


class Reader(reads.DirectReader):
    """Records the reads of experts in the order in which they begin."""

    def __init__(self, path, begun):
        super().__init__()
        gguf = open_gguf(path)
        experts_of = {s.name: s.layer for s in specs(Config.from_gguf(gguf)) if s.role is Role.EXPERTS}
        self._layers = {gguf.tensors[name].offset: layer for name, layer in experts_of.items()}
        self._begun = begun

    def begin(self, slices, k, memory, at):
        futures, address = super().begin(slices, k, memory, at)
        if (layer := self._layers.get(slices.offset)) is not None:
            self._begun.append(((layer, k), at, futures))
        return futures, address

    def clear(self, memory, size, numbers):
        future = super().clear(memory, size, numbers)
        self._begun.append(("clear", [n * size for n in numbers], [future]))
        return future


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """The function `make(slots, **shape)`: slots over a tiny model, and the list of their reads (what, byte, futures)."""

    def make(n_slots, **shape):
        path, begun = tiny_gguf(tmp_path / "model.gguf", **shape), []
        monkeypatch.setattr(experts, "DirectReader", lambda: Reader(path, begun))
        return engine(path, n_slots).stages[0].slots, begun

    return make


def through(slots, layer, chosen):
    """Fetch experts and use all of them; returns their numbers in the order in which they came."""
    fetch = slots.fetch(layer, chosen)
    return [*fetch.gate_up, *fetch.down()]


@pytest.mark.parametrize("slots", [1, 2, 3, 8])
def test_the_same_bytes_come_out_as_from_a_mapped_file(path, slots):
    assert np.array_equal(conversation(engine(path, slots)), conversation(engine(path, 0)))


def test_only_guesses_that_are_clear_are_read_and_none_changes_a_byte(tmp_path, monkeypatch):
    path = tiny_gguf(tmp_path / "model.gguf", experts=8)
    wanted = conversation(engine(path, 0))

    def guesses(sure):
        monkeypatch.setattr("llamacli.cpu.stage.CONFIDENT", sure)
        here = engine(path, 1)
        assert np.array_equal(conversation(here), wanted)
        return here.take_io_stats().guesses

    assert guesses(-1) > guesses(0.3) > guesses(2) == 0


def test_experts_of_many_pieces_are_put_together_right(path, monkeypatch):
    monkeypatch.setattr(reads, "PIECE", 8192)
    assert np.array_equal(conversation(engine(path, 2)), conversation(engine(path, 0)))


def test_cached_experts_are_not_read_again_and_the_least_used_is_evicted_first(tmp_path):
    slots = engine(tiny_gguf(tmp_path / "model.gguf"), 2).stages[0].slots

    def ask(*chosen):
        fetch = slots.fetch(0, chosen)
        assert list(fetch.gate_up) == list(fetch.down()) == sorted(set(chosen))
        taken = slots.take_io_stats()
        return taken.hits, taken.misses

    assert [ask(0), ask(1), ask(0), ask(2), ask(0), ask(1)] == [(0, 1), (0, 1), (1, 0), (0, 1), (1, 0), (0, 1)]
    assert ask(0, 1, 2, 3) == (2, 2)  # experts beyond the slots go through the ring ...
    assert [ask(0), ask(1)] == [(1, 0), (1, 0)]  # ... and evict nothing
    for _ in range(5):
        ask(0)
    assert [ask(2), ask(3), ask(0)] == [(0, 1), (0, 1), (1, 0)]  # used often, though not last
    for i in range(2 * experts.HALF_LIFE):
        ask(2 + i % 2)
    ask(1)
    assert ask(0) == (0, 1)  # old uses decay


def test_empty_slots_take_the_experts_that_a_prompt_used_most(tmp_path):
    slots = engine(tiny_gguf(tmp_path / "model.gguf"), 2).stages[0].slots
    assert through(slots, 0, [2, 0, 2, 0, 3, 1]) == [0, 2, 1, 3] * 2  # what is not kept comes last
    slots.take_io_stats()
    through(slots, 0, [0, 2])
    assert slots.take_io_stats().hits == 2


def test_a_long_prompt_reads_ahead_into_the_next_layer_and_drops_what_that_does_not_need(recorded):
    slots, begun = recorded(1, experts=8)
    first, second, long = 0, 1, [*range(8)] * experts.MANY

    def read_ahead(layer, chosen):
        begun.clear()
        through(slots, layer, chosen)
        return {what for what, _, _ in begun if what != "clear" and what[0] != layer}

    assert read_ahead(first, long[:-1]) == set()
    ahead = {(second, e) for e in range(1 + experts.RING)}  # into the free slot and the ring
    assert read_ahead(first, long) == ahead
    begun.clear()
    through(slots, second, [0])
    assert begun == []  # it is in the slot
    through(slots, second, [7])
    assert read_ahead(first, long) == {(second, e) for e in range(experts.RING)}  # the whole ring was free again


def test_experts_guessed_rightly_for_a_short_prompt_are_read_once(recorded):
    slots, begun = recorded(2)
    slots.prefetch(0, [3, 1])
    wanted = [(0, 1)] * 3 + [(0, 3)] * 3
    assert sorted(what for what, _, _ in begun) == wanted
    through(slots, 0, [1, 3])
    assert sorted(what for what, _, _ in begun) == wanted


@pytest.mark.parametrize("guesses", [[3, 1], [3]], ids=["nobody waited", "a wrong guess"])
def test_a_failed_read_ahead_raises_no_error(recorded, monkeypatch, guesses):
    slots, begun = recorded(2)
    with monkeypatch.context() as disk:
        fail(disk, 1, OSError(errno.EIO, "Input/output error"))
        slots.prefetch(0, guesses)
        reads.settle(future for _, _, futures in begun for future in futures)
    assert through(slots, 0, [1]) == [1, 1]


def test_what_was_read_ahead_and_then_guessed_too_is_read_once(recorded):
    """The ring is full of the next layer's experts, its slots hold others, and more are used than it has slots."""
    slots, begun = recorded(7, experts=12)
    through(slots, 1, range(5, 12))
    begun.clear()
    through(slots, 0, [*range(12)] * experts.MANY)
    assert {what for what, _, _ in begun if what[0] == 1} == {(1, e) for e in range(experts.RING)}
    slots.prefetch(1, [*range(7)])
    assert sorted(through(slots, 1, [*range(8)])) == sorted([*range(8)] * 2)
    matrices = [what for what, _, _ in begun if what[0] == 1]
    assert all(matrices.count((1, e)) == 3 for e in range(experts.RING))  # gate, up and down


def test_an_embedding_that_had_to_be_converted_stays(tmp_path):
    """Only pages of the file are let go between batches; a copy in another type has nowhere to come back from."""
    kinds = {"token_embd.weight": "IQ3_S"}
    path = tiny_gguf(tmp_path / "model.gguf", types=lambda name: kinds.get(name, "F32"), n_embd=256, heads=8, head_dim=32)
    here, wanted = engine(path, 2), conversation(engine(path, 0))
    assert np.isfinite(wanted).all()
    assert np.array_equal(conversation(here), wanted)


def test_only_free_slots_are_cleared_ahead(recorded):
    """Memory that was given back is not taken again."""
    slots, begun = recorded(3)
    for _ in range(2 * 4):  # two slots of each layer
        assert slots.shrink(1) > 0
    through(slots, 0, [0, 1, 2, 3])
    ((_, cleared, _),) = [one for one in begun if one[0] == "clear"]
    assert len(cleared) == 1
    begun.clear()
    through(slots, 1, [0])
    assert min(at for _, at, _ in begun) == cleared[0]  # gate is at the beginning of the slot


def test_a_second_interrupt_while_the_first_is_handled_leaves_everything_sound(path, monkeypatch):
    here, again, true = engine(path, 2), [KeyboardInterrupt], ThreadPoolExecutor.shutdown

    def shutdown(self, **how):
        if again:
            raise again.pop()
        true(self, **how)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shutdown)
    here.stages[0].slots.reset(next(i for i in range(4) if here.config.is_moe(i)))
    assert not again
    assert np.array_equal(conversation(here), conversation(engine(path, 0)))


def test_slots_are_given_back_when_the_limit_of_memory_is_lowered(path, monkeypatch):
    model, whole = engine(path, 3), conversation(engine(path, 0))
    cache = model.new_cache(64)
    assert np.array_equal(conversation(model, cache), whole)
    short = [1, 0]
    monkeypatch.setattr("llamacli.engine.memory_short", lambda: short.pop(0) if short else 0)
    assert np.array_equal(conversation(model), whole)
    fresh = engine(path, 3)
    assert fresh.stages[0].shrink(1) > 0
    assert largest_shrink(model) == largest_shrink(fresh) > 0  # one slot was given back


def test_a_limit_that_leaves_no_room_is_reported_and_the_conversation_can_go_on(path, monkeypatch):
    model = engine(path, 2)
    cache = model.new_cache(64)
    first = model.forward(IDS[:17], cache).copy()
    short = [1 << 50]
    monkeypatch.setattr("llamacli.engine.memory_short", lambda: short.pop() if short else 0)
    with pytest.raises(MemoryLimitError, match="than a limit now allows"):
        model.forward(IDS[17:23], cache)
    assert cache.pos == 17
    assert largest_shrink(model) == 0  # one slot is left in each layer
    cache.truncate(0)
    assert np.array_equal(model.forward(IDS[:17], cache), first)


def fail(monkeypatch, after, error):
    """os.preadv fails from call number `after` on. A single failure would not do: it may hit a read that is not needed."""
    true, calls = os.preadv, []

    def preadv(*how):
        calls.append(how)
        if len(calls) >= after:
            raise error
        return true(*how)

    monkeypatch.setattr(os, "preadv", preadv)


@pytest.mark.parametrize("after", [1, 2, 3, 5, 8, 13, 21, 34])
@pytest.mark.parametrize("slots", [1, 3])
def test_a_read_error_is_reported_and_the_conversation_can_go_on(tmp_path, monkeypatch, after, slots):
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
    wanted, here, true, calls = conversation(engine(path, 0)), engine(path, slots), Future.result, []

    def result(self, timeout=None):
        calls.append(self)
        if len(calls) == after:
            raise KeyboardInterrupt
        return true(self, timeout)

    monkeypatch.setattr(Future, "result", result)
    with pytest.raises(KeyboardInterrupt):
        conversation(here)
    assert np.array_equal(conversation(here), wanted)


@pytest.fixture(scope="module")
def six_experts(tmp_path_factory):
    """A model, its logits, and how many events a conversation with it has."""
    path = tiny_gguf(tmp_path_factory.mktemp("six") / "model.gguf", experts=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "MANY", 1)
        here = engine(path, 2)
        return path, conversation(engine(path, 0)), run_traced(lambda: conversation(here), experts, skip=["reset"])


@pytest.mark.parametrize("share", np.linspace(0, 0.9, 60).round(3))
def test_an_interrupt_at_any_line_leaves_everything_sound(six_experts, monkeypatch, share):
    path, wanted, events = six_experts
    monkeypatch.setattr(experts, "MANY", 1)  # so that both prompts read ahead
    here = engine(path, 2)
    with pytest.raises(KeyboardInterrupt):
        run_traced(lambda: conversation(here), experts, 1 + int(share * events), skip=["reset"])
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


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a signal that was raised cannot be told from a fault")
def test_a_signal_passed_on_by_another_librarys_handler_leaves_the_guards_in_place(tmp_path):
    """As libclang does after a fault that is not its own: without an address."""
    here = engine(tiny_gguf(tmp_path / "model.gguf"), 0)
    signal.raise_signal(signal.SIGBUS)
    os.truncate(tmp_path / "model.gguf", 8192)
    with pytest.raises(ModelFileError, match="cut"):
        here.forward(IDS[:20], here.new_cache(64))


def test_experts_are_read_from_a_file_system_without_direct_reads(path, monkeypatch):
    wanted, true = conversation(engine(path, 0)), os.open

    def no_direct(name, flags, *more):
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, "Invalid argument")
        return true(name, flags, *more)

    monkeypatch.setattr(os, "open", no_direct)
    assert np.array_equal(conversation(engine(path, 2)), wanted)


def test_an_unknown_value_of_experts_is_refused(tmp_path):
    with pytest.raises(UsageError, match="expected mapped, slots or auto, found some"):
        Model.load("models/scout-tiny/scout-tiny.gguf", experts="some")
