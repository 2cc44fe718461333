"""`llamacli run`: one prompt, one answer on stdout.

In: words, files, stdin. Out: the answer's bytes and one newline, or one JSON object. Knows nothing of decoding; session.py
does it.
"""

import json
import time
from typing import Annotated

import typer

from llamacli.cli.console import Console
from llamacli.cli.options import Generation, Json, Output, checked, option, read_file, read_stdin, stdin_is_piped
from llamacli.errors import UsageError
from llamacli.plan.machine import resident


def run(
    prompt: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="The prompt; words are joined by spaces.")
    ] = None,
    file: Annotated[
        list[str] | None, option("-f", "--file", metavar="FILE", help="Text before the prompt; repeatable, - is stdin.")
    ] = None,
    raw: Annotated[bool, option("--raw", help="Continue the text as it is: no chat template.")] = False,
    as_json: Json = False,
    no_stdin: Annotated[bool, option("--no-stdin", help="Leave stdin alone (for ssh, cron and loops).")] = False,
    options: Generation = None,
    output: Output = None,
) -> None:
    """Answer one prompt; text piped in comes before it."""
    console = output.console()
    if raw and options.system is not None:
        raise UsageError("--raw and --system exclude each other: without the chat template there is no system prompt")
    text = _prompt(prompt or [], file or [], no_stdin, console)
    began = time.perf_counter()
    model = options.load(console)
    load_s = time.perf_counter() - began
    if raw:
        ids = model.tokenizer.encode(text, bos=True, special=False)
    else:
        system = [{"role": "system", "content": options.system}] if options.system else []
        ids = model.prompt_ids([*system, {"role": "user", "content": text}])
    _answer(model, ids, options, console, load_s, as_json)


def _prompt(words: list[str], files: list[str], no_stdin: bool, console: Console) -> str:
    """stdin, then the files, then the words, a blank line between each two."""
    parts = [read_file(name, console) for name in files]
    if "-" not in files and not no_stdin and stdin_is_piped():
        parts.insert(0, read_stdin(console))
    parts = [part for part in [*parts, checked(" ".join(words), "prompt")] if part]
    if not parts:
        raise UsageError(
            "no prompt: give one as an argument, with -f FILE or through a pipe; `llamacli chat` starts a conversation"
        )
    text = parts[0]
    for part in parts[1:]:
        text += ("\n" if text.endswith("\n") else "\n\n") + part
    return text


def _answer(model, ids: list[int], options: Generation, console: Console, load_s: float, as_json: bool) -> None:
    session, text, reason = model.session(), [], None
    try:
        for piece in session.stream(ids, options.sampler(model, console), options.max_tokens, options.stop or ()):
            text.append(piece.text)
            reason = piece.finish_reason
            if not as_json:
                console.piece(piece.text)
    finally:  # also on Ctrl-C and SIGTERM
        if as_json:
            if reason:
                _print_json(console, "".join(text), reason, session.stats, load_s)
        else:
            console.end(always=reason not in (None, "interrupt"))
    if reason == "context":
        console.warn(f"the context of {model.ctx} tokens is full, the answer ends here; use a larger -c")
    console.note(describe(session.stats, reason, load_s))


def _print_json(console: Console, text: str, reason: str, stats, load_s: float) -> None:
    timings = {"load_s": load_s} | {
        name: getattr(stats, name) for name in ("prefill_s", "decode_s", "prefill_tps", "decode_tps")
    }
    record = {
        "text": text,
        "finish_reason": reason,
        "usage": {"prompt_tokens": stats.prompt_tokens, "completion_tokens": stats.completion_tokens},
        "timings": {name: value if value is None else round(value, 4) for name, value in timings.items()},
    }
    console.result(json.dumps(record, ensure_ascii=False))


def describe(stats, reason: str | None, load_s: float | None = None) -> str:
    """The line about speed after an answer."""
    parts = [f"{stats.prompt_tokens} prompt tokens"]
    if stats.cached_tokens:
        parts[0] += f" ({stats.cached_tokens} kept from before)"
    if stats.prefill_tps:
        parts[0] += f" at {stats.prefill_tps:.1f}/s"
    parts.append(f"{stats.completion_tokens} answered" + (f" at {stats.decode_tps:.1f}/s" if stats.decode_tps else ""))
    if stats.decode_traffic and stats.decoded:
        parts.append(describe_traffic(stats.decode_traffic, stats.decoded, stats.decode_s))
    if load_s is not None:
        parts.append(f"loaded in {load_s:.2f} s")
    if reason:
        parts.append({"stop": "complete", "length": "stopped at the -n limit", "context": "context full"}.get(reason, reason))
    return "[" + ", ".join(parts) + "]"


def describe_traffic(traffic, tokens: int, seconds: float) -> str:
    """What the answer's tokens asked of the disk."""
    asked = traffic.hits + traffic.misses
    megabytes, wait = traffic.bytes_read / tokens / 1e6, 1000 * traffic.stall_s / tokens
    speed = f" at {traffic.bytes_read / traffic.reading_s / 1e9:.1f} GB/s" if traffic.reading_s else ""
    return (
        f"{100 * traffic.hits / max(1, asked):.0f} % of experts in memory, {megabytes:.0f} MB a token read{speed}, "
        f"{wait:.0f} of {1000 * seconds / tokens:.0f} ms waiting for it, {resident() / 1e9:.2f} GB resident"
    )
