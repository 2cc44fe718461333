"""The block formats, the questions that leaves ask of each, and the form of the activations that meet them.

A format's module answers `piece` (32 weights as unsigned bytes u) and `scales` (a factor and a minimum for each group), so that
weight = scale * u - min; where it has an `offset`, the minimum is scale * offset. `wide` says that u may exceed 127. For
registers of 64 bytes it may do better: `codes`, a superblock's u at once, in an `order` and with `factors` of its own, and
`pair`, the scales of two rows. An activation row is a sequence of superblocks of ACT_BYTES: 256 int8, then 8 scales, 8 scaled
sums of 32 and 16 scaled sums of 16, float32. Knows nothing of what is done with them.
"""

from types import SimpleNamespace

from llamacli.cpu.kernels.formats import iq4_nl, iq4_xs, q2_k, q3_k, q4_0, q4_1, q4_k, q5_0, q5_1, q5_k, q6_k, q8_0
from llamacli.cpu.kernels.jit.simd import f32, i8

ACT_BYTES = 384
D, S32, S16 = 256, 288, 320  # where scales and sums stand in an activation superblock
QUANTIZED = {
    **{"Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1, "Q8_0": q8_0, "IQ4_NL": iq4_nl},
    **{"Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k, "IQ4_XS": iq4_xs},
}
FLOATS = ("F32", "F16", "BF16")


def signed(fmt):
    """The format with codes 128 lower, so that they are signed bytes: some CPUs multiply no others."""
    piece = lambda s, w, j: s.b.xor(fmt.piece(s, w, j), s.fill(i8, 32, -128))  # noqa: E731
    return SimpleNamespace(**{**vars(fmt), "piece": piece, "offset": fmt.offset - 128, "wide": False})


def span(fmt):
    """Bytes of 256 weights."""
    return 8 * fmt.nbytes if fmt.block == 32 else fmt.nbytes


def order(s, fmt):
    """The pieces of 16 weights in the order in which `codes` has them."""
    return fmt.order if s.width == 64 and hasattr(fmt, "order") else tuple(range(16))


def factors(s, fmt):
    """What the products of each 32 `codes` are to be multiplied with."""
    return fmt.factors(s) if s.width == 64 and hasattr(fmt, "factors") else [1.0] * 8


def codes(s, fmt, w):
    """A superblock's weights as registers of unsigned bytes, in `order`."""
    if s.width == 64 and hasattr(fmt, "codes"):
        return fmt.codes(s, w)
    pieces = [fmt.piece(s, w, j) for j in range(8)]
    return pieces if s.width == 32 else [s.concat(*pieces[j : j + 2]) for j in range(0, 8, 2)]


def scales_and_mins(s, fmt, w, n):
    """Scale and minimum of each group of n blocks (of 32 weights; or of one of 256)."""
    scale, least = fmt.scales(s, w, n)
    return scale, least if least is not None else s.b.fmul(scale, s.fill(f32, scale.type.count, float(fmt.offset)))


def pair(s, fmt, ws):
    """The scales and, but for formats with an offset, the mins of two rows, one row after the other in vectors of 16."""
    if s.width == 64 and hasattr(fmt, "pair"):
        return fmt.pair(s, ws)
    (a, c), (b, d) = (fmt.scales(s, w, 8) for w in ws)
    join = (lambda a, b: [s.concat(a, b)]) if fmt.group == 32 else (lambda a, b: [a, b])
    return join(a, b), c and join(c, d)
