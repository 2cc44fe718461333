"""Layers on MLX against the oracle in NumPy, and beside layers on the CPU. Without a GPU: MLX's CPU build with widened weights,
and with the GPU's kernels compiled as C++ (cpp.py).
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import tiny
from installed import needed

mx = needed("mlx.core")

import cpp  # noqa: E402

from llamacli.device import Run, Tokens  # noqa: E402
from llamacli.engine import Engine  # noqa: E402
from llamacli.errors import ContextFullError, UsageError  # noqa: E402
from llamacli.files.gguf import open_gguf  # noqa: E402
from llamacli.llama4.config import Config  # noqa: E402
from llamacli.mlx import kernels, matrix, operations  # noqa: E402
from llamacli.mlx.operations import Operations, Routed  # noqa: E402
from llamacli.mlx.stage import MlxStage  # noqa: E402
from llamacli.text.tokenizer import Tokenizer  # noqa: E402

EXACT = 1e-5  # float32 throughout, against float64; found: below 1e-6
WIDENED = 2e-3  # long prompts through weights rounded to float16
MIXED = 1e-3  # layers on the CPU keep keys and values in float16

SHAPES = {
    "scout": tiny.SCOUT,
    "maverick": tiny.MAVERICK,
    "top-2 experts": {"used": 2},
    "top-3 maverick": tiny.MAVERICK | {"used": 3},
    "one expert": {"experts": 1},
    "5 heads on 1": {"heads": 5, "kv_heads": 1, "head_dim": 32},
    "heads of 128": {"heads": 5, "kv_heads": 1, "head_dim": 128},
    "every third layer a mixture": {"moe_step": 3, "n_layers": 7},
    "no QK norm": {"use_qk_norm": False},
    "chunk of 1": {"chunk": 1},
    "chunk of 13": {"chunk": 13},
    "no chunks": {"chunk": 0},
    "strong temperature": {"temperature_length": 2.0, "temperature_scale": 1.0},
    "a large epsilon": {"rms_eps": 0.05},
    "odd widths": {"n_embd": 72, "n_ff_exp": 40, "n_ff": 104, "vocab": 301},
}
WIDE = {"n_embd": 256, "head_dim": 64, "n_ff": 512, "n_ff_exp": 256, "moe_step": 2}  # whole superblocks


@pytest.fixture
def as_cpp(monkeypatch):
    if cpp.COMPILER is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(kernels, "dialect", cpp.dialect)
    cpp.forget(kernels)
    yield
    cpp.forget(kernels)


def engine(path, gpu_layers=None, threads=2):
    """The last `gpu_layers` on MLX, None: all."""
    file = open_gguf(path)
    config = Config.from_gguf(file)
    return Engine(file, config, threads, gpu_layers=config.n_layers if gpu_layers is None else gpu_layers)


def tokens(n, seed=0):
    return np.random.RandomState(seed).randint(0, 257, n)


def one_pass(model, ids):
    return model.forward(ids, model.new_cache(len(ids)), all_logits=True)


def in_pieces(model, ids, size):
    cache = model.new_cache(len(ids))
    return np.concatenate([model.forward(ids[at : at + size], cache, all_logits=True) for at in range(0, len(ids), size)])


def hand_over(cache, copy):
    """Have a new cache hold what another holds."""
    copy.reserve(cache.pos)
    for layer in range(4):
        held = cache.held(layer)
        copy.restore(layer, held.start, *cache.export(layer, held.start, held.stop))
    copy.pos = cache.pos


def difference(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_float32_logits_are_the_oracles(tmp_path, shape):
    path, ids = tiny.tiny_gguf(tmp_path / "tiny.gguf", seed=3, **shape), tokens(21)
    model, expected = engine(path), oracle.logits(path, ids)
    for found in (one_pass(model, ids), in_pieces(model, ids, 1), in_pieces(model, ids, 7)):
        assert found.dtype == np.float32
        assert difference(found, expected) <= EXACT


def test_rope_factors_are_the_files(tmp_path):
    factors = {"rope_freqs.weight": np.linspace(1, 4, 8, dtype=np.float32)}
    path, ids = tiny.tiny_gguf(tmp_path / "tiny.gguf", edit=lambda t: t.update(factors)), tokens(41)
    assert difference(one_pass(engine(path), ids), oracle.logits(path, ids)) <= EXACT


def test_metas_chunk_of_8192_and_its_temperature(tmp_path):
    """Where a new chunk begins at 8192 and the temperature changes at 8191; angles of such positions need float64."""
    path = tiny.tiny_gguf(tmp_path / "tiny.gguf", chunk=8192, temperature_length=8192.0, temperature_scale=1.0)
    ids, cpu, model = tokens(8200), engine(path, 0), engine(path)
    cache, moved = cpu.new_cache(8200), model.new_cache(8200)
    cpu.forward(ids[:8188], cache)
    hand_over(cache, moved)
    expected = cpu.forward(ids[8188:], cache, all_logits=True)
    found = np.array([model.forward([token], moved) for token in ids[8188:]])
    assert difference(found, expected) <= MIXED


def test_an_output_that_the_file_lacks_is_the_embedding(tmp_path):
    tied = tiny.tiny_gguf(tmp_path / "tied.gguf", edit=lambda t: t.pop("output.weight"))
    spelt_out = tiny.tiny_gguf(tmp_path / "out.gguf", edit=lambda t: t.update({"output.weight": t["token_embd.weight"]}))
    assert difference(one_pass(engine(tied), tokens(9)), one_pass(engine(spelt_out), tokens(9))) <= EXACT


# faults


def _halves_rotated(self, x):
    a, b, cos, sin = *mx.split(x, 2, -1), self._cos[:, None], self._sin[:, None]
    return mx.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def _without(**switched):
    real = Operations.attend
    return lambda self, i, q, k, v, **how: real(self, i, q, k, v, **(how | switched))


def _score_on_the_output(self, x, h, w, routed):
    return x + w.times_chosen(h, routed.experts.reshape(-1)) * routed.scores


FAULTS = {
    "halves rotated": (Operations, "_rotated", _halves_rotated),
    "no rotation": (Operations, "attend", _without(rotate=False)),
    "no QK norm": (Operations, "attend", _without(norm=False)),
    "no temperature": (Operations, "attend", _without(temperature=False)),
    "the other expert": (
        Operations,
        "route",
        lambda self, h, w, real=Operations.route: (lambda r: Routed((r.experts + 1) % 4, r.scores))(real(self, h, w)),
    ),
    "no score": (
        Operations,
        "route",
        lambda self, h, w, real=Operations.route: (lambda r: Routed(r.experts, mx.ones_like(r.scores)))(real(self, h, w)),
    ),
    "score on the output": (Operations, "add_expert_matmul", _score_on_the_output),
    "gate and up exchanged": (matrix, "_swiglu", lambda gate, up, scores, real=matrix._swiglu: real(up, gate, scores)),
}


@pytest.mark.parametrize(("home", "name", "wrong"), FAULTS.values(), ids=FAULTS)
def test_the_bound_notices_a_fault(home, name, wrong, tmp_path, monkeypatch):
    path, ids = tiny.tiny_gguf(tmp_path / "tiny.gguf", seed=3), tokens(12)
    monkeypatch.setattr(home, name, wrong)
    assert difference(in_pieces(engine(path), ids, 1), oracle.logits(path, ids)) > 100 * EXACT


@pytest.mark.parametrize("wrong", [{"temperature_scale": 0.11}, {"rms_eps": 1e-4}, {"rope_theta": 5e5 * 1.01}, {"chunk": 9}])
def test_the_bound_notices_a_wrong_constant(tmp_path, wrong):
    path, ids = tiny.tiny_gguf(tmp_path / "right.gguf", use_qk_norm=False), tokens(41)
    other = tiny.tiny_gguf(tmp_path / "wrong.gguf", use_qk_norm=False, **wrong)
    assert difference(one_pass(engine(path), ids), oracle.logits(other, ids)) > 2 * EXACT


# the GPU's kernels


TYPES = ["F32", "F16", "BF16", "Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS", "IQ3_S"]


@pytest.mark.parametrize("name", TYPES)
def test_token_by_token_every_type_computes_what_its_weights_say(as_cpp, name, tmp_path):
    path = tiny.tiny_gguf(tmp_path / "tiny.gguf", types=lambda _: name, seed=2, n_layers=2, **WIDE)
    model, ids = engine(path), tokens(5)
    found, expected = in_pieces(model, ids, 1), oracle.logits(path, ids)
    assert difference(found, expected) <= (EXACT if name != "IQ3_S" else 1e-3)  # that is read as float16
    assert any("IQ3_S" in notice for notice in model.notices) == (name == "IQ3_S")


@pytest.mark.parametrize("shape", [WIDE, WIDE | {"used": 2}], ids=["1 expert", "2 experts"])
def test_prompts_go_through_kernels_as_tokens_do(as_cpp, shape, tmp_path):
    """Pieces of 3 are multiplied with blocks; longer ones widen each matrix, and read the router's choices back."""
    path, ids = tiny.tiny_gguf(tmp_path / "tiny.gguf", types=lambda _: "Q4_K", seed=2, n_layers=2, **shape), tokens(24)
    model, expected = engine(path), oracle.logits(path, ids)
    assert difference(in_pieces(model, ids, 3), expected) <= EXACT
    chunks = tiny.tiny_gguf(tmp_path / "long.gguf", types=lambda _: "Q4_K", seed=2, n_layers=2, **shape, chunk=64)
    found, expected = one_pass(engine(chunks), ids), oracle.logits(chunks, ids)
    assert EXACT < difference(found, expected) <= WIDENED


def test_a_large_matrix_is_widened_piece_by_piece(as_cpp, tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "WIDENED", 2 * 256 * 100)  # 100 rows of 256 columns
    path, ids = tiny.tiny_gguf(tmp_path / "tiny.gguf", types=lambda _: "Q4_K", n_layers=2, chunk=64, **WIDE), tokens(12)
    assert difference(one_pass(engine(path), ids), oracle.logits(path, ids)) <= WIDENED


def test_values_beyond_float16_do_not_overflow(as_cpp, tmp_path):
    """The product of gate and up may be large; each row is scaled before it is rounded to float16."""
    path = tiny.tiny_gguf(
        tmp_path / "tiny.gguf",
        types=lambda _: "Q8_0",
        **WIDE | {"chunk": 64, "n_layers": 2, "moe_step": 1},
        edit=lambda t: t.update({n: 120 * v for n, v in t.items() if "ffn_up" in n or "ffn_gate_sh" in n}),
    )
    ids = tokens(12)
    found, expected = one_pass(engine(path), ids), oracle.logits(path, ids)
    assert difference(found, expected) <= WIDENED


SMALL = Path(__file__).resolve().parents[2] / "models" / "scout-tiny" / "scout-tiny.gguf"
TEXT = "The capital of France is Paris. Which planet is the largest? Jupiter is the largest planet."


def test_the_small_model_through_the_gpus_kernels(as_cpp):
    """Trained weights in a mix of types, a text, every layer through the kernels."""
    file = open_gguf(SMALL)
    config, ids = Config.from_gguf(file), Tokenizer.from_gguf(file).encode(TEXT, bos=True, special=False)
    model, expected = engine(SMALL), oracle.logits(SMALL, ids)
    assert difference(in_pieces(model, ids, 1), expected) <= EXACT
    assert EXACT < difference(one_pass(model, ids), expected) <= WIDENED
    model.stages[-1] = MlxStage(file, config, range(config.n_layers), dtype=mx.float16)  # as on a GPU
    for found in (in_pieces(model, ids, 1), one_pass(model, ids)):
        divergence, same = agreement(found, expected)
        assert 0 < divergence <= 1e-4
        assert same == 1


# float16


def agreement(found, expected):
    """Mean KL divergence in nats, and the share of equal best tokens."""
    p, q = (a.astype(np.float64) - a.max(-1, keepdims=True) for a in (expected, found))
    p, q = (a - np.log(np.exp(a).sum(-1, keepdims=True)) for a in (p, q))
    return (np.exp(p) * (p - q)).sum(-1).mean(), (found.argmax(-1) == expected.argmax(-1)).mean()


def test_float16_with_the_same_experts_is_near(tmp_path, monkeypatch):
    """What a GPU computes with; the choices of experts are those of float32, since a near tie falls either way."""
    path, ids = tiny.tiny_gguf(tmp_path / "tiny.gguf", types=lambda _: "Q4_K", seed=2, **WIDE), tokens(64)
    file = open_gguf(path)
    config, choices, real = Config.from_gguf(file), [], Operations.route
    exact, half = (engine(path) for _ in range(2))
    half.stages[-1] = MlxStage(file, config, range(config.n_layers), dtype=mx.float16)

    def noted(self, h, w):
        choices.append(real(self, h, w).experts)
        return real(self, h, w)

    def followed(self, h, w):
        experts = choices.pop(0)
        return Routed(experts, mx.sigmoid(mx.take_along_axis(w.times(h), experts, -1)))

    monkeypatch.setattr(Operations, "route", noted)
    expected = one_pass(exact, ids)
    monkeypatch.setattr(Operations, "route", followed)
    divergence, same = agreement(one_pass(half, ids), expected)
    assert 0 < divergence <= 1e-3
    assert same >= 0.95


# caches, and stages side by side


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
