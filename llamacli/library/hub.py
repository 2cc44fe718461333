"""What a hub has: the GGUF files of a repository, with sizes and checksums, and which of them is meant.

In: USER/REPO[:QUANT]. Out: a `Variant`, whose files can be downloaded. The hub's answers are checked: names that could leave a
folder, sizes that no file has and checksums that are none are refused.

API: https://huggingface.co/docs/hub/api, /api/models/REPO/tree/main; `lfs.oid` is the SHA-256 of the file.
"""

import re
from pathlib import PurePosixPath
from typing import NamedTuple
from urllib.parse import quote, urlsplit

from llamacli.errors import DownloadError, UsageError
from llamacli.library.http import Hub, Refused
from llamacli.library.installed import PART, label

LARGEST = 1 << 44  # bytes of a file
MOST_PAGES, MOST_FILES = 50, 20_000
USUAL = ("Q4_K_M", "UD-Q4_K_XL", "Q4_0", "Q4_EXPERTS")  # taken, the first of them, where a repository has several
_REPO = re.compile(
    r"(?:https?://)?(?:(?:hf\.co|huggingface\.co)/)?([A-Za-z0-9][\w.-]{0,95})/([A-Za-z0-9][\w.-]{0,95})(?::(.+))?/?", re.ASCII
)
_NEXT = re.compile(r'<([^>]*)>\s*;\s*rel="?next"?')


class Remote(NamedTuple):
    """A file of a repository. `name`: its last part, which names the file here."""

    url: str
    name: str
    size: int
    sha256: str


class Variant(NamedTuple):
    """A model of a repository, whole: one file, or all parts of a split one."""

    stem: str
    files: list[Remote]

    @property
    def label(self) -> str:
        return label(self.stem)

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files)


def parse(text: str) -> tuple[str, str | None]:
    """(USER/REPO, QUANT or None); UsageError if it is none."""
    found = _REPO.fullmatch(text.strip())
    if not found or ".." in text:
        raise UsageError(
            f"expected USER/REPO or USER/REPO:QUANT, such as unsloth/Llama-4-Scout-17B-16E-Instruct-GGUF:Q4_K_M, "
            f"found {text!r:.120}"
        )
    return f"{found[1]}/{found[2]}", found[3]


def variants(hub: Hub, repo: str) -> list[Variant]:
    """The models of a repository, the smallest first. DownloadError if there is none, or none to be had."""
    files, parts = {}, {}
    for remote in _listed(hub, repo):
        part = PART.fullmatch(remote.name.removesuffix(".gguf"))
        if not part:
            files[remote.url] = Variant(remote.name.removesuffix(".gguf"), [remote])
        else:
            folder = remote.url.rpartition("/")[0]
            parts.setdefault((folder, part["stem"], int(part["count"])), {})[int(part["no"])] = remote
    for (_, stem, count), found in parts.items():
        if sorted(found) == [*range(1, count + 1)]:
            files[found[1].url] = Variant(stem, [found[no] for no in sorted(found)])
    models = [each for each in files.values() if not each.stem.lower().startswith(("mmproj", "imatrix"))]
    if not models:
        raise DownloadError(f"{repo}: expected GGUF files, found none; `llamacli quantize` makes one of such a folder")
    return sorted(models, key=lambda each: each.nbytes)


def choose(models: list[Variant], wanted: str | None, repo: str) -> Variant:
    """The variant that `wanted` names; without it the only one, or the first of USUAL. UsageError lists them if that fails."""
    if wanted is None:
        found = models if len(models) == 1 else _first([m for m in models if m.label.upper() == usual] for usual in USUAL)
    else:
        word = wanted.removesuffix(".gguf").lower()
        found = _first(
            [m for m in models if fits(m)]
            for fits in (
                lambda m: m.stem.lower() == word,
                lambda m: m.label.lower() == word,
                lambda m: m.label.lower().removeprefix("ud-") == word,
            )
        )
    if len(found) == 1:
        return found[0]
    known = ", ".join(dict.fromkeys(m.stem if len(found) > 1 else m.label for m in (found or models)))
    raise UsageError(f"{repo}: expected {wanted or 'one model'}, found {known:.600}; name one as {repo}:{models[0].label}")


def _first(groups) -> list[Variant]:
    return next((group for group in groups if group), [])


def _listed(hub: Hub, repo: str) -> list[Remote]:
    """Every GGUF of the main branch."""
    url, found = f"{hub.endpoint}/api/models/{repo}/tree/main?recursive=true", []
    for _ in range(MOST_PAGES):
        try:
            page, headers = hub.json(url)
        except Refused as refused:
            raise denied(refused, repo, hub) from None
        if not isinstance(page, list):
            raise DownloadError(f"{repo}: expected a list of files from the hub, found other JSON; check HF_ENDPOINT")
        found += [remote for entry in page if (remote := _remote(hub, repo, entry))]
        following = _NEXT.search(headers.get("Link") or "")
        if not following or len(found) > MOST_FILES:
            return found
        url = hub.following(url, following[1])
        if urlsplit(url)[:2] != urlsplit(hub.endpoint)[:2]:
            raise DownloadError(f"{repo}: expected the list of files on {urlsplit(hub.endpoint).netloc}, found it elsewhere")
    return found


def _remote(hub: Hub, repo: str, entry) -> Remote | None:
    """A file that can be downloaded and checked; None for what is no GGUF. DownloadError for one that is unsound."""
    path = entry.get("path") if isinstance(entry, dict) and entry.get("type") == "file" else None
    if not isinstance(path, str) or not path.endswith(".gguf"):
        return None
    parts = PurePosixPath(path).parts
    if len(path) > 500 or not path.isprintable() or "\\" in path or path.startswith("/") or {".", ".."} & set(path.split("/")):
        raise DownloadError(f"{repo}: expected names of files inside the folder, found {path!r:.120}; nothing is fetched")
    if parts[-1].startswith("."):
        return None
    lfs = entry.get("lfs") if isinstance(entry.get("lfs"), dict) else {}
    size, oid = lfs.get("size", entry.get("size")), lfs.get("oid")
    if type(size) is not int or not 0 < size <= LARGEST:
        raise DownloadError(f"{repo}: expected a size of {path!r:.120} from 1 byte to 16 TiB, found {size!r:.40}; not fetched")
    if not isinstance(oid, str) or not re.fullmatch(r"[0-9a-f]{64}", oid):
        raise DownloadError(f"{repo}: expected the SHA-256 of {path!r:.120}, found {oid!r:.80}; it could not be checked")
    return Remote(f"{hub.endpoint}/{repo}/resolve/main/{quote(path)}", parts[-1], size, oid)


def denied(refused: Refused, repo: str, hub: Hub) -> DownloadError:
    """The error for a refused request, for the list of files or a file, with the next step. The hub answers 401 for
    what does not exist, too.
    """
    page, status = f"{hub.endpoint}/{repo}", refused.status
    if status == 403 or refused.gated:
        then = "" if refused.with_token else ", then set HF_TOKEN"
        what = f"found that you may not have it yet ({status}); accept its licence at {page}{then}"
    elif status == 401 and not refused.with_token:
        what = (
            f"found none, or one that is not for everyone (401); check the name, or set HF_TOKEN to a token of yours: "
            f"{hub.endpoint}/settings/tokens"
        )
    elif status == 401:
        what = "found that the hub does not take HF_TOKEN (401); make a new one, and check the name"
    elif status == 404:
        what = "found none of that name (404); check the spelling"
    else:
        what = f"found HTTP {status}; try again later"
    return DownloadError(f"{repo}: expected a repository that can be read, {what}")
