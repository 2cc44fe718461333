"""The page to chat with, by clicks and keys in a real Chromium, over a miniature model and real sockets."""

import base64
import hashlib
import re
from contextlib import contextmanager

import browser
import pytest
from fakes import FakeModel, Scripted
from serving import serving, until

pytestmark = pytest.mark.skipif(browser.program() is None, reason="needs Chromium: apt-get install chromium")
REPLY = "The capital is **Paris**.\n\nAsk on."
STILL = "!document.querySelector('[aria-busy]')"  # no answer is under way


@pytest.fixture
def opened(chromium):
    """`opened(engine, ...)` yields a page over a model, and a client of its server; no error may stand on its console."""

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


def ask(tab, text, wait=True):
    tab.click("#question")
    tab.type(text)
    n = tab.count("article.answer")
    tab.press("Enter")
    if wait:
        tab.wait(f"document.querySelectorAll('article.answer').length === {n + 1} && {STILL}")


def test_the_page_comes_with_headers_that_let_it_load_nothing():
    with serving(FakeModel(Scripted(REPLY))) as client:
        page = client.get("/")
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'" and policy["connect-src"] == "'self'"
    for kind in ("script", "style"):
        (inner,) = re.findall(rf"<{kind}>(.*?)</{kind}>", page.text, re.S)
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert policy[f"{kind}-src"] == f"'sha256-{digest}'"
    assert page.headers["x-content-type-options"] == "nosniff" and page.headers["referrer-policy"] == "no-referrer"
    assert not re.search(r"(src|href)=\"(?!data:|#)", page.text), "nothing is loaded from elsewhere"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", page.text)


def test_another_host_s_name_gets_no_page():
    with serving(FakeModel(Scripted(REPLY))) as client:
        assert client.get("/", headers={"Host": "rebound.example"}).status_code == 403


def test_a_question_is_answered_as_markdown_with_its_speed(opened):
    with opened() as tab:
        assert tab.focus() == "Your question"
        ask(tab, "What is the capital of France?")
        assert tab.text("article.user .said") == "What is the capital of France?"
        assert tab.text(".markdown strong") == "Paris" and tab.count(".markdown p") == 2
        assert re.search(rf"{len(REPLY)} tokens · \d+ tok/s", tab.text("article.answer .below"))
        assert tab.text("#chats [aria-current]") == "What is the capital of France?"
        assert tab.focus() == "Your question" and tab.js("document.querySelector('#question').value") == ""
        ask(tab, "And of Italy?")
        assert [message["content"] for message in tab.model.asked] == ["What is the capital of France?", REPLY, "And of Italy?"]


def test_an_answer_grows_as_it_comes_and_stops_when_asked(opened):
    with opened(Scripted("word " * 400, chunk=64, delay=0.005)) as tab:
        ask(tab, "Talk.", wait=False)
        tab.wait("document.querySelector('.markdown').innerText.split('word').length > 5")
        assert tab.count("[aria-busy=true]") == 1
        tab.click("#stop")
        tab.wait(STILL)
        assert "stopped" in tab.text("article.answer .below")
        until(lambda: tab.server.scheduler.active == 0)
        said = tab.text(".markdown")
        ask(tab, "More.", wait=False)
        tab.wait("document.querySelectorAll('.markdown')[1]?.innerText.split('word').length > 5")
        tab.press("Escape")
        tab.wait(STILL)
        assert tab.text(".markdown") == said


def test_a_reload_keeps_the_conversation(opened):
    with opened() as tab:
        ask(tab, "What is the capital of France?")
        before = tab.text("#messages")
        tab.reload()
        tab.appears("article.answer")
        assert tab.text("#messages") == before
        ask(tab, "And of Italy?")
        assert len(tab.model.asked) == 3
