"""Breaks an answer between words at the edge of a terminal, while it streams.

In: pieces of text, as they come. Out: the same pieces, written at once; a word that does not fit is erased from the end of the
line and written on the next one. Used on a terminal only: in a pipe the bytes are the model's.
"""

import unicodedata

TAB = 8
JOINERS = "\u200d\ufe0f"  # modifiers of emoji


class WordWrap:
    """`width`: columns of the terminal."""

    def __init__(self, width: int):
        self._width = max(10, width)
        self._column, self._word = 0, ""  # the cursor's column; the text since the last space, if it may still move

    def push(self, text: str) -> str:
        """What to write for the next piece."""
        out: list[str] = []
        for c in text:
            self._put(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode(), out)
        return "".join(out)

    def _put(self, c: str, out: list[str]) -> None:
        if c == "\n":
            self._column, self._word = 0, ""
            out.append(c)
            return
        if c in " \t":
            self._word = ""
            step = TAB - self._column % TAB if c == "\t" else 1
            if self._column + step >= self._width:  # a space at the edge is the break
                self._column = 0
                out.append("\n")
            else:
                self._column += step
                out.append(c)
            return
        wide = columns(c)
        if self._column + wide > self._width - 1:
            begun = sum(map(columns, self._word))
            if 0 < begun < self._column and begun + wide < self._width - 1:
                out.append(f"\x1b[{begun}D\x1b[K\n{self._word}")
                self._column = begun
            else:
                out.append("\n")
                self._column, self._word = 0, ""
        self._column += wide
        self._word = "" if wide == 2 * len(c) else self._word + c  # a line may break after any wide character
        out.append(c)


def columns(text: str) -> int:
    """Columns that characters take: none for those that combine, two for wide ones."""
    return sum(0 if unicodedata.combining(c) or c in JOINERS else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)
