"""Pictures of the command line: read before the model is loaded, looked at with progress, told in a line.

In: names of files, bytes of stdin. Out: pictures, views (vision/sight.py), contents of messages.
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llamacli.cli import signals
from llamacli.cli.console import Console, amount, count
from llamacli.cli.inputs import may_be_picture, read_stdin_bytes
from llamacli.cli.progress import Meter

MOST_BYTES = 64 << 20  # of a picture on stdin

if TYPE_CHECKING:
    from llamacli.vision.pictures import Picture
    from llamacli.vision.sight import View


def read_pictures(names: Sequence[str], console: Console) -> list["Picture"]:
    """The pictures of these files; - is stdin. PictureError for the first that is none."""
    if not names:
        return []
    from llamacli.vision.pictures import read_picture

    return [read_picture(read_stdin_bytes(console), "stdin") if name == "-" else read_picture(name) for name in names]


def picture_in(data: bytes) -> "Picture | None":
    """The picture that bytes of stdin are; None for a text."""
    if may_be_picture(data):
        from llamacli.vision.pictures import looks_like_picture, read_picture

        if looks_like_picture(data):
            return read_picture(data, "stdin")
    return None


def look(model, pictures: Sequence["Picture"], most_tiles: int | None, console: Console) -> list["View"]:
    """Pictures as the model sees them. Says how far it is, and what became of each picture."""
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


def content(views: Sequence["View"], text: str) -> str | list[dict]:
    """A message's content: pictures, then text."""
    if not views:
        return text
    return [*({"type": "image", "image": view} for view in views), *([{"type": "text", "text": text}] if text else [])]


def cost_rows(found: dict) -> list[tuple[str, str]]:
    """What a vision tower takes (sight.cost), as rows of a table."""
    return [
        ("file", found["file"]),
        ("weights", f"{amount(found['weights_bytes'])}, and {amount(found['working_bytes'])} to work in"),
        ("a picture", f"1 to {found['most_tiles']} tiles of {found['tile']} pixels, {found['tile_tokens']} tokens each"),
        ("the largest", f"{found['most_tokens']} tokens"),
        ("work", f"{count(2 * found['tile_products'])} operations a tile"),
    ]
