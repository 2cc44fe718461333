"""Sampler: the documented order, exact candidates, correct frequencies, unchanged logits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamacli.errors import LlamacliError, UsageError
from llamacli.text.sampler import Sampler

PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.3, 0.15])
LOGITS = np.log(PROBABILITIES).astype(np.float32)
PLAIN = {"temp": 1.0, "top_p": 1.0}


def seen(n=400, logits=LOGITS, history=(), **settings):
    """The ids that come up in `n` draws."""
    sampler = Sampler(**{**PLAIN, "seed": 0, **settings})
    return {sampler.pick(logits, history) for _ in range(n)}


def test_temp_0_is_the_largest_logit():
    assert seen(temp=0) == {1}


def test_frequencies_are_the_probabilities():
    sampler = Sampler(**PLAIN, seed=3)
    counts = np.bincount([sampler.pick(LOGITS, []) for _ in range(20000)], minlength=5) / 20000
    np.testing.assert_allclose(counts, PROBABILITIES, atol=0.015)


def test_temperature_sharpens_and_flattens():
    for temp in (0.5, 2.0):
        sampler = Sampler(temp=temp, top_p=1.0, seed=3)
        counts = np.bincount([sampler.pick(LOGITS, []) for _ in range(20000)], minlength=5) / 20000
        expected = PROBABILITIES ** (1 / temp)
        np.testing.assert_allclose(counts, expected / expected.sum(), atol=0.015)


@pytest.mark.parametrize("k, expected", [(1, {1}), (2, {1, 3}), (3, {1, 3, 4}), (5, {0, 1, 2, 3, 4}), (9, {0, 1, 2, 3, 4})])
def test_top_k_keeps_the_k_most_probable(k, expected):
    assert seen(top_k=k) == expected


@pytest.mark.parametrize("p, expected", [(0.0, {1}), (0.39, {1}), (0.41, {1, 3}), (0.69, {1, 3}), (0.84, {1, 3, 4})])
def test_top_p_keeps_the_fewest_that_reach_it(p, expected):
    assert seen(top_p=p) == expected


@pytest.mark.parametrize("p, expected", [(0.0, {0, 1, 2, 3, 4}), (0.2, {1, 2, 3, 4}), (0.5, {1, 3}), (1.0, {1})])
def test_min_p_keeps_what_has_that_share_of_the_best(p, expected):
    assert seen(min_p=p) == expected


def test_top_p_counts_what_top_k_left():
    """0.4 and 0.3 are left, and 0.4 of 0.7 is more than half."""
    assert seen(top_k=2, top_p=0.5) == {1}
    assert seen(top_p=0.5) == {1, 3}


def test_temperature_comes_before_top_p():
    """At temp 0.25 the best has two thirds of the weight, at 1 it has 0.4."""
    assert seen(temp=0.25, top_p=0.6) == {1}
    assert seen(temp=1.0, top_p=0.6) == {1, 3}


def test_hidden_ids_never_come_up():
    assert seen(hidden_ids=np.array([1, 3])) == {0, 2, 4}
    assert seen(hidden_ids=np.array([1, 3]), temp=0) == {4}
    assert seen(hidden_ids=np.array([1, 99, -4]), temp=0) == {3}


def test_repeat_penalty_works_on_both_signs():
    logits = np.array([2.0, 1.9, -1.0, -1.1], np.float32)
    assert seen(logits=logits, temp=0, repeat_penalty=1.2, history=[0]) == {1}
    assert seen(logits=logits - 3.0, temp=0, repeat_penalty=1.2, history=[0]) == {1}
    assert seen(logits=logits, temp=0, history=[0]) == {0}


def test_repeat_penalty_forgets():
    logits = np.array([2.0, 1.9], np.float32)
    assert seen(logits=logits, temp=0, repeat_penalty=1.2, history=[0] + [5] * 64) == {0}


def test_a_seed_makes_it_repeatable_and_none_does_not():
    flat = np.zeros(1000, np.float32)

    def draws(seed):
        sampler = Sampler(**PLAIN, seed=seed)
        return [sampler.pick(flat, []) for _ in range(20)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert draws(None) != draws(None)


def test_logits_are_left_alone():
    logits = LOGITS.copy()
    logits.flags.writeable = False
    Sampler(repeat_penalty=1.3, hidden_ids=np.array([1])).pick(logits, [0, 1])
    assert (logits == LOGITS).all()


@pytest.mark.parametrize("settings", [{}, {"temp": 0}, {"top_k": 1}, {"repeat_penalty": 1.2}], ids=str)
def test_logits_that_are_no_numbers_are_an_error(settings):
    for logits in ([np.nan, 1.0, -np.inf, 2.0], [1.0, 2.0, np.nan], [-np.inf] * 3):
        with pytest.raises(LlamacliError, match="logits to be numbers"):
            Sampler(**settings).pick(np.array(logits, np.float32), [1])
    with pytest.raises(LlamacliError, match="none that may be sampled"):
        Sampler(**settings, hidden_ids=np.arange(3)).pick(np.ones(3, np.float32), [])


def test_infinite_logits_are_not_fatal():
    assert seen(logits=np.array([1.0, np.inf, -np.inf], np.float32)) == {1}
    assert seen(logits=np.array([1.0, -np.inf, -np.inf], np.float32)) == {0}


@pytest.mark.parametrize("n", [200, 1000, 20_000])
def test_a_flat_choice_among_many_is_not_cut_short(n):
    """Half of the tokens have half of the weight, however many these are."""
    found = seen(4000, logits=np.linspace(0.001, 0, n, dtype=np.float32), top_p=0.5)
    assert 0.48 * n < max(found) <= 0.5 * n
    assert min(found) < 0.02 * n


@given(st.integers(0, 2**32), st.floats(0.3, 2.0), st.integers(0, 700), st.floats(0.0, 1.0), st.floats(0.0, 0.5))
def test_large_vocabularies_are_cut_exactly_as_by_sorting_all(seed, temp, top_k, top_p, min_p):
    logits = (np.random.default_rng(seed).normal(size=3000) * 2).astype(np.float32)
    order = np.argsort(-logits, kind="stable")
    weights = np.exp((logits[order].astype(np.float64) - logits[order[0]]) / temp)[: top_k or None]
    share = np.cumsum(weights) / weights.sum()
    stay = weights >= min_p
    if top_p < 1:
        stay &= share - weights / weights.sum() < top_p
    allowed = set(order[: len(weights)][stay]) | {order[0]}
    sampler = Sampler(temp=temp, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    found = {sampler.pick(logits, []) for _ in range(20)}
    border = order[min(int(stay.sum()), len(order) - 1)]  # rounding of the sums may let one more in
    assert found <= allowed | {border}


@pytest.mark.parametrize(
    "settings",
    [
        {"temp": -1},
        {"temp": float("nan")},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"top_k": -1},
        {"repeat_penalty": 0},
        {"repeat_penalty": 1e-46},
        {"repeat_penalty": 1e38},
    ],
    ids=str,
)
def test_senseless_settings_are_refused(settings):
    with pytest.raises(UsageError):
        Sampler(**settings)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temp", [1e20, 1e39, 1e300])
def test_at_a_temperature_past_all_measure_all_but_the_hidden_are_alike(temp):
    sampler = Sampler(temp=temp, top_p=1.0, seed=1, hidden_ids=np.array([3]))
    logits = np.array([0.0, 3.0, -1e30, 5.0], np.float32)
    assert {sampler.pick(logits) for _ in range(100)} == {0, 1, 2} if temp > 1e30 else {0, 1}
    assert Sampler(temp=temp, seed=1).pick(logits) in range(4)


@pytest.mark.filterwarnings("error")
def test_a_temperature_near_zero_is_greedy_without_warnings():
    assert Sampler(temp=1e-320).pick(np.array([0.0, 3.0, 2.0], np.float32)) == 1
