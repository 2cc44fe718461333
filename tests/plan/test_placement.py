"""What is resident under a memory limit, for Scout and Maverick by their shapes; the engine's own buffers; expected speeds."""

import gc
import re
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from tiny import MAVERICK, SCOUT, tiny_gguf

import llamacli
from llamacli.cpu import buffers, kvcache
from llamacli.cpu.experts import slots_per_layer
from llamacli.engine import Engine
from llamacli.environment import SMALL_MODEL
from llamacli.errors import MemoryLimitError, UnsupportedModelError
from llamacli.files.gguf import open_gguf
from llamacli.llama4.config import Config
from llamacli.plan import machine, placement
from llamacli.plan.placement import (
    batch_within,
    decode_seconds,
    fit_ctx,
    place,
    plan_residency,
    prefill_seconds,
    products_per_token,
    size_by_kind,
    working_bytes,
)
from quantize import shapes

GB = 10**9


def real(name):
    """Config and sizes of the published model, routed experts in Q4_K, the rest in Q6_K."""
    config = shapes.SHAPES[name]
    return config, size_by_kind(shapes.sizes(config), config)


@pytest.fixture(scope="module")
def scout():
    return real("scout")


@pytest.fixture(scope="module")
def maverick():
    return real("maverick")


def test_scouts_bytes_by_kind(scout):
    _, sizes = scout
    assert sizes.routed == 48 * 16 * 3 * 5120 * 8192 * 144 // 256
    assert sizes.experts == (3 * 5120 * 8192 * 144 // 256,) * 48
    assert sizes.kinds["shared experts"] == 48 * 3 * 5120 * 8192 * 210 // 256
    assert sizes.looked_up == sizes.kinds["output"] == 202048 * 5120 * 210 // 256
    assert sum(sizes.kinds.values()) == sizes.always + sizes.looked_up + sizes.routed == pytest.approx(63.5 * GB, rel=1e-3)


def test_half_of_mavericks_layers_have_experts(maverick):
    _, sizes = maverick
    assert len(sizes.experts) == 24
    assert sizes.kinds["dense layers"] == 24 * 3 * 5120 * 16384 * 210 // 256
    assert sizes.one_per_layer == pytest.approx(1.7 * GB, rel=1e-2)


def test_an_embedding_that_is_also_the_output_is_always_used(scout):
    config = replace(scout[0], n_layers=1, n_experts=4)
    sizes = size_by_kind([("token_embd.weight", 100), ("blk.0.ffn_up_exps.weight", 40)], config)
    assert (sizes.looked_up, sizes.always, sizes.experts) == (0, 100, (10,))


def test_everything_is_mapped_exactly_where_it_fits(scout):
    config, sizes = scout
    p = place(config, sizes, 128 * GB, 8192)
    assert (p.mode, p.slots, p.miss, p.read_per_token) == ("mapped", 16, 0, 0)
    assert place(config, sizes, p.resident, 8192).mode == "mapped"
    assert place(config, sizes, p.resident - 1, 8192).mode == "slots"


@pytest.mark.parametrize("memory", [16, 24, 32, 48, 64])
def test_slots_fill_the_memory_and_stay_within_it(scout, memory):
    config, sizes = scout
    p = place(config, sizes, memory * GB, 8192)
    assert p.mode == "slots"
    assert 1 <= p.slots <= 16
    assert p.resident <= memory * GB
    assert p.slots == 16 or p.resident + max(sizes.experts) > memory * GB
    assert p.resident == p.weights + p.experts + p.kv + p.working + p.buffers + p.rows
    assert p.experts == pytest.approx(p.slots * sizes.one_per_layer, rel=1e-2)
    assert p.miss == 1 - p.slots / 16
    assert p.read_per_token == pytest.approx(p.miss * 3.3974e9, rel=1e-3)


def test_memory_left_over_gives_some_layers_one_slot_more(scout):
    config, sizes = scout
    p = place(config, sizes, 32 * GB, 8192)
    more = place(config, sizes, 32 * GB + sizes.one_per_layer // 2, 8192)
    assert 20 <= more.n_slots - p.n_slots <= 28
    assert slots_per_layer(more.n_slots, 48).count(int(more.slots) + 1) == more.n_slots % 48


def test_layers_of_unequal_size_hold_what_was_planned_in_whatever_order_the_file_has_them(scout):
    """Slots gives the first layers one more; experts of layers that the model does not have change nothing."""
    config = replace(scout[0], n_layers=4, n_embd=256, n_vocab=1000, n_experts=8)
    nbytes = {2: GB, 3: GB, 0: 2 * GB, 1: 2 * GB, 77: 8}
    tensors = [("output.weight", 10**6), *((f"blk.{i}.ffn_up_exps.weight", 8 * n) for i, n in nbytes.items())]
    sizes = size_by_kind(tensors, config)
    assert sizes.experts == (2 * GB, 2 * GB, GB, GB)
    for memory in range(15, 60):
        p = place(config, sizes, memory * GB, 1024)
        if p.mode == "slots":
            held = sum(n * each for n, each in zip(slots_per_layer(p.n_slots, 4), sizes.experts, strict=True))
            assert held == p.experts
            assert p.resident <= memory * GB


def test_more_context_takes_slots_away_first(scout):
    config, sizes = scout
    slots = [place(config, sizes, 32 * GB, ctx).slots for ctx in (8192, 65536, 262144)]
    assert slots == sorted(slots, reverse=True)
    assert len(set(slots)) == 3


def test_keys_and_values_of_chunked_layers_stop_at_a_chunk(scout):
    config, sizes = scout
    per_layer = 2 * 8 * 128 * 2
    assert place(config, sizes, 128 * GB, 1 << 20).kv == per_layer * (36 * 8192 + 12 * (1 << 20))


def test_tokens_make_their_rows_of_the_embedding_and_the_pages_around_them_resident(scout):
    config, sizes = scout
    p = place(config, sizes, 32 * GB, 1 << 18)
    assert p.rows == p.batch * (5120 * 210 // 256 + 65536)
    assert place(config, sizes, 128 * GB, 8192).rows == 0  # it is resident with all else


def test_what_does_not_fit_is_refused_with_the_memory_needed_and_a_context_that_fits(scout):
    config, sizes = scout
    with pytest.raises(MemoryLimitError) as refusal:
        place(config, sizes, 24 * GB, 1 << 20, name="scout.gguf")
    words = str(refusal.value)
    assert words.startswith("scout.gguf: expected at least ")
    assert "found 24.00 GB" in words
    ctx = int(words.partition("--ctx ")[2].split()[0])
    assert 1 <= place(config, sizes, 24 * GB, ctx).slots < 1.1
    with pytest.raises(MemoryLimitError):
        place(config, sizes, 24 * GB, ctx + placement.CTX_STEP)
    memory = round(float(words.partition("--memory ")[2].removesuffix("G")) * GB)
    assert place(config, sizes, memory, 1 << 20).slots >= 1


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("kv_files", [0, 1])
@pytest.mark.parametrize("slots", [False, True])
def test_what_fits_less_memory_fits_more_memory(threads, kv_files, slots):
    gguf = open_gguf(SMALL_MODEL)
    config = Config.from_gguf(gguf)
    sizes = size_by_kind([(tensor.name, tensor.nbytes) for tensor in gguf.tensors.values()], config)
    how = {"threads": threads, "slots": slots, "kv_files": kv_files}
    with pytest.raises(MemoryLimitError) as caught:
        place(config, sizes, 10**6, 32768, **how)
    advised = round(float(re.search(r"expected at least ([\d.]+) GB", str(caught.value))[1]) * GB)
    for memory in range(advised, 3 * advised, 10**6):
        place(config, sizes, memory, 32768, **how)


def test_no_context_is_suggested_where_none_would_help(scout):
    config, sizes = scout
    assert fit_ctx(config, sizes, 4 * GB, 8192) == 0
    with pytest.raises(MemoryLimitError, match=r"use --memory \d+\.\dG$"):
        place(config, sizes, 4 * GB, 8192)


def test_a_context_is_trimmed_only_where_it_must_be(scout):
    config, sizes = scout
    assert fit_ctx(config, sizes, 24 * GB, 5000) == 5000
    trimmed = fit_ctx(config, sizes, 24 * GB, 1 << 20)
    assert 0 < trimmed < 1 << 20
    assert trimmed % 1024 == 0


@pytest.mark.parametrize("n_experts", [1, 16])
@pytest.mark.parametrize("memory", [1.0, 1.3, 2.0, 3.0])
def test_the_context_that_fits_is_the_largest_that_is_accepted(scout, n_experts, memory):
    """With 1 expert, one slot and the ring would be more than all there are."""
    config = replace(scout[0], n_layers=4, n_embd=256, n_vocab=1000, n_experts=n_experts)
    experts = [(f"blk.{i}.ffn_up_exps.weight", n_experts * 10_000_000) for i in range(4)]
    sizes = size_by_kind([("token_embd.weight", 10**7), ("output.weight", 10**7), *experts], config)
    fits = fit_ctx(config, sizes, int(memory * GB), 1 << 20)
    assert fits > 0
    assert place(config, sizes, int(memory * GB), fits).resident <= memory * GB
    if fits < 1 << 20:
        with pytest.raises(MemoryLimitError):
            place(config, sizes, int(memory * GB), fits + placement.CTX_STEP)


def test_keys_and_values_in_files_leave_room_for_any_context(scout):
    """Scout in half precision: 12 layers see everything, with blocks of 1024 positions of 4 MiB; 36 keep a chunk."""
    config, sizes = scout
    block, rings = 12 * (4 << 20), 36 * 8192 * 4096
    for ctx in (1 << 20, 10 << 20):
        assert fit_ctx(config, sizes, 24 * GB, ctx, kv_files=1) == ctx
        p = place(config, sizes, 24 * GB, ctx, kv_files=1)
        held = p.window // 1024
        assert p.resident <= 24 * GB
        assert p.kv == rings + held * block + 8 * (4 << 20)
        assert p.kv_disk == (ctx // 1024 - held) * block == p.kv_read_per_token(ctx - 1)
        assert p.kv_read_per_token(p.window - 1) == 0
        assert p.kv_read_per_token(p.window) == block
        assert p.slots > 1
        reading = p.kv_read_per_token(ctx) / (3 * GB)
        assert decode_seconds(p, 3 * GB, 1000 * GB, ctx) == pytest.approx(reading + decode_seconds(p, 3 * GB, 1000 * GB), 0.01)
    assert place(config, sizes, 24 * GB, 1 << 20, kv_files=4).window < p.window


def test_a_file_is_not_used_where_memory_holds_the_context(scout):
    p = place(*scout, 128 * GB, 32768, kv_files=1)
    assert (p.mode, p.window, p.kv_disk, p.kv_read_per_token(32767)) == ("mapped", 32768, 0, 0)


def test_a_model_that_uses_two_experts_needs_two_slots(scout):
    config, sizes = scout
    two = replace(config, n_experts_used=2)
    least = place(config, sizes, 16 * GB, 8192)
    memory = least.resident - least.experts + sizes.one_per_layer
    assert place(config, sizes, memory, 8192).slots == 1
    with pytest.raises(MemoryLimitError):
        place(two, sizes, memory, 8192)


def test_slots_can_be_asked_for_where_all_experts_would_fit(scout):
    p = place(*scout, 128 * GB, 8192, slots=True)
    assert (p.mode, p.slots, p.miss) == ("slots", 16, 0)


def test_little_memory_means_small_batches_which_read_the_experts_more_often(scout):
    config, sizes = scout
    batches = [batch_within(config, memory, 1) for memory in (1 * GB, 4 * GB, 8 * GB, 64 * GB)]
    assert batches == sorted(batches)
    assert (batches[0], batches[-1]) == (64, 2048)
    assert working_bytes(config, 1, batches[2]) <= GB / 2
    assert place(config, sizes, 16 * GB, 8192).batch == batch_within(config, 16 * GB, 1)


def test_long_contexts_mean_large_batches_where_experts_are_read(scout):
    config, sizes = scout
    short, long = place(config, sizes, 48 * GB, 8192), place(config, sizes, 48 * GB, 65536)
    assert (short.batch, long.batch) == (2048, 8192)
    assert long.working - short.working == working_bytes(config, 1, 8192) - working_bytes(config, 1, 2048)
    assert working_bytes(config, 1, long.batch) <= 3 * GB
    assert place(config, sizes, 500 * GB, 65536).batch == 2048  # mapped: nothing is read again
    tight = place(config, sizes, 17 * GB, 16384)
    assert tight.batch == batch_within(config, 17 * GB, 1, 8192) < 8192
    assert tight.resident <= 17 * GB


@pytest.mark.parametrize(
    "experts, memory, slots", [("mapped", 1, 0), ("auto", 40 * GB, 0), ("slots", 40 * GB, 4 * 4), ("auto", 1, None)]
)
def test_at_load_the_engine_is_told_slots_and_batch(tmp_path, experts, memory, slots):
    gguf = open_gguf(tiny_gguf(tmp_path / "tiny.gguf"))
    config = Config.from_gguf(gguf)
    if slots is None:
        with pytest.raises(MemoryLimitError, match=r"tiny\.gguf"):
            plan_residency(gguf, config, 64, 1, memory, experts)
    else:
        assert plan_residency(gguf, config, 64, 1, memory, experts)[:2] == (slots, 2048)


def test_types_that_become_half_precision_are_planned_in_half_precision_at_load(tmp_path, monkeypatch, no_other_model):
    """A file of 3.4 bits a weight that fits as it lies there does not as float16: it is refused before it fills the memory."""
    wide = {"n_embd": 256, "n_ff_exp": 256, "heads": 8, "head_dim": 32, "experts": 16}
    path = tiny_gguf(tmp_path / "tiny.gguf", types=lambda name: "IQ3_S" if "_exps" in name else "F32", **wide)
    gguf = open_gguf(path)
    config = Config.from_gguf(gguf)
    halves = 2 * 4 * 16 * 3 * 256 * 256
    assert plan_residency(gguf, config, 64, 1, 40 * GB, "auto").nbytes > halves + placement.PROGRAM
    less = gguf.nbytes + placement.PROGRAM + 288 * placement.TOKEN + kvcache.nbytes(config, 64)
    less += working_bytes(config, 1, batch_within(config, less + halves, 1))
    assert not plan_residency(gguf, config, 64, 1, less + halves, "auto").slots
    with pytest.raises(UnsupportedModelError, match="IQ3_S"):
        llamacli.Model.load(path, threads=1, ctx=64, memory=less)
    with pytest.raises(MemoryLimitError, match=r"\(IQ3_S\), which become F16"):
        llamacli.Model.load(path, threads=1, ctx=64, memory=halves - 1, experts="mapped")
    monkeypatch.setattr(machine, "budget", lambda: halves - 1)
    monkeypatch.setattr(machine, "private", lambda: 0)
    with pytest.raises(MemoryLimitError, match=r"\(IQ3_S\), which become F16"):
        llamacli.Model.load(path, threads=1, ctx=64, experts="mapped")


def test_a_mapped_model_of_which_nothing_is_converted_loads_beside_others_that_hold_the_memory(tmp_path):
    """A mapped model is not held to the memory: the system reads its pages again."""
    path = tiny_gguf(tmp_path / "tiny.gguf")
    how = {"threads": 1, "ctx": 64, "experts": "mapped"}
    with llamacli.Model.load(path, **how), llamacli.Model.load(path, **how, memory=1 << 20, sessions=4) as model:
        assert model.sessions == 4


def test_an_embedding_that_becomes_half_precision_is_held_whole_beside_slots(tmp_path, monkeypatch):
    """One that stays in the file costs the pages of the rows that a batch touches."""
    monkeypatch.setattr(placement, "AROUND", 0)
    held = {}
    for kind in ("F16", "IQ3_S"):
        path = tiny_gguf(
            tmp_path / kind, types=lambda name, kind=kind: kind if "embd" in name else "F32", n_embd=256, vocab=8192
        )
        gguf = open_gguf(path)
        held[kind] = plan_residency(gguf, Config.from_gguf(gguf), 64, 1, 200_000_000, "slots")
    assert held["F16"].batch == held["IQ3_S"].batch <= 2048
    assert held["IQ3_S"].nbytes - held["F16"].nbytes == 2 * 256 * (8192 - held["F16"].batch)


class Owner:
    """Something that a reservation lives with."""


@pytest.mark.parametrize("memory", [None, 40 * GB])
def test_a_second_model_counts_what_the_first_may_come_to_hold(tmp_path, monkeypatch, memory, no_other_model):
    """Whether the first holds it already or not; with a limit of the user's, too."""
    gguf, free, held = open_gguf(tiny_gguf(tmp_path / "tiny.gguf")), 40 * GB, [0]
    config = Config.from_gguf(gguf)
    monkeypatch.setattr(machine, "budget", lambda: free - held[0])
    monkeypatch.setattr(machine, "private", lambda: held[0])
    nbytes = plan_residency(gguf, config, 64, 1, memory, "slots").nbytes
    assert nbytes > sum(t.nbytes for t in gguf.tensors.values())
    first = Owner()
    release = machine.reserve(first, free - nbytes // 2)
    for held[0] in (0, free - nbytes // 2):
        with pytest.raises(MemoryLimitError) as caught:
            plan_residency(gguf, config, 64, 1, memory, "slots")
        advised = float(re.search(r"use .*--memory ([\d.]+)G", str(caught.value))[1])
        assert plan_residency(gguf, config, 64, 1, int(advised * 1e9), "slots").slots
    held[0] = 0
    release()
    assert plan_residency(gguf, config, 64, 1, memory, "slots").nbytes == nbytes
    machine.reserve(first, free)
    assert machine.reserved() >= free
    del first
    gc.collect()
    assert machine.reserved() < free


def test_a_loaded_model_reserves_until_it_is_closed(tmp_path, no_other_model):
    before = machine.reserved()
    model = llamacli.Model.load(tiny_gguf(tmp_path / "tiny.gguf"), threads=1, ctx=16)
    assert machine.reserved() > before + model.gguf.nbytes
    model.close()
    assert machine.reserved() == before


def test_a_model_without_experts_is_mapped_or_refused():
    config = replace(real("scout")[0], n_experts=0, n_experts_used=0, moe_step=0)
    sizes = size_by_kind([("token_embd.weight", GB), ("output.weight", GB), ("blk.0.ffn_up.weight", GB)], config)
    p = place(config, sizes, 10 * GB, 1024)
    assert (p.mode, p.weights) == ("mapped", 3 * GB)
    assert decode_seconds(p, 1, 1e9) == pytest.approx(2 / placement.REACHED_READING + config.n_layers * placement.LAYER_SECONDS)
    assert prefill_seconds(p, 10, 1e9, None) == 0
    with pytest.raises(MemoryLimitError):
        place(config, sizes, 3 * GB, 1024)


@pytest.mark.parametrize("shape", [SCOUT, MAVERICK, SCOUT | {"used": 2}, SCOUT | {"moe_step": 5}])
def test_working_memory_is_what_the_engine_allocates(tmp_path, shape):
    gguf = open_gguf(tiny_gguf(tmp_path / "tiny.gguf", chunk=4096, **shape))
    config = Config.from_gguf(gguf)
    tracemalloc.start()
    try:
        engine = Engine(gguf, config, 2, slots=16)  # of a model without experts: none
        for tokens in (16, 100, 2048):
            engine.forward([5] * tokens, engine.new_cache(tokens))
            arrays = tracemalloc.take_snapshot().filter_traces([tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)])
            held = arrays.filter_traces([tracemalloc.Filter(True, buffers.__file__)])
            largest = min(2048, (1 << (tokens - 1).bit_length()) * max(1, config.n_experts_used))
            alignment = 40 * buffers.ALIGNMENT
            assert working_bytes(config, 2, largest) == pytest.approx(sum(t.size for t in held.traces), abs=alignment)
    finally:
        tracemalloc.stop()
    assert products_per_token(config) == engine.products_per_token


# speed


@pytest.fixture
def p(scout):
    return place(*scout, 48 * GB, 8192)


def test_a_slow_disk_limits_decode(p):
    assert decode_seconds(p, 0.1e9, 1e15) == pytest.approx(p.read_per_token / 0.1e9, rel=1e-3)


def test_without_misses_only_memory_limits_decode(scout):
    mapped = place(*scout, 128 * GB, 8192)
    sizes = mapped.sizes
    seconds = (sizes.always + sizes.one_per_layer) / (placement.REACHED_READING * 20e9) + 48 * placement.LAYER_SECONDS
    assert decode_seconds(mapped, 1, 20e9) == pytest.approx(seconds)
    assert decode_seconds(mapped, 1, 20e9, 10**6) > 1.5 * seconds  # keys and values are read too


def test_an_infinitely_fast_disk_is_as_good_as_mapped_experts(p, scout):
    mapped = place(*scout, 128 * GB, 8192)
    assert decode_seconds(p, 1e15, 20e9) == pytest.approx(decode_seconds(mapped, 1, 20e9))


def test_decode_is_between_the_longer_of_both_and_their_sum(p, scout):
    reading, computing = p.read_per_token / 3e9, decode_seconds(place(*scout, 128 * GB, 8192), 1, 50e9)
    assert max(reading, computing) < decode_seconds(p, 3e9, 50e9) < reading + computing


def test_a_long_prompt_reads_every_expert_once_a_batch_a_short_one_those_it_touches(p):
    whole = p.sizes.routed / 1e9
    assert prefill_seconds(p, 2048, 1e9, None) == pytest.approx(whole)
    assert prefill_seconds(p, 3 * 2048, 1e9, None) == pytest.approx(3 * whole)  # a batch is a pass
    assert prefill_seconds(p, 1, 1e9, None) == pytest.approx(whole / 16)


def test_a_long_prompt_is_limited_by_arithmetic(p, scout):
    seconds = prefill_seconds(p, 100_000, 1e10, 1e12)
    assert seconds == pytest.approx(2e5 * products_per_token(scout[0]) / (placement.REACHED_MULTIPLYING * 1e12))
    assert kvcache.nbytes(scout[0], 0) == 0
