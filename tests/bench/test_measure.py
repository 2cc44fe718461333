"""Measurements: the work that is counted, the runs that are timed, the profile, random files of a shape, the picture."""

import importlib.util
import struct
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
from fakes import CONFIG, FakeEngine, FakeModel

from llamacli import LlamacliError, Model
from llamacli.bench import limits as bench_limits
from llamacli.bench import measure, peer, plot
from llamacli.bench.limits import multiply_floats_gops, multiply_gops, read_gbps
from llamacli.bench.measure import Case, plan
from llamacli.cli import main
from llamacli.engine import Engine
from llamacli.errors import OutputError, UsageError
from llamacli.files.gguf import open_gguf
from llamacli.llama4.config import Config
from quantize.shapes import SHAPES, nbytes, write

SMALL = replace(
    SHAPES["scout"],
    **{"n_layers": 8, "n_embd": 256, "n_heads": 2, "n_kv_heads": 1, "head_dim": 128, "n_ff": 512, "n_ff_exp": 256},
    **{"n_experts": 4, "n_vocab": 300},
)


@pytest.fixture(autouse=True)
def known_limits(monkeypatch):
    monkeypatch.setattr(measure, "limits", lambda threads: (10.0, 1000.0, 250.0))


# what is run


def test_every_length_is_measured_at_every_depth_and_zeros_are_left_out():
    names = [test.name for test in plan([512, 4096], [0, 128], [0, 8192])]
    assert names == ["pp512", "pp4096", "tg128", "pp512@d8192", "pp4096@d8192", "tg128@d8192"]


def test_a_depth_is_filled_once_and_every_run_starts_there():
    model = FakeModel(FakeEngine(chunk=64))
    measure.speed(model, plan([8], [3], [20]), 2)
    calls = [(at, len(ids)) for at, ids in model.engine.calls]
    assert calls == [(0, 20)] + [(20, 8)] * 3 + [(20, 1), (21, 1), (22, 1)] * 3


def test_tokens_lost_at_a_chunks_edge_are_evaluated_again_before_a_run_is_timed(monkeypatch):
    model, clock = FakeModel(FakeEngine(chunk=8)), []
    monkeypatch.setattr(measure, "perf_counter", lambda: clock.append(len(model.engine.calls)) or float(len(clock)))
    measure.speed(model, [Case(8, 5, False)], 1)
    assert [(at, len(ids)) for at, ids in model.engine.calls] == [(0, 5), (5, 8), (0, 5), (5, 8)]
    assert clock == [1, 2, 3, 4]


def test_the_text_is_the_same_each_time_and_has_no_special_tokens():
    model = FakeModel(FakeEngine())
    ids = measure.tokens(model, 1000)
    assert ids == measure.tokens(model, 1000)
    assert max(ids) < 256
    assert len(set(ids)) > 200


def test_peers_take_turns_with_the_model_and_the_ratio_is_to_the_fastest():
    turns = []

    class Other:
        def __init__(self, name, seconds):
            self.name, self.pace, self.peak = name, seconds, 1000

        def seconds(self, test):
            turns.append((self.name, len(model.engine.calls)))
            return self.pace

    model = FakeModel(FakeEngine(chunk=64))
    (record,) = measure.speed(model, [Case(10, 0, False)], 1, peers=[Other("a", 4.0), Other("b", 2.0)])
    assert turns == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert {name: found["tokens_per_second"] for name, found in record["peers"].items()} == {"a": 2.5, "b": 5.0}
    assert record["ratio"] == pytest.approx(record["tokens_per_second"] / 5, rel=1e-3)


@pytest.mark.parametrize("chunk", [8, 32])
@pytest.mark.parametrize("depth", [3, 8, 40, 64, 100])
def test_a_depth_can_be_filled_with_copies_of_the_first_tokens(depth, chunk, tmp_path, monkeypatch):
    """Every layer holds the positions that it would hold, and each a copy of an early one."""
    monkeypatch.setattr(measure, "COPIED", 12)
    engine = load(tmp_path, chunk=chunk)
    ids = list(range(1, 141))
    filled, evaluated = engine.new_cache(140), engine.new_cache(140)
    measure._fill(engine, filled, ids, depth)
    engine.forward(ids[:depth], evaluated)
    assert filled.pos == depth
    for layer in range(engine.config.n_layers):
        held = filled.held(layer)
        assert held == evaluated.held(layer)
        first = [side[:, :12] for side in evaluated.export(layer, held.start, held.stop)] if not held.start else None
        keys, values = filled.export(layer, held.start, held.stop)
        for side, source in zip((keys, values), first or (keys, values), strict=True):
            known = {row.tobytes() for row in source.swapaxes(0, 1)}
            assert {row.tobytes() for row in side.swapaxes(0, 1)} <= known
    before = filled.pos
    engine.forward(ids[depth : depth + 20], filled)
    assert filled.truncate(before) <= before


def test_filled_depths_evaluate_only_the_first_tokens(monkeypatch):
    model, filled = FakeModel(FakeEngine()), []
    monkeypatch.setattr(measure, "_fill", lambda engine, cache, ids, depth: filled.append(depth))
    measure.speed(model, [Case(4, 0, False), Case(4, 8, False), Case(4, 8, True)], 1, fill=True)
    assert filled == [0, 8]


# what is counted


def test_attention_sees_its_chunk_in_rotary_layers_and_everything_in_others():
    by_hand = sum(p % 8 + 1 for p in range(5, 25)) * 3 + sum(p + 1 for p in range(5, 25))
    assert measure.attended(CONFIG, Case(20, 5, False)) == by_hand


def test_the_arithmetic_limit_is_that_of_bytes_for_weights_and_of_floats_for_attention():
    (near,), (far,) = (measure.speed(FakeModel(FakeEngine()), [Case(8, depth, False)], 1) for depth in (0, 600))
    for record in (near, far):
        share = record["attention_share"]
        assert record["compute_limit"] == pytest.approx(1 / ((1 - share) / 1000 + share / 250), rel=1e-3)
    assert 0 < near["attention_share"] < far["attention_share"] < 1
    assert 250 < far["compute_limit"] < near["compute_limit"] < 1000


@pytest.mark.parametrize("shape", [tiny.SCOUT, tiny.MAVERICK, {"used": 2}], ids=["scout", "maverick", "top-2"])
def test_work_counts_every_weight_that_a_token_is_multiplied_with(shape, tmp_path):
    engine = load(tmp_path, **shape)
    config, file = engine.config, open_gguf(tmp_path / "tiny.gguf")
    share = config.n_experts_used / config.n_experts
    products = nbytes_read = 0
    for name, tensor in file.tensors.items():
        if name.startswith("blk.") and len(tensor.shape) > 1:
            part = share if name.endswith("_exps.weight") else 1
            products += part * np.prod(tensor.shape)
            nbytes_read += part * tensor.nbytes
    assert engine.products_per_token == products
    ends = file.tensors["output.weight"].nbytes + 4 * config.n_embd
    assert engine.bytes_per_token == nbytes_read + ends


def test_extrapolation_scales_the_layers_and_counts_what_is_outside_of_them_once():
    record = {"tokens_per_second": 10.0, "profile": {"operations": {"experts": 3.0, "output": 1.0}, "layers": [1.5, 1.5]}}
    assert measure.extrapolate(record, 2, 2) == pytest.approx(10)
    assert 1 / measure.extrapolate(record, 2, 48) == pytest.approx(0.1 * (0.25 + 0.75 * 24))


@pytest.mark.parametrize(
    ("threads", "usual", "free", "megabytes"),
    [
        (2, 512, 9000, 512),
        (128, 512, 9000, 2048),
        (128, 512, 1400, 700),
        (2, 512, 10, 48),
        (2, 256, 9000, 256),
        (2, 256, 300, 150),
    ],
)
def test_the_buffer_grows_with_the_threads_as_far_as_memory_allows(threads, usual, free, megabytes, monkeypatch):
    """`plan`, too, runs under limits."""
    monkeypatch.setattr(bench_limits, "memory_free", lambda: free << 20)
    assert bench_limits.buffer_megabytes(threads, usual) == megabytes


def test_the_measured_limits_are_positive():
    assert 0.1 < read_gbps(1, megabytes=16, rounds=1) < 10_000
    assert 0.1 < multiply_gops(1, steps=10_000, rounds=1) < 100_000
    assert 0.1 < multiply_floats_gops(1, steps=10_000, rounds=1) < 100_000


# profile


def load(tmp_path, threads=2, **shape):
    file = open_gguf(tiny.tiny_gguf(tmp_path / "tiny.gguf", **shape))
    return Engine(file, Config.from_gguf(file), threads=threads)


@pytest.mark.parametrize("shape", [tiny.SCOUT, tiny.MAVERICK], ids=["scout", "maverick"])
@pytest.mark.parametrize("n", [1, 20], ids=["decode", "prefill"])
def test_a_profile_names_every_step_and_its_layer(shape, n, tmp_path):
    engine = load(tmp_path, **shape)
    ids = list(range(n))
    expected = engine.forward(ids, engine.new_cache(n)).copy()
    cache, again = engine.new_cache(n + 1), engine.new_cache(n + 1)
    steps = engine.profile(ids, cache)
    assert (engine.forward(ids, again) == expected).all()
    assert (engine.forward([1], cache) == engine.forward([1], again)).all()  # it has really been run
    assert all(seconds > 0 for _, _, seconds in steps)
    for i in range(engine.config.n_layers):
        names = [name for layer, name, _ in steps if layer == i]
        own = {"router", "routed experts", "shared experts"} if engine.config.is_moe(i) else {"dense layers"}
        assert set(names) == {"norms", "projections", "attention"} | own
        assert len(names) == len(set(names))
    assert [name for layer, name, _ in steps if layer is None] == ["embedding", "attention", "norms", "output"]


def test_after_a_profile_the_engine_runs_as_before(tmp_path):
    engine = load(tmp_path)
    expected = engine.forward([1, 2], engine.new_cache(2))
    with pytest.raises(LlamacliError):
        engine.profile([1] * 3, engine.new_cache(2))
    assert (engine.forward([1, 2], engine.new_cache(2)) == expected).all()


def test_a_profile_is_of_one_prompt_and_of_one_decoded_token(tmp_path):
    model = FakeModel(FakeEngine(chunk=64))
    prefill, decode = measure.speed(model, plan([8], [40], [0]), 1, profile=True)
    for record in (prefill, decode):
        assert record["profile"] == {
            "operations": {"attention": 3.0, "experts": 1.0, "embedding": 0.5, "output": 0.5},
            "layers": [2.0, 2.0],
        }


# files of a shape


def test_sizes_are_the_published_ones():
    weights = {"scout": 108e9, "maverick": 401e9}  # both without the vision tower
    for name, shape in SHAPES.items():
        bits = nbytes(shape, shape.n_layers) * 8 / weights[name]
        assert 4.5 < bits < 4.8


def test_a_random_file_runs_and_its_logits_are_finite(tmp_path):
    path = tmp_path / "random.gguf"
    write(SMALL, 2, path)
    model = Model.load(path, threads=1)
    assert sum(t.nbytes for t in model.gguf.tensors.values()) == nbytes(SMALL, 2)
    assert model.gguf.tensors["blk.1.ffn_up_exps.weight"].type.name == "Q4_K"
    assert model.gguf.tensors["blk.1.attn_q.weight"].type.name == "Q6_K"
    logits = model.logits(measure.tokens(model, 20))
    assert np.isfinite(logits).all()
    assert 0.5 < logits.std() < 2


def test_random_weights_have_the_spread_of_trained_ones(tmp_path):
    write(SMALL, 1, tmp_path / "random.gguf")
    for tensor in gguf.GGUFReader(tmp_path / "random.gguf").tensors:
        if len(tensor.shape) > 1:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            expected = 1 if tensor.name == "token_embd.weight" else values.shape[-1] ** -0.5
            assert 0.8 < values.std() / expected < 1.5, tensor.name
            assert abs(values.mean()) < 0.05 * expected


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write(SMALL, 1, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_without_a_layer_of_each_kind_is_refused(tmp_path):
    with pytest.raises(UsageError, match="multiple of 2"):
        write(SHAPES["maverick"], 3, tmp_path / "odd.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(OutputError, match="room on the disk"):
        write(SMALL, 1, tmp_path / "big.gguf")
    assert list(tmp_path.iterdir()) == []


# llama.cpp and the picture


def test_a_saved_state_of_llama_cpp_is_repeated_to_a_depth():
    """Two parts, for layers that see everything and for those that see a chunk of 8, of 2 and 1 layers."""

    def part(first, rows, layers):
        n = len(rows)
        cells = b"".join(struct.pack("<iii", first + i, 1, 0) for i in range(n))
        sides = b"".join(struct.pack("<iQ", 1, 4) + b"".join(rows) for _ in range(2 * layers))
        return struct.pack("<II", 1, n) + cells + struct.pack("<II", 0, layers) + sides

    rows = [b"abcd", b"efgh", b"ijkl"]
    head = b"magic   "
    state = head + part(0, rows, 2) + part(0, rows, 1)
    assert peer.repeated(state, 3, 21, 8) == head + part(0, rows * 7, 2) + part(16, (rows * 2)[:5], 1)
    assert peer.repeated(state, 3, 8, 8) == head + part(0, (rows * 3)[:8], 2) + part(0, (rows * 3)[:8], 1)
    for wrong in (state[:-1], state + b"x", state[:8] + b"\2" + state[9:]):
        with pytest.raises(SystemExit, match="another layout"):
            peer.repeated(wrong, 3, 21, 8)


def test_a_peer_that_dies_is_reported_in_one_line_with_its_last_output(monkeypatch, tmp_path):
    (tmp_path / "llama_cpp.py").write_text("raise SystemExit('no such library')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", ":".join(p for p in sys.path if p))
    with pytest.raises(LlamacliError, match="no such library"):
        peer.Peer("file.gguf", 1, [1, 2], repack=False)


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="needs llama-cpp-python")
def test_llama_cpp_runs_the_same_tests(tmp_path):
    write(SMALL, 4, tmp_path / "random.gguf")
    for fill in (None, SMALL.chunk_size):
        other = peer.Peer(tmp_path / "random.gguf", 1, [1, 2, 3, 4] * 200, repack=False, fill=fill)
        try:
            for test in plan([8], [4], [0, 10, 700]) * 2:
                assert other.seconds(test) > 0
                assert other.peak > 10_000_000
        finally:
            other.close()


def test_a_picture_without_matplotlib_says_how_to_get_it(monkeypatch):
    for name in ["matplotlib", *(name for name in sys.modules if name.startswith("matplotlib."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match="pip install matplotlib"):
        plot.check(Path("bench.png"))


@pytest.mark.parametrize("name", ["no/bench.png", "bench.nonsense", "folder.png"])
def test_a_place_for_no_picture_is_refused_before_anything_is_measured(name, tmp_path, capfd):
    pytest.importorskip("matplotlib")
    (tmp_path / "folder.png").mkdir()
    plot.check(tmp_path / "bench.png")
    for args in (["bench", "-p", "8", "-n", "0"], ["plan"]):
        assert main([*args, "--plot", str(tmp_path / name)]) == 1
        out, err = capfd.readouterr()
        assert out == "" and err.count("\n") == 1 and str(tmp_path / name) in err


def test_the_picture_has_a_line_for_each_engine_and_length():
    def record(test, depth, rate):
        return {
            "test": test,
            "depth": depth,
            "tokens_per_second": rate,
            "peers": {"llama.cpp": {"tokens_per_second": rate / 2}},
        }

    lines = plot._lines([record("tg8", 0, 4.0), record("tg8@d64", 64, 2.0)])
    assert lines == {"llamacli tg8": [(0, 4.0), (64, 2.0)], "llama.cpp tg8": [(0, 2.0), (64, 1.0)]}


def test_the_picture_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    record = {"test": "tg8", "depth": 0, "tokens_per_second": 4.0}
    plot.draw([record], "title", tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(OutputError):
        plot.draw([record], "title", tmp_path / "bench.nonsense")
