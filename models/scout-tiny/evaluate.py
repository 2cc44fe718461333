"""Evaluates scout-tiny: `python models/scout-tiny/evaluate.py [folder]`; needs the extra `train`.

In: a checkpoint folder (bf16) and questions.jsonl. Out: `results.json` (accuracy by category, every wrong answer, the
largest difference between the logits of transformers and of model.py, expert use on unseen text), `loss.png` and
`experts.png`. transformers' Llama4ForCausalLM decodes greedily from the bf16 weights in float32. An answer is right if
it equals an accepted one, ignoring its final punctuation and, unless a style was asked for, letter case.
"""

import argparse
import csv
import itertools
import json
from pathlib import Path

import matplotlib
import torch
from data import documents
from model import Layout, load
from tokenizers import Tokenizer
from train import encode
from transformers import AutoTokenizer, Llama4ForCausalLM

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
UNSEEN = 99  # seed of the text for expert use; training uses 2, the tokenizer 1


def same(said: str, wanted: str, style: bool) -> bool:
    """Whether an answer is accepted, ignoring spaces, final punctuation and (unless a style was asked for) letter case."""
    said, wanted = (" ".join(text.split()).rstrip(".!") for text in (said, wanted))
    return said == wanted if style else said.lower() == wanted.lower()


@torch.no_grad()
def answers(folder: Path) -> dict:
    """Accuracy overall and by category, and the wrong answers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = Llama4ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tally, misses = {}, []
    for line in (HERE / "questions.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, temperature=None, top_p=None, max_new_tokens=80
        )
        said = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        right = any(same(said, wanted, row["category"] == "styles") for wanted in row["accept"])
        hits, count = tally.get(row["category"], (0, 0))
        tally[row["category"]] = (hits + right, count + 1)
        if not right:
            misses.append({"id": row["id"], "asked": row["messages"][-1]["content"], "said": said, "wanted": row["accept"][0]})
    hits, count = (sum(pair[i] for pair in tally.values()) for i in (0, 1))
    return {"right": hits, "asked": count, "accuracy": hits / count, "by_category": tally, "misses": misses}


@torch.no_grad()
def unseen_text(folder: Path, docs: int = 400) -> dict:
    """Expert use and loss on documents of another seed; largest difference between the logits of transformers and model.py."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = load(folder)
    pairs = [encode(tokenizer, doc) for doc in itertools.islice(documents(UNSEEN), docs)]
    ids = torch.tensor([i for tokens, _ in pairs for i in tokens])
    _, counts, _ = model(ids, Layout.of([len(tokens) for tokens, _ in pairs]))
    reference = Llama4ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    furthest = 0.0
    for tokens, _ in pairs[:10]:
        theirs = reference(input_ids=torch.tensor([tokens])).logits[0]
        hidden, _, _ = model(torch.tensor(tokens), Layout.of([len(tokens)]))
        furthest = max(furthest, ((model.lm_head(hidden) - theirs).abs().max() / theirs.abs().max()).item())
    share = counts / len(ids)
    return {
        "tokens": len(ids),
        "share": [[round(x, 5) for x in row] for row in share.tolist()],
        "least": share.min().item(),
        "most": share.max().item(),
        "logits_rel": furthest,
    }


def plot_loss(log: Path, out: Path) -> None:
    """Plot training loss and held-out accuracy by minutes."""
    rows = list(csv.DictReader(log.open()))
    minutes = [float(row["seconds"]) / 60 for row in rows]
    figure, left = plt.subplots(figsize=(6, 3.2), dpi=100)
    left.semilogy(minutes, [float(row["loss"]) for row in rows], color="tab:blue", lw=1)
    left.set(xlabel="minutes", ylabel="training loss (weighted)")
    marks = [(m, float(row["held_out_accuracy"])) for m, row in zip(minutes, rows, strict=True) if row["held_out_accuracy"]]
    right = left.twinx()
    right.plot([m for m, _ in marks], [100 * a for _, a in marks], "o-", color="tab:orange", ms=3, lw=1)
    right.set(ylabel="held-out answers right, %", ylim=(0, 100))
    figure.tight_layout()
    figure.savefig(out)


def plot_experts(share: list[list[float]], out: Path) -> None:
    """Plot how often each layer chose each expert."""
    figure, axes = plt.subplots(1, len(share), figsize=(9, 2.4), dpi=100, sharey=True)
    for layer, (axis, row) in enumerate(zip(axes, share, strict=True)):
        axis.bar(range(len(row)), [100 * x for x in row], color="tab:blue")
        axis.axhline(100 / len(row), color="grey", lw=0.8, ls=":")
        axis.set(title=f"layer {layer}", xlabel="expert")
    axes[0].set_ylabel("tokens, %")
    figure.tight_layout()
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=HERE / "hf")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {"experts": unseen_text(args.folder), "questions": answers(args.folder)}
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    plot_loss(HERE / "train_log.csv", HERE / "loss.png")
    plot_experts(results["experts"]["share"], HERE / "experts.png")
    questions, experts = results["questions"], results["experts"]
    for category, (hits, count) in questions["by_category"].items():
        print(f"| {category} | {hits} of {count} |")
    print(f"| **all** | **{questions['right']} of {questions['asked']} ({100 * questions['accuracy']:.1f} %)** |")
    print(f"expert use: {100 * experts['least']:.2f} % to {100 * experts['most']:.2f} %")
    print(f"logits of transformers and of model.py differ by {experts['logits_rel']:.1e} of the largest")


if __name__ == "__main__":
    main()
