"""Progress of a long job, with its speed and the time left: as a bar of any width, or as text for a log.

In: what is done, step by step, and a clock. Out: text without a line end; the caller writes it.
"""

import time
from collections import deque
from collections.abc import Callable

from llamacli.cli.wrap import columns

WINDOW = 20.0  # seconds that a speed is measured over
BAR = 8, 40  # its narrowest and widest
SETTLED = 0.5  # seconds before a speed is worth telling
LABEL = 12  # a label is shortened to this before the time left is omitted
GAP = "  "


def padded(text: str, size: int, right: bool = False) -> str:
    """A line with blanks behind it, or before it, so that it takes `size` columns."""
    blanks = " " * (size - columns(text))
    return blanks + text if right else text + blanks


def cut(text: str, most: int) -> str:
    """As much of a line as `most` columns hold."""
    while text and columns(text) > most:
        text = text[:-1]
    return text


class Meter:
    """`what` names the job. After `update`, `bar` and `words` give its progress."""

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic, nbytes: bool = False):
        """`nbytes`: bytes are counted, and their speed is shown."""
        self._what, self._clock, self._nbytes = what, clock, nbytes
        self._samples: deque[tuple[float, int, int | None]] = deque()
        self._label, self._room, self.share = what, 0, 0.0
        self._done, self._total = 0, 0

    def update(self, done: int, total: int, label: str = "", weights: int | None = None) -> None:
        """`done` of `total`; where `weights` are counted, those are bytes, and speeds are shown.

        Work done before the first call does not count for the speed, since a continued job does not begin at 0.
        """
        now = self._clock()
        self._samples.append((now, done, weights))
        while len(self._samples) > 2 and now - self._samples[1][0] > WINDOW:
            self._samples.popleft()
        self._label = label or self._what
        self._room = max(self._room, columns(self._label))  # so that the bar does not jump with every label
        self._done, self._total, self.share = done, total, min(1.0, done / total) if total else 0.0

    def bar(self, width: int, filled: str = "━", empty: str = "─", paint: Callable[[str, str], str] | None = None) -> str:
        """One line of at most `width` columns: as many parts as fit; the least important are omitted first.

        `paint(text, part)` may add colour to "filled", "empty" and "speed".
        """
        paint = paint or (lambda text, part: text)
        percent, speeds, left = f"{self.share:4.0%}".replace("%", " %"), self._speeds(), self._left()
        for fewer in (speeds, speeds[1:], []):
            tail = [percent, *fewer, *left]
            size = width - len(GAP.join(["x" * self._room, "", *tail])) - len(GAP)
            if size >= BAR[0]:
                full, size = int(self.share * min(size, BAR[1])), min(size, BAR[1])
                bar = paint(filled * full, "filled") + paint(empty * (size - full), "empty")
                return GAP.join(
                    [padded(self._label, self._room), bar, percent, *(paint(text, "speed") for text in fewer), *left]
                )
        for tail in ([percent, *left], [percent]):
            room = width - len(GAP.join(["", *tail]))
            if room >= LABEL:
                label = self._label if columns(self._label) <= room else cut(self._label, room - 1) + "…"
                return GAP.join([padded(label, min(room, self._room)), *tail])
        return percent.strip()[:width]

    def words(self) -> str:
        """The same for a log."""
        parts = [f"{self.share:.0%}".replace("%", " %"), self._label, *self._speeds(), *self._left()]
        return f"{self._what}: " + ", ".join(part.strip() for part in parts if part)

    def _speeds(self) -> list[str]:
        """Weights or megabytes per second, or both, in a constant width; empty until they are known."""
        (then, _, weights), (now, _, weights_now) = self._samples[0], self._samples[-1]
        if self._nbytes and now - then >= SETTLED:
            return [f"{_short(self._rate())} MB/s"]
        if weights is None or weights_now is None or now - then < SETTLED:
            return []
        return [f"{_short((weights_now - weights) / (now - then))} M weights/s", f"{_short(self._rate())} MB/s"]

    def _rate(self) -> float:
        """The progress per second."""
        (then, done, _), (now, done_now, _) = self._samples[0], self._samples[-1]
        return (done_now - done) / (now - then) if now > then else 0.0

    def _left(self) -> list[str]:
        """The time left; empty until it is known."""
        if self._samples[-1][0] - self._samples[0][0] < SETTLED or self._rate() <= 0:
            return []
        since = self._clock() - self._samples[-1][0]
        return [f"{clock_time((self._total - self._done) / self._rate() - since)} left"]


def clock_time(seconds: float) -> str:
    """Seconds as 1:23:45 or 2:05."""
    minutes, seconds = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _short(n: float) -> str:
    """Millions in three columns."""
    return f"{n / 1e6:3.0f}" if n >= 9.95e6 else f"{n / 1e6:.1f}"
