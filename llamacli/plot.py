"""The picture of a benchmark: speed against the depth of the context, prefill and decode side by side, others beside ours.

In: records of measure.speed. Out: an image file. The only module that imports matplotlib, which is no run-time dependency.
Knows nothing of how the numbers came about.
"""

from pathlib import Path

from llamacli.errors import OutputError, UsageError


def check() -> None:
    """UsageError unless matplotlib is installed: better before an hour of measuring than after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UsageError("--plot: expected matplotlib, found none; install it with `pip install matplotlib`") from None


def draw(records: list[dict], title: str, path: Path) -> None:
    """Write the image; its kind follows from the name (.png, .svg, .pdf). OutputError if it cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, kind, words in zip(panels, ("pp", "tg"), ("prefill", "decode"), strict=True):
        for name, points in _lines([r for r in records if r["test"].startswith(kind)]).items():
            depths, rates = zip(*sorted(points), strict=True)
            panel.plot(depths, rates, "o-", label=name)
        panel.set(title=words, xlabel="tokens in the context before", ylabel="tokens/s", ylim=(0, None))
        if panel.lines:
            panel.legend()
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{path}: expected to write an image, found: {error}; choose another name, such as bench.png"
        ) from None
    finally:
        pyplot.close(figure)


def _lines(records: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """(depth, tokens per second) by engine and length."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for r in records:
        test = r["test"].partition("@")[0]
        for name, rate in [("llamacli", r["tokens_per_second"])] + [
            (name, peer["tokens_per_second"]) for name, peer in r.get("peers", {}).items()
        ]:
            lines.setdefault(f"{name} {test}", []).append((r["depth"], rate))
    return lines
