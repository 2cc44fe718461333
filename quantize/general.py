"""Builds the metadata under `general.`: name, size label, licence, languages, base models.

In: a Hugging Face folder (its name, config.json and the YAML front matter of README.md) and the tensors' shapes. Out: metadata
and notices for the user. Only the subset of YAML that model cards use is parsed: top-level keys whose value is a text or a list
of texts; everything else is ignored.

Llama 4's licence requires that copies carry its notice and "Built with Llama", and that model names begin with "Llama".
"""

import math
import os
import re
from pathlib import Path

from llamacli.llama4.tensors import Role, role_of
from quantize.folder import optional_json
from quantize.sources import Rows

MAX_CARD = 1 << 20  # bytes of README.md that are read
LICENCE, LINK = "llama4", "https://github.com/meta-llama/llama-models/blob/main/models/llama4/LICENSE"
ATTRIBUTION = (
    "Built with Llama. Llama 4 is licensed under the Llama 4 Community License, "
    "Copyright © Meta Platforms, Inc. All Rights Reserved."
)
_VERSION = re.compile(r"(v|iter)?\d+(\.\d+)*", re.IGNORECASE | re.ASCII)
_SIZE = re.compile(r"(a|\d+x)?\d+([._]\d+)?[kmbt]", re.IGNORECASE | re.ASCII)
_TUNED = re.compile(r"chat|instruct|vision|lora", re.IGNORECASE)
_KEY = re.compile(r"([A-Za-z_]\w*):(?:\s+(.*))?")


def read_general(folder: Path, rows: dict[str, Rows]) -> tuple[dict[str, object], list[str]]:
    """(metadata under `general.`, notices)."""
    card, total = read_card(folder / "README.md"), sum(math.prod(source.shape) for source in rows.values())
    source = optional_json(folder / "config.json").get("_name_or_path")
    named = source if isinstance(source, str) and re.fullmatch(r"[^/.][^/]*/[^/]+", source) else ""
    parts = _components(_folder_name(folder), total)
    if named:
        organization, name = named.split("/")
        parts |= {"name": _title(name), "organization": _title(organization)} | _components(name, total)
    for key in ("name", "author", "version", "organization", "description", "finetune", "basename", "size_label"):
        value = card.get(key) or card.get(f"model_{key}")
        if isinstance(value, str):
            parts[key] = value
    parts = {"name": _title(_folder_name(folder)) or "Llama 4", "size_label": _size_label(rows)} | parts
    found: dict[str, object] = {"general.architecture": "llama4", "general.type": "model"}
    found |= {f"general.{key}": value for key, value in parts.items()}
    notices = _licence(card, found)
    bases = _texts(card.get("base_model"))
    if bases:
        found["general.base_model.count"] = len(bases)
    for i, base in enumerate(bases):
        organization, _, name = base.removeprefix("https://huggingface.co/").rpartition("/")
        found[f"general.base_model.{i}.name"] = _title(name)
        if organization:
            found[f"general.base_model.{i}.organization"] = _title(organization)
            found[f"general.base_model.{i}.repo_url"] = f"https://huggingface.co/{organization}/{name}"
    for key, names in (("tags", ("tags", "pipeline_tag")), ("languages", ("languages", "language"))):
        values = [text for name in names for text in _texts(card.get(name))]
        if values:
            found[f"general.{key}"] = values
    return found, notices


def _licence(card: dict, found: dict[str, object]) -> list[str]:
    """Add the licence's fields to `found`, for Llama 4's licence its attribution too; returns notices."""
    licence, name = ",".join(_texts(card.get("license"))), card.get("license_name")
    fields = {"license": licence, "license.name": name, "license.link": card.get("license_link")}
    notices = []
    if LICENCE in (licence, name):
        fields = {"license": "other", "license.name": LICENCE, "license.link": fields["license.link"] or LINK}
        fields["attribution"] = ATTRIBUTION
        if not str(found["general.name"]).startswith("Llama"):
            notices.append(f"Llama 4's licence asks for a name that begins with Llama, the model's is {found['general.name']}")
    elif not licence:
        notices.append("no licence in the source's README.md: the file will name none; Meta's models are under Llama 4's")
    found |= {f"general.{key}": value for key, value in fields.items() if value and isinstance(value, str)}
    return notices


def read_card(path: Path) -> dict[str, str | list[str]]:
    """The front matter (YAML between two lines of ---) as texts and lists of texts; {} if there is none or it is unreadable."""
    if not path.is_file():  # nothing, or a pipe, which would be waited for
        return {}
    try:
        with path.open("rb") as file:
            lines = file.read(MAX_CARD).decode("utf-8-sig", "replace").splitlines()
    except OSError:
        return {}
    if not lines or lines[0].rstrip() != "---" or "---" not in (line.rstrip() for line in lines[1:]):
        return {}
    found, key = {}, None
    for line in lines[1:]:
        if line.rstrip() == "---":
            break
        item = re.match(r"\s*-\s+(.+)", line)
        if item and key and isinstance(found.get(key), list):
            found[key].append(_plain(item[1]))
        elif entry := _KEY.fullmatch(line.rstrip()):
            key, value = entry[1], (entry[2] or "").strip()
            if value.startswith("[") and value.endswith("]"):
                found[key] = [_plain(text) for text in value[1:-1].split(",") if text.strip()]
            elif value[:1] not in ("|", ">", "{", "&", "*"):
                found[key] = _plain(value) if value else []
    return {name: value for name, value in found.items() if value}


def _plain(text: str) -> str:
    text = text.strip()
    if text[:1] in "\"'" and len(text) > 1 and text[-1] == text[0]:
        return text[1:-1]
    return text.split(" #")[0].rstrip()


def _texts(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []


def _components(name: str, total: int) -> dict[str, str]:
    """basename, version, size_label and finetune from a name such as Llama-4-Scout-17B-16E-Instruct.

    A word such as 17B is the size label only if it is near the `total` number of weights.
    """
    words, kinds = [word for word in name.split("-") if word], []
    for i, word in enumerate(words):
        kind = "version" if _VERSION.fullmatch(word) else ""
        if not kind and i and _SIZE.fullmatch(word):
            digits = re.search(r"\d+([._]\d+)?(?=[kmbt]$)", word, re.IGNORECASE)[0].replace("_", ".")
            size = float(digits) * 1000 ** (" KMBT".index(word[-1].upper()))
            kind = "size_label" if abs(size - total) <= 7 * total // 8 else "finetune"
        elif not kind and i and _TUNED.fullmatch(word):
            kind = "finetune"
        kinds.append(kind)
    start = next((i for i, kind in enumerate(kinds) if kind not in ("", "version")), len(kinds))
    while start and kinds[start - 1] == "version" and start == len(kinds):
        start -= 1
    kinds = ["basename" if i < start else kind or "finetune" for i, kind in enumerate(kinds)]
    found = {key: "-".join(w for w, kind in zip(words, kinds, strict=True) if kind == key) for key in dict.fromkeys(kinds)}
    return found if found.keys() - {"basename"} else {}


def _folder_name(folder: Path) -> str:
    """The folder's name, or its parent's if the folder is just called `hf`."""
    path = folder.resolve()
    return printable((path.parent if path.name == "hf" else path).name)


def printable(name: str) -> str:
    """A file name as text; bytes that are not UTF-8 become U+FFFD."""
    return os.fsencode(name).decode("utf-8", "replace")


def _title(name: str) -> str:
    """A name as words with capitals: llama-4-scout becomes Llama 4 Scout."""
    return " ".join(word.title() if word.islower() else word for word in name.replace("-", " ").replace("_", " ").split())


def _size_label(rows: dict[str, Rows]) -> str:
    """GGUF's size label, experts x weights of the model with a single expert per layer: 16x17B."""
    experts = {name: source.shape for name, source in rows.items() if role_of(name) is Role.EXPERTS}
    n_experts = next(iter(experts.values()))[0] if experts else 0
    total = sum(math.prod(source.shape) for source in rows.values())
    total -= sum(math.prod(shape) - math.prod(shape[1:]) for shape in experts.values())
    scale, suffix = next(((s, x) for s, x in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if total > s), (1e3, "K"))
    count = f"{total / scale:.0f}" if total / scale >= 9.5 else f"{total / scale:.1f}"
    return f"{n_experts}x{count}{suffix}" if n_experts else f"{count}{suffix}"
