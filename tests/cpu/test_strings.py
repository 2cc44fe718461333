"""Lists of strings behind their lengths: joined as Python would."""

import struct

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llamacli.cpu.kernels.ops import strings


def stored(texts):
    return np.frombuffer(b"".join(struct.pack("<Q", len(t)) + t for t in texts), np.uint8)


@settings(deadline=None)  # the first example compiles
@given(st.lists(st.binary(max_size=20), min_size=1))
def test_join_puts_the_separator_after_each(texts):
    assert strings.join(stored(texts), 10) == b"".join(t + b"\n" for t in texts)


@settings(deadline=None)
@given(st.lists(st.binary(max_size=20)), st.integers(0, 40), st.binary(max_size=7))
def test_skip_ends_where_the_lengths_do(texts, more, rest):
    """`more` strings are asked for that are not there; a part of a length is none."""
    whole = stored([b"before", *texts])
    left, pos = strings.skip(np.concatenate([whole, np.frombuffer(rest, np.uint8)]), len(texts) + more, len(b"before") + 8)
    assert (left, pos) == (more, len(whole))


@settings(deadline=None)
@given(st.integers(0, (1 << 64) - 1), st.integers(0, 3))
def test_skip_takes_any_length_for_what_it_is_or_for_one_beyond_every_file(length, before):
    texts = [b"text"] * before
    left, pos = strings.skip(np.concatenate([stored(texts), np.frombuffer(struct.pack("<Q", length), np.uint8)]), before + 2, 0)
    expected = (2, strings.BEYOND) if length > strings.BEYOND else (1, 12 * before + 8 + length)
    assert (left, pos) == expected
