"""Markdown that streams to a terminal: the scrollback ends as one rendering of the whole, whatever the pace and the size."""

import random
import re

import pyte
import pytest
from terminal import Screen
from text_answers import ANSWERS

from llamacli.cli.chat.live import Live
from llamacli.cli.chat.markdown import Renderer

SIZES = [(40, 12), (80, 24), (200, 50)]
PACES = {3: 1 / 3, 300: 1 / 300}  # tokens a second: seconds between two tokens


class Paper:
    """A screen of `columns` by `rows` that remembers what scrolled away."""

    def __init__(self, columns, rows):
        self.columns, self.rows, self.raw = columns, rows, ""
        self.screen = Screen(columns, rows, history=20_000, ratio=0.5)
        self._stream = pyte.Stream(self.screen)

    def write(self, text):
        self.raw += text
        self._stream.feed(text)

    def size(self):
        return self.columns, self.rows

    @property
    def lines(self):
        past = ["".join(line[x].data for x in range(self.columns)) for line in self.screen.history.top]
        return "\n".join(line.rstrip() for line in [*past, *self.screen.display]).rstrip("\n").split("\n")


def tokens(text, seed=0):
    """`text` in pieces of one to eight characters."""
    chance, at = random.Random(seed), 0
    while at < len(text):
        size = chance.randint(1, 8)
        yield text[at : at + size]
        at += size


def streamed(text, columns, rows, pause=1 / 300, seed=0, meanwhile=lambda n, paper, live: None):
    paper, clock = Paper(columns, rows), [0.0]
    live = Live(Renderer(), paper.write, paper.size, lambda: clock[0])
    for n, token in enumerate(tokens(text, seed)):
        clock[0] += pause
        live.feed(token)
        meanwhile(n, paper, live)
    live.close()
    return paper


def at_once(text, columns, rows):
    paper, renderer = Paper(columns, rows), Renderer()
    for line in renderer.page(text.replace("\r", "\n"), columns - 1):
        paper.write(renderer.ansi(line) + "\r\n")
    return paper


def check(name, columns, rows, pause, seed=0):
    assert streamed(ANSWERS[name], columns, rows, pause, seed).lines == at_once(ANSWERS[name], columns, rows).lines


@pytest.mark.parametrize("name", [name for name in ANSWERS if name not in ("code", "long list", "tall table")])
def test_the_scrollback_is_one_rendering_of_the_whole(name):
    check(name, 40, 12, PACES[300])


@pytest.mark.slow
@pytest.mark.parametrize("pace", PACES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ANSWERS)
def test_the_scrollback_is_one_rendering_at_every_size_and_pace(name, size, pace):
    check(name, *size, PACES[pace], seed=pace)


def test_the_cut_of_the_tokens_does_not_matter():
    for seed in range(5):
        check("nested list", 40, 12, PACES[3], seed)


def test_code_of_200_lines_is_printed_as_it_comes_and_once():
    seen = []
    streamed(ANSWERS["code"], 80, 24, PACES[300], meanwhile=lambda n, paper, live: n == 900 and seen.extend(paper.lines))
    assert "def step_0(state, scale=0):" in seen  # above the screen already, though the block has not ended
    end = streamed(ANSWERS["code"], 80, 24, PACES[300]).lines
    assert all(end.count(f"def step_{i}(state, scale={i}):") == 1 for i in range(50))


def test_an_unfinished_block_fits_the_screen():
    """A table cannot be printed before its end; the last rows of it are seen while it grows."""
    seen = []
    streamed(ANSWERS["tall table"], 40, 12, PACES[3], meanwhile=lambda n, paper, live: n == 100 and seen.extend(paper.lines))
    assert len(seen) <= 12
    assert re.search(r"\d+ +\d+", seen[-2])


def test_growing_text_is_appended_not_drawn_again():
    paper = streamed("word " * 12, 80, 24, PACES[3])
    assert paper.raw.count("\x1b[J") <= 1


def test_a_resized_terminal_shows_nothing_twice():
    text = "# Head\n\n" + "".join(f"word{i} " for i in range(60)) + "\n\n- one\n- two\n"

    def widen(n, paper, live):
        if n == 40:
            paper.columns = 80
            paper.screen.resize(24, 80)

    lines = streamed(text, 60, 24, PACES[3], meanwhile=widen).lines
    words = re.findall(r"word\d+", " ".join(lines))
    assert len(words) == len(set(words)) >= 55  # a word may be cut where the terminal was when it changed


@pytest.mark.parametrize("coloured", [True, False])
def test_nothing_that_a_model_says_steers_the_terminal(coloured):
    renderer = Renderer(coloured)
    text = "".join(renderer.ansi(line) + "\n" for line in renderer.page(ANSWERS["hostile"].replace("\r", "\n"), 79))
    assert re.fullmatch(r"(?:[^\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]|\x1b\[[0-9;]*m)*", text)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", text)
    for sign in (r"\x1b]0;owned\x07", r"\x1b[31mred\u202ecba \u202e", r"\x9b2J", "<b>html</b>", "[1]: https://example.org"):
        assert sign in shown
    assert coloured or "\x1b" not in text


def test_marks_become_styles():
    renderer = Renderer()
    bold, table = renderer.page("a **b** `c`", 40)[0], renderer.page(ANSWERS["table"], 60)
    assert bold.plain == "a b c"
    assert [(span.start, span.end, str(span.style)) for span in bold.spans] == [(2, 3, "bold"), (4, 5, "cyan")]
    assert table[0].plain.split() == ["name", "bits", "what"]
    assert table[2].plain.startswith("Q4_K   4.5  good")  # numbers to the right


def test_code_keeps_its_words_and_gets_colours():
    code = Renderer().code(["def f(x):", "    return 1  # one"], "python")
    assert [line.plain for line in code] == ["def f(x):", "    return 1  # one"]
    assert "\x1b[35mdef\x1b[0m" in Renderer().ansi(code[0])
    assert Renderer(coloured=False).ansi(code[0]) == "def f(x):"


def test_words_are_not_broken_and_tables_too_wide_become_lists():
    lines = [line.plain for line in Renderer().page("The experts of this model are read from the disk when needed.", 20)]
    assert lines == ["The experts of this", "model are read from", "the disk when", "needed."]
    assert "column 3: value" in [line.plain for line in Renderer().page(ANSWERS["wide table"], 40)]
