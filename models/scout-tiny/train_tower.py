"""Trains scout-tiny's vision tower on one CPU core; the text model stays as it is (commands in README.md).

In: pictures.py's scenes, scout-tiny.gguf. Out: `tower.pt`, which export_tower.py writes as a GGUF. Three stages, each of which
continues with what the earlier ones left in --work:

    words   16 rows of embeddings for each number, colour and shape, whose sum makes the frozen text model answer rightly
    tower   the tower and the projector, to give these rows for a picture
    both    the tower by the text model's answers alone

The learning rate follows the clock, as in train.py.
"""

import argparse
import itertools
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from model import Layout, ScoutTiny, load_gguf
from pictures import COLOURS, MOST, SHAPES, Scene, questions, scenes
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Llama4VisionConfig, Llama4VisionModel

from llamacli.vision.tiles import cut

HERE = Path(__file__).parent
SIZE, ROWS, HIDDEN = 112, 16, 256  # pixels of a tile, rows of features of it, width of the text model
CONFIG = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "projector_input_dim": 256,
    "projector_output_dim": 256,
    "vision_output_dim": 256,
    "image_size": SIZE,
    "patch_size": 14,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
NAMES = {"count": [*range(1, MOST + 1)], "colour": [*COLOURS], "shape": [*SHAPES]}


class Sight(nn.Module):
    """Tower and projector, named as in Llama4ForConditionalGeneration; the heads are for training only."""

    def __init__(self):
        super().__init__()
        self.vision_model = Llama4VisionModel._from_config(Llama4VisionConfig(**CONFIG), attn_implementation="sdpa")
        self.multi_modal_projector = nn.Module()
        self.multi_modal_projector.linear_1 = nn.Linear(256, HIDDEN, bias=False)
        self.heads = nn.ModuleDict({name: nn.Linear(256, len(values)) for name, values in NAMES.items()})
        self.here = nn.Linear(256, 1)  # centres in the row's part of the picture

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Rows for the text model (n, ROWS, HIDDEN), and the adapter's."""
        seen = self.vision_model(pixels).last_hidden_state
        return self.multi_modal_projector.linear_1(seen), seen


class Words(nn.Module):
    """Rows of embeddings by number, colour and shape. They begin as the words themselves."""

    def __init__(self, lm: ScoutTiny, tokenizer: Tokenizer):
        super().__init__()
        embed = lm.model.embed_tokens.weight.detach()
        spread = embed.std()
        self.base = nn.Parameter(torch.randn(ROWS, HIDDEN) * 0.1 * spread)
        self.of = nn.ParameterDict()
        for place, (name, values) in enumerate(NAMES.items()):
            from facts import NUMBERS

            rows = torch.randn(len(values), ROWS, HIDDEN) * 0.1 * spread
            for k, value in enumerate(values):
                word = " " + (NUMBERS[value] if name == "count" else value)
                tokens = embed[tokenizer.encode(word, add_special_tokens=False).ids]
                for row in range(place, ROWS, 3):
                    rows[k, row] += tokens[: 1 + len(tokens) // 2].mean(0) if len(tokens) > 1 else tokens[0]
            self.of[name] = nn.Parameter(rows)

    def forward(self, facts: Tensor) -> Tensor:
        """facts: numbers of count, colour and shape (n, 3)."""
        return self.base + sum(self.of[name][facts[:, k]] for k, name in enumerate(NAMES))


class Documents:
    """Questions about pictures as ids: rows of a picture stand in for `<|patch|>`."""

    def __init__(self, tokenizer: Tokenizer, seed: int):
        self.rng, special = random.Random(seed), tokenizer.token_to_id
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        self.patch, self.eot, self.bos = special("<|patch|>"), special("<|eot|>"), special("<|begin_of_text|>")
        self.header = {
            role: [special("<|header_start|>"), *self.encode(role), special("<|header_end|>")] for role in ("user", "assistant")
        }
        self.picture = [special("<|image_start|>"), special("<|image|>"), *[self.patch] * ROWS, special("<|image_end|>")]

    def turn(self, question: str, answer: str, picture: bool) -> tuple[list[int], list[float]]:
        """Ids and weights of a question and its answer."""
        ids = [*self.header["user"], *self.encode("\n\n")]
        ids += [*(self.picture if picture else []), *self.encode(question), self.eot]
        ids += [*self.header["assistant"], *self.encode("\n\n")]
        said = [*self.encode(answer), self.eot]
        return ids + said, [0.0] * len(ids) + [1.0] * len(said)

    def of(self, scene: Scene, turns: int) -> tuple[list[int], list[float]]:
        """A conversation of some turns about a picture, which stands before the first question."""
        ids, weights, asked = [self.bos], [0.0], questions(scene)
        for n, category in enumerate(self.rng.sample([*asked], turns)):
            ways, answer = asked[category]
            more = self.turn(self.rng.choice(ways), answer, n == 0)
            ids, weights = ids + more[0], weights + more[1]
        return ids, weights


def facts_of(some: list[Scene]) -> Tensor:
    return torch.tensor([[s.count - 1, NAMES["colour"].index(s.colour), NAMES["shape"].index(s.shape)] for s in some])


def lut() -> Tensor:
    """The value of each byte, in bfloat16 as transformers computes it."""
    byte = torch.arange(256, dtype=torch.bfloat16) * (1 / 255)
    return ((byte - 0.5) / 0.5).float()


def pixels_of(some: list[Scene], table: Tensor) -> Tensor:
    tiles = np.stack([cut(scene.picture, SIZE, 1).tiles[0] for scene in some])
    return table[torch.from_numpy(tiles).long()].permute(0, 3, 1, 2).contiguous()


def cells_of(some: list[Scene]) -> Tensor:
    """Centres in each of the 4 x 4 parts of the tile."""
    found = torch.zeros(len(some), ROWS)
    for n, scene in enumerate(some):
        scale = SIZE / max(scene.picture.size)
        for x, y in scene.centres:
            across, down = x * scene.picture.width * scale, y * scene.picture.height * scale
            found[n, min(3, int(down / 28)) * 4 + min(3, int(across / 28))] += 1
    return found


def answer_loss(lm: ScoutTiny, docs: list, rows: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Loss of the answers' tokens, and which documents are answered without a wrong token."""
    order = sorted(range(len(docs)), key=lambda k: len(docs[k][0]))
    inputs = torch.tensor([i for k in order for i in docs[k][0][:-1]])
    targets = torch.tensor([i for k in order for i in docs[k][0][1:]])
    weights = torch.tensor([w for k in order for w in docs[k][1][1:]])
    x = lm.model.embed_tokens(inputs)
    x = x.masked_scatter((inputs == patch)[:, None], rows[order].reshape(-1, HIDDEN))
    hidden, _, _ = lm.follow(x, Layout.of([len(docs[k][0]) - 1 for k in order]))
    said = weights > 0
    logits = lm.lm_head(hidden[said])
    owner = torch.repeat_interleave(torch.tensor(order), torch.tensor([len(docs[k][0]) - 1 for k in order]))[said]
    wrong = torch.zeros(len(docs)).index_add(0, owner, (logits.argmax(-1) != targets[said]).float())
    return F.cross_entropy(logits, targets[said]), wrong == 0


@torch.no_grad()
def accuracy(lm: ScoutTiny, tokenizer: Tokenizer, rows_of, count: int, seed: int) -> dict[str, float]:
    """Share of right answers by category, one question a document."""
    documents, tally = Documents(tokenizer, seed), {}
    some = list(itertools.islice(scenes(seed), count))
    rows = rows_of(some)
    for category in ("number", "colour", "shape", "all"):
        docs = []
        for scene in some:
            ways, answer = questions(scene)[category]
            ids, weights = documents.turn(documents.rng.choice(ways), answer, True)
            docs.append(([documents.bos, *ids], [0.0, *weights]))
        tally[category] = answer_loss(lm, docs, rows, documents.patch)[1].float().mean().item()
    return tally


def train(stage: str, minutes: float, lr: float, batch: int, work: Path, fresh: bool) -> None:
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    tokenizer = Tokenizer.from_file(str(HERE / "hf" / "tokenizer.json"))
    lm = load_gguf(HERE / "scout-tiny.gguf").requires_grad_(False).eval()
    words, sight, table = Words(lm, tokenizer), Sight(), lut()
    for name, module in (("words", words), ("tower", sight)):
        if (work / f"{name}.pt").exists() and not (fresh and name == stage):
            module.load_state_dict(torch.load(work / f"{name}.pt"))
    trained = words if stage == "words" else sight
    matrices = [p for p in trained.parameters() if p.ndim > 1]
    vectors = [p for p in trained.parameters() if p.ndim == 1]
    decay = 0.0 if stage == "words" else 0.02
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    seed = {"words": 11, "tower": 12, "both": 13}[stage]
    documents, rng, begun, told = Documents(tokenizer, seed), random.Random(seed), time.monotonic(), time.monotonic()
    stream, losses = scenes(seed + (0 if fresh else int(time.time()) % 10**6 * 100)), []
    for step in itertools.count():
        progress = (time.monotonic() - begun) / (minutes * 60)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50) * max(1 - progress, 0.01)
        if stage == "words":
            some = [drawless(rng) for _ in range(batch)]
            docs = [documents.of(scene, 1) for scene in some]
            loss, right = answer_loss(lm, docs, words(facts_of(some)), documents.patch)
            parts = [loss.item(), right.float().mean().item()]
        else:
            some = list(itertools.islice(stream, batch))
            facts = facts_of(some)
            rows, seen = sight(pixels_of(some, table))
            heads = sum(F.cross_entropy(head(seen.mean(1)), facts[:, k]) for k, head in enumerate(sight.heads.values()))
            cells = cells_of(some)
            here = F.mse_loss(sight.here(seen)[..., 0], cells)
            held = cells > 0  # what stands there is known, too
            owner = torch.arange(len(some))[:, None].expand_as(cells)[held]
            heads = heads + sum(
                F.cross_entropy(sight.heads[name](seen[held]), facts[owner, k]) for k, name in ((1, "colour"), (2, "shape"))
            )
            with torch.no_grad():
                wanted = words(facts)
            off = F.mse_loss(rows, wanted) / words.base.new_tensor(wanted.var().item())
            found = [head(seen.mean(1)).argmax(-1) for head in sight.heads.values()]
            right = [(f == facts[:, k]).float().mean().item() for k, f in enumerate(found)]
            if stage == "tower":
                loss = heads + 5 * here + 2 * off
                parts = [loss.item(), off.item(), here.item(), *right]
            else:
                docs = [documents.of(scene, 1) for scene in some]
                said, answered = answer_loss(lm, docs, rows, documents.patch)
                loss = said + 0.3 * heads + here + 0.3 * off
                parts = [said.item(), answered.float().mean().item(), off.item(), here.item(), *right]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        losses.append(parts)
        if time.monotonic() - told > 20:
            told = time.monotonic()
            shown = " ".join(f"{x:.3f}" for x in np.mean(losses[-200:], 0))
            print(f"{stage} {(told - begun) / 60:.1f} min, step {step}, {(step + 1) * batch} pictures: {shown}", flush=True)
            losses = losses[-200:]
            torch.save(trained.state_dict(), work / f"{'words' if stage == 'words' else 'tower'}.pt")
    torch.save(trained.state_dict(), work / f"{'words' if stage == 'words' else 'tower'}.pt")

    def rows_of(some: list[Scene]) -> Tensor:
        return words(facts_of(some)) if stage == "words" else sight(pixels_of(some, table))[0]

    found = accuracy(lm, tokenizer, rows_of, 200, 99)
    print("pictures of another seed", {k: round(v, 3) for k, v in found.items()})


def drawless(rng: random.Random) -> Scene:
    """A scene of any combination, without its picture."""
    return Scene(None, rng.randint(1, MOST), rng.choice(NAMES["colour"]), rng.choice(NAMES["shape"]), [])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["words", "tower", "both"])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--work", type=Path, default=HERE / "scratch")
    parser.add_argument("--fresh", action="store_true", help="begin anew, not with what the stage left before")
    args = parser.parse_args()
    args.work.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    train(args.stage, args.minutes, args.lr, args.batch, args.work, args.fresh)
