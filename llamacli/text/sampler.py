"""Logits to the next token.

In: float32 logits [n_vocab] and the ids so far. Out: one id. The order is fixed: hidden tokens out, repeat penalty, (temp 0:
the largest logit, done), temperature, top-k, top-p, min-p, then a draw from what is left. Only what is undecided is sorted: a
vocabulary of 202,048 costs half a millisecond, a few where a model thinks everything possible. Knows nothing of text.
"""

from collections.abc import Sequence

import numpy as np

from llamacli.errors import LlamacliError, UsageError

PENALTY_WINDOW = 64  # tokens that the repeat penalty looks back
_NOTHING = 30  # a logit so many temperatures below the best has a weight of e^-30, a whole vocabulary of them 2e-8
_LEAST_TEMP, _MOST_TEMP = 1e-30, 1e30  # between them float32 suffices, beyond them nothing changes
_FEW = 256  # weights that are sorted rather than halved


class Sampler:
    """How to pick. The same seed and the same logits give the same ids; `seed` None is a new draw each time.

    `temp` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 and `repeat_penalty` 1 are off. `hidden_ids` are never picked; ids past
    the logits are ignored.
    """

    def __init__(
        self,
        temp: float = 0.6,
        top_k: int = 0,
        top_p: float = 0.9,
        min_p: float = 0.0,
        repeat_penalty: float = 1.0,
        seed: int | None = None,
        hidden_ids: np.ndarray | None = None,
    ):
        for name, value, sound in (
            ("temp", temp, temp >= 0),
            ("top_k", top_k, top_k >= 0),
            ("top_p", top_p, 0 <= top_p <= 1),
            ("min_p", min_p, 0 <= min_p <= 1),
            ("repeat_penalty", repeat_penalty, 0.01 <= repeat_penalty <= 100),
            ("seed", seed, seed is None or seed >= 0),
        ):
            if not sound or (isinstance(value, float) and not np.isfinite(value)):
                raise UsageError(f"{name} {value} makes no sense; see `llamacli run --help` for the ranges")
        self.temp, self.top_k, self.top_p, self.min_p, self.repeat_penalty = temp, int(top_k), top_p, min_p, repeat_penalty
        self._hidden = np.unique(np.asarray(() if hidden_ids is None else hidden_ids, np.int64))
        self._random = np.random.default_rng(seed)
        self._logits = np.empty(0, np.float32)

    def pick(self, logits: np.ndarray, history: Sequence[int] = ()) -> int:
        """The next id. `logits` are left as they are; of `history` the last 64 ids count, for the repeat penalty.

        LlamacliError if a logit is NaN or none is left: a silent guess would hide a damaged model.
        """
        logits = self._prepared(logits, history)
        best = int(logits.argmax())
        if not logits[best] > -np.inf:  # NaN comes out as the largest, so this sees it wherever it is
            found = "NaN" if np.isnan(logits[best]) else "none that may be sampled"
            raise LlamacliError(f"expected the model's logits to be numbers, found {found}; the model file is damaged")
        if self.temp == 0 or self.top_k == 1 or logits[best] == np.inf:
            return best
        ids, weights = self._candidates(logits, logits[best])
        total = np.cumsum(weights, dtype=np.float64)
        return int(ids[min(np.searchsorted(total, self._random.random() * total[-1], "right"), len(ids) - 1)])

    def _prepared(self, logits: np.ndarray, history: Sequence[int]) -> np.ndarray:
        """A copy in the sampler's own buffer: hidden tokens at -inf, recent tokens penalised."""
        if self._logits.shape != logits.shape:
            self._logits = np.empty(logits.shape, np.float32)
            self._hidden = self._hidden[(self._hidden >= 0) & (self._hidden < len(logits))]
        own = self._logits
        np.copyto(own, logits)
        if self.repeat_penalty != 1.0 and len(history):
            recent = np.unique(np.asarray(history[-PENALTY_WINDOW:], np.int64))
            recent = recent[(recent >= 0) & (recent < len(own))]
            seen = own[recent]
            own[recent] = np.where(seen > 0, seen / self.repeat_penalty, seen * self.repeat_penalty)
        own[self._hidden] = -np.inf
        return own

    def _candidates(self, logits: np.ndarray, best: np.float32) -> tuple[np.ndarray, np.ndarray]:
        """The ids left after top-k, top-p and min-p, and their weights, float32: exp((logit - best) / temp), 1 for the best."""
        temp = min(max(self.temp, _LEAST_TEMP), _MOST_TEMP)
        few = 0 < self.top_k < len(logits)
        ids = _largest(logits, self.top_k) if few else np.flatnonzero(logits >= best - temp * _NOTHING)
        with np.errstate(over="ignore"):  # a temperature next to 0 makes all but the best minus infinity, as it should
            weights = np.exp((logits[ids] - best) / temp)
        if self.top_p < 1.0:
            stay = _fewest(weights, self.top_p * weights.sum(dtype=np.float64))
            ids, weights = ids[stay], weights[stay]
        if self.min_p:
            stay = weights >= self.min_p
            ids, weights = ids[stay], weights[stay]
        return ids, weights


def _largest(logits: np.ndarray, count: int) -> np.ndarray:
    """Ids of the `count` largest logits, the lowest first."""
    return np.sort(np.argpartition(logits, len(logits) - count)[len(logits) - count :])


def _fewest(weights: np.ndarray, enough: float) -> np.ndarray:
    """Where the fewest are that add up to `enough`, one at least, as booleans; of equal ones the first.

    Halves what is undecided, and sorts only when little is left: thousands may have to stay where a model is unsure.
    """
    undecided, count = weights, 0
    while len(undecided) > _FEW:
        half = len(undecided) // 2
        parts = np.partition(undecided, half)
        total = parts[half:].sum(dtype=np.float64)
        if total >= enough:
            undecided = parts[half:]
        else:
            undecided, enough, count = parts[:half], enough - total, count + len(parts) - half
    undecided = np.sort(undecided)[::-1]
    last = min(int(np.searchsorted(np.cumsum(undecided, dtype=np.float64), enough, "left")), len(undecided) - 1)
    stay = weights > undecided[last]
    stay[np.flatnonzero(weights == undecided[last])[: count + last + 1 - np.count_nonzero(stay)]] = True
    return stay
