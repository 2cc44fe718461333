"""Q5_0: 32 weights in 22 bytes, half d, 32 high bits, nibbles as in Q4_0; weight = d * (q - 16). Source: ggml-common.h,
block_q5_0.
"""

from llamacli.cpu.kernels.formats.halves import crossed_fifth_bits, crossed_nibbles, half_scales, nibbles, with_fifth_bits

block, nbytes, group, offset, largest = 32, 22, 32, 16, 31


def piece(s, w, j):
    """Weights 32j..32j+31 as unsigned bytes."""
    return with_fifth_bits(s, nibbles(s, w, 22 * j + 6), w, 22 * j + 2)


def crossed(s, w, j):
    """Weights of groups j and j + 4."""
    return crossed_fifth_bits(s, crossed_nibbles(s, w, 6, nbytes, j), w, 2, nbytes, j)


def scales(s, w, n):
    """The scales of n blocks; the mins follow from `offset`."""
    return half_scales(s, w, n, nbytes), None
