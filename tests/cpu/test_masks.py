"""Masks over logits, against NumPy's own way with bits."""

import numpy as np
import pytest

from llamacli.cpu.kernels.ops.masks import keep


@pytest.mark.parametrize("n", [1, 31, 32, 33, 288, 202_048, 202_049])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999, 1.0])
def test_what_has_no_bit_is_minus_infinity(n, share):
    random = np.random.default_rng(n)
    allowed = random.random(n) < share
    logits = random.normal(size=n).astype(np.float32)
    expected = np.where(allowed, logits, np.float32(-np.inf))
    padded = np.zeros(-(-n // 32) * 32, bool)
    padded[:n] = allowed
    bits = np.packbits(padded, bitorder="little").view(np.uint32)
    around = np.concatenate([np.float32([7]), logits, np.float32([8])])
    keep(around[1:-1], bits)
    assert np.array_equal(around, [7, *expected, 8])


def test_logits_beyond_the_bits_are_forbidden():
    logits = np.zeros(100, np.float32)
    keep(logits, np.full(2, 0xFFFFFFFF, np.uint32))
    assert np.array_equal(np.isfinite(logits), np.arange(100) < 64)
    keep(logits, np.zeros(0, np.uint32))
    assert not np.isfinite(logits).any()
