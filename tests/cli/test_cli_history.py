"""`llamacli history`, in this process, over a store of two conversations."""

import json

import pytest

from llamacli import environment
from llamacli.cli import main
from llamacli.conversation import Conversation
from llamacli.store import Store


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))


@pytest.fixture
def chats():
    """Two conversations; their ids."""
    store = Store(environment.conversations_file())
    ids = []
    for question, answer in (("about elephants", "They are **big**."), ("about\nstones \x1b[31m", "They are hard.")):
        c = Conversation(store, "/models/scout.gguf", "be kind")
        c.ask(question)
        growing = c.answer()
        growing.add(answer)
        growing.close("stop")
        ids.append(c.id)
    return ids


def history(capfd, *args):
    code = main(["history", *args])
    out, err = capfd.readouterr()
    return code, out, err


def test_the_latest_come_first(capfd, chats):
    code, out, _ = history(capfd)
    head, first, second = out.splitlines()
    assert code == 0
    assert head.split() == ["id", "changed", "turns", "model", "conversation"]
    assert first.split()[0] == chats[1] and first.endswith("1  scout.gguf  about")
    assert second.split()[0] == chats[0] and second.endswith("about elephants")
    records = json.loads(history(capfd, "list", "--json")[1])
    assert [(r["id"], r["turns"], r["model"]) for r in records] == [(id, 1, "/models/scout.gguf") for id in chats[::-1]]


def test_search_finds_questions_and_answers(capfd, chats):
    code, out, _ = history(capfd, "search", "they", "are")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == chats[::-1]
    assert json.loads(history(capfd, "search", "BIG", "--json")[1]) == [
        {"id": chats[0], "conversation": "about elephants", "role": "assistant", "text": "They are **big**."}
    ]
    assert json.loads(history(capfd, "search", "nowhere", "--json")[1]) == []


def test_show_and_export(capfd, chats):
    code, out, _ = history(capfd, "show", chats[0][:6])
    assert (code, out.startswith("# about elephants\n\nscout.gguf · ")) == (0, True)
    assert out.endswith("## System\n\nbe kind\n\n## You\n\nabout elephants\n\n## Model\n\nThey are **big**.\n")
    assert history(capfd, "export", chats[0])[1] == out
    lines = history(capfd, "export", chats[1], "--format", "jsonl")[1].splitlines()
    assert [tuple(json.loads(line).values()) for line in lines] == [
        ("system", "be kind"),
        ("user", "about\nstones \x1b[31m"),
        ("assistant", "They are hard."),
    ]


def test_delete_takes_all_or_none(capfd, chats):
    assert history(capfd, "delete", chats[0], "nobody")[0] == 2
    assert len(json.loads(history(capfd, "--json")[1])) == 2
    assert history(capfd, "delete", *chats)[0] == 0
    assert json.loads(history(capfd, "--json")[1]) == []


@pytest.mark.parametrize(
    "args", [("list", "x"), ("search",), ("show",), ("delete",), ("show", "nobody"), ("export", "nobody"), ("turn",)]
)
def test_what_makes_no_sense_is_refused(capfd, chats, args):
    code, out, err = history(capfd, *args)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1


def test_nothing_is_made_where_nothing_was(capfd, tmp_path):
    assert history(capfd, "--json")[:2] == (0, "[]\n")
    assert history(capfd, "search", "x")[0] == 2
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_database_is_one_line(capfd):
    path = environment.conversations_file()
    path.parent.mkdir()
    path.write_bytes(b"no database " * 100)
    code, out, err = history(capfd)
    assert (code, out) == (1, "")
    assert "expected a database of conversations" in err
