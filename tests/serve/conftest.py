"""Fixture of these tests: the page in a real Chromium, with a miniature model."""

from contextlib import contextmanager

import pytest
from asking import REPLY
from fakes import FakeModel, Scripted
from serving import serving


@pytest.fixture
def opened(chromium):
    """`opened(engine, ...)` yields a page over a model, and a client of its server; the test fails if its console has an
    error.
    """

    @contextmanager
    def open_(engine=None, model=None, quiet=True, look=(), **how):
        model = model or FakeModel(engine or Scripted(REPLY, chunk=64), ctx=4096)
        with serving(model, **how) as client:
            tab = chromium.tab(str(client.base_url), **dict(look))
            tab.model, tab.server = model, client.server
            try:
                yield tab
                assert not quiet or tab.troubles() == []
            finally:
                tab.close()

    return open_
