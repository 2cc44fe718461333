"""The forward pass against a plain NumPy Llama 4, and against itself however a sequence is cut up."""

from dataclasses import replace

import numpy as np
import oracle
import pytest
import tiny
from interrupts import run_traced

from llamacli.cpu import kvcache
from llamacli.cpu.operations import Recorder
from llamacli.engine import Engine
from llamacli.errors import ContextFullError, ModelFileError, PromptError
from llamacli.files.gguf import open_gguf
from llamacli.llama4.config import Config

EXACT = 1e-3  # float32 weights against float64 arithmetic; nearly all of it is the cache's float16
ROUNDED = 2e-4  # the same against an oracle that rounds keys and values to float16 too
SELF = 1e-4  # one pass against token by token: sums in another order, so now and then a key or value rounds the other way


def engine(path, threads=2):
    file = open_gguf(path)
    return Engine(file, Config.from_gguf(file), threads=threads)


def tokens(n, seed=0):
    return np.random.RandomState(seed).randint(0, 257, n)


def one_pass(model, ids, ctx=None):
    return model.forward(ids, model.new_cache(ctx or len(ids)), all_logits=True)


def token_by_token(model, ids):
    cache = model.new_cache(len(ids))
    return np.array([model.forward([token], cache).copy() for token in ids])


def difference(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


def spread(found, expected):
    """Per position, the error's size relative to the logits'."""
    return np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)


SHAPES = {
    "scout": tiny.SCOUT,
    "maverick": tiny.MAVERICK,
    "2 heads on 1": {"heads": 2, "kv_heads": 1},
    "5 heads on 1": {"heads": 5, "kv_heads": 1, "head_dim": 32},
    "3 heads on 3": {"heads": 3, "kv_heads": 3, "n_layers": 5},
    "heads of 128": {"heads": 5, "kv_heads": 1, "head_dim": 128},
    "top-2 experts": {"used": 2},
    "top-3 maverick": tiny.MAVERICK | {"used": 3},
    "one expert": {"experts": 1},
    "every third layer a mixture": {"moe_step": 3, "n_layers": 7},
    "no QK norm": {"use_qk_norm": False},
    "chunk of 1": {"chunk": 1},
    "chunk of 13": {"chunk": 13},
    "chunk longer than the prompt": {"chunk": 8192, "temperature_length": 8192.0},
    "no chunks": {"chunk": 0},
    "strong temperature": {"temperature_length": 2.0, "temperature_scale": 1.0},
    "a large epsilon": {"rms_eps": 0.05},  # in small, an epsilon of its own in the QK norm would pass unseen
    "odd widths": {"n_embd": 72, "n_ff_exp": 40, "n_ff": 104, "vocab": 301},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_float32_logits_are_the_oracles(tmp_path, shape):
    path = tiny.tiny_gguf(tmp_path / "tiny.gguf", seed=3, **shape)
    ids = tokens(41)
    model = engine(path)
    exact, rounded = oracle.logits(path, ids), oracle.logits(path, ids, kv=np.float16)
    for found in (one_pass(model, ids), token_by_token(model, ids)):
        assert found.dtype == np.float32
        assert difference(found, exact) <= EXACT
        assert difference(found, rounded) <= ROUNDED


def test_rope_factors_are_the_files(tmp_path):
    """Scout's own factors change short prompts too little to be noticed."""
    factors = {"rope_freqs.weight": np.linspace(1, 4, 8, dtype=np.float32)}
    path, ids = tiny.tiny_gguf(tmp_path / "tiny.gguf", edit=lambda t: t.update(factors)), tokens(41)
    plain = tiny.tiny_gguf(tmp_path / "plain.gguf", rope_freqs=False)
    assert difference(one_pass(engine(path), ids), oracle.logits(path, ids, kv=np.float16)) <= ROUNDED
    assert difference(oracle.logits(plain, ids), oracle.logits(path, ids)) > 5 * EXACT


@pytest.mark.parametrize("wrong", [{"temperature_scale": 0.2}, {"rms_eps": 1e-2}, {"rope_theta": 5e5 * 1.1}, {"chunk": 9}])
def test_the_bound_is_tight_enough_to_notice_a_small_mistake(tmp_path, wrong):
    """An oracle with one wrong constant is far outside."""
    ids = tokens(41)
    model = engine(tiny.tiny_gguf(tmp_path / "right.gguf", use_qk_norm=False))
    other = oracle.logits(tiny.tiny_gguf(tmp_path / "wrong.gguf", use_qk_norm=False, **wrong), ids)
    assert difference(one_pass(model, ids), other) > 5 * EXACT


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_changes_nothing(tmp_path, threads):
    path, ids = tiny.tiny_gguf(tmp_path / "tiny.gguf"), tokens(20)
    assert difference(one_pass(engine(path, threads), ids), one_pass(engine(path), ids)) <= SELF


def test_without_all_logits_only_the_last_position_comes_back(tmp_path):
    model, ids = engine(tiny.tiny_gguf(tmp_path / "tiny.gguf")), tokens(20)
    last = model.forward(ids, model.new_cache(20))
    assert last.shape == (288,)
    assert difference(last.copy(), one_pass(model, ids)[-1]) <= SELF


def test_progress_is_reported_after_every_batch(tmp_path):
    model, reports = engine(tiny.tiny_gguf(tmp_path / "tiny.gguf")), []
    model.follow_progress = lambda done, total: reports.append((done, total))
    model.forward(tokens(20), model.new_cache(24))  # batches end where a chunk of 8 does
    assert reports == [(0, 20), (8, 20), (16, 20), (20, 20)]


def test_an_output_that_the_file_lacks_is_the_embedding(tmp_path):
    tied = tiny.tiny_gguf(tmp_path / "tied.gguf", edit=lambda t: t.pop("output.weight"))
    spelt_out = tiny.tiny_gguf(tmp_path / "out.gguf", edit=lambda t: t.update({"output.weight": t["token_embd.weight"]}))
    assert difference(one_pass(engine(tied), tokens(9)), one_pass(engine(spelt_out), tokens(9))) <= SELF


# cutting a sequence up


@pytest.mark.parametrize("shape", [tiny.SCOUT, tiny.MAVERICK], ids=["scout", "maverick"])
@pytest.mark.parametrize("cut", [1, 7, 8, 9, 15, 16, 17, 30])
def test_a_prompt_in_two_pieces_gives_the_logits_of_one(tmp_path, shape, cut):
    model, ids = engine(tiny.tiny_gguf(tmp_path / "tiny.gguf", **shape)), tokens(36)
    whole, cache = one_pass(model, ids), model.new_cache(36)
    found = np.concatenate([model.forward(part, cache, all_logits=True) for part in (ids[:cut], ids[cut:])])
    assert cache.pos == 36
    assert difference(found, whole) <= SELF


@pytest.mark.parametrize("chunk", [1, 3, 8, 16, 64])
def test_every_chunk_edge_is_the_same_token_by_token(tmp_path, chunk):
    model, ids = engine(tiny.tiny_gguf(tmp_path / "tiny.gguf", chunk=chunk)), tokens(70)
    assert difference(token_by_token(model, ids), one_pass(model, ids)) <= SELF


@pytest.mark.parametrize(
    ("held", "back_to"), [(12, 12), (12, 9), (12, 8), (12, 7), (12, 0), (16, 15), (16, 8), (17, 16), (17, 15), (30, 3)]
)
def test_truncating_and_continuing_equals_starting_over(tmp_path, held, back_to):
    """Positions behind the last chunk edge (8, 16, 24) are kept; over an edge the older chunk is evaluated again."""
    model, ids, others = engine(tiny.tiny_gguf(tmp_path / "tiny.gguf")), tokens(held), tokens(20, seed=1)
    cache = model.new_cache(64)
    model.forward(ids, cache)
    reached = cache.truncate(back_to)
    assert reached == cache.pos
    assert reached == (back_to if (held - 1) // 8 == back_to // 8 or back_to == held else back_to // 8 * 8)
    again = np.concatenate([ids[:back_to], others])
    found = model.forward(again[reached:], cache, all_logits=True)
    assert difference(found, one_pass(model, again)[reached:]) <= SELF


def test_any_walk_of_truncating_and_continuing_equals_starting_over(tmp_path):
    """Also twice in a row, where the ring still holds a chunk that the first truncation forgot."""
    model, random = engine(tiny.tiny_gguf(tmp_path / "tiny.gguf", n_layers=4)), np.random.RandomState(5)
    cache, held = model.new_cache(64), []
    for _ in range(150):
        if held and random.rand() < 0.5:
            goal = held[: random.randint(0, len(held) + 1)]
            held = goal[: cache.truncate(len(goal))]
            assert cache.pos == len(held)
        else:
            more = list(random.randint(0, 257, random.randint(1, 12)))
            if len(held) + len(more) > 64:
                continue
            found = model.forward(more, cache).copy()
            held += more
            assert difference(found, model.forward(held, model.new_cache(64))) <= SELF


def test_a_full_context_is_an_error_that_leaves_the_cache_sound(tmp_path):
    model, ids = engine(tiny.tiny_gguf(tmp_path / "tiny.gguf")), tokens(20)
    cache = model.new_cache(20)
    model.forward(ids[:18], cache)
    with pytest.raises(ContextFullError, match="21 tokens do not fit the limit of 20"):
        model.forward(ids[:3], cache)
    assert cache.pos == 18
    assert difference(model.forward(ids[18:], cache).copy(), one_pass(model, ids)[-1]) <= SELF
    with pytest.raises(ContextFullError):
        model.forward(ids[:1], cache)


@pytest.mark.parametrize("ids", [[], [-1], [288], [1 << 40]])
def test_ids_outside_the_vocabulary_are_refused(tmp_path, ids):
    model = engine(tiny.tiny_gguf(tmp_path / "tiny.gguf"))
    with pytest.raises(PromptError):
        model.forward(ids, model.new_cache(8))


def test_metas_chunk_of_8192_and_its_temperature(tmp_path):
    """Positions 8190 to 8199 of a long prompt: a new chunk begins at 8192, the temperature changes at 8191."""
    path = tiny.tiny_gguf(tmp_path / "tiny.gguf", chunk=8192, temperature_length=8192.0, temperature_scale=1.0)
    model, ids = engine(path), tokens(8200)
    cache = model.new_cache(8200)
    whole = model.forward(ids, cache, all_logits=True)[8180:]
    assert cache.truncate(8180) == 0  # 8192 has begun a new chunk
    model.forward(ids[:8180], cache)
    singly = np.array([model.forward([token], cache).copy() for token in ids[8180:]])
    assert difference(singly, whole) <= SELF


# types


def quantized(name):
    """All matrices of one type."""
    return lambda _: name


# Activations are int8 with one scale for 32 values, so each product of a block-quantized matrix is off by about 0.5 %. Float
# types have no such loss. The median over positions is used: at a near tie an expert may flip, which moves a position far.
LOSS = {"F16": 1e-3, "BF16": 1e-3}
TYPES = ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
TYPES += ["IQ4_NL", "IQ4_XS", "TQ2_0", "IQ3_S"]


@pytest.mark.parametrize("name", TYPES)
def test_every_type_computes_what_its_dequantized_weights_say(tmp_path, name):
    shape = {"n_embd": 256, "head_dim": 64, "n_ff": 512, "n_ff_exp": 256, "moe_step": 2}
    path = tiny.tiny_gguf(tmp_path / "tiny.gguf", types=quantized(name), seed=2, **shape)
    model, ids = engine(path), tokens(40)
    expected = oracle.logits(path, ids)
    for found in (one_pass(model, ids), token_by_token(model, ids)):
        assert np.median(spread(found, expected)) <= LOSS.get(name, 0.03)


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "F16"])
def test_rows_need_not_be_whole_superblocks(tmp_path, name):
    shape = {"n_embd": 96, "head_dim": 48, "n_ff_exp": 160, "heads": 2, "kv_heads": 2}
    path = tiny.tiny_gguf(tmp_path / "tiny.gguf", types=quantized(name), seed=2, **shape)
    model, ids = engine(path), tokens(20)
    expected = oracle.logits(path, ids)
    assert np.median(spread(one_pass(model, ids), expected)) <= LOSS.get(name, 0.03)
    assert np.median(spread(token_by_token(model, ids), expected)) <= LOSS.get(name, 0.03)


# files that cannot be run


@pytest.mark.parametrize("name", sorted(name for name in tiny.tensors(**tiny.MAVERICK) if "rope" not in name))
@pytest.mark.parametrize("fault", ["missing", "misshapen"])
def test_a_missing_or_misshapen_tensor_is_named(tmp_path, name, fault):
    def spoil(found):
        values = found.pop(name)
        if fault == "misshapen":
            found[name] = values[..., :-1].copy()

    path = tiny.tiny_gguf(tmp_path / "tiny.gguf", edit=spoil, **tiny.MAVERICK)
    if (name, fault) == ("output.weight", "missing"):
        engine(path)
        return
    with pytest.raises(ModelFileError) as error:
        engine(path)
    assert name in str(error.value) or name == "token_embd.weight"
    assert "\n" not in str(error.value)


def test_an_interrupt_while_buffers_grow_leaves_the_engine_sound(tmp_path, monkeypatch):
    """Ctrl-C between the freeing of old buffers and the new program must not leave a program over freed memory."""
    model = engine(tiny.tiny_gguf(tmp_path / "tiny.gguf", chunk=8192), 1)
    ids = list(range(5, 15))
    want = model.forward(ids, model.new_cache(64)).copy()
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "compose", lambda self, **kind: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model.forward(ids * 5, model.new_cache(64))
    np.testing.assert_array_equal(model.forward(ids, model.new_cache(64)), want)


def test_an_interrupt_at_any_line_while_the_cache_grows_leaves_it_sound(tmp_path):
    model = engine(tiny.tiny_gguf(tmp_path / "tiny.gguf", chunk=8192), 1)
    ids = [i % 40 + 5 for i in range(300)]

    def filled():
        cache = model.new_cache(1000)
        model.forward(ids[:250], cache)
        return cache

    def grow(cache, interrupt_at=None):
        return run_traced(lambda: model.forward(ids[250:], cache), kvcache, interrupt_at)

    expected = model.forward(ids[250:254], filled()).copy()
    for event in range(1, grow(filled()) + 1, 3):
        cache = filled()
        with pytest.raises(KeyboardInterrupt):
            grow(cache, event)
        assert cache.pos == 250
        np.testing.assert_array_equal(model.forward(ids[250:254], cache), expected)


def test_expert_sizes_without_expert_layers_allocate_nothing(tmp_path):
    """A file that claims 4096 experts of a million rows, and has none, must not make the engine ask for their buffers."""
    path = tmp_path / "m.gguf"
    tiny.tiny_gguf(path, moe_step=2)
    gguf = open_gguf(path)
    config = replace(Config.from_gguf(gguf), n_layers=1, n_experts=4096, n_experts_used=4096, n_ff_exp=1 << 20)
    model = Engine(gguf, config, 1)
    assert np.isfinite(model.forward([5, 6, 7], model.new_cache(8))).all()
