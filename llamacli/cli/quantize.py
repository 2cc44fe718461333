"""`llamacli quantize`: a Hugging Face folder or a GGUF to a GGUF of another type. The package quantize converts, this shows.

In: paths and a type. Out: the file; progress on stderr, with --json one object on stdout.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from llamacli.cli.console import amount
from llamacli.cli.options import Json, Output, Threads, option


def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A Hugging Face folder or a GGUF.", show_default=False)],
    out: Annotated[
        str | None,
        typer.Argument(metavar="[OUT]", help="The file to write (default: SRC's name and the type).", show_default=False),
    ] = None,
    type_name: Annotated[str, option("--type", metavar="TYPE", help="F32, F16, BF16, Q8_0 or Q4_0.")] = ...,
    dry_run: Annotated[bool, option("--dry-run", help="Show the plan, write nothing.")] = False,
    force: Annotated[bool, option("--force", help="Replace OUT if it exists.")] = False,
    threads: Threads = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Convert and quantize a model."""
    from quantize.convert import convert

    console = output.console()
    path = Path(out) if out else default_out(Path(source), type_name)
    with console.progress("quantize") as update:
        report = convert(Path(source), path, type_name.upper(), force=force, threads=threads, progress=update, dry_run=dry_run)
    _show(report, path, dry_run, as_json, console)


def default_out(source: Path, type_name: str) -> Path:
    """NAME-TYPE.gguf in the working folder."""
    resolved = source.resolve()
    name = resolved.stem if resolved.suffix == ".gguf" else resolved.name
    return Path(f"{name or 'model'}-{type_name.upper()}.gguf")


def _show(report, path: Path, dry_run: bool, as_json: bool, console) -> None:
    for notice in report["notices"]:
        console.note(notice)
    if as_json:
        console.result(json.dumps(report, ensure_ascii=False))
    elif dry_run:
        rows = [(t["name"], t["type"], " x ".join(map(str, t["shape"])), amount(t["nbytes"])) for t in report["tensors"]]
        console.table(f"{report['source']} as {report['type']}", rows, ("tensor", "type", "shape", "size"))
    size = f"{amount(report['nbytes'])}, {report['bits_per_weight']:.2f} bits per weight"
    console.note(f"would write {path}: {size}" if dry_run else f"wrote {path}: {size}, in {report['seconds']:.1f} s")
