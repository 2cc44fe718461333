"""Marks the characters of a rendered prompt that the template wrote: only these may become special tokens.

In: the special tokens' names. Out: `Marks`. `mark` replaces the first character of a name, or of a text that may become one
("<|" + role + "|>"), by a stand-in that occurs nowhere else. The template's own strings are marked, text of messages is not.
`split` makes tokens of marked names only; `plain` restores the characters. Stand-ins are characters of Unicode's private use
areas, one for each first character, so lengths and slices stay as they were.
"""

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain, islice

from llamacli.errors import PromptError
from llamacli.text.tokenizer import Names

_PRIVATE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
_PRIVATE_CHARACTER = re.compile("[\ue000-\uf8ff\U000f0000-\U000ffffd\U00100000-\U0010fffd]")


def marks(names: Names, texts: Iterable[str]) -> "Marks":
    """Marks for `names` with stand-ins that occur in none of `texts`; the same object for the same stand-ins."""
    firsts = {name[0] for name in names.ids}
    taken = set().union(*(_PRIVATE_CHARACTER.findall(text) for text in chain(texts, names.ids)))
    free = (character for character in map(chr, chain(*_PRIVATE)) if character not in taken)
    stand_ins = "".join(islice(free, len(firsts) + 1))
    if len(stand_ins) <= len(firsts):
        raise PromptError("the messages use up all of Unicode's private use areas: expected ordinary text")
    return _marks(names, stand_ins)


@lru_cache(8)
def _marks(names: Names, stand_ins: str) -> "Marks":
    return Marks(names, stand_ins)


class Marks:
    """See the module. `stand_ins`: one character for each first character of names, and one more."""

    def __init__(self, names: Names, stand_ins: str):
        self._names, self._wall = names, stand_ins[0]
        self._stand_in = dict(zip(sorted({name[0] for name in names.ids}), stand_ins[1:], strict=True))
        self._back = {ord(code): first for first, code in self._stand_in.items()} | {ord(self._wall): ""}
        self._pattern = re.compile(f"[{re.escape(stand_ins[1:])}]") if self._stand_in else None
        # "<|" alone is marked, since the rest of a name may follow. If names begin with a letter, only whole names are marked.
        self._heads = {name[:2] for name in names.ids if len(name) > 2 and not name[0].isalnum()}

    def mark(self, text: str, names: Names | None = None) -> str:
        """`text` with what is or may become the name of a special token marked; with `names`, whole ones of these only."""
        found = {start for start, _, _ in (names or self._names).find(text)}
        if names is None:
            found |= {i for i in range(len(text) - 1) if text[i : i + 2] in self._heads}
        if not found:
            return text
        characters = list(text)
        for i in found:
            characters[i] = self._stand_in[characters[i]]
        return "".join(characters)

    def marked(self, text: str) -> bool:
        """Whether anything in `text` is marked."""
        return bool(self._pattern and self._pattern.search(text))

    def plain(self, text: str) -> str:
        """`text` without marks."""
        return text.translate(self._back) if self.marked(text) else text

    def split(self, text: str) -> Iterator[str | int]:
        """The text split at marked names: these as ids, the text between them without marks, adjacent texts joined, nothing
        empty.
        """
        if not self.marked(text):
            yield from filter(None, [text])
            return
        walled = self._pattern.sub(lambda match: self._wall + match[0], text)  # no name is found across the separator
        shown = "".join(walled).translate({code: first for code, first in self._back.items() if first})
        done = 0
        for start, end, id in self._names.find(shown):
            if shown[start - 1 : start] == self._wall:
                yield from filter(None, [shown[done:start].replace(self._wall, "")])
                yield id
                done = end
        yield from filter(None, [shown[done:].replace(self._wall, "")])
