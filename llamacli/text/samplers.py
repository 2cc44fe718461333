"""The steps of a sampler, each defined by its paper or by llama.cpp's sampler of the same name.

In: `Candidates`, the logits of the tokens that are left, and settings (settings.py). Out: the same, fewer or changed. All steps
operate on arrays, not on single tokens; none sorts the vocabulary.
"""

from collections.abc import Callable, Sequence

import numpy as np

from llamacli.cpu.kernels.ops.selection import fewest, select

_LEAST_TEMP, _MOST_TEMP = 1e-30, 1e30  # within these float32 suffices, beyond them the result does not change
_BLOCK = 64  # values of a block, whose largest is compared first
_LONGEST_MATCH = 400  # tokens of a repetition, beyond which DRY's penalty no longer grows
_MOST_PENALTY = 1e30  # so that no logit becomes infinite


class Candidates:
    """The remaining tokens: `ids` int64 in ascending order, None for the whole vocabulary; `logits` float32, one for each,
    which steps change in place.

    `count` and `deviation` (standard deviation of the finite logits) also count tokens that `cut` dropped because they are too
    unlikely to matter.
    """

    def __init__(self, logits: np.ndarray):
        self.ids: np.ndarray | None = None
        self.logits = logits
        self.count = len(logits)
        self.deviation: float | None = None
        self._weights: np.ndarray | None = None

    def weights(self) -> np.ndarray:
        """Unnormalized probabilities, float32; the largest is 1 unless a step removed that token."""
        if self._weights is None:
            weights = self.logits - self.logits.max()
            self._weights = np.exp(weights, out=weights)
        return self._weights

    def probabilities(self) -> np.ndarray:
        """Probabilities, float64, with sum 1."""
        weights = self.weights().astype(np.float64)
        return weights / weights.sum()

    def keep(self, which: np.ndarray) -> None:
        """Keep these: booleans, or indices in ascending order."""
        chosen = np.flatnonzero(which) if which.dtype == bool else which
        self.ids = chosen if self.ids is None else self.ids[chosen]
        self.logits = self.logits[chosen]
        self._weights = None if self._weights is None else self._weights[chosen]
        self.count, self.deviation = len(chosen), None

    def cut(self, below: float, measured: bool, most: bool = False) -> None:
        """Drop logits more than `below` under the best. `measured`: a later step needs `count` or `deviation`. `most`: only if
        that is most of the tokens, since copying many costs more than it saves.
        """
        count = deviation = None
        if measured:
            finite = self.logits[np.isfinite(self.logits)]
            count, deviation = len(finite), float(finite.std(dtype=np.float64))
        likely = self.logits >= self.logits.max() - np.float32(min(below, _MOST_PENALTY))
        if most and np.count_nonzero(likely) > len(likely) // 8:
            return
        self.keep(likely)
        self.count, self.deviation = count or len(self.logits), deviation

    def change(self, logits: np.ndarray) -> None:
        """Set other logits for the same tokens."""
        self.logits, self._weights = logits, None

    def places(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The indices in `logits` of those of `ids` (ascending) that remain, and a mask of these over `ids`."""
        if self.ids is None:
            there = (ids >= 0) & (ids < len(self.logits))
            return ids[there], there
        at = np.searchsorted(self.ids, ids)
        there = (at < len(self.ids)) & (self.ids[np.minimum(at, len(self.ids) - 1)] == ids)
        return at[there], there


Step = Callable[[Candidates], None]


def penalties(repeat: float, presence: float, frequency: float, last_n: int, history: Sequence[int]) -> Step:
    """Tokens of the last `last_n` (-1: all): positive logits divided by `repeat`, others times it; minus presence and
    frequency.

    `presence` is subtracted once, `frequency` for each time that the token occurred.
    """

    def step(c: Candidates) -> None:
        recent = history if last_n < 0 else history[len(history) - min(last_n, len(history)) :]
        ids, counts = np.unique(np.asarray(recent, np.int64), return_counts=True)
        at, there = c.places(ids)
        seen = c.logits[at]
        seen = np.where(seen > 0, seen / np.float32(repeat), seen * np.float32(repeat))
        logits = c.logits
        logits[at] = seen - (frequency * counts[there] + presence)
        c.change(logits)

    return step


def dry(multiplier: float, base: float, allowed: int, last_n: int, breakers: np.ndarray, history: Sequence[int]) -> Step:
    """Don't repeat yourself: the logit of a token that would continue a repetition of n >= `allowed` tokens is reduced by
    multiplier * base ** (n - allowed). A repetition does not extend over a breaker.
    """

    def step(c: Candidates) -> None:
        recent = history if last_n < 0 else history[len(history) - min(last_n, len(history)) :]
        said = np.asarray(recent, np.int64)
        last, length, longest = len(said) - 1, 0, {}
        places = np.arange(last)  # of earlier tokens that end the same sequence
        while len(places) and length < min(last + 1, allowed + _LONGEST_MATCH) and said[last - length] not in breakers:
            places = places[places >= length]
            places = places[said[places - length] == said[last - length]]
            length += 1
            if length >= allowed:
                longest.update(dict.fromkeys(said[places + 1].tolist(), length))
        if not longest:
            return
        ids = np.array(sorted(longest), np.int64)
        at, there = c.places(ids)
        lengths = np.array([longest[id] for id in ids.tolist()], np.float64)[there]
        with np.errstate(over="ignore"):
            loss = np.minimum(multiplier * np.power(base, lengths - allowed), _MOST_PENALTY)
        logits = c.logits
        logits[at] -= loss.astype(np.float32)
        c.change(logits)

    return step


def temperature(temp: float, span: float = 0.0, exponent: float = 1.0, shifted: bool = True) -> Step:
    """Logits divided by `temp`; with `span`, by a value from temp - span at low entropy to temp + span at high entropy.

    The entropy is divided by its maximum and raised to the power `exponent`. `shifted`: the best becomes 0, which float32 holds
    at any temperature; not before a repeat penalty, which depends on the sign.
    """

    def step(c: Candidates) -> None:
        chosen = temp
        if span and c.count > 1:
            p = c.probabilities()
            entropy = -(p * np.log(p, where=p > 0, out=np.zeros_like(p))).sum() / np.log(c.count)
            low = max(0.0, temp - span)
            chosen = low + (temp + span - low) * min(max(entropy, 0.0), 1.0) ** exponent
        with np.errstate(over="ignore"):  # a temperature next to 0 makes all but the best minus infinity, as it should
            chosen = min(max(chosen, _LEAST_TEMP), _MOST_TEMP)
            logits = c.logits
            if shifted:
                logits -= logits.max()
            logits /= np.float32(chosen)
            c.change(logits)
        c.deviation = None if c.deviation is None else c.deviation / chosen

    return step


def top_n_sigma(n: float) -> Step:
    """Keep logits at most n standard deviations below the best."""

    def step(c: Candidates) -> None:
        deviation = c.logits[np.isfinite(c.logits)].std(dtype=np.float64) if c.deviation is None else c.deviation
        c.keep(c.logits >= c.logits.max() - np.float32(min(n * deviation, _MOST_PENALTY)))

    return step


def top_k(k: int) -> Step:
    """Keep the `k` most likely tokens."""

    def step(c: Candidates) -> None:
        if k < len(c.logits):
            c.keep(largest(c.logits, k))

    return step


def top_p(p: float) -> Step:
    """Keep the fewest tokens whose probabilities add up to `p` (nucleus sampling)."""

    def step(c: Candidates) -> None:
        weights = c.weights()
        c.keep(select(weights, fewest(weights, p)))

    return step


def min_p(p: float) -> Step:
    """Keep tokens at least `p` times as likely as the best remaining one."""

    def step(c: Candidates) -> None:
        weights = c.weights()
        c.keep(weights >= p * weights.max())

    return step


def typical(p: float) -> Step:
    """Keep tokens whose surprise is nearest to the entropy, the fewest that add up to `p` (locally typical sampling)."""

    def step(c: Candidates) -> None:
        probabilities = c.probabilities()
        surprise = -np.log(np.maximum(probabilities, 1e-300))
        far = np.abs(surprise - (probabilities * surprise).sum())
        count, total = 0, None
        while total is None or (total[-1] < p and count < len(far)):  # few are enough at low entropy
            count = min(len(far), max(1024, 8 * count))
            near = np.argpartition(far, count - 1)[:count]
            order = near[np.lexsort((near, far[near]))]
            total = np.cumsum(probabilities[order])
        last = int(np.searchsorted(total, p, "left"))
        c.keep(np.sort(order[: last + 1]))

    return step


def xtc(threshold: float) -> Step:
    """Exclude top choices: of all tokens with a probability of at least `threshold`, only the least likely stays."""

    def step(c: Candidates) -> None:
        probabilities = c.probabilities()
        top = np.flatnonzero(probabilities >= threshold)
        if len(top) > 1:
            stay = np.ones(len(probabilities), bool)
            stay[top] = False
            stay[top[len(top) - 1 - np.argmin(probabilities[top][::-1])]] = True
            c.keep(stay)

    return step


def largest(values: np.ndarray, k: int) -> np.ndarray:
    """The indices of the `k` largest of `values`, in ascending order; of equal ones the first. 1 <= k <= len(values).

    The values are divided into blocks. At least k values, and usually few more, are as large as the k-th largest maximum of a
    block.
    """
    blocks, at = len(values) // _BLOCK, None
    if k < blocks:
        best = values[: blocks * _BLOCK].reshape(_BLOCK, blocks).max(axis=0)  # values far apart: whole rows are compared
        at = np.flatnonzero(values >= np.partition(best, blocks - k)[blocks - k])
        values = values[at]
    least = np.partition(values, len(values) - k)[len(values) - k]
    stay = values > least
    stay[np.flatnonzero(values == least)[: k - np.count_nonzero(stay)]] = True
    return np.flatnonzero(stay) if at is None else at[stay]
