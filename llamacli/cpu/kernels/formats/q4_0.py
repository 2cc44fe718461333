"""Q4_0: 32 weights in 18 bytes, a half scale and 16 bytes of nibbles (low nibbles first); weight = d * (q - 8).

layout.py says what `piece` and `scales` return. Source: ggml-common.h, block_q4_0.
"""

from llamacli.cpu.kernels.formats.halves import crossed_nibbles, half_scales, nibbles

block, nbytes, group, offset, largest = 32, 18, 32, 8, 15


def piece(s, w, j):
    """Weights 32j..32j+31 as unsigned bytes."""
    return nibbles(s, w, 18 * j + 2)


def crossed(s, w, j):
    """Weights of groups j and j + 4."""
    return crossed_nibbles(s, w, 2, nbytes, j)


def scales(s, w, n):
    """The scales of n blocks; the mins follow from `offset`."""
    return half_scales(s, w, n, nbytes), None
