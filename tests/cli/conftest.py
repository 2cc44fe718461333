"""Fixture of this room: a chat on a pseudo-terminal, over the miniature model."""

import pytest
from chatting import READY
from fakes import fake
from terminal import Terminal


@pytest.fixture
def begin(tmp_path, preloaded):
    """Start a chat whose state is this test's own; it is ended at the test's end. `fresh`: by a new interpreter."""
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
