"""What every test gets: the signals as they were, and no model, colour or debugging from the user's environment."""

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
