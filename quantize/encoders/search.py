"""The search for scales: sixteen groups of weights side by side, one in each lane, every candidate tried on all of them.

In: float32 weights, and perhaps how much each column matters. Out: machine code that turns them into blocks. A group of 16 or
32 weights has one scale, or a scale and a minimum; the K formats store these as small integers times a half float for the whole
superblock of 8 or 16 groups, so a search has two stages:

    each group    scales on a grid -> codes -> the scale (and minimum) of least squared error for these codes, a few times over
    superblock    the best of some half floats -> integers near each group's scale, each tried with codes of its own -> the half
                  float of least squared error for these integers, and once more

The error is the plain squared one, or with weights the weighted one; magnitudes are not used as weights. affine.py is for
weight = scale * code + minimum, linear.py for weight = scale * level, parts.py has what they share. What differs between
formats, levels and layout of bytes, is in the formats' own modules.

The closed forms are least squares: for codes l, weight factors w and x ~ a l + b, the sums of w, w x, w l, w l^2 and w x l give
the best a and b and the error without another pass over the weights. Among half floats, where rounding decides, the error
itself is summed, and zeros are a candidate like any other. An almost exact fit gets a longer search.
"""

from typing import NamedTuple

from llvmlite import ir

from llamacli.cpu.kernels.jit.simd import Simd, f16, f32, i8, i16, vec
from quantize.encoders.affine import affine
from quantize.encoders.levels import LANES
from quantize.encoders.linear import linear

SYMBOLS = ("encode", "encode_weighted")


class Room(NamedTuple):
    """Addresses on the stack: the groups lane by lane, and what `pack` reads: a lane's inverse and offset, codes, factors."""

    x: ir.Value  # float32 [group][LANES]
    centred: ir.Value  # the same less each lane's mean
    w: ir.Value | None  # the same as x, or None
    pairs: ir.Value  # int16 [group / 2][LANES][2]: the weights as whole numbers
    inverse: ir.Value  # float32 [LANES]
    offset: ir.Value
    codes: ir.Value  # uint8 [LANES * group], in the order of the weights
    d: ir.Value  # half [LANES]
    m: ir.Value
    scales: ir.Value  # uint8 [LANES]
    mins: ir.Value


def build(fmt):
    """The builder of a format's module: encode(x, n_units, w, n_cols, out) and the same with weights.

    A unit is LANES groups: x float32, w float32 per column, repeated past n_cols by one unit; out `fmt.NBYTES` a block.
    """

    def module_for(target):
        module = ir.Module("encode")
        for name in SYMBOLS:
            _encoder(module, target, fmt, name)
        return module

    return module_for


def _encoder(module, target, fmt, name):
    s = Simd(module, target, name, 5)
    x0, n_units, w0, n_cols, out0 = s.args
    unit = LANES * fmt.GROUP
    weighted = name == "encode_weighted"
    if hasattr(fmt, "exact") and not weighted:
        fmt.exact(s, x0, s.mul(n_units, unit // fmt.BLOCK), out0)
        s.done()
        return
    lanes = lambda: s.room(f32, LANES)
    room = Room(
        s.room(f32, unit), s.room(f32, unit), s.room(f32, unit) if weighted else None, s.room(i16, unit),
        lanes(), lanes(), s.room(i8, unit),
        s.room(f16, LANES), s.room(f16, LANES), s.room(i8, LANES), s.room(i8, LANES),
    )  # fmt: skip
    per_block = fmt.BLOCK // fmt.GROUP

    def one(i, _):
        x = s.add(x0, s.mul(i, 4 * unit))
        _lane_by_lane(s, x, room.x, fmt.GROUP)
        if weighted:
            column = s.b.urem(s.mul(i, unit), n_cols)
            _lane_by_lane(s, s.add(w0, s.mul(column, 4)), room.w, fmt.GROUP)
        (affine if fmt.SIDES == 2 else linear)(s, fmt, room)
        _codes(s, fmt, x, room)
        for block in range(LANES // per_block):
            lane = block * per_block
            out = s.add(out0, s.mul(s.add(s.mul(i, LANES // per_block), block), fmt.NBYTES))
            fmt.pack(s, out, Packed(room, lane, fmt.GROUP))
        return []

    s.loop(n_units, [], one)
    s.done()


class Packed(NamedTuple):
    """What one block is packed from: the groups from `lane` on."""

    room: Room
    lane: int
    group: int

    def codes(self, s, at, n=32):
        """Codes `at` and following, one byte each."""
        return s.load(vec(i8, n), self.room.codes, self.lane * self.group + at)

    def scales(self, s, at, n):
        """Integer scales of groups `at` and following."""
        return s.load(vec(i8, n), self.room.scales, self.lane + at)

    def mins(self, s, at, n):
        """Integer minimums of groups `at` and following."""
        return s.load(vec(i8, n), self.room.mins, self.lane + at)

    def d(self, s):
        """The half float that scales are multiplied with."""
        return s.load(f16, self.room.d, 2 * self.lane)

    def m(self, s):
        """The half float of the minimums."""
        return s.load(f16, self.room.m, 2 * self.lane)


def _lane_by_lane(s, x, to, group):
    """LANES groups, one after the other, to [group][LANES]."""
    for half in range(group // LANES):
        rows = [s.load(vec(f32, LANES), x, 4 * (g * group + half * LANES)) for g in range(LANES)]
        for j, column in enumerate(s.transpose(rows)):
            s.store(column, to, 4 * LANES * (half * LANES + j))


def _codes(s, fmt, x, room):
    """The codes in the order of the weights, with the same arithmetic as the search's."""

    def one(g, _):
        inverse, offset = (s.splat(s.load(f32, s.add(at, s.mul(g, 4))), LANES) for at in (room.inverse, room.offset))
        for half in range(fmt.GROUP // LANES):
            at = s.add(s.mul(g, fmt.GROUP), half * LANES)
            t = s.fma(s.load(vec(f32, LANES), s.add(x, s.mul(at, 4))), inverse, offset)
            s.store(s.b.trunc(fmt.LEVELS.code(s, t), vec(i8, LANES)), s.add(room.codes, at))
        return []

    s.loop(LANES, [], one)
