"""Layout and accessibility of the page: keyboard only, phone, screen reader, no layout shifts. In a real Chromium."""

from pathlib import Path

import axe_core_python
import browser
import pytest
from asking import STILL, Held, ask
from fakes import Scripted

pytestmark = pytest.mark.skipif(browser.program() is None, reason="needs Chromium: apt-get install chromium")


def test_what_is_read_above_stays_where_it_is_while_an_answer_grows(opened):
    engine = Held("word and word\n\n" * 80, 600)
    with opened(engine) as tab:
        ask(tab, "Talk.", wait=False)
        tab.wait("document.querySelectorAll('.markdown p').length > 39")
        top = tab.js("document.querySelector('#scroll').scrollTop")
        tab.wheel("#scroll", -200)
        tab.wait(f"document.querySelector('#scroll').scrollTop < {top - 100}")
        grows = tab.js("document.querySelector('#scroll').scrollHeight")
        engine.may.release(150)
        tab.wait("!document.querySelector('#newest').hidden")
        at = tab.js("document.querySelector('#scroll').scrollTop")
        engine.may.release(150)
        tab.wait(f"document.querySelector('#scroll').scrollHeight > {grows + 600}")
        assert tab.js("document.querySelector('#scroll').scrollTop") == at
        tab.click("#newest")
        engine.may.release(10**4)
        end = "document.querySelector('#scroll').scrollHeight - document.querySelector('#scroll').clientHeight"
        tab.wait(f"{STILL} && {end} - document.querySelector('#scroll').scrollTop < 2")


def test_keys_alone_do_everything_and_a_screen_reader_hears_sentences(opened):
    with opened(Scripted("A *short* answer of some words. " * 3, chunk=64, delay=0.001)) as tab:
        tab.js("""window.heard = []; new MutationObserver(() => heard.push(document.querySelector('#status').textContent))
            .observe(document.querySelector('#status'), {childList: true, characterData: true, subtree: true})""")
        tab.type("One")
        tab.press("Enter", shift=True)
        tab.type("Two")
        assert tab.js("document.querySelector('#question').value") == "One\nTwo" and tab.count("article") == 0
        tab.press("Enter")
        tab.wait(f"document.querySelectorAll('article.answer').length === 1 && {STILL}")
        heard = tab.js("heard")
        assert heard[-1].startswith("The answer: A short answer of some words.") and len(heard) <= 3
        tab.js("document.querySelector('.skip').focus()")
        names = [tab.focus()]
        for _ in range(14):
            tab.press("Tab")
            names.append(tab.focus())
        order = ["To the question", "New conversation", "One", "Settings of this conversation", "Messages", "Copy", "Edit"]
        assert [name for name in names if name in order][:7] == order
        assert names.index("Regenerate") < names.index("Attach pictures") < names.index("Your question") < names.index("Send")
        tab.js("document.querySelector('#settings').focus()")
        tab.press("Enter")
        assert tab.focus() == "Name"
        tab.press("Escape")
        tab.wait("document.activeElement.id === 'settings' && !document.querySelector('dialog[open]')")


WIDE = (
    f"# {'Long' * 40}\n\n| {' | '.join(['column'] * 20)} |\n|{'-|' * 20}\n\n```\n{'code ' * 60}\n```\n\n"
    f"https://a.example/{'x' * 300}\n\n`{'y' * 200}`"
)


def test_a_phone_s_width_is_enough(opened):
    with opened(Scripted(WIDE, chunk=64), look={"width": 375, "height": 667, "phone": True}.items()) as tab:
        tab.tap("#question")
        tab.type("Wide things " + "z" * 200)
        tab.press("Enter")
        assert tab.count("article") == 0, "Enter begins a line on a touch screen"
        tab.tap("#send")
        tab.wait(f"document.querySelectorAll('article.answer').length === 1 && {STILL}")
        assert tab.js("document.documentElement.scrollWidth") == 375
        assert tab.js("document.querySelector('#scroll').scrollWidth - document.querySelector('#scroll').clientWidth") == 0
        small = """[...document.querySelectorAll('button')].filter((b) => b.checkVisibility({visibilityProperty: true}))
            .map((b) => [b.textContent.trim() || b.ariaLabel, b.getBoundingClientRect().height]).filter(([, h]) => h < 28)"""
        assert tab.js(small) == []
        assert not tab.js("document.querySelector('#side').checkVisibility({visibilityProperty: true})")
        tab.tap("#open")
        tab.wait("document.activeElement.id === 'close'")
        assert tab.js("document.querySelector('main').inert")
        tab.press("Escape")
        tab.wait("document.activeElement.id === 'open'")
        tab.tap("#open")
        tab.wait("document.querySelector('#side').getBoundingClientRect().x === 0")
        tab.tap("#new")
        tab.wait("document.querySelectorAll('article').length === 0 && !document.querySelector('main').inert")


def test_nothing_jumps_while_the_page_loads_and_answers(opened):
    with opened(Scripted("word and word\n\n" * 20, chunk=64, delay=0.001)) as tab:
        tab.js("""window.jumps = []; new PerformanceObserver((list) => jumps.push(...list.getEntries().map((e) => e.value)))
            .observe({type: 'layout-shift', buffered: true}); 0""")
        ask(tab, "One")
        ask(tab, "Two")
        tab.js("new Promise((done) => setTimeout(done, 100))")
        assert sum(tab.js("jumps")) < 0.1  # good by web.dev/cls; the row below an answer moves as it grows


AXE = Path(axe_core_python.__file__).with_name("axe.min.js")
EVERYTHING = "# Head\n\ntext *em* `code` [link](https://a.example)\n\n- item\n\n> quote\n\n| a |\n|---|\n| 1 |\n\n```py\nx\n```"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_no_fault_of_accessibility(opened, dark):
    with opened(Scripted(EVERYTHING, chunk=64), look={"dark": dark}.items()) as tab:
        tab.js(AXE.read_text() + "; 0")

        def faults():
            found = tab.js("axe.run().then((r) => r.violations.map((v) => [v.id, v.nodes.map((n) => n.html.slice(0, 200))]))")
            return [fault for fault in found if fault[0] != "scrollable-region-focusable"]

        assert faults() == []
        ask(tab, "Show everything.")
        tab.js("document.querySelector('article.user .below button').focus()")
        assert faults() == []
        tab.click("#settings")
        assert faults() == []
        tab.press("Escape")
        tab.wait("!document.querySelector('dialog[open]')")
        tab.look(375, 700, dark, phone=True)
        tab.tap("#open")
        tab.wait("document.querySelector('#side').getBoundingClientRect().x === 0")
        assert faults() == []
