"""The chat page, used by clicks and keys in a real Chromium, with a miniature model and real sockets."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import browser
import httpx
import pytest
from asking import REPLY, STILL, Held, ask
from fakes import Answers, FakeModel, Scripted
from PIL import Image
from serving import serving, until

from llamacli.conversation import from_jsonl
from llamacli.serve.app import Server
from llamacli.serve.listen import Listener, bind
from llamacli.serve.page import page

pytestmark = pytest.mark.skipif(browser.program() is None, reason="needs Chromium: apt-get install chromium")


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
    with opened(Scripted(REPLY, chunk=64, delay=0.005)) as tab:  # no speed stands below an answer of under 20 ms
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
    engine = Held("word " * 400, 50)
    with opened(engine) as tab:
        ask(tab, "Talk.", wait=False)
        tab.wait("document.querySelector('.markdown').innerText.split('word').length > 5")
        assert tab.count("[aria-busy=true]") == 1
        tab.click("#stop")
        tab.wait(STILL)
        assert "stopped" in tab.text("article.answer .below")
        until(lambda: tab.server._bodies.held == 0)  # the server has seen it
        engine.may.release()  # the token under way
        until(lambda: tab.server.scheduler.active == 0)
        said = tab.text(".markdown")
        engine.may.release(50)
        ask(tab, "More.", wait=False)
        tab.wait("document.querySelectorAll('.markdown')[1]?.innerText.split('word').length > 5")
        tab.press("Escape")
        tab.wait(STILL)
        assert tab.text(".markdown") == said
        engine.may.release(10**4)


def test_another_conversation_ends_an_answer_and_a_deleted_one_stays_deleted(opened):
    engine = Held("word " * 400, 50)
    with opened(engine) as tab:
        ask(tab, "First", wait=False)
        tab.wait("document.querySelector('.markdown').innerText.split('word').length > 3")
        tab.click("#new")
        until(lambda: tab.server._bodies.held == 0)  # the server has seen that it left
        engine.may.release()
        until(lambda: tab.server.scheduler.active == 0)
        assert tab.count("article") == 0
        engine.may.release(50)
        ask(tab, "Second", wait=False)
        tab.wait("document.querySelector('.markdown').innerText.split('word').length > 3")
        tab.click("#settings")
        tab.click("#delete")
        tab.click("#delete")
        until(lambda: tab.server._bodies.held == 0)
        engine.may.release()
        until(lambda: tab.server.scheduler.active == 0)
        tab.reload()
        tab.appears("#server.there")
        assert tab.text("#chats") == "First"
        tab.click("#chats button", "First")
        assert "stopped" in tab.text("article.answer .below")


def test_a_reload_keeps_the_conversation(opened):
    with opened() as tab:
        ask(tab, "What is the capital of France?")
        before = tab.text("#messages")
        tab.reload()
        tab.appears("article.answer")
        assert tab.text("#messages") == before
        ask(tab, "And of Italy?")
        assert len(tab.model.asked) == 3


class Pretending(BaseHTTPRequestHandler):
    """A server for the page that answers with the (status, body) and headers of a test."""

    protocol_version, answer, asked = "HTTP/1.0", None, ()

    def do_GET(self):
        made = page()
        if self.path == "/":
            self.reply(200, made.body, **dict(made.headers))
        else:
            self.reply(200, b'{"data": [{"id": "m"}]}')

    def do_POST(self):
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.reply(*self.answer[0], **self.answer[1])

    def reply(self, status, body, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def pretended(chromium):
    """A page of such a server; `tab.server` is its class."""
    handler = type("Handler", (Pretending,), {"asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tab = chromium.tab(f"http://127.0.0.1:{server.server_port}")
        tab.server = handler
        yield tab
        tab.close()
        server.shutdown()


STREAM = {"Content_Type": "text/event-stream"}


@pytest.fixture
def pictures(tmp_path):
    """Paths of a small PNG, a large JPEG, and a text that says it is a picture."""
    Image.new("RGB", (40, 30), "red").save(tmp_path / "small.png")
    Image.new("RGB", (5000, 2500), "blue").save(tmp_path / "large.jpg")
    (tmp_path / "none.png").write_text("no picture")
    return [tmp_path / name for name in ("small.png", "large.jpg", "none.png")]


def test_pictures_are_attached_by_file_by_drop_and_by_paste_and_sent_as_data(pretended, pictures):
    (small, large, none), tab = pictures, pretended
    tab.server.answer = (200, b'data: {"choices": [{"delta": {"content": "A picture."}}]}\n\ndata: [DONE]\n\n'), STREAM
    tab.files("#file", small)
    tab.wait("document.querySelectorAll('#attached img').length === 1")
    tab.drop("#scroll", large)
    tab.wait("document.querySelectorAll('#attached img').length === 2")
    tab.js("""(async () => {
        const data = new DataTransfer(), canvas = Object.assign(document.createElement('canvas'), {width: 8, height: 8});
        data.items.add(new File([await new Promise((done) => canvas.toBlob(done))], 'x.png', {type: 'image/png'}));
        document.activeElement.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data, bubbles: true}));
    })()""")
    tab.wait("document.querySelectorAll('#attached img').length === 3")
    tab.click("#attached li:last-child button")
    tab.wait("document.querySelectorAll('#attached img').length === 2")
    tab.files("#file", none)
    tab.wait("!document.querySelector('#notice').hidden")
    assert "none.png is no picture that this browser reads" in tab.text("#notice")
    ask(tab, "What is this?")
    *urls, text = tab.server.asked[0]["messages"][0]["content"]
    assert text == {"type": "text", "text": "What is this?"}
    first, second = (base64.b64decode(part["image_url"]["url"].partition(",")[2]) for part in urls)
    assert first == small.read_bytes()
    assert Image.open(BytesIO(second)).size == (2016, 1008)
    assert tab.count("article.user img") == 2 and tab.count("#attached img") == 0
    tab.reload()
    tab.appears("article.user img")
    ask(tab, "And now?")
    kinds = [part["type"] for part in tab.server.asked[1]["messages"][0]["content"]]
    assert kinds == ["image_url", "image_url", "text"]
    tab.js("document.querySelector('article.user .below button:last-child').click()")
    tab.click(".edit li:last-child button")
    tab.click(".edit button.main")
    tab.wait(f"document.querySelectorAll('article.user').length === 1 && {STILL}")
    assert [part["type"] for part in tab.server.asked[2]["messages"][0]["content"]] == ["image_url", "text"]


def test_a_key_is_asked_for_and_kept_until_the_tab_closes(opened):
    with opened(keys=["right"], quiet=False) as tab:
        tab.appears("#asks-key[open]")
        for key in ("no spaces", "wrong", "right"):
            tab.wait("document.activeElement.id === 'key'")
            tab.type(key)
            tab.press("Enter")
            tab.wait("document.querySelector('#key').value === ''")
        tab.wait("!document.querySelector('#asks-key').open")
        tab.appears("#server.there")
        ask(tab, "Hi")
        tab.reload()
        tab.appears("#server.there")
        assert tab.js("JSON.stringify(localStorage)").count("right") == 0
        tab.js("sessionStorage.setItem('llamacli.key', 'changed')")
        ask(tab, "Again", wait=False)
        tab.appears("#asks-key[open]")
        tab.type("right")
        tab.press("Enter")
        tab.wait(f"document.querySelectorAll('article.answer').length === 2 && {STILL}")


def test_a_server_that_is_gone_is_said_and_its_return_is_noticed(chromium):
    model, port = FakeModel(Scripted(REPLY, chunk=64), ctx=4096), None
    for round_ in range(2):
        server = Server(model, "miniature")
        listener = Listener(server.app, bind("127.0.0.1", port or 0))
        if round_ == 0:
            port = int(listener.url.rpartition(":")[2])
            until(lambda listener=listener: httpx.get(listener.url + "/health", trust_env=False).status_code == 200)
            tab = chromium.tab(listener.url)
            ask(tab, "One")
        else:
            tab.appears("#server.there")
            tab.click(".fault button", "Try again")
            tab.wait(f"document.querySelectorAll('article.answer').length === 2 && {STILL}")
            assert tab.count(".fault") == 0
        server.close()
        listener.close()
        if round_ == 0:
            ask(tab, "Two", wait=False)
            tab.appears(".fault")
            assert "does not answer. Start it again with llamacli serve" in tab.text(".fault")
            assert tab.count("#server.gone") == 1 and tab.count("article.answer") == 1
    tab.close()


HALF = b'data: {"choices": [{"delta": {"content": "Half"}}]}\n\n'
FAULTS = [
    ((429, b'{"error": {"message": "too many requests"}}'), {"Retry_After": "7"}, "Too many requests. Try again in 7 s."),
    ((413, b'{"error": {"message": "expected a smaller body"}}'), {}, "Expected a smaller body."),
    ((502, b"<html>bad gateway"), {}, "HTTP 502 and no explanation"),
    ((200, b"<html>hello"), {}, "is it llamacli serve?"),
    ((200, HALF), STREAM, "The answer broke off"),
    ((200, HALF + b"data: {nonsense\n\n"), STREAM, "no JSON"),
    ((200, HALF + b'data: {"error": {"message": "the model failed"}}\n\n'), STREAM, "the model failed"),
    ((200, b"data: [DONE]\n\n"), STREAM, ""),
]


def test_each_failure_is_a_sentence_with_what_to_do(pretended):
    tab = pretended
    for i, (answer, headers, words) in enumerate(FAULTS):
        tab.server.answer = answer, headers
        ask(tab, f"Question {i}", wait=False)
        tab.wait(STILL)
        if words:
            tab.appears(".fault")
            assert words in tab.text(".fault") and tab.count(".fault button") == 1
        half = HALF in answer[1]
        assert (tab.js("[...document.querySelectorAll('.markdown')].pop()?.innerText") == "Half") == half
        assert ("broke off" in tab.js("[...document.querySelectorAll('article')].pop().innerText")) == half
        tab.click("#new")


def test_answers_are_made_again_and_questions_edited(opened):
    with opened(Answers("one", "two", "three", "four")) as tab:
        ask(tab, "First")
        ask(tab, "Second")
        tab.js("window.was = [...document.querySelectorAll('article.answer')].pop()")
        tab.click(".again", "Regenerate")
        tab.wait(f"!was.isConnected && {STILL}")
        assert tab.count("article.answer") == 2
        assert [m["content"] for m in tab.model.asked] == ["First", "one", "Second"]
        tab.js("document.querySelector('article.user button:last-child').focus()")
        assert tab.focus() == "Edit"
        tab.press("Enter")
        tab.type("Third, not ")
        tab.press("Escape")
        assert tab.text("article.user .said") == "First"
        tab.press("Enter")
        tab.js("document.querySelector('.edit textarea').select()")
        tab.type("Fourth")
        tab.press("Enter")
        tab.wait(f"document.querySelectorAll('article.answer').length === 1 && {STILL}")
        assert [m["content"] for m in tab.model.asked] == ["Fourth"]


def test_a_question_edited_without_an_answer_loses_no_turn(pretended):
    tab = pretended
    tab.server.answer = (200, HALF + b"data: [DONE]\n\n"), STREAM
    ask(tab, "One")
    ask(tab, "Two")
    tab.server.answer = (503, b'{"error": {"message": "the queue is full"}}'), {}
    tab.js("document.querySelector('article.user button:last-child').click()")
    tab.js("document.querySelector('.edit textarea').select()")
    tab.type("Three")
    tab.press("Enter")
    tab.appears(".fault")
    assert tab.js("document.querySelector('.edit textarea').value") == "Three"
    assert tab.count("article.answer") == 2 and tab.count(".fault button") == 0
    kept = tab.js("JSON.stringify(Object.values(localStorage))")
    assert "Two" in kept and "Three" not in kept, kept


def test_conversations_are_switched_renamed_exported_and_deleted(opened, tmp_path):
    with opened() as tab:
        tab.download_to(tmp_path)
        ask(tab, "About rivers")
        tab.click("#new")
        ask(tab, "About hills")
        assert tab.text("#chats").split("\n") == ["About hills", "About rivers"]
        tab.click("#chats button", "About rivers")
        assert tab.text("#title") == "About rivers" and tab.text("article.user .said") == "About rivers"
        tab.click("#settings")
        tab.click("#name")
        tab.js("document.querySelector('#name').select()")
        tab.type("Waters")
        tab.click("#system")
        tab.type("Be brief.")
        tab.click("#temperature")
        tab.type("0.5")
        tab.click("#longest")
        tab.type("12")
        tab.click("#about button.main")
        tab.wait("document.querySelector('#title').textContent === 'Waters'")
        ask(tab, "More")
        assert tab.model.asked[0] == {"role": "system", "content": "Be brief."}
        assert tab.model.settings["temp"] == 0.5 and len(tab.text("article.answer:last-of-type .markdown")) < 13
        assert "ended at the longest answer" in tab.text("article.answer:last-of-type .below")
        tab.click("#settings")
        for button, ending in (("#as-markdown", "md"), ("#as-lines", "jsonl")):
            tab.click(button)
            until((tmp_path / f"Waters.{ending}").exists)
        tab.click("#delete")
        assert tab.text("#delete") == "Delete for good"
        tab.click("#delete")
        assert tab.text("#chats").split("\n") == ["About hills"]
        assert tab.js("Object.keys(localStorage).filter((name) => name.startsWith('llamacli.chat.')).length") == 1
    system, messages = from_jsonl((tmp_path / "Waters.jsonl").read_text(), "export")
    assert system == "Be brief." and [m.content for m in messages][:3] == ["About rivers", REPLY, "More"]
    assert (tmp_path / "Waters.md").read_text().startswith("# Waters\n\nminiature")


def test_a_full_or_damaged_storage_is_said_and_the_conversation_goes_on(opened):
    with opened() as tab:
        ask(tab, "Before")
        tab.js("""(() => {
            for (let size = 1 << 22; size; size >>= 1) try { while (true) {
                localStorage.setItem('x' + localStorage.length, 'x'.repeat(size)); } } catch {}
        })()""")
        ask(tab, "Now it is full")
        assert "storage is full" in tab.text("#notice")
        assert tab.count("article.answer") == 2
        ask(tab, "Still here?")
        assert len(tab.model.asked) == 5
        tab.js("""localStorage.clear(); localStorage['llamacli.chats'] = '[{"id": "1", "title": "odd"}, 5, null, {"id": 2}]';
            localStorage['llamacli.chat.1'] = '{"messages": [null, {"role": "x"}, {"role": "user"}], "settings": 7}';
            localStorage['llamacli.settings'] = '{'; sessionStorage.clear()""")
        tab.reload()
        tab.appears("#server.there")
        assert tab.text("#chats") == "odd"
        ask(tab, "All well?")
