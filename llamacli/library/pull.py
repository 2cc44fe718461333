"""Downloads a model from a hub into the folder of models, after checking that the disk holds it and the engine can run it.

In: a `Variant`. Out: files under models/USER/REPO/. The heads of all parts come first, a few megabytes: they say what the model
is and how large each tensor is, so a model that cannot run here is refused before its weights are fetched. They are the
beginning of the files and are not fetched again.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from llamacli import environment
from llamacli.errors import DownloadError, ModelFileError, OutputError, UnsupportedModelError
from llamacli.files.gguf import GGUF, open_gguf
from llamacli.library.checksums import keep, kept, sha256_of
from llamacli.library.download import Download
from llamacli.library.http import Hub, Refused
from llamacli.library.hub import Variant, denied

HEAD, OTHER_HEADS, LARGEST_HEAD = 16 << 20, 1 << 20, 256 << 20  # bytes: with the vocabulary, without, and at most
SPARE = 1 << 30  # bytes of a disk that stay free


class Pull:
    """A variant on its way. `follow(done, total, name)` is called with bytes of all files together. Use it in a `with`."""

    def __init__(self, hub: Hub, repo: str, variant: Variant, follow: Callable[[int, int, str], None]):
        self._hub, self.repo, self._variant, self._follow = hub, repo, variant, follow
        self._stack = ExitStack()
        self.folder = environment.models_folder() / repo
        self._downloads: dict[str, Download] = {}
        self._begun: list[str] = []  # names of files of which nothing was here
        self._whole = {file.name for file in variant.files if _size(self.folder / file.name) == file.size}

    def __enter__(self) -> "Pull":
        for file in self._variant.files:
            if file.name not in self._whole:
                made = Download(self._hub, file, self.folder / file.name, self._counted(file))
                self._downloads[file.name] = self._stack.enter_context(made)
                if not made.have:
                    self._begun.append(file.name)
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    @property
    def path(self) -> Path:
        """The file to run, of a split model its first part."""
        return self.folder / self._variant.files[0].name

    @property
    def whole(self) -> bool:
        """Whether every file is here; `check_there` says whether it is the right one."""
        return not self._downloads

    @property
    def missing(self) -> int:
        """Bytes that are still to come."""
        return sum(file.size - self._here(file) for file in self._variant.files)

    @property
    def received(self) -> int:
        """Bytes that came over the network."""
        return sum(download.received for download in self._downloads.values())

    def check_there(self) -> None:
        """DownloadError if a file of that name exists and is damaged or not the hub's.

        A file that has not changed since its last check is not read again.
        """
        for file in self._variant.files:
            path = self.folder / file.name
            size = _size(path)
            if size not in (None, file.size):
                raise DownloadError(
                    f"{path}: expected no file, or the hub's of {file.size} bytes, found one of {size}; remove it first"
                )
            if size is None or kept(path) == file.sha256:
                continue
            try:
                found = sha256_of(path, self._counted(file))
            except OSError as error:
                raise DownloadError(f"{path}: expected a file that can be read, found: {error.strerror}; check it") from None
            if found != file.sha256:
                raise DownloadError(
                    f"{path}: expected SHA-256 {file.sha256}, found {found}; the file is damaged, or the hub has a newer one: "
                    f"`llamacli models remove {self._variant.stem}`, then pull again"
                )
            keep(path, found)

    def check_room(self) -> int:
        """Bytes that the disk has free; OutputError if that is not enough."""
        folder = next(each for each in (self.folder, *self.folder.parents) if each.exists())
        free = shutil.disk_usage(folder).free
        if self.missing > max(0, free - SPARE):
            raise OutputError(
                f"{folder}: expected {self.missing / 1e9:.2f} GB of room and 1 GB to spare, found {free / 1e9:.2f} GB; "
                f"free some, or set LLAMACLI_MODELS to a folder on another disk"
            )
        return free

    def header(self) -> GGUF:
        """The model by its heads: metadata and the sizes of its tensors, whose bytes are not there yet.

        UnsupportedModelError for what this engine cannot run, ModelFileError for what is no model.
        """
        n = HEAD
        while True:
            try:
                return self._opened(n)
            except UnsupportedModelError:
                raise
            except ModelFileError:
                if n >= min(LARGEST_HEAD, self._variant.files[0].size):
                    raise
                n *= 4

    def fetch(self) -> None:
        """Everything that is missing. DownloadError or OutputError; what has come then stays."""
        for download in self._downloads.values():
            try:
                download.finish()
            except Refused as refused:
                raise denied(refused, self.repo, self._hub) from None

    def forget(self) -> None:
        """Remove the bytes received of files that this pull began; files that were here before stay."""
        for name in self._begun:
            self._downloads[name].forget()

    def _opened(self, n: int) -> GGUF:
        with tempfile.TemporaryDirectory(prefix="llamacli-") as folder:
            for i, file in enumerate(self._variant.files):
                head = self._head(file, n if i == 0 else min(n, OTHER_HEADS))
                try:
                    with open(Path(folder) / file.name, "wb") as stub:  # as long as the file, almost all of it a hole
                        stub.write(head)
                        stub.truncate(file.size)
                except OSError as error:
                    raise OutputError(f"{folder}: expected to write there, found: {error.strerror}; set TMPDIR") from None
            try:
                found = open_gguf(Path(folder) / self._variant.files[0].name)
                return found._replace(path=Path(self.repo) / found.path.name)
            except ModelFileError as error:
                raise type(error)(str(error).replace(f"{folder}{os.sep}", f"{self.repo}/")) from None

    def _head(self, file, n: int) -> bytes:
        if file.name in self._whole:
            with open(self.folder / file.name, "rb") as whole:
                return whole.read(n)
        try:
            return self._downloads[file.name].head(n)
        except Refused as refused:
            raise denied(refused, self.repo, self._hub) from None

    def _here(self, file) -> int:
        if file.name in self._downloads and not (self.folder / file.name).exists():
            return self._downloads[file.name].have
        return file.size if _size(self.folder / file.name) == file.size else 0

    def _counted(self, file):
        """A `follow` for one file that reports the bytes of all files."""
        before = sum(other.size for other in self._variant.files[: self._variant.files.index(file)])
        return lambda done, total: self._follow(before + done, self._variant.nbytes, file.name)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
