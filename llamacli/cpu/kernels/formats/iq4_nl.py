"""IQ4_NL: 32 weights in 18 bytes, half d and nibbles that index a table of 16 levels; weight = d * level. Source: ggml-
common.h.
"""

from llamacli.cpu.kernels.formats.halves import crossed_nibbles, half_scales, nibbles

block, nbytes, group, offset, largest = 32, 18, 32, 128, 255
LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # kvalues_iq4nl
SHIFTED = tuple(level + 128 for level in LEVELS)  # dot4 wants unsigned bytes


def piece(s, w, j):
    """Weights 32j..32j+31 as unsigned bytes."""
    return s.lookup(SHIFTED, nibbles(s, w, 18 * j + 2))


def crossed(s, w, j):
    """Weights of groups j and j + 4."""
    return [s.lookup(SHIFTED, q) for q in crossed_nibbles(s, w, 2, nbytes, j)]


def signed_piece(s, w, j):
    """Weights 32j..32j+31 as signed bytes."""
    return s.lookup(LEVELS, nibbles(s, w, 18 * j + 2))


def signed_crossed(s, w, j):
    """Weights of groups j and j + 4 as signed bytes."""
    return [s.lookup(LEVELS, q) for q in crossed_nibbles(s, w, 2, nbytes, j)]


def scales(s, w, n):
    """The scales of n blocks; the mins follow from `offset`."""
    return half_scales(s, w, n, nbytes), None
