"""Selects among weights of a vocabulary: the fewest that add up to a sum, and one of them by chance.

In: float32 [n], none negative. Out: a `Bound` that says which stay, their indices, or one index. The weights are passed over a
few times and nothing is sorted, since thousands of tokens stay where the distribution is flat.
"""

from typing import NamedTuple

import numpy as np
from numpy import float32, float64, int32, int64

from llamacli.cpu.kernels.jit.intrinsics import Address, Count, device_function, kernel, pointer

# Floats that are not negative are ordered as their bits are. Weights are added up by their upper 11 bits, then by the next 10,
# then by the last 10. Neighbours in the array go into sums of their own, or each addition would wait for the one before.
SHIFTS = (20, 10, 0)
BUCKETS, APART = 2048, 4
BLOCK = 256  # weights that are looked at together before each of them is


class Bound(NamedTuple):
    """Which weights stay: those above the one whose bits are `least`, and the first `equal` of those that equal it."""

    least: int
    equal: int
    count: int  # of those that stay
    total: float  # of those that stay


class _BoundArguments(NamedTuple):
    weights: Address
    n: Count
    limits: Address  # float64 [2]: the share of the sum that is enough, and the least weight that may stay
    sums: Address  # float64 [BUCKETS, APART]
    some: Address  # int32 [n]
    found: Address  # int64 [3]: least, equal, count
    total: Address  # float64


@device_function
def _bucket(at, n, shift, sums, enough):
    """Sort the n weights at `at` into buckets by their bits from `shift` on.

    Returns the bucket of the least weight that is needed to reach `enough`, and what is missing without that bucket.
    """
    values, bits, mask = pointer(at, float32), pointer(at, int32), int64(BUCKETS - 1)
    for k in range(BUCKETS * APART):
        sums[k] = 0.0
    for first in range(0, n - APART + 1, APART):
        for k in range(APART):
            sums[((int64(bits[first + k]) >> shift) & mask) * APART + k] += float64(values[first + k])
    for i in range(n // APART * APART, n):
        sums[((int64(bits[i]) >> shift) & mask) * APART] += float64(values[i])
    bucket, without = int64(0), enough
    for b in range(BUCKETS - 1, -1, -1):
        total = sums[b * APART] + sums[b * APART + 1] + sums[b * APART + 2] + sums[b * APART + 3]
        if total > 0.0:
            bucket, without = b, enough
            if total >= enough:
                break
            enough -= total
    return bucket, without


@device_function
def _relevant(a, share):
    """(how many weights may be needed to reach `share` of the sum, that share): the bits of these go into `some`.

    Weights of up to (1 - share) * sum / n are not needed, since all of them together are no more than may be missing. Most of a
    vocabulary is that small and is skipped.
    """
    weights, bits, some = pointer(a.weights, float32), pointer(a.weights, int32), pointer(a.some, int32)
    total, left = 0.0, int64(0)
    for i in range(a.n):
        total += float64(weights[i])
    pointer(a.some, float32)[0] = float32(max(0.0, total * (1.0 - share) / a.n * (1.0 - 1e-6)))
    idle = some[0]
    for first in range(0, a.n, BLOCK):
        end, highest = min(first + BLOCK, a.n), int32(0)
        for i in range(first, end):
            highest = max(highest, bits[i])
        if highest > idle:
            for i in range(first, end):
                some[left] = bits[i]
                left += int64(bits[i] > idle)
    return left, total * share


@kernel(_BoundArguments)
def _bound(a, thread, threads):
    """Find the bound, then the number and the sum of the weights that stay."""
    share, floor = pointer(a.limits, float64)[0], pointer(a.limits, float64)[1]
    weights, bits, some = pointer(a.weights, float32), pointer(a.weights, int32), pointer(a.some, int32)
    pointer(a.some, float32)[0] = float32(floor)
    lowest = max(int64(some[0]), int64(1))  # 0 never stays
    left, missing = _relevant(a, share)
    at, least = a.some, int64(0)
    for shift in SHIFTS:
        bucket, missing = _bucket(at, left, shift, pointer(a.sums, float64), missing)
        least |= bucket << shift
        source, kept = pointer(at, int32), int64(0)
        for i in range(left):
            value = source[i]
            some[kept] = value
            kept += int64((int64(value) ^ least) >> shift == 0)
        left = kept
    some[0] = int32(least)
    value, equal = float64(pointer(a.some, float32)[0]), int64(1)
    while equal < left and equal * value < missing:
        equal += 1
    if lowest > least:
        least, equal = lowest, a.n
    least = int32(least)
    total, count, same = 0.0, int64(0), int64(0)
    for i in range(a.n):
        total += float64(weights[i]) * float64(bits[i] > least)
        count += int64(bits[i] > least)
        same += int64(bits[i] == least)
    some[0] = least
    found, equal = pointer(a.found, int64), min(equal, same)
    found[0], found[1], found[2] = int64(least), equal, count + equal
    pointer(a.total, float64)[0] = total + equal * float64(pointer(a.some, float32)[0])


def fewest(weights: np.ndarray, share: float | None, floor: float = 0.0) -> Bound:
    """The fewest `weights`, float32 [n], that make up `share` of their sum, one at least; of equal ones the first. None: all.
    Of these, those that are `floor` or more. Weights of 0 never stay.
    """
    n, found, total = len(weights), np.empty(3, np.int64), np.empty(1)
    sums, some = np.empty((BUCKETS, APART)), np.empty(n + 1, np.int32)
    _run(_bound, weights, np.array([np.inf if share is None else share, floor]), sums, some, found, total)
    return Bound(*found.tolist(), float(total[0]))


class _SelectArguments(NamedTuple):
    weights: Address
    n: Count
    bound: Address  # int64 [2]: least, equal
    out: Address  # int64 [count + 1]


@kernel(_SelectArguments)
def _select(a, thread, threads):
    """out = where the weights are that stay."""
    bits, out, least, left = pointer(a.weights, int32), pointer(a.out, int64), pointer(a.bound, int64)[0], int64(0)
    equal = pointer(a.bound, int64)[1]
    for i in range(a.n):
        this = int64(bits[i])
        out[left] = i
        left += int64(this > least) | (int64(this == least) & int64(equal > 0))
        equal -= int64(this == least)


def select(weights: np.ndarray, bound: Bound) -> np.ndarray:
    """Where the weights are that stay, int64 in ascending order."""
    out = np.empty(len(weights) + 1, np.int64)
    _run(_select, weights, np.array(bound[:2], np.int64), out)
    return out[: bound.count]


class _DrawArguments(NamedTuple):
    weights: Address
    n: Count
    bound: Address  # int64 [2]: least, equal
    goal: Address  # float64
    found: Address  # int64


@device_function
def _block(weights, bits, first, end, least):
    """(the sum of a block's weights from `least` up, how many equal it)."""
    total, same = 0.0, int64(0)
    for i in range(first, end):
        total += float64(weights[i]) * float64(bits[i] >= least)
        same += int64(bits[i] == least)
    return total, same


@kernel(_DrawArguments)
def _draw(a, thread, threads):
    """found = the first of those that stay at which they add up to more than the goal."""
    weights, bits = pointer(a.weights, float32), pointer(a.weights, int32)
    least, equal, goal = int32(pointer(a.bound, int64)[0]), pointer(a.bound, int64)[1], pointer(a.goal, float64)[0]
    for first in range(0, a.n, BLOCK):
        end = min(first + BLOCK, a.n)
        total, same = _block(weights, bits, first, end, least)
        if total <= goal and same <= equal:  # all of its equal ones stay
            goal -= total
            equal -= same
            continue
        for i in range(first, end):
            if bits[i] > least or (bits[i] == least and equal > 0):
                goal -= float64(weights[i])
                if goal < 0.0:
                    pointer(a.found, int64)[0] = i
                    return
            equal = max(equal - int64(bits[i] == least), int64(0))


def draw(weights: np.ndarray, bound: Bound, share: float) -> int:
    """The index, among those that stay in ascending order, at which their sum exceeds `share` (0 to 1) of the total."""
    found = np.full(1, -1, np.int64)
    goal = share * bound.total * (1 - 1e-12)  # so that the same weights, added in another order, exceed it as a rule
    _run(_draw, weights, np.array(bound[:2], np.int64), np.array([goal]), found)
    return int(found[0] if found[0] >= 0 else select(weights, bound)[-1])


def _run(driver, values: np.ndarray, *arrays: np.ndarray) -> None:
    values = np.ascontiguousarray(values, np.float32)
    packed = driver.pack(driver.arguments(values.ctypes.data, len(values), *(array.ctypes.data for array in arrays)))
    driver(packed.ctypes.data, 0, 1)
