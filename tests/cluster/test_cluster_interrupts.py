"""Calls on nodes that are interrupted at any line: what comes next has the bytes of one process, also after a loss."""

import sys
import time

import numpy as np
import pytest
from row_of_nodes import IDS, Nodes, interrupting

from llamacli.cluster import cache as cluster_cache
from llamacli.cluster import stage
from llamacli.errors import DeviceError
from llamacli.session import Session


def test_an_interrupt_leaves_the_cache_where_whole_batches_ended(nodes):
    assert nodes.same(IDS[:50])
    with interrupting(nodes.engine, 0.03), pytest.raises(KeyboardInterrupt):
        while True:
            nodes.engine.forward(IDS, nodes.caches[0])
            assert nodes.caches[0].truncate(50) == 50
    reached = nodes.caches[0].pos
    assert 50 <= reached < 50 + len(IDS)
    nodes.caches[0].truncate(50)
    assert nodes.same(IDS[:80])


def test_what_nobody_waits_for_any_more_is_not_evaluated_again_after_a_loss(nodes):
    assert nodes.same(IDS[:20]) and nodes.same(IDS[:30])
    nodes.engine.begin_each([IDS[:3]], nodes.caches[:1])  # and an interrupt before the result is asked for
    assert {cache.truncate(20) for cache in nodes.caches} == {20}
    nodes.made[-1].close()
    assert nodes.same(IDS[:9]) and nodes.same([7])


def test_an_interrupt_at_any_line_of_going_back_loses_nothing_that_may_be_needed_after_a_loss(nodes):
    event, begun = 0, True
    while begun:
        event += 1
        session, nodes.caches = Session(nodes.engine, None, 512), nodes.new_caches()
        session.sync(IDS[:20])
        session.eval(IDS[20:50])
        begun = interrupted_at(
            event, ("truncate", "abandon_after", "abandon"), lambda session=session: session.recall(IDS[5:40])
        )
        nodes.made[-1].close()
        expected = nodes.one.forward(IDS[:30], nodes.caches[1])
        assert np.abs(session.sync(IDS[:30]) - expected).max() < 1e-2 * np.abs(expected).max(), event  # in other batches
    assert event > 4


def interrupted_at(event, functions, action):
    """Interrupt `action` at a line of these functions of the stage and its caches; returns whether it reached that line."""
    files, left = {stage.__file__, cluster_cache.__file__}, [event]

    def trace(frame, kind, argument):
        if frame.f_code.co_filename in files and frame.f_code.co_name in functions:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
        return trace if frame.f_code.co_filename in files else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_what_an_interrupt_at_any_line_of_a_result_leaves_is_made_anew_after_a_loss(nodes):
    for event in range(1, 45):  # of the first two parts of a batch
        ours, theirs = nodes.caches = nodes.new_caches()
        assert nodes.same(IDS[:50])
        assert interrupted_at(event, ("_receive", "take"), lambda ours=ours: nodes.engine.forward(IDS[:400], ours))
        if ours.pos > 50:
            nodes.one.forward(IDS[: ours.pos - 50], theirs)
        nodes.made[-1].close()
        assert nodes.same([7]), event


def test_what_an_interrupt_at_any_line_leaves_when_layers_are_opened_anew_is_sound(nodes):
    functions, event, begun = ("_leave_row", "_open", "_send_waiting", "_evaluate_again", "_look_out"), 0, True
    nodes.cuts = ()
    while begun:
        event += 1
        nodes.caches = ours, _ = nodes.new_caches()
        assert nodes.same(IDS[:50])
        nodes.made[-1].close()
        begun = interrupted_at(event, functions, lambda ours=ours: nodes.engine.forward([5], ours))
        if not begun:
            ours.truncate(50)
        assert nodes.same([5]) and nodes.same([6]), event
    assert event > 30


def test_segments_that_a_broken_off_call_wrote_over_are_evaluated_again(in_segments):
    """The nodes have finished the call that fails, so their newest segments belong to tokens that were not accepted."""
    session, cache, sink = Session(in_segments.engine, None, 512), in_segments.one.new_cache(512), in_segments.made[-1]._next
    session.sync(IDS[:40])
    true, sink.send = sink.send, lambda head, arrays=(): true(head | {"error": 7}, ())
    with pytest.raises(DeviceError):
        session.eval(IDS[40:120])
    sink.send = true
    in_segments.one.forward(IDS[:40], cache)
    assert cache.truncate(32) == 32
    assert np.array_equal(session.eval(IDS[40:50]), in_segments.one.forward(IDS[32:50], cache))


@pytest.fixture
def short_chunks():
    found = Nodes(chunk_size=256)
    yield found
    found.close()


def test_an_interrupt_after_a_ring_was_overwritten_goes_back_to_the_start_of_its_chunk(short_chunks):
    nodes, engine = short_chunks, short_chunks.engine
    assert nodes.same(IDS[:200])

    def follow(done, total):
        if done > 56:  # a batch of the next chunk is under way, and none of this one is taken yet
            time.sleep(0.5)
            engine.interrupt()

    engine.follow_progress = follow
    with pytest.raises(KeyboardInterrupt):
        engine.forward(IDS[:200], nodes.caches[0])
    engine.follow_progress = None
    assert nodes.caches[0].pos == 0
    nodes.caches[1].truncate(0)
    assert nodes.same(IDS[:230]) and nodes.same(IDS[:40])
