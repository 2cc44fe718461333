"""One conversation with a model: the tokens that its cache holds, and the decode loop.

In: an engine, a tokenizer, ids and a sampler. Out: logits, or `Piece`s of text that end with a finish reason. `sync` reuses
what the cache has in common with the new prompt. An interrupt (Ctrl-C) at any point leaves the session usable: `ids` lists
only tokens whose evaluation succeeded, and whatever an interrupted call may have written is discarded before the next call.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from time import perf_counter
from typing import NamedTuple

import numpy as np

from llamacli.device import Abandoned
from llamacli.errors import ContextFullError, PromptError, UsageError
from llamacli.piece import Piece, Stats
from llamacli.prompt import Token, tokens
from llamacli.snapshots import Snapshots
from llamacli.speculation import Guesses


class StopStrings:
    """Finds stop strings in a stream of text; holds back text that may begin one."""

    def __init__(self, stops: Sequence[str]):
        self._stops = [stop for stop in stops if stop]
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Returns the text that is safe to show and whether a stop string was found; nothing from it on is ever shown."""
        self._held += text
        found = [at for at in map(self._held.find, self._stops) if at >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return shown, True
        keep = max((self._overlap(stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown, False

    def _overlap(self, stop: str) -> int:
        """How many characters at the end of the held text begin `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)

    def flush(self) -> str:
        """The text still held back, once the stream is over."""
        shown, self._held = self._held, ""
        return shown


class Session:
    """Holds the evaluated tokens in `ids`, at most `ctx`. `stats` are those of the latest `stream`."""

    def __init__(self, engine, tokenizer, ctx: int, snapshots: Snapshots | None = None, exact: bool = False):
        """`snapshots`: where beginnings of prompts are read from and kept; with exact snapshots a prompt reuses nothing else.
        `exact`: reuse an earlier prompt only as far as the next one's logits keep their bits.
        """
        self.engine, self.tokenizer, self.ctx, self.snapshots, self.exact = engine, tokenizer, ctx, snapshots, exact
        self._steady = 0  # positions below this one have the same bits in every prompt with these tokens
        self.cache = engine.new_cache(ctx)
        self.ids: list[Token] = []
        self.stats = Stats()
        self.speculate = False  # whether tokens that the text repeats are guessed and evaluated together (speculation.py)
        self._pictures = False  # whether a token may be a row of features
        self._touched = 0  # positions below this one may have been written, by a finished or an interrupted call
        self._turn = 0  # calls so far that changed what is held: an abandoned answer is out of date by it
        self._reached: np.ndarray | None = None  # the logits after `ids`, if `sync` made them and nothing came since

    def eval(self, prompt: Sequence) -> np.ndarray:
        """Evaluate a prompt (prompt.py) after what is held; returns the last token's logits, float32 [n_vocab]."""
        ids = tokens(prompt)
        if not ids:
            raise PromptError("nothing to evaluate: expected at least one token id, found none")
        self._turn += 1
        return self._evaluate(self._rewind(len(self.ids)) + ids)

    def sync(self, prompt: Sequence) -> np.ndarray:
        """Make the session hold exactly this prompt (prompt.py) and return the last token's logits, float32 [n_vocab].

        What the cache shares with it from the start is kept. ContextFullError if it has more than `ctx` tokens.
        """
        self._turn += 1
        if self._reached is None or self.ids != tokens(prompt):
            self._reached = self._sync(self._keep_common(prompt))
        else:
            self.stats.cached_tokens = len(self.ids)
        return self._reached

    def _sync(self, ids: list[Token]) -> np.ndarray:
        if self.snapshots:
            return self._sync_kept(ids)
        if self.exact:
            return self._sync_exactly(ids)
        self.stats.cached_tokens = len(self.ids)
        return self._evaluate(ids[len(self.ids) :])

    def recall(self, prompt: Sequence) -> int:
        """Prepare to evaluate a prompt in parts: keep the tokens that the cache shares with it, and read more of it from
        snapshots. Returns how many tokens are then held, never the prompt's last one.
        """
        self._turn += 1
        ids = self._keep_common(prompt)
        if self.snapshots and not self.snapshots.exact:
            self._restore(ids)
        return len(self.ids)

    def fork(self) -> "Session":
        """An independent copy of the session. After `sync` its answers have the same bytes as the original's."""
        other = Session(self.engine, self.tokenizer, self.ctx)
        ids = self._rewind(len(self.ids))  # discards what an interrupted call may have written
        if ids:
            self._steady = min(self._steady, len(self.ids))
            self._evaluate(ids)
        self.cache.copy_to(other.cache)
        other.ids, other._touched, other._pictures = list(self.ids), len(self.ids), self._pictures
        other._reached, other.exact, other._steady = self._reached, self.exact, self._steady
        return other

    def shares(self, prompt: Sequence) -> int:
        """Roughly how many tokens of a prompt need no evaluation here: the cache may have to discard more."""
        if self.snapshots:
            return 0
        common = _common(self.ids, tokens(prompt))
        return min(common, self._steady) if self.exact else common

    def stream(
        self,
        prompt: Sequence,
        sampler,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        begun: Sequence[int] = (),
    ) -> Iterator[Piece]:
        """Answer the prompt piece by piece, until a stop token, a stop string, `max_tokens` or a full context.

        `begun`: text at the end of the prompt that is the beginning of the answer. Tokens that the sampler's constraint forces
        are evaluated together, as a prompt is. Under a constraint the reason "stop" means that the answer is whole, so it takes
        no stop strings. On Ctrl-C the text held back comes first, as a piece with finish_reason "interrupt", then the
        KeyboardInterrupt.
        """
        return self.answer(prompt, sampler, max_tokens, stop, begun)

    def answer(
        self,
        prompt: Sequence,
        sampler,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        begun: Sequence[int] = (),
        shared: bool = False,
    ) -> Generator["Piece | Pending", np.ndarray, None]:
        """The decode loop of `stream`. `shared`: the loop yields tokens after the prompt as `Pending`; the caller, which runs
        several such loops (together.py), evaluates them and sends the last token's logits back.
        """
        if max_tokens is not None and max_tokens < 1:
            raise UsageError(f"max_tokens: expected at least 1, found {max_tokens}; None sets no limit")
        if stop and sampler.constraint is not None:
            raise UsageError("stop: expected none with a schema, a grammar or a choice, which end the answer; leave it out")
        ids = tokens(prompt)
        stats = self.stats = Stats(prompt_tokens=len(ids))
        decoder, watch = self.tokenizer.stream(), StopStrings([stop] if isinstance(stop, str) else stop)
        stopped = False
        self._turn = turn = self._turn + 1
        drafts: list[int] = []  # ids that were evaluated as guesses and are not yet part of the answer
        try:
            ahead = sampler.begin(begun)  # ids that come next
            said: list[Token] = []  # that are not evaluated yet
            chosen = None
            began = perf_counter()
            rows, turn = [self.sync(ids)], self._turn  # logits after each of the ids evaluated last
            stats.prefill_s = perf_counter() - began
            stats.prefill_io = self.engine.take_io_stats()
            guesses = self._guesses(sampler, shared)
            while True:
                if not ahead:
                    began = perf_counter()
                    if said:
                        proposed = self._propose(guesses, len(said), max_tokens) if guesses else []
                        rows = [(yield Pending(self, said))] if shared else self._evaluate_rows(said, proposed)
                        stats.decoded += len(said)
                        stats.proposed += len(proposed)
                        drafts, said = proposed, []
                        if guesses:
                            guesses.spent(perf_counter() - began, bool(drafts))
                    ahead, chosen = sampler.next_ids(rows.pop(0), self._history(len(drafts))), sampler.chosen
                    stats.decode_s += perf_counter() - began
                token = ahead.pop(0)
                right = drafts[:1] == [token]
                if right:
                    del drafts[0]
                    stats.decoded += 1
                    stats.accepted += 1
                elif drafts:
                    self._rewind(len(self.ids) - len(drafts))
                    drafts = []
                if token in self.tokenizer.stop_ids:
                    reason = "stop"
                    break
                if not right:
                    said.append(token)
                stats.completion_tokens += 1
                if guesses:
                    guesses.said(token)
                text, stopped = watch.push(decoder.push(token))
                yield Piece(text, token, logprobs=chosen)
                chosen = None  # a constraint forced these: the sampler did not choose them
                if stopped or (sampler.over and not ahead):
                    reason = "stop"
                    break
                if stats.completion_tokens == max_tokens or len(self.ids) - len(drafts) + len(said) > self.ctx:
                    reason = "length" if stats.completion_tokens == max_tokens else "context"
                    break
        except KeyboardInterrupt:
            yield Piece("" if stopped else watch.push(decoder.flush())[0] + watch.flush(), None, "interrupt")
            raise
        finally:
            latest = turn == self._turn  # else the answer was abandoned, and the session has gone on since
            if drafts and latest:
                self._rewind(len(self.ids) - len(drafts))
            stats.decode_io = self.engine.take_io_stats()
            if latest and self.snapshots and not self.snapshots.exact:
                self._keep()
        tail = "" if stopped else watch.push(decoder.flush())[0] + watch.flush()
        yield Piece(tail, None, reason)

    def _history(self, unsaid: int = 0) -> list[int]:
        """The ids that penalties count: all but the last `unsaid`, without positions of pictures."""
        ids = self.ids[: len(self.ids) - unsaid] if unsaid else self.ids
        return [t for t in ids if type(t) is int] if self._pictures else ids

    def _guesses(self, sampler, shared: bool) -> Guesses | None:
        """The guesses at next tokens, if they are asked for and can be exact."""
        if not self.speculate or shared or sampler.constraint is not None or self._pictures or self.engine.fetches:
            return None
        return Guesses(self.ids)

    def _propose(self, guesses: Guesses, n_said: int, max_tokens: int | None) -> list[int]:
        """Guesses at what follows `n_said` more tokens: within the context, the answer, and one batch, so that a wrong one can
        be taken back from a ring as well. One that ends the answer is left out.
        """
        pos, left = len(self.ids) + n_said, self.ctx if max_tokens is None else max_tokens - self.stats.completion_tokens
        found = guesses.propose(min(left, self.ctx - pos, self.engine.batch_of(pos).stop - pos))
        end = next((i for i, id in enumerate(found) if id in self.tokenizer.stop_ids), len(found))
        return found[:end]

    def _keep_common(self, prompt: Sequence) -> list[Token]:
        """Truncate the cache to the longest beginning of a prompt; returns the prompt's tokens."""
        ids = tokens(prompt)
        if not ids:
            raise PromptError("the prompt is empty: expected at least one token")
        check_length(len(ids), self.ctx)
        self._rewind(min(_common(self.ids, ids), len(ids) - 1))  # the last token is evaluated again for its logits
        return ids

    def _restore(self, ids: list[Token]) -> None:
        """Read what snapshots keep of `ids` beyond what is held."""
        self._touched = max(self._touched, len(ids))  # reading writes to the cache, and may be interrupted
        restored = self.snapshots.restore(self.cache, ids)
        self.ids, self._touched = ids[:restored], restored
        self._pictures = any(type(t) is not int for t in self.ids)

    def _sync_kept(self, ids: list[Token]) -> np.ndarray:
        """The rest of `sync` with snapshots: read what is kept of `ids`, evaluate the others, keep those."""
        exact = self.snapshots.exact
        if exact:
            self._rewind(0)
        self._restore(ids)
        self.stats.cached_tokens = len(self.ids)
        try:
            if exact:
                self._evaluate_until(self.engine.batch_of(len(self.ids)).stop, ids)
            edge = self.snapshots.last_edge(len(ids))
            if edge > len(self.ids):  # beyond it, chunked layers hold nothing of what comes before
                self._evaluate_until(edge, ids)
                self._keep()
            return self._evaluate(ids[len(self.ids) :])
        finally:  # on Ctrl-C as well, so that the evaluated part need not be evaluated again
            self._keep()

    def _sync_exactly(self, ids: list[Token]) -> np.ndarray:
        """The rest of `sync` if answers must not depend on what was asked before."""
        start = min(len(self.ids), self._steady)
        if not self.engine.may_begin(start, len(ids)):
            start = self.engine.batch_of(start).start
        self._rewind(start)
        start = self.stats.cached_tokens = len(self.ids)
        if not self.engine.may_begin(start, len(ids)):  # the cache had to forget more
            self._rewind(0)
            start = self.stats.cached_tokens = 0
        self._steady = start
        self._evaluate_until(self.engine.batch_of(start).stop, ids)
        logits = self._evaluate(ids[len(self.ids) :])
        self._steady = self.engine.steady_end(len(ids))
        return logits

    def _evaluate_until(self, stop: int, ids: list[Token]) -> None:
        if len(self.ids) < stop < len(ids):
            self._evaluate(ids[len(self.ids) : stop])

    def _keep(self) -> None:
        n = len(self.ids)
        self.snapshots.keep(self.cache, self.ids, self.engine.steady_end(n) if self.snapshots.exact else n)

    def _evaluate(self, ids: list[Token]) -> np.ndarray:
        """Forward `ids` from the cache's position. Only tokens of finished batches count as held."""
        ids = self._claim(ids)
        try:
            return self.engine.forward(ids, self.cache)
        finally:
            self._take(ids)

    def _evaluate_rows(self, said: list[Token], proposed: list[int]) -> list[np.ndarray]:
        """The logits after the id `said` and after each of the guesses `proposed`, with the bits of single tokens."""
        if not proposed:
            return [self._evaluate(said)]
        ids = self._claim([*said, *proposed])
        try:
            return list(self.engine.forward(ids, self.cache, True, len(ids) - len(proposed) - 1, alone=True))
        finally:
            self._take(ids)

    def _claim(self, ids: list[Token]) -> list[Token]:
        """Prepare the evaluation of `ids`; returns the tokens to evaluate."""
        if len(self.ids) + len(ids) > self.ctx:
            raise ContextFullError(f"the context of {self.ctx} tokens is full: raise it with -c, or start a new conversation")
        self._reached = None
        if self._touched > len(self.ids):
            ids = self._rewind(len(self.ids)) + ids
        self._touched = len(self.ids) + len(ids)
        return ids

    def _take(self, ids: list[Token]) -> None:
        """Note the tokens of finished batches after `ids` were evaluated or interrupted."""
        self.ids.extend(ids[: max(0, self.cache.pos - len(self.ids))])
        self._pictures = self._pictures or any(type(t) is not int for t in ids)

    def _rewind(self, length: int) -> list[Token]:
        """Truncate to `length` tokens; returns the ids before it that the cache had to discard, to be evaluated again.

        An interrupted call may have written past the cache's own position and, in a ring, over older tokens. So the cache is
        set to the last position that may have been written, and `truncate` returns how far back is safe.
        """
        if self._touched > length or len(self.ids) > length:
            self._reached = None
        if self._touched > length:
            self.cache.pos = self._touched
        reached = self.cache.truncate(length)
        lost = self.ids[reached:length]
        del self.ids[reached:]
        self._touched = reached
        return lost


class Pending(NamedTuple):
    """Tokens that a session is to evaluate next."""

    session: Session
    ids: list[Token]


def begin_together(pending: Sequence[Pending]) -> Callable[[], Sequence[np.ndarray | Exception]]:
    """Begin to evaluate the pending tokens of several sessions of one engine. Returns a function that waits for the last
    token's logits of each, float32 [n_vocab]; the sessions must not be used before. At most `Engine.depth` such calls may be
    under way.

    If one fails, each session is evaluated alone, and an error takes the place of its logits.
    """
    held = [len(session.ids) for session, _ in pending]
    begun = failed = None
    try:
        begun = _begin_each(pending)
    except Exception as error:
        failed = error

    def wait() -> Sequence[np.ndarray | Exception]:
        try:
            if failed:
                raise failed
            return begun()
        except Exception as error:
            if len(pending) == 1 and not isinstance(error, Abandoned):
                return [error]
        return [_evaluate_alone(session, n, ids) for n, (session, ids) in zip(held, pending, strict=True)]

    return wait


def _evaluate_alone(session: Session, held: int, ids: list[Token]) -> np.ndarray | Exception:
    """The logits after `ids`, which follow the first `held` tokens, or the error. An interrupted call may have evaluated some
    of them.
    """
    try:
        return session._evaluate(session._rewind(held) + ids)
    except Exception as error:
        return error


def _begin_each(pending: Sequence[Pending]) -> Callable[[], np.ndarray]:
    claimed = [session._claim(ids) for session, ids in pending]
    engine, caches = pending[0].session.engine, [session.cache for session, _ in pending]

    def take() -> None:
        for (session, _), ids in zip(pending, claimed, strict=True):
            session._take(ids)

    try:
        finish = engine.begin_each(claimed, caches) if engine.depth > 1 else partial(engine.forward_each, claimed, caches)
    except BaseException:
        take()
        raise

    def wait() -> np.ndarray:
        try:
            return finish()
        finally:
            take()

    return wait


def _common(held: Sequence[Token], ids: Sequence[Token]) -> int:
    """How many tokens two texts share from their start."""
    return next((i for i, (a, b) in enumerate(zip(held, ids, strict=False)) if a != b), min(len(held), len(ids)))


def check_length(n: int, ctx: int, more: str = "") -> None:
    """ContextFullError if a prompt of `n` tokens is longer than `ctx`; it suggests a size with room for an answer."""
    if n > ctx:
        size = (n + 512 + 1023) // 1024 * 1024
        raise ContextFullError(f"the prompt has {n} tokens{more}, the context holds {ctx}: shorten it or use -c {size}")
