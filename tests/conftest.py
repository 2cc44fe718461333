"""What every test gets: the signals as they were, and no model, colour or debugging from the user's environment. What some ask
for: commands over a miniature model.
"""

import signal

import pytest


@pytest.fixture(autouse=True)
def untouched_surroundings(monkeypatch):
    """Commands called in this process change handlers, which child processes would inherit."""
    for variable in ("LLAMACLI_MODEL", "LLAMACLI_DEBUG", "NO_COLOR"):
        monkeypatch.delenv(variable, raising=False)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def model(monkeypatch):
    """Commands in this process answer from a miniature model that a test may look into; stdin is empty."""
    from fakes import REPLY, FakeModel, Scripted

    from llamacli.cli import options, run

    made = FakeModel(Scripted(REPLY, chunk=64))
    monkeypatch.setattr(options, "find_model", lambda name, console: name)
    monkeypatch.setattr(options, "load_model", lambda path, threads, ctx, console, **more: made)
    monkeypatch.setattr(run, "stdin_is_piped", lambda: False)
    return made
