"""Fixture of these tests: a chat on a pseudo-terminal, with the miniature model."""

import pytest
from chatting import READY
from fakes import fake
from terminal import Terminal


@pytest.fixture
def begin(tmp_path, preloaded):
    """Start a chat with a state folder of its own; it is ended after the test. `fresh`: in a new interpreter."""
    begun = []

    def start(*args, reply="fine", delay="0", columns=80, rows=24, ready=READY, fresh=False, **environment):
        how = {"start": None if fresh else preloaded.start, "XDG_STATE_HOME": str(tmp_path), **environment}
        t = Terminal(fake("chat", *args, reply=reply, delay=delay), columns, rows, **how)
        begun.append(t)
        if ready:
            t.wait(ready)
        return t

    yield start
    for t in begun:
        t.close()
