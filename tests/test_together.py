"""Several sessions answer at once: each as it does alone, whatever the others do."""

import numpy as np
import pytest
import tiny
from fakes import BOS, HEADER, FakeEngine, FakeTokenizer, Greedy

from llamacli.cpu.kernels.ops import matmul
from llamacli.engine import Engine
from llamacli.errors import ContextFullError, MemoryLimitError
from llamacli.files.gguf import open_gguf
from llamacli.llama4.config import Config
from llamacli.session import Session
from llamacli.text.sampler import Sampler
from llamacli.together import Answers, Request, answer_together, sample_several


def requests(engine, prompts, ctx=256, **how):
    return [Request(Session(engine, FakeTokenizer(), ctx), prompt, Greedy(), **how) for prompt in prompts]


PROMPTS = [[BOS, *range(n), HEADER] for n in (3, 17, 8, 1, 30)]


def collected(answers):
    found = {}
    for number, piece in answers:
        found.setdefault(number, []).append(piece)
    return found


@pytest.mark.parametrize("width", [1, 2, 3, 8])
def test_each_answer_is_the_one_given_alone(width):
    engine = FakeEngine()
    found = collected(answer_together(requests(engine, PROMPTS, max_tokens=20), width))
    for number, prompt in enumerate(PROMPTS):
        assert found[number] == list(Session(FakeEngine(), FakeTokenizer(), 256).stream(prompt, Greedy(), 20))
    assert max(engine.widths) == min(width, len(PROMPTS))


def test_answers_of_several_lengths_leave_their_place_to_the_next():
    engine = FakeEngine()
    asked = [request._replace(max_tokens=n) for request, n in zip(requests(engine, PROMPTS), (1, 9, 2, 30, 4), strict=True)]
    found = collected(answer_together(asked, 2))
    assert [found[n][-1].finish_reason for n in range(5)] == ["length"] * 5
    assert [len(found[n]) - 1 for n in range(5)] == [1, 9, 2, 30, 4]


def test_an_error_ends_its_own_request_alone():
    engine = FakeEngine()
    found = collected(answer_together(requests(engine, [PROMPTS[0], [1] * 100, PROMPTS[1]], ctx=40, max_tokens=5)))
    assert isinstance(found[1][0], ContextFullError)
    assert found[0][-1].finish_reason == found[2][-1].finish_reason == "length"


def test_an_interrupt_ends_all_and_leaves_sessions_usable():
    engine = FakeEngine()
    asked, pieces = requests(engine, PROMPTS[:3], max_tokens=20), []
    with pytest.raises(KeyboardInterrupt):
        for number, piece in answer_together(asked):
            pieces.append((number, piece))
            if len(pieces) == 10:
                engine.break_after = 0
    assert {number for number, piece in pieces if piece.finish_reason == "interrupt"} == {0, 1, 2}
    for request, prompt in zip(asked, PROMPTS, strict=False):
        again = list(request.session.stream(prompt, Greedy(), 20))
        assert again == list(Session(FakeEngine(), FakeTokenizer(), 256).stream(prompt, Greedy(), 20))


def test_an_interrupt_before_a_loop_has_begun_does_not_begin_it():
    engine = FakeEngine()
    asked, answers = requests(engine, PROMPTS[:3], max_tokens=20), Answers()
    list(answers.begin(0, asked[0]))
    answers.begin(1, asked[1])  # nobody has taken its first piece yet
    list(answers.begin(2, asked[2]))
    told = list(answers.interrupt(KeyboardInterrupt()))
    assert [(number, piece.finish_reason) for number, piece in told] == [(0, "interrupt"), (2, "interrupt")]
    assert asked[1].session.ids == [] and len(engine.calls) == 2


def test_an_interrupt_while_the_next_prompt_is_waited_for_ends_those_under_way_alone():
    engine = FakeEngine()
    asked, pieces = requests(engine, PROMPTS[:2], max_tokens=20), []

    def coming():
        yield from asked
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        for number, piece in answer_together(coming()):
            pieces.append((number, piece.finish_reason))
    assert {number for number, reason in pieces if reason == "interrupt"} == {0, 1}


@pytest.mark.parametrize("fails", ["together", "alone"])
def test_an_error_of_a_step_ends_only_requests_that_also_fail_alone(fails):
    class Faulty(FakeEngine):
        def forward(self, ids, cache, **more):
            if fails == "alone" and len(ids) == 1 and cache.ctx == 200:
                raise ValueError("broken")
            return super().forward(ids, cache, **more)

        def forward_each(self, ids, caches):
            if len(ids) > 1:
                super().forward_each(ids[:1], caches[:1])  # one is finished when the call fails
                raise MemoryLimitError("short")
            return super().forward_each(ids, caches)

    engine = Faulty()
    asked = [*requests(engine, PROMPTS[:2], max_tokens=20), *requests(engine, PROMPTS[2:3], ctx=200, max_tokens=20)]
    found = collected(answer_together(asked))
    for number, prompt in enumerate(PROMPTS[:3]):
        if number < 2 or fails == "together":
            assert found[number] == list(Session(FakeEngine(), FakeTokenizer(), 256).stream(prompt, Greedy(), 20))
        else:
            assert isinstance(found[number][-1], ValueError) and len(found[number]) == 2


# over the engine

SIZES = {"n_embd": 256, "head_dim": 32, "n_ff": 256, "n_ff_exp": 256, "chunk": 16}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """Weights in F32: if products add in another order, only the last bits differ."""
    gguf = open_gguf(tiny.tiny_gguf(tmp_path_factory.mktemp("model") / "m.gguf", **SIZES))
    return Engine(gguf, Config.from_gguf(gguf), 2)


def sequences(engine, count):
    """Caches at positions of their own, on both sides of chunk edges, and the tokens before."""
    texts = [np.random.RandomState(n).randint(0, 250, 5 + 11 * n).tolist() for n in range(count)]
    caches = [engine.new_cache(200) for _ in texts]
    for text, cache in zip(texts, caches, strict=True):
        engine.forward(text, cache)
    return texts, caches


@pytest.mark.parametrize("shape", [tiny.SCOUT, tiny.MAVERICK, {"used": 2}], ids=["scout", "maverick", "two experts"])
@pytest.mark.parametrize("kind", ["F32", "BF16", "Q4_0", "Q4_K", "Q6_K", "Q8_0", "Q4_0 in slots"])
def test_single_tokens_of_sequences_give_the_bytes_of_each_alone(kind, shape, tmp_path):
    """As many as share the unpacking of rows, whatever experts they choose."""
    kind, _, slots = kind.partition(" ")
    gguf = open_gguf(tiny.tiny_gguf(tmp_path / "m.gguf", types=lambda name: kind, heads=8, **SIZES | shape))
    engine, most = Engine(gguf, Config.from_gguf(gguf), 2, slots=10 if slots else 0), matmul.few_tokens() - 1
    (_, caches), (_, alone) = sequences(engine, most), sequences(engine, most)
    for count in [*range(2, most + 1), *[most] * 3]:
        ids = [[count * 7 + n] for n in range(count)]
        together = engine.forward_each(ids, caches[:count])
        assert np.array_equal(together, [engine.forward(some, cache) for some, cache in zip(ids, alone, strict=False)])


@pytest.mark.parametrize("lengths", [(1,) * 8, (1, 3, 1, 40), (70, 1, 20), (100, 100)])
def test_sequences_together_are_each_alone_but_for_rounding(engine, lengths):
    """Runs over chunk edges, and more tokens than a batch holds."""
    _, caches = sequences(engine, len(lengths))
    _, alone = sequences(engine, len(lengths))
    ids = [np.random.RandomState(50 + n).randint(0, 250, length).tolist() for n, length in enumerate(lengths)]
    engine._most, before = 64, engine._most
    try:
        found = engine.forward_each(ids, caches)
    finally:
        engine._most = before
    expected = np.array([engine.forward(some, cache) for some, cache in zip(ids, alone, strict=True)])
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())
    assert [cache.pos for cache in caches] == [cache.pos for cache in alone]


@pytest.mark.parametrize("length", [5, 16, 17, 40])
def test_a_fork_goes_on_by_itself(engine, length):
    text = np.random.RandomState(length).randint(0, 250, length).tolist()
    session = Session(engine, None, 100)
    session.eval(text)
    other = session.fork()
    assert np.array_equal(other.eval([1]), session.eval([1]))
    other.eval([2, 3])
    for prompt in ([*text, 9], text[: length // 2]):
        found = [s.sync(prompt) for s in (session, other, Session(engine, None, 100))]
        np.testing.assert_allclose(found[1], found[0], atol=1e-3 * np.abs(found[0]).max())
        np.testing.assert_allclose(found[1], found[2], atol=1e-3 * np.abs(found[0]).max())


@pytest.mark.parametrize("length", [12, 16, 70])
def test_each_of_several_samples_equals_the_one_of_its_seed_alone(engine, length):
    """A prompt within a chunk, up to its edge, over several; more answers than go together."""
    prompt = np.random.RandomState(length).randint(0, 250, length).tolist()
    hidden = np.arange(256, 288)

    def samplers():
        return [Sampler(temp=1.0, top_p=1.0, seed=n, hidden_ids=hidden) for n in range(5)]

    found = collected(sample_several(Session(engine, FakeTokenizer(), 200), prompt, samplers(), 20, width=3))
    for number, sampler in enumerate(samplers()):
        assert found[number] == list(Session(engine, FakeTokenizer(), 200).stream(prompt, sampler, 20))
    assert len({tuple(piece.id for piece in pieces) for pieces in found.values()}) == 5


def test_samples_evaluate_their_prompt_once():
    engine = FakeEngine()
    samples = sample_several(Session(engine, FakeTokenizer(), 256), PROMPTS[4], [Greedy() for _ in range(3)], 5)
    assert len(collected(samples)) == 3
    assert [len(ids) for _, ids in engine.calls if len(ids) > 1] == [len(PROMPTS[4])]
