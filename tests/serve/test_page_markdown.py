"""Markdown on the page: the same elements as CommonMark (markdown-it), and no effect of hostile text."""

import json
from html.parser import HTMLParser

import browser
import pytest
from fakes import FakeModel, Scripted
from markdown_it import MarkdownIt
from serving import serving

pytestmark = pytest.mark.skipif(browser.program() is None, reason="needs Chromium: apt-get install chromium")

# typical text of models, and corner cases of CommonMark 0.31
CASES = """
plain text\nin two lines, and a third  \nafter a hard break\\\nand another
====
# One\n\n## Two ##\n\n### Three #4\n#### Four\n##### Five\n###### Six\n####### seven\n#hashtag\n#\n## ##
====
Title\n=====\n\nUnder\n---\ntext\n***\n- - -\n___
====
*em* **strong** ***both*** _em_ __strong__ snake_case_name 2*3*4 **a*b*c** *a**b**c* ~~gone~~ ~kept~
====
**bold**text *a *b* **not bold ** ** nor* `code *no*` ``a ` b`` ` `` ` \\*plain\\* foo*bar* **foo "*bar*" foo** *(**x**)*
====
[link](https://a.example/x?y=1&z=2 "title") [*em* in](http://b.example/) [a](<https://c.example/a b>) [x] <https://d.example/q>
====
[a](https://a.example/(x)) [b](https://b.example/\\)) [c [d](https://e.example/) e](f) ![alt *x*](nothing) \\[no](g)
====
&amp; &lt;b&gt; &copy &#65; &#x41; &nosuch; &#0; <b>bold?</b> a < b > c
====
- a\n- b\n  - c\n    - d\n- e
====
1. one\n2. two\n   1. inner\n   2. inner too\n\n   a paragraph\n3. three
====
7) seven\n8) eight\n\nafter
====
- a\n\n- b\n\n\n- c
====
- a\n  second line\nlazy line\n- ```\n  code\n  ```\n- > quote\n-\n- after empty
====
* star\n+ plus\n- minus\n\ntext\n1. starts\n2) other\n\ntext\n2. cannot interrupt\n\ntext\n- interrupts
====
> quote\n> more\nlazy\n\n> ## head\n> - item\n>   > deep\n\nout
====
```python\ndef f():\n    return "*no*" < 1\n\n\n```\nafter
====
~~~ lang extra\na\n~~~~\n\n````\n```\n````\n\n```\nopen to the end\n
====
    indented *code*\n\n    more\n\ntext\n    not code
====
   ```\n   indented fence\n     by three\n   ```\n``` `` ```\nno fence
====
| a | b |\n|---|:-:|\n| 1 | 2 |\n| *x* | `y` |\n\nafter
====
a | b | c\n:-- | --: | ---\n1 | 2\n1 | 2 | 3 | 4\nx \\| y | z |\n\n| no | table |\n| - |
====
text before\n| a |\n|---|\n| 1 |\n> quote after
====
- item\n\n  | a | b |\n  |---|---|\n  | 1 | 2 |\n\n- item\n\n      code in item
====
1. **Bold**: text\n\n   ```sh\n   ls -l\n   ```\n\n2. **Next**: `x`\n   - sub\n\n     para\n   - sub
====
*foo\nbar* __a\nb__ **a\n\nb**
====
-\tafter a tab\n-   three spaces\n-      code after many\n\n10. ten\n11. eleven
====
*\n* \n\n*\n  text\n\n- [ ] task\n- [x] done
====
***a** b* **a *b*** *a **b*** __a _b_ c__ **a** **b** *_x_* a*"b"*c **`a**b`** *a`*`
====
Ünïcödé **日本語**。 *«x»* _é_ “**q**” 😀**x**😀
====
\\# not a heading\n\\- not a list\n1\\. nor this\n\\`not code\\` \\<b> \\\\ \\a
""".strip("\n").split("\n====\n")
BLOCKS = {
    "p",
    "ul",
    "ol",
    "li",
    "blockquote",
    "pre",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "hr",
    *(f"h{n}" for n in range(1, 7)),
}

TREE = """[...document.querySelectorAll('.answer .markdown')].map(function tree(node) {
    if (node.nodeType === 3) return node.data;
    const inner = (of) => [...of.childNodes].map(tree);
    if (node.classList.contains('code')) return ['pre', ['code', node.querySelector('code').textContent]];
    if (node.classList.contains('table')) return tree(node.firstChild);
    const name = node.tagName.toLowerCase();
    const more = name === 'a' ? {href: node.getAttribute('href')} : name === 'ol' ? {start: node.start}
        : node.className && 'td th'.includes(name) ? {align: node.className} : null;
    return [name, ...(more ? [more] : []), ...inner(node)];
})"""


class Tree(HTMLParser):
    """HTML as lists: a name, attributes that count, children."""

    def __init__(self, html):
        super().__init__()
        self.stack = [["div"]]
        self.feed(html)
        self.root = self.stack[0]

    def handle_starttag(self, name, attributes):
        found, node = dict(attributes), ["del" if name == "s" else name]
        if name == "a":
            node.append({"href": found["href"]})
        if name == "ol":
            node.append({"start": int(found.get("start", 1))})
        if "style" in found:
            node.append({"align": found["style"].partition(":")[2]})
        if name == "img":  # pictures are not loaded: their alternative text
            self.handle_data(found["alt"])
            return
        self.stack[-1].append(node)
        if name not in ("br", "hr"):
            self.stack.append(node)

    def handle_startendtag(self, name, attributes):
        self.handle_starttag(name, attributes)

    def handle_endtag(self, name):
        self.stack.pop()

    def handle_data(self, data):
        self.stack[-1].append(data)


def plain(node):
    """A tree without invisible differences: levels of headings, white space around blocks, texts in two pieces."""
    name, *rest = node
    found = [f"h{min(6, int(name[1]))}" if name[0] == "h" and name[1:].isdigit() else name]
    for each in rest:
        if isinstance(each, list):
            found.append(plain(each))
        elif isinstance(each, str) and isinstance(found[-1], str) and len(found) > 1:
            found[-1] += each
        else:
            found.append(each)
    blocks = any(isinstance(each, list) and each[0] in BLOCKS for each in found)
    texts = [found[0]]
    for i, each in enumerate(found[1:], 1):
        if isinstance(each, str) and name not in ("code", "pre"):
            each = each.strip("\n") if blocks or found[i - 1 : i] == [["br"]] else each.lstrip("\n")
            each = each.rstrip() if name in BLOCKS and i == len(found) - 1 else each
        if each != "" and each != "\n":
            texts.append(each)
    if name == "code":
        texts[1:] = [text.rstrip("\n") for text in texts[1:]]
    return [text for text in texts if text != ""]


def lowered(node):
    """Headings two levels down, as the page has them."""
    name, *rest = node
    name = f"h{min(6, int(name[1]) + 2)}" if name[0] == "h" and name[1:].isdigit() else name
    return [name, *(lowered(each) if isinstance(each, list) else each for each in rest)]


@pytest.fixture(scope="module")
def client():
    with serving(FakeModel(Scripted("", chunk=64))) as made:
        yield made


INSIDE = "document.querySelectorAll('.markdown :is(script, img, svg, iframe, form, input, object, style, meta)').length"
HANDLERS = (
    "[...document.querySelectorAll('.markdown *')].flatMap((e) => e.getAttributeNames()).filter((n) => n.startsWith('on'))"
)


def shown(chromium, client, answers):
    """A page with a conversation that has these answers."""
    tab = chromium.tab(str(client.base_url))
    messages = [
        m
        for text in answers
        for m in ({"role": "user", "content": "?"}, {"role": "assistant", "content": text, "finish": "stop"})
    ]
    chat = json.dumps({"id": "1", "title": "t", "changed": 1, "messages": messages})
    tab.js(f"localStorage['llamacli.chat.1'] = {json.dumps(chat)}")
    tab.js("""localStorage['llamacli.chats'] = '[{"id": "1", "title": "t", "changed": 1}]'; sessionStorage.clear()""")
    tab.reload()
    tab.wait(f"document.querySelectorAll('.answer').length === {len(answers)}")
    return tab


def test_elements_are_those_of_commonmark(chromium, client):
    reference = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    tab = shown(chromium, client, CASES)
    wrong = []
    for text, found in zip(CASES, tab.js(TREE), strict=True):
        expected = plain(lowered(Tree(reference.render(text)).root))
        if plain(found) != expected:
            wrong.append(f"{text}\n  expected {expected}\n  found    {plain(found)}")
    assert not wrong, "\n\n".join(wrong)
    assert tab.troubles() == []
    tab.close()


HOSTILE = [
    "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'><svg/onload=pwned=1>",
    "[a](javascript:pwned=1) [b](JaVaScRiPt:pwned=1) [c](java&#115;cript:pwned=1) [d](<java\tscript:pwned=1>)"
    " [e](\x01javascript:pwned=1)",
    "[f](data:text/html,<script>pwned=1</script>) [g](vbscript:x) [h](file:///etc/passwd) [i](/v1/models) [j](//evil.example)",
    "![x](https://evil.example/track.png) ![y](javascript:pwned=1) ![z](data:image/svg+xml,<svg onload=pwned=1>)",
    '<javascript:pwned=1> <data:text/html,x> https://ok.example/"onmouseover=pwned=1 http://a.example/<script>',
    "```html\n<script>window.pwned = 1</script>\n```\n`<img src=x onerror=pwned=1>`\n\n"
    "| <script>pwned=1</script> |\n|---|\n| <b onclick=pwned=1> |",
    '```"><script>pwned=1</script>\nx\n```\n\n# <iframe src=javascript:pwned=1>\n\n> <form action=https://evil.example><input>',
    '[![x](https://evil.example/a.png)](https://evil.example) [a](https://user:pw@evil.example "t<script>")',
]


def test_what_a_hostile_model_says_does_nothing(chromium, client):
    tab = shown(chromium, client, HOSTILE)
    tab.js("new Promise((done) => setTimeout(done, 200))")
    assert tab.js("window.pwned") is None
    assert (
        tab.js("document.querySelectorAll('.markdown :is(script, img, svg, iframe, form, input, object, style, meta)').length")
        == 0
    )
    links = tab.js("[...document.querySelectorAll('.markdown a')].map((a) => [a.protocol, a.target, a.rel, a.host])")
    assert links and all(
        link[:3] == ["https:", "_blank", "noopener noreferrer nofollow"] or link[0] == "http:" for link in links
    )
    asked = [event["request"]["url"] for event in tab.events("Network.requestWillBeSent")]
    assert all(url.startswith((str(client.base_url), "data:")) for url in asked), asked
    assert tab.troubles() == []
    tab.close()


def test_text_that_is_made_to_take_long_is_shown_all_the_same(chromium, client):
    n = 2000
    slow = [
        *("*a **" * n, "[" * n, "![[](" * n, "`a``" * n, "<" * n, "_a__b" * n, "](" * n, "&#" * n, "~~a" * n),
        *("> " * n + "x", ">" * n, "- " * n + "x", "".join(" " * i + "- x\n" for i in range(400)), "1. " * n),
        *("|" * n, "a|b\n-|-\n" * n, "a|\n" * n, "# " * n, "\\" * n, " " * n + "x", "```\n" * n, "\t" * n, "\n" * n),
        *("[a](" * n, "[a](<" * n, "[a](b 'c" * n, "**a" * n + "b**" * n, "https://" * n, "((((https://a.example/" + ")" * n),
        "- a\n\n" * n,
    ]
    tab = shown(chromium, client, slow)
    assert tab.troubles() == []
    tab.close()
