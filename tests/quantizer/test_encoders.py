"""Encoders without a search: bit for bit what gguf-py makes of the same weights, for all weights."""

import threading

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from llamacli.files.ggml import BY_NAME
from quantize.encoders import encoder, widen

TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0")
QUANTIZED = ("Q8_0", "Q4_0")
DTYPES = {"F32": np.float32, "F16": np.float16}  # as gguf-py wants them; all others are bytes
RNG = np.random.default_rng(4)
NORMAL = RNG.standard_normal((64, 256)).astype(np.float32)
TINY = np.float32(1e-36)  # a scale 127 times smaller still has a reciprocal
CASES = {
    "normal weights": NORMAL,
    "rows of many magnitudes": NORMAL * np.float32(10) ** RNG.integers(-30, 4, (64, 1)).astype(np.float32),
    "weights that were bfloat16": (NORMAL.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32),
    "zeros": np.zeros((2, 64), np.float32),
    "negative zeros": -np.zeros((2, 64), np.float32),
    "zeros among weights": NORMAL * (RNG.random((64, 256)) < 0.1),
    "ties of magnitude with both signs": RNG.choice(np.float32([-1, 1]), (64, 64)),
    "ties of rounding": (RNG.integers(-254, 255, (64, 256)) / 2).astype(np.float32),
    "ties of half precision": (1 + RNG.integers(0, 64, (64, 64)) / 4096).astype(np.float32),
    "ties of bfloat16": (np.uint32(0x3F800000) + RNG.integers(0, 64, (8, 64), np.uint32) * np.uint32(0x8000)).view(np.float32),
    "half precision's denormals": NORMAL * np.float32(1e-7),
    "weights almost too small": NORMAL * TINY,
    "one outlier a row": np.where(np.arange(256) == 77, np.float32(-60000), NORMAL),
    "the largest half": np.full((1, 32), 65504, np.float32),
}


def encode(type_name, x):
    return encoder(type_name).encode(x, None)


def reference(x, type_name):
    """gguf-py's bytes."""
    return np.ascontiguousarray(quantize(x, GGMLQuantizationType[type_name])).view(np.uint8)


@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("case", CASES)
def test_the_bytes_are_those_of_gguf_py(type_name, case):
    x = np.ascontiguousarray(CASES[case], np.float32)
    encoded = encode(type_name, x)
    assert encoded.dtype == np.uint8
    assert encoded.shape == (len(x), BY_NAME[type_name].row_bytes(x.shape[1]))
    np.testing.assert_array_equal(encoded, reference(x, type_name))


@pytest.mark.parametrize("type_name", ["F16", "BF16"])
def test_every_exponent_and_the_neighbours_of_every_rounding_step(type_name):
    """All sign, exponent and upper mantissa bits, with the lower ones just below, at and above a tie."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    lower = np.uint32([0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    x = (upper[:, None] | lower).view(np.float32).reshape(-1)
    x = x[np.abs(x) <= encoder(type_name).limit]
    x = x[: x.size // 32 * 32].reshape(-1, 32)
    np.testing.assert_array_equal(encode(type_name, x), reference(x, type_name))


@pytest.mark.parametrize("type_name", QUANTIZED)
def test_denormals_without_a_reciprocal_become_zeros(type_name):
    """There the reference divides by what it has rounded to zero, and its digits mean nothing under a scale of zero."""
    x = np.full((1, 32), np.finfo(np.float32).smallest_subnormal) * np.arange(32, dtype=np.float32)
    encoded = encode(type_name, x.astype(np.float32))
    assert not encoded[:, 2:].any()
    np.testing.assert_array_equal(dequantize(encoded, GGMLQuantizationType[type_name]), 0)


@pytest.mark.parametrize("type_name", TYPES)
def test_a_limit_is_the_largest_weight_that_stays_finite(type_name):
    limit = np.float32(encoder(type_name).limit)
    for sign in (1, -1):
        x = np.zeros((1, 32), np.float32)
        x[0, 5] = sign * limit
        back = dequantize(encode(type_name, x).view(DTYPES.get(type_name, np.uint8)), GGMLQuantizationType[type_name])
        assert np.isfinite(back).all()
        assert abs(back[0, 5] - x[0, 5]) <= abs(x[0, 5]) / 100


@pytest.mark.parametrize("type_name", QUANTIZED)
def test_weights_come_back_within_half_a_step(type_name):
    back = dequantize(encode(type_name, NORMAL), GGMLQuantizationType[type_name])
    largest = np.abs(NORMAL).reshape(-1, 32).max(1)
    step = largest / {"Q8_0": 127, "Q4_0": 8}[type_name]
    wrong = np.abs(back - NORMAL).reshape(-1, 32).max(1)
    most = {"Q8_0": 0.51, "Q4_0": 1.01}[type_name]  # of 16 steps one side has only 7: its end may be a whole step off
    assert (wrong <= most * step + largest * 2.0**-10).all()


@pytest.mark.parametrize("type_name", TYPES)
def test_encoding_changes_neither_the_weights_nor_an_earlier_result(type_name):
    x = NORMAL.copy()
    first = encode(type_name, x)
    kept = first.copy()
    np.testing.assert_array_equal(x, NORMAL)
    x[...] = 7
    encode(type_name, x)
    np.testing.assert_array_equal(first, kept)


def test_threads_encode_side_by_side():
    parts, found = np.array_split(NORMAL, 4), {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: encode("Q4_0", parts[i])})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(np.concatenate([found[i] for i in range(4)]), reference(NORMAL, "Q4_0"))


def test_bfloat16_is_widened_in_place_and_with_changed_axes():
    bits = RNG.integers(0, 1 << 16, (37, 70), np.uint16)
    plain, turned = np.empty((37, 70), np.uint32), np.empty((70, 37), np.uint32)
    widen.bf16(bits, plain)
    widen.bf16_transposed(bits, turned)
    np.testing.assert_array_equal(plain, bits.astype(np.uint32) << 16)
    np.testing.assert_array_equal(turned, plain.T)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_the_largest_magnitude_finds_what_is_not_finite(bad):
    x = NORMAL.copy()
    assert widen.largest(x.reshape(-1).view(np.uint32)) == np.abs(x).max()
    x[3, 5] = bad
    assert not np.isfinite(widen.largest(x.reshape(-1).view(np.uint32)))


def test_every_half_float_is_widened_exactly():
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    found, expected = np.empty((256, 256), np.float32), bits.view(np.float16).astype(np.float32)
    widen.f16(bits.view(np.int16), found)
    finite = ~np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), ~finite)
    np.testing.assert_array_equal(found.view(np.uint32)[finite], expected.view(np.uint32)[finite])


def test_known_bytes():
    """Worked out by hand: what stays true if every library changes."""
    x = np.zeros((1, 32), np.float32)
    x[0, :4], x[0, 16:18] = (-8, 7, 0.5, -0.5), (3, -3.5)
    q4_0 = [0x00, 0x3C, 0xB0, 0x5F, 0x89, 0x88] + [0x88] * 12  # scale 1; -8 and 3, 7 and -3 (ties up), 1 and 0, 0 and 0
    assert encode("Q4_0", x)[0].tolist() == q4_0
    x[0, 0] = 127
    q8_0 = [0x00, 0x3C, 127, 7, 1, 255, *[0] * 12, 3, 252, *[0] * 14]  # halves go away from zero
    assert encode("Q8_0", x)[0].tolist() == q8_0
    f16 = encode("F16", np.float32([[1, -2, 65504, 2.0**-24]]))[0].tolist()
    assert f16 == [0, 0x3C, 0, 0xC0, 0xFF, 0x7B, 1, 0]
    bf16 = encode("BF16", np.float32([[1.0, 1 + 2.0**-8, 1 + 3 * 2.0**-8]]))[0].tolist()
    assert bf16 == [0x80, 0x3F, 0x80, 0x3F, 0x82, 0x3F]  # ties to even
