"""Sets the logits of tokens that a grammar forbids to minus infinity.

In: float32 logits and one bit for each token, as llguidance writes them. Out: the logits in place, minus infinity where the bit
is 0. Where 32 tokens in a row are all allowed nothing is touched, as in the middle of a text.
"""

from typing import NamedTuple

import numpy as np
from numpy import float32, uint32

from llamacli.cpu.kernels.jit.intrinsics import Address, Count, kernel, pointer

BITS = 32  # of a word


class _KeepArguments(NamedTuple):
    logits: Address
    words: Count
    bits: Address


@kernel(_KeepArguments)
def _keep(a, thread, threads):
    """logits[i] = -inf where bit i % 32 of word i / 32 is 0."""
    out, bits = pointer(a.logits, float32), pointer(a.bits, uint32)
    for w in range(a.words):
        word = bits[w]
        if word != uint32(0xFFFFFFFF):
            at = w * BITS
            for i in range(BITS):
                if (word >> uint32(i)) & uint32(1) == uint32(0):
                    out[at + i] = float32(-np.inf)


def keep(logits: np.ndarray, bits: np.ndarray) -> None:
    """Set to minus infinity the `logits`, float32 [n], whose bit in `bits`, 32-bit words, is 0 or is not there."""
    words = min(len(logits) // BITS, len(bits))
    if words:
        packed = _keep.pack(_keep.arguments(logits.ctypes.data, words, bits.ctypes.data))
        _keep(packed.ctypes.data, 0, 1)
    rest = logits[words * BITS :]
    if len(rest):
        known = np.unpackbits(bits[words : words + 1].view(np.uint8), bitorder="little")[: len(rest)]
        rest[: len(known)][known == 0] = -np.inf
        rest[len(known) :] = -np.inf
