"""`llamacli models`: the models on this machine: list, show, add, remove; pull another one from a hub.

In: an action and its arguments. Out: a table or JSON on stdout, notes and progress on stderr. library/ does the work.
"""

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from llamacli import environment
from llamacli.cli.console import Console, amount
from llamacli.cli.grammar import argument, meant, option, refuse
from llamacli.cli.options import Json, Memory, Output, byte_count, model_names
from llamacli.errors import MemoryLimitError, ModelFileError, OutputError, UnsupportedModelError, UsageError

PLACES = {"llamacli": "part of llamacli", "own": "added by you", "ollama": "Ollama's", "hub": "in the hub's cache"}
OURS = "llama4"


class Action(StrEnum):
    """What to do."""

    list = "list"
    show = "show"
    add = "add"
    remove = "remove"
    check = "check"
    pull = "pull"


_EXPECTED = {
    Action.list: "nothing after it",
    Action.show: "a model's name",
    Action.add: "a GGUF file, and a name for it if you like",
    Action.remove: "names of models",
    Action.check: "names of models, or nothing for all",
    Action.pull: "USER/REPO or USER/REPO:QUANT",
}
_COUNT = {Action.list: (0, 0), Action.show: (1, 1), Action.add: (1, 2), Action.pull: (1, 1)}
_COUNT |= {Action.remove: (1, 999), Action.check: (0, 999)}


def models(
    action: Annotated[Action, argument("[list|show|add|remove|check|pull]", "What to do (list).")] = Action.list,
    what: Annotated[
        list[str] | None,
        argument("[NAME|FILE|USER/REPO[:QUANT]]...", "The models to act on.", complete=lambda start: model_names()),
    ] = None,
    everything: Annotated[
        bool, option("-a", "--all", help="With list: also models of other programs that are not Llama 4.")
    ] = False,
    dry_run: Annotated[
        bool, option("--dry-run", help="With pull: show the disk and memory it needs; fetch only the files' headers.")
    ] = False,
    force: Annotated[bool, option("--force", help="With pull: fetch even if the model cannot run here.")] = False,
    memory: Memory = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Models on this machine: list, show NAME, add FILE [NAME], remove NAME, check [NAME], pull USER/REPO[:QUANT].

    Models of Ollama and in the Hugging Face hub's cache are used in place. pull fetches a GGUF from the hub: it first shows the
    disk and memory that the model needs, continues an interrupted download, and verifies the checksum. check reads files again
    and compares them with known checksums: those of pulled models and of the other programs' models.

    Examples:
    llamacli models
    llamacli models pull unsloth/Llama-4-Scout-17B-16E-Instruct-GGUF:Q4_K_M
    llamacli models pull --dry-run unsloth/Llama-4-Maverick-17B-128E-Instruct-GGUF:UD-Q2_K_XL
    llamacli models add /data/scout-q4.gguf scout
    llamacli models check
    llamacli run -m scout "Hello"
    """
    console, words = output.console(), what or []
    least, most = _COUNT[action]
    if not least <= len(words) <= most:
        found = repr(" ".join(words)) if words else "nothing"
        raise UsageError(f"models {action}: expected {_EXPECTED[action]}, found {found}")
    if action != Action.list:
        refuse(("everything",), f"models list with it, found {action}")
    if action != Action.pull:
        refuse(("dry_run", "force", "memory"), f"models pull with it, found {action}")
    if action not in (Action.list, Action.show, Action.pull):
        refuse(("as_json",), f"models list, show or pull with it, found {action}")
    if action == Action.list:
        _list(console, everything, as_json)
    elif action == Action.show:
        _show(words[0], console, as_json)
    elif action == Action.add:
        _add(Path(os.path.expanduser(words[0])), words[1] if len(words) > 1 else None, console)
    elif action == Action.remove:
        _remove(words, console)
    elif action == Action.check:
        _check(words, console)
    else:
        limit = None if memory is None else byte_count(memory, "--memory")
        _pull(words[0], limit, dry_run, force, as_json, console)


def _list(console: Console, everything: bool, as_json: bool) -> None:
    from llamacli.library.installed import installed, unfinished

    found, hidden = [], 0
    for model in installed():
        if not everything and model.place in ("ollama", "hub") and model.architecture not in (OURS, None):
            hidden += 1
        else:
            found.append(model)
    if as_json:
        console.result(json.dumps([_record(model) for model in found], ensure_ascii=False))
        return
    rows = [
        (
            model.name,
            amount(model.nbytes),
            model.source or PLACES[model.place],
            f"{model.lacks} parts missing" if model.lacks else "",
        )
        for model in found
    ]
    rows += [
        (name, amount(have), "/".join(part.parts[-3:-1]), f"cut off at {have / size:.0%}; pull continues")
        for name, part, have, size in unfinished()
        if size > 0
    ]
    if rows:
        console.table(
            "",
            rows,
            ("name", "size", "from", "note") if any(row[3] for row in rows) else ("name", "size", "from", ""),
            spare=(2,),
        )
    if hidden:
        console.note(f"{hidden} more of other architectures, which llamacli cannot run; --all lists them")


def _record(model) -> dict:
    return {
        "name": model.name,
        "source": model.source,
        "place": model.place,
        "files": [str(path) for path in model.paths],
        "bytes": model.nbytes,
        "missing_parts": model.lacks,
        "architecture": model.architecture,
    }


def _found(name: str):
    from llamacli.library.installed import find

    model = find(name)
    if model is None:
        raise UsageError(
            f"{name}: expected the name of a model, found none{meant(name, model_names()) or '; `llamacli models` lists them'}"
        )
    return model


def _show(name: str, console: Console, as_json: bool) -> None:
    from llamacli.cli.inspect import describe
    from llamacli.files.gguf import open_gguf

    model = _found(name)
    if model.lacks:
        raise ModelFileError(
            f"{model.name}: expected all its parts, found {model.lacks} missing; `llamacli models pull` continues"
        )
    inside = describe(open_gguf(model.paths[0]))
    if as_json:
        console.result(json.dumps(_record(model) | {"inside": inside}, ensure_ascii=False))
        return
    rows = [("from", model.source or PLACES[model.place]), ("size", amount(model.nbytes))]
    rows += [("file", str(path) + (f" -> {os.path.realpath(path)}" if path.is_symlink() else "")) for path in model.paths]
    rows += [(key, inside[key]) for key in ("architecture", "license", "attribution") if inside[key]]
    if inside["runnable"]:
        rows.append(("context", f"{inside['context']} tokens"))
    else:
        rows.append(("cannot run", inside["why_not"]))
    console.table(model.name, rows)
    console.note(f"`llamacli inspect {model.name}` shows what is inside, `llamacli plan {model.name}` whether it fits")


def _add(file: Path, name: str | None, console: Console) -> None:
    from llamacli.files.gguf import open_gguf
    from llamacli.library.installed import PART, find

    gguf = open_gguf(file)
    part = PART.fullmatch(file.stem)
    name = name or (part["stem"] if part else file.stem)
    if not name.isprintable() or "/" in name or name.startswith(".") or len(name) > 200:
        raise UsageError(f"models add: expected a name without slashes and leading dots, found {name!r:.80}")
    if (there := find(name)) is not None and there.name == name:
        raise UsageError(
            f"models add: expected a new name, found {name}, which is {there.paths[0]}; give another one after FILE"
        )
    folder = environment.models_folder()
    if len(gguf.paths) > 1:
        ends = [path.name[-len("-00001-of-00002.gguf") :] for path in gguf.paths]
        links = [folder / name / f"{name}{end}" for end in ends]
    else:
        links = [folder / f"{name}.gguf"]
    try:
        links[0].parent.mkdir(parents=True, exist_ok=True)
        for link, path in zip(links, gguf.paths, strict=True):
            link.symlink_to(os.path.abspath(path))
    except OSError as error:
        raise OutputError(
            f"{error.filename2 or error.filename}: expected a new link, found: {error.strerror}; remove it first"
        ) from None
    console.note(f"{name} is now a name of {file}, which stays where it is")


def _check(names: list[str], console: Console) -> None:
    """Read the files with known checksums. ModelFileError at the end if one differs."""
    from llamacli.library.checksums import known, sha256_of
    from llamacli.library.installed import installed

    models = [_found(name) for name in names] or [model for model in installed() if any(map(known, model.paths))]
    if not models:
        console.note("no checksum is known of any model here")
    damaged = []
    for model in models:
        for path in model.paths:
            if (expected := known(path)) is None:
                console.result(f"{path}: no checksum is known")
                continue
            try:
                with console.progress("check", nbytes=True) as update:
                    found = sha256_of(path, lambda done, total, path=path: update(done, total, path.name))
            except OSError as error:
                found = error.strerror
            if found != expected:
                damaged.append(path)
            console.result(f"{path}: " + ("whole" if found == expected else f"expected SHA-256 {expected}, found {found}"))
    if damaged:
        raise ModelFileError(
            f"{damaged[0]}: expected the bytes that came, found others"
            f"{f' there and in {len(damaged) - 1} more' if damaged[1:] else ''}; remove the model and fetch it again"
        )


def _remove(names: list[str], console: Console) -> None:
    from llamacli.library.installed import unfinished

    cut = {}
    for name, part, _, _ in unfinished():
        cut.setdefault(name, []).append(part)
    found = []
    for name in names:  # all of them are there, or none is removed
        parts = cut.get(name, [])
        model = None if parts else _found(name)
        if model is not None and model.place != "own":
            how = {"ollama": f"`ollama rm {model.name}`", "hub": "`hf cache rm`"}.get(model.place, "nothing")
            where = f"{environment.models_folder()}, found one that is {PLACES[model.place]}"
            raise UsageError(f"{name}: expected a model of {where}; {how} removes it")
        found.append((name, parts if model is None else model.paths))
    for name, paths in found:
        freed = 0
        for path in paths:
            try:
                freed += 0 if path.is_symlink() else path.stat().st_size
                path.unlink()
                path.with_name(f"{path.name}.json").unlink(missing_ok=True)
            except OSError as error:
                raise OutputError(
                    f"{path}: expected a file that can be removed, found: {error.strerror}; check the folder"
                ) from None
        _remove_empty(paths[0].parent)
        console.note(f"removed {name}" + (f", {amount(freed)}" if freed else ", a link; its file stays where it is"))


def _remove_empty(folder: Path) -> None:
    """Remove a folder and its parents, up to the models folder, as far as they are empty."""
    top = environment.models_folder()
    while folder != top and top in folder.parents and not any(folder.iterdir()):
        folder.rmdir()
        folder = folder.parent


def _pull(text: str, memory: int | None, dry_run: bool, force: bool, as_json: bool, console: Console) -> None:
    from llamacli.library.http import Hub
    from llamacli.library.hub import choose, parse, variants
    from llamacli.library.pull import Pull

    repo, wanted = parse(text)
    hub = Hub(environment.hub_endpoint(), environment.hub_token(), console.note)
    with console.waiting(lambda: f"asking {environment.hub_endpoint()} ..."):
        variant = choose(variants(hub, repo), wanted, repo)
    with console.progress("pull", nbytes=True) as update:

        def follow(done: int, total: int, name: str) -> None:
            update(done, total, f"{name}, {amount(done)} of {amount(total)}")

        try:
            with Pull(hub, repo, variant, follow) as pull:
                pull.check_there()
                words, record = ([], {}) if pull.whole else _plan(pull, variant, memory, force)
                if dry_run:
                    pull.forget()
                else:
                    for line in words:
                        console.note(line)
                    pull.fetch()
                path = str(pull.path)
        except KeyboardInterrupt:
            console.note("the received part is kept; the same command continues")
            raise
    if dry_run:
        console.result(json.dumps(record) if as_json else "\n".join(words or [f"{path} is here already"]))
        return
    console.result(json.dumps({"name": variant.stem, "file": path, "bytes": variant.nbytes}) if as_json else path)
    console.note(f"`llamacli run -m {variant.stem}` uses it, `-m {repo}:{variant.label}` as well")


def _plan(pull, variant, memory: int | None, force: bool) -> tuple[list[str], dict]:
    """The disk and memory that the model needs, as lines and as a record. An error if there is too little, unless `force`."""
    free, here = pull.check_room(), variant.nbytes - pull.missing
    try:
        words, plan = _planned(pull.header(), memory)
    except (UnsupportedModelError, MemoryLimitError) as error:
        if not force:
            pull.forget()
            raise type(error)(f"{error} (--force fetches it anyway)") from None
        words, plan = f"it cannot run here: {error}", None
    n = len(variant.files)
    size = (
        f"{amount(variant.nbytes)}" + (f" in {n} files" if n > 1 else "") + (f", {amount(here)} of it are here" if here else "")
    )
    lines = [f"{pull.repo}:{variant.label}: {size}; {amount(free)} free on the disk", words]
    record = {"repo": pull.repo, "label": variant.label, "bytes": variant.nbytes, "missing_bytes": variant.nbytes - here}
    return lines, record | {"disk_free_bytes": free, "plan": plan}


def _planned(gguf, memory: int | None) -> tuple[str, dict]:
    """The memory that the model needs, as text and as a record. MemoryLimitError if it cannot run."""
    from llamacli.cpu.kernels.cores import default_threads
    from llamacli.cpu.weights import held_bytes
    from llamacli.llama4.config import Config
    from llamacli.plan import machine, placement

    config = Config.from_gguf(gguf)
    sizes = placement.size_by_kind(((t.name, held_bytes(t)) for t in gguf.tensors.values()), config)
    ctx, threads = min(8192, config.context_length or 8192), default_threads()
    limit = machine.budget() if memory is None else memory
    ctx = placement.fit_ctx(config, sizes, limit, ctx, threads=threads) or ctx
    p = placement.place(config, sizes, limit, ctx, threads=threads, name=gguf.path.name)
    if p.mode == "mapped":
        words = f"it fits into memory: {amount(p.resident)} of {amount(limit)} with a context of {ctx} tokens"
    else:
        words = (
            f"it runs in {amount(limit)} of memory with a context of {ctx} tokens: {p.slots:.1f} of {sizes.n_experts} experts "
            f"a layer stay there, the others are read when they are needed"
        )
    return words, {"ctx": ctx, "mode": p.mode, "resident_bytes": p.resident, "memory_bytes": limit}
