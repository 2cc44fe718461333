"""`llamacli perplexity`: how well a model predicts a text, and how far it is from another. quality.py measures, this shows."""

import json
from typing import Annotated

from llamacli.cli.options import (
    Json,
    ModelName,
    Output,
    TextFile,
    Threads,
    Window,
    find_model,
    load_model,
    option,
    read_file,
)


def perplexity(
    model: ModelName = None,
    file: TextFile = ...,
    ctx: Window = 512,
    reference: Annotated[
        str | None,
        option("--reference", metavar="FILE|NAME", help="Add the KL divergence from this model and how often both agree."),
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Measure perplexity on a text.

    The text is cut into windows; the second half of each is scored. Less is better. KL divergence is in nats.
    """
    from llamacli.bench import quality

    console = output.console()
    text = read_file(file, console)
    loaded = load_model(find_model(model, console), threads, ctx, console)
    ids = quality.windows(loaded.tokenizer, text, ctx, file)
    other = load_model(find_model(reference, console), threads, ctx, console) if reference else None
    with console.progress("perplexity") as update:
        record = quality.perplexity(loaded, ids, other, update)
    if as_json:
        console.result(json.dumps(record))
        return
    rows = [("perplexity", _with_error(record, "perplexity", "perplexity_error"))]
    if other:
        rows += [
            ("of the reference", _with_error(record, "reference_perplexity", "reference_perplexity_error")),
            ("mean KL divergence", _with_error(record, "kl_mean", "kl_error")),
            ("median, 99 %, maximum", ", ".join(f"{record[k]:.3g}" for k in ("kl_median", "kl_p99", "kl_max"))),
            ("same best token", f"{100 * record['top1_agreement']:.2f} %"),
        ]
    rows.append(("tokens", f"{record['tokens']} scored in {record['windows']} windows of {ctx}"))
    rows.append(("speed", f"{record['tokens_per_second']:.2f} tokens/s"))
    console.table(f"{loaded.gguf.path.name} on {file}", rows)


def _with_error(record: dict, value: str, error: str) -> str:
    return f"{record[value]:.5g} +/- {record[error]:.2g}"
