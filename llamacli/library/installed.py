"""Which models this machine has: those of our own folders, of Ollama and of the Hugging Face hub's cache, used where they lie.

In: the folders of environment.py. Out: `Installed` models; `find` gives the one that a name stands for. Folders of other
programs are read, never written. What lies in them is hostile until checked: a manifest names files by their digests only, and
a link that leads nowhere is no model.
"""

import json
import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from llamacli import environment

PART = re.compile(r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})", re.DOTALL)  # a split model's file, without .gguf
LABEL = re.compile(r"(?:^|[-._])((?:UD-)?(?:I?Q|TQ|BF|F|MXFP)\d+(?:_[A-Z0-9]+)*)$", re.IGNORECASE)
LARGEST_MANIFEST = 1 << 20  # bytes
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_ARCHITECTURE = b"general.architecture"


class Installed(NamedTuple):
    """A model. `paths`: its parts in their order, the ones that are there; `source`: USER/REPO:LABEL, if it has one."""

    name: str
    place: str  # "llamacli", "own", "ollama" or "hub"
    paths: list[Path]
    nbytes: int
    source: str | None = None
    lacks: int = 0  # parts that are not there

    @property
    def architecture(self) -> str | None:
        """What the file's first bytes say; None where they do not say."""
        return architecture(self.paths[0])


def installed() -> list[Installed]:
    """Every model, in the order in which a name is looked up."""
    own = zip(("llamacli", "own"), environment.model_folders(), strict=True)
    found = []
    for place in (*(_in_folder(folder, name) for name, folder in own), _of_ollama(), _of_hub()):
        with suppress(OSError):  # a folder of another user
            found.extend(place)
    return found


def find(name: str) -> Installed | None:
    """The model that a name, or USER/REPO[:LABEL], stands for; None if there is none."""
    if not name or len(name) > 300 or name.startswith((".", "/", "~")):
        return None
    models = [model for model in installed() if model.paths]
    known = name.lower().removeprefix("hf.co/").removeprefix("huggingface.co/")
    for fits in (
        lambda m: m.name == name,
        lambda m: m.name.lower() == known or (m.source or "").lower() == known,
        lambda m: m.place == "ollama" and m.name.lower() == f"{known}:latest",
        lambda m: (m.source or "").lower().rpartition(":")[0] == known,
    ):
        if found := [model for model in models if fits(model)]:
            return min(found, key=lambda m: m.lacks)
    return None


def unfinished() -> list[tuple[str, Path, int, int]]:
    """(name, file, bytes that are here, bytes in all) of every download that was cut off."""
    found = []
    for part in sorted(environment.models_folder().glob("*/*/*.gguf.part")):
        try:
            state = json.loads(part.with_name(f"{part.name}.json").read_bytes()[:4096])
            found.append((part.name.removesuffix(".gguf.part"), part, part.stat().st_size, int(state["size"])))
        except (OSError, ValueError, TypeError, KeyError, OverflowError):
            continue
    return found


def label(stem: str) -> str:
    """What tells a file from others of its repository: its type, such as Q4_K_M; else the whole stem."""
    found = LABEL.search(stem)
    return found[1] if found else stem


def architecture(path: Path) -> str | None:
    """`general.architecture` of a GGUF, if it is the first of its metadata, as every writer has it."""
    try:
        with path.open("rb") as file:
            head = file.read(256)
        magic, _, _, _, size = struct.unpack_from("<4sIQQQ", head)
        at = 32 + len(_ARCHITECTURE)
        kind, length = struct.unpack_from("<IQ", head, at)
        if magic != b"GGUF" or size != len(_ARCHITECTURE) or head[32:at] != _ARCHITECTURE or kind != 8 or length > 64:
            return None
        return head[at + 12 : at + 12 + length].decode()
    except (OSError, struct.error, UnicodeDecodeError):
        return None


# places


def _in_folder(folder: Path, place: str) -> Iterator[Installed]:
    """NAME.gguf, NAME/NAME.gguf and what was pulled, USER/REPO/FILE.gguf; of split models the parts together."""
    for depth in ("*.gguf", "*/*.gguf", "*/*/*.gguf"):
        for (above, stem), (paths, lacks) in _together(folder.glob(depth)).items():
            source = f"{above.parent.name}/{above.name}:{label(stem)}" if above.parent.parent == folder else None
            yield Installed(stem, place, paths, _nbytes(paths), source, lacks)


def _of_hub() -> Iterator[Installed]:
    """models--USER--REPO/snapshots/COMMIT/...: of each repository the commit of its main branch, else any."""
    for repo in sorted(environment.hub_cache().glob("models--*--*")):
        _, user, name = repo.name.split("--", 2)
        try:
            commit = (repo / "refs" / "main").read_text().strip()
        except (OSError, ValueError):
            commit = ""
        snapshots = repo / "snapshots"
        chosen = [snapshots / commit] if re.fullmatch(r"[0-9a-f]{40}", commit) else sorted(snapshots.glob("*"))[-1:]
        for snapshot in chosen:
            files = (path for depth in ("*.gguf", "*/*.gguf") for path in snapshot.glob(depth))
            for (_, stem), (paths, lacks) in _together(files).items():
                if not stem.lower().startswith("mmproj"):
                    yield Installed(stem, "hub", paths, _nbytes(paths), f"{user}/{name}:{label(stem)}", lacks)


def _of_ollama() -> Iterator[Installed]:
    """Of each manifest HOST/USER/MODEL/TAG the layer with the model, which is a GGUF by the name of its digest."""
    for folder in environment.ollama_folders():
        for manifest in sorted((folder / "manifests").glob("*/*/*/*")):
            host, user, model, tag = manifest.parts[-4:]
            name = f"{model}:{tag}"
            if host != "registry.ollama.ai":
                name = f"{host}/{user}/{name}"
            elif user != "library":
                name = f"{user}/{name}"
            digests = _digests(manifest)
            path = folder / "blobs" / f"sha256-{digests[0]}" if len(digests) == 1 else None
            if path is not None and path.is_file():
                yield Installed(name, "ollama", [path], path.stat().st_size)


def _digests(manifest: Path) -> list[str]:
    """Digests of a manifest's layers that are models."""
    try:
        if not manifest.is_file() or manifest.stat().st_size > LARGEST_MANIFEST:
            return []
        layers = json.loads(manifest.read_bytes())["layers"]
        models = [layer for layer in layers if layer["mediaType"] == "application/vnd.ollama.image.model"]
        return [found[1] for layer in models if (found := _DIGEST.fullmatch(layer["digest"]))]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []


def _together(paths) -> dict[tuple[Path, str], tuple[list[Path], int]]:
    """(folder, stem) to the parts that are there, in their order, and how many are not."""
    found: dict[tuple[Path, str], list[Path]] = {}
    counts: dict[tuple[Path, str], int] = {}
    for path in sorted(paths):
        part = PART.fullmatch(path.stem)
        key = path.parent, part["stem"] if part else path.stem
        found.setdefault(key, []).append(path)
        counts[key] = max(counts.get(key, 1), int(part["count"]) if part else 1)
    groups = {key: [path for path in group if path.is_file()] for key, group in found.items()}
    return {key: (group, counts[key] - len(group)) for key, group in groups.items() if group}


def _nbytes(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths)
