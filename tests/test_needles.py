"""Facts at the edges of chunks: the engine's answers about them are those of a recomputation of the whole text.

A text of conversations has a fact at each chunk's edge ("My name is Anna."), which is asked for right behind. The fact ends at
the edge, lies across it or begins there; so the chunked layers see all of it, a part or nothing, and the others all of it. The
engine reads the text in batches and says its answers token by token, over its rings. The oracle uses neither batches nor rings.
"""

import json
from dataclasses import replace
from functools import cache
from itertools import chain

import numpy as np
import oracle
import pytest

from llamacli.engine import Engine
from llamacli.environment import SMALL_MODEL
from llamacli.files.gguf import open_gguf
from llamacli.llama4.config import Config
from llamacli.session import Session
from llamacli.text.template import render
from llamacli.text.tokenizer import Tokenizer
from quantize.convert import convert

NAMES = ("Anna", "Ben", "Clara", "David", "Emma")
PLACES = {"before": -1.0, "across": -0.5, "at": 0.0, "after": 0.5}  # where a fact begins, in its lengths from the edge
BOUND = 2e-3  # relative to the largest logit: rounding of float32, which may change that of float16 keys


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """In float16, since quantized activations would be rounded more coarsely."""
    path = tmp_path_factory.mktemp("needles") / "f16.gguf"
    convert(SMALL_MODEL.parent / "hf", path, "F16")
    return path


@cache
def source(path):
    """(file, tokenizer, a function from messages to ids, a text of conversations)."""
    gguf = open_gguf(path)
    tokenizer = Tokenizer.from_gguf(gguf)

    def ids_of(messages):
        return render(tokenizer, messages, gguf.metadata["tokenizer.chat_template"])[1:]

    rows = list(map(json.loads, (SMALL_MODEL.parent / "questions.jsonl").read_text().splitlines()))[::8]
    spoken = (ids_of([*row["messages"], {"role": "assistant", "content": row["accept"][0]}]) for row in rows)
    return gguf, tokenizer, ids_of, list(chain.from_iterable(spoken))


def said(path, chunk, edges, place):
    """(text, positions, logits): all ids; where each token of an answer was chosen, and the engine's logits there."""
    gguf, tokenizer, ids_of, filler = source(path)
    config = Config.from_gguf(gguf)
    config = replace(config, chunk_size=chunk or config.chunk_size)
    chunk = config.chunk_size
    engine = Engine(gguf, config, 2)
    session, positions, logits, recalled = Session(engine, tokenizer, chunk * edges + 200), [], [], 0
    session.eval([tokenizer.bos])
    for edge in range(1, edges + 1):
        name = NAMES[edge % len(NAMES)]
        fact = {"role": "user", "content": f"My name is {name}."}
        start = chunk * edge + int(PLACES[place] * (len(ids_of([fact])) - 3))  # without the header of an answer
        session.eval((filler * (chunk // len(filler) + 1))[: start - len(session.ids)])
        asked = [{"role": "assistant", "content": f"Hello {name}!"}, {"role": "user", "content": "What is my name?"}]
        row, answer = session.eval(ids_of([fact, *asked])), []
        while len(answer) < 16:
            positions.append(len(session.ids) - 1)
            logits.append(row.copy())
            answer.append(int(row.argmax()))
            if answer[-1] in tokenizer.stop_ids:
                break
            row = session.eval(answer[-1:])
        recalled += name in tokenizer.decode(answer)
    ids = list(session.ids)
    engine.close()
    print(f"{place} {edges} edges of {chunk}: {recalled} names recalled")
    return ids, positions, np.array(logits)


def check(path, chunk, edges, place):
    ids, positions, found = said(path, chunk, edges, place)
    assert len(positions) > 3 * edges
    right = oracle.logits_at(path, np.array(ids), positions, np.float16, chunk)
    assert np.median(np.abs(found - right).max(-1)) <= BOUND * np.abs(right).max()
    best = np.sort(right, axis=-1)
    clear = best[:, -1] - best[:, -2] > 2 * BOUND * np.abs(right).max()
    assert clear.mean() > 0.9
    assert np.array_equal(found.argmax(-1)[clear], right.argmax(-1)[clear])


@pytest.mark.parametrize("place", PLACES)
def test_answers_at_edges_are_those_of_a_recomputation(weights, place):
    """With chunks of 128 instead of the file's 8192, within the lengths that the model learned."""
    check(weights, 128, 3, place)


def test_a_wrong_edge_is_noticed(weights):
    ids, positions, found = said(weights, 128, 2, "across")
    other = oracle.logits_at(weights, np.array(ids), positions, np.float16, 129)
    assert np.median(np.abs(found - other).max(-1)) > 5 * BOUND * np.abs(other).max()


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_answers_at_edges_of_the_models_own_chunks_are_those_of_a_recomputation(weights, place):
    check(weights, None, 3, place)
