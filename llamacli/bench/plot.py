"""Plots: a benchmark (speed by depth of the context), a plan (speed by disk), routing (use of experts, hit rates).

In: records of measure.speed and `llamacli plan`, arrays of routing.py. Out: an image file. No other module imports matplotlib,
which is an extra.
"""

import os
from pathlib import Path

import numpy as np

from llamacli.errors import OutputError, UsageError


def check(path: Path) -> None:
    """UsageError unless matplotlib is installed, OutputError unless it can write an image there. Called before the
    measurement, which may take long.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("--plot: expected matplotlib, found none; install it with `pip install matplotlib`") from None
    if not path.parent.is_dir():
        raise OutputError(f"{path}: expected a folder to write an image into, found none; create it first")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise OutputError(f"{path}: expected a file that can be written, found none; choose another name, such as bench.png")
    kinds = Figure().canvas.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in kinds:
        raise OutputError(f"{path}: expected the name of an image, found {path.suffix}; write {path.stem}.png, for one")


def draw(records: list[dict], title: str, path: Path) -> None:
    """Write a plot of speed by depth; the suffix (.png, .svg, .pdf) is the format. OutputError: it cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = {
        words: [r for r in records if r["test"].startswith(kind)] for kind, words in (("pp", "prefill"), ("tg", "decode"))
    }
    measured = {words: found for words, found in measured.items() if found}
    figure, panels = pyplot.subplots(1, len(measured), figsize=(5 * len(measured), 4), layout="constrained", squeeze=False)
    for panel, (words, found) in zip(panels[0], measured.items(), strict=True):
        for name, points in _lines(found).items():
            depths, rates = zip(*sorted(points), strict=True)
            panel.plot(depths, rates, "o-", label=name)
        panel.set(title=words, xlabel="tokens in the context before", ylabel="tokens/s", ylim=(0, None))
        panel.legend()
    figure.suptitle(title)
    _save(figure, path, "bench.png")


def draw_plan(plans: list[dict], title: str, path: Path) -> None:
    """Write a plot of expected tokens per second by the disk's speed: a panel for each bandwidth, a line for each memory.

    OutputError: it cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    plans = [plan for plan in plans if plan["mode"]]
    bandwidths = sorted({plan["bandwidth_gbps"] for plan in plans})
    figure, panels = pyplot.subplots(
        1, len(bandwidths), figsize=(1 + 4 * len(bandwidths), 4), layout="constrained", squeeze=False
    )
    for panel, bandwidth in zip(panels[0], bandwidths, strict=True):
        for memory in sorted({plan["memory_bytes"] for plan in plans}):
            points = sorted(
                (plan["disk_gbps"], plan["tokens_per_second"])
                for plan in plans
                if (plan["memory_bytes"], plan["bandwidth_gbps"]) == (memory, bandwidth)
            )
            panel.plot(*zip(*points, strict=True), "o-", label=f"{memory / 1e9:g} GB")
        panel.set(title=f"memory of {bandwidth:g} GB/s", xlabel="disk, GB/s", xscale="log", ylim=(0, None))
        panel.set_xticks(disks := sorted({plan["disk_gbps"] for plan in plans}), [f"{disk:g}" for disk in disks], minor=False)
        panel.minorticks_off()
    panels[0][0].set_ylabel("expected tokens/s")
    panels[0][0].legend()
    figure.suptitle(title)
    _save(figure, path, "plan.png")


def draw_routing(use: np.ndarray, hits: np.ndarray, layers: list[int], title: str, path: Path) -> None:
    """Write a plot of the use of experts and of hit rates.

    `use` [n_layers, n_experts]: share of tokens for which a layer chose an expert. `hits` [n_layers, n_experts]: hit rate with
    s slots in column s - 1. OutputError: it cannot be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5.5), layout="constrained", gridspec_kw={"width_ratios": [2, 1]})
    shown = left.imshow(100 * use, aspect="auto", interpolation="nearest", cmap="magma", vmin=0)
    figure.colorbar(shown, ax=left, label="% of tokens")
    step = max(1, len(layers) // 12)
    left.set(title="experts used", xlabel="expert", ylabel="layer")
    left.set_yticks(range(0, len(layers), step), [str(i) for i in layers[::step]])
    n = hits.shape[1]
    slots = range(1, n + 1)
    right.fill_between(slots, 100 * hits.min(0), 100 * hits.max(0), alpha=0.25, label="lowest to highest of the layers")
    right.plot(slots, 100 * hits.mean(0), label="mean of the layers")
    right.plot(slots, [100 * s / n for s in slots], "--", color="grey", label="all experts equally likely")
    right.set(title="hit rate, least frequently used evicted", xlabel="slots a layer", ylabel="% of choices", ylim=(0, 100))
    right.xaxis.get_major_locator().set_params(integer=True)
    right.legend()
    figure.suptitle(title)
    _save(figure, path, "routing.png")


def _save(figure, path: Path, example: str) -> None:
    from matplotlib import pyplot

    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{path}: expected to write an image, found: {error}; choose another name, such as {example}"
        ) from None
    finally:
        pyplot.close(figure)


def _lines(records: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """Points (depth, tokens per second) of each line, by engine and length."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for r in records:
        test = r["test"].partition("@")[0]
        for name, rate in [("llamacli", r["tokens_per_second"])] + [
            (name, peer["tokens_per_second"]) for name, peer in r.get("peers", {}).items()
        ]:
            lines.setdefault(f"{name} {test}", []).append((r["depth"], rate))
    return lines
