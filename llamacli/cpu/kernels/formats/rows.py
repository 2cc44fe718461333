"""Rows of weights side by side: a class with Simd's methods, whose values hold n elements of each of `lanes` rows.

With it `piece` and `scales` of a format process all rows at once, one row a lane. The result has the layout of a panel:
elements as [n][rows], bytes in words of four as [n / 4][rows][4].
"""

from llamacli.cpu.kernels.jit.simd import f16, i8, i16, i32, vec

WORD = 4  # bytes of a row that stand together


class Rows:
    """The rows that begin `stride` bytes apart, read at the address of the first. Methods are Simd's."""

    def __init__(self, s, stride):
        self.s, self.b, self.target, self.count = s, s.b, s.target, s.lanes
        self._starts = [s.mul(stride, r) for r in range(s.lanes)]
        self._read = {}  # words that several pieces read, so that they are transposed once
        self.bits, self.concat, self.vector = s.bits, s.concat, s.joined
        self.to_float, self.from_half = s.to_float, s.from_half

    def _order(self, element, n):
        """(element, row) in each lane of n elements."""
        word = WORD if element == i8 else 1
        return [(k, r) for first in range(0, n, word) for r in range(self.count) for k in range(first, first + word)]

    def fill(self, element, n, value):
        """A constant vector."""
        return self.s.fill(element, n * self.count, value)

    def each(self, element, values):
        """A constant vector of these values, the same for every row."""
        return self.s.each(element, [values[k] for k, _ in self._order(element, len(values))])

    def splat(self, scalar, n):
        """Each row's scalar n times."""
        return self.s.shuffle(scalar, list(range(self.count)) * n)

    def shuffle(self, v, lanes):
        """Pick `lanes` of each row."""
        element = v.type.element
        at = {place: lane for lane, place in enumerate(self._order(element, v.type.count // self.count))}
        return self.s.shuffle(v, [at[lanes[k], r] for k, r in self._order(element, len(lanes))])

    def load(self, type_, address, offset=0):
        """n bytes, in whole words, or n int32 of each row; or one half float or int32."""
        if type_ == f16:  # within a word that begins no earlier than the row
            first = max(0, offset - 2)
            words = self._words(address, first, 1)
            half = self.b.trunc(self._by(self.b.lshr, words, 8 * (offset - first)), vec(i16, self.count))
            return self.bits(half, f16)
        if type_ == i32:
            return self._words(address, offset, 1)
        n = type_.count if type_.element == i32 else type_.count // WORD
        return self.bits(self._words(address, offset, n), type_.element)

    def splat_half(self, address, offset, n):
        """Each row's half float at address + offset, n times."""
        return self.splat(self.from_half(self.load(f16, address, offset)), n)

    def _words(self, address, offset, n):
        if (address, offset, n) not in self._read:
            self._read[address, offset, n] = self._read_words([self.s.add(address, start) for start in self._starts], offset, n)
        return self._read[address, offset, n]

    def _read_words(self, at, offset, n):
        """n words of each row. Of 16 bytes each, a row fills a part of a register that no shuffle leaves."""
        if n == 1:
            return self.s.vector([self.s.load(i32, a, offset) for a in at])
        if n % 4:
            rows = self.s.joined([self.s.load(vec(i32, n), a, offset) for a in at])
            return self.s.shuffle(rows, [r * n + k for k in range(n) for r in range(self.count)])
        found = []
        for k in range(0, WORD * n, 16):
            parts = [self.s.joined([self.s.load(vec(i32, 4), a, offset + k) for a in at[first::4]]) for first in range(4)]
            ones = [self._in_turn(parts[i], parts[i + 1], upper, 1) for upper in (0, 2) for i in (0, 2)]
            found += [self._in_turn(ones[i], ones[i + 1], upper, 2) for i in (0, 2) for upper in (0, 2)]
        return self.s.joined(found)

    def _in_turn(self, a, b, upper, size):
        """`size` lanes of a and of b in turn, from the lower or upper half of each four."""
        turns = [(0, 0), (1, 0), (0, 1), (1, 1)] if size == 1 else [(0, 0), (0, 1), (1, 0), (1, 1)]
        n = a.type.count
        return self.s.shuffle(a, [of * n + first + upper + k for first in range(0, n, 4) for of, k in turns], b)

    def unsigned(self, v):
        """Widen unsigned bytes to int32."""
        return self._widened(v, lambda words, byte: self._by(self.b.and_, self._by(self.b.lshr, words, 8 * byte), 255))

    def signed(self, v):
        """Widen signed bytes to int32."""
        return self._widened(v, lambda words, byte: self._by(self.b.ashr, self._by(self.b.shl, words, 24 - 8 * byte), 24))

    def _by(self, op, v, value):
        return op(v, self.s.fill(i32, v.type.count, value))

    def _widened(self, v, byte_of):
        words = self.bits(v, i32)
        wide = [byte_of(words, byte) for byte in range(WORD)]
        parts = [list(range(first, first + self.count)) for first in range(0, words.type.count, self.count)]
        return self.s.joined([self.s.shuffle(w, part) for part in parts for w in wide])

    def lookup(self, table, index):
        """table[index] for 16 bytes and indices below 16."""
        parts = [list(range(first, first + self.s.width)) for first in range(0, index.type.count, self.s.width)]
        return self.s.joined([self.s.lookup(table, self.s.shuffle(index, part)) for part in parts])
