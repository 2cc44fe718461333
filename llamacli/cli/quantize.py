"""`llamacli quantize`: converts a Hugging Face folder or a GGUF to a GGUF of another type, by the package quantize.

In: paths, a recipe, options. Out: the file; progress and a table of what it holds on stderr; the plan of a dry run, or with
--json one object, on stdout.
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Annotated

from llamacli.cli import signals
from llamacli.cli.console import amount, count, one_line
from llamacli.cli.grammar import argument, meant, option, typed
from llamacli.cli.inputs import show_kernel_notices
from llamacli.cli.nodes import cluster_address
from llamacli.cli.options import Json, Output, Threads, byte_count
from llamacli.cli.progress import clock_time
from llamacli.errors import UsageError
from llamacli.llama4.tensors import Role, find, role_of
from quantize.recipe import DEFAULT, RECIPES, find_recipe

_GROUPS = {  # groups of the final table, by kind or role of tensors
    "ffn_gate_exps": "experts, gate",
    "ffn_up_exps": "experts, up",
    "ffn_down_exps": "experts, down",
    Role.SHARED: "shared experts",
    Role.ATTENTION: "attention",
    Role.DENSE: "dense FFN",
    Role.EMBEDDING: "embedding",
    Role.OUTPUT: "output",
    Role.VISION: "vision tower",
}
_OTHERS = "norms, routers"
GROUPS = (*_GROUPS.values(), _OTHERS)
MOST_NAMED = 4  # nodes beside the name of a tensor


def _type_name(text: str, where: str) -> str:
    try:
        return find_recipe(text).name
    except UsageError:
        near = meant(text, [*RECIPES])
        raise UsageError(f"{where}: expected a type, found {text!r}{near or '; see quantize --help'}") from None


def _is_type(text: str) -> bool:
    with suppress(UsageError):
        return bool(find_recipe(text))
    return False


def quantize(
    source: Annotated[str | None, argument("SRC", "A Hugging Face folder or a GGUF.", complete="file")] = None,
    out: Annotated[
        str | None, argument("[OUT]", "The file to write (default: SRC's name and the type).", complete="file")
    ] = None,
    type_word: Annotated[str | None, argument("[TYPE]", "The same as --type.", complete=lambda start: [*RECIPES])] = None,
    type_name: Annotated[
        str | None,
        option(
            "--type",
            metavar="TYPE",
            check=_type_name,
            complete=lambda start: [*RECIPES],
            help=f"One of the types below (default: {DEFAULT}).",
        ),
    ] = None,
    tensor_types: Annotated[
        list[str] | None,
        option(
            "--tensor-type",
            metavar="REGEX=TYPE",
            help="Another type for tensors whose name REGEX is found in, such as attn_v=Q8_0; repeatable, the first wins.",
        ),
    ] = None,
    imatrix: Annotated[str | None, option("--imatrix", metavar="FILE", help="Weigh errors by an importance matrix.")] = None,
    split_max_size: Annotated[
        str | None,
        option("--split-max-size", metavar="SIZE", help="Write parts of at most SIZE, such as 48G or 500M (G is 10^9 bytes)."),
    ] = None,
    mmproj_type: Annotated[
        str | None,
        option(
            "--mmproj-type",
            metavar="TYPE",
            help="Type of the vision tower, which becomes mmproj-OUT: Q8_0 (default), F16, BF16, F32; none leaves it out.",
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        option(
            "--cluster",
            metavar="ADDRESS",
            setting=True,
            check=cluster_address,
            help="Encode on the nodes of the cluster at HOST[:PORT] that have SRC, too; none: here. See docs/cluster.md.",
        ),
    ] = None,
    layers: Annotated[
        str | None,
        option(
            "--layers",
            metavar="A-B",
            help="Copy these layers of a GGUF, as they are: what a node of a cluster needs (OUT: NAME-layers-A-B.gguf).",
        ),
    ] = None,
    dry_run: Annotated[bool, option("--dry-run", help="Show the plan, write nothing.")] = False,
    force: Annotated[bool, option("--force", help="Replace OUT if it exists.")] = False,
    threads: Threads = None,
    model: Annotated[str | None, option("-m", "--model", metavar="SRC", hidden=True, help="The same as SRC.")] = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Convert and quantize a model.

    An interrupted conversion continues when the same command is given again.

    Examples:
    llamacli quantize Llama-4-Scout-17B-16E-Instruct scout.gguf --type Q4_K_M
    llamacli quantize scout-f16.gguf --imatrix scout.imatrix.gguf --dry-run
    """
    from quantize.convert import convert
    from quantize.writer import output_path

    console = output.console()
    if model is not None:
        if type_word is not None:
            raise UsageError(f"expected one model, found {source} and -m {model}; leave one of them out")
        source, out, type_word = model, source, out
    if source is None:
        raise UsageError("expected SRC, found none (see llamacli quantize --help)")
    if dry_run and getattr(cluster, "typed", False):
        raise UsageError("--dry-run: expected no --cluster with it, as nothing is encoded; leave one of them out")
    if layers is not None:
        others = typed(("type_name", "type_word", "tensor_types", "imatrix", "mmproj_type"))
        others += ["--cluster"] if getattr(cluster, "typed", False) else []
        if others or (out is not None and _is_type(out)):
            other = others[0] if others else out
            raise UsageError(f"{other} and --layers exclude each other: expected a copy as it is; leave one of them out")
        some = _range(layers)
        out = out or f"{Path(source).stem}-layers-{some.start}-{some.stop - 1}.gguf"
    else:
        some = None
    if dry_run or some is not None:
        cluster = None  # a cluster of the settings is ignored: nothing is encoded
    out, type_name = _out_and_type(out, type_word, type_name)
    path = output_path(out) if out is not None else default_out(Path(source), type_name)
    try:
        with signals.unhurried(), _nodes(cluster, threads, console) as nodes, console.progress("quantize") as update:
            follow = Follow(update, console.warn, nodes)
            report = convert(
                Path(source),
                path,
                type_name,
                tensor_types=[_override(text) for text in tensor_types or ()],
                imatrix=Path(imatrix) if imatrix else None,
                split_max_size=None if split_max_size is None else byte_count(split_max_size, "--split-max-size"),
                mmproj_type=_mmproj_type(mmproj_type),
                force=force,
                threads=threads,
                progress=follow,
                planned=follow.plan,
                dry_run=dry_run,
                elsewhere=nodes,
                layers=some,
            )
    except KeyboardInterrupt:
        console.note("stopped; the same command continues")
        raise
    _show(report, follow.told, as_json, console)


quantize.notes = "\n".join(
    ["Types, bits per weight in a Scout, and what for:"]
    + [f"{r.name:<10} {r.bits:>5.2f}  {r.purpose}" for r in RECIPES.values()]
)


def _nodes(cluster: str | None, threads: int | None, console):
    """The nodes of the cluster, if one is given."""
    if cluster is None:
        return nullcontext()
    from llamacli.cluster.control import encoders

    return encoders(cluster, threads, console.warn)


def _out_and_type(out: str | None, word: str | None, type_name: str | None) -> tuple[str | None, str]:
    """OUT and the type, which may also be the last word, as in llama-quantize."""
    if word is None and out is not None and _is_type(out):
        out, word = None, out
    if word is not None and type_name is not None:
        raise UsageError(f"expected one type, found {word} and --type {type_name}; leave one of them out")
    return out, type_name or (DEFAULT if word is None else _type_name(word, "TYPE"))


def default_out(source: Path, type_name: str) -> Path:
    """NAME-TYPE.gguf in the working folder."""
    resolved = Path(os.path.realpath(source))
    name = resolved.stem if resolved.suffix == ".gguf" else resolved.name
    return Path(f"{name or 'model'}-{find_recipe(type_name).name}.gguf")


def _range(text: str) -> range:
    found = re.fullmatch(r"(\d{1,4})-(\d{1,4})", text)
    if not found or int(found[1]) > int(found[2]):
        raise UsageError(f"--layers: expected a first and a last layer such as 24-47, found {text!r}")
    return range(int(found[1]), int(found[2]) + 1)


def _mmproj_type(text: str | None) -> str | None:
    from quantize.tower import DEFAULT, tower_type

    return DEFAULT if text is None else None if text.lower() == "none" else tower_type(text)


def _override(text: str) -> tuple[str, str]:
    pattern, _, kind = text.rpartition("=")
    if not pattern or not kind:
        raise UsageError(f"--tensor-type: expected REGEX=TYPE, such as attn_v=Q8_0, found {text!r}")
    return pattern, kind


class Follow:
    """Shows the progress of the file, with the count of weights, and notices before the work.

    `told`: the notices shown so far. With `nodes` of a cluster it shows the share of each.
    """

    def __init__(self, update: Callable[[int, int, str, int], None], warn: Callable[[str], None], nodes=None):
        self._update, self._warn, self._tensors, self.told = update, warn, {}, []
        self._nodes = nodes

    def plan(self, report) -> None:
        """What will be written, in order."""
        for notice in report["notices"]:
            self._warn(notice)
            self.told.append(notice)
        weights, nbytes = 0, report["nbytes"] - sum(t["nbytes"] for t in report["tensors"])
        for t in report["tensors"]:
            self._tensors[t["name"]] = nbytes, weights, t
            weights, nbytes = weights + t["weights"], nbytes + t["nbytes"]

    def __call__(self, done: int, total: int, tensor: str) -> None:
        first, weights, t = self._tensors.get(tensor, (0, 0, None))
        if t:
            share = min(1.0, max(0.0, (done - first) / max(1, t["nbytes"])))
            label = tensor.removesuffix(".weight")
            if self._nodes and self._nodes.done:
                label += f" ({', '.join(f'{name} {part}' for name, part, _ in shares(self._nodes.done)[:MOST_NAMED])})"
            self._update(done, total, label, weights + int(share * t["weights"]))


def shares(done: dict[str, int]) -> list[tuple[str, str, int]]:
    """Name, share and bytes of each node, the largest first."""
    total = max(1, sum(done.values()))
    return [(name, f"{n / total:.0%}".replace("%", " %"), n) for name, n in sorted(done.items(), key=lambda one: -one[1])]


def _show(report, told: list[str], as_json: bool, console) -> None:
    tensors = report["tensors"]
    by_type = sorted(summary(tensors, lambda t: t["type"]), key=lambda kind: -kind["nbytes"])
    groups = sorted(summary(tensors, lambda t: group_of(t["name"])), key=lambda group: GROUPS.index(group["name"]))
    everything = {"name": "all", "count": len(tensors), "types": [], **_sums(tensors)}
    for notice in report["notices"]:
        if notice not in told:
            console.warn(notice)
    show_kernel_notices(console)
    if as_json:
        sums = {"by_type": by_type, "groups": groups, "weights_nbytes": everything["nbytes"]}
        console.result(json.dumps(report | sums, ensure_ascii=False))
    elif not report["written"]:
        _show_plan(report, [*by_type, everything], console)
    if report["written"] and (console.talks or not as_json):
        groups.append(everything)
        rows = [(g["name"], ", ".join(g["types"]), amount(g["nbytes"]), _bits(g), _error(g["rmse"])) for g in groups]
        console.table("", rows, ("tensors", "type", "size", "bits", "error"), (2, 3, 4), spare=(1,), to_stderr=True)
        if report["nodes"]:
            rows = [(name, amount(nbytes), share) for name, share, nbytes in shares(report["nodes"])]
            console.table("", rows, ("node", "encoded", "share"), (1, 2), to_stderr=True)
        earlier = f", {amount(report['resumed_bytes'])} of it were there already" if report["resumed_bytes"] else ""
        words = f"wrote {_written(report)}: {amount(report['nbytes'])} in {clock_time(report['seconds'])}{earlier}"
        console.say(console.dim(one_line(words)))
    elif not report["written"]:
        console.note(f"would write {_written(report)}: {_size(report)}")


def _written(report) -> str:
    """The file, or the first part, by which a split model is opened."""
    first, *others = [file for file in report["files"] if file != report["mmproj"]] or report["files"]
    tower = f" and {report['mmproj']}" if report["mmproj"] not in (None, first) else ""
    return (f"{first} and {len(others)} further parts" if others else first) + tower


def _show_plan(report, by_type: list[dict], console) -> None:
    tensors = report["tensors"]
    rows = [(t["name"], t["type"], " x ".join(map(str, t["shape"])), amount(t["nbytes"]), _bits(t)) for t in tensors]
    console.table(f"{report['source']} as {report['type']}", rows, ("tensor", "type", "shape", "size", "bits"), (3, 4), (2, 4))
    rows = [(k["name"], str(k["count"]), count(k["weights"]), amount(k["nbytes"]), _bits(k)) for k in by_type]
    console.table("\nBy type", rows, ("type", "tensors", "weights", "size", "bits"), (1, 2, 3, 4), (2,))
    running = f"{amount(by_type[-1]['nbytes'])}, and the KV cache: see llamacli inspect"
    needs = [("to write", _size(report)), ("memory to make it", f"{amount(report['memory'])}, besides the mapped files")]
    console.table("\nNeeds", [*needs, ("memory to run it", running)])


def group_of(name: str) -> str:
    """The row of the final table that counts a tensor."""
    if role_of(name) is Role.VISION:
        return _GROUPS[Role.VISION]
    found = find(name)
    return _OTHERS if found is None else _GROUPS.get(found[0].kind) or _GROUPS.get(found[0].role, _OTHERS)


def summary(tensors: list[dict], key: Callable[[dict], str]) -> list[dict]:
    """Tensors grouped by `key`, in the order of first appearance: name, count, types, weights, nbytes, rmse."""
    groups: dict[str, list[dict]] = {}
    for tensor in tensors:
        groups.setdefault(key(tensor), []).append(tensor)
    return [
        {"name": name, "count": len(found), "types": sorted({t["type"] for t in found}), **_sums(found)}
        for name, found in groups.items()
    ]


def _sums(tensors: Iterable[dict]) -> dict:
    """The sum of weights and of bytes, and the relative error of all together, if each is known."""
    weights, nbytes, errors = sum(t["weights"] for t in tensors), sum(t["nbytes"] for t in tensors), None
    whole = sum(t["energy"] or 0.0 for t in tensors)
    if whole and all(t["energy"] is not None for t in tensors):
        errors = math.sqrt(sum(t["energy"] * (t["rmse"] or 0.0) ** 2 for t in tensors) / whole)
    return {"weights": weights, "nbytes": nbytes, "rmse": errors}


def _size(report) -> str:
    return f"{amount(report['nbytes'])}, {report['bits_per_weight']:.2f} bits per weight"


def _bits(record: dict) -> str:
    return f"{8 * record['nbytes'] / max(1, record['weights']):.2f}"


def _error(rmse: float | None) -> str:
    return "-" if rmse is None else "exact" if rmse == 0 else f"{100 * rmse:.2g} %" if rmse < 0.1 else f"{100 * rmse:.0f} %"
