"""A short round of tests/fuzz.py: damaged files of every format are read or refused in one line, whatever is wrong."""

import fuzz
import pytest

KINDS = ("gguf", "imatrix", "imatrix-gguf", "safetensors", "config", "tokenizer")


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path, name):
    kind = fuzz.kinds(tmp_path)[name]()
    assert kind.run(kind.raw)
    outcomes = {kind.run(raw) for _, raw in fuzz.inputs(kind, seed=1, first=0, count=120)}
    assert outcomes == {True, False}  # or else the mutations are too weak or too strong to find anything


def test_the_kinds_here_are_all_that_there_are(tmp_path):
    assert set(fuzz.kinds(tmp_path)) == set(KINDS)
