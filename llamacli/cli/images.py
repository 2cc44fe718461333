"""Pictures on the command line: reads them before the model is loaded, encodes them with progress, describes each in a line.

In: names of files, bytes of stdin. Out: pictures, views (vision/sight.py), contents of messages.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from llamacli.cli import signals
from llamacli.cli.console import Console, amount, count
from llamacli.cli.inputs import may_be_picture, read_stdin_bytes
from llamacli.cli.progress import Meter
from llamacli.errors import PictureError

MOST_BYTES = 64 << 20  # of a picture on stdin

if TYPE_CHECKING:
    from llamacli.vision.pictures import Picture
    from llamacli.vision.sight import View


def read_pictures(names: Sequence[str], console: Console, send: bool = False) -> list["Picture | str"]:
    """The pictures of these files; - is stdin. PictureError for the first file that is not one. `send`: in the form that a
    server takes.
    """
    if not names:
        return []
    from llamacli.vision.pictures import read_picture

    if send:
        return [sent(read_stdin_bytes(console) if name == "-" else name) for name in names]
    return [read_picture(read_stdin_bytes(console), "stdin") if name == "-" else read_picture(name) for name in names]


def sent(source: bytes | str) -> str:
    """A file, or bytes of stdin, in the form that a server takes. PictureError for a picture that could not be read here
    either.
    """
    from llamacli.client.remote import data_url
    from llamacli.vision.pictures import file_bytes, read_picture, shown

    if isinstance(source, str) and source.startswith("data:"):
        read_picture(source)
        return source
    data = source if isinstance(source, bytes) else file_bytes(Path(source))
    read_picture(data, "stdin" if isinstance(source, bytes) else shown(source))
    return data_url(data)


def listed_picture(source: str, folder: Path) -> "Picture":
    """A picture that a file of prompts names: a `data:` URL, or a path, from the file's `folder` on if it is relative.

    PictureError unless it is a regular file: a file of prompts must not make the program wait for a pipe or a device.
    """
    from llamacli.vision.pictures import read_picture, shown

    if source.startswith(("data:", "http:", "https:")):
        return read_picture(source)
    path = folder / source
    with suppress(OSError, ValueError):  # not a path: read_picture reports it
        if path.exists() and not path.is_file():
            raise PictureError(f"{shown(source)}: expected a picture, found no plain file; name one")
    return read_picture(path, shown(source))


def picture_in(data: bytes, send: bool = False) -> "Picture | str | None":
    """The picture in bytes of stdin; None for a text. `send`: in the form that a server takes."""
    if may_be_picture(data):
        from llamacli.vision.pictures import looks_like_picture, read_picture

        if looks_like_picture(data):
            return sent(data) if send else read_picture(data, "stdin")
    return None


def look(model, pictures: Sequence["Picture"], most_tiles: int | None, console: Console) -> list["View"]:
    """Encode pictures with the vision tower. Shows progress, and a line about each picture."""
    if not pictures:
        return []
    from llamacli.vision.sight import MANY, describe

    sight = model.sight
    signals.interrupts(sight)
    for notice in sight.notices:
        console.note(notice)
    if len(pictures) > MANY:
        console.warn(f"{len(pictures)} pictures: Llama 4 was tested with {MANY}; more may confuse it")
    views = []
    for picture in pictures:
        meter, began = Meter("looking"), time.monotonic()

        def follow(name: str, done: float, of: int, meter: Meter = meter) -> None:
            meter.update(done, of, f"looking at {name}, {min(of, int(done) + 1)}/{of}")

        meter.update(0, 0, f"looking at {picture.name}")
        sight.follow = follow
        try:
            with console.waiting(lambda meter=meter: meter.bar(console.width() - 1, *console.signs())):
                views.append(sight.look(picture, most_tiles))
        finally:
            sight.follow = None
        took = f", {time.monotonic() - began:.1f} s" if console.verbose else ""
        console.note(describe(views[-1]) + took)
    return views


class Sights:
    """The encoded pictures of a batch: those before each prompt, and those that a line names."""

    def __init__(self, model, pictures: Sequence["Picture"], folder: Path, most_tiles: int | None, console: Console):
        """`pictures` come before each prompt. `folder`: the folder of relative paths in lines."""
        self._model, self._folder, self._most_tiles = model, folder, most_tiles
        self._before = look(model, pictures, most_tiles, console)

    def before(self, sources: Sequence[str]) -> list["View"]:
        """The views before a prompt that names these pictures. PictureError names one that cannot be encoded."""
        return [*self._before, *map(self._look, sources)]

    def within(self, messages: Sequence[dict]) -> tuple[list[dict], list["View"]]:
        """Messages with a view in place of each picture; and all views, in order."""
        from llamacli.text.template import picture_of

        views: list[View] = []

        def part(found: dict) -> dict:
            if (source := picture_of(found)) is None:
                return found
            views.append(self._look(source))
            return {"type": "image", "image": views[-1]}

        contents = [m["content"] if isinstance(m["content"], str) else [*map(part, m["content"])] for m in messages]
        return [{**m, "content": found} for m, found in zip(messages, contents, strict=True)], views

    def _look(self, source: str) -> "View":
        picture = listed_picture(source, self._folder)
        signals.interrupts(self._model.sight)
        return self._model.sight.look(picture, self._most_tiles)


def content(views: Sequence["View"], text: str) -> str | list[dict]:
    """A message's content: pictures, then text."""
    if not views:
        return text
    return [*({"type": "image", "image": view} for view in views), *([{"type": "text", "text": text}] if text else [])]


def cost_rows(found: dict) -> list[tuple[str, str]]:
    """The cost of a vision tower (sight.cost), as rows of a table."""
    return [
        ("file", found["file"]),
        ("weights", f"{amount(found['weights_bytes'])}, and {amount(found['working_bytes'])} of working memory"),
        ("a picture", f"1 to {found['most_tiles']} tiles of {found['tile']} pixels, {found['tile_tokens']} tokens each"),
        ("the largest", f"{found['most_tokens']} tokens"),
        ("work", f"{count(2 * found['tile_products'])} operations a tile"),
    ]
