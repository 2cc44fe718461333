"""Output of `llamacli inspect --routing`: a heat map of the experts used, how often they repeat, and hit rates of slots.

In: a log's path. Out: the picture and tables, or one JSON object, on stdout; an image if asked for. bench/routing.py computes
the numbers.
"""

import json
from pathlib import Path

SLOTS_SHOWN = 16  # most rows of the table of slots; with more experts, powers of 2 only


def show_routing(path: Path, plot: Path | None, as_json: bool, console) -> None:
    """Read a log and print its evaluation."""
    from llamacli.bench import routing, routing_log

    if plot:
        from llamacli.bench import plot as picture

        picture.check(plot)
    log = routing_log.read(path)
    n_tokens, _, used = log.chosen.shape
    share, repeats, hits = routing.use(log) / n_tokens, routing.repeats(log), routing.hit_rates(log)
    if as_json:
        record = {
            "model": log.model,
            "tokens": n_tokens,
            "experts": log.n_experts,
            "experts_used": used,
            "layers": [
                {"layer": layer, "use": _rounded(use), "repeats": _number(again), "hits": _rounded(hit)}
                for layer, use, again, hit in zip(log.layers, share, repeats, hits, strict=True)
            ],
            "repeats": _number(repeats.mean()),
            "hits": _rounded(hits.mean(0)),
        }
        console.result(json.dumps(record))
    else:
        _show(log, share, repeats, hits, console)
    if plot:  # last: if it cannot be written, the numbers have been shown
        picture.draw_routing(share, hits, log.layers, f"{log.model}, {n_tokens} tokens", plot)


def _show(log, share, repeats, hits, console) -> None:
    n, most, used = log.n_experts, share.max(), log.chosen.shape[2]
    title = f"{log.model}: experts 0 to {n - 1} across, layers down; densest {_percent(most)} of {len(log.positions)} tokens"
    console.shades(title, [(str(layer), row / most) for layer, row in zip(log.layers, share, strict=True)])
    rows = [
        (str(layer), f"{int((row > 0).sum())} of {n}", f"{row.argmax()}: {_percent(row.max())}", _percent(again))
        for layer, row, again in zip(log.layers, share, repeats, strict=True)
    ]
    rows.append(("all", "", f"even: {_percent(used / n)}", _percent(repeats.mean())))
    console.table("\nBy layer", rows, ("layer", "used", "most", "as the token before"))
    slots = [s for s in range(1, n + 1) if n <= SLOTS_SHOWN or s & (s - 1) == 0 or s == n]
    rows = [
        (str(s), *(_percent(x) for x in (hits[:, s - 1].mean(), hits[:, s - 1].min(), hits[:, s - 1].max(), s / n)))
        for s in slots
    ]
    console.table(
        "\nChoices found in slots, which keep a layer's most used experts",
        rows,
        ("slots a layer", "found", "worst layer", "best layer", "were all equally likely"),
    )
    console.result(f"  ({_percent(1 - hits[:, -1].mean())} were the first of their expert, which no slots can hold before)")


def _percent(share: float) -> str:
    return "-" if share != share else f"{100 * share:.1f} %"


def _rounded(values) -> list[float]:
    return [round(value, 5) for value in values.tolist()]


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if value != value else round(float(value), 5)
