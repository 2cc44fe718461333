"""Untrusted picture files: which are read, which are refused, and with which messages."""

import base64
import io
import struct
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from llamacli.errors import PictureError
from llamacli.vision.pictures import looks_like_picture, read_picture


def encoded(image, kind="PNG", **more):
    file = io.BytesIO()
    image.save(file, kind, **more)
    return file.getvalue()


def gradient(width=40, height=30):
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 6, y * 8, x + y], -1).astype(np.uint8))


def png(width, height, rows=b"", depth=8, colour=2):
    """A PNG with any header."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "WEBP", "JPEG", "AVIF"])
def test_formats_that_are_read(tmp_path, kind):
    more = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(gradient(), kind, **more)
    path = tmp_path / "wrong-extension.txt"
    path.write_bytes(data)
    for source in (path, str(path), data, f"data:image/x;base64,{base64.b64encode(data).decode()}"):
        picture = read_picture(source)
        assert picture.image.mode == "RGB"
        assert picture.image.size == (40, 30)
    if kind in ("PNG", "BMP", "TIFF", "WEBP"):
        assert np.array_equal(np.asarray(picture.image), np.asarray(gradient()))
    assert looks_like_picture(data) == (kind != "BMP")


def test_transparency_is_laid_on_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    assert np.asarray(read_picture(image).image).tolist() == [[[255, 255, 255], [255, 0, 0]]]
    gray = Image.new("LA", (1, 1), (0, 128))
    assert read_picture(gray).image.getpixel((0, 0)) == (127, 127, 127)
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([10, 20, 30])
    palette.info["transparency"] = 0
    assert read_picture(encoded(palette, transparency=0)).image.getpixel((0, 0)) == (255, 255, 255)


def test_gray_of_16_bits_is_scaled_and_not_cut():
    image = Image.fromarray(np.array([[0, 256, 32768, 65535]], np.uint16))
    assert np.asarray(read_picture(encoded(image)).image)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_the_orientation_of_a_camera_is_applied_to_files():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(gradient(), "JPEG", exif=exif)
    assert read_picture(data).image.size == (30, 40)
    assert read_picture(Image.open(io.BytesIO(data))).image.size == (40, 30), "a picture of Pillow is taken as it lies"


def test_of_an_animation_the_first_frame_is_seen():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        picture = read_picture(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
        assert picture.image.getpixel((4, 4))[0] > 200


def test_the_digest_is_of_what_is_seen():
    same = read_picture(encoded(gradient(), "PNG")), read_picture(encoded(gradient(), "BMP"))
    assert same[0].digest == same[1].digest
    assert read_picture(gradient(30, 40)).digest != same[0].digest
    flat = [Image.new("RGB", size) for size in ((2, 8), (8, 2))]
    assert read_picture(flat[0]).digest != read_picture(flat[1]).digest


REFUSED = {
    "empty": (b"", "empty file"),
    "text": (b"hello, this is no picture", "another format"),
    "pdf": (b"%PDF-1.7\n", "pdftoppm"),
    "svg": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0", "sips"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript"),
    "bomb": (png(50000, 50000), "million pixels"),
    "bomb of zeros": (png(65535, 65535, bytes(1 << 16)), "million pixels"),
    "1 x 65535": (png(65535, 1, bytes(1 + 3 * 65535)), "1000 to 1"),
    "cut": (encoded(gradient())[:60], "damaged"),
    "cut in its pixels": (encoded(gradient(), "JPEG")[:-200], "damaged"),
    "no pixels": (png(40, 40), "damaged"),
    "wrong checksum": (encoded(gradient()).replace(b"IDAT", b"IDAU"), "damaged"),
    "no width": (png(0, 5), "damaged"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_said_in_a_line(name):
    data, words = REFUSED[name]
    tracemalloc.start()
    try:
        with pytest.raises(PictureError) as caught:
            read_picture(data, "it.png")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert words in str(caught.value)
    assert str(caught.value).startswith("it.png: ")
    assert "\n" not in str(caught.value)
    assert most < 20e6, "nothing is decoded that is refused"


@pytest.mark.parametrize("kind, channels", [((16, 0), 2), ((8, 6), 4)], ids=["16 bits", "transparent"])
def test_a_large_picture_is_changed_to_rgb_without_taking_its_memory_many_times(kind, channels):
    """It is a hundred kilobytes of file; the picture takes 2 or 4 bytes a pixel, its RGB 4."""
    side, (depth, colours) = 4000, kind
    rows = zlib.compress(bytes(side * (1 + side * channels)), 1)

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", side, side, depth, colours, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    code = (
        "import sys\nfrom llamacli.plan.machine import resident_peak\nfrom llamacli.vision.pictures import read_picture\n"
        "import numpy, PIL.Image\n"
        "before, data = resident_peak(), sys.stdin.buffer.read()\nread_picture(data)\nprint(resident_peak() - before)"
    )
    taken = int(subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True).stdout)
    assert taken < 11 * side * side


OTHERS = ("ICO", "PPM", "TGA", "PCX", "SGI", "DDS", "ICNS", "IM", "JPEG2000", "MSP", "XBM", "SPIDER", "PDF", "EPS")


@pytest.mark.parametrize("kind", OTHERS)
def test_other_formats_of_pillow_are_not_read(kind):
    mode = "1" if kind in ("MSP", "XBM") else "F" if kind == "SPIDER" else "RGB"
    try:
        data = encoded(gradient(32, 32).convert(mode), kind)
    except (OSError, KeyError, ValueError) as error:
        pytest.skip(f"Pillow does not write it: {error}")
    with pytest.raises(PictureError):
        read_picture(data)


def test_damage_anywhere_is_a_picture_or_an_error():
    random = np.random.RandomState(5)
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"):
        whole = encoded(gradient(), kind)
        for _ in range(30):
            data = bytearray(whole)
            for at in random.randint(0, len(data), 4):
                data[at] = random.randint(256)
            try:
                assert read_picture(bytes(data)).image.mode == "RGB"
            except PictureError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("https://example.org/x.png", "download it first"),
        ("missing\x1b[2J.png", "missing?[2J.png"),
        ("data:image/png;base64,@@@@", "base64"),
        ("data:image/png", "comma"),
        (".", "folder"),
        (5, "path, bytes"),
    ],
)
def test_what_names_no_picture_is_refused(source, words):
    with pytest.raises(PictureError, match=None) as caught:
        read_picture(source)
    assert words in str(caught.value)
