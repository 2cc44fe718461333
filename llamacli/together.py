"""Answers of several sessions of one engine at once: their tokens are evaluated together, and weights are read once for all.

In: requests. Out: pieces, each with the number of its request. Every session runs the decode loop of session.py; this drives
the loops side by side.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import NamedTuple

from llamacli.errors import LlamacliError
from llamacli.session import Pending, Piece, Session, evaluate_together

WIDTH = 8  # sessions that answer at a time


class Request(NamedTuple):
    """What `Session.stream` takes, and the session, which no other request may have."""

    session: Session
    prompt: Sequence
    sampler: object
    max_tokens: int | None = None
    stop: Sequence[str] = ()


def answer_together(requests: Iterable[Request], width: int = WIDTH) -> Iterator[tuple[int, Piece | LlamacliError]]:
    """The pieces of all answers as they come, each with its request's number, from 0; an error ends that request alone.

    `width` requests are under way at a time; one is taken from `requests` when it begins, so its session may be made then. On
    Ctrl-C each answer under way ends as `Session.stream` says, then the KeyboardInterrupt comes.
    """
    waiting, loops = enumerate(requests), {}
    pending: dict[int, Pending] = {}
    try:
        while True:
            while len(loops) < width and (following := next(waiting, None)):
                number, request = following
                loops[number] = request.session.answer(*request[1:], shared=True)
                yield from _advance(number, loops, pending, None)
            if not loops:
                return
            numbers, asked = list(pending), list(pending.values())
            pending.clear()
            for number, logits in zip(numbers, evaluate_together(asked), strict=True):
                yield from _advance(number, loops, pending, logits)
    except KeyboardInterrupt as interrupt:
        for number, loop in loops.items():
            if loop.gi_frame is not None:  # unless it was this one's own
                yield number, loop.throw(interrupt)
        raise


def _advance(
    number: int, loops: dict[int, Generator], pending: dict[int, Pending], logits
) -> Iterator[tuple[int, Piece | LlamacliError]]:
    """Run a loop to its next Pending, or to its end."""
    try:
        found = loops[number].send(logits)
        while isinstance(found, Piece):
            yield number, found
            found = next(loops[number])
        pending[number] = found
    except StopIteration:
        del loops[number]
    except LlamacliError as error:
        del loops[number]
        yield number, error
