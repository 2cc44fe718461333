"""Keys and values of prompts on disk: a text that begins as an earlier one is read back instead of evaluated.

In: a cache and the tokens that it holds. Out: files; and a cache filled from them. A prefix is kept in blocks of positions. A
block's name is a hash of the model and of all tokens up to the block's end, so texts that begin alike share their blocks. A
block has two files: NAME.all holds the layers that see every position, NAME.chunk those that see their chunk only, and is kept
for the chunk in which a prompt ended: to continue from a position, these layers need only its own chunk.

A file is written under another name and renamed, and ends with a checksum; a file that is missing, damaged or of another
version counts as absent, and the text is evaluated. Only the user can read the files (0600). Beyond `limit` bytes the least
recently used go.
"""

import contextlib
import os
import shutil
import stat
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from math import gcd
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llamacli.caches import Cache
from llamacli.engine import Engine
from llamacli.files.gguf import GGUF
from llamacli.prompt import Token

VERSION = 1
BLOCK = 256  # the most positions of a block, which must divide a chunk
SMALLEST = 32  # the fewest; where none divides a chunk, a block is a whole chunk
DIGEST = 32  # bytes of a name
ALL, CHUNK = ".all", ".chunk"  # suffixes
_HEAD = struct.Struct(f"<8sQ{DIGEST}s")  # magic, bytes of keys and values, the block's name
_MAGIC, _SUM = b"LLAMAKV1", 16
SAMPLE = 1024  # bytes of each tensor that tell one model from another
STALE = 3600  # seconds after which a file that was never finished is removed
AHEAD = 4  # files that are read at once


class Kept(NamedTuple):
    """Files and bytes of a folder of snapshots."""

    files: int
    nbytes: int


def held(folder: Path) -> Kept:
    """Files and bytes of a folder, 0 where there is none."""
    sizes = [size for _, size, _ in _files(folder)]
    return Kept(len(sizes), sum(sizes))


def clear(folder: Path) -> Kept:
    """Remove all snapshots; returns their files and bytes. OSError if one of them cannot be removed."""
    found = held(folder)
    for path, _, _ in _files(folder):
        path.unlink(missing_ok=True)
    return found


def identity(gguf: GGUF) -> bytes:
    """A hash that identifies a model: sizes and times of its files, and some bytes of every tensor.

    OSError if a file no longer exists.
    """
    digest = blake2b(digest_size=DIGEST)
    for path in gguf.paths:
        with path.open("rb") as file:
            info = os.fstat(file.fileno())
            digest.update(f"{info.st_size} {info.st_mtime_ns} ".encode())
            for name, tensor in sorted(gguf.tensors.items()):
                if tensor.path == path:
                    digest.update(f"{name} {tensor.type.name} {tensor.shape} ".encode())
                    digest.update(os.pread(file.fileno(), SAMPLE, tensor.offset + max(0, tensor.nbytes - SAMPLE) // 2))
    return digest.digest()


class Snapshots:
    """The snapshots of one model in a folder, which is made when something is written.

    `exact`: only what was evaluated as part of a whole prompt is kept and read, so that an answer has the same bytes with and
    without snapshots. Else everything that a conversation evaluated is kept, token by token too, whose last bits may differ.
    """

    def __init__(self, folder: Path, engine: Engine, model: bytes, limit: int | None = None, exact: bool = True):
        """`model`: its `identity`. `limit`: bytes of the whole folder; None: half of the sum of the disk's free bytes and the
        folder's.
        """
        self.exact, self.notices = exact, []  # notices: why something was not kept
        self._folder, self._engine, self._limit = folder, engine, limit
        config = engine.config
        chunk = config.chunk_size if any(map(config.uses_rope, range(config.n_layers))) else 0
        part = gcd(chunk, BLOCK) if chunk else BLOCK
        self._chunk, self._size = chunk, part if part >= min(SMALLEST, chunk or 1) else chunk
        chunked = {i for i in range(config.n_layers) if config.chunk_size and config.uses_rope(i)}
        self._layers = {ALL: [i for i in range(config.n_layers) if i not in chunked], CHUNK: sorted(chunked)}
        about = f"{VERSION} {self._size} {exact} {engine.arithmetic}"
        self._seed = blake2b(about.encode() + model, digest_size=DIGEST).digest()

    def restore(self, cache: Cache, tokens: Sequence[Token]) -> int:
        """Extend a cache that holds the first cache.pos of `tokens`; returns how many it then holds: fewer than before if a
        file is damaged and later ones were already read.

        The last token is never restored, since its logits are not kept. After an interrupt the cache needs `truncate`, as after
        one of `Engine.forward`.
        """
        names = self._names(tokens, len(tokens) - 1) if self._trusted() else []
        while True:
            found = self._longest(names, cache.pos, len(tokens))
            if found <= cache.pos:
                return cache.pos
            cache.reserve(found + 1 - cache.pos)  # one more: rings then belong to the chunk of the next position
            if self._read(cache, names, found):
                cache.pos = found
                self._touch(names[: found // self._size])
                return found
            before, cache.pos = cache.pos, found
            cache.truncate(before)  # a ring may hold some of a later chunk now

    def keep(self, cache: Cache, tokens: Sequence[Token], end: int) -> None:
        """Write the blocks of tokens[:end] that the folder lacks; the cache holds these tokens. A failure is added to
        `notices`.
        """
        names = self._names(tokens, end)
        if not names:
            return
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._trusted():
                self._keep(cache, names)
        except OSError as error:
            self._notice(f"{self._folder}: the prompt is not kept: {error.strerror or error}")

    def _trusted(self) -> bool:
        """Whether only the user can write to the folder, since foreign keys and values would change answers. A missing folder
        counts, since it will be made for the user alone.
        """
        try:
            info = self._folder.stat()
        except OSError:
            return True
        if info.st_uid not in (0, os.geteuid()):
            why = "the folder belongs to another user; set LLAMACLI_CACHE to a folder of your own"
        elif info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            why = "others can write there; chmod go-w it"
        else:
            return True
        self._notice(f"{self._folder}: prompts are not kept: {why}")
        return False

    def last_edge(self, n: int) -> int:
        """A chunk's edge at which a prompt of `n` tokens should also be kept, since a similar prompt may differ near the end,
        as where another question follows the same text. 0: its last chunk is enough.
        """
        edge = n // self._chunk * self._chunk if self._chunk else 0
        return edge if 2 * (n - edge) < self._chunk else 0

    # names

    def _names(self, tokens: Sequence[Token], end: int) -> list[str]:
        """The names of the whole blocks up to `end`."""
        names, name = [], self._seed
        for start in range(0, end // self._size * self._size, self._size):
            digest = blake2b(name, digest_size=DIGEST)
            part = tokens[start : start + self._size]
            if all(type(token) is int for token in part):
                digest.update(np.array(part, "<i8").tobytes())
            else:
                for token in part:
                    row = getattr(token, "row", None)
                    digest.update(int(token).to_bytes(8, "little"))
                    digest.update(b"" if row is None else blake2b(row.tobytes()).digest())
            name = digest.digest()
            names.append(name.hex())
        return names

    def _longest(self, names: list[str], start: int, n: int) -> int:
        """The most positions that can be restored so that the rest of `n` can be evaluated; `start` if no more are kept."""
        there = {path.name for path, _, _ in _files(self._folder)} if names else set()
        whole = next((i for i, name in enumerate(names) if name + ALL not in there), len(names))
        for i in range(whole, start // self._size, -1):
            pos = i * self._size
            first = (pos // self._chunk * self._chunk if self._chunk else pos) // self._size
            if all(names[j] + CHUNK in there for j in range(first, i)) and (not self.exact or self._engine.may_begin(pos, n)):
                return pos
        return start

    # reading

    def _read(self, cache: Cache, names: list[str], end: int) -> bool:
        """Read the blocks from cache.pos to `end`; returns whether all were sound. A damaged one is removed."""
        blocks = end // self._size
        first = (end // self._chunk * self._chunk if self._chunk else end) // self._size
        wanted = [(i, CHUNK) for i in range(first, blocks)] if self._layers[CHUNK] else []
        wanted += [(i, ALL) for i in range(cache.pos // self._size, blocks)] if self._layers[ALL] else []
        with ThreadPoolExecutor(AHEAD) as pool:
            for (i, kind), payload in zip(
                wanted, _ahead(pool, lambda at: self._load(names[at[0]], at[1]), wanted), strict=True
            ):
                if payload is None or not self._fill(cache, i, kind, payload):
                    with contextlib.suppress(OSError):
                        self._path(names[i], kind).unlink(missing_ok=True)
                    return False
        return True

    def _load(self, name: str, kind: str) -> memoryview | None:
        """The keys and values of a block's file; None if it is missing, damaged or of another block."""
        try:
            raw = self._path(name, kind).read_bytes()
        except OSError:
            return None
        body = memoryview(raw)[:-_SUM]
        if len(raw) < _HEAD.size + _SUM or bytes(body[: _HEAD.size]) != self._head(name, len(body) - _HEAD.size):
            return None
        return body[_HEAD.size :] if blake2b(body, digest_size=_SUM).digest() == raw[-_SUM:] else None

    def _fill(self, cache: Cache, block: int, kind: str, payload: memoryview) -> bool:
        """Restore a block's layers; False if it does not have their size."""
        start, at = block * self._size, 0
        for layer in self._layers[kind]:
            sides = []
            for empty in cache.export(layer, 0, 0):  # their shape and type
                shape = (empty.shape[0], self._size, *empty.shape[2:])
                nbytes = int(np.prod(shape)) * empty.dtype.itemsize
                if at + nbytes > len(payload):
                    return False
                sides.append(np.frombuffer(payload[at : at + nbytes], empty.dtype).reshape(shape))
                at += nbytes
            cache.restore(layer, start, *sides)
        return at == len(payload)

    def _touch(self, names: list[str]) -> None:
        """Mark blocks as used, the first blocks last, so that they are removed last: later blocks need them."""
        now = time.time_ns()
        for i, name in enumerate(names):
            for kind in (ALL, CHUNK):
                with contextlib.suppress(OSError):
                    os.utime(self._path(name, kind), ns=(now - 1000 * i,) * 2)

    # writing

    def _keep(self, cache: Cache, names: list[str]) -> None:
        files = _files(self._folder)
        there, total = {path.name for path, _, _ in files}, sum(size for _, size, _ in files)
        files.sort(key=lambda file: file[2], reverse=True)  # the least recently used at the end
        limit = (total + shutil.disk_usage(self._folder).free) // 2 if self._limit is None else self._limit
        ours, written = {name + kind for name in names for kind in (ALL, CHUNK)}, False
        for i, name in enumerate(names):
            for kind, layers in self._layers.items():
                start, end = i * self._size, (i + 1) * self._size
                if not layers or name + kind in there:
                    continue
                within = cache.held(layers[0])
                if not (within.start <= start and end <= within.stop):
                    if kind == CHUNK:
                        continue
                    return
                parts = [side.data.cast("B") for layer in layers for side in cache.export(layer, start, end)]
                size = sum(map(len, parts)) + _HEAD.size + _SUM
                while total + size > limit and files:
                    path, nbytes, _ = files.pop()
                    if path.name not in ours:
                        path.unlink(missing_ok=True)
                        total -= nbytes
                if total + size > limit:
                    self._notice(f"the prompt is kept in part: all of it would pass the limit, {limit / 1e9:.2f} GB")
                    return
                self._write(name, kind, parts)
                total, written = total + size, True
        if written:
            self._touch(names)

    def _write(self, name: str, kind: str, parts: list[memoryview]) -> None:
        path = self._path(name, kind)
        part = path.with_suffix(f"{kind}.{os.getpid()}-{os.urandom(4).hex()}.part")
        digest = blake2b(digest_size=_SUM)
        try:
            with open(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600), "wb") as out:
                for data in (self._head(name, sum(map(len, parts))), *parts):
                    digest.update(data)
                    out.write(data)
                out.write(digest.digest())
            part.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise

    def _head(self, name: str, nbytes: int) -> bytes:
        return _HEAD.pack(_MAGIC, nbytes, bytes.fromhex(name))

    def _path(self, name: str, kind: str) -> Path:
        return self._folder / f"{name}{kind}"

    def _notice(self, words: str) -> None:
        if words not in self.notices:
            self.notices.append(words)


def _files(folder: Path) -> list[tuple[Path, int, int]]:
    """Path, bytes and time of use of each snapshot; old unfinished files of killed processes are removed."""
    found = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                info = entry.stat(follow_symlinks=False)
                if entry.name.endswith((ALL, CHUNK)):
                    found.append((Path(entry.path), info.st_size, info.st_mtime_ns))
                elif entry.name.endswith(".part") and time.time() - info.st_mtime > STALE:
                    os.unlink(entry.path)
    return found


def _ahead(pool: ThreadPoolExecutor, load: Callable, items: Sequence) -> Iterator:
    """load(item) for each, in order, AHEAD of them under way."""
    under_way = [pool.submit(load, item) for item in items[:AHEAD]]
    for i in range(len(items)):
        found = under_way.pop(0).result()
        if i + AHEAD < len(items):
            under_way.append(pool.submit(load, items[i + AHEAD]))
        yield found
