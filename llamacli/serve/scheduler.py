"""Schedules answers for many clients on one engine: the engine's thread and its queue.

In: jobs, from any thread. Out: events, given to a job's `emit`: `Begun` once its prompt is evaluated, then the `Piece`s of its
answer, the last with a finish reason; or one exception.

Clients take turns in the queue. Prompts are evaluated one after the other. While answers are under way, a prompt is evaluated
in slices, and each answer advances by a token between two slices; the answers' tokens are evaluated together. Sessions are
kept, so that only the rest of a prompt is evaluated if a session holds its beginning; if another conversation uses that
session, a copy is used.

An error ends only its own answer. After an unexpected error the session is discarded.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import compress, count
from operator import ne
from time import perf_counter
from typing import NamedTuple

from llamacli.errors import LlamacliError
from llamacli.session import Piece, Session, check_length
from llamacli.together import WORTH_COPYING, Answers, Request

PLACES = 4  # answers at a time
MOST_WAITING = 64  # jobs
SLICE = 256  # tokens of a prompt's slice between two tokens of the answers under way
CLOSING = 10.0  # seconds for the thread to end


class Busy(LlamacliError):
    """The queue is full."""


class Stopping(LlamacliError):
    """The server ends."""


class Broken(LlamacliError):
    """An unexpected error ended an answer. It was reported; the client is told no details."""


class Begun(NamedTuple):
    """A prompt was evaluated. `cached_tokens` of it were reused."""

    prompt_tokens: int
    cached_tokens: int


@dataclass
class Totals:
    """Totals since the start: tokens, seconds, jobs."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0


class Job:
    """A request for an answer. `client`: clients take turns; `evaluated`: tokens of the prompt so far; others as for
    Request.
    """

    def __init__(
        self,
        client: str,
        prompt: Sequence[int],
        sampler,
        emit: Callable[[Begun | Piece | Exception], None],
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
    ):
        self.client, self.prompt, self.sampler, self.emit = client, prompt, sampler, emit
        self.max_tokens, self.stop = max_tokens, stop
        self.evaluated, self.cancelled = 0, False


class _Place:
    """A session (None until one is made) and the job that it answers."""

    def __init__(self, session: Session | None):
        self.session, self.job, self.used = session, None, 0

    @property
    def ids(self) -> Sequence:
        """The tokens that its session holds."""
        return self.session.ids if self.session else ()


class Scheduler:
    """See the module. `waiting` and `active` count jobs; `totals` is the engine thread's."""

    def __init__(
        self,
        model,
        places: int = PLACES,
        most_waiting: int = MOST_WAITING,
        snapshots=None,
        report: Callable[[Exception], None] = lambda error: None,
    ):
        """`places`: answers at a time. `report`: called with unexpected errors."""
        self._model, self._most_waiting, self._snapshots, self._report = model, most_waiting, snapshots, report
        self._places = [_Place(self._session()) for _ in range(places)]
        self._answers = Answers()
        self._prompt: tuple[Job, Iterator[None]] | None = None  # the place whose prompt is being evaluated
        self._reading: Job | None = None  # the job whose prompt the engine evaluates at this moment
        self._waiting: dict[str, deque[Job]] = {}  # by client, in the order of their turns
        self._changed = threading.Condition()
        self._closed, self._turn = False, 0
        self.totals = Totals()
        self._thread = threading.Thread(target=self._run, daemon=True, name="engine")
        self._thread.start()

    @property
    def works(self) -> bool:
        """Whether jobs are accepted."""
        return not self._closed

    @property
    def waiting(self) -> int:
        """Jobs in the queue."""
        return sum(map(len, list(self._waiting.values())))

    @property
    def active(self) -> int:
        """Jobs whose prompt or answer is being evaluated."""
        return sum(place.job is not None for place in self._places)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all these jobs. Busy if the queue has no room for them, Stopping if the server is ending."""
        with self._changed:
            if self._closed:
                raise Stopping("the server is stopping; ask again later")
            if self.waiting + len(jobs) > self._most_waiting + (len(self._places) - self.active):
                raise Busy(f"the queue is full: {self.waiting} answers wait before this one; ask again later")
            for job in jobs:
                self._waiting.setdefault(job.client, deque()).append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """End a job: at once if it is queued or its prompt is being evaluated, else at the next token. No event follows."""
        with self._changed:
            job.cancelled = True
            queue = self._waiting.get(job.client, ())
            if job in queue:
                queue.remove(job)
                self.totals.cancelled += 1
                if not queue:
                    del self._waiting[job.client]
            if self._reading is job:
                self._model.engine.interrupt()
            self._changed.notify()

    def close(self) -> None:
        """End all jobs with Stopping, and end the thread."""
        with self._changed:
            self._closed = True
            self._model.engine.interrupt()
            self._changed.notify()
        self._thread.join(CLOSING)

    # the engine's thread

    def _run(self) -> None:
        try:
            while self._has_work():
                try:
                    self._take_turns()
                except KeyboardInterrupt:  # the signal watcher interrupts engines
                    self._fail(Stopping("the server was interrupted; ask again"))
                except Exception as error:
                    self._fail(error)
        finally:  # whatever ended the thread, no job may wait for it
            with self._changed:
                self._closed = True
            stopping = Stopping("the server is stopping; ask again later")
            under_way = [self._prompt[0]] if self._prompt else []
            under_way += [place.job for place in self._places if place.job and place.job not in under_way]
            for job in under_way + [job for queue in self._waiting.values() for job in queue]:
                self._emit(job, stopping)

    def _take_turns(self) -> None:
        """Evaluate a slice of a prompt, and a token of each answer."""
        self._drop_cancelled()
        if self._prompt is None and (job := self._next()):
            self._prompt = job, self._read(job)
        if self._prompt and next(self._prompt[1], self) is self:
            self._prompt = None
        began, before = perf_counter(), self.totals.completion_tokens
        for number, piece in self._answers.step():
            self._tell(self._places[number], piece)
        if self.totals.completion_tokens > before:
            self.totals.decode_seconds += perf_counter() - began

    def _has_work(self) -> bool:
        with self._changed:
            while not (self._closed or self._waiting or self.active):
                self._changed.wait()
            return not self._closed

    def _next(self) -> Job | None:
        """The next job, if a place is free: that of the client whose last turn is the longest ago."""
        with self._changed:
            if not self._waiting or self.active == len(self._places):
                return None
            client, queue = next(iter(self._waiting.items()))
            del self._waiting[client]
            job = queue.popleft()
            if queue:
                self._waiting[client] = queue
            return job

    def _drop_cancelled(self) -> None:
        for number, place in enumerate(self._places):
            if place.job and place.job.cancelled:
                self._give_up(number)
                if self._prompt and self._prompt[0] is place.job:
                    self._prompt = None
                place.job = None
                self.totals.cancelled += 1

    def _read(self, job: Job) -> Iterator[None]:
        """Evaluate a prompt, in slices while others answer, and begin the answer."""
        place, began, begun = self._place_for(job.prompt), perf_counter(), False
        place.job, number = job, self._places.index(place)
        try:
            place.session = place.session or self._session()
            check_length(len(job.prompt), self._model.ctx)
            self._copy_from_another(place, job)
            held = cached = place.session.recall(job.prompt)
            while len(self._answers) and (end := self._slice_end(held)) < len(job.prompt):
                with self._interruptible(job, held):
                    place.session.sync(job.prompt[:end])
                held = end
                self.totals.prompt_seconds += perf_counter() - began
                yield
                began = perf_counter()
            request = Request(place.session, job.prompt, job.sampler, job.max_tokens, job.stop)
            with self._interruptible(job, held):
                for _, piece in self._answers.begin(number, request):
                    if not begun and isinstance(piece, Piece) and piece.finish_reason != "interrupt":
                        begun = True
                        self._begun(job, cached)
                        self.totals.prompt_seconds += perf_counter() - began
                    self._tell(place, piece)
        except KeyboardInterrupt:
            if not job.cancelled:
                raise
        except Exception as error:
            self._give_up(number)
            self._tell(place, error)

    def _slice_end(self, held: int) -> int:
        """The end of the slice of a prompt that begins after `held` tokens. If experts are read from the file, each slice may
        read nearly all of them, so a slice is as long as the engine's batch.
        """
        engine = self._model.engine
        return engine.batch_of(held).stop if engine.fetches else held + SLICE

    def _begun(self, job: Job, cached: int) -> None:
        self.totals.prompt_tokens += len(job.prompt)
        self.totals.cached_tokens += cached
        self._emit(job, Begun(len(job.prompt), cached))

    @contextmanager
    def _interruptible(self, job: Job, held: int):
        """A context in which `cancel` ends the engine's call with a KeyboardInterrupt."""

        def follow(done: int, total: int) -> None:
            if job.cancelled or self._closed:  # cancelled before the engine began, which clears earlier interrupts
                raise KeyboardInterrupt
            job.evaluated = held + done

        with self._changed:
            self._reading = job
        self._model.engine.follow_progress = follow
        try:
            yield
        finally:
            self._model.engine.follow_progress = None
            with self._changed:
                self._reading = None

    def _place_for(self, prompt: Sequence[int]) -> _Place:
        """The free place whose session this prompt continues; else the one unused for longest.

        A prompt continues a session if it shares most of its tokens, and if fewer tokens are lost than in the other place.
        """
        free = [place for place in self._places if place.job is None]
        oldest = min(free, key=lambda place: place.used)
        shared, place = max(((_common(place.ids, prompt), place) for place in free), key=lambda found: found[0])
        rest = len(place.ids) - shared
        if rest and not (rest <= shared and rest <= len(oldest.ids)):
            place = oldest
        self._turn += 1
        place.used = self._turn
        return place

    def _copy_from_another(self, place: _Place, job: Job) -> None:
        """Copy the tokens that another place shares with the prompt to this place, if that is worth a copy."""
        own = _common(place.ids, job.prompt)
        shared = [(_common(other.ids, job.prompt), i) for i, other in enumerate(self._places)]
        most, source = max(shared)
        if most >= own + WORTH_COPYING:
            self._answers.settle()
            place.session = self._session()  # frees the memory first
            with self._interruptible(job, 0):
                place.session = self._places[source].session.fork()
            place.session.snapshots = self._snapshots

    def _session(self) -> Session:
        return self._model.session(snapshots=self._snapshots)

    def _tell(self, place: _Place, event: Piece | Exception) -> None:
        job = place.job
        if job is None or (isinstance(event, Piece) and event.finish_reason == "interrupt"):
            return  # the KeyboardInterrupt follows
        if isinstance(event, Exception):
            self.totals.failed += 1
            place.job = None
            event = self._told(event)
        else:
            self.totals.completion_tokens += event.id is not None
            if event.finish_reason:
                self.totals.finished += 1
                place.job = None
        self._emit(job, event)
        if isinstance(event, Broken):
            place.session = None  # its contents are unknown

    def _emit(self, job: Job, event: Begun | Piece | Exception) -> None:
        if job.cancelled:
            return
        try:
            job.emit(event)
        except Exception as error:  # the event loop has ended
            self._tell_server(error)
            job.cancelled = True

    def _told(self, error: Exception) -> LlamacliError:
        """The error that a job receives for an exception; an unexpected one is reported."""
        if isinstance(error, LlamacliError):
            return error
        self._tell_server(error)
        return Broken("an unexpected error; the server's stderr says which")

    def _tell_server(self, error: Exception) -> None:
        with suppress(Exception):  # a failing report must not end the thread
            self._report(error)

    def _give_up(self, number: int) -> None:
        """End a place's answer, if it has begun."""
        try:
            self._answers.end(number)
        except Exception as error:
            self._tell_server(error)
            self._places[number].session = None

    def _fail(self, error: Exception) -> None:
        """End all jobs that have begun, and the one being evaluated."""
        error, jobs = self._told(error), [place.job for place in self._places]
        if self._prompt and self._prompt[0] not in jobs:
            self._emit(self._prompt[0], error)
        self._prompt = None
        self._answers.abandon()
        for number, place in enumerate(self._places):
            self._give_up(number)
            if place.job:
                self._tell(place, error)


def _common(ids: Sequence, others: Sequence) -> int:
    """How many tokens two sequences share from their start."""
    return next(compress(count(), map(ne, ids, others)), min(len(ids), len(others)))
