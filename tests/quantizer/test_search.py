"""Encoders that search for their scales: closer to the weights than ggml's, in blocks that every reader understands."""

from importlib import import_module
from pathlib import Path

import arm
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from golden.make_encoders import odd
from hypothesis import given, settings
from hypothesis import strategies as st

from llamacli.cpu.kernels.jit.loader import assembly, host_targets, targets
from llamacli.files.ggml import BY_NAME
from quantize import encoders
from quantize.encoders import search
from quantize.encoders.levels import LANES

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "encoders.npz")
SEARCHED = ("Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
STEPS = {"Q2_K": 3, "Q3_K": 7, "Q4_0": 15, "Q4_1": 15, "Q4_K": 15, "Q5_0": 31, "Q5_1": 31, "Q5_K": 31, "Q6_K": 63}
STEPS |= {"IQ4_NL": 10, "IQ4_XS": 10}  # the widest step of the table is a tenth of its range
MULTIPLES = 128 * 32  # of a half float that a weight can be: what half precision's smallest step is multiplied with
RNG = np.random.default_rng(9)
ROWS = RNG.standard_normal((5, 768)).astype(np.float32)


def decoded(type_name, x, weights=None):
    """What gguf-py reads from our bytes."""
    encoded = encoders.encoder(type_name).encode(x, weights)
    assert encoded.dtype == np.uint8
    assert encoded.shape == (len(x), BY_NAME[type_name].row_bytes(x.shape[1]))
    return dequantize(encoded, GGMLQuantizationType[type_name])


@pytest.mark.parametrize("type_name", SEARCHED)
def test_no_row_is_further_from_the_weights_than_ggmls(type_name):
    x = GOLDEN["x"].astype(np.float32)
    error = np.square(decoded(type_name, x) - x, dtype=np.float64).sum(1)
    assert (error <= GOLDEN[type_name]).all()


@pytest.mark.parametrize("type_name", (*SEARCHED, "Q4_0"))
def test_with_weights_no_row_is_further_in_the_weighted_sense(type_name):
    x, weights = GOLDEN["x"].astype(np.float32), GOLDEN["weights"]
    error = (np.square(decoded(type_name, x, weights) - x, dtype=np.float64) * weights).sum(1)
    assert (error <= GOLDEN[f"{type_name}.weighted"]).all()


@pytest.mark.parametrize("type_name", (*SEARCHED, "Q4_0"))
@pytest.mark.parametrize("kind", range(4), ids=("plain", "uneven", "heavy", "mask"))
def test_unusual_rows_have_no_larger_error_than_ggmls_and_than_zeros(type_name, kind):
    """Gaps, outliers, few values, one sign, scales at the end of half precision. Plain Q4_0 is ggml's, zeros or not."""
    families, kinds = odd(GOLDEN["x"], GOLDEN["weights"])
    weights = list(kinds.values())[kind]
    further = []
    for x, ggml in zip(families.items(), GOLDEN[f"{type_name}.odd"][kind], strict=True):
        name, x = x
        factor = 1 if weights is None else weights.astype(np.float64)
        zeros = (np.square(x, dtype=np.float64) * factor).sum(1)
        error = (np.square(decoded(type_name, x, weights) - x, dtype=np.float64) * factor).sum(1)
        if error.sum() > ggml + 1e-12 * zeros.sum():
            further.append(f"{name}: {(error.sum() / ggml) ** 0.5:.4f} times ggml's")
        if (error > zeros * (1 + 1e-6)).any() and (type_name, kind) != ("Q4_0", 0):
            further.append(f"{name}: worse than zeros")
    assert not further


@pytest.mark.parametrize("type_name", SEARCHED)
def test_equal_column_weights_give_no_larger_error_than_none(type_name):
    alike, none = (np.square(decoded(type_name, ROWS, w) - ROWS).sum() for w in (np.full(768, 3, np.float32), None))
    assert alike <= none * 1.001


@pytest.mark.parametrize("type_name", [name for name in SEARCHED if BY_NAME[name].block == 32])
@pytest.mark.parametrize("scale", [1e-6, 1e-7, 1e-8])
def test_weights_near_half_precisions_smallest_are_no_further_off_than_zeros(type_name, scale):
    x = (ROWS * scale).astype(np.float32)
    assert np.square(decoded(type_name, x) - x, dtype=np.float64).sum() <= np.square(x, dtype=np.float64).sum()


@pytest.mark.parametrize("type_name", SEARCHED)
def test_columns_of_more_weight_have_smaller_errors(type_name):
    weights = np.where(np.arange(768) % 4 == 0, 100, 1).astype(np.float32)
    with_, without = (np.square(decoded(type_name, ROWS, w) - ROWS)[:, ::4].sum() for w in (weights, None))
    assert with_ < without


@pytest.mark.parametrize("type_name", (*SEARCHED, "Q4_0"))
@pytest.mark.parametrize("weighted", [False, True])
def test_a_row_does_not_depend_on_its_neighbours(type_name, weighted):
    """Five rows of three superblocks: units of two superblocks pass over the ends of rows, the last one is half empty."""
    weights = RNG.random(768).astype(np.float32) + 0.1 if weighted else None
    together = encoders.encoder(type_name).encode(ROWS, weights)
    for i in range(len(ROWS)):
        np.testing.assert_array_equal(encoders.encoder(type_name).encode(ROWS[i : i + 1], weights), together[i : i + 1])


@pytest.mark.parametrize("type_name", SEARCHED)
def test_zeros_come_back_as_zeros(type_name):
    assert np.abs(decoded(type_name, np.zeros((2, 512), np.float32))).max() == 0


@pytest.mark.parametrize("type_name", SEARCHED)
@pytest.mark.parametrize("value", [1.0, -1.0, 0.1, -250.0])
def test_weights_all_alike_come_back(type_name, value):
    back = decoded(type_name, np.full((1, 512), value, np.float32))
    np.testing.assert_allclose(back, value, rtol=2e-3)


@pytest.mark.parametrize("type_name", SEARCHED)
def test_columns_of_weight_0_are_still_encoded(type_name):
    for weights in (np.zeros(768), np.where(np.arange(768) < 300, 0, 1)):
        back = decoded(type_name, ROWS, weights.astype(np.float32))
        assert np.abs(back - ROWS).max() < np.abs(ROWS).max()


@pytest.mark.parametrize("type_name", (*SEARCHED, "Q4_0"))
@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(-12, 6), sparse=st.floats(0, 1), shift=st.floats(-2, 2))
def test_any_finite_weights_stay_finite_and_within_a_step(type_name, seed, scale, sparse, shift):
    rng, limit = np.random.default_rng(seed), encoders.encoder(type_name).limit
    x = (rng.standard_normal((2, 512)) + shift) * 10.0**scale * (rng.random((2, 512)) >= sparse)
    x = np.clip(x, -limit, limit).astype(np.float32)
    weights = np.float32(10) ** rng.uniform(-6, 6, 512).astype(np.float32)
    for w in (None, weights):
        back = decoded(type_name, x, w)
        assert np.isfinite(back).all()
        if w is None:  # a superblock's groups share a scale's precision: no weight is further off than its widest step
            span = np.abs(x).reshape(-1, 256).max(1) * 2
            wrong = np.abs(back - x).reshape(-1, 256).max(1)
            assert (wrong <= 1.6 * span / STEPS[type_name] + 2.0**-25 * MULTIPLES).all()


@pytest.mark.parametrize("type_name", SEARCHED)
def test_the_largest_magnitude_of_a_format_is_encoded(type_name):
    x = np.zeros((1, 512), np.float32)
    for sign in (1, -1):
        x[0, 7] = sign * encoders.encoder(type_name).limit
        back = decoded(type_name, x)
        assert np.isfinite(back).all()
        assert abs(back[0, 7] - x[0, 7]) <= abs(x[0, 7]) / 100


@pytest.mark.parametrize("target", host_targets(), ids=lambda t: t.name)
def test_every_variant_of_this_cpu_finds_blocks_as_good(target, monkeypatch):
    x = GOLDEN["x"].astype(np.float32)
    load = encoders.load
    monkeypatch.setattr(encoders, "load", lambda name, build, symbols: load(name, build, symbols, target))
    monkeypatch.setattr(encoders, "encoder", encoders.encoder.__wrapped__)
    for type_name in ("Q4_K", "Q3_K", "IQ4_NL"):
        error = np.square(decoded(type_name, x) - x, dtype=np.float64).sum(1)
        assert (error <= GOLDEN[type_name]).all()


@pytest.mark.arm
@pytest.mark.skipif(bool(arm.missing()), reason=f"needs {arm.missing()}")
@pytest.mark.parametrize("target", arm.TARGETS.values(), ids=arm.TARGETS)
def test_arm_finds_blocks_as_good(target):
    x, weights = GOLDEN["x"].astype(np.float32), GOLDEN["weights"].astype(np.float32)
    for type_name in ("Q4_0", "Q4_K", "Q3_K", "IQ4_NL"):
        fmt, kind = import_module(f"quantize.encoders.{type_name.lower()}"), BY_NAME[type_name]
        n_units, n_cols = x.size // (LANES * fmt.GROUP), x.shape[1]
        microkernels = arm.load(f"encode-{type_name}", search.build(fmt), search.SYMBOLS, target)
        out = np.zeros((len(x), kind.row_bytes(n_cols)), np.uint8)
        microkernels["encode"](x, n_units, np.zeros(1), n_cols, out)
        if type_name == "Q4_0":
            np.testing.assert_array_equal(out, encoders.encoder(type_name).encode(x, None))
        else:
            error = np.square(dequantize(out, GGMLQuantizationType[type_name]) - x, dtype=np.float64).sum(1)
            assert (error <= GOLDEN[type_name]).all()
        factors = np.resize(weights / weights.mean(), n_cols + LANES * fmt.GROUP)
        microkernels["encode_weighted"](x, n_units, factors, n_cols, out)
        error = np.square(dequantize(out, GGMLQuantizationType[type_name]) - x, dtype=np.float64) * GOLDEN["weights"]
        assert (error.sum(1) <= GOLDEN[f"{type_name}.weighted"]).all()


def test_the_encoders_compile_for_arm():
    arm = targets("aarch64-unknown-linux-gnu", "neoverse-n1", {"dotprod": True, "neon": True})[0]
    text = assembly(search.build(import_module("quantize.encoders.q4_k")), arm)
    assert "fmla" in text
    assert "roundf" not in text  # no library call for each lane
