"""Several answers at once on nodes: each has the text that it has alone, also when a node is lost or another call fails."""

import sys
import threading
from contextlib import suppress

import pytest
from row_of_nodes import IDS, interrupting

from llamacli.session import Session
from llamacli.text.sampler import Sampler
from llamacli.text.tokenizer import Tokenizer
from llamacli.together import Request, answer_together


class Together:
    """Five answers, four at a time, in two groups."""

    def __init__(self, engine, nodes, width=4):
        self.tokenizer = Tokenizer.from_gguf(nodes.gguf)
        self._engine, self._width = engine, width
        beginnings = ("Once upon a time", "A young horse is", "The river goes to", "In the morning the", "She said that")
        self._asked = [
            Request(Session(engine, self.tokenizer, 512), self.tokenizer.encode(text), Sampler(temp=0), 20 + 3 * k)
            for k, text in enumerate(beginnings)
        ]

    def texts(self, hurt=lambda n: None):
        """All answers; `hurt` is called after each piece."""
        texts = [""] * len(self._asked)
        for n, (number, piece) in enumerate(answer_together(self._asked, self._width)):
            assert not isinstance(piece, Exception), piece
            texts[number] += piece.text
            hurt(n)
        return texts


def test_answers_together_go_through_the_nodes_in_groups_and_have_the_text_of_one_at_a_time(nodes):
    alone = Together(nodes.one, nodes, width=1).texts()
    assert len("".join(alone)) > 200
    under_way = []
    many = Together(nodes.engine, nodes)
    assert many.texts(lambda n: under_way.append(len(nodes.engine.stages[0]._under_way))) == alone
    assert nodes.engine.depth == 2 and max(under_way) == 1  # one group is read while another is on the nodes


@pytest.mark.parametrize("which", [-2, -1], ids=["first", "last"])
def test_a_loss_while_several_answer(nodes, which):
    alone = Together(nodes.one, nodes, width=1).texts()
    assert Together(nodes.engine, nodes).texts(lambda n: n == 30 and nodes.made[which].close()) == alone


def test_another_call_that_fails_disturbs_no_answer(nodes):
    alone, other = Together(nodes.one, nodes, width=1).texts(), nodes.new_caches()[0]

    def fail(n):
        if n % 7 == 0:
            with interrupting(nodes.engine, 0.002), suppress(KeyboardInterrupt):
                while True:
                    nodes.engine.forward(IDS[:100], other)
                    other.truncate(0)

    assert Together(nodes.engine, nodes).texts(fail) == alone


def test_a_thread_goes_back_in_its_sequence_while_another_evaluates(nodes):
    other = nodes.new_caches()[0]
    nodes.engine.forward(IDS[:50], other)
    end = threading.Event()

    def evaluate():
        while not end.is_set():
            nodes.engine.forward([1], nodes.caches[0])

    thread, every = threading.Thread(target=evaluate), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads change in the middle of everything
    thread.start()
    try:
        for _ in range(60000):
            assert other.truncate(50) == 50
    finally:
        sys.setswitchinterval(every)
        end.set()
        thread.join()


def test_keys_and_values_of_forgotten_sequences_are_released(nodes):
    assert nodes.same(IDS[:50])
    before = nodes.caches[0].nbytes
    nodes.caches = nodes.new_caches()
    assert nodes.same(IDS[:50])
    assert nodes.same(IDS[:1])
    assert nodes.caches[0].nbytes <= before
