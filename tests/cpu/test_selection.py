"""Selection among weights, against sorting all of them."""

import numpy as np
import pytest

from llamacli.cpu.kernels.ops.selection import fewest


def by_sorting(weights, enough):
    """Ids in descending order of weight, of equal ones the lowest first, until they add up; in float64."""
    order = np.lexsort((np.arange(len(weights)), -weights))
    total = np.cumsum(weights[order], dtype=np.float64)
    return np.sort(order[: np.searchsorted(total, enough, "left") + 1])


@pytest.mark.parametrize("n", [1, 2, 3, 5, 257, 20_001])
@pytest.mark.parametrize("spread", [0.0, 0.001, 1.0, 10.0])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_the_fewest_are_those_that_sorting_finds(n, spread, p):
    random = np.random.default_rng(n)
    weights = np.exp(random.normal(0, spread, n)).astype(np.float32)
    for some in (weights, np.round(weights / weights.max() * 64) / np.float32(64)):  # the latter: many are equal, some are 0
        enough = p * some.sum(dtype=np.float64)
        assert np.array_equal(fewest(some, enough), by_sorting(some, enough))


def test_of_equal_weights_the_first_stay():
    assert fewest(np.float32([0.5, 0.25, 0.25, 0.25, 1.0]), 1.75).tolist() == [0, 1, 4]
    assert fewest(np.float32([0.5, 0.25, 0.25, 0.25, 1.0]), 1.76).tolist() == [0, 1, 2, 4]


def test_one_stays_at_least_and_none_of_weight_0():
    assert fewest(np.float32([0, 0.5, 0, 1, 0]), 0).tolist() == [3]
    assert fewest(np.float32([0, 0.5, 0, 1, 0]), 9).tolist() == [1, 3]


def test_weights_next_to_each_other_and_subnormal_ones_are_told_apart():
    near = np.nextafter(np.float32(1), np.float32(0))
    assert fewest(np.float32([near, 1, near]), 1.5).tolist() == [0, 1]
    least = np.float32(1e-45)
    assert fewest(np.array([least, 3 * least, 2 * least], np.float32), float(4 * least)).tolist() == [1, 2]
