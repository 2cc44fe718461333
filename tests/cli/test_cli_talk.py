"""The chat continues after errors before and during an answer, and after a change of the model."""

import pytest
from fakes import REPLY, Answers, FakeModel, Scripted

from llamacli.cli import options
from llamacli.cli.chat.commands import Commands
from llamacli.cli.chat.loop import loop
from llamacli.cli.chat.show import Screen
from llamacli.cli.chat.talk import Talk
from llamacli.cli.console import Console
from llamacli.conversation import Conversation
from llamacli.errors import LlamacliError, MemoryLimitError, ModelFileError, OutputError
from llamacli.store import Store
from llamacli.tools.loop import Toolbox

ERRORS = [
    ModelFileError("m.gguf: expected the file as it was opened, found it cut short"),
    MemoryLimitError("m.gguf: expected the memory that was free"),
    LlamacliError("expected the model's logits to be numbers, found NaN"),
    MemoryError("4 GB"),
    OSError(5, "Input/output error"),
    ZeroDivisionError("a bug"),
]


class Failing(Scripted):
    """Fails at the call number `at` after `arm`; 1 is the prompt, 2 the first token of the answer."""

    error, left = None, 0

    def arm(self, error, at):
        self.error, self.left = error, at

    def forward(self, ids, cache, **how):
        self.left -= 1
        if self.error and self.left == 0:
            error, self.error = self.error, None
            raise error
        return super().forward(ids, cache, **how)


class Room:
    """A chat at a terminal, with `turns` for what is typed."""

    def __init__(self, path, reply=REPLY, ctx=4096):
        self.engine = Failing(reply, chunk=64)
        self.store = Store(path / "conversations.db")
        self.conversation = Conversation(self.store, "m.gguf")
        self.console = Console()
        self.talk = Talk(FakeModel(self.engine, ctx), options.Generation(), self.console, self.conversation)
        self.commands = Commands(self.talk, self.console, Screen(self.console, False, True), self.store, typed=True)

    def type(self, *turns):
        self.turns = iter(turns)
        loop(self.commands, self, self.console, "")
        return self.said

    def turn(self, default=""):
        turn = next(self.turns, EOFError())
        if isinstance(turn, BaseException):
            raise turn
        return turn() or "" if callable(turn) else turn

    def type_ahead(self, data):
        pass

    @property
    def said(self):
        return [m.content for m in self.talk.conversation.messages]


@pytest.fixture
def room(tmp_path):
    return Room(tmp_path, "hello")


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_before_an_answer_leaves_the_question_for_another_try(room, error, capfd):
    room.type("one", lambda: room.engine.arm(error, 1), "two")
    assert room.said == ["one", "hello", "two"]
    assert (error.strerror if isinstance(error, OSError) else str(error)) in capfd.readouterr().err
    assert room.type("/regen") == ["one", "hello", "two", "hello"]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("at", [1, 3])
def test_an_error_while_regenerating_keeps_the_old_answer(room, error, at):
    room.type("one", lambda: room.engine.arm(error, at), "/regen")
    assert room.said == ["one", "hello"]
    assert [m.content for m in Conversation.resume(room.store, room.store.latest()).messages] == ["one", "hello"]
    assert room.type("two") == ["one", "hello", "two", "hello"]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("at", [1, 3])
def test_an_error_while_an_edited_question_is_answered_keeps_the_old_turn(room, error, at):
    room.type("zero", "one", lambda: room.engine.arm(error, at), "/edit uno")
    assert room.said == ["zero", "hello", "one", "hello"]
    assert [m.content for m in Conversation.resume(room.store, room.store.latest()).messages] == room.said
    assert room.type("/edit uno") == ["zero", "hello", "uno", "hello"]


def test_an_edited_question_that_the_context_does_not_hold_says_to_edit_again(tmp_path, capfd):
    room = Room(tmp_path, "hello", ctx=60)
    room.type("zero", "one", "/edit " + "x" * 90)
    assert room.said == ["zero", "hello", "one", "hello"]
    assert "then /edit asks again" in " ".join(capfd.readouterr().err.split())


def test_a_command_that_saves_the_conversation_as_another_says_so(room, capfd):
    """It may be the last one before the chat is left."""
    room.type("one", "two")
    other = Conversation.resume(room.store, room.store.latest())
    other.ask("three")
    room.type("/undo")
    assert room.conversation.id != other.id
    assert f"this one is now saved as {room.conversation.id}" in " ".join(capfd.readouterr().err.split())


def test_an_edited_question_that_gets_no_answer_gives_back_what_was_read_for_it(room, tmp_path):
    (tmp_path / "notes.txt").write_text("my notes")
    room.type("one", f"/read {tmp_path}/notes.txt", lambda: room.engine.arm(ERRORS[0], 1), "/edit uno")
    assert room.said == ["one", "hello"]
    assert room.type("/edit uno") == ["my notes\n\nuno", "hello"]


def test_an_edited_question_fits_after_the_oldest_turn_is_dropped(tmp_path):
    """The advice that the error gives works."""
    room = Room(tmp_path, "hello", ctx=60)
    room.type("zero", "one", "/edit " + "x" * 44)
    assert room.said == ["zero", "hello", "one", "hello"]
    room.type("/drop", "/edit " + "x" * 44)
    assert room.said[:3] == ["zero", "hello", "x" * 44]


def test_a_question_without_an_answer_gives_way_to_the_edited_one(room):
    room.type(lambda: room.engine.arm(ERRORS[0], 1), "one", lambda: room.engine.arm(ERRORS[0], 1), "/edit uno")
    assert room.said == ["uno"]
    assert room.type("/regen") == ["uno", "hello"]


def test_an_error_in_the_middle_keeps_what_was_said(room):
    room.type("one", lambda: room.engine.arm(ERRORS[0], 4))
    room.talk.conversation.undo()
    room.type(lambda: room.engine.arm(ERRORS[0], 4), "two")
    assert room.said == ["two", "hel"]
    assert room.talk.conversation.messages[-1].finish is None
    assert room.type("/continue")[-1].startswith("hel")


def test_the_end_of_stdout_ends_the_chat(room):
    for error in (BrokenPipeError(), OutputError("stdout: expected to write 3 bytes, found: No space left")):
        with pytest.raises(type(error)):
            room.type(error)


def test_a_file_that_cannot_be_written_does_not(room, tmp_path):
    (tmp_path / "there.md").write_text("mine")
    room.type("one", f"/export {tmp_path}/there.md", f"/export {tmp_path}/no/where.md", "two")
    assert room.said == ["one", "hello", "two", "hello"]
    assert (tmp_path / "there.md").read_text() == "mine"


def test_ctrl_c_before_an_answer_keeps_the_old_one(room):
    room.type("one", lambda: setattr(room.engine, "break_after", 0), "/regen")
    assert room.said == ["one", "hello"]


def test_another_model_that_cannot_be_loaded_leaves_the_old_one(room, monkeypatch, tmp_path, capfd):
    loaded = []

    def load(path, threads, ctx, console, **more):
        loaded.append(str(path))
        if str(path) == "bad":
            raise MemoryLimitError("bad: expected 60 GB of memory, found 2")
        return FakeModel(Scripted("from the other", chunk=64))

    monkeypatch.setattr(options, "load_model", load)
    monkeypatch.setattr(options, "find_model", lambda name, console: name)
    monkeypatch.setattr("llamacli.cli.chat.commands.find_model", lambda name, console: name)
    monkeypatch.setattr("llamacli.files.gguf.open_gguf", lambda path: None)
    room.type("one", "/model bad", "two", "/model good", "three")
    assert loaded == ["bad", "m.gguf", "good"]
    assert room.said == ["one", "hello", "two", "from the other", "three", "from the other"]
    assert "expected 60 GB" in capfd.readouterr().err
    assert room.store.latest().model == "good"


def test_a_model_is_closed_before_another_one_is_loaded(room):
    """Its memory, and on a cluster its connection, of which a process may have one, must be free."""
    events, model = [], room.talk.model
    model.close = lambda: events.append("closed")
    room.talk.use(lambda path: (events.append(path), model)[1], "good")
    assert events == ["closed", "good"]


def test_a_file_that_is_no_model_changes_nothing(room, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"nothing")
    model = room.talk.model
    room.type("one", f"/model {tmp_path}/x.gguf", "two")
    assert room.talk.model is model
    assert room.said == ["one", "hello", "two", "hello"]


def test_a_context_filled_by_the_answer_says_how_to_go_on(tmp_path, capfd):
    room = Room(tmp_path, "a rather long answer", ctx=24)
    room.type("one")
    assert "/ctx 48 holds more, then /continue" in capfd.readouterr().err
    assert len(room.said[1]) < len("a rather long answer")
    room.type("/ctx 4096", "/continue")
    assert room.said == ["one", "a rather long answer"]


def test_calls_and_results_stay_in_the_conversation_as_long_as_it_lasts():
    def add(a: int, b: int) -> int:
        return a + b

    model = FakeModel(Answers("I add. [add(a=2, b=40)]", "It is 42.", "Yes.", "Again."))
    talk = Talk(model, options.Generation(), Console(), Conversation(), Toolbox([add]))
    assert "".join(talk.ask("2 + 40?")) == "I add. \nIt is 42."
    assert "".join(talk.ask("sure?")) == "Yes."
    assert [(m["role"], m["content"]) for m in model.asked] == [
        ("user", "2 + 40?"),
        ("assistant", ""),
        ("ipython", "42"),
        ("assistant", "I add. \nIt is 42."),
        ("user", "sure?"),
    ]
    assert model.asked[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 2, "b": 40}}
    talk.conversation.undo(2)
    assert "".join(talk.ask("other")) == "Again."
    assert model.asked == [{"role": "user", "content": "other"}]
