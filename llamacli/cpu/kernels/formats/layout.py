"""The block formats, the functions that each provides to the microkernels, and the layout of quantized activations.

A format's module provides `piece` (32 weights as unsigned bytes u) and `scales` (a factor and a minimum for each group), with
weight = scale * u - min; where it has an `offset`, the minimum is scale * offset. `largest` is the largest u. Formats whose
codes exceed 127 also provide `signed_piece`: the same as signed bytes.

A format may provide `whole_scales` (the scales as int32 and the float to multiply them with) and, for registers of 32 bytes,
`crossed` (the weights of groups j and j + 4 as two registers, their first 16, then their last 16, so that products of a group
add up before they are scaled). `piece`, `scales` and `whole_scales` also serve many rows side by side (rows.py), so they do
what Simd and Rows both have.

An activation row is a sequence of superblocks of ACT_BYTES: 256 int8, then 8 scales, 8 scaled sums of 32 and 16 scaled sums of
16, float32.
"""

from functools import reduce
from types import SimpleNamespace

from llamacli.cpu.kernels.formats import iq4_nl, iq4_xs, q2_k, q3_k, q4_0, q4_1, q4_k, q5_0, q5_1, q5_k, q6_k, q8_0
from llamacli.cpu.kernels.jit.simd import f32, i8, i32, i64, vec

ACT_BYTES = 384
D, S32, S16 = 256, 288, 320  # where scales and sums stand in an activation superblock
QUANTIZED = {
    **{"Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1, "Q8_0": q8_0, "IQ4_NL": iq4_nl},
    **{"Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k, "IQ4_XS": iq4_xs},
}
CROSSED = tuple(piece for j in range(0, 8, 2) for half in (j, j + 1) for piece in (half, half + 8))  # order of `crossed`
FLOATS = ("F32", "F16", "BF16")


def signed(fmt):
    """The format with codes 128 lower, so that they are signed bytes: some CPUs multiply only those."""
    changed = {"piece": fmt.signed_piece, "offset": fmt.offset - 128, "largest": 127, "signed": True}
    if hasattr(fmt, "crossed"):
        changed["crossed"] = fmt.signed_crossed
    return SimpleNamespace(**{**vars(fmt), **changed})


def span(fmt):
    """Bytes of 256 weights."""
    return 8 * fmt.nbytes if fmt.block == 32 else fmt.nbytes


def order(s, fmt):
    """The pieces of 16 weights in the order in which `codes` has them."""
    return CROSSED if s.width == 32 and hasattr(fmt, "crossed") else tuple(range(16))


def registers(s, fmt):
    """The groups whose weights each register of `codes` holds, 16 by 16."""
    pieces, side = order(s, fmt), s.width // 16
    return [tuple(16 * p // fmt.group for p in pieces[k : k + side]) for k in range(0, 16, side)]


def lanes(s, fmt):
    """The groups whose sums stand in each 8 lanes that `by_group` makes of a superblock, for registers of 32 bytes."""
    if fmt.group == 32:
        return [tuple(range(8))]
    at = registers(s, fmt)
    return [tuple(both[half] for half in (0, 1) for both in at[k : k + 4]) for k in (0, 4)]


def by_group(s, fmt, us, xs, largest, is_signed):
    """The sums of the products of each group, of the registers of `codes` times activations in the same order: int32, in the
    order of `lanes`.
    """
    shared = {}  # registers of the same groups
    for at, u, x in zip(registers(s, fmt), us, xs, strict=True):
        shared.setdefault(at, []).append((u, x))
    used, doublings = max(len(both) for both in shared.values()), 0  # how often sums in 16 bits can still double
    # A group of 16 fills half a register of 32 bytes. For such groups adding products in 16-bit lanes saves more instructions
    # than VNNI's sums of four bytes.
    in_16_bits = s.target.dot == "maddubs" or (s.target.dot == "vnni" and fmt.group == 16)
    if in_16_bits and not is_signed and s.fits(largest) >= 2 * used:
        dots = [reduce(s.b.add, (s.pairs(u, x) for u, x in both)) for both in shared.values()]
        doublings = min(2, (s.fits(largest) // used).bit_length() - 1)
    else:
        dots = [s.products(*zip(*both, strict=True), largest, is_signed) for both in shared.values()]
    fours = [s.sums_of_fours(dots[k : k + 4], doublings) for k in range(0, len(dots), 4)]
    # A group spans a register: the sums of its first and its last weights are in separate lanes.
    if len(fours) == 2 and fmt.group == 32:
        fours = [s.b.add(*(s.shuffle(fours[0], [k + j for k in (0, 8) for j in range(h, h + 4)], fours[1]) for h in (0, 4)))]
    return fours


def totals(s, values):
    """The sums of 1, 2 or 4 vectors of 8 floats, each in the same order; a float, or a vector of them."""
    fours = s.sums_of_fours((values * 4)[:4])
    n = len(values)
    total = s.b.fadd(s.shuffle(fours, list(range(n))), s.shuffle(fours, list(range(4, 4 + n))))
    return total if n > 1 else s.b.extract_element(total, i32(0))


def store_scales_and_sums(s, fmt, x, of_codes, out):
    """Store two values for each group of the activation superblock at x, after the 256 codes at `out` and in the order of
    `lanes`: the scales, then the terms that depend on sums. Such a term is minus the scaled sum where the format has mins, and
    minus the offset times the sum of the codes where it has an offset other than 0; else there is none.
    """
    groups = 256 // fmt.group
    for p, (at, total) in enumerate(zip(lanes(s, fmt), of_codes, strict=True)):
        if fmt.offset is None:
            total = s.b.fneg(s.shuffle(s.load(vec(f32, groups), x, S32 if groups == 8 else S16), at))
        else:
            total = s.b.mul(total, s.fill(i32, 8, -fmt.offset)) if fmt.offset else None
        s.store(s.shuffle(s.load(vec(f32, 8), x, D), [g * fmt.group // 32 for g in at]), out, 256 + 32 * p)
        if total is not None:
            s.store(total, out, 256 + 4 * groups + 32 * p)


def codes(s, fmt, w):
    """A superblock's weights as registers of unsigned bytes, in `order`."""
    if s.width == 32 and hasattr(fmt, "crossed"):
        return [half for j in range(4) for half in fmt.crossed(s, w, j)]
    pieces = [fmt.piece(s, w, j) for j in range(8)]
    return pieces if s.width == 32 else [s.concat(*pieces[j : j + 2]) for j in range(0, 8, 2)]


def scales_and_mins(s, fmt, w, n):
    """Scale and minimum of each group of n blocks (of 32 weights; or of one of 256)."""
    scale, least = fmt.scales(s, w, n)
    return scale, least if least is not None else s.b.fmul(scale, s.fill(f32, scale.type.count, float(fmt.offset)))


def odd_blocks(s, fmt, starts, supers, n_cols, x, values):
    """The 32-weight blocks after the last whole superblock, one at a time."""
    xs, base = s.add(x, s.mul(supers, ACT_BYTES)), s.mul(supers, 8)

    def one(k, sums):
        new = []
        d = s.load(f32, s.add(xs, s.mul(k, 4)), D)
        total = s.load(f32, s.add(xs, s.mul(k, 4)), S32)
        codes = s.load(vec(i8, 32), s.add(xs, s.mul(k, 32)))
        for start, value in zip(starts, sums, strict=True):
            w = s.add(start, s.mul(s.add(base, k), fmt.nbytes))
            scale, least = (s.b.extract_element(v, i32(0)) for v in scales_and_mins(s, fmt, w, 1))
            dots = s.sum(s.to_float(s.products([fmt.piece(s, w, 0)], [codes], fmt.largest, hasattr(fmt, "signed"))))
            part = s.b.fsub(s.b.fmul(s.b.fmul(dots, scale), d), s.b.fmul(least, total))
            new.append(s.b.fadd(value, part))
        return new

    return s.loop(s.b.and_(s.b.lshr(n_cols, i64(5)), i64(7)), values, one)
