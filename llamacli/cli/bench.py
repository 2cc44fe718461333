"""`llamacli bench`: speed of prefill and decode beside what the machine's memory allows. measure.py measures, this shows."""

import json
from typing import Annotated

from llamacli.cli.options import Json, ModelName, Output, Threads, find_model, load_model, option
from llamacli.errors import UsageError


def bench(
    model: ModelName = None,
    prompt: Annotated[
        int, option("-p", "--prompt", metavar="N", min=0, help="Tokens of the prompt to prefill; 0 leaves it out (512).")
    ] = 512,
    generate: Annotated[
        int, option("-n", "--generate", metavar="N", min=0, help="Tokens to decode; 0 leaves it out (128).")
    ] = 128,
    threads: Threads = None,
    repetitions: Annotated[
        int, option("-r", "--repetitions", metavar="N", min=1, max=1000, help="Runs of each test; the median counts (3).")
    ] = 3,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Measure prefill and decode, after one run to warm up.

    GB/s is what the weights read per token or prompt come to; the limit is this machine's measured read bandwidth in GB/s.
    """
    from llamacli import measure

    if not prompt and not generate:
        raise UsageError("nothing to measure: expected -p or -n above 0")
    console = output.console()
    loaded = load_model(find_model(model, console), threads, max(prompt, generate) + 1, console)
    with console.progress("bench") as update:
        records = measure.speed(loaded, prompt, generate, repetitions, update)
    if as_json:
        console.result(json.dumps(records))
        return
    rows = [
        (
            record["test"],
            f"{record['tokens_per_second']:.2f}",
            f"{min(record['runs']):.2f} to {max(record['runs']):.2f}",
            f"{record['gbytes_per_second']:.2f}",
            "not measured" if record["bandwidth_limit"] is None else f"{record['bandwidth_limit']:.2f}",
        )
        for record in records
    ]
    console.table(
        f"{loaded.gguf.path.name}, {loaded.engine.threads} threads", rows, ("test", "tokens/s", "range", "GB/s", "limit GB/s")
    )
