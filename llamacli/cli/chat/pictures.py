"""Pictures in a conversation: a line of a question names the file and a hash of its contents.

In: paths that are typed, dropped on the terminal or asked for with /image. Out: such lines; and for the model, a message's
content with pictures in the place of the lines. Since the line is text, a conversation is stored, continued and exported with
its pictures; the hash detects a changed file.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from llamacli.errors import PictureError

if TYPE_CHECKING:
    from llamacli.vision.pictures import Picture

REFERENCE = re.compile(r'!\[(?P<size>\d{1,5}x\d{1,5})\]\((?P<path>[^\n]{1,4096}) "picture (?P<digest>[0-9a-f]{32})"\)')
_TOKEN = re.compile(r"""'[^'\n]+'|"[^"\n]+"|(?:\\.|[^\s\\])+""")
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


def reference(picture: "Picture", path: Path) -> str:
    """The line that stands for a picture."""
    width, height = picture.image.size
    return f'![{width}x{height}]({path.absolute()} "picture {picture.digest.hex()}")'


def content(text: str, look: Callable[[str, str], object]) -> str | list[dict]:
    """A message's content: `text`, or its parts where it names pictures; `look(path, digest)` returns the view for the
    model.
    """
    parts, said = [], []

    def add_text() -> None:
        if words := "\n".join(said).strip("\n"):
            parts.append({"type": "text", "text": words})
        said.clear()

    for line in text.split("\n"):
        if found := REFERENCE.fullmatch(line):
            add_text()
            parts.append({"type": "image", "image": look(found["path"], found["digest"])})
        else:
            said.append(line)
    if not parts:
        return text
    add_text()
    return parts


def read_again(path: str, digest: str) -> "Picture":
    """The picture that a line names. PictureError if its file is missing or has changed."""
    from llamacli.vision.pictures import read_picture, shown

    picture = read_picture(path)
    if picture.digest.hex() != digest:
        raise PictureError(
            f"{shown(path)}: expected the picture of this conversation, found another; /undo, or put the first one back"
        )
    return picture


def paths_in(text: str) -> list[Path]:
    """The words of /image, quoted or escaped, as paths."""
    return [_path(found[0]) for found in _TOKEN.finditer(text)]


def dropped(text: str) -> tuple[list[Path], str]:
    """The picture files named in typed text, as terminals write them when files are dropped; and the rest of the text.

    A word counts if it is a file's name with the suffix of a picture.
    """
    paths, rest, done = [], "", 0
    for found in _TOKEN.finditer(text):
        path = _path(found[0])
        if path.suffix.lower() in _ENDINGS and _is_file(path):
            paths.append(path)
            rest, done = rest + text[done : found.start()], found.end()
    return paths, (rest + text[done:]).strip() if paths else text


def _path(word: str) -> Path:
    if word[0] in "'\"":
        word = word[1:-1]
    elif os.sep == "/":
        word = re.sub(r"\\(.)", r"\1", word)
    if word.startswith("file://"):
        word = unquote(word.removeprefix("file://").removeprefix("localhost"))
    return Path(os.path.expanduser(word))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
