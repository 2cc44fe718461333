"""The small model: the questions held out of its training, its tokenizer, its sizes. Needs no torch."""

import itertools
import json
from pathlib import Path

import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

from llamacli import Model
from llamacli.environment import SMALL_MODEL

HERE = Path(__file__).parents[1] / "models" / "scout-tiny"
COMBINED = {"remembering", "follow-up questions"}  # held out as whole exchanges, not as texts


@pytest.fixture
def data(monkeypatch):
    """models/scout-tiny/data.py, which is a script beside its tables and not a package."""
    monkeypatch.syspath_prepend(str(HERE))
    import data

    return data


def test_the_question_file_is_what_the_script_makes(data):
    rows = [json.loads(line) for line in (HERE / "questions.jsonl").read_text().splitlines()]
    assert len(rows) == 200
    assert rows == [{"id": i, **row} for i, row in enumerate(data.held_questions())]


def test_no_held_out_question_occurs_in_training(data):
    held = {data.normal(row["messages"][-1]["content"]) for row in data.held_questions() if row["category"] not in COMBINED}
    prefixes = ["", *(data.normal(prefix) + " " for prefix in data.PREFIXES)]
    asked = 0
    for doc in itertools.islice(data.documents(2), 3000):
        for role, text in doc.messages:
            if role == "user":
                asked += 1
                said = data.normal(text)
                assert not any(said.startswith(prefix) and said[len(prefix) :] in held for prefix in prefixes), text
    assert asked > 5000


def test_every_fact_asked_for_is_known_through_another_phrasing(data):
    taught = {question.answer for question in data.GRID}
    unknown = {question.answer for question in data.grid_questions()} - taught
    assert not unknown


def test_the_tokenizer_returns_every_byte_and_never_merges_digits():
    tokenizer = Tokenizer.from_file(str(HERE / "hf" / "tokenizer.json"))
    text = "".join(map(chr, range(1, 0x250))) + "\u4e2d\u6587 \U0001f999\r\n\n  x  "
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode("2026", add_special_tokens=False).ids) == 4
    assert tokenizer.token_to_id("<|begin_of_text|>") == 1920
    assert tokenizer.get_vocab_size() == 2048


def test_every_row_is_a_multiple_of_256_and_the_files_fit_in_42_mb():
    with safe_open(HERE / "hf" / "model.safetensors", "np") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            shape = file.get_slice(name).get_shape()
            rows = shape[-2] if ".experts." in name else shape[-1]  # experts are stored transposed
            assert rows % 256 == 0, name
    blobs = [*HERE.glob("hf/*"), *HERE.glob("*.gguf")]
    assert sum(blob.stat().st_size for blob in blobs) <= 42e6


def test_it_answers_about_pictures_that_it_never_saw(monkeypatch):
    """12 of the evaluation's pictures; of all of them sight.json has at least four answers of five right."""
    monkeypatch.syspath_prepend(str(HERE))
    import evaluate_tower

    with Model.load(SMALL_MODEL, threads=2, ctx=256, mmproj=True) as model:
        found = evaluate_tower.evaluate(model, 12)
    assert found["share"] >= 0.8
    assert json.loads((HERE / "sight.json").read_text())["share"] >= 0.8


EXAMPLES = ["three-red-squares", "one-blue-circle", "four-green-triangles", "two-black-circles"]


def test_the_example_pictures_are_what_the_script_draws(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(HERE))
    import pictures

    monkeypatch.setattr(pictures, "__file__", str(tmp_path / "pictures.py"))
    pictures.main()
    for name in EXAMPLES:
        assert (tmp_path / "pictures" / f"{name}.png").read_bytes() == (HERE / "pictures" / f"{name}.png").read_bytes()


def test_the_example_pictures_are_seen():
    with Model.load(SMALL_MODEL, threads=2, ctx=256) as model:
        for name in EXAMPLES:
            number, colour, shape = name.split("-")
            for question, answer in ((f"How many {shape.rstrip('s')}s?", number), ("What colour do you see?", colour)):
                parts = [{"type": "image", "image": HERE / "pictures" / f"{name}.png"}, {"type": "text", "text": question}]
                said = "".join(piece.text for piece in model.stream([{"role": "user", "content": parts}], 16, temp=0))
                assert said == f"I see {answer}."
