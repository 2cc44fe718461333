"""Reads untrusted picture files: bytes to an RGB picture of Pillow.

In: a path, bytes, a `data:` URL or a picture of Pillow. Out: `Picture`. Size and format are checked before anything is decoded.
Transparent pixels get a white background, and the orientation noted by a camera is applied, as in transformers; 16-bit gray is
scaled, whereas transformers clips most of it to white. Of an animation the first frame is used. PictureError says in one line
what is wrong.
"""

import base64
import binascii
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from hashlib import blake2b
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote_to_bytes

from llamacli.errors import PictureError

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_BYTES = 64 << 20
MOST_PIXELS = 100_000_000  # decoded they take 400 MB, twice that if they are converted to RGB
BAND = 1 << 20  # pixels that are converted at a time
USUAL_BYTES = 100_000_000  # bytes to read one of 16 million pixels that is rotated; transparent ones take three times as much
STRIP = 256  # rows of a picture that are copied at a time
LONGEST_SIDE, MOST_RATIO = 65535, 1000
FORMATS = ("Png", "Jpeg", "WebP", "Gif", "Bmp", "Tiff", "Avif")  # Pillow's others run programs or are rarely tested
READ = "PNG, JPEG, WebP, GIF, BMP, TIFF and AVIF"
SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*")
HINTS = (  # the first bytes of other files, and advice how to convert them
    (rb"%PDF", "a PDF; `pdftoppm -r 150 -png FILE page` makes pictures of it"),
    (
        rb"(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?(<!DOCTYPE svg[^>]*>\s*)?<svg",
        "an SVG; `rsvg-convert -o picture.png FILE` draws it",
    ),
    (rb"....ftyp(heic|heix|hevc|mif1|msf1)", "HEIC; on a Mac, `sips -s format jpeg FILE --out picture.jpg` converts it"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript; `gs -sDEVICE=png16m -o page%d.png FILE` makes pictures of it"),
)

Source = str | os.PathLike | bytes


class Picture(NamedTuple):
    """A picture in its upright orientation."""

    name: str  # for messages
    image: "Image"  # RGB
    digest: bytes  # of size and pixels


def looks_like_picture(data: bytes) -> bool:
    """Whether bytes are the beginning of a picture file."""
    webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    return webp or data[4:12] in (b"ftypavif", b"ftypavis") or data.startswith(tuple(s for s in SIGNATURES if s != b"BM"))


def read_picture(source, name: str | None = None) -> Picture:
    """A picture from a path, from bytes, from a `data:` URL or from Pillow. `name`: for messages instead of the path.

    PictureError if there is no picture, or if it is damaged, too large or of another format.
    """
    name, image, is_file = _unread(source, name)
    return _upright(name, image, turn=is_file)


def picture_size(source) -> tuple[int, int]:
    """(width, height) of what `read_picture` takes, from its header: no pixel is decoded. For a picture that the camera's
    orientation rotates they are exchanged. PictureError as for `read_picture`, except for damage after the header.
    """
    return _unread(source, None)[1].size


def _unread(source, name: str | None) -> tuple[str, "Image", bool]:
    """A picture's name, the picture with its size checked, and whether it comes from a file, whose pixels are not yet
    decoded.
    """
    if hasattr(source, "getexif") and hasattr(source, "convert"):  # a picture of Pillow's: Pillow is already imported
        name = name or "picture"
        _check_size(name, *source.size)
        return name, source, False
    if isinstance(source, bytes | bytearray | memoryview):
        name, data = name or "picture", bytes(source)
    elif isinstance(source, str) and source.startswith("data:"):
        name, data = name or "picture", _data_url(source)
    elif isinstance(source, str | os.PathLike):
        if re.match(r"https?://", os.fspath(source)):
            raise PictureError(f"{shown(source)}: expected a file, found an address; download it first")
        name, data = name or shown(source), file_bytes(Path(source))
    else:
        raise PictureError(f"expected a picture as a path, bytes, a data: URL or Pillow's, found {type(source).__name__}")
    return name, _opened(name, data), True


def shown(name) -> str:
    """A file's name in one line, without control characters."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "?", os.fspath(name))[:200]


def file_bytes(path: Path) -> bytes:
    """The bytes of a file, at most `MOST_BYTES` + 1. PictureError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except IsADirectoryError:
        raise PictureError(f"{shown(path)}: expected a picture, found a folder") from None
    except (OSError, ValueError) as error:
        found = getattr(error, "strerror", None) or error
        raise PictureError(f"{shown(path)}: expected a picture, found: {found}; check the name") from None
    return data


def _data_url(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise PictureError("expected a data: URL with a comma before its data, found none")
    if len(body) > 2 * MOST_BYTES:
        raise PictureError(f"picture: expected at most {MOST_BYTES >> 20} MiB, found more; make it smaller")
    try:
        raw = unquote_to_bytes(body)
        return base64.b64decode(raw, validate=True) if head.endswith(";base64") else raw
    except (binascii.Error, ValueError):
        raise PictureError("expected base64 in the data: URL, found other characters; encode the picture again") from None


def _opened(name: str, data: bytes) -> "Image":
    """The picture of a file: its header is read and checked, its pixels are not yet decoded."""
    from PIL import Image, UnidentifiedImageError

    formats = _formats()
    if not data:
        raise PictureError(f"{name}: expected a picture, found an empty file")
    if len(data) > MOST_BYTES:
        raise PictureError(
            f"{name}: expected a picture of at most {MOST_BYTES >> 20} MiB, found a larger file; make it smaller"
        )
    for pattern, hint in HINTS:
        if re.match(pattern, data[:1024].lstrip() if b"<" in data[:8] else data[:1024], re.DOTALL):
            raise PictureError(f"{name}: expected {READ}, found {hint}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(BytesIO(data), formats=formats)
            size = image.size
    except UnidentifiedImageError:
        raise PictureError(f"{name}: expected {READ}, found another format or a damaged header; convert it to PNG") from None
    except Image.DecompressionBombError:  # a picture of more than twice the pixels for which Pillow warns
        raise PictureError(
            f"{name}: expected at most {MOST_PIXELS // 10**6} million pixels, found more; scale it down"
        ) from None
    except _FAILURES as error:
        raise PictureError(f"{name}: expected a whole picture, found a damaged one ({_reason(error)})") from None
    _check_size(name, *size)
    return image


@cache
def _formats() -> list[str]:
    """Pillow's names of the formats that this Pillow was built with. Only their code is loaded."""
    from PIL import Image

    for name in FORMATS:
        with suppress(ImportError):
            import_module(f"PIL.{name}ImagePlugin")
    return [name.upper() for name in FORMATS if name.upper() in Image.OPEN]


_FAILURES = (OSError, SyntaxError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RuntimeError)
_FAILURES += (struct.error, zlib.error, EOFError, MemoryError, AssertionError)  # exceptions of decoders for damaged files


def _reason(error: BaseException) -> str:
    return (re.sub(r"\s+", " ", shown(str(error))) or type(error).__name__)[:80]


def _check_size(name: str, width: int, height: int) -> None:
    """PictureError for a size whose pixels would take too much memory."""
    longer, shorter = max(width, height), min(width, height)
    if shorter < 1:
        raise PictureError(f"{name}: expected a picture, found one of {width}x{height} pixels")
    if width * height > MOST_PIXELS:
        raise PictureError(
            f"{name}: expected at most {MOST_PIXELS // 10**6} million pixels, found {width}x{height}; scale it down first"
        )
    if longer > LONGEST_SIDE or longer > MOST_RATIO * shorter:
        raise PictureError(
            f"{name}: expected sides up to {LONGEST_SIDE} pixels and {MOST_RATIO} to 1, found {width}x{height}; cut it first"
        )


def _upright(name: str, image: "Image", turn: bool) -> Picture:
    """The decoded picture as RGB, rotated by the camera's orientation."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image.load()
            if turn:
                ImageOps.exif_transpose(image, in_place=True)  # else it copies upright pictures, too
            image = _rgb(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise PictureError(f"{name}: expected the size that the header names, found a larger picture inside") from None
    except _FAILURES as error:
        raise PictureError(f"{name}: expected a whole picture, found a damaged one ({_reason(error)})") from None
    _check_size(name, *image.size)
    digest = blake2b(b"%d %d " % image.size, digest_size=16)
    for top in range(0, image.height, STRIP):
        digest.update(image.crop((0, top, image.width, min(top + STRIP, image.height))).tobytes())
    return Picture(name, image, digest.digest())


def _rgb(image: "Image") -> "Image":
    """RGB, with a white background behind transparent pixels; 16-bit gray by its upper 8 bits. Other modes are converted band
    by band.
    """
    from PIL import Image

    deep = image.mode.startswith("I;16") or image.mode == "I"
    clear = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    if not (deep or clear):
        return image if image.mode == "RGB" else image.convert("RGB")
    found = Image.new("RGB", image.size)
    for top, band in _bands(image):
        found.paste(_upper_bits(band) if deep else _on_white(band), (0, top))
    return found


def _bands(image: "Image") -> Iterator[tuple[int, "Image"]]:
    """(first row, some rows) of a picture: converting all of a large one would need its memory several times."""
    rows = max(1, BAND // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _upper_bits(band: "Image") -> "Image":
    import numpy as np
    from PIL import Image

    return Image.fromarray((np.asarray(band).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")


def _on_white(band: "Image") -> "Image":
    from PIL import Image

    return Image.alpha_composite(Image.new("RGBA", band.size, (255, 255, 255, 255)), band.convert("RGBA")).convert("RGB")
