"""The block kernels, compiled as C++, against gguf-py's values: every type, place, expert and number of rows."""

import numpy as np
import oracle
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from installed import needed

mx = needed("mlx.core")
import cpp  # noqa: E402

from llamacli.files.ggml import BY_NAME  # noqa: E402
from llamacli.mlx import kernels  # noqa: E402
from llamacli.mlx.blocks import FORMATS  # noqa: E402

pytestmark = pytest.mark.skipif(cpp.COMPILER is None, reason="needs a C++ compiler")

N_EXPERTS, N_ROWS, N_COLS = 3, 13, 1536  # rows that no group of rows divides; more pieces than lanes
NEAR = 2e-6  # float32 sums against float64
HEADS = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "IQ4_NL": [0], "IQ4_XS": [0]}
HEADS |= {"Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}


@pytest.fixture(autouse=True)
def as_cpp(monkeypatch):
    monkeypatch.setattr(kernels, "dialect", cpp.dialect)
    cpp.forget(kernels)
    yield
    cpp.forget(kernels)


def stored(name, offset, n_cols=N_COLS):
    """Bytes of N_EXPERTS random matrices from byte `offset` on, as a window; and their weights in float64 by gguf-py."""
    kind, random = BY_NAME[name], np.random.RandomState(len(name) + offset)
    shape = N_EXPERTS, N_ROWS, n_cols
    if name in HEADS:
        raw = random.randint(0, 256, (N_EXPERTS * N_ROWS * n_cols // kind.block, kind.nbytes)).astype(np.uint8)
        for at in HEADS[name]:
            raw[:, at : at + 2] = random.uniform(-1.5, 1.5, (len(raw), 1)).astype(np.float16).view(np.uint8)
    else:
        raw = quantize(random.standard_normal(shape).astype(np.float32), GGMLQuantizationType[name]).view(np.uint8)
    weights = dequantize(raw.reshape(N_EXPERTS * N_ROWS, -1), GGMLQuantizationType[name]).astype(np.float64).reshape(shape)
    window = np.full((offset + raw.size + 4095) // 4096 * 4096, 0xAA, np.uint8)
    window[offset : offset + raw.size] = raw.reshape(-1)
    return mx.array(window.reshape(-1, 4096)), weights


def row_bytes(name, n_cols):
    return BY_NAME[name].row_bytes(n_cols)


def difference(found, expected):
    return np.abs(np.array(found) - expected).max() / np.abs(expected).max()


def product(name, window, offset, experts, x, tokens, n_cols=N_COLS):
    where = kernels.place(offset, N_ROWS, n_cols, N_ROWS * row_bytes(name, n_cols))
    m = kernels.Matrices(name, window, where, N_ROWS)
    return kernels.matvec(m, mx.array(experts, mx.int32), mx.array(x), tokens)


@pytest.mark.parametrize("offset", [0, 2, 4094, 5030])
@pytest.mark.parametrize("name", FORMATS)
def test_a_row_times_each_expert_at_any_place(name, offset):
    window, weights = stored(name, offset)
    x = np.random.RandomState(1).standard_normal((1, N_COLS)).astype(np.float32)
    for expert in range(N_EXPERTS):
        found = product(name, window, offset, [expert], x, 1)
        assert difference(found, x @ weights[expert].T) <= NEAR
        assert difference(found, x @ weights[expert - 1].T) > 0.1  # another expert's result is far off


@pytest.mark.parametrize("tokens", [2, 3, 8])
@pytest.mark.parametrize("name", FORMATS)
def test_several_rows_at_a_time_give_what_each_gives_alone(name, tokens):
    window, weights = stored(name, 64)
    x = np.random.RandomState(2).standard_normal((tokens, N_COLS)).astype(np.float32)
    found = product(name, window, 64, [1], x, tokens)
    assert found.shape == (tokens, N_ROWS)
    assert difference(found, x @ weights[1].T) <= NEAR


@pytest.mark.parametrize("experts", [[2], [0, 2], [1, 0, 2, 1], [2, 2, 1, 0, 0, 1, 2, 0, 1]], ids=len)
def test_rows_with_an_expert_each_go_through_their_own(experts):
    window, weights = stored("Q6_K", 96)
    x = np.random.RandomState(3).standard_normal((len(experts), N_COLS)).astype(np.float32)
    expected = np.stack([row @ weights[e].T for row, e in zip(x, experts, strict=True)])
    assert difference(product("Q6_K", window, 96, experts, x, 1), expected) <= NEAR


@pytest.mark.parametrize("tokens", [1, 2, 8])
def test_a_product_is_added_to_what_is_there(tokens):
    (window, weights), random = stored("Q4_K", 32), np.random.RandomState(1)
    x, base = (random.standard_normal((tokens, width)).astype(np.float32) for width in (N_COLS, N_ROWS))
    m = kernels.Matrices("Q4_K", window, kernels.place(32, N_ROWS, N_COLS, N_ROWS * row_bytes("Q4_K", N_COLS)), N_ROWS)
    found = kernels.added(m, kernels.number(2), mx.array(x), tokens, mx.array(base))
    assert difference(found, base + x @ weights[2].T) <= NEAR


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize(("experts", "tokens"), [([1], 1), ([1], 3), ([2], 8), ([0, 2, 1], 1)])
def test_gate_and_up_are_multiplied_together(experts, tokens, scored):
    kinds = [stored("Q4_K", offset) for offset in (32, 5030)]
    stride = N_ROWS * row_bytes("Q4_K", N_COLS)
    gate, up = (
        kernels.Matrices("Q4_K", window, kernels.place(offset, N_ROWS, N_COLS, stride), N_ROWS)
        for (window, _), offset in zip(kinds, (32, 5030), strict=True)
    )
    random, n = np.random.RandomState(5), len(experts) * tokens
    x = (1e-3 * random.standard_normal((n, N_COLS))).astype(np.float32)
    scores = random.uniform(0.2, 1, (n, 1)).astype(np.float32) if scored else np.ones((n, 1), np.float32)
    which = np.repeat(experts, tokens)
    g, u = (scores * np.stack([row @ weights[e].T for row, e in zip(x, which, strict=True)]) for _, weights in kinds)
    found = kernels.gated(gate, up, mx.array(experts, mx.int32), mx.array(x), tokens, mx.array(scores) if scored else None)
    assert difference(found, g / (1 + np.exp(-g)) * u) <= 10 * NEAR


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize(("n", "n_heads", "dim"), [(1, 5, 128), (3, 2, 16), (9, 1, 2)])
def test_heads_are_rotated_normed_and_scaled(n, n_heads, dim, rotate, norm):
    random = np.random.RandomState(n)
    x, angles = random.standard_normal((n, n_heads, dim)), random.uniform(0, 6, (n, dim // 2))
    scales, eps = random.uniform(1, 2, n), 0.05
    expected = oracle.rotate(x, angles) if rotate else x
    expected = (oracle.rms_norm(expected, eps) if norm else expected) * scales[:, None, None]
    given, cos, sin, scale = (
        mx.array(a.astype(np.float32)) for a in (x.reshape(n, -1), np.cos(angles), np.sin(angles), scales)
    )
    for dtype, near in ((mx.float32, NEAR), (mx.float16, 1e-3)):
        found = kernels.heads(given, (cos, sin), scale, n_heads, eps, dtype, rotate=rotate, norm=norm)
        assert (found.shape, found.dtype) == ((n_heads, n, dim), dtype)
        assert difference(found, expected.swapaxes(0, 1)) <= near


@pytest.mark.parametrize("name", [name for name in FORMATS if BY_NAME[name].block <= 32])
def test_rows_need_not_be_whole_superblocks(name):
    window, weights = stored(name, 32, n_cols=96)
    x = np.random.RandomState(4).standard_normal((1, 96)).astype(np.float32)
    assert difference(product(name, window, 32, [2], x, 1, n_cols=96), x @ weights[2].T) <= NEAR


@pytest.mark.parametrize("offset", [0, 4094])
@pytest.mark.parametrize("name", FORMATS)
def test_a_widened_matrix_is_gguf_pys_rounded_to_float16(name, offset):
    window, weights = stored(name, offset)
    where = kernels.place(offset, N_ROWS, N_COLS, N_ROWS * row_bytes(name, N_COLS))
    for expert in range(N_EXPERTS):
        found = kernels.widen(name, window, where, mx.array([expert], mx.int32), N_ROWS, N_COLS)
        assert found.dtype == mx.float16
        np.testing.assert_allclose(np.array(found), weights[expert].astype(np.float16), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["matvec", "widen"])
def test_mlx_takes_the_calls_as_they_are_made(kind, monkeypatch):
    """Without Metal MLX refuses a kernel's call, but only after it has understood all arguments."""
    if mx.metal.is_available():
        pytest.skip("Metal is there")
    monkeypatch.setattr(
        kernels, "dialect", lambda: kernels.Dialect(kernels.METAL, kernels.METAL_PROLOGUE, mx.fast.metal_kernel)
    )
    window, where = mx.zeros((4, 4096), mx.uint8), kernels.place(0, 13, 64)
    with pytest.raises(RuntimeError, match="No Metal back-end"):
        if kind == "matvec":
            kernels.matvec(kernels.Matrices("Q4_0", window, where, 13), kernels.number(0), mx.zeros((3, 64)), 3)
        else:
            kernels.widen("Q4_0", window, where, kernels.number(0), 13, 64)


def test_the_types_that_the_cpu_computes_with_have_texts():
    from llamacli.cpu.kernels.formats.layout import FLOATS, QUANTIZED

    assert set(FORMATS) == {*QUANTIZED, *FLOATS}


def test_more_rows_than_a_grid_of_cuda_has_along_y():
    n, random = 70_000, np.random.RandomState(4)
    values = random.standard_normal((n, 32)).astype(np.float16)
    window = mx.array(np.resize(values.view(np.uint8), (-(-values.nbytes // 4096), 4096)))
    found = kernels.widen("F16", window, kernels.place(0, n, 32), kernels.number(0), n, 32)
    np.testing.assert_array_equal(np.array(found), values)
    x, ones = random.standard_normal((n, 8)).astype(np.float32), mx.ones(n // 35)
    turns = mx.ones((n // 35, 4)), mx.zeros((n // 35, 4))
    rows = mx.array(x.reshape(n // 35, -1))
    heads = kernels.heads(rows, turns, ones, 35, 1e-5, mx.float32, rotate=False, norm=False)
    np.testing.assert_array_equal(np.array(heads), x.reshape(-1, 35, 8).swapaxes(0, 1))
