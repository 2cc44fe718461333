"""Lists of strings behind their lengths: measured within bounds, joined as Python would."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamacli.cpu.kernels.ops import strings


def stored(texts):
    return np.frombuffer(b"".join(struct.pack("<Q", len(t)) + t for t in texts), np.uint8)


@given(st.lists(st.binary(max_size=20), min_size=1), st.binary(max_size=9))
def test_the_end_is_where_the_last_string_ends_whatever_follows(texts, more):
    buffer = np.concatenate([stored(texts), np.frombuffer(more, np.uint8)])
    assert strings.end(buffer, len(texts)) == len(stored(texts))


@given(st.lists(st.binary(max_size=20), min_size=1))
def test_join_puts_the_separator_after_each(texts):
    assert strings.join(stored(texts), 10) == b"".join(t + b"\n" for t in texts)


@given(st.lists(st.binary(max_size=6), min_size=1, max_size=4), st.data())
def test_a_cut_list_does_not_fit(texts, data):
    whole = stored(texts)
    cut = data.draw(st.integers(1, len(whole) - 1))
    assert strings.end(whole[:cut].copy(), len(texts)) == -1


@pytest.mark.parametrize("length", [1, 1 << 20, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 8])
def test_a_length_past_the_end_is_not_believed(length):
    buffer = np.frombuffer(struct.pack("<QQ", 0, length), np.uint8)
    assert strings.end(buffer, 2) == -1


def test_more_strings_than_memory_holds_are_refused_at_once():
    assert strings.end(stored([b"a"]), 1 << 70) == -1
