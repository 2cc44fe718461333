"""Prompts: segments become tokens; sessions reuse a prefix only with the same pictures; penalties skip pictures."""

import numpy as np
import pytest
import tiny

from llamacli import Model
from llamacli.errors import PromptError, UsageError
from llamacli.prompt import Features, tokens
from llamacli.session import Session
from llamacli.text.sampler import Sampler

PATCH = 280
ROWS = np.random.RandomState(0).standard_normal((5, 64)).astype(np.float32)


def picture(digest, rows=ROWS):
    return Features(PATCH, rows, digest)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with Model.load(tiny.tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf"), threads=2) as model:
        yield model


def test_segments_become_one_token_for_each_position():
    found = tokens([[1, 2], picture(b"a"), 3])
    assert list(map(int, found)) == [1, 2, *[PATCH] * 5, 3]
    assert tokens([1, 2, 3]) == [1, 2, 3]
    assert tokens(found) == found


def test_rows_are_the_same_token_if_the_same_content_made_them():
    same, other = tokens([picture(b"a", ROWS.copy())]), tokens([picture(b"b")])
    assert tokens([picture(b"a")]) == same != other
    assert same[0] != same[1]
    assert same[0] != PATCH


def test_rows_that_are_no_matrix_are_refused():
    with pytest.raises(PromptError):
        tokens([picture(b"", ROWS[0])])


@pytest.mark.parametrize(("second", "reused"), [(b"a", 13), (b"b", 0)], ids=["the same picture", "another picture"])
def test_a_prefix_is_reused_up_to_the_first_other_picture(model, second, reused):
    rows = ROWS if second == b"a" else ROWS[::-1]
    session, fresh = model.session(64), model.session(64)
    session.sync([[1, 2, 3], picture(b"a"), [4, 5, 6, 7, 8, 9]])
    found = session.sync([[1, 2, 3], picture(second, rows), [4, 5, 6, 7, 8, 10]])
    assert session.stats.cached_tokens == reused  # back into the first chunk of 8, whose start the ring has lost: 0
    expected = fresh.sync([[1, 2, 3], picture(second, rows), [4, 5, 6, 7, 8, 10]])
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_a_penalty_sees_words_only(model):
    seen = []

    class Watching(Sampler):
        def pick(self, logits, history):
            seen.append(list(history))
            return super().pick(logits, history)

    session = Session(model.engine, model.tokenizer, 64)
    list(session.stream([[1, 2], picture(b"a"), 3], Watching(temp=0), max_tokens=2))
    assert seen[0] == [1, 2, 3]


def test_a_closed_model_says_so(tmp_path):
    with Model.load(tiny.tiny_gguf(tmp_path / "tiny.gguf"), threads=1) as model:
        model.logits([1, 2])
    with pytest.raises(UsageError, match="closed"):
        model.logits([1, 2])
