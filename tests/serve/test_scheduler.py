"""The scheduler: turns of clients, prompts in slices, sessions that are continued or copied, cancelled jobs."""

import queue
import threading
from itertools import pairwise

import numpy as np
import pytest
from fakes import BOS, HEADER, FakeEngine, FakeModel, FakeTokenizer, Greedy, Scripted
from serving import until

from llamacli.errors import LlamacliError, MemoryLimitError
from llamacli.serve.scheduler import SLICE, Begun, Broken, Busy, Job, Scheduler, Stopping
from llamacli.session import Session


class Gated(FakeEngine):
    """Waits before each call until the test releases it."""

    def __init__(self, **how):
        super().__init__(**how)
        self.gate, self.reached = threading.Semaphore(0), threading.Semaphore(0)

    def forward(self, ids, cache, **more):
        self.reached.release()
        self.gate.acquire()
        return super().forward(ids, cache, **more)


@pytest.fixture
def make():
    """Makes a scheduler over an engine; all end with the test."""
    made = []

    def scheduler(engine=None, **how):
        made.append(Scheduler(FakeModel(engine or FakeEngine(), ctx=2048), **how))
        return made[-1]

    yield scheduler
    for each in made:
        gate = getattr(each._model.engine, "gate", None)
        if gate is not None:
            gate.release(10**4)
        each.close()


class Asked(Job):
    """A job whose events a test reads."""

    def __init__(self, prompt, client="a", max_tokens=5, **more):
        self.events = queue.Queue()
        super().__init__(client, prompt, Greedy(), self.events.put, max_tokens, **more)

    def all(self):
        """All events, to the last."""
        found = [self.events.get(timeout=300)]
        while not (isinstance(found[-1], Exception) or getattr(found[-1], "finish_reason", None)):
            found.append(self.events.get(timeout=300))
        return found

    def text(self):
        return "".join(piece.text for piece in self.all()[1:])


def prompt(n, seed=0):
    return [BOS, *np.random.default_rng(seed).integers(0, 256, n).tolist(), HEADER]


def alone(ids, n=5, chunk=8):
    return "".join(piece.text for piece in Session(FakeEngine(chunk), FakeTokenizer(), 2048).stream(ids, Greedy(), n))


def test_answers_at_once_are_those_given_alone(make):
    scheduler = make(places=3)
    jobs = [Asked(prompt(10 + 7 * i, i), max_tokens=20) for i in range(9)]
    scheduler.submit(jobs)
    assert [job.text() for job in jobs] == [alone(job.prompt, 20) for job in jobs]
    assert max(scheduler._model.engine.widths) == 3
    assert scheduler.totals.completion_tokens == 9 * 20 and scheduler.totals.finished == 9


def test_a_long_prompt_is_read_in_slices_while_another_answers(make):
    engine = Gated()
    scheduler = make(engine)
    first, long = Asked(prompt(5, 1), max_tokens=60), Asked(prompt(3 * SLICE + 50, 2))
    engine.gate.release(3)  # the first prompt, and two tokens
    scheduler.submit([first])
    until(lambda: first.events.qsize() >= 3)
    scheduler.submit([long])
    engine.gate.release(10**4)
    assert (first.text(), long.text()) == (alone(first.prompt, 60), alone(long.prompt))
    sizes = [len(ids) for _, ids in engine.calls]
    assert sizes.count(SLICE) == 3 and max(sizes) == SLICE
    at = [i for i, size in enumerate(sizes) if size == SLICE]
    assert all(1 in sizes[i:j] for i, j in pairwise(at)), "no token between two slices"


def test_a_long_prompt_alone_is_read_at_once(make):
    scheduler = make()
    job = Asked(prompt(3 * SLICE))
    scheduler.submit([job])
    job.all()
    assert len(scheduler._model.engine.calls[0][1]) == 3 * SLICE + 2


def test_the_second_turn_costs_its_new_tokens_only(make):
    scheduler = make()
    first = Asked(prompt(300))
    scheduler.submit([first])
    said = [piece.id for piece in first.all()[1:] if piece.id is not None]
    turn = Asked([*first.prompt, *said, *prompt(10, 3)])
    scheduler.submit([turn])
    begun = turn.all()[0]
    assert begun == Begun(len(turn.prompt), len(first.prompt) + len(said) - 1)  # the last token said was never evaluated


def test_conversations_side_by_side_keep_their_sessions(make):
    scheduler = make(places=2)
    held = {seed: prompt(100, seed) for seed in (1, 2)}
    for turn in range(4):
        for seed, ids in held.items():
            job = Asked(ids)
            scheduler.submit([job])
            begun, *pieces = job.all()
            assert turn == 0 or begun.cached_tokens > len(ids) - 8
            held[seed] = ids + [piece.id for piece in pieces if piece.id is not None] + [65, 66]


def test_what_conversations_begin_with_is_copied(make):
    scheduler = make(FakeEngine(chunk=4096), places=3)
    system = prompt(200, 1)
    jobs = [Asked(system + prompt(100, seed)) for seed in (2, 3, 4)]
    for job in jobs:
        scheduler.submit([job])
        begun, *pieces = job.all()
        assert "".join(piece.text for piece in pieces) == alone(job.prompt, chunk=4096)
        assert (begun.cached_tokens >= len(system)) == (job is not jobs[0])
    again = Asked([*jobs[0].prompt, 65])
    scheduler.submit([again])
    assert again.all()[0].cached_tokens >= len(jobs[0].prompt)  # the first one was left as it was


def test_clients_take_turns(make):
    engine = Gated()
    scheduler, order = make(engine, places=1), []

    def asked(client, i):
        job = Asked(prompt(5, i), client, max_tokens=1)
        job.emit = lambda event: order.append(client) if isinstance(event, Begun) else job.events.put(event)
        return job

    jobs = [asked("a", i) for i in range(4)]
    scheduler.submit(jobs)
    engine.reached.acquire()  # the first has begun
    jobs += [asked("b", 10), asked("c", 11)]
    scheduler.submit(jobs[4:])
    engine.gate.release(10**4)
    for job in jobs:
        job.all()
    assert "".join(order) == "aabcaa"


def test_a_full_queue_refuses_and_takes_nothing_of_a_request(make):
    engine = Gated()
    scheduler = make(engine, places=1, most_waiting=2)
    running = Asked(prompt(5))
    scheduler.submit([running])
    engine.reached.acquire()
    scheduler.submit([Asked(prompt(5, 1))])
    with pytest.raises(Busy, match="queue is full"):
        scheduler.submit([Asked(prompt(5, 2)), Asked(prompt(5, 3))])
    assert scheduler.waiting == 1
    scheduler.submit([Asked(prompt(5, 4))])


@pytest.mark.parametrize("when", ["waiting", "its prompt is read", "it answers"])
def test_a_cancelled_job_leaves_its_place_at_once(make, when):
    engine = Gated()
    scheduler = make(engine, places=1)
    job, other = Asked(prompt(400), max_tokens=1000), Asked(prompt(9, 5))
    before = Asked(prompt(5, 6), max_tokens=1)
    if when == "waiting":
        scheduler.submit([before])
        engine.reached.acquire()
    scheduler.submit([job])
    if when != "waiting":
        engine.reached.acquire()
    if when == "it answers":
        engine.gate.release(3)
        until(lambda: job.events.qsize() >= 3)
    scheduler.cancel(job)
    scheduler.cancel(job)  # once more does no harm
    scheduler.submit([other])
    engine.gate.release(10**4)
    assert other.text() == alone(other.prompt)
    assert scheduler.totals.cancelled == 1 and scheduler.active == scheduler.waiting == 0
    evaluated = sum(len(ids) for _, ids in engine.calls if len(ids) == 402)
    assert job.events.qsize() <= 5 and (evaluated == 0) == (when == "waiting")


def test_a_prompt_is_interrupted_where_it_is():
    engine = FakeEngine(delay=0.005)
    scheduler = Scheduler(FakeModel(engine, ctx=4096))
    job = Asked(prompt(4000))
    scheduler.submit([job])
    until(lambda: job.evaluated > 20)
    scheduler.cancel(job)
    until(lambda: not scheduler.active)
    assert job.evaluated < 3000 and job.events.empty()
    other = Asked(prompt(30, 2))
    scheduler.submit([other])
    assert other.text() == alone(other.prompt)
    scheduler.close()


def test_an_error_ends_its_own_job_alone(make):
    scheduler = make()
    fine, wrong = Asked(prompt(10), max_tokens=30), Asked([1] * 3000)
    scheduler.submit([fine, wrong])
    assert "3000 tokens" in str(wrong.all()[0])
    assert fine.text() == alone(fine.prompt, 30)


class Faulty(FakeEngine):
    """Raises when it evaluates the token POISON in any call; `more`: further calls that fail."""

    def __init__(self, wrong=lambda ids: POISON in ids, **how):
        super().__init__(**how)
        self.wrong = wrong

    def forward(self, ids, cache, **more):
        if self.wrong(ids):
            raise ValueError("broken")
        return super().forward(ids, cache, **more)


POISON = 260  # an id that the miniature never answers
FAULTS = {
    "its prompt is read": lambda job: job.prompt.insert(7, POISON),
    "a slice of its prompt is read": lambda job: job.prompt.insert(SLICE + 7, POISON),
    "its token is evaluated": lambda job: setattr(job.sampler, "says", POISON),
    "its token is chosen": lambda job: setattr(job.sampler, "says", None),
    "its text is made": lambda job: setattr(job.sampler, "says", "no id"),
    "it begins": lambda job: setattr(job.sampler, "begin", None),
    "its start is told": lambda job: setattr(job, "emit", lambda event: 1 / 0),
    "its text is told": lambda job: setattr(job, "emit", lambda event: isinstance(event, Begun) or 1 / 0),
}


class Unsound:
    """A sampler that picks a different id after three tokens, or raises."""

    def __init__(self):
        self._sampler, self._left = Greedy(), 3

    def __getattr__(self, name):
        return getattr(self._sampler, name)

    def next_ids(self, logits, history):
        self._left -= 1
        if self._left or not hasattr(self, "says"):
            return self._sampler.next_ids(logits, history)
        if self.says is None:
            raise ValueError("broken")
        return [self.says]


@pytest.mark.parametrize("where", FAULTS)
@pytest.mark.parametrize("at_once", [1, 3])
def test_an_unexpected_error_ends_only_its_own_answer(make, where, at_once):
    reports = []
    scheduler = make(Faulty(), places=4, report=reports.append)
    others = [Asked(prompt(10, i), max_tokens=40) for i in range(at_once)]
    scheduler.submit(others)
    for other in others:
        assert isinstance(other.events.get(timeout=300), Begun)
    wrong = Asked(prompt(SLICE + 30, 9), max_tokens=50)
    wrong.sampler = Unsound()
    FAULTS[where](wrong)
    scheduler.submit([wrong])
    if "told" not in where:  # a job whose `emit` raised gets no further events
        assert isinstance(wrong.all()[-1], Broken)
    for other in others:
        assert "".join(piece.text for piece in other.all()) == alone(other.prompt, 40)
    until(lambda: not scheduler.active)
    assert reports and not any(isinstance(error, LlamacliError) for error in reports)
    again = Asked(prompt(SLICE + 30, 9))
    scheduler.submit([again])
    assert again.text() == alone(again.prompt)


def test_an_error_of_all_answers_together_ends_none_that_goes_on_alone(make):
    class Alone(FakeEngine):
        def forward_each(self, ids, caches):
            if len(ids) > 1:
                super().forward_each(ids[:1], caches[:1])  # one is finished when the call fails
                raise OSError(5, "Input/output error")
            return super().forward_each(ids, caches)

    scheduler = make(Alone())
    jobs = [Asked(prompt(10, i), max_tokens=50) for i in range(3)]
    scheduler.submit(jobs)
    assert [job.text() for job in jobs] == [alone(job.prompt, 50) for job in jobs]


def test_an_engine_that_fails_always_ends_each_answer_and_takes_the_next(make):
    engine = Faulty(wrong=lambda ids: len(ids) == 1)
    scheduler = make(engine)
    jobs = [Asked(prompt(10, i)) for i in range(6)]
    scheduler.submit(jobs)
    assert all(isinstance(job.all()[-1], Broken) for job in jobs)
    engine.wrong = lambda ids: False
    scheduler.submit([last := Asked(prompt(10))])
    assert last.text() == alone(last.prompt)


def test_if_no_session_can_be_made_each_job_gets_an_error(make):
    scheduler = make(Faulty(), places=1)
    session, scheduler._model.session = scheduler._model.session, lambda **how: 1 / 0
    jobs = [Asked([BOS, POISON, HEADER]), *(Asked(prompt(9, i)) for i in range(3))]
    scheduler.submit(jobs)
    assert all(isinstance(job.all()[-1], Broken) for job in jobs)
    scheduler._model.session = session
    scheduler.submit([last := Asked(prompt(10))])
    assert last.text() == alone(last.prompt)


def test_a_session_that_cannot_be_made_anew_ends_the_answer_that_needs_it_alone(make):
    scheduler = make(Faulty(), places=3)
    going = [Asked(prompt(10, i), max_tokens=400) for i in range(2)]
    scheduler.submit(going)
    for job in going:
        assert isinstance(job.events.get(timeout=300), Begun)
    scheduler.submit([lost := Asked([BOS, POISON, HEADER])])
    assert isinstance(lost.all()[-1], Broken)  # with it the session of its place

    def refuse(**how):
        raise MemoryLimitError("no room")

    session, scheduler._model.session = scheduler._model.session, refuse
    scheduler.submit([wrong := Asked(prompt(9, 7))])
    assert isinstance(wrong.all()[-1], MemoryLimitError)
    scheduler._model.session = session
    scheduler.submit([again := Asked(prompt(9, 7))])
    assert again.text() == alone(again.prompt)
    assert ["".join(piece.text for piece in job.all()) for job in going] == [alone(job.prompt, 400) for job in going]


def test_an_error_while_a_cancelled_answer_is_given_up_ends_no_other(make):
    reports, engine = [], FakeEngine(delay=0.001)
    scheduler = make(engine, report=reports.append)
    other, left = Asked(prompt(10), max_tokens=300), Asked(prompt(10, 1), max_tokens=1000)
    scheduler.submit([other, left])
    until(lambda: left.events.qsize() > 3)
    engine.take_io_stats = lambda: 1 / 0
    scheduler.cancel(left)
    until(lambda: reports)
    del engine.take_io_stats
    assert other.text() == alone(other.prompt, 300)
    assert isinstance(reports[0], ZeroDivisionError)


def test_an_error_that_cannot_be_reported_ends_only_what_it_concerns(make):
    scheduler = make(Faulty(), report=lambda error: 1 / 0)
    other, wrong = Asked(prompt(10), max_tokens=40), Asked([BOS, POISON, HEADER])
    scheduler.submit([other, wrong])
    assert isinstance(wrong.all()[-1], Broken)
    assert other.text() == alone(other.prompt, 40)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_if_the_engines_thread_ends_each_job_gets_an_error(make):
    class Ended(BaseException):
        pass

    def end(event):
        if isinstance(event, Begun):
            raise Ended

    scheduler, first, others = make(places=1), Asked(prompt(5)), [Asked(prompt(9, i)) for i in range(3)]
    first.emit = end
    scheduler.submit([first, *others])
    assert all(isinstance(job.all()[-1], Stopping) for job in others)
    assert not scheduler.works
    with pytest.raises(Stopping):
        scheduler.submit([Asked(prompt(5))])


class Fetching(FakeEngine):
    """Experts are read from the file for every call; a prompt's batches end at multiples of 1000."""

    fetches = True

    def batch_of(self, pos):
        return range(pos // 1000 * 1000, (pos // 1000 + 1) * 1000)


def test_where_experts_are_read_from_the_file_a_slice_is_as_long_as_a_batch(make):
    class GatedFetching(Fetching, Gated):
        pass

    engine = GatedFetching()
    scheduler = make(engine)
    first, long = Asked(prompt(5, 1), max_tokens=60), Asked(prompt(1800, 2))
    engine.gate.release(3)
    scheduler.submit([first])
    until(lambda: first.events.qsize() >= 3)
    scheduler.submit([long])
    engine.gate.release(10**4)
    assert (first.text(), long.text()) == (alone(first.prompt, 60), alone(long.prompt))
    assert [len(ids) for _, ids in engine.calls if len(ids) > 7] == [1000, 802]


def test_a_client_that_leaves_in_a_long_slice_ends_it():
    engine = Fetching(delay=0.005)
    scheduler = Scheduler(FakeModel(engine, ctx=4096))
    first, long = Asked(prompt(5, 1), max_tokens=4000), Asked(prompt(1800, 2))
    scheduler.submit([first])
    assert isinstance(first.events.get(timeout=300), Begun)
    scheduler.submit([long])
    until(lambda: long.evaluated > 20)
    assert scheduler._places[1].session.cache.pos == 0  # in the first slice
    scheduler.cancel(long)
    until(lambda: scheduler.active == 1)
    assert long.evaluated < 900
    before = first.events.qsize()
    until(lambda: first.events.qsize() > before)
    scheduler.close()


def test_the_end_of_the_server_ends_all_jobs(make):
    engine = Gated()
    scheduler = make(engine, places=1)
    jobs = [Asked(prompt(5, i)) for i in range(3)]
    scheduler.submit(jobs)
    engine.reached.acquire()
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    until(lambda: scheduler._closed)
    engine.gate.release(10**4)
    closing.join(300)
    assert all(isinstance(job.all()[-1], Stopping) for job in jobs)
    with pytest.raises(Stopping):
        scheduler.submit([Asked(prompt(5))])


def test_the_job_of_a_scripted_answer_ends_by_its_stop_string(make):
    scheduler = make(Scripted("first\nsecond", chunk=64))
    job = Asked(prompt(5), max_tokens=None, stop=["\n"])
    scheduler.submit([job])
    assert job.text() == "first"
