"""Logits to the next token.

In: float32 logits [n_vocab] and the ids so far. Out: one id.

First logit biases are added, and hidden and masked tokens removed. Then follow the steps of `samplers` (samplers.py), by
default penalties, dry, temperature, top_n_sigma, top_k, typ_p, top_p, min_p, xtc; steps that are off cost nothing. Mirostat
replaces all steps that select tokens. Last, a token is drawn from the rest. At temp 0 the largest logit is taken after the
penalties. A vocabulary of 202,048 costs 0.2 milliseconds, 0.7 with nearly uniform probabilities.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np

from llamacli.cpu.kernels.ops.selection import draw, fewest
from llamacli.errors import LlamacliError, UsageError
from llamacli.text import samplers as steps
from llamacli.text.samplers import Candidates
from llamacli.text.settings import DEFAULT_ORDER, SETTINGS, checked

_NOTHING = 30  # a logit this many temperatures below the best has a weight of e^-30, a whole vocabulary of them 2e-8
_LOGIT_LIMIT = 1e30  # the largest finite bias
_CHANGES = ("penalties", "dry")  # steps after which an unlikely token may be a likely one
_PLAIN = ("temperature", "top_p", "min_p")  # the steps that a few passes over all weights can do, in this order


class Constraint(Protocol):
    """The interface of a grammar for `Sampler` (constraint.py)."""

    over: bool  # the answer is complete, and nothing may follow

    def begin(self, begun: Sequence[int]) -> None:
        """Begin another answer, whose text so far is `begun`."""

    def mask(self, logits: np.ndarray) -> None:
        """Set the logits [n_vocab] of tokens that may not come next to minus infinity, in place."""

    def accept(self, id: int) -> None:
        """Advance by the token that was picked."""

    def forced(self) -> list[int]:
        """Advance by the ids that must come next whatever the logits, and return them."""


class Sampler:
    """Picks tokens. The same seed and the same logits give the same ids; `seed` None: a random seed.

    Settings are keywords with the names of `settings.SETTINGS`, which holds defaults and ranges. `temp` 0 is greedy. Off are:
    top_k 0, top_p 1, min_p 0, typical_p 1, top_n_sigma 0, repeat_penalty 1, presence_penalty and frequency_penalty 0,
    dry_multiplier 0, xtc_probability 0, dynatemp_range 0. `repeat_last_n` and `dry_penalty_last_n` count tokens, -1 means all.

    `mirostat`: 0 or 2. `dry_breakers`: ids that end a repetition. `logit_bias`: id to the number added to its logit; -inf bans
    it. `samplers`: the order of the steps, names as in `DEFAULT_ORDER`; a step that is not named is off. `hidden_ids` are never
    picked; ids past the logits are ignored. `logprobs`: after each pick, `chosen` holds the logarithm of the model's own
    probability for the token and a list of the likeliest, (id, logarithm). `constraint`: see `Constraint`.

    UsageError for an invalid setting.
    """

    def __init__(
        self,
        *,
        seed: int | None = None,
        mirostat: int = 0,
        dry_breakers: Iterable[int] = (),
        logit_bias: Mapping[int, float] | None = None,
        samplers: Sequence[str] | None = None,
        hidden_ids: np.ndarray | None = None,
        logprobs: int | None = None,
        constraint: Constraint | None = None,
        **settings: float,
    ):
        if unknown := sorted(settings.keys() - SETTINGS.keys()):
            raise UsageError(f"expected settings among {', '.join(sorted(SETTINGS))}, found {unknown[0]}")
        self.settings = {name: checked(name, settings.get(name, rule[0])) for name, rule in SETTINGS.items()}
        if seed is not None and (type(seed) is not int or seed < 0):
            raise UsageError(f"seed: expected a whole number from 0 up, found {seed!r:.40}")
        if mirostat not in (0, 2):
            raise UsageError(f"mirostat: expected 0 or 2, found {mirostat!r:.40}")
        if logprobs is not None and not 0 <= logprobs <= 1000:
            raise UsageError(f"logprobs: expected a count from 0 to 1000, found {logprobs!r:.40}")
        self.order = tuple(DEFAULT_ORDER if samplers is None else samplers)
        if wrong := next((name for name in self.order if name not in DEFAULT_ORDER or self.order.count(name) > 1), None):
            raise UsageError(f"samplers: expected each once of {', '.join(DEFAULT_ORDER)}, found {wrong!r:.40}")
        self.mirostat, self.logprobs, self.constraint = mirostat, logprobs, constraint
        self.chosen: tuple[float, list[tuple[int, float]]] | None = None
        self._mu = 2 * self.settings["mirostat_tau"]
        self._hidden = np.unique(np.asarray(() if hidden_ids is None else hidden_ids, np.int64))
        self._biased, self._bias = _biases(logit_bias or {})
        self._breakers = frozenset(dry_breakers)
        self._random = np.random.default_rng(seed)
        self._own = np.empty(0, np.float32)
        self._in_use = self._active()
        self._temp = self.settings["temp"] if "temperature" in self.order else 1.0

    def begin(self, begun: Sequence[int] = ()) -> list[int]:
        """Begin another answer, whose text so far is `begun`. Returns the ids that must come next, none without a
        constraint.
        """
        if self.constraint is None:
            return []
        self.constraint.begin(begun)
        return self.constraint.forced()

    def next_ids(self, logits: np.ndarray, history: Sequence[int] = ()) -> list[int]:
        """The next id by `pick`, and the ids that a constraint forces after it."""
        id = self.pick(logits, history)
        return [id] if self.constraint is None else [id, *self.constraint.forced()]

    @property
    def over(self) -> bool:
        """Whether a constraint allows no further token."""
        return self.constraint is not None and self.constraint.over

    def pick(self, logits: np.ndarray, history: Sequence[int] = ()) -> int:
        """The next id. `logits` are not changed; `history`: the ids for the penalties.

        LlamacliError if a logit is NaN or none is left: a silent guess would hide a damaged model.
        """
        candidates, then = self._changed(logits, history)
        if len(candidates.logits) > 1 and self._is_plain(then):
            id = self._draw_plainly(candidates, then)
        else:
            self._narrow(candidates, then)
            if len(candidates.logits) == 1:
                id = int(candidates.ids[0])
            else:
                id = self._surprising(candidates) if self.mirostat else self._draw(candidates)
        if self.logprobs is not None:
            self.chosen = log_probabilities(logits, id, self.logprobs)
        if self.constraint is not None:
            self.constraint.accept(id)
        return id

    def candidates(self, logits: np.ndarray, history: Sequence[int] = ()) -> Candidates:
        """The tokens that `pick` draws from, and their logits after all steps."""
        candidates, then = self._changed(logits, history)
        self._narrow(candidates, then)
        return candidates

    def _changed(self, logits: np.ndarray, history: Sequence[int]) -> tuple[Candidates, tuple[str, ...]]:
        """All tokens after the steps that can make an unlikely token likely, and the remaining steps; only the best token, and
        no steps, if nothing else can be drawn.
        """
        candidates = Candidates(self._prepared(logits))
        changes = max((i for i, name in enumerate(self._in_use) if name in _CHANGES), default=-1) + 1
        first, then = self._in_use[:changes], self._in_use[changes:]  # unlikely tokens may be dropped only between these steps
        if any(name not in _CHANGES for name in first):
            self._best(candidates)  # before a step meets NaN
        for name in first:
            self._step(name, history, shifted=False)(candidates)
        best = self._best(candidates)
        if self._temp == 0 or candidates.logits[best] == np.inf:
            candidates.keep(np.array([best]))
            return candidates, ()
        if then[:1] == ("top_k",):
            self._step("top_k", history)(candidates)
            then = then[1:]
        return candidates, then

    def _narrow(self, candidates: Candidates, then: tuple[str, ...]) -> None:
        """Drop tokens that are too unlikely to matter, and apply the steps."""
        measured = "top_n_sigma" in then or ("temperature" in then and self.settings["dynatemp_range"] > 0)
        candidates.cut(self._gap(then), measured)
        for name in then:
            self._step(name, ())(candidates)

    def _gap(self, then: tuple[str, ...]) -> float:
        """The distance below the best logit from which a token is too unlikely to matter, whatever these steps do."""
        span = self.settings["dynatemp_range"]
        return _NOTHING * (self._temp if then[:1] == ("temperature",) and not span else max(1.0, self._temp + span))

    def _is_plain(self, then: tuple[str, ...]) -> bool:
        """Whether these steps are only `_PLAIN` ones, in that order."""
        plain = then == tuple(name for name in _PLAIN if name in then)
        return plain and not self.mirostat and not (self.settings["dynatemp_range"] and "temperature" in then)

    def _draw_plainly(self, candidates: Candidates, then: tuple[str, ...]) -> int:
        """`_narrow` and `_draw` in one for the `_PLAIN` steps, over all weights, without copies."""
        candidates.cut(self._gap(then), False, most=True)
        if "temperature" in then:
            self._step("temperature", ())(candidates)  # the best is then 0
        weights = candidates.logits
        if "temperature" not in then:
            weights -= weights.max()
        np.exp(weights, out=weights)
        top_p, min_p = (self.settings[name] if name in then else off for name, off in (("top_p", None), ("min_p", 0.0)))
        bound = fewest(weights, top_p, min_p)
        at = draw(weights, bound, self._random.random() if bound.count > 1 else 0.0)
        return at if candidates.ids is None else int(candidates.ids[at])

    def _best(self, candidates: Candidates) -> int:
        """The index of the largest logit. NaN counts as the largest, so any NaN is found."""
        best = int(candidates.logits.argmax())
        if candidates.logits[best] > -np.inf:
            return best
        if self.constraint is not None and not np.isnan(candidates.logits[best]):
            raise LlamacliError("expected a token that the grammar and the logit biases both allow, found none; bias less")
        found = "NaN" if np.isnan(candidates.logits[best]) else "none that may be sampled"
        raise LlamacliError(f"expected the model's logits to be numbers, found {found}; the model file is damaged")

    def _active(self) -> tuple[str, ...]:
        """The steps that are on, in order."""
        s = self.settings
        off = {
            "penalties": (s["repeat_penalty"], s["presence_penalty"], s["frequency_penalty"]) == (1, 0, 0)
            or s["repeat_last_n"] == 0,
            "dry": s["dry_multiplier"] == 0 or s["dry_penalty_last_n"] == 0,
            "temperature": s["temp"] == 1 and s["dynatemp_range"] == 0,
            "top_n_sigma": s["top_n_sigma"] == 0,
            "top_k": s["top_k"] == 0,
            "typ_p": s["typical_p"] == 1,
            "top_p": s["top_p"] == 1,
            "min_p": s["min_p"] == 0,
            "xtc": s["xtc_probability"] == 0 or s["xtc_threshold"] > 0.5,
        }
        if self.mirostat:
            off |= dict.fromkeys(("top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc"), True)
        active = [name for name in self.order if not off[name]]
        for i, pair in enumerate(pairwise(active)):
            if pair == ("temperature", "top_k") and s["dynatemp_range"] == 0:  # the same tokens, found before they are divided
                active[i : i + 2] = reversed(pair)
        return tuple(active)

    def _step(self, name: str, history: Sequence[int], shifted: bool = True) -> steps.Step:
        s = self.settings
        match name:
            case "penalties":
                amounts = (s["repeat_penalty"], s["presence_penalty"], s["frequency_penalty"])
                return steps.penalties(*amounts, s["repeat_last_n"], history)
            case "dry":
                rule = (s["dry_multiplier"], s["dry_base"], s["dry_allowed_length"], s["dry_penalty_last_n"])
                return steps.dry(*rule, self._breakers, history)
            case "temperature":
                return steps.temperature(s["temp"], s["dynatemp_range"], s["dynatemp_exponent"], shifted)
            case "top_n_sigma":
                return steps.top_n_sigma(s["top_n_sigma"])
            case "top_k":
                return steps.top_k(s["top_k"])
            case "typ_p":
                return steps.typical(s["typical_p"])
            case "top_p":
                return steps.top_p(s["top_p"])
            case "min_p":
                return steps.min_p(s["min_p"])
        use = self._random.random() < s["xtc_probability"]
        return steps.xtc(s["xtc_threshold"]) if use else lambda c: None

    def _prepared(self, logits: np.ndarray) -> np.ndarray:
        """A copy in the sampler's own buffer: biases added, hidden and masked tokens at -inf."""
        if self._own.shape != logits.shape:
            self._own = np.empty(logits.shape, np.float32)
        own = self._own
        np.copyto(own, logits)
        if len(self._biased):
            own[self._biased[self._biased < len(own)]] += self._bias[self._biased < len(own)]
        own[self._hidden[(self._hidden >= 0) & (self._hidden < len(own))]] = -np.inf
        if self.constraint is not None:
            self.constraint.mask(own)
        return own

    def _draw(self, candidates: Candidates) -> int:
        total = np.cumsum(candidates.weights(), dtype=np.float64)
        at = min(int(np.searchsorted(total, self._random.random() * total[-1], "right")), len(total) - 1)
        return int(candidates.ids[at])

    def _surprising(self, candidates: Candidates) -> int:
        """Mirostat 2: keep tokens whose surprise in bits is at most mu, which is then adapted to the surprise of the drawn
        token.
        """
        surprise = -np.log2(np.maximum(candidates.probabilities(), 1e-300))
        candidates.keep((surprise <= self._mu) | (np.arange(len(surprise)) == np.argmin(surprise)))
        id = self._draw(candidates)
        drawn = -np.log2(candidates.probabilities()[np.searchsorted(candidates.ids, id)])
        self._mu -= self.settings["mirostat_eta"] * (drawn - self.settings["mirostat_tau"])
        return id


def log_probabilities(logits: np.ndarray, id: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """Logarithms of the model's own probabilities: of `id`, and of the `count` likeliest tokens, the likeliest first."""
    best = float(logits.max())
    normal = best + float(np.log(np.exp(logits - np.float32(best)).sum(dtype=np.float64)))
    count = min(count, len(logits))
    top = np.argpartition(logits, len(logits) - count)[len(logits) - count :] if count else np.empty(0, np.int64)
    top = top[np.lexsort((top, -logits[top]))]
    return float(logits[id]) - normal, [(int(i), float(logits[i]) - normal) for i in top]


def _biases(bias: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray]:
    for id, value in bias.items():
        if type(id) is not int or id < 0 or not (abs(value) <= _LOGIT_LIMIT or value == -np.inf):
            raise UsageError(f"logit_bias: expected ids and finite numbers or -inf, found {id!r:.20}: {value!r:.20}")
    return np.fromiter(bias.keys(), np.int64, len(bias)), np.fromiter(bias.values(), np.float32, len(bias))
