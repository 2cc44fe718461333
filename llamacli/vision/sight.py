"""Pictures in prompts: finds the tower's file, reads pictures, encodes them, and puts their rows into prompts.

In: ids with `<|image|>` where a picture stands, and pictures. Out: segments (prompt.py): Llama 4's marks around and between
tiles, and for each tile the tower's rows. The rows of recent pictures are cached.
"""

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np

from llamacli.cpu.weights import held_bytes
from llamacli.errors import LlamacliError, ModelFileError, PictureError, PromptError, UsageError
from llamacli.files.gguf import GGUF, open_gguf
from llamacli.llama4.vision import VisionConfig, has_ollama_tower, has_tower, renamed
from llamacli.prompt import Features, tokens
from llamacli.vision.pictures import USUAL_BYTES, Picture, picture_size, read_picture
from llamacli.vision.tiles import cut, layout
from llamacli.vision.tower import MOST, Tower, nbytes

MANY = 5  # pictures of a prompt that Meta tested; rows of this many of the largest are cached
NAMES = ("image_start", "image", "patch", "tile_x_separator", "tile_y_separator", "image_end")


class Marks(NamedTuple):
    """Ids of the special tokens around the rows of a picture."""

    image_start: int
    image: int
    patch: int
    tile_x_separator: int
    tile_y_separator: int
    image_end: int

    @classmethod
    def of(cls, tokenizer) -> "Marks":
        """PromptError if the vocabulary lacks one."""
        known = tokenizer.special_names.ids
        if missing := [name for name in NAMES if f"<|{name}|>" not in known]:
            raise PromptError(f"expected a model with the token <|{missing[0]}|>, found none; it cannot take pictures")
        return cls(*(known[f"<|{name}|>"] for name in NAMES))


class View(NamedTuple):
    """An encoded picture. Sizes are (width, height)."""

    name: str
    size: tuple[int, int]
    shown: tuple[int, int]
    grid: tuple[int, int]  # rows and columns of tiles
    segments: list  # its segments in a prompt
    n_tokens: int
    seconds: float  # seconds that the tower took; 0 if the picture was cached

    @property
    def n_tiles(self) -> int:
        """The number of tiles, with the one of the whole picture."""
        n = self.grid[0] * self.grid[1]
        return n + (n > 1)

    @property
    def record(self) -> dict:
        """Fit for JSON."""
        sizes = {"width": self.size[0], "height": self.size[1], "shown": list(self.shown), "grid": list(self.grid)}
        return {"name": self.name, **sizes, "tiles": self.n_tiles, "tokens": self.n_tokens}


def find_tower(model: GGUF) -> Path | None:
    """The file of a model's tower: the model's own, or an mmproj*.gguf beside it, selected by name if there are several.

    UsageError if several match.
    """
    if has_ollama_tower(model):
        return Path(model.path)
    path = Path(model.path)
    found = sorted(path.parent.glob("mmproj*.gguf"))
    if len(found) < 2:
        return found[0] if found else None
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", path.stem).lower()

    def likeness(candidate: Path) -> int:
        name = candidate.stem.lower().removeprefix("mmproj").lstrip("-_.")
        return len(name) if stem.startswith(name) else len(stem) if name.startswith(stem) else 0

    best = max(map(likeness, found))
    chosen = [candidate for candidate in found if likeness(candidate) == best]
    if not best or len(chosen) > 1:
        names = ", ".join(candidate.name for candidate in found[:4])
        raise UsageError(f"{path.parent}: expected one mmproj*.gguf for {path.name}, found {names}; choose one with --mmproj")
    return chosen[0]


def open_tower(model: GGUF, n_embd: int, path: Path | None = None) -> GGUF:
    """The file of the tower of a model that is `n_embd` wide; `path`: a file instead of the one beside the model.

    PictureError if there is none, ModelFileError if it is another model's.
    """
    if (path := path or find_tower(model)) is None:
        raise PictureError(
            f"{model.path}: expected a vision tower, mmproj-*.gguf beside the model, found none; pass one with --mmproj"
        )
    gguf = model if Path(path) == Path(model.path) else open_gguf(path)
    if not has_tower(gguf):
        raise ModelFileError(f"{path}: expected a vision tower (architecture clip), found a file without one; pass another")
    if (found := VisionConfig.from_gguf(gguf).n_text) != n_embd:
        raise ModelFileError(f"{path}: expected features of {n_embd} numbers, found {found}; the tower is another model's")
    return gguf


def tower_bytes(gguf: GGUF, threads: int) -> int:
    """Bytes that pictures need: a tower's weights and buffers, a picture while it is read, cached rows."""
    found = cost(gguf, threads)
    return found["weights_bytes"] + found["working_bytes"]


def _working_bytes(c: VisionConfig, threads: int) -> int:
    """The bytes without the weights. A picture is held on its canvas, in tiles, and as floats."""
    tiles = 3 * c.image_size**2 * (3 * (c.most_tiles + 1) + 3 * 4 * MOST)
    return nbytes(c, threads) + tiles + USUAL_BYTES + _kept_bytes(c)


def _kept_bytes(c: VisionConfig) -> int:
    """Bytes of the rows of MANY of the largest pictures."""
    return MANY * 4 * (c.most_tiles + 1) * c.n_rows * c.n_text


def cost(gguf: GGUF, threads: int = 1) -> dict:
    """The cost of a tower as a record fit for JSON: bytes, tokens and multiply-adds."""
    c = VisionConfig.from_gguf(gguf)
    most = c.most_tiles + (c.most_tiles > 1)
    return {
        "file": str(gguf.path),
        "weights_bytes": sum(map(held_bytes, renamed(gguf).values())),
        "working_bytes": _working_bytes(c, threads),
        "tile": c.image_size,
        "most_tiles": most,
        "tile_tokens": c.n_rows,
        "most_tokens": most * c.n_rows + 3 + (c.most_tiles if c.most_tiles > 1 else 0),
        "tile_products": c.products,
    }


def cost_beside(model: GGUF, threads: int = 1) -> dict | None:
    """The `cost` of the tower that is found for a model's file; None if there is none that can be read."""
    try:
        path = find_tower(model)
        return None if path is None else cost(model if path == Path(model.path) else open_gguf(path), threads)
    except LlamacliError:
        return None


class Sight:
    """A tower with the marks of a vocabulary. Threads may share it: calls wait for each other."""

    def __init__(self, gguf: GGUF, tokenizer, threads: int):
        self.marks, self._tower, self.path = Marks.of(tokenizer), Tower(gguf, threads), gguf.path
        self.config, self.notices = self._tower.config, self._tower.notices
        self._known: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        # Called while a picture is encoded: its name, the tiles done so far (a float), and all.
        self.follow: Callable[[str, float, int], None] | None = None

    def close(self) -> None:
        """Give back threads and memory."""
        self._tower.close()
        self._known.clear()

    def interrupt(self) -> None:
        """From another thread: make `look` end soon with a KeyboardInterrupt."""
        self._tower.interrupt()

    def look(self, source, most_tiles: int | None = None) -> View:
        """Encode a picture (a Picture, or an argument of `read_picture`). `most_tiles`: the most tiles of its grid, at most the
        model's.
        """
        picture = source if isinstance(source, Picture) else read_picture(source)
        most = tiles_allowed(self.config, most_tiles)
        tiles = cut(picture.image, self.config.image_size, most)
        digest, began = blake2b(b"%d " % most + picture.digest, digest_size=16).digest(), perf_counter()
        with self._lock:
            rows, seconds = self._known.get(digest), 0.0
            if rows is None:
                follow = self.follow and (lambda done, of: self.follow(picture.name, done, of))
                rows = self._tower.features(tiles.tiles, follow)
                seconds = perf_counter() - began
            self._keep(digest, rows)
        found = segments(tiles.grid, rows, digest, self.marks)
        n_tokens = sum(len(part.rows) if isinstance(part, Features) else len(part) for part in found)
        return View(picture.name, picture.image.size, tiles.shown[::-1], tiles.grid, found, n_tokens, seconds)

    def n_tokens(self, source, most_tiles: int | None = None) -> int:
        """How many tokens `look` would make of a picture, from its size alone; for a View, the number it has."""
        if isinstance(source, View):
            return source.n_tokens
        width, height = source.image.size if isinstance(source, Picture) else picture_size(source)
        return expected_tokens(self.config, width, height, most_tiles)[1]

    def _keep(self, digest: bytes, rows: np.ndarray) -> None:
        """Cache rows, and remove those of the least recently used pictures."""
        self._known[digest] = rows
        self._known.move_to_end(digest)
        while sum(kept.nbytes for kept in self._known.values()) > _kept_bytes(self.config) and len(self._known) > 1:
            self._known.popitem(last=False)

    def prompt(self, ids: Sequence[int], views: Iterable[View]) -> list:
        """A prompt from ids, with a view's segments in place of each `<|image|>`."""
        views, found, done = iter(views), [], 0
        for at, id in enumerate(ids):
            if id == self.marks.image:
                found += [ids[done:at], *next(views).segments]
                done = at + 1
        return [*found, ids[done:]]


def segments(grid: tuple[int, int], rows: np.ndarray, digest: bytes, marks: Marks) -> list:
    """A picture in a prompt, as transformers' `Llama4Processor` writes it; `rows` float32 [tiles, n, n_embd]."""
    features = [Features(marks.patch, tile, digest + b"%d" % n) for n, tile in enumerate(rows)]
    found: list = [[marks.image_start]]
    if len(features) > 1:
        across = grid[1]
        for n, tile in enumerate(features[:-1], 1):
            found += [tile, [marks.tile_y_separator if n % across == 0 else marks.tile_x_separator]]
    return [*found, [marks.image], features[-1], [marks.image_end]]


def picture_ids(c: VisionConfig, marks: Marks, width: int, height: int, most_tiles: int | None = None) -> list[int]:
    """Ids of a prompt that a picture of this size becomes: `<|patch|>` in the place of each row of the tower."""
    grid, _ = layout(height, width, c.image_size, tiles_allowed(c, most_tiles))
    n_tiles, _ = expected_tokens(c, width, height, most_tiles)
    return [int(token) for token in tokens(segments(grid, np.empty((n_tiles, c.n_rows, 0), np.float32), b"", marks))]


def tiles_allowed(c: VisionConfig, asked: int | None) -> int:
    """Most tiles of a grid; UsageError for less than one."""
    if asked is not None and asked < 1:
        raise UsageError(f"image tiles: expected at least 1, found {asked}")
    return min(asked or c.most_tiles, c.most_tiles)


def expected_tokens(c: VisionConfig, width: int, height: int, most_tiles: int | None = None) -> tuple[int, int]:
    """(tiles, tokens of a prompt) that a picture of this size takes."""
    (rows, columns), _ = layout(height, width, c.image_size, tiles_allowed(c, most_tiles))
    n = rows * columns
    return n + (n > 1), (n + (n > 1)) * c.n_rows + 3 + (n if n > 1 else 0)


def describe(view: View) -> str:
    """A line that describes an encoded picture."""
    (wide, high), (w, h) = view.size, view.shown
    shown = f", shown to the model at {w}x{h}" if (w, h) != (wide, high) and (w < wide or h < high) else ""
    tiles = f"{view.n_tiles} tile{'s' if view.n_tiles > 1 else ''}"
    return f"{view.name}: {wide}x{high}{shown}, {tiles}, {view.n_tokens} tokens"
