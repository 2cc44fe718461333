"""The decode loop and the reuse of a conversation's beginning, over an engine whose logits show when the cache is wrong."""

import numpy as np
import pytest
from fakes import BOS, EOT, HEADER, FakeEngine, FakeTokenizer, Greedy, Scripted

from llamacli.errors import ContextFullError, PromptError, UsageError
from llamacli.session import Session, StopStrings
from llamacli.text.sampler import Sampler


def session(engine=None, ctx=256):
    return Session(engine or FakeEngine(), FakeTokenizer(), ctx)


def say(session, prompt, **how):
    return "".join(piece.text for piece in session.stream(prompt, Greedy(), **how))


def pieces(reply, max_tokens=None, stop=(), ctx=256):
    return list(session(Scripted(reply), ctx).stream([BOS, 1, HEADER], Greedy(), max_tokens, stop))


# sync and eval


@pytest.mark.parametrize("first, second", [(5, 9), (20, 20), (20, 3), (7, 8), (30, 17), (40, 9)])
@pytest.mark.parametrize("common", [0, 1, 4, 8, 15, 16, 29])
def test_sync_after_another_prompt_equals_a_fresh_start(first, second, common):
    shared = list(range(common))
    old, new = shared + [100] * first, shared + [101] * second
    used = session()
    used.sync(old)
    assert np.array_equal(used.sync(new), session().sync(new))
    assert used.ids == new


def test_sync_evaluates_only_what_is_new():
    s = session(FakeEngine(chunk=64))
    s.sync([1, 2, 3, 4])
    s.sync([1, 2, 3, 4, 5, 6])
    s.sync([1, 2, 9])
    assert s.engine.calls == [(0, [1, 2, 3, 4]), (4, [5, 6]), (2, [9])]


def test_going_back_into_an_older_chunk_evaluates_it_from_its_start_and_nothing_before():
    s = session(FakeEngine(chunk=8))
    s.sync(list(range(30)))
    s.sync([*range(19), 99])
    s.sync([*range(16), 99])
    assert s.engine.calls[1:] == [(16, [16, 17, 18, 99]), (16, [99])]


def test_sync_of_the_same_prompt_has_its_logits_already_until_something_came_since():
    s = session(FakeEngine(chunk=64))
    first = s.sync([1, 2, 3]).copy()
    assert np.array_equal(s.sync([1, 2, 3]), first)
    assert len(s.engine.calls) == 1
    s.eval([4])
    assert np.array_equal(s.sync([1, 2, 3]), first)
    assert s.engine.calls[2] == (2, [3])
    assert not np.array_equal(s.sync([1, 2, 3, 4]), first)


def test_eval_continues_where_the_session_stands():
    s = session()
    s.eval([1, 2, 3])
    assert np.array_equal(s.eval([4, 5]), session().sync([1, 2, 3, 4, 5]))


def test_a_prompt_longer_than_the_context_is_an_error_with_advice():
    with pytest.raises(ContextFullError, match=r"300 tokens.*256.*-c 1024"):
        session().sync([1] * 300)


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(PromptError):
        session().sync([])
    with pytest.raises(PromptError):
        session().eval([])


# stream


def test_an_answer_ends_at_a_stop_token_which_is_not_shown():
    answer = pieces("hello")
    assert "".join(p.text for p in answer) == "hello"
    assert [p.finish_reason for p in answer] == [None] * 5 + ["stop"]
    assert [p.id for p in answer] == [*b"hello", None]


def test_max_tokens_ends_it_as_length_without_a_needless_evaluation():
    s = session(Scripted("hello"))
    answer = list(s.stream([BOS, HEADER], Greedy(), 3))
    assert "".join(p.text for p in answer) == "hel"
    assert answer[-1].finish_reason == "length"
    assert len(s.engine.calls) == 3  # the prompt, "h", "e"
    assert s.stats.completion_tokens == 3


@pytest.mark.parametrize("n", [0, -1])
def test_fewer_than_one_token_is_refused_not_taken_as_no_limit(n):
    with pytest.raises(UsageError):
        pieces("hello", max_tokens=n)


def test_one_stop_string_need_not_be_a_list():
    assert "".join(p.text for p in pieces("hello world", stop="wo")) == "hello "


def test_a_full_context_ends_it_with_a_reason_and_no_error():
    answer = pieces("hello", ctx=5)
    assert "".join(p.text for p in answer) == "hel"
    assert answer[-1].finish_reason == "context"


@pytest.mark.parametrize("stop, shown", [("lo", "hel"), ("l", "he"), ("hello", ""), ("xyz", "hello world"), (" w", "hello")])
def test_a_stop_string_over_several_tokens_is_never_shown(stop, shown):
    answer = pieces("hello world", stop=[stop])
    assert "".join(p.text for p in answer) == shown
    assert answer[-1].finish_reason == "stop"


def test_the_earliest_of_several_stop_strings_counts_and_their_beginnings_are_held_back():
    watch = StopStrings(["END", "STOP"])
    assert [watch.push(c) for c in "aSTb"] == [("a", False), ("", False), ("", False), ("STb", False)]
    assert watch.push("xENDSTOP") == ("x", True)
    assert watch.flush() == ""


def test_held_back_text_comes_out_at_the_end():
    assert "".join(p.text for p in pieces("abEN", stop=["END"])) == "abEN"


def test_characters_of_several_tokens_come_whole():
    texts = [p.text for p in pieces("aé🙂")]
    assert [t for t in texts if t] == ["a", "é", "🙂"]


class Dictated:
    """A constraint that forces a text, with a choice where the text has a star."""

    def __init__(self, text):
        self.text = text.encode()

    def begin(self, begun):
        self.left = list(self.text[len(begun) :])

    def mask(self, logits):
        assert self.left[0] == ord("*")
        logits[:] = np.where(np.isin(np.arange(len(logits)), [ord("x"), ord("y")]), logits, -np.inf)

    def accept(self, id):
        self.left.pop(0)

    def forced(self):
        end = self.left.index(ord("*")) if ord("*") in self.left else len(self.left)
        found, self.left = self.left[:end], self.left[end:]
        return found

    @property
    def over(self):
        return not self.left


def bound(text, max_tokens=None, ctx=256, begun=b""):
    s = session(Scripted("....x.....y"), ctx)
    prompt = [BOS, HEADER, *begun]
    return s, list(s.stream(prompt, Sampler(temp=0, constraint=Dictated(text)), max_tokens, begun=begun))


def test_tokens_that_are_forced_are_evaluated_together():
    s, answer = bound("ab: *, c: *.")
    assert "".join(p.text for p in answer) == "ab: x, c: y."
    assert answer[-1].finish_reason == "stop"
    assert [p.id for p in answer] == [*b"ab: x, c: y.", None]
    assert s.engine.calls == [(0, [BOS, HEADER]), (2, list(b"ab: ")), (6, list(b"x, c: "))]  # not "y.", which ends it
    assert (s.stats.completion_tokens, s.stats.decoded) == (12, 10)


def test_limits_end_an_answer_among_forced_tokens_too():
    s, answer = bound("abcdef*", max_tokens=3)
    assert ("".join(p.text for p in answer), answer[-1].finish_reason) == ("abc", "length")
    s, answer = bound("abcdef*", ctx=5)
    assert ("".join(p.text for p in answer), answer[-1].finish_reason) == ("abcd", "context")
    assert len(s.ids) <= 5


def test_an_answer_goes_on_where_it_was_cut():
    assert "".join(p.text for p in bound("ab: *, c: *.", begun=b"ab: ")[1]) == "x, c: y."


def test_the_last_token_of_a_whole_answer_is_no_cut():
    assert bound("ab", max_tokens=2)[1][-1].finish_reason == "stop"


def test_a_log_probability_is_of_what_was_chosen_only():
    s = session(Scripted("....x.....y"))
    answer = list(s.stream([BOS, HEADER], Sampler(temp=0, constraint=Dictated("ab*c"), logprobs=0)))
    assert [p.logprobs is not None for p in answer] == [False, False, True, False, False]


def test_a_constraint_takes_no_stop_strings():
    with pytest.raises(UsageError, match="stop"):
        list(session().stream([1], Sampler(constraint=Dictated("a")), stop=["x"]))


def test_a_second_answer_reuses_the_first_conversation():
    s = session(Scripted("ok", chunk=64))
    assert say(s, [BOS, 1, 2, HEADER]) == "ok"
    assert say(s, [BOS, 1, 2, HEADER, *b"ok", EOT, 5, HEADER]) == "ok"
    assert s.engine.calls[-3] == (6, [EOT, 5, HEADER])
    assert s.stats.cached_tokens == 6
    assert s.stats.prompt_tokens == 9


# interrupts


@pytest.mark.parametrize("written", [0, 1, 5, 12])
@pytest.mark.parametrize("held", [3, 6, 7, 8, 13, 15, 16])
def test_an_interrupt_inside_the_engine_leaves_the_session_usable(written, held):
    s = session()
    s.eval(list(range(held)))
    s.engine.break_after = written
    with pytest.raises(KeyboardInterrupt):
        s.eval([50] * 13)
    assert s.ids == list(range(held))
    assert np.array_equal(s.eval([60]), session().sync([*range(held), 60]))


def test_an_interrupted_answer_first_yields_the_held_back_text():
    s = session(Scripted("abEND", chunk=64))
    answer, texts = s.stream([BOS, 1, HEADER], Greedy(), None, ["ENDING"]), []
    with pytest.raises(KeyboardInterrupt):
        for piece in answer:
            texts.append(piece.text)
            if len(texts) == 4:
                s.engine.break_after = 0
    assert "".join(texts) == "abEN"
    assert piece.finish_reason == "interrupt"
    assert say(s, [BOS, 1, HEADER]) == "abEND"


def test_stats_count_tokens_and_time():
    s = session(Scripted("hello", delay=0.002))
    say(s, [BOS, 1, HEADER])
    assert (s.stats.prompt_tokens, s.stats.completion_tokens, s.stats.decoded) == (3, 5, 5)
    assert 0 < s.stats.prefill_tps < 500
    assert 0 < s.stats.decode_tps < 500
