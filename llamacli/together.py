"""Answers several sessions of one engine at once: their tokens are evaluated together, so that weights are read once for all.

In: requests. Out: pieces, each with the number of its request. Every session runs the decode loop of session.py; this drives
the loops side by side.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from llamacli.session import Pending, Piece, Session, begin_together

WIDTH = 8  # sessions that answer at a time
WORTH_COPYING = 64  # the tokens of a prompt from which copying another session's cache is faster than evaluating them


class Request(NamedTuple):
    """The arguments of `Session.stream`, and the session, which no other request may use."""

    session: Session
    prompt: Sequence
    sampler: object
    max_tokens: int | None = None
    stop: Sequence[str] = ()


class Answers:
    """Answers under way, each under a number of its caller's choice. Each piece comes with its answer's number.

    An error ends its answer and takes the place of a piece. Where the layers are on several machines, the answers form as many
    groups, which pass from machine to machine so that all of them work.
    """

    def __init__(self):
        self._loops: dict[int, Generator] = {}
        self._pending: dict[int, Pending] = {}
        self._groups: deque[tuple[list[int], Callable]] = deque()  # numbers, and what waits for their logits
        self._found: list[tuple[int, np.ndarray | Exception]] = []  # by groups that are through

    def __len__(self) -> int:
        return len(self._loops)

    def begin(self, number: int, request: Request) -> Iterator[tuple[int, Piece | Exception]]:
        """Evaluate the prompt; returns the pieces that need no further evaluation."""
        self._loops[number] = request.session.answer(*request[1:], shared=True)
        return self._advance(number, None)

    def step(self) -> Iterator[tuple[int, Piece | Exception]]:
        """Evaluate the pending tokens of the answers, usually one each; of several groups, the one that was begun first."""
        self._begin_groups()
        if self._groups and not self._found:
            self._wait()
        found, self._found = self._found, []
        for number, logits in found:
            yield from self._advance(number, logits)

    def _begin_groups(self) -> None:
        depth = next((asked.session.engine.depth for asked in self._pending.values()), 1)
        while self._pending and len(self._groups) < depth:
            numbers = list(self._pending)[: -(-len(self._loops) // depth)]
            self._groups.append((numbers, begin_together([self._pending.pop(number) for number in numbers])))

    def _wait(self) -> None:
        numbers, wait = self._groups.popleft()
        self._found.extend(zip(numbers, wait(), strict=True))

    def settle(self) -> None:
        """Wait for the groups under way, so that a session may be copied."""
        while self._groups:
            self._wait()

    def end(self, number: int) -> None:
        """Forget an answer, if it is under way; its session stays usable."""
        if any(number in numbers for numbers, _ in self._groups):
            self.settle()
        self._found = [found for found in self._found if found[0] != number]
        self._pending.pop(number, None)
        if loop := self._loops.pop(number, None):
            loop.close()

    def abandon(self) -> None:
        """Forget what is under way, after an error that ends all answers."""
        self._groups.clear()
        self._found.clear()

    def interrupt(self, interrupt: KeyboardInterrupt) -> Iterator[tuple[int, Piece]]:
        """The last pieces of all answers after a KeyboardInterrupt, which has already ended the answer under way. An answer
        whose prompt was not yet begun has none.
        """
        self.abandon()
        for number, loop in self._loops.items():
            if loop.gi_suspended:
                yield number, loop.throw(interrupt)

    def _advance(self, number: int, found: np.ndarray | Exception | None) -> Iterator[tuple[int, Piece | Exception]]:
        """Run a decode loop to its next Pending or its end. It receives the logits that it waits for, or the error in their
        place.
        """
        loop = self._loops[number]
        try:
            said = loop.throw(found) if isinstance(found, Exception) else loop.send(found)
            while isinstance(said, Piece):
                yield number, said
                said = next(loop)
            self._pending[number] = said
        except StopIteration:
            self._loops.pop(number, None)  # `end` may have removed it already
        except Exception as error:
            self._loops.pop(number, None)
            yield number, error


def answer_together(requests: Iterable[Request], width: int = WIDTH) -> Iterator[tuple[int, Piece | Exception]]:
    """The pieces of all answers as they come, each with its request's number, from 0; an error ends that request alone.

    `width` requests are under way at a time; one is taken from `requests` when it begins, so its session may be made then. On
    Ctrl-C each answer under way ends as `Session.stream` says, then the KeyboardInterrupt comes.
    """
    waiting, answers = enumerate(requests), Answers()
    try:
        while True:
            while len(answers) < width and (following := next(waiting, None)):
                yield from answers.begin(*following)
            if not answers:
                return
            yield from answers.step()
    except KeyboardInterrupt as interrupt:
        yield from answers.interrupt(interrupt)
        raise


def sample_several(
    session: Session,
    prompt: Sequence,
    samplers: Sequence,
    max_tokens: int | None = None,
    stop: Sequence[str] = (),
    width: int = WIDTH,
) -> Iterator[tuple[int, Piece | Exception]]:
    """Several answers to one prompt, which is evaluated once: an answer with each sampler, as `answer_together` gives them.

    `width` at a time. Each is the one that `session` would give with that sampler.
    """
    session.sync(prompt)
    yield from answer_together((Request(session.fork(), prompt, sampler, max_tokens, stop) for sampler in samplers), width)
