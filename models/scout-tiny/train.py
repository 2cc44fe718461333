"""Trains scout-tiny from random weights on one CPU core, in two parts (commands in README.md).

In: data.py's documents through hf/tokenizer.json; for part 2 also part 1's weights. Out: model.safetensors (bf16) and
config.json, written every few minutes and at the end, and train_log.csv (part 2 appends). Seeds are fixed. The
learning rate follows the clock, so a slower machine sees fewer tokens instead of taking longer. SIGSTOP and SIGCONT
pause and continue. evaluate.py evaluates the result.
"""

import argparse
import csv
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from data import FIRST, SECOND, Document, Mix, documents, held_questions
from model import Layout, ScoutTiny, Shape, export, load
from tokenizers import Tokenizer

HERE = Path(__file__).parent
USER, PROSE = 0.15, 0.5  # weights of a token's loss; the assistant's words and stop token weigh 1
BALANCE = 0.01
WARMUP = 60  # steps
LONGEST = 1024


def encode(tokenizer: Tokenizer, doc: Document) -> tuple[list[int], list[float]]:
    """Ids of a document, and the loss weight of each id as a target."""
    special = tokenizer.token_to_id
    ids, weights = [special("<|begin_of_text|>")], [0.0]
    if doc.text:
        body = tokenizer.encode(doc.text, add_special_tokens=False).ids
        ids += [*body, special("<|end_of_text|>")]
        weights += [PROSE] * (len(body) + 1)
    for role, text in doc.messages:
        head = [special("<|header_start|>"), *tokenizer.encode(role, add_special_tokens=False).ids, special("<|header_end|>")]
        body = tokenizer.encode("\n\n" + text, add_special_tokens=False).ids
        answer = role == "assistant"
        ids += [*head, *body, special("<|eot|>")]
        # the first token of a body is the template's own line break
        weights += [USER] * (len(head) + 1) + [1.0 if answer else USER] * (len(body) - 1) + [1.0 if answer else USER]
    return ids[:LONGEST], weights[:LONGEST]


def collate(pairs: list[tuple[list[int], list[float]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Layout]:
    """Inputs, targets, weights and layout of documents, sorted by length so that attention pads little."""
    pairs = sorted(pairs, key=lambda pair: len(pair[0]))
    inputs = torch.tensor([i for ids, _ in pairs for i in ids[:-1]])
    targets = torch.tensor([i for ids, _ in pairs for i in ids[1:]])
    weights = torch.tensor([w for _, ws in pairs for w in ws[1:]])
    return inputs, targets, weights, Layout.of([len(ids) - 1 for ids, _ in pairs])


def batches(tokenizer: Tokenizer, seed: int, mix: Mix, tokens: int) -> Iterator[tuple]:
    """Endless batches of about `tokens` tokens."""
    stream = documents(seed, mix)
    while True:
        pairs, size = [], 0
        while size < tokens:
            pairs.append(encode(tokenizer, next(stream)))
            size += len(pairs[-1][0]) - 1
        yield collate(pairs)


def held_out_accuracy(model: ScoutTiny, tokenizer: Tokenizer) -> float:
    """Share of held-out questions for which every answer token is the most likely one, as greedy decoding needs."""
    right = []
    for row in held_questions():
        said = [(m["role"], m["content"]) for m in row["messages"]]
        ids, _ = encode(tokenizer, Document(messages=said))
        full, _ = encode(tokenizer, Document(messages=[*said, ("assistant", row["accept"][0])]))
        start = len(ids) + 4  # after the header and the template's line break
        hidden, _, _ = model(torch.tensor(full[:-1]), Layout.of([len(full) - 1]))
        right.append(bool((model.lm_head(hidden[start - 1 :]).argmax(-1) == torch.tensor(full[start:])).all()))
    return sum(right) / len(right)


def train(part: int, minutes: float, stop: float, lr: float, tokens: int, out: Path, log: Path) -> None:
    """Trains one part until the clock runs out. See the module's docstring."""
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    tokenizer = Tokenizer.from_file(str(HERE / "hf" / "tokenizer.json"))
    generation = json.loads((HERE / "hf" / "generation_config.json").read_text())
    ids = {key: generation[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = ScoutTiny(Shape()) if part == 1 else load(out)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": norms, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.97),
        fused=True,
    )
    begun = saved = time.monotonic()
    stream = batches(tokenizer, part + 1, FIRST if part == 1 else SECOND, tokens)
    before = [0, 0, 0]  # steps, seconds and tokens of part 1
    if part == 2:
        before = [int(n) for n in log.read_text().splitlines()[-1].split(",")[:3]]
    seen, used, losses = 0, torch.zeros(4, 16), []
    with log.open("w" if part == 1 else "a", newline="") as file:
        writer = csv.writer(file)
        if part == 1:
            writer.writerow(["step", "seconds", "tokens", "lr", "loss", "balance", "least_used_share", "held_out_accuracy"])
        for step, (inputs, targets, weights, layout) in zip(itertools.count(), stream, strict=False):
            progress = (time.monotonic() - begun) / (minutes * 60)
            if progress >= stop:
                break
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / WARMUP) * max(1 - progress, 0.002)
            hidden, counts, balance = model(inputs, layout)
            loss = (F.cross_entropy(model.lm_head(hidden), targets, reduction="none") * weights).sum() / weights.sum()
            optimizer.zero_grad(set_to_none=True)
            (loss + BALANCE * balance).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            seen += len(inputs)
            used = 0.95 * used + counts / len(inputs)
            losses.append(loss.item())
            if step % 20 == 19:
                now = time.monotonic()
                accuracy = ""
                if now - saved > 240:
                    saved = now
                    with torch.no_grad():
                        accuracy = f"{held_out_accuracy(model, tokenizer):.3f}"
                    export(model, out, ids)
                least = (used / used.sum(1, keepdim=True)).min().item()
                writer.writerow(
                    [
                        before[0] + step + 1,
                        before[1] + round(now - begun),
                        before[2] + seen,
                        f"{optimizer.param_groups[0]['lr']:.2e}",
                        f"{sum(losses) / len(losses):.4f}",
                        f"{balance.item():.3f}",
                        f"{least:.4f}",
                        accuracy,
                    ]
                )
                file.flush()
                losses = []
    export(model, out, ids)
    with torch.no_grad():
        print(f"{step} steps, {seen} tokens, held-out accuracy {held_out_accuracy(model, tokenizer):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", type=int, choices=[1, 2], default=1)
    parser.add_argument("--minutes", type=float, default=50, help="until the learning rate would reach 0")
    parser.add_argument("--stop", type=float, default=1.0, help="stop after this share of --minutes")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "hf")
    parser.add_argument("--log", type=Path, default=HERE / "train_log.csv")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.part, args.minutes, args.stop, args.lr, args.tokens, args.out, args.log)
