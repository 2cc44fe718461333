"""Measures every recipe of `llamacli quantize` on scout-tiny: size and KL divergence from F16, recipes.json and recipes.png.

    python models/scout-tiny/recipes.py [--documents 1200] [--threads 2]       needs matplotlib

The text is conversations that training never saw (another seed of data.py), in windows of 512 tokens whose second half is
scored, as `llamacli perplexity --reference` does. The reference is the F16 file.
"""

import argparse
import json
import tempfile
from itertools import islice
from pathlib import Path

import data
import numpy as np

from llamacli import Model
from llamacli.bench import quality
from quantize.convert import convert

HERE = Path(__file__).parent
WINDOW, SEED = 512, 777
NAMES = (
    *("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_EXPERTS", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0"),
    *("IQ4_NL", "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K"),
)


def text(model: Model, n_documents: int) -> np.ndarray:
    """Token ids [windows, WINDOW] of concatenated conversations."""
    ids: list[int] = []
    for document in islice(data.documents(SEED), n_documents):
        if document.messages:
            ids += model.prompt_ids([{"role": role, "content": words} for role, words in document.messages])
    return np.array(ids[: len(ids) // WINDOW * WINDOW]).reshape(-1, WINDOW)


def main() -> None:
    """Make every file, compare it with F16, write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1200)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "f16.gguf")
        convert(HERE / "hf", file, "F16")
        reference = Model.load(file, threads=args.threads, ctx=WINDOW)
        ids = text(reference, args.documents)
        for name in NAMES:
            file = Path(folder, f"{name}.gguf")
            report = convert(HERE / "hf", file, name)
            record = quality.perplexity(Model.load(file, threads=args.threads, ctx=WINDOW), ids, reference)
            found[name] = {
                "megabytes": round(sum(t["nbytes"] for t in report["tensors"]) / 1e6, 2),
                "bits_per_weight": report["bits_per_weight"],
                "kl": record["kl_mean"],
                "kl_error": record["kl_error"],
                "same_best_token": record["top1_agreement"],
            }
            print(f"{name:10} {found[name]['megabytes']:6.2f} MB  KL {record['kl_mean']:.5f}", flush=True)
    (HERE / "recipes.json").write_text(json.dumps({"tokens": int(ids.size // 2), "recipes": found}, indent=1) + "\n")
    draw(found)


def draw(found: dict[str, dict]) -> None:
    """Plot KL divergence by size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, one in found.items():
        ours = name == "Q4_EXPERTS"
        panel.plot(one["megabytes"], one["kl"], "D" if ours else "o", color="tab:red" if ours else "tab:blue")
        panel.annotate(name, (one["megabytes"], one["kl"]), (5, 4), textcoords="offset points", fontsize=8)
    panel.set(xlabel="MB", ylabel="mean KL divergence from F16, nats", yscale="log", title="scout-tiny: size against distance")
    panel.grid(True, which="both", alpha=0.25)
    figure.savefig(HERE / "recipes.png", dpi=90)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
