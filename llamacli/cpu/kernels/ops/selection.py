"""Selects among the values of a vocabulary: those that reach a bound, the fewest that add up to a sum.

In: float32 arrays [n]. Out: int64 indices in ascending order. Each array is passed over two or three times, nothing is sorted:
where a model thinks everything possible, thousands of tokens may have to stay.
"""

from typing import NamedTuple

import numpy as np
from numpy import float32, float64, int32, int64

from llamacli.cpu.kernels.jit.intrinsics import Address, Count, device_function, kernel, pointer

# Non-negative floats are ordered as their bits are. Weights are added up by their upper 11 bits, then by the next 10, then by
# the last 10. Neighbours in the array go into sums of their own, or each addition would wait for the one before.
SHIFTS = (20, 10, 0)
BUCKETS, APART = 2048, 4


class _FewestArguments(NamedTuple):
    weights: Address
    n: Count
    enough: Address
    sums: Address  # float64 [BUCKETS, APART]
    some: Address  # int32 [n]
    out: Address
    result: Address


@device_function
def _bucket(bits, n, shift, sums, enough):
    """(the bucket of the least weight that is needed to reach `enough`, what is missing without that bucket): the buckets of
    n weights are `shift` bits wide.
    """
    values, mask = pointer(bits, float32), int64(BUCKETS - 1)
    bits = pointer(bits, int32)
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


@kernel(_FewestArguments)
def _fewest(a, thread, threads):
    """out = where the fewest are that add up to `enough`; result = how many."""
    n, sums, missing = a.n, pointer(a.sums, float64), pointer(a.enough, float64)[0]
    bits, some, out = pointer(a.weights, int32), pointer(a.some, int32), pointer(a.out, int64)
    left, at, least = n, a.weights, int64(0)
    for shift in SHIFTS:
        bucket, missing = _bucket(at, left, shift, sums, missing)
        least |= bucket << shift
        source, kept = pointer(at, int32), int64(0)
        for i in range(left):
            value = source[i]
            some[kept] = value
            kept += int64((int64(value) ^ least) >> shift == 0)
        left, at = kept, a.some
    equal, found = int64(0), int64(0)  # of those that equal the least, how many are needed
    value = float64(pointer(a.some, float32)[0])
    while equal < left and (equal == 0 or equal * value < missing):
        equal += 1
    for i in range(n):
        this = int64(bits[i])
        out[found] = i
        found += int64(this > least) | (int64(this == least) & int64(equal > 0))
        equal -= int64(this == least)
    pointer(a.result, int64)[0] = found


def fewest(weights: np.ndarray, enough: float) -> np.ndarray:
    """Where the fewest of `weights`, float32 [n] from 0 up, are that add up to `enough`, one at least; of equal ones the first.

    All that are not 0, if that is less.
    """
    n, result = len(weights), np.empty(1, np.int64)
    out, sums, some = np.empty(n + 1, np.int64), np.empty((BUCKETS, APART)), np.empty(n + 1, np.int32)
    _run(_fewest, weights, np.array([enough], np.float64), sums, some, out, result)
    return out[: result[0]]


def _run(driver, values: np.ndarray, *arrays: np.ndarray) -> None:
    values = np.ascontiguousarray(values, np.float32)
    packed = driver.pack(driver.arguments(values.ctypes.data, len(values), *(array.ctypes.data for array in arrays)))
    driver(packed.ctypes.data, 0, 1)
