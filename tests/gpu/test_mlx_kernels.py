"""A whole stage through the GPU's kernels, compiled as C++ (cpp.py), against the oracle and against the CPU."""

from pathlib import Path

import oracle
import pytest
import tiny
from installed import needed

mx = needed("mlx.core")

from stages import EXACT, WIDE, WIDENED, agreement, difference, engine, in_pieces, one_pass, tokens  # noqa: E402

from llamacli.files.gguf import open_gguf  # noqa: E402
from llamacli.llama4.config import Config  # noqa: E402
from llamacli.mlx import matrix  # noqa: E402
from llamacli.mlx.stage import MlxStage  # noqa: E402
from llamacli.text.tokenizer import Tokenizer  # noqa: E402

TYPES = ["F32", "F16", "BF16", "Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS", "IQ3_S"]


@pytest.mark.parametrize("name", TYPES)
def test_token_by_token_every_type_computes_what_its_weights_say(as_cpp, name, tmp_path):
    path = tiny.tiny_gguf(tmp_path / "tiny.gguf", types=lambda _: name, seed=2, n_layers=2, **WIDE)
    model, ids = engine(path), tokens(5)
    found, expected = in_pieces(model, ids, 1), oracle.logits(path, ids)
    assert difference(found, expected) <= (EXACT if name != "IQ3_S" else 1e-3)  # that is read as float16
    assert any("IQ3_S" in notice for notice in model.notices) == (name == "IQ3_S")


@pytest.mark.parametrize("shape", [WIDE, WIDE | {"used": 2}], ids=["1 expert", "2 experts"])
def test_prompts_go_through_kernels_as_tokens_do(as_cpp, shape, tmp_path):
    """Pieces of 3 are multiplied with blocks; longer ones widen each matrix, and read the router's choices back."""
    path, ids = tiny.tiny_gguf(tmp_path / "tiny.gguf", types=lambda _: "Q4_K", seed=2, n_layers=2, **shape), tokens(24)
    model, expected = engine(path), oracle.logits(path, ids)
    assert difference(in_pieces(model, ids, 3), expected) <= EXACT
    chunks = tiny.tiny_gguf(tmp_path / "long.gguf", types=lambda _: "Q4_K", seed=2, n_layers=2, **shape, chunk=64)
    found, expected = one_pass(engine(chunks), ids), oracle.logits(chunks, ids)
    assert EXACT < difference(found, expected) <= WIDENED


def test_a_large_matrix_is_widened_piece_by_piece(as_cpp, tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "WIDENED", 2 * 256 * 100)  # 100 rows of 256 columns
    path, ids = tiny.tiny_gguf(tmp_path / "tiny.gguf", types=lambda _: "Q4_K", n_layers=2, chunk=64, **WIDE), tokens(12)
    assert difference(one_pass(engine(path), ids), oracle.logits(path, ids)) <= WIDENED


def test_values_beyond_float16_do_not_overflow(as_cpp, tmp_path):
    """The product of gate and up may be large; each row is scaled before it is rounded to float16."""
    path = tiny.tiny_gguf(
        tmp_path / "tiny.gguf",
        types=lambda _: "Q8_0",
        **WIDE | {"chunk": 64, "n_layers": 2, "moe_step": 1},
        edit=lambda t: t.update({n: 120 * v for n, v in t.items() if "ffn_up" in n or "ffn_gate_sh" in n}),
    )
    ids = tokens(12)
    found, expected = one_pass(engine(path), ids), oracle.logits(path, ids)
    assert difference(found, expected) <= WIDENED


SMALL = Path(__file__).resolve().parents[2] / "models" / "scout-tiny" / "scout-tiny.gguf"
TEXT = "The capital of France is Paris. Which planet is the largest? Jupiter is the largest planet."


def test_the_small_model_through_the_gpus_kernels(as_cpp):
    """Trained weights in a mix of types, a text, every layer through the kernels."""
    file = open_gguf(SMALL)
    config, ids = Config.from_gguf(file), Tokenizer.from_gguf(file).encode(TEXT, bos=True, special=False)
    model, expected = engine(SMALL), oracle.logits(SMALL, ids)
    assert difference(in_pieces(model, ids, 1), expected) <= EXACT
    assert EXACT < difference(one_pass(model, ids), expected) <= WIDENED
    model.stages[-1] = MlxStage(file, config, range(config.n_layers), dtype=mx.float16)  # as on a GPU
    for found in (in_pieces(model, ids, 1), one_pass(model, ids)):
        divergence, same = agreement(found, expected)
        assert 0 < divergence <= 1e-4
        assert same == 1
