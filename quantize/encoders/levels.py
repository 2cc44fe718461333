"""What a code can mean: evenly spaced levels or a table of them, and the nearest one, in sixteen lanes at a time.

In: float32 lanes in units of the scale. Out: the nearest level as float32, or its code as int32.
"""

from typing import NamedTuple

from llamacli.cpu.kernels.jit.simd import f32, i32, vec

LANES = 16
ROUND = 12582912.0  # 1.5 * 2**23: adding and taking it away rounds a small float32 to a whole number


def splat(s, value, n=LANES):
    """A constant in each of n lanes."""
    return s.fill(f32, n, float(value))


class Uniform(NamedTuple):
    """Levels low, low + 1, ..., high; codes count from 0."""

    low: int
    high: int

    @property
    def values(self):
        """All of them."""
        return range(self.low, self.high + 1)

    def level(self, s, t, origin=None):
        """The level nearest to t, as float32; counted from `origin` - ROUND."""
        n = t.type.count
        bounded = s.fmin(s.fmax(t, splat(s, self.low, n)), splat(s, self.high, n))
        return s.b.fsub(s.b.fadd(bounded, splat(s, ROUND, n)), splat(s, ROUND, n) if origin is None else origin)

    def code(self, s, t):
        """The code of that level, as int32."""
        return s.b.sub(s.b.fptosi(self.level(s, t), vec(i32, LANES)), s.fill(i32, LANES, self.low))


class Table(NamedTuple):
    """Any 16 rising levels."""

    levels: tuple[int, ...]

    @property
    def values(self):
        """All of them."""
        return self.levels

    @property
    def low(self):
        """The lowest level."""
        return self.levels[0]

    @property
    def high(self):
        """The highest level."""
        return self.levels[-1]

    def level(self, s, t):
        """The level nearest to t, as float32: a step up for every border passed."""
        n = t.type.count
        value = splat(s, self.levels[0], n)
        for below, above in zip(self.levels, self.levels[1:], strict=False):
            passed = s.b.fcmp_ordered(">", t, splat(s, (below + above) / 2, n))
            value = s.b.select(passed, splat(s, above, n), value)
        return value

    def code(self, s, t):
        """The code of that level, as int32."""
        value = s.zeros(i32, LANES)
        for k, (below, above) in enumerate(zip(self.levels, self.levels[1:], strict=False), 1):
            passed = s.b.fcmp_ordered(">", t, splat(s, (below + above) / 2))
            value = s.b.select(passed, s.fill(i32, LANES, k), value)
        return value


class Integers(NamedTuple):
    """The integers that a group's scale (and minimum) is stored as, times the superblock's half float."""

    low: int
    high: int
