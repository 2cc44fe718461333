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
