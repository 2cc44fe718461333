"""Markdown to lines of a terminal.

In: Markdown, the columns there are. Out: lines of styled text, wrapped between words to the columns; lines of code are not
wrapped, so that they can be copied. A model's text is untrusted: control characters, escapes and bidirectional marks are shown
as text, never sent to the terminal. HTML and link definitions are shown as written; a line break stays a line break.

Nothing here depends on what follows later in the text: a block is rendered the same whether it stands alone or in its document
(live.py needs that). So numbers in lists are not aligned, and a blank line stands where the source has one.
"""

import re
from functools import cache

from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode
from pygments.token import Comment, Generic, Keyword, Name, Number, Operator, String, Token
from rich.cells import cell_len
from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style
from rich.syntax import ANSISyntaxTheme, Syntax
from rich.text import Text

from llamacli.cli.console import visible

NARROWEST = 20  # fewest columns; on narrower terminals the terminal wraps the lines itself
HIGHLIGHTED = 400, 2000  # lines before a line of code that its colours may depend on; characters of a line that is coloured
CELL = 6  # fewest columns of a table's cell; with fewer, rows become lists
THEME = ANSISyntaxTheme(
    {
        Token: Style(),
        Comment: Style(dim=True, italic=True),
        Keyword: Style(color="magenta"),
        Operator.Word: Style(color="magenta"),
        String: Style(color="green"),
        Number: Style(color="cyan"),
        Name.Function: Style(color="blue"),
        Name.Class: Style(color="blue", bold=True),
        Name.Builtin: Style(color="cyan"),
        Name.Decorator: Style(color="yellow"),
        Name.Tag: Style(color="blue"),
        Name.Attribute: Style(color="cyan"),
        Generic.Deleted: Style(color="red"),
        Generic.Inserted: Style(color="green"),
        Generic.Heading: Style(bold=True),
    }
)
INLINE = {"strong": "bold", "em": "italic", "s": "strike", "code_inline": "cyan"}


@cache
def _parser() -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"]).disable("reference")


@cache
def _canvas() -> Console:
    return Console(width=80, force_terminal=True, legacy_windows=False)


def parse(text: str) -> list[SyntaxTreeNode]:
    """The blocks of `text`, from top to bottom; `map` of each are its lines."""
    return SyntaxTreeNode(_parser().parse(text)).children


def blank_before(node: SyntaxTreeNode, lines: list[str]) -> bool:
    """Whether a blank line of the source stands before a block."""
    first = node.map[0]
    return first > 0 and re.fullmatch(r"[\s>]*", lines[first - 1]) is not None


class Renderer:
    """Blocks to lines. `coloured`: styles may be used; without them headings and code keep their marks. `signs`: a terminal
    that shows bullets and rules.
    """

    def __init__(self, coloured: bool = True, signs: bool = True):
        self.coloured = coloured
        self._bullet, self._bar, self._rule = ("•", "│", "─") if signs else ("*", "|", "-")

    def page(self, text: str, width: int) -> list[Text]:
        """A whole document."""
        return self._stacked(parse(text), text.split("\n"), max(width, NARROWEST))

    def block(self, node: SyntaxTreeNode, lines: list[str], width: int, number: int | None = None) -> list[Text]:
        """One block of the document `lines`. `number`: of an ordered list's first item, if not its own."""
        width = max(width, NARROWEST)
        if node.type == "heading":
            return self._heading(node, width)
        if node.type in ("bullet_list", "ordered_list"):
            return self._list(node, lines, width, number)
        if node.type in ("fence", "code_block"):
            return self._code_block(node)
        if node.type == "blockquote":
            inner = self._stacked(node.children, lines, width - 2)
            return [Text.assemble((f"{self._bar} ", "dim"), line) for line in inner]
        if node.type == "hr":
            return [Text(self._rule * min(width, 40), "dim")]
        if node.type == "table":
            return self._table(node, width)
        return self._wrapped(self._inline(node), width)

    def ansi(self, line: Text) -> str:
        """A line as the terminal takes it."""
        if not self.coloured:
            return line.plain
        console = _canvas()
        return "".join(
            part.style.render(part.text, color_system=ColorSystem.STANDARD) if part.style else part.text
            for part in line.render(console, end="")
        )

    def fence(self, info: str) -> Text:
        """The line that opens or closes a block of code."""
        return Text(f"```{visible(info.strip())}", "dim")

    def code(self, lines: list[str], info: str, last: int | None = None) -> list[Text]:
        """The last `last` lines of code in colour; the lines before them are their context."""
        lines = [visible(line.expandtabs(4)) for line in lines]
        last = len(lines) if last is None else last
        lines = lines[-(last + HIGHLIGHTED[0]) :]
        language = (info.split() or [""])[0].lower()
        if self.coloured and language and max(map(len, lines), default=0) <= HIGHLIGHTED[1]:
            code = Syntax("", language, theme=THEME).highlight("\n".join(lines))
            coloured = code.split("\n", allow_blank=True)
            if [line.plain for line in coloured[: len(lines)]] == lines:  # a lexer may strip white space
                return list(coloured[len(lines) - last : len(lines)])
        return [Text(line, "" if language else "cyan") for line in lines[len(lines) - last :]]

    def _stacked(self, nodes: list[SyntaxTreeNode], lines: list[str], width: int) -> list[Text]:
        result: list[Text] = []
        for node in nodes:
            if result and (node.type == "heading" or blank_before(node, lines)):
                result.append(Text())
            result += self.block(node, lines, width)
        return result

    def _heading(self, node: SyntaxTreeNode, width: int) -> list[Text]:
        text = self._inline(node)
        if not self.coloured:
            text = Text("#" * int(node.tag[1]) + " ") + text
        text.stylize("bold underline" if node.tag == "h1" else "bold" if node.tag < "h4" else "bold italic")
        return self._wrapped(text, width)

    def _list(self, node: SyntaxTreeNode, lines: list[str], width: int, number: int | None) -> list[Text]:
        result: list[Text] = []
        number = int(node.attrs.get("start", 1)) if number is None else number
        for n, item in enumerate(node.children):
            if result and blank_before(item, lines):
                result.append(Text())
            sign = f"{number + n}{node.children[0].markup} " if node.type == "ordered_list" else f"{self._bullet} "
            inner = self._stacked(item.children, lines, width - len(sign)) or [Text()]
            for i, line in enumerate(inner):
                result.append(Text.assemble(sign if i == 0 else " " * len(sign) if line else "", line))
        return result

    def _code_block(self, node: SyntaxTreeNode) -> list[Text]:
        code = self.code(node.content.removesuffix("\n").split("\n") if node.content else [], node.info)
        if node.type == "code_block":
            return [Text.assemble("    ", line) for line in code]
        return [self.fence(node.info), *code, self.fence("")]

    def _table(self, node: SyntaxTreeNode, width: int) -> list[Text]:
        rows = [[self._inline(cell) for cell in row.children] for part in node.children for row in part.children]
        sides = ["right" if "right" in str(cell.attrs) else "left" for cell in node.children[0].children[0].children]
        widths = [max(1, *(_widest(row[i]) for row in rows)) for i in range(len(sides))]
        room = width - 2 * (len(widths) - 1)
        if sum(min(w, CELL) for w in widths) > room:
            return self._records(rows, width)
        while (over := sum(widths) - room) > 0:
            widest = max(range(len(widths)), key=widths.__getitem__)
            next_one = max([CELL, *(w for w in widths if w < widths[widest])])
            widths[widest] -= max(1, min(over, widths[widest] - next_one))
        for cell in rows[0]:
            cell.stylize("bold")
        result = []
        for n, row in enumerate(rows):
            cells = [self._wrapped(cell, w) for cell, w in zip(row, widths, strict=True)]
            for i in range(max(map(len, cells))):
                line = Text()
                for cell, w, side in zip(cells, widths, sides, strict=True):
                    part = cell[i] if i < len(cell) else Text()
                    gap = " " * max(0, w - part.cell_len)
                    line = Text.assemble(line, "  " if line else "", *((gap, part) if side == "right" else (part, gap)))
                line.rstrip()
                result.append(line)
            if n == 0:
                result.append(Text("  ".join(self._rule * w for w in widths), "dim"))
        return result

    def _records(self, rows: list[list[Text]], width: int) -> list[Text]:
        """A table with too many columns: a line for each cell, a blank line between rows."""
        result: list[Text] = []
        for row in rows[1:]:
            result += [Text()] if result else []
            for head, cell in zip(rows[0], row, strict=True):
                result += self._wrapped(Text.assemble((head.plain, "bold"), ": ", cell), width)
        return result

    def _inline(self, node: SyntaxTreeNode, style: str = "") -> Text:
        """The text inside a block, in its styles."""
        if node.type in ("text", "code_inline"):
            return Text(visible(node.content), f"{style} {INLINE.get(node.type, '')}".strip())
        if node.type in ("softbreak", "hardbreak"):
            return Text("\n")
        style = f"{style} {INLINE.get(node.type, '')}".strip()
        text = Text().join(self._inline(child, style) for child in node.children)
        if node.type in ("link", "image"):
            address = visible(str(node.attrs.get("href") or node.attrs.get("src") or ""))
            text.stylize("underline" if node.type == "link" else "italic")
            if address and text.plain not in (address, address.removeprefix("mailto:")):
                text = Text.assemble(text, (f" ({address})", "dim"))
        return text

    def _wrapped(self, text: Text, width: int) -> list[Text]:
        lines = []
        for line in text.split("\n", allow_blank=True):
            lines += line.wrap(_canvas(), width, overflow="fold") if line else [line]
        for line in lines:
            line.rstrip()
        return lines


def _widest(text: Text) -> int:
    return max(cell_len(line) for line in text.plain.split("\n"))
