"""A short round of tests/fuzz.py: damaged files of every format are read or refused in one line."""

import fuzz
import gguf_bytes
import pytest
import tiny
import tiny_tower

from llamacli.cli.inspect import describe
from llamacli.errors import LlamacliError
from llamacli.files.gguf import open_gguf
from llamacli.llama4.config import Config
from llamacli.plan.offload import plan_offload
from llamacli.plan.placement import plan_residency
from llamacli.text.template import render
from llamacli.text.tokenizer import Tokenizer
from llamacli.vision.sight import cost, open_tower
from quantize import tower

KINDS = ("gguf", "imatrix", "imatrix-gguf", "safetensors", "config", "tokenizer")


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path, name):
    kind = fuzz.kinds(tmp_path)[name]()
    assert kind.run(kind.raw)
    outcomes = {kind.run(raw) for _, raw in fuzz.inputs(kind, seed=1, first=0, count=120)}
    assert outcomes == {True, False}  # otherwise the mutations are too weak or too strong


def test_every_kind_of_fuzz_is_tested(tmp_path):
    assert set(fuzz.kinds(tmp_path)) == set(KINDS)


VALUES = [
    *(("u32", n) for n in (0, 1, 7, (1 << 32) - 1)),
    *(("i64", n) for n in (-1, -(1 << 63), 1 << 62)),
    ("u64", (1 << 64) - 1),
    *(("f64", x) for x in (0.0, -1.0, 1e-308, 1e308, float("nan"), float("inf"))),
    ("bool", True),
    *(("string", text) for text in (b"", b"x", b"\xff", b"x" * 5000, b"a\nb\x1b[2J")),
    *(("array", ("u32", numbers)) for numbers in ([], [1], [1, 2, 3])),
    *(("array", ("f32", [x] * 3)) for x in (0.5, float("nan"))),
    *(("array", ("string", texts)) for texts in ([], [b"a", b"b", b"c"])),
    ("array", ("bool", [True] * 3)),
]


def read_model(path):
    """Everything that is read before a model runs."""
    gguf = open_gguf(path)
    describe(gguf)
    config = Config.from_gguf(gguf)
    plan_residency(gguf, config, 64, 2, None, "auto", 0, plan_offload(gguf, config, 64, "cpu", None, "auto", None))
    render(Tokenizer.from_gguf(gguf), [{"role": "user", "content": "?"}], gguf.metadata.get("tokenizer.chat_template"))


def read_tower(path):
    gguf = open_tower(open_gguf(path), tiny_tower.Shape().n_text, path)
    describe(gguf)
    cost(gguf)
    tower.of_gguf(gguf)


@pytest.mark.parametrize(
    "write, read", [(tiny.tiny_gguf, read_model), (tiny_tower.tower_gguf, read_tower)], ids=["model", "tower"]
)
def test_a_key_with_a_value_of_any_kind_is_read_or_refused_in_one_line(tmp_path, write, read):
    sound, path = write(tmp_path / "sound.gguf"), tmp_path / "x.gguf"
    read(sound)
    change, keys = gguf_bytes.changer(sound)
    for key in keys:
        for kind, content in VALUES:
            path.write_bytes(change(key, kind, content))
            try:
                read(path)
            except LlamacliError as error:
                assert str(error).isprintable() and len(str(error)) < 1000, (key, kind, content)
            except Exception as error:
                raise AssertionError(f"{key} as {kind} {content!r:.60}") from error
