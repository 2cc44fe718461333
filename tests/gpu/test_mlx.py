"""Layers on MLX's CPU build, with widened weights, against the oracle in NumPy; and that the bounds notice a fault."""

import numpy as np
import oracle
import pytest
import tiny
from installed import needed

mx = needed("mlx.core")

from stages import EXACT, MIXED, WIDE, agreement, difference, engine, hand_over, in_pieces, one_pass, tokens  # noqa: E402

from llamacli.files.gguf import open_gguf  # noqa: E402
from llamacli.llama4.config import Config  # noqa: E402
from llamacli.mlx import matrix  # noqa: E402
from llamacli.mlx.operations import Operations, Routed  # noqa: E402
from llamacli.mlx.stage import MlxStage  # noqa: E402

SHAPES = {
    "scout": tiny.SCOUT,
    "maverick": tiny.MAVERICK,
    "top-2 experts": {"used": 2},
    "top-3 maverick": tiny.MAVERICK | {"used": 3},
    "one expert": {"experts": 1},
    "5 heads on 1": {"heads": 5, "kv_heads": 1, "head_dim": 32},
    "heads of 128": {"heads": 5, "kv_heads": 1, "head_dim": 128},
    "every third layer a mixture": {"moe_step": 3, "n_layers": 7},
    "no QK norm": {"use_qk_norm": False},
    "chunk of 1": {"chunk": 1},
    "chunk of 13": {"chunk": 13},
    "no chunks": {"chunk": 0},
    "strong temperature": {"temperature_length": 2.0, "temperature_scale": 1.0},
    "a large epsilon": {"rms_eps": 0.05},
    "odd widths": {"n_embd": 72, "n_ff_exp": 40, "n_ff": 104, "vocab": 301},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_float32_logits_are_the_oracles(tmp_path, shape):
    path, ids = tiny.tiny_gguf(tmp_path / "tiny.gguf", seed=3, **shape), tokens(21)
    model, expected = engine(path), oracle.logits(path, ids)
    for found in (one_pass(model, ids), in_pieces(model, ids, 1), in_pieces(model, ids, 7)):
        assert found.dtype == np.float32
        assert difference(found, expected) <= EXACT


def test_rope_factors_are_the_files(tmp_path):
    factors = {"rope_freqs.weight": np.linspace(1, 4, 8, dtype=np.float32)}
    path, ids = tiny.tiny_gguf(tmp_path / "tiny.gguf", edit=lambda t: t.update(factors)), tokens(41)
    assert difference(one_pass(engine(path), ids), oracle.logits(path, ids)) <= EXACT


def test_metas_chunk_of_8192_and_its_temperature(tmp_path):
    """Where a new chunk begins at 8192 and the temperature changes at 8191; angles of such positions need float64."""
    path = tiny.tiny_gguf(tmp_path / "tiny.gguf", chunk=8192, temperature_length=8192.0, temperature_scale=1.0)
    ids, cpu, model = tokens(8200), engine(path, 0), engine(path)
    cache, moved = cpu.new_cache(8200), model.new_cache(8200)
    cpu.forward(ids[:8188], cache)
    hand_over(cache, moved)
    expected = cpu.forward(ids[8188:], cache, all_logits=True)
    found = np.array([model.forward([token], moved) for token in ids[8188:]])
    assert difference(found, expected) <= MIXED


def test_an_output_that_the_file_lacks_is_the_embedding(tmp_path):
    tied = tiny.tiny_gguf(tmp_path / "tied.gguf", edit=lambda t: t.pop("output.weight"))
    spelt_out = tiny.tiny_gguf(tmp_path / "out.gguf", edit=lambda t: t.update({"output.weight": t["token_embd.weight"]}))
    assert difference(one_pass(engine(tied), tokens(9)), one_pass(engine(spelt_out), tokens(9))) <= EXACT


# faults


def _halves_rotated(self, x):
    a, b, cos, sin = *mx.split(x, 2, -1), self._cos[:, None], self._sin[:, None]
    return mx.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def _without(**switched):
    real = Operations.attend
    return lambda self, i, q, k, v, **how: real(self, i, q, k, v, **(how | switched))


def _score_on_the_output(self, x, h, w, routed):
    return x + w.times_chosen(h, routed.experts.reshape(-1)) * routed.scores


FAULTS = {
    "halves rotated": (Operations, "_rotated", _halves_rotated),
    "no rotation": (Operations, "attend", _without(rotate=False)),
    "no QK norm": (Operations, "attend", _without(norm=False)),
    "no temperature": (Operations, "attend", _without(temperature=False)),
    "the other expert": (
        Operations,
        "route",
        lambda self, h, w, real=Operations.route: (lambda r: Routed((r.experts + 1) % 4, r.scores))(real(self, h, w)),
    ),
    "no score": (
        Operations,
        "route",
        lambda self, h, w, real=Operations.route: (lambda r: Routed(r.experts, mx.ones_like(r.scores)))(real(self, h, w)),
    ),
    "score on the output": (Operations, "add_expert_matmul", _score_on_the_output),
    "gate and up exchanged": (matrix, "_swiglu", lambda gate, up, scores, real=matrix._swiglu: real(up, gate, scores)),
}


@pytest.mark.parametrize(("home", "name", "wrong"), FAULTS.values(), ids=FAULTS)
def test_the_bound_notices_a_fault(home, name, wrong, tmp_path, monkeypatch):
    path, ids = tiny.tiny_gguf(tmp_path / "tiny.gguf", seed=3), tokens(12)
    monkeypatch.setattr(home, name, wrong)
    assert difference(in_pieces(engine(path), ids, 1), oracle.logits(path, ids)) > 100 * EXACT


@pytest.mark.parametrize("wrong", [{"temperature_scale": 0.11}, {"rms_eps": 1e-4}, {"rope_theta": 5e5 * 1.01}, {"chunk": 9}])
def test_the_bound_notices_a_wrong_constant(tmp_path, wrong):
    path, ids = tiny.tiny_gguf(tmp_path / "right.gguf", use_qk_norm=False), tokens(41)
    other = tiny.tiny_gguf(tmp_path / "wrong.gguf", use_qk_norm=False, **wrong)
    assert difference(one_pass(engine(path), ids), oracle.logits(other, ids)) > 2 * EXACT


def test_float16_with_the_same_experts_is_near(tmp_path, monkeypatch):
    """What a GPU computes with; the choices of experts are those of float32, since a near tie falls either way."""
    path, ids = tiny.tiny_gguf(tmp_path / "tiny.gguf", types=lambda _: "Q4_K", seed=2, **WIDE), tokens(64)
    file = open_gguf(path)
    config, choices, real = Config.from_gguf(file), [], Operations.route
    exact, half = (engine(path) for _ in range(2))
    half.stages[-1] = MlxStage(file, config, range(config.n_layers), dtype=mx.float16)

    def noted(self, h, w):
        choices.append(real(self, h, w).experts)
        return real(self, h, w)

    def followed(self, h, w):
        experts = choices.pop(0)
        return Routed(experts, mx.sigmoid(mx.take_along_axis(w.times(h), experts, -1)))

    monkeypatch.setattr(Operations, "route", noted)
    expected = one_pass(exact, ids)
    monkeypatch.setattr(Operations, "route", followed)
    divergence, same = agreement(one_pass(half, ids), expected)
    assert 0 < divergence <= 1e-3
    assert same >= 0.95
