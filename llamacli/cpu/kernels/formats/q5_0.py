"""Q5_0: 32 weights in 22 bytes, half d, 32 high bits, nibbles as in Q4_0; weight = d * (q - 16). Source: ggml-common.h,
block_q5_0.
"""

from llamacli.cpu.kernels.formats.halves import half_scales, nibbles, with_fifth_bits

block, nbytes, group, offset, wide = 32, 22, 32, 16, False


def piece(s, w, j):
    """Weights 32j..32j+31 as unsigned bytes."""
    return with_fifth_bits(s, nibbles(s, w, 22 * j + 6), w, 22 * j + 2)


def scales(s, w, n):
    """The scales of n blocks; the mins follow from `offset`."""
    return half_scales(s, w, n, nbytes), None
