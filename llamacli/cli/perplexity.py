"""`llamacli perplexity`: prints how well a model predicts a text, and its divergence from another, by bench/quality.py."""

import json
import os
from typing import Annotated

from llamacli.cli.console import rate
from llamacli.cli.grammar import option
from llamacli.cli.options import (
    KV,
    DeviceName,
    GpuLayers,
    Json,
    KvType,
    Memory,
    ModelAndText,
    ModelName,
    Output,
    TextFile,
    Threads,
    Window,
    find_model,
    load_model,
    memory_bytes,
    model_and_text,
    placement,
    read_file,
)
from llamacli.errors import UsageError


def perplexity(
    words: ModelAndText = None,
    model: ModelName = None,
    file: TextFile = None,
    ctx: Window = 512,
    reference: Annotated[
        str | None,
        option("--reference", metavar="FILE|NAME", help="Add the KL divergence from this model and how often both agree."),
    ] = None,
    threads: Threads = None,
    memory: Memory = None,
    kv: KvType = KV.f16,
    device: DeviceName = None,
    gpu_layers: GpuLayers = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Measure perplexity on a text.

    The text is cut into windows; the second half of each is scored. Less is better. KL divergence is in nats.
    A reference runs on the CPU with keys and values in f16, so that --reference with the same file tells how far
    --device mlx or --kv q8_0 is from it.

    Examples:
    llamacli perplexity -m scout-q4.gguf -f wiki.txt
    llamacli perplexity -m scout-q4.gguf -f wiki.txt --reference scout-q8.gguf
    """
    from llamacli.bench import quality

    console = output.console()
    model, file = model_and_text(words or [], model, file)
    text = read_file(file, console)
    if not text and file == "-":
        raise UsageError("expected a text, found none; give -f/--file FILE, or pipe it in")
    paths = [find_model(name, console) for name in (model, reference)[: 1 if reference is None else 2]]
    limits = [share | {"logits_rows": quality.rows_held(ctx)} for share in _shares(paths, memory_bytes(memory))]
    loaded = load_model(paths[0], threads, ctx, console, kv=kv.value, **limits[0], **placement(device, gpu_layers))
    ids = quality.windows(loaded.tokenizer, text, ctx, file)
    other = load_model(paths[1], threads, ctx, console, **limits[1]) if reference is not None else None
    scores = quality.Scores(loaded, *ids.shape, other)
    title = f"{loaded.gguf.path.name} on {file}"
    try:
        with console.progress("perplexity") as update:
            for i, window in enumerate(ids):
                update(i, len(ids), scores.label)
                scores.add(window)
            update(len(ids), len(ids), scores.label)
    except (KeyboardInterrupt, SystemExit):
        if scores.scored:
            _show(scores, len(ids), f"{title}, interrupted", as_json, console)
        raise
    _show(scores, len(ids), title, as_json, console)


def _show(scores, n_windows: int, title: str, as_json: bool, console) -> None:
    record = scores.record()
    if as_json:
        console.result(json.dumps(record | ({} if scores.scored == n_windows else {"interrupted": True})))
        return
    rows = [("perplexity", _with_error(record, "perplexity", "perplexity_error"))]
    if scores.reference is not None:
        rows += [
            ("of the reference", _with_error(record, "reference_perplexity", "reference_perplexity_error")),
            ("mean KL divergence", _with_error(record, "kl_mean", "kl_error")),
            ("median, 99 %, maximum", ", ".join(f"{record[k]:.3g}" for k in ("kl_median", "kl_p99", "kl_max"))),
            ("same best token", f"{100 * record['top1_agreement']:.2f} %"),
        ]
    of = "" if scores.scored == n_windows else f" of {n_windows}"
    rows.append(("tokens", f"{record['tokens']} scored in {record['windows']}{of} windows of {scores.ctx}"))
    rows.append(("speed", f"{rate(record['tokens_per_second'])} tokens/s"))
    console.table(title, rows)


def _shares(paths: list, memory: int | None) -> list[dict]:
    """The memory of each model. Of two, the first gets the share that its file has of both files, so that memory is left for
    the other; the bytes of the first then count against the limit of the second (placement.plan_residency).
    """
    if len(paths) == 1:
        return [{} if memory is None else {"memory": memory}]
    from llamacli.plan import machine

    memory = memory or machine.budget() + machine.private()
    sizes = [os.path.getsize(path) if os.path.exists(str(path)) else 0 for path in paths]
    return [{"memory": memory * sizes[0] // max(1, sum(sizes)) or 1}, {"memory": memory}]


def _with_error(record: dict, value: str, error: str) -> str:
    return f"{record[value]:.5g} +/- {record[error]:.2g}"
