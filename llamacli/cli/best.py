"""`run --best-of N`: samples several answers to one prompt and selects the likeliest.

In: a prompt's ids. Out: what `run` writes, for the answer with the highest mean log probability of its tokens. The
probabilities are the model's own, before biases and temperature; the token that ends an answer does not count. With --json also
all answers. The prompt is evaluated once; then up to eight answers at a time are evaluated together. Answer k, from 0, has the
seed of --seed plus k, and the text that `run` gives with that seed, where several sequences have the bytes of each alone.
"""

import copy
import sys
import time
from dataclasses import dataclass, field

from llamacli.cli import signals
from llamacli.cli.binding import check_whole
from llamacli.cli.options import Generation
from llamacli.cli.run import SEVERAL, Answer, likely, reading
from llamacli.cli.stats import describe
from llamacli.session import Stats
from llamacli.together import sample_several


@dataclass
class Sampled:
    """One answer, complete or under way."""

    seed: int
    text: str = ""
    reason: str = "interrupt"
    total: float = 0.0  # of the log probabilities
    counted: int = 0
    tokens: int = 0
    likely: list = field(default_factory=list)  # pieces with log probabilities

    @property
    def mean(self) -> float:
        """Mean log probability of its tokens."""
        return self.total / self.counted if self.counted else 0.0

    def take(self, piece) -> None:
        self.text += piece.text
        self.tokens += piece.id is not None
        if piece.logprobs:
            self.total, self.counted = self.total + piece.logprobs[0], self.counted + 1
            self.likely.append(piece)
        self.reason = piece.finish_reason or self.reason


class BestAnswer(Answer):
    """Samples several answers and writes the best one where `run` writes its answer."""

    def __init__(self, n: int, *args):
        super().__init__(*args)
        self._n, self._found, self._binds = n, [], False

    def take(self, model, ids: list, options: Generation, logprobs: int | None = None, views=(), messages=()) -> None:
        """As `Answer.take`. On Ctrl-C the best of the finished answers is written or, if there is none, the best of the
        unfinished.
        """
        console, self._views, self._logprobs = self._console, views, None if logprobs is None else []
        self._tokenizer, stats, samplers = model.tokenizer, Stats(prompt_tokens=len(ids)), []
        first_seed = time.time_ns() % (1 << 32) if options.seed is None else options.seed
        for k in range(self._n):
            seeded = copy.copy(options)
            seeded.seed = first_seed + k
            samplers.append(seeded.sampler(model, console, logprobs or 0))
            self._found.append(Sampled(seeded.seed))
        self._binds = samplers[0].constraint is not None
        session = options.session(model, exact=True)
        with signals.at_forced_end(lambda: self._end(stats, "interrupt")):
            try:
                self._answer(model, session, ids, samplers, options, stats)
            finally:  # also on Ctrl-C and SIGTERM
                broken = sys.exc_info()[0]
                if broken is None or broken in (KeyboardInterrupt, SystemExit):
                    self._end(stats, "interrupt")
        best = self._best
        if console.verbose or best.reason != "stop":
            console.note(describe(stats, best.reason, self._load_s))
        check_whole(samplers[0], best.reason)

    def _answer(self, model, session, ids: list, samplers: list, options: Generation, stats: Stats) -> None:
        began, ended = time.perf_counter(), 0
        with reading(self._console, model):
            session.sync(ids)
        stats.cached_tokens, stats.prefill_s = session.stats.cached_tokens, time.perf_counter() - began
        with self._console.progress("answering") as update:
            for k, piece in sample_several(session, ids, samplers, options.max_tokens, options.stop or (), SEVERAL):
                if isinstance(piece, Exception):
                    raise piece
                self._found[k].take(piece)
                stats.completion_tokens += piece.id is not None
                stats.decode_s = time.perf_counter() - began - stats.prefill_s
                if piece.finish_reason:
                    ended += 1
                    update(ended, self._n, f"answer {ended} of {self._n}")
        stats.decoded = stats.completion_tokens

    @property
    def _best(self) -> Sampled:
        def rank(found: Sampled):
            ended = found.reason != "interrupt"
            return found.reason == "stop" if self._binds else ended, ended, found.counted > 0, found.mean

        return max(self._found, key=rank)

    def _end(self, stats, reason: str) -> None:
        if not self._said:
            best = self._best
            self._text = [best.text]
            if self._logprobs is not None:
                self._logprobs = [likely(self._tokenizer, piece) for piece in best.likely]
            super()._end(stats, best.reason)

    def _more(self) -> dict:
        return {"seed": self._best.seed, "logprob": _rounded(self._best.mean), "answers": [self._shown(f) for f in self._found]}

    def _shown(self, found: Sampled) -> dict:
        record = {"seed": found.seed, "text": self._wanted(found.text), "finish_reason": found.reason}
        return record | {"logprob": _rounded(found.mean), "completion_tokens": found.tokens}


def _rounded(value: float) -> float:
    return round(value, 6)
