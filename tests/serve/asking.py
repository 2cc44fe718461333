"""Questions on the page, as its tests put them: in, a tab of the browser and a text; out, the answer on the page."""

import threading

from fakes import Scripted

REPLY = "The capital is **Paris**.\n\nAsk on."
STILL = "!document.querySelector('[aria-busy]')"  # no answer is under way


class Held(Scripted):
    """Says as many tokens as a test lets it: what is done meanwhile may take long or short."""

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
