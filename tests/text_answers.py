"""Typical answers of models, for tests of streamed rendering."""

_STEP = """\
def step_{i}(state, scale={i}):
    \"\"\"Step {i}: doubles what is there.\"\"\"
    return {{**state, "n": state["n"] * 2 + scale}}  # {i}

"""
_CODE = "".join(_STEP.format(i=i) for i in range(50))
_TABLE = """\
| name | bits | what |
|:-----|-----:|------|
| Q4_K | 4.5 | **good** |
| Q8_0 | 8.5 | `near` lossless, and a long cell that wraps |

end"""
_WIDE = [f"column {i}" for i in range(12)], ["---"] * 12, ["value"] * 12
ANSWERS = {
    "plain": "The capital of France is Paris.",
    "paragraphs": "A sliding window moves with every token. " * 6 + "\n\n" + "A chunk does not. " * 9 + "\n\nThat is all.",
    "headings": "# Title\nText right below.\n\n## Part\n\ntext\n### Deeper\n- a\n\nSetext\n======\n\nOther\n---\nend",
    "numbers": "Steps:\n1. Take the file.\n2. Open it.\n3. Read it to its end, which may take a while when it is long.\n"
    "\n4. Close it.\n",
    "long list": "Here:\n\n" + "".join(f"{i}. Item number {i}, with some words after it\n" for i in range(1, 61)) + "\nDone.",
    "lazy numbers": "1. one\n1. two\n1. three\n\nafter",
    "nested list": "- outer\n  - inner\n    1. innermost\n    2. second\n       more of it\n  - inner two\n\n"
    "- outer two\n\n  with a paragraph\n",
    "code in a list": "1. Do this:\n\n   ```sh\n   make run\n   make test\n"
    "   ```\n\n2. Then that:\n   ```\n   ls\n   ```\n3. Done\n",
    "code": f"Here it is:\n\n```python\n{_CODE}```\n\nIt has 200 lines.",
    "broken fence": "Look:\n\n```js\nconst a = `x`;\nif (a) {\n  run();\n}\n",
    "fence in fence": "````md\n# How\n```py\nprint(1)\n```\n````\nafter\n~~~\ntildes ``` inside\n~~~\n",
    "long line of code": "```\n" + "x" * 500 + "\nshort\n```\n",
    "table": _TABLE,
    "tall table": "| n | square |\n|--:|-------:|\n" + "".join(f"| {i} | {i * i} |\n" for i in range(70)) + "\nend",
    "wide table": "".join(f"| {' | '.join(row)} |\n" for row in _WIDE),
    "Chinese": "专家模型按需读取。" * 20 + "\n\n- 第一点:内存\n- 第二点:磁盘\n\n```python\nprint('你好')  # 注释\n```\n",
    "emoji": "Sure 👍🏽! Families 👩‍👩‍👧 and flags 🇫🇷, hearts ❤️ " * 8 + "\n\n* 🎉 party\n* ☕ coffee\n",
    "quotes": "> A quote that goes on for so long that it has to be wrapped on narrow screens.\n"
    "> - with a list\n>\n> > nested\nlazy\n\nend",
    "emphasis": "**bold *both* bold** and _it_ ~~gone~~ `a * b` 2 * 3 * 4 \\*no\\* **open\n"
    "\n[link](https://example.org/a_b) <https://example.org>\n",
    "hostile": "\x1b]0;owned\x07\x1b[2J\x1b[31mred\u202ecba &#x202e; <b>html</b>\n"
    "\n```\n\x1b[Hcode\r\x9b2J\n```\n[1]: https://example.org\n",
}
