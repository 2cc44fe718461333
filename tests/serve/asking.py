"""Helpers for tests of the page. In: a tab of the browser and a question. Out: the answer on the page."""

import threading

from fakes import Scripted

REPLY = "The capital is **Paris**.\n\nAsk on."
STILL = "!document.querySelector('[aria-busy]')"  # no answer is under way


class Held(Scripted):
    """A model that answers as many tokens as the test allows, so that tests do not depend on speed."""

    def __init__(self, text, tokens):
        super().__init__(text, chunk=64)
        self.may = threading.Semaphore(tokens)

    def forward(self, ids, cache, **more):
        if len(ids) == 1:
            assert self.may.acquire(timeout=120), "nobody let it go on"
        return super().forward(ids, cache, **more)


def ask(tab, text, wait=True):
    tab.click("#question")
    tab.type(text)
    n = tab.count("article.answer")
    tab.press("Enter")
    if wait:
        tab.wait(f"document.querySelectorAll('article.answer').length === {n + 1} && {STILL}")
