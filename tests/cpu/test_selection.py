"""Selection among weights, against sorting all of them."""

import numpy as np
import pytest

from llamacli.cpu.kernels.ops.selection import draw, fewest, select


def by_sorting(weights, share):
    """Ids in descending order of weight, of equal ones the lowest first, until they add up; in float64."""
    order = np.lexsort((np.arange(len(weights)), -weights))
    total = np.cumsum(weights[order], dtype=np.float64)
    return np.sort(order[: np.searchsorted(total, share * weights.sum(dtype=np.float64), "left") + 1])


def kept(weights, *limits):
    weights = np.array(weights, np.float32)
    return select(weights, fewest(weights, *limits)).tolist()


@pytest.mark.parametrize("n", [1, 2, 3, 5, 257, 20_001])
@pytest.mark.parametrize("spread", [0.0, 0.001, 1.0, 10.0])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_the_fewest_are_those_that_sorting_finds(n, spread, share):
    random = np.random.default_rng(n)
    weights = np.exp(random.normal(0, spread, n)).astype(np.float32)
    for some in (weights, np.round(weights / weights.max() * 64) / np.float32(64)):  # the latter: many are equal, some are 0
        bound, expected = fewest(some, share), by_sorting(some, share)
        assert np.array_equal(select(some, bound), expected)
        assert bound.count == len(expected)
        assert bound.total == pytest.approx(some[expected].sum(dtype=np.float64), rel=1e-12)


@pytest.mark.parametrize("n", [2, 255, 256, 257, 20_001])
@pytest.mark.parametrize("spread", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("share", [0.5, 0.9, None])
def test_a_draw_is_the_first_at_which_they_add_up_to_more(n, spread, share):
    random = np.random.default_rng(n)
    weights = np.exp(random.normal(0, spread, n)).astype(np.float32)
    for some in (weights, np.round(weights / weights.max() * 64) / np.float32(64)):
        bound = fewest(some, share)
        ids = select(some, bound)
        total = np.cumsum(some[ids], dtype=np.float64)
        for u in [0.0, *random.random(20), np.nextafter(1, 0)]:
            at = np.searchsorted(total, u * total[-1] * (1 - 1e-12), "right")
            assert draw(some, bound, u) == ids[at]


def test_of_equal_weights_the_first_stay():
    weights = [0.5, 0.25, 0.25, 0.25, 1.0, 0.75]
    assert kept(weights, 2.5 / 3) == [0, 1, 4, 5]
    assert kept(weights, 2.51 / 3) == [0, 1, 2, 4, 5]
    assert kept(weights, 0.999) == [0, 1, 2, 3, 4, 5]


def test_equal_weights_in_several_blocks_are_drawn_until_they_no_longer_stay():
    weights = np.full(1000, 0.25, np.float32)
    bound = fewest(weights, 0.7)
    assert [draw(weights, bound, u) for u in (0.0, 0.5, 0.9999)] == [0, 349, 699]


def test_what_is_drawn_stays_even_where_rounding_makes_the_total_too_large():
    """A million weights, each about half the spacing of floats at their sum, add up to less in blocks than one by one."""
    weights = np.array([0, 1, *[1.2e-16] * 1_000_000, 1e-20], np.float32)
    assert weights[draw(weights, fewest(weights, None), np.nextafter(1, 0))] > 0


def test_one_stays_at_least_and_none_of_weight_0():
    weights = [0, 0.5, 0, 1, 0]
    assert kept(weights, 0.0) == [3]
    assert kept(weights, 1.0) == [1, 3]
    assert kept(weights, None) == [1, 3]


def test_a_floor_drops_what_is_below_it():
    weights = [0.1, 0.5, 0.25, 1, 0.25, 0.1]
    assert kept(weights, None, 0.25) == [1, 2, 3, 4]
    assert kept(weights, 0.9, 0.3) == [1, 3]
    assert kept(weights, 0.6, 0.01) == [1, 3]


def test_weights_next_to_each_other_and_subnormal_ones_are_told_apart():
    near = np.nextafter(np.float32(1), np.float32(0))
    assert kept([near, 1, near], 0.5) == [0, 1]
    least = np.float32(1e-45)
    assert kept([least, 3 * least, 2 * least], 0.6) == [1, 2]
