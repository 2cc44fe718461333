"""Perplexity, KL divergence and agreement against their definitions, token by token."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from fakes import BOS, FakeTokenizer

from llamacli import Model
from llamacli.bench import quality
from llamacli.errors import ModelFileError, PromptError, UsageError
from llamacli.plan import placement

N_VOCAB = 11


class Numbers:
    """An engine whose logits are random numbers that depend on the tokens so far."""

    def __init__(self, seed):
        self.seed = seed

    def new_cache(self, ctx):
        return SimpleNamespace(truncate=lambda pos: None)

    def row(self, ids):
        return (3 * np.random.RandomState([self.seed, *ids]).standard_normal(N_VOCAB)).astype(np.float32)

    def forward(self, ids, cache, all_logits=False, first=0):
        return np.stack([self.row(ids[: i + 1]) for i in range(first, len(ids))])


def numbers(seed, tokens=("a", "b"), n_vocab=N_VOCAB):
    gguf = SimpleNamespace(path=f"{seed}.gguf", metadata={"tokenizer.ggml.tokens": list(tokens)})
    return SimpleNamespace(
        engine=Numbers(seed), gguf=gguf, tokenizer=SimpleNamespace(bos=0), config=SimpleNamespace(n_vocab=n_vocab)
    )


IDS = np.random.RandomState(5).randint(0, N_VOCAB, (4, 9))


def probabilities(engine, ids):
    logits = engine.row(ids).astype(np.float64)
    return np.exp(logits) / np.exp(logits).sum()


def pairs(model, other):
    """(p, q, next token) of every scored position: those of the second half that have a next token."""
    for window in IDS:
        for at in range(4, 8):
            yield probabilities(other.engine, window[: at + 1]), probabilities(model.engine, window[: at + 1]), window[at + 1]


@pytest.mark.parametrize("block", [1, 30, 1 << 21])
def test_the_record_is_what_the_definitions_say(monkeypatch, block):
    monkeypatch.setattr(quality, "BLOCK", block)
    model, other = numbers(1), numbers(2)
    record = quality.perplexity(model, IDS, other)
    positions = list(pairs(model, other))
    losses = [-np.log(q[token]) for _, q, token in positions]
    kl = [(p * np.log(p / q)).sum() for p, q, _ in positions]
    assert record["tokens"] == len(positions) == 16
    assert (record["windows"], record["ctx"]) == (4, 9)
    wanted = {
        "perplexity": np.exp(np.mean(losses)),
        "perplexity_error": np.exp(np.mean(losses)) * np.std(losses, ddof=1) / 4,
        "reference_perplexity": np.exp(np.mean([-np.log(p[token]) for p, _, token in positions])),
        "kl_mean": np.mean(kl),
        "kl_error": np.std(kl, ddof=1) / 4,
        "kl_median": np.median(kl),
        "kl_p99": np.quantile(kl, 0.99),
        "kl_max": max(kl),
        "top1_agreement": np.mean([p.argmax() == q.argmax() for p, q, _ in positions]),
    }
    for name, value in wanted.items():
        assert record[name] == pytest.approx(value, 1e-9), name


def test_the_divergence_of_a_model_from_itself_is_zero():
    record = quality.perplexity(numbers(1), IDS, numbers(1))
    assert record["kl_max"] == pytest.approx(0, abs=1e-12)
    assert record["top1_agreement"] == 1
    assert record["perplexity"] == record["reference_perplexity"]


def test_without_a_reference_there_is_no_divergence():
    assert not [name for name in quality.perplexity(numbers(1), IDS) if name.startswith(("kl", "top1", "reference"))]


@pytest.mark.parametrize("other", [{"tokens": ("a", "c")}, {"n_vocab": 12}])
def test_another_vocabulary_is_refused(other):
    with pytest.raises(UsageError, match=r"2\.gguf: expected the vocabulary of 1\.gguf"):
        quality.perplexity(numbers(1), IDS, numbers(2, **other))


def test_logits_that_are_not_finite_are_refused(monkeypatch):
    monkeypatch.setattr(Numbers, "row", lambda self, ids: np.full(N_VOCAB, np.nan, np.float32))
    with pytest.raises(ModelFileError, match=r"1\.gguf: expected finite logits"):
        quality.perplexity(numbers(1), IDS)


def test_each_window_begins_with_bos_in_the_place_of_a_token():
    found = quality.windows(FakeTokenizer(), "abcdefghijklmnopqrst", 8)
    assert [bytes(row[1:].tolist()) for row in found] == [b"abcdefg", b"ijklmno"]
    assert (found[:, 0] == BOS).all()


@pytest.mark.parametrize("text", ["", "abcdef"])
def test_a_text_shorter_than_a_window_is_refused(text):
    with pytest.raises(PromptError, match=f"window of 8 tokens, found {len(text) + 1}"):
        quality.windows(FakeTokenizer(), text, 8)


def test_a_window_too_short_to_score_is_refused():
    with pytest.raises(UsageError, match="at least 8"):
        quality.windows(FakeTokenizer(), "abcdefghi", 7)


def test_the_record_after_some_windows_covers_these():
    """As after Ctrl-C."""
    scores = quality.Scores(numbers(1), *IDS.shape, numbers(2))
    assert scores.label == ""
    for n, window in enumerate(IDS[:3], 1):
        scores.add(window)
        found, whole = scores.record(), quality.perplexity(numbers(1), IDS[:n], numbers(2))
        assert found.keys() == whole.keys()
        assert all(found[name] == whole[name] for name in whole if name != "tokens_per_second")
        assert scores.label == f"perplexity {whole['perplexity']:.4g}"


def test_a_window_that_is_interrupted_is_not_scored(monkeypatch):
    def interrupted(self, ids):
        raise KeyboardInterrupt

    scores = quality.Scores(numbers(1), *IDS.shape)
    scores.add(IDS[0])
    monkeypatch.setattr(Numbers, "row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scores.add(IDS[1])
    assert scores.record()["windows"] == scores.scored == 1


def test_the_engine_gives_logits_from_a_position_on(tmp_path):
    """Over several batches and blocks of logits."""
    model = Model.load(tiny.tiny_gguf(tmp_path / "tiny.gguf", chunk=100), 2, 256)
    ids = np.random.RandomState(1).randint(0, 257, 250)
    whole = model.logits(ids)
    for first in (1, 99, 100, 130, 249):
        part = model.engine.forward(ids, model.engine.new_cache(250), all_logits=True, first=first)
        np.testing.assert_allclose(part, whole[first:], atol=1e-5)


def test_logits_that_are_kept_are_in_memory_once(tmp_path):
    """Half a window of a large vocabulary takes hundreds of megabytes, which --memory counts once."""
    model = Model.load(tiny.tiny_gguf(tmp_path / "tiny.gguf", chunk=1024), 2, 1024)
    ids, cache = np.random.RandomState(1).randint(0, 257, 1000), model.engine.new_cache(1024)
    model.engine.forward(ids, cache)
    cache.truncate(0)
    tracemalloc.start()
    try:
        logits = model.engine.forward(ids, cache, all_logits=True)
        assert tracemalloc.get_traced_memory()[1] < 1.5 * logits.nbytes
    finally:
        tracemalloc.stop()


def test_memory_held_beside_a_model_is_taken_from_its_limit(tmp_path, monkeypatch, no_other_model):
    """Perplexity holds the logits of a window."""
    path, seen = tiny.tiny_gguf(tmp_path / "tiny.gguf"), []
    real = placement.place
    monkeypatch.setattr(placement, "place", lambda *args, **more: seen.append(args[2]) or real(*args, **more))
    for rows in (0, 256):
        with Model.load(path, 1, 64, memory=10**9, logits_rows=rows) as model:
            n_vocab = model.config.n_vocab
    assert seen[0] - seen[1] == 4 * 256 * n_vocab
