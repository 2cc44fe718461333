"""`--cache`, `llamacli cache` and `--kv-file`, in this process, over the small model."""

import gc
import json
import re

import pytest

from llamacli import Model, environment
from llamacli.cli import main
from llamacli.cli.chat.talk import Talk
from llamacli.cli.console import Console
from llamacli.cli.options import Generation
from llamacli.conversation import Conversation
from llamacli.store import Store

TEXT = " ".join(f"The owl number {n} lives in Oslo." for n in range(200))  # some 2000 tokens


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "snapshots_folder", lambda: tmp_path / "snapshots")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "snapshots"


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    return str(path)


def run(capfd, book, question, *args):
    """The answer, the tokens of the prompt, and how many of them were kept from before."""
    assert main(["run", "-v", "--no-stdin", "--temp", "0", "-n", "12", "-f", book, question, *args]) == 0
    out, err = capfd.readouterr()
    tokens, kept = re.search(r"\[(\d+) prompt tokens(?: \((\d+) kept)?", err).groups()
    return out, int(tokens), int(kept or 0)


def test_the_next_question_about_a_text_reads_what_was_kept(capfd, book, folder):
    plain = run(capfd, book, "Where does the owl number 7 live?")
    first = run(capfd, book, "Where does the owl number 7 live?", "--cache")
    again = run(capfd, book, "Where does the owl number 7 live?", "--cache")
    other = run(capfd, book, "How many owls are there?", "--cache")
    assert plain[0] == first[0] == again[0]
    assert other[0] == run(capfd, book, "How many owls are there?")[0]
    assert (plain[2], first[2]) == (0, 0)
    assert again[1] - again[2] < 400
    assert other[1] - other[2] < 400
    assert folder.stat().st_mode & 0o077 == 0


def test_a_limit_bounds_the_folder(capfd, book):
    run(capfd, book, "Where?", "--cache", "--cache-limit", "1M")
    main(["cache", "--json"])
    found = json.loads(capfd.readouterr().out)
    assert 0 < found["bytes"] <= 1_000_000
    assert main(["run", "--cache-limit", "12", "hi"]) == 2


def test_it_is_shown_and_cleared(capfd, book, folder):
    main(["cache"])
    assert capfd.readouterr().out.startswith("0 B in 0 files")
    run(capfd, book, "Where?", "--cache")
    main(["cache", "clear"])
    assert re.match(r"removed [\d.]+ MB in \d+ files", capfd.readouterr().out)
    assert list(folder.iterdir()) == []


def test_a_conversation_is_resumed_from_what_was_kept(tmp_path):
    def talk(conversation):
        return Talk(Model.load(environment.SMALL_MODEL, ctx=4096), options, Console(), conversation)

    options, store = Generation(cache=True, temp=0.0, max_tokens=12), Store(environment.conversations_file())
    first = talk(Conversation(store, str(environment.SMALL_MODEL)))
    "".join(first.ask(TEXT))
    evaluated = first.used
    later = talk(Conversation.resume(store, store.latest()))
    "".join(later.ask("What is the capital of France?"))
    assert evaluated - later.session.stats.cached_tokens < 256


def test_keys_and_values_in_a_file_change_no_answer_and_leave_nothing(capfd, tmp_path, no_other_model):
    """The least memory that is accepted for a context of 32768 tokens holds some 4000 positions; the text has more."""
    book = tmp_path / "book.txt"
    book.write_text(TEXT * 3)
    args = ["run", "-v", "--no-stdin", "--temp", "0", "-n", "4", "-f", str(book), "Where?", "-c", "32K"]
    assert main(args) == 0
    plain = capfd.readouterr().out
    args += ["--experts", "slots", "--kv-file", str(tmp_path / "kv"), "--memory"]
    gc.collect()  # the first model, which would be given back between the next two
    assert main([*args, "1M"]) == 1
    least = float(re.search(r"expected at least ([\d.]+) GB", capfd.readouterr().err)[1])
    assert main([*args, f"{1000 * least:.0f}M"]) == 0
    out, err = capfd.readouterr()
    assert out == plain
    assert re.search(r"MB a token read, [1-9]\d* of it keys and values", err)
    assert not (tmp_path / "kv").exists()


def test_a_place_where_no_file_can_be_made_is_one_line(capfd, tmp_path):
    assert main(["run", "--no-stdin", "--kv-file", str(tmp_path / "no" / "where"), "hi"]) == 2
    err = capfd.readouterr().err
    assert re.search(r"--kv-file .*where: expected a folder, or a path where a new file can be made, found: No such file", err)
    assert "Traceback" not in err
