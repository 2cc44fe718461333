"""Every microkernel in every variant that this CPU runs, against gguf-py and NumPy; with `-m arm` ARM's variants, emulated."""

import ctypes
import mmap
import os
import re
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier

import arm
import llvmlite.binding as llvm
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from llamacli.cpu.kernels.formats import dots, floats, several, tiles
from llamacli.cpu.kernels.formats import layout as formats
from llamacli.cpu.kernels.jit import intrinsics as words
from llamacli.cpu.kernels.jit import loader as jit
from llamacli.cpu.kernels.jit.loader import assembly, chosen_target, host_targets, load, targets
from llamacli.cpu.kernels.ops import kv, matmul, vectors
from llamacli.cpu.kernels.runtime.pool import Pool
from llamacli.cpu.kernels.runtime.program import Program
from llamacli.errors import UsageError
from llamacli.files.ggml import BY_NAME

EMULATED = [pytest.mark.arm, pytest.mark.skipif(bool(arm.missing()), reason=f"needs {arm.missing()}")]
VARIANTS = [pytest.param(target, id=target.name) for target in host_targets()]
# the registers of 32 bytes of an AVX-VNNI machine, by AVX-512's encoding of the same instructions
VARIANTS += [
    pytest.param(t._replace(name="vnni256", width=32, tile=4, tile_vectors=1), id="vnni256")
    for t in host_targets()
    if t.name == "avx512vnni"
]
VARIANTS += [pytest.param(target, id=name, marks=EMULATED) for name, target in arm.TARGETS.items()]
HEAD_DIM = 64
# where the half floats stand in a block, if not at its start alone
HEADS = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_1": (0, 2), "Q5_1": (0, 2)}


def microkernels(name, build, symbols, target):
    return (arm.load if target.name in arm.TARGETS else load)(name, build, symbols, target)


def float_rows(target):
    """The microkernels of attention, over keys and values in half precision."""
    found = microkernels(f"vectors-{HEAD_DIM}", vectors.build(HEAD_DIM), vectors.SYMBOLS, target)
    return found | microkernels(f"kv-F16-{HEAD_DIM}-2", kv.build("F16", HEAD_DIM, 2), kv.SYMBOLS, target)


def run(address, *args):
    if isinstance(address, arm.Microkernel):
        return address(*args)
    words.run(address, *(a.ctypes.data if isinstance(a, np.ndarray) else int(a) for a in args))


def random_rows(name, n_rows, n_cols, rng):
    """Rows of random blocks with sane scales, and what they mean as float32."""
    kind = BY_NAME[name]
    raw = rng.integers(0, 256, (n_rows, n_cols // kind.block, kind.nbytes), dtype=np.uint8)
    for at in HEADS.get(name, (0,)):
        scale = (rng.random(raw.shape[:2]) * 0.01 + 0.001).astype(np.float16)
        raw[..., at : at + 2] = scale[..., None].view(np.uint8).reshape(*scale.shape, 2)
    raw = raw.reshape(n_rows, -1)
    if name in formats.FLOATS:
        raw = quantize(rng.standard_normal((n_rows, n_cols)).astype(np.float32), GGMLQuantizationType[name]).view(np.uint8)
    return raw, dequantize(raw, GGMLQuantizationType[name]).astype(np.float32)


def matvec_scratch(name, n_cols):
    """Memory for the activations that matvec reorders."""
    return np.zeros(-(-n_cols // 256) * max(formats.ACT_BYTES, dots.reordered_bytes(formats.QUANTIZED[name])), np.int8)


def activations(x, target):
    """int8 superblocks of float rows, and the float rows that they stand for."""
    n, n_cols = x.shape
    supers = -(-n_cols // 256)
    padded = np.zeros((n, supers * 256), np.float32)
    padded[:, :n_cols] = x
    codes = np.zeros((n, supers, formats.ACT_BYTES), np.int8)
    quantize = microkernels(f"vectors-{HEAD_DIM}", vectors.build(HEAD_DIM), vectors.SYMBOLS, target)["quantize"]
    for t in range(n):
        run(quantize, padded[t], supers, codes[t])
    d = codes[..., formats.D : formats.D + 32].copy().view(np.float32)
    q = codes[..., :256].reshape(n, supers, 8, 32).astype(np.float32)
    return codes, (q * d[..., None]).reshape(n, -1)[:, :n_cols]


@pytest.mark.parametrize("target", VARIANTS)
class TestVariants:
    def test_activations_keep_seven_bits_and_their_sums(self, target):
        x = np.random.default_rng(0).standard_normal((3, 512)).astype(np.float32)
        x[1, 32:64] = 0
        codes, back = activations(x, target)
        assert np.abs(back - x).max() <= np.abs(x).max() / 127
        s32 = codes[..., formats.S32 : formats.S32 + 32].copy().view(np.float32).reshape(3, -1)
        s16 = codes[..., formats.S16 : formats.S16 + 64].copy().view(np.float32).reshape(3, -1)
        np.testing.assert_allclose(s32, back.reshape(3, -1, 32).sum(-1), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(s16, back.reshape(3, -1, 16).sum(-1), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("largest", [1e-18, 1e-20, 3.7e-37, 1e-38, 1e-40, 1e-44, 1e-45])
    def test_activations_as_small_as_float32_has_them_are_finite_and_right(self, largest, target):
        x = np.random.default_rng(0).uniform(-1, 1, (1, 256))
        x[0, ::32] = 1
        x = (x * largest).astype(np.float32)
        codes, back = activations(x, target)
        least = 2.0**-149  # the step of the smallest numbers: a scale is at most half of it beside
        np.testing.assert_allclose(back, x.astype(np.float64), rtol=0, atol=largest / 250 + 64 * least)
        sums = codes[..., formats.D :].copy().view(np.float32)
        assert np.isfinite(sums).all()
        if largest > 1e-37:
            assert np.abs(codes[..., :256]).max() == 127

    @pytest.mark.parametrize("name", formats.QUANTIZED)
    def test_block_rows_times_int8(self, name, target):
        rng = np.random.default_rng(1)
        step = target.lanes * target.tile_vectors
        n_rows, n_cols, n = 2 * step + 1, 768, target.tile
        raw, meant = random_rows(name, n_rows, n_cols, rng)
        codes, x = activations(rng.standard_normal((n, n_cols)).astype(np.float32), target)
        want = x @ meant.T
        f = microkernels(name, lambda t: dots.quantized(name, t), dots.SYMBOLS, target)
        got, scratch = np.full((n, n_rows), 7, np.float32), matvec_scratch(name, n_cols)
        run(f["matvec"], raw, raw.shape[1], n_rows, n_cols, codes[0], got[0], 1, scratch)
        np.testing.assert_allclose(got[0], want[0] + 7, atol=2e-5 * np.abs(want).max())
        size, short = 3 * tiles.panel_bytes(name, target.lanes), tiles.short(target)
        panels = np.zeros((target.tile_vectors, size), np.uint8)
        got[:] = np.nan
        of_short = np.full((short, n_rows), np.nan, np.float32)
        for height, suffix, results in ((n, "", got), (short, "_short", of_short)):
            packed = np.zeros(3 * tiles.packed_bytes(name, height, target), np.uint8)
            run(f["pack" + suffix], arm.pointers(codes[:height]), 3, packed)
            for r in range(0, n_rows - 1, step):
                for v, panel in enumerate(panels):
                    run(f["prepare"], raw[r + v * target.lanes :], raw.shape[1], 3, panel)
                run(f["tile" + suffix], panels, 3, packed, arm.pointers(results), 4 * r, 0, 0, 0)
        np.testing.assert_allclose(got[:, :-1], want[:, :-1], atol=2e-5 * np.abs(want).max())
        assert np.isnan(got[:, -1]).all(), "a tile wrote past its rows"
        np.testing.assert_array_equal(of_short, got[:short])  # so that a token's result does not depend on how many there are

    @pytest.mark.parametrize("name", formats.QUANTIZED)
    def test_several_tokens_have_the_bits_of_each_alone(self, name, target):
        """Rows and superblocks that do not come out even, and for 32 weights a block rows that end within a superblock."""
        rng, n_rows, short = np.random.default_rng(7), 2 * several.rows(target) + 1, formats.QUANTIZED[name].block == 32
        n_cols = (several.SUPERS + 1) * 256 + 96 * short
        raw, meant = random_rows(name, n_rows, n_cols, rng)
        codes, x = activations(rng.standard_normal((several.MOST, n_cols)).astype(np.float32), target)
        f = microkernels(name, lambda t: dots.quantized(name, t), dots.SYMBOLS, target)
        single = np.full((several.MOST, n_rows), 7, np.float32)
        for t in range(several.MOST):
            run(f["matvec"], raw, raw.shape[1], n_rows, n_cols, codes[t], single[t], 1, matvec_scratch(name, n_cols))
        np.testing.assert_allclose(single, x @ meant.T + 7, atol=2e-5 * np.abs(x @ meant.T).max())
        scratch = np.zeros(several.scratch_bytes(formats.QUANTIZED[name], n_cols // 256, several.MOST, target), np.int8)
        for count in (1, 2, 3, 4, 5, 6, 7, 16):
            padded = -(-count // several.PAD) * several.PAD
            got = np.full((padded, n_rows + 3), 7, np.float32)
            xs, outs = arm.pointers(codes[:padded]), arm.pointers(got)
            run(f["matvecs"], raw, raw.shape[1], n_rows, n_cols, xs, outs, 1, scratch, 8, count, 0)
            np.testing.assert_array_equal(got[:count, 2:-1], single[:count])
            assert (got[:, :2] == 7).all() and (got[:, -1] == 7).all(), "rows that are not its own"

    @pytest.mark.parametrize("name", formats.QUANTIZED)
    def test_the_largest_codes_and_activations_overflow_nothing(self, name, target):
        """Rows whose bytes are all 0, 127, 128 or 255 hold every format's extreme codes; activations are all 127 or -127."""
        n_rows, n_cols, n = target.lanes * target.tile_vectors, 512, target.tile
        random, _ = random_rows(name, n_rows, n_cols, np.random.default_rng(8))
        kind = BY_NAME[name]
        extremes = np.array([0, 127, 128, 255], np.uint8)
        given = random.reshape(n_rows, -1, kind.nbytes)

        def rows_of(fill):
            """Rows of these bytes, under the scales of the random ones; and their weights."""
            raw = fill * np.ones_like(random)
            blocks = raw.reshape(n_rows, -1, kind.nbytes)
            for at in HEADS.get(name, (0,)):
                blocks[..., at : at + 2] = given[..., at : at + 2]
            return raw, dequantize(raw, GGMLQuantizationType[name]).astype(np.float64)

        raw, meant = rows_of(np.repeat(extremes, n_rows // 4)[:, None])
        largest = np.max([np.abs(rows_of(byte)[1]) for byte in extremes], 0)  # both sides of an offset may be as large
        signs = np.stack([np.ones(n_cols), -np.ones(n_cols), *[np.where(np.arange(n_cols) % k, 1, -1) for k in range(2, n)]])[
            :n
        ]
        codes, x = activations(signs.astype(np.float32), target)
        most = np.abs(x.astype(np.float64)) @ largest.T
        f = microkernels(name, lambda t: dots.quantized(name, t), dots.SYMBOLS, target)
        got = np.full((n, n_rows), np.nan, np.float32)
        for row in range(n):
            run(f["matvec"], raw, raw.shape[1], n_rows, n_cols, codes[row], got[row], 0, matvec_scratch(name, n_cols))
        assert (np.abs(got - x @ meant.T) <= 1e-5 * most).all()
        few = min(n, several.PAD)
        scratch = np.zeros(several.scratch_bytes(formats.QUANTIZED[name], n_cols // 256, few, target), np.int8)
        again = np.full((several.PAD, n_rows), np.nan, np.float32)
        xs, outs = arm.pointers(codes[:few]), arm.pointers(again)
        run(f["matvecs"], raw, raw.shape[1], n_rows, n_cols, xs, outs, 0, scratch, 0, few, 0)
        np.testing.assert_array_equal(again[:few], got[:few])
        panels = np.zeros((target.tile_vectors, 2 * tiles.panel_bytes(name, target.lanes)), np.uint8)
        packed = np.zeros(2 * tiles.packed_bytes(name, target.tile, target), np.uint8)
        run(f["pack"], arm.pointers(codes), 2, packed)
        for v, panel in enumerate(panels):
            run(f["prepare"], raw[v * target.lanes :], raw.shape[1], 2, panel)
        got[:] = np.nan
        run(f["tile"], panels, 2, packed, arm.pointers(got), 0, 0, 0, 0)
        assert (np.abs(got - x @ meant.T) <= 1e-5 * most).all()

    @pytest.mark.parametrize("name", [name for name, f in formats.QUANTIZED.items() if f.block == 32])
    def test_rows_that_end_within_a_superblock(self, name, target):
        rng = np.random.default_rng(2)
        raw, meant = random_rows(name, 5, 352, rng)
        codes, x = activations(rng.standard_normal((1, 352)).astype(np.float32), target)
        f = microkernels(name, lambda t: dots.quantized(name, t), dots.SYMBOLS, target)
        got, scratch = np.zeros(5, np.float32), matvec_scratch(name, 352)
        run(f["matvec"], raw, raw.shape[1], 5, 352, codes, got, 0, scratch)
        np.testing.assert_allclose(got, (x @ meant.T)[0], atol=2e-5 * np.abs(x @ meant.T).max())

    @pytest.mark.parametrize("name", formats.FLOATS)
    def test_float_rows(self, name, target):
        rng = np.random.default_rng(3)
        raw, meant = random_rows(name, 7, 203, rng)
        x = rng.standard_normal((4, 203)).astype(np.float32)
        f = microkernels(name, lambda t: floats.floats(name, t), floats.SYMBOLS, target)
        got = np.zeros((4, 7), np.float32)
        xs, outs = (arm.pointers(m) for m in (x, got))
        run(f["tile"], raw, raw.shape[1], 7, 203, xs, outs, 0, 0)
        np.testing.assert_allclose(got, x @ meant.T, atol=1e-4)
        run(f["matvec"], raw, raw.shape[1], 7, 203, x, got, 1, 0)
        np.testing.assert_allclose(got[0], 2 * (x @ meant.T)[0], atol=1e-4)

    @pytest.mark.parametrize("name", [*formats.QUANTIZED, *formats.FLOATS])
    def test_a_row_dequantized(self, name, target):
        raw, meant = random_rows(name, 1, 512, np.random.default_rng(4))
        build, symbols = (floats.floats, floats.SYMBOLS) if name in formats.FLOATS else (dots.quantized, dots.SYMBOLS)
        f = microkernels(name, lambda t: build(name, t), symbols, target)
        got = np.zeros(512, np.float32)
        run(f["dequantize"], raw, 512, got)
        np.testing.assert_allclose(got, meant[0], rtol=1e-5, atol=1e-6 * np.abs(meant).max())

    def test_float_vectors(self, target):
        rng = np.random.default_rng(5)
        f = float_rows(target)
        gate, up, factor = (rng.standard_normal(n).astype(np.float32) * 20 for n in (256, 256, 1))
        gate[0], gate[1] = 3000, -3000
        factor[0] = 0.7
        g = gate.astype(np.float64) * factor
        want = g / (1 + np.exp(-g.clip(-700))) * up * factor
        run(f["swiglu"], gate, up, factor, 256)
        np.testing.assert_allclose(gate, want, rtol=1e-5, atol=1e-6)

        half = np.zeros(256, np.float16)
        x = np.concatenate([rng.standard_normal(200) * 10.0 ** rng.integers(-9, 4, 200), np.zeros(56)]).astype(np.float32)
        x[200:204] = 65504, -65519, 1e9, -1e9
        run(f["write"], x, 256, half)
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(half, x.astype(np.float16))

    @pytest.mark.parametrize("n_keys", [1, 7, 32, 37, 100])
    def test_a_product_with_transposed_keys_is_the_product(self, target, n_keys):
        f, rng = float_rows(target), np.random.default_rng(5)
        span, rows = kv.span(HEAD_DIM, target), 2 * target.tile
        keys = rng.standard_normal((n_keys, HEAD_DIM)).astype(np.float16)
        queries = rng.standard_normal((rows, HEAD_DIM)).astype(np.float32)
        transposed = np.full((-(-n_keys // span), HEAD_DIM, span), np.nan, np.float32)
        run(f["transpose_keys"], keys, n_keys, transposed)
        out = np.full((rows, transposed.shape[0] * span), np.nan, np.float32)
        for b, block in enumerate(transposed):
            to = out[:, b * span :]
            run(f["product"], queries, 4 * HEAD_DIM, rows, block, 4 * span, HEAD_DIM, to, 4 * out.shape[1], 0)
        np.testing.assert_allclose(out[:, :n_keys], queries @ keys.astype(np.float32).T, atol=1e-4)

    def test_a_product_adds_to_what_stands_times_its_factor(self, target):
        f, rng = float_rows(target), np.random.default_rng(6)
        span, rows, n_keys = kv.span(HEAD_DIM, target), 2 * target.tile, 21
        half = rng.standard_normal((n_keys, HEAD_DIM)).astype(np.float16)
        values, p = np.empty((n_keys, HEAD_DIM), np.float32), rng.random((rows, n_keys)).astype(np.float32)
        run(f["widen"], half, half.size, values)
        np.testing.assert_array_equal(values, half.astype(np.float32))
        out, state = (rng.standard_normal((rows, n)).astype(np.float32) for n in (HEAD_DIM, 3))
        want = state[:, 2:] * out + p @ values
        for c in range(0, HEAD_DIM, span):
            args = p, 4 * n_keys, rows, values[:, c:], 4 * HEAD_DIM, n_keys, out[:, c:], 4 * HEAD_DIM, state
            run(f["product"], *args)
        np.testing.assert_allclose(out, want, atol=1e-4)

    def test_softmax_in_blocks_is_softmax(self, target):
        rng = np.random.default_rng(6)
        f = float_rows(target)
        scores = (rng.standard_normal((2, 2, 64)) * 30).astype(np.float32)
        values = rng.standard_normal((2, 64, HEAD_DIM)).astype(np.float16)
        valid, scale = np.array([[64, 37], [5, 0]]), np.array([0.5], np.float32)
        out, state = np.full((2, HEAD_DIM), 0.0, np.float32), np.array([[-3e38, 0, 0]] * 2, np.float32)
        want = []
        for r in range(2):
            s = np.concatenate([scores[b, r, : valid[r, b]] for b in range(2)]).astype(np.float64) * 0.5
            v = np.concatenate([values[b, : valid[r, b]] for b in range(2)]).astype(np.float64)
            p = np.exp(s - s.max())
            want.append(p @ v / p.sum())
        for b in range(2):
            for r in range(2):
                run(f["softmax"], scores[b, r], valid[r, b], 64, state[r], scale)
            run(f["weigh"], scores[b], 256, 2, values[b], 64, out, state)
        np.testing.assert_allclose(out / state[:, 1:2], want, rtol=1e-4, atol=1e-5)


DOTPROD, I8MM = ("dotprod",), ("dotprod", "i8mm")


@cache
def arm_products(name, cpu, features):
    """How often each instruction that multiplies bytes stands in each microkernel, for an ARM CPU."""
    triple = "arm64-apple-macosx14.0.0" if cpu.startswith("apple") else "aarch64-unknown-linux-gnu"
    has = dict.fromkeys((*features, "neon"), True) | {"sve": False}  # as features.py says it
    text = assembly(lambda t: dots.quantized(name, t), targets(triple, cpu, has)[0])
    called = set(re.findall(r"\tbl\t_?(\w+)", text))
    assert called <= {"matvec"}, "a microkernel must not call the library"  # matvecs calls it for the rows that are left
    parts = re.split(r"^_?([a-z]\w*):", text, flags=re.M)[1:]
    return {
        name: Counter(re.findall(r"\t([us]\w*(?:dot|mmla|mull|mlal))", code))
        for name, code in zip(parts[::2], parts[1::2], strict=True)
    }


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0"])
@pytest.mark.parametrize(
    ("cpu", "features", "row", "tile"),
    [
        ("apple-m1", DOTPROD, "sdot", "sdot"),
        ("apple-m2", I8MM, "usdot", "usmmla"),
        ("neoverse-v1", I8MM, "usdot", "usmmla"),
    ],
)
def test_arm_multiplies_bytes_with_the_best_instruction_of_the_cpu(name, cpu, features, row, tile):
    used = arm_products(name, cpu, features)
    assert list(used["matvec"]) == [row]
    assert list(used["tile"]) == [tile]
    assert used["matvec"][row] >= 16  # 16 weights each, of a row at a time
    assert used["tile"][tile] >= 32


def test_avx_vnni_is_used_where_there_are_no_registers_of_64_bytes():
    has = dict.fromkeys(("avx2", "fma", "f16c", "avxvnni"), True)
    best = targets("x86_64-unknown-linux-gnu", "alderlake", has)[0]
    text = assembly(lambda t: dots.quantized("Q4_K", t), best)
    assert best.name == "avxvnni"
    assert "{vex}\tvpdpbusd" in text
    assert "zmm" not in text
    assert "vpmaddubsw" not in text


@pytest.mark.parametrize(
    ("cpu", "name", "has", "lanes"),
    [
        ("icelake-server", "avx512vnni", ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni"), 16),
        ("alderlake", "avxvnni", ("avx2", "fma", "f16c", "avxvnni"), 8),
    ],
)
def test_vnni_is_called_in_the_form_that_every_llvm_takes(cpu, name, has, lanes):
    """LLVM before 22 refuses vectors of bytes as operands; this one converts vectors of int32."""
    target = targets("x86_64-unknown-linux-gnu", cpu, dict.fromkeys(has, True))[0]
    assert target.name == name
    vector = f"<{lanes} x i32>"
    declared = rf'declare {vector} @"?llvm\.x86\.avx512\.vpdpbusd\.{32 * lanes}"?\((.*)\)'
    (operands,) = re.findall(declared, str(dots.quantized("Q4_0", target)))
    assert re.findall(r"<\d+ x \w+>", operands) == [vector] * 3
    assert "vpdpbusd" in assembly(lambda t: dots.quantized("Q4_0", t), target)


def test_codes_above_127_cost_no_more_where_only_signed_bytes_are_multiplied():
    assert arm_products("Q8_0", "apple-m1", DOTPROD)["tile"] == arm_products("Q4_K", "apple-m1", DOTPROD)["tile"]


@pytest.mark.parametrize(("threads", "alone"), [(1, False), (3, False), (7, False), (3, True)])
@pytest.mark.parametrize("name", ["Q6_K", "Q8_0", "F16"])
def test_a_product_stays_within_its_rows_and_its_scratch(name, threads, alone):
    """Odd row counts, any number of tokens, more threads than cores; canaries after the scratch and after every row."""
    rng, pool = np.random.default_rng(7), Pool(threads)
    for n_rows, n_cols, n in ((33, 256, 5), (97, 512, 241), (300, 768, 487), (31, 256, 3), (5, 256, 1), (257, 512, 1)):
        raw, meant = random_rows(name, n_rows, n_cols, rng)
        x = rng.standard_normal((n, n_cols)).astype(np.float32)
        codes, rounded = activations(x, chosen_target())
        codes = np.ascontiguousarray(codes.reshape(n, -1))
        layout = matmul.Scratch.of(n, n_rows, n_cols)
        raw_scratch = np.full((threads + 1) * (layout.end + 4096), 0xAB, np.uint8)
        start = -raw_scratch.ctypes.data % 64
        scratch = raw_scratch[start : start + threads * (layout.end + 4096)].reshape(threads, -1)
        out = np.full((n, n_rows + 8), np.nan, np.float32)
        table = np.concatenate([[0, n], np.arange(n)]).astype(np.int64)
        m = matmul.Matrix(raw.ctypes.data, name, 1, n_rows, n_cols, raw.shape[1])
        rows = matmul.Rows(x.ctypes.data, x.strides[0], codes.ctypes.data, codes.strides[0])
        program = Program()
        to, flags = matmul.Rows(out.ctypes.data, out.strides[0]), np.array([0, alone], np.int64)
        stop = flags.ctypes.data
        arguments = matmul.arguments(m, rows, to, table.ctypes.data, scratch, layout, program.counter(), stop, stop + 8)
        program.add(matmul.matmul, arguments)
        want = (x if name == "F16" else rounded) @ meant.T
        for _ in range(2):  # the second time nothing may be taken for done
            out[:, :n_rows] = np.nan
            pool.run(program.seal())
            np.testing.assert_allclose(out[:, :n_rows], want, atol=1e-3 * np.abs(want).max())
        assert np.isnan(out[:, n_rows:]).all()
        assert (scratch[:, layout.end :] == 0xAB).all()


def before_a_gap(rows):
    """A copy of rows that ends where memory does: a byte read beyond is SIGSEGV, as beyond the last tensor of a mapped file."""
    size = -(-rows.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    address = np.frombuffer(memory, np.uint8).ctypes.data
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + size), mmap.PAGESIZE, 0) == 0
    copy = np.frombuffer(memory, np.uint8, rows.nbytes, size - rows.nbytes).reshape(rows.shape)
    copy[:] = rows
    return copy


def multiply_before_a_gap(name):
    """Products of every kind with the chosen variant; AssertionError if one is wrong."""
    rng, pool = np.random.default_rng(8), Pool(2)
    block = formats.QUANTIZED[name].block if name in formats.QUANTIZED else 1
    for n_cols in {256: (256, 512), 32: (32, 512, 352), 1: (7, 512, 203)}[block]:
        for n_rows in (5, 33, 97):
            raw, meant = random_rows(name, n_rows, n_cols, rng)
            raw = before_a_gap(raw)
            m = matmul.Matrix(raw.ctypes.data, name, 1, n_rows, n_cols, raw.shape[1])
            for n in (1, 3, 8, 33, 300):
                x = np.zeros((n, -(-n_cols // 256) * 256), np.float32)
                x[:, :n_cols] = rng.standard_normal((n, n_cols))
                codes, rounded = activations(x, chosen_target())
                codes, layout = np.ascontiguousarray(codes.reshape(n, -1)), matmul.Scratch.of(n, n_rows, n_cols)
                scratch = np.zeros(2 * layout.end + 64, np.uint8)
                scratch = scratch[-scratch.ctypes.data % 64 :][: 2 * layout.end].reshape(2, -1)
                out, flags, program = np.zeros((n, n_rows), np.float32), np.zeros(2, np.int64), Program()
                table = np.concatenate([[0, n], np.arange(n)]).astype(np.int64)
                rows = matmul.Rows(x.ctypes.data, x.strides[0], codes.ctypes.data, codes.strides[0])
                to, stop = matmul.Rows(out.ctypes.data, out.strides[0]), flags.ctypes.data
                given = m, rows, to, table.ctypes.data, scratch, layout, program.counter(), stop, stop + 8
                program.add(matmul.matmul, matmul.arguments(*given))
                pool.run(program.seal())
                want = (x if block == 1 else rounded)[:, :n_cols] @ meant.T
                np.testing.assert_allclose(out, want, atol=1e-3 * np.abs(want).max())


@pytest.mark.parametrize("name", [*formats.QUANTIZED, *formats.FLOATS])
def test_a_product_reads_nothing_beyond_its_rows(name):
    matmul.microkernels(name)  # compiled here, as a child cannot keep it for the next one
    if (child := os.fork()) == 0:
        try:
            multiply_before_a_gap(name)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("damage", [lambda code: b"", lambda code: code[:-9], lambda code: code[:99] + b"?" + code[100:]])
def test_damaged_object_code_is_compiled_again_not_run(damage, tmp_path, monkeypatch):
    monkeypatch.setattr(jit, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(jit, "_libraries", {})
    build = vectors.build(HEAD_DIM)
    first = load("fresh", build, vectors.SYMBOLS)
    (file,) = tmp_path.glob("fresh-*.o")
    sound = file.read_bytes()
    file.write_bytes(damage(sound))
    monkeypatch.setattr(jit, "_libraries", {})
    again = load("fresh", build, vectors.SYMBOLS)
    assert file.read_bytes() == sound
    assert again.keys() == first.keys()


def test_threads_that_load_the_same_microkernels_get_the_same_code(tmp_path, monkeypatch):
    """A second copy would take the first one's place, and unload it from under whoever runs it."""
    monkeypatch.setattr(jit, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(jit, "_libraries", {"jit": jit._compiler()})
    start, build = Barrier(8), vectors.build(HEAD_DIM)

    def address(_):
        start.wait(300)
        return load("shared", build, vectors.SYMBOLS)[vectors.SYMBOLS[0]]

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(address, range(8)))) == 1


@pytest.mark.parametrize("step", ["set up", "link"])
def test_where_jitlink_fails_the_older_linker_loads_the_code(step, tmp_path, monkeypatch):
    make, add = llvm.create_lljit_compiler, llvm.JITLibraryBuilder.link

    def setting_up(machine, *, use_jit_link):
        if use_jit_link and step == "set up":
            raise RuntimeError("no unwinder")
        made = make(machine, use_jit_link=use_jit_link)
        made.jit_link = use_jit_link
        return made

    def linking(builder, lljit, name):
        if lljit.jit_link:
            raise RuntimeError("unknown relocation")
        return add(builder, lljit, name)

    monkeypatch.setattr(llvm, "create_lljit_compiler", setting_up)
    monkeypatch.setattr(llvm.JITLibraryBuilder, "link", linking)
    monkeypatch.setattr(jit, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(jit, "_libraries", {})
    assert all(load("fresh", vectors.build(HEAD_DIM), vectors.SYMBOLS).values())


def test_an_unknown_variant_is_refused(monkeypatch):
    monkeypatch.setenv("LLAMACLI_SIMD", "avx1024")
    with pytest.raises(UsageError, match=r"expected one of .*, found avx1024"):
        jit.chosen_target.__wrapped__()
