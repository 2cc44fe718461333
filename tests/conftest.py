"""Fixtures.

For every test: signal handlers are restored, and the user's variables and settings are ignored. On request: an address where
nothing listens, no other model, commands with a miniature model, a browser, a checkpoint of Scout's shape.
"""

import os
import signal
import socket
from importlib import import_module

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # no test measures time
settings.load_profile("any machine")

# a run in the background of a script inherits an ignored SIGINT, one under nohup an ignored SIGHUP, and would pass them on to
# every command under test
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

KEPT = ("LLAMACLI_CACHE", "LLAMACLI_SIMD")  # variables that may be set for a test run


@pytest.fixture(scope="session", autouse=True)
def no_settings(tmp_path_factory):
    """Remove the user's variables and settings."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in [*os.environ]:
            if variable == "NO_COLOR" or (variable.startswith("LLAMACLI_") and variable not in KEPT):
                patch.delenv(variable)
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("settings")))
        yield


@pytest.fixture(autouse=True)
def handlers_of_signals():
    """Restore signal handlers: commands in this process change them, and child processes would inherit them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def nobody():
    """HOST:PORT of this machine where nobody listens, and no other program can: the port is taken, but not listened on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield "{}:{}".format(*taken.getsockname())


@pytest.fixture
def no_other_model(monkeypatch):
    """Count memory as in a process of its own, since models of earlier tests may be freed at any moment."""
    from llamacli.plan import machine

    monkeypatch.setattr(machine, "_reserved", {})


@pytest.fixture
def model(monkeypatch):
    """Commands in this process use a miniature model, which the test receives; stdin is empty."""
    from fakes import REPLY, FakeModel, Scripted

    from llamacli.cli import COMMANDS, options, run

    for command in COMMANDS:  # a module imported later would keep the patched objects
        import_module(f"llamacli.cli.{command}")
    made = FakeModel(Scripted(REPLY, chunk=64))
    monkeypatch.setattr(options, "find_model", lambda name, console: name)
    monkeypatch.setattr(options, "load_model", lambda path, threads, ctx, console, **more: made)
    monkeypatch.setattr(run, "stdin_is_piped", lambda: False)
    return made


@pytest.fixture(scope="session")
def preloaded():
    """Starts processes with the miniature model that have already imported their modules (fakes.Preloaded)."""
    from fakes import Preloaded

    server = Preloaded()
    yield server
    server.close()


@pytest.fixture(scope="session")
def chromium():
    """A real browser (serve/browser.py)."""
    from browser import Browser

    made = Browser()
    yield made
    made.close()


@pytest.fixture(scope="module")
def scout(tmp_path_factory):
    """A checkpoint's folder, of Scout's shape, and its weights."""
    from checkpoint import write

    folder = tmp_path_factory.mktemp("scout") / "hf"
    return folder, write(folder)
