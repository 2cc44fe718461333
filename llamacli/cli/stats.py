"""The line about tokens, speed and memory that stands after an answer.

In: the numbers of a session (session.Stats), how the answer ended. Out: one line of text.
"""

REASONS = {
    "stop": "complete",
    "length": "stopped at the -n limit",
    "context": "context full",
    "interrupt": "stopped by Ctrl-C",
    "tool_calls": "calls tools",
    "rounds": "stopped at the --tool-rounds limit",
}


def describe(stats, reason: str | None, load_s: float | None = None) -> str:
    """The line about speed after an answer."""
    parts = [f"{stats.prompt_tokens} prompt tokens"] if stats.prompt_tokens else []  # a server sends its counts at the end
    if parts and stats.cached_tokens:
        parts[0] += f" ({stats.cached_tokens} kept from before)"
    if parts and stats.prefill_tps:
        parts[0] += f" at {stats.prefill_tps:.1f}/s"
    parts.append(f"{stats.completion_tokens} answered" + (f" at {stats.decode_tps:.1f}/s" if stats.decode_tps else ""))
    if stats.proposed:
        parts.append(f"{stats.accepted} of {stats.proposed} guesses right")
    if stats.decoded and (io := stats.decode_io) and io.hits + io.misses + io.kv_bytes:
        parts.append(_describe_io(io, stats.decoded, stats.decode_s))
    if load_s is not None:
        parts.append(f"loaded in {load_s:.2f} s")
    if reason:
        parts.append(REASONS.get(reason, reason))
    return "[" + ", ".join(parts) + "]"


def _describe_io(io, tokens: int, seconds: float) -> str:
    """The reads that the answer's tokens needed, as a line."""
    from llamacli.plan.machine import resident_words

    asked = io.hits + io.misses
    nbytes = io.bytes_read + io.kv_bytes
    megabytes, wait = nbytes / tokens / 1e6, 1000 * io.stall_s / tokens
    speed = f" at {nbytes / io.reading_s / 1e9:.1f} GB/s" if io.reading_s else ""
    experts = f"{100 * io.hits / asked:.0f} % of experts in memory, " if asked else ""
    keys = f", {io.kv_bytes / tokens / 1e6:.0f} of it keys and values" if io.kv_bytes else ""
    return (
        f"{experts}{megabytes:.0f} MB a token read{keys}{speed}, {wait:.0f} of {1000 * seconds / tokens:.0f} ms waiting for "
        f"it, {resident_words()}"
    )
