"""`llamacli doctor`: shows this machine's features and checks that kernels and models compute correct results on it.

In: a model, the small one by default. Out: a line a check on stdout, or JSON. bench/doctor.py makes the checks.
"""

import json
from typing import Annotated

from llamacli.cli import signals
from llamacli.cli.grammar import argument
from llamacli.cli.options import Json, ModelName, Output, find_model, model_names, one_model
from llamacli.errors import DeviceError


def doctor(
    file: Annotated[
        str | None, argument("[MODEL]", "A GGUF file or a model's name, as after -m.", complete=lambda start: model_names())
    ] = None,
    model: ModelName = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Check this machine, above all its GPU, and print what to report.

    It takes a minute with the small model. Checks that cannot be made here say so. The exit code is 1 if one failed.

    Examples:
    llamacli doctor > report.txt
    llamacli doctor scout.gguf --json > report.json
    """
    console = output.console()
    path = find_model(one_model(file, model), console)
    with console.waiting(lambda: "checking ..."), signals.at_once():
        from llamacli.bench.doctor import FAILED, examine
        from quantize.encoders import encoder

        findings = list(examine(path, lambda name: lambda rows: encoder(name).encode(rows, None)))
    if as_json:
        console.result(json.dumps([found._asdict() for found in findings]))
    else:
        console.table("", [(found.check, found.state, found.text) for found in findings])
    if failed := [found.check for found in findings if found.state == FAILED]:
        raise DeviceError(
            f"doctor: expected every check to pass, found {len(failed)} that failed: {', '.join(failed)}; report it"
        )
