"""Guesses change the time of an answer, never its text: with a fake engine, and with the real one to the byte."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
from fakes import BOS, EOT, HEADER, FakeEngine, FakeTokenizer, Greedy, Scripted

from llamacli.engine import Engine
from llamacli.files.gguf import open_gguf
from llamacli.llama4.config import Config
from llamacli.positions import LEAST
from llamacli.session import Session
from llamacli.speculation import FIRST, MEASURED, MOST, PAUSE, Guesses
from llamacli.text.sampler import Sampler

REPLY = "the cat saw the cat saw the cat and the cat saw the dog"


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Guess whenever something repeats, however long it takes."""
    monkeypatch.setattr("llamacli.session.Guesses", lambda ids: Guesses(ids, settles=False))


def session(engine, ctx=256, speculate=True):
    found = Session(engine, FakeTokenizer(), ctx)
    found.speculate = speculate
    return found


# the loop


@pytest.mark.parametrize("chunk", [8, 64])
@pytest.mark.parametrize("how", [{}, {"max_tokens": 20}, {"max_tokens": 21}, {"stop": ["and"]}, {"stop": ["saw the d"]}])
def test_the_pieces_are_the_same_with_fewer_evaluations(how, chunk):
    plain, guessing = (session(Scripted(REPLY, chunk=chunk), speculate=on) for on in (False, True))
    expected = list(plain.stream([BOS, 1, HEADER], Greedy(), **how))
    assert list(guessing.stream([BOS, 1, HEADER], Greedy(), **how)) == expected
    assert guessing.stats.accepted > 0
    assert len(guessing.engine.calls) < len(plain.engine.calls)
    assert guessing.stats.completion_tokens == plain.stats.completion_tokens


@pytest.mark.parametrize("chunk", [8, 32])
@pytest.mark.parametrize("length", range(3, 40, 3))
def test_wrong_guesses_leave_no_trace_in_the_cache(length, chunk):
    """The fake engine's logits change with every token that the cache should not hold."""
    prompt = [BOS, *([5, 6, 7, 8] * 10)[:length], HEADER]
    plain, guessing = (session(FakeEngine(chunk=chunk), speculate=on) for on in (False, True))
    for _ in range(2):
        expected = list(plain.stream(prompt, Greedy(), 40))
        assert list(guessing.stream(prompt, Greedy(), 40)) == expected
        prompt = [*prompt, *(piece.id for piece in expected if piece.id is not None), EOT, 5, 6, 7, HEADER]


def test_a_full_context_ends_at_the_same_token():
    for ctx in range(20, 40):
        plain, guessing = (session(Scripted(REPLY, chunk=8), ctx, on) for on in (False, True))
        assert list(guessing.stream([BOS, HEADER], Greedy())) == list(plain.stream([BOS, HEADER], Greedy()))


def test_an_abandoned_or_interrupted_answer_holds_only_accepted_tokens():
    guessing = session(Scripted(REPLY, chunk=64))
    answer, said = guessing.stream([BOS, 1, HEADER], Greedy()), []
    for piece in answer:
        said.append(piece.id)
        if len(said) == 25:
            break
    answer.close()
    assert guessing.stats.accepted > 0
    assert guessing.ids == [BOS, 1, HEADER, *said][: len(guessing.ids)]
    assert "".join(p.text for p in guessing.stream([BOS, 1, HEADER], Greedy())) == REPLY


def test_an_answer_that_was_left_takes_nothing_from_what_the_session_holds_since():
    """It ends whenever it is forgotten, perhaps in the middle of the next one."""
    guessing, prompt = session(Scripted(REPLY, chunk=64)), [BOS, 1, HEADER]
    left = guessing.stream(prompt, Greedy())
    said = 0
    while len(guessing.ids) <= len(prompt) + said:  # until there are guesses that are not said yet
        said += next(left).id is not None
    following = guessing.stream([BOS, 2, HEADER], Greedy())
    text = [next(following).text for _ in range(9)]
    held = list(guessing.ids)
    left.close()
    assert guessing.ids == held
    assert "".join([*text, *(piece.text for piece in following)]) == REPLY


# guesses


def test_tokens_after_the_last_repetition_are_proposed():
    guesses = Guesses([1, 2, 3, 4, 5, 1, 2, 3, 9, 9, 8, 1, 2], settles=False)
    assert guesses.propose(3) == [3, 9, 9]
    guesses.said(3)
    assert guesses.propose(100) == [9, 9, 8, 1, 2, 3, 9][:FIRST]
    assert guesses.propose(0) == []
    guesses.said(77)
    assert guesses.propose(5) == []


def test_guessing_pauses_longer_each_time_it_does_not_pay():
    guesses, proposed = Guesses([1, 2, 3, 4] * 4), []
    for step in range(20 * PAUSE):
        found = guesses.propose(MOST)
        proposed.append(bool(found))
        guesses.spent(5.0 if found else 1.0, bool(found))
        guesses.said([1, 2, 3, 4][step % 4])
    assert proposed[:1] == [False]  # a single evaluation is measured first
    first = proposed.index(True)
    assert proposed[first : first + MEASURED] == [True] * MEASURED
    assert sum(proposed) == MEASURED * 5  # with pauses of 16, 32, 64 and 128 between them
    assert not any(proposed[first + MEASURED : first + MEASURED + PAUSE])


def test_guessing_continues_while_it_pays():
    guesses = Guesses([1, 2, 3, 4] * 4)
    at = 0
    for _ in range(100):
        found = guesses.propose(MOST)
        guesses.spent(2.0 if found else 1.0, bool(found))
        for _ in range(len(found) + 1):
            guesses.said([1, 2, 3, 4][at % 4])
            at += 1
    assert len(found) == MOST


def test_right_guesses_make_more_and_wrong_ones_fewer():
    guesses, lengths, at = Guesses([1, 2, 3, 4] * 4, settles=False), [], 0
    for right in (True, True, False, True, True, True):
        found = guesses.propose(100)
        lengths.append(len(found))
        guesses.spent(1.0, True)
        for _ in range(len(found) + 1 if right else 1):
            guesses.said([1, 2, 3, 4][at % 4])
            at += 1
    assert lengths == [FIRST, MOST, MOST, 1, 4, MOST]


@pytest.mark.parametrize("words", [256, 30])
def test_random_words_cost_little(words):
    """A token of a batch costs as much as a single one: the highest cost of a wrong guess."""
    text = np.random.default_rng(0).integers(0, words, 4000).tolist()
    guesses, drafted, at = Guesses(text[:1000]), 0, 1000
    while at < len(text):
        found = guesses.propose(100)
        drafted += len(found)
        guesses.spent(1.0 + len(found), bool(found))
        right = next((n for n, id in enumerate(found) if id != text[at + n]), len(found)) if found else 0
        for id in text[at : at + right + 1]:
            guesses.said(id)
        at += right + 1
    assert drafted < 0.03 * 3000


# the engine


@pytest.mark.parametrize(
    "shape", [tiny.SCOUT, tiny.MAVERICK, {"used": 2}, {"heads": 16}], ids=["scout", "maverick", "two experts", "16 heads"]
)
@pytest.mark.parametrize("kind", ["F32", "Q4_0", "Q4_K", "Q8_0"])
def test_tokens_together_have_the_bits_of_each_alone(kind, shape, tmp_path):
    sizes = {"n_embd": 256, "head_dim": 64, "heads": 8, "kv_heads": 1, "n_ff": 256, "n_ff_exp": 256, "chunk": 32}
    gguf = open_gguf(tiny.tiny_gguf(tmp_path / "m.gguf", types=lambda name: kind, **sizes | shape))
    model, ids = Engine(gguf, Config.from_gguf(gguf), 2), np.random.RandomState(0).randint(0, 250, 90).tolist()
    cache, single = model.new_cache(100), model.new_cache(100)
    for cached in (cache, single):
        model.forward(ids[:20], cached)
    at = 20
    while at < 82:
        n = 1 + at % 8
        found = model.forward(ids[at : at + n], cache, all_logits=True, alone=True)
        assert np.array_equal(found, [model.forward([id], single) for id in ids[at : at + n]])
        at += n


def test_guesses_are_of_two_segments_at_most():
    """Otherwise wrong ones could not be truncated: only the newest two segments are held (positions.py)."""
    assert MOST <= LEAST


@pytest.mark.parametrize("settings", [{"temp": 0.0}, {"temp": 0.8, "seed": 3}, {"temp": 0.5, "seed": 1, "repeat_penalty": 1.1}])
@pytest.mark.parametrize(("kv_type", "chunk"), [("F16", 32), ("Q4_0", 32), ("Q4_0", 44)])
def test_sampled_text_is_the_same(settings, kv_type, chunk, tmp_path):
    """A model with few words, which repeats itself, over several edges of chunks and of segments."""
    sizes = {"n_embd": 256, "head_dim": 64, "n_ff": 256, "n_ff_exp": 256, "chunk": chunk}
    gguf = open_gguf(tiny.tiny_gguf(tmp_path / "m.gguf", types=lambda name: "Q4_0", **sizes))
    model = Engine(gguf, replace(Config.from_gguf(gguf), kv_type=kv_type), 2)
    found, accepted = [], 0
    for speculate in (False, True):
        s = Session(model, FakeTokenizer(), 300)
        s.speculate = speculate
        few = {id: 8.0 for id in (65, 66)}
        sampler = Sampler(**settings, logit_bias=few, hidden_ids=np.arange(256, 288))
        found.append([piece.id for piece in s.stream([1, 2, 3] * 5, sampler, 150)])
        accepted = s.stats.accepted
    assert found[0] == found[1]
    assert accepted > 10
