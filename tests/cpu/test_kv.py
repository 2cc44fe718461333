"""Keys and values in blocks: microkernels in every variant against gguf-py and NumPy, models against the oracle."""

from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import oracle
import pytest
import tiny
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from kv_quality import divergences
from test_kernels import VARIANTS, microkernels, run

from llamacli import Model, environment
from llamacli.cpu import kvcache
from llamacli.cpu.kernels.ops import kv
from llamacli.engine import Engine
from llamacli.errors import UnsupportedModelError, UsageError
from llamacli.files.ggml import BY_NAME
from llamacli.files.gguf import open_gguf
from llamacli.llama4.config import Config
from quantize.convert import convert

HEAD_DIM = 64
BLOCKS = ("Q8_0", "Q4_0")
SIZES = {"head_dim": 32, "n_embd": 64}


@cache
def hadamard(n):
    """Sylvester's matrix, normalized."""
    return np.ones((1, 1)) if n == 1 else np.kron([[1, 1], [1, -1]], hadamard(n // 2)) / np.sqrt(2)


def leaves(name, target, head_dim=HEAD_DIM, unit=4):
    return microkernels(f"kv-{name}-{head_dim}-{unit}", kv.build(name, head_dim, unit), kv.SYMBOLS, target)


def rows(name, x, target):
    """Float rows as the cache holds them, and what those mean."""
    kind = BY_NAME[name]
    raw = np.zeros((len(x), x.shape[1] // kind.block * kind.nbytes), np.uint8)
    for row, out in zip(x, raw, strict=True):
        run(leaves(name, target, x.shape[1])["write"], row, len(row), out)
    return raw, dequantize(raw, GGMLQuantizationType[name]).astype(np.float32)


@pytest.mark.parametrize("target", VARIANTS)
class TestVariants:
    @pytest.mark.parametrize("name", BLOCKS)
    def test_a_written_row_is_as_close_as_ggmls(self, name, target):
        x = np.random.default_rng(0).standard_normal((200, HEAD_DIM)).astype(np.float32)
        _, meant = rows(name, x, target)
        theirs = dequantize(quantize(x, GGMLQuantizationType[name]), GGMLQuantizationType[name])
        assert np.square(meant - x).sum() <= 1.001 * np.square(theirs - x).sum()

    @pytest.mark.parametrize("name", BLOCKS)
    def test_rows_of_every_size_are_within_a_step(self, name, target):
        x = np.zeros((9, HEAD_DIM), np.float32)
        x[1], x[2], x[3, 5], x[4, 40] = 1e-9, -4e-7, 3e4, -3e4
        x[5:] = np.random.default_rng(1).uniform(-1, 1, (4, HEAD_DIM)) * np.array([[1e-6], [1e-4], [1.0], [6e4]])
        x[7] = np.abs(x[7])
        _, meant = rows(name, x, target)
        largest = np.abs(x.reshape(9, -1, 32)).max(-1, keepdims=True)
        step = largest / (127 if name == "Q8_0" else 8) * np.ones((1, 1, 32)) + 6e-8 * 128  # half's least number, times a code
        assert (np.abs(meant - x) <= step.reshape(9, -1)).all()
        assert (meant[0] == 0).all()

    @pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
    def test_a_rotation_is_hadamards_and_its_own_inverse(self, head_dim, target):
        x = np.random.default_rng(2).standard_normal(head_dim).astype(np.float32)
        got, part = x.copy(), head_dim & -head_dim
        run(leaves("F16", target, head_dim, unit=1)["rotate"], got)
        np.testing.assert_allclose(got.reshape(-1, part), x.reshape(-1, part) @ hadamard(part), atol=1e-5)
        run(leaves("F16", target, head_dim, unit=1)["rotate"], got)
        np.testing.assert_allclose(got, x, atol=1e-5)

    @pytest.mark.parametrize(
        ("name", "unit", "n_keys"),
        [
            *[("F16", 1, 50), ("F16", 3, 37), ("F16", 5, 64), ("F16", 8, 19)],
            *[("Q8_0", 4, 17), ("Q8_0", 5, 37), ("Q4_0", 4, 1), ("Q4_0", 5, 64)],
        ],
    )
    def test_rows_are_multiplied_as_what_they_mean(self, name, unit, n_keys, target):
        f, rng = leaves(name, target, unit=unit), np.random.default_rng(n_keys)
        raw, meant = rows(name, rng.standard_normal((n_keys, HEAD_DIM)).astype(np.float32), target)
        queries = rng.standard_normal((unit, HEAD_DIM)).astype(np.float32)
        scores = np.full((unit, n_keys + 1), np.nan, np.float32)
        run(f["dots"], raw, n_keys, queries, scores, 4 * (n_keys + 1))
        np.testing.assert_allclose(scores[:, :n_keys], queries @ meant.T, atol=1e-4)
        assert np.isnan(scores[:, n_keys]).all(), "it wrote past its keys"
        again = np.empty((unit, n_keys), np.float32)
        for k in range(n_keys):  # whatever keys come with it, a product has the same bits
            one = np.empty((unit, 1), np.float32)
            run(f["dots"], raw[k:], 1, queries, one, 4)
            again[:, k] = one[:, 0]
        np.testing.assert_array_equal(scores[:, :n_keys], again)
        out, state = (rng.standard_normal((2 * unit, n)).astype(np.float32) for n in (HEAD_DIM, 3))
        p = rng.random((2 * unit, n_keys)).astype(np.float32)
        want = state[:, 2:] * out + p @ meant
        run(f["weigh"], p, 4 * n_keys, 2 * unit, raw, n_keys, out, state)
        np.testing.assert_allclose(out, want, atol=1e-4)

    @pytest.mark.parametrize("name", kv.TYPES)
    @pytest.mark.parametrize("n_keys", [1, 17, 64])
    def test_rows_are_widened_and_transposed(self, name, n_keys, target):
        f = leaves(name, target)
        raw, meant = rows(name, np.random.default_rng(n_keys).standard_normal((n_keys, HEAD_DIM)).astype(np.float32), target)
        wide = np.full((n_keys, HEAD_DIM), np.nan, np.float32)
        run(f["widen"], raw, wide.size, wide)
        np.testing.assert_array_equal(wide, meant)
        span = kv.span(HEAD_DIM, target)
        columns = np.full((-(-n_keys // span), HEAD_DIM, span), np.nan, np.float32)
        run(f["transpose_keys"], raw, n_keys, columns)
        np.testing.assert_array_equal(columns.transpose(0, 2, 1).reshape(-1, HEAD_DIM)[:n_keys], meant)


# models


def engine_of(path, name, **more):
    gguf = open_gguf(path)
    return Engine(gguf, replace(Config.from_gguf(gguf), kv_type=name), 2, **more)


def stored(name):
    """What keys and values [n, heads, dim] become in the cache, in NumPy."""

    def back(x):
        turn = hadamard(x.shape[-1])
        blocks = (x @ turn).reshape(*x.shape[:-1], -1, 32)
        if name == "Q8_0":
            d = (np.abs(blocks).max(-1, keepdims=True) / 127).astype(np.float16).astype(np.float64)
            blocks = d * np.rint(blocks / d)
        else:
            largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
            d = largest / -8
            for _ in range(3):
                codes = np.clip(np.rint(blocks / d), -8, 7)
                d = (blocks * codes).sum(-1, keepdims=True) / np.square(codes).sum(-1, keepdims=True)
            blocks = d.astype(np.float16) * codes
        return blocks.reshape(x.shape) @ turn

    return back


CHUNKS = [(8, 30), (64, 200)]  # segments of 8 and of 32 positions, with some tokens
SEGMENTS = {"Q8_0": {8: 0, 64: 0}, "Q4_0": {8: 8, 64: 32}}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("shape", [tiny.SCOUT, tiny.MAVERICK], ids=["scout", "maverick"])
@pytest.mark.parametrize(("chunk", "n"), CHUNKS)
def test_logits_are_those_of_quantized_keys_and_values(name, shape, chunk, n, tmp_path):
    """A code next to an edge may round the other way, so most of the error of quantizing must vanish, not all."""
    path = tiny.tiny_gguf(tmp_path / "m.gguf", **SIZES | shape | {"chunk": chunk})
    ids = np.random.RandomState(0).randint(0, 257, n)
    model = engine_of(path, name)
    found = model.forward(ids, model.new_cache(n), all_logits=True)
    right, exact = oracle.logits(path, ids, kv=stored(name), segment=SEGMENTS[name][chunk]), oracle.logits(path, ids)
    assert np.median(np.abs(found - right)) < 0.2 * np.median(np.abs(exact - right))


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(("chunk", "n"), CHUNKS)
def test_token_by_token_and_rewound_is_one_pass(name, chunk, n, tmp_path):
    model = engine_of(tiny.tiny_gguf(tmp_path / "m.gguf", **SIZES, chunk=chunk), name)
    ids = np.random.RandomState(0).randint(0, 257, n)
    whole, cache = model.forward(ids, model.new_cache(n), all_logits=True), model.new_cache(n)
    single = np.array([model.forward([token], cache) for token in ids])
    close = {"atol": 1e-2 * np.abs(whole).max()}
    np.testing.assert_allclose(single, whole, **close)
    for pos in (n - 1, n * 4 // 5, n * 4 // 5 - 1, n // 2, n // 3, 9, 8, 3):
        reached = cache.truncate(pos)
        np.testing.assert_allclose(model.forward(ids[reached:], cache, all_logits=True), whole[reached:], **close)


IDS = np.random.RandomState(1).randint(0, 257, 300)


@pytest.fixture(scope="module")
def in_segments(tmp_path_factory):
    return engine_of(tiny.tiny_gguf(tmp_path_factory.mktemp("m") / "m.gguf", **SIZES, chunk=256), "Q4_0", max_batch=128)


@pytest.fixture(scope="module")
def whole(in_segments):
    return in_segments.forward(IDS, in_segments.new_cache(300), all_logits=True)


class TestSegments:
    """Keys and values in Q4_0: those of a token's own segment of 32 are in half precision."""

    def near(self, found, whole):
        np.testing.assert_allclose(found, whole, atol=1e-2 * np.abs(whole).max())

    @pytest.mark.parametrize("cuts", [(1, 40), (33, 97, 98), (31, 32, 64), (10, 290)])
    def test_logits_do_not_depend_on_how_a_text_is_cut_into_calls(self, in_segments, whole, cuts):
        cache, edges = in_segments.new_cache(300), [0, *cuts, 300]
        parts = [IDS[a:b] for a, b in pairwise(edges)]
        self.near(np.concatenate([in_segments.forward(part, cache, all_logits=True) for part in parts]), whole)

    @pytest.mark.parametrize("cuts", [(70, 190), (97, 193), (34, 131, 226)])
    def test_cuts_into_long_batches_give_the_same_bits(self, in_segments, whole, cuts):
        cache, edges = in_segments.new_cache(300), [0, *cuts, 300]
        parts = [in_segments.forward(IDS[a:b], cache, all_logits=True) for a, b in pairwise(edges)]
        assert np.array_equal(np.concatenate(parts), whole)

    @pytest.mark.parametrize(("pos", "reached"), [(229, 229), (192, 192), (191, 160), (130, 128), (96, 96), (33, 32), (5, 0)])
    def test_going_back_ends_at_the_start_of_a_segment_or_in_the_newest_two(self, in_segments, whole, pos, reached):
        cache = in_segments.new_cache(300)
        in_segments.forward(IDS[:230], cache)
        assert cache.truncate(pos) == reached
        first = min(reached + 3, 230)
        parts = IDS[reached:first], IDS[first:230]  # it goes on in the middle of the segment
        found = [in_segments.forward(part, cache, all_logits=True) for part in parts if len(part)]
        self.near(np.concatenate(found), whole[reached:230])

    def test_going_back_a_second_time_does_not_reuse_positions_written_over(self, in_segments, whole):
        cache = in_segments.new_cache(300)
        in_segments.forward(IDS[:70], cache)
        assert cache.truncate(40) == 40
        in_segments.forward(IDS[40:41], cache)
        assert cache.truncate(20) == 0
        self.near(in_segments.forward(IDS[:70], cache, all_logits=True), whole[:70])

    def test_positions_written_over_stay_lost_when_going_back_again(self, in_segments):
        cache = in_segments.new_cache(300)
        in_segments.forward(IDS[:40], cache)
        cache.reserve(60)  # for a call that broke off
        for _ in range(2):
            assert cache.truncate(40) == 32
            cache.pos = 100  # as a session sets it, which does not know that somebody has gone back

    def test_going_back_into_restored_blocks_reaches_the_start_of_a_segment(self, in_segments, whole):
        cache, copy = in_segments.new_cache(300), in_segments.new_cache(300)
        in_segments.forward(IDS[:128], cache)
        copy.reserve(128)
        for layer in range(4):
            copy.restore(layer, 0, *cache.export(layer, 0, 128))
        copy.pos = 128
        self.near(in_segments.forward(IDS[128:135], copy, all_logits=True), whole[128:135])
        assert copy.truncate(130) == 130
        assert copy.truncate(120) == 96
        self.near(in_segments.forward(IDS[96:135], copy, all_logits=True), whole[96:135])

    @pytest.mark.parametrize("pos", [30, 62, 125])
    def test_guesses_across_an_edge_have_the_bits_of_single_tokens_and_can_be_taken_back(self, in_segments, pos):
        single, guessed = in_segments.new_cache(300), in_segments.new_cache(300)
        for one in (single, guessed):
            in_segments.forward(IDS[:pos], one)
        right = np.array([in_segments.forward([token], single) for token in IDS[pos : pos + 6]])
        wrong = [*IDS[pos : pos + 1], 9, 9, 9, 9, 9]
        assert np.array_equal(in_segments.forward(wrong, guessed, all_logits=True, alone=True)[0], right[0])
        assert guessed.truncate(pos + 1) == pos + 1
        assert np.array_equal(in_segments.forward(IDS[pos + 1 : pos + 6], guessed, all_logits=True, alone=True), right[1:])

    @pytest.mark.parametrize("pos", [64, 77, 95])
    def test_a_copy_goes_on_with_the_same_bits(self, in_segments, pos):
        cache, copy = in_segments.new_cache(300), in_segments.new_cache(200)
        in_segments.forward(IDS[:100], cache)
        assert cache.truncate(pos) == pos
        cache.copy_to(copy)
        assert copy.pos == pos
        assert np.array_equal(in_segments.forward(IDS[pos:120], copy), in_segments.forward(IDS[pos:120], cache))
        assert copy.truncate(40) == cache.truncate(40) == 32

    def test_a_copy_of_an_empty_cache_is_an_empty_cache(self, in_segments, whole):
        cache, copy = in_segments.new_cache(300), in_segments.new_cache(300)
        cache.copy_to(copy)
        assert copy.pos == 0
        assert np.array_equal(in_segments.forward(IDS, copy, all_logits=True), whole)

    def test_sequences_together_have_the_bits_of_each_alone(self, in_segments):
        caches, alone = [in_segments.new_cache(300) for _ in range(3)], [in_segments.new_cache(300) for _ in range(3)]
        for i in range(3):
            for one in (caches[i], alone[i]):
                in_segments.forward(IDS[: 31 + 17 * i], one)
        for step in range(4):
            found = in_segments.forward_each([[step + i] for i in range(3)], caches)
            assert np.array_equal(found, [in_segments.forward([step + i], alone[i]) for i in range(3)])

    def test_what_a_broken_off_call_has_written_over_is_evaluated_again(self, in_segments, whole):
        cache = in_segments.new_cache(300)
        in_segments.forward(IDS[:10], cache)
        in_segments.follow_progress = lambda done, total: in_segments.interrupt() if done > 10 else None
        try:
            with pytest.raises(KeyboardInterrupt):
                in_segments.forward(IDS[10:230], cache)
        finally:
            in_segments.follow_progress = None
        pos = cache.pos
        assert pos % 32, "the call was to be broken off within a segment"
        with pytest.raises(UsageError, match="truncate"):
            in_segments.forward(IDS[pos:230], cache)
        reached = cache.truncate(pos)
        assert reached == pos // 32 * 32
        self.near(in_segments.forward(IDS[reached:230], cache, all_logits=True), whole[reached:230])


@pytest.mark.parametrize("name", kv.TYPES)
def test_a_cache_takes_the_bytes_that_are_planned(name, tmp_path):
    model = engine_of(tiny.tiny_gguf(tmp_path / "m.gguf", **SIZES, chunk=256), name)
    cache = model.new_cache(1024)
    cache.reserve(1024)
    assert cache.nbytes == kvcache.nbytes(model.config, 1024)
    one = kvcache.nbytes(replace(model.config, kv_type="F16"), 1024)
    newest = 4 * 2 * 2 * 2 * 32 * 32 * 2 if name == "Q4_0" else 0  # layers, sides, heads, segments, positions, head size, bytes
    assert cache.nbytes == one * {"F16": 64, "Q8_0": 34, "Q4_0": 18}[name] // 64 + newest


def test_heads_that_are_no_multiple_of_a_block_are_refused(tmp_path):
    path = tiny.tiny_gguf(tmp_path / "m.gguf", head_dim=16)
    with pytest.raises(UnsupportedModelError, match=r"multiple of 32.*--kv f16"):
        engine_of(path, "Q8_0")
    with pytest.raises(UsageError, match="f16, q8_0, q4_0"):
        Model.load(path, kv="q5_1")


def means(path, n_chunks, n_windows):
    """Mean KL divergence from half precision by type."""
    return {name: kl.mean() for name, (kl, _) in divergences(path, n_chunks, n_windows).items()}


def test_the_small_model_answers_nearly_alike_with_quantized_keys_and_values():
    kl = means(environment.SMALL_MODEL, 1, 1)
    assert kl["q8_0"] <= 1e-3
    assert kl["q4_0"] <= 1e-2


@pytest.mark.slow
def test_the_small_model_answers_nearly_alike_at_depths_of_several_chunks(tmp_path):
    """With weights in F16: in 4 bits, products of int8 activations turn a rounding into another choice of experts."""
    convert(environment.SMALL_MODEL.parent / "hf", tmp_path / "f16.gguf", "F16")
    kl = means(tmp_path / "f16.gguf", 4, 12)
    assert kl["q8_0"] <= 1e-3
    assert kl["q4_0"] <= 1e-2
