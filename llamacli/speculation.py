"""Guesses at the next tokens from repetitions in the text: speculative decoding without a second model.

In: the ids so far. Out: ids that may come next: those that followed the last place with the same latest ids. The decode loop
evaluates them in one call with the token before, and accepts those that it would have chosen anyway, so the text does not
change. After wrong guesses fewer are proposed, after right ones more: where a text repeats itself by chance, a try costs one
token. Where guessing takes longer than it saves, nothing is proposed for a while.
"""

from collections.abc import Sequence

LENGTHS = (4, 3, 2)  # lengths of the latest ids to find earlier in the text, the longest first
MOST = 7  # ids proposed at a time
FIRST, GROWTH = 3, 3  # ids proposed at first; after a try, GROWTH times the number that were right, plus one
MEASURED = 8  # evaluations over which the time of a token is averaged
PAUSE = 16  # single evaluations after guesses that took longer than they saved; doubled each time


class Guesses:
    """Of one answer. `settles`: whether time decides when to pause; False: always guess."""

    def __init__(self, ids: Sequence[int], settles: bool = True):
        self._ids: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}  # some ids in a row, to what followed them last
        self._settles, self._pause, self._next_pause = settles, 0, PAUSE
        self._seconds: list[float | None] = [None, None]  # average seconds of a token, without and with guesses
        self._tried = 0  # evaluations with guesses since the last pause
        self._most = FIRST
        self._spent, self._guessed, self._given = 0.0, False, 0  # the latest evaluation: time, whether with guesses, tokens
        for id in ids:
            self.said(id)
        self._given = 0

    def said(self, id: int) -> None:
        """Add the next id of the text."""
        at = len(self._ids)
        for n in LENGTHS:
            if at >= n:
                self._places[tuple(self._ids[at - n :])] = at
        self._ids.append(id)
        self._given += 1

    def propose(self, most: int) -> list[int]:
        """Ids that may follow, at most `most`; none if there is no such place, or if guessing does not pay."""
        self._account()
        if self._pause:
            self._pause -= 1
            return []
        if self._settles and self._seconds[False] is None:
            return []
        for n in LENGTHS:
            at = self._places.get(tuple(self._ids[-n:])) if len(self._ids) >= n else None
            if at is not None:
                found = self._ids[at : at + MOST]
                return (found * MOST)[: max(0, min(most, self._most))]  # a match at the text's end repeats
        return []

    def spent(self, seconds: float, guessed: bool) -> None:
        """Note the seconds of an evaluation; the ids added until the next call came from it."""
        self._spent, self._guessed, self._given = seconds, guessed, 0

    def _account(self) -> None:
        if not self._spent or not self._given:
            return
        each, before = self._spent / self._given, self._seconds[self._guessed]
        self._seconds[self._guessed] = each if before is None else before + (each - before) / MEASURED
        if self._guessed:
            self._tried += 1
            self._most = min(MOST, GROWTH * (self._given - 1) + 1)
        if self._settles and self._tried >= MEASURED and self._seconds[True] > self._seconds[False]:
            self._pause, self._next_pause, self._tried, self._seconds[True] = self._next_pause, 2 * self._next_pause, 0, None
