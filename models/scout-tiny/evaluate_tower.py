"""Asks scout-tiny about pictures that it never saw: `python models/scout-tiny/evaluate_tower.py`; needs no torch.

In: scout-tiny.gguf and mmproj-scout-tiny.gguf, run by llamacli. Out: `sight.json` and a line: right answers by category, on
pictures of a seed that training did not use. An answer is right if it is the expected one to the letter.
"""

import argparse
import itertools
import json
import random
from collections import Counter
from pathlib import Path

from pictures import questions, scenes

from llamacli import Model

HERE = Path(__file__).parent
SEED = 4321  # training uses 11, 12 and 13


def asked(model: Model, scene, question: str) -> str:
    """The model's greedy answer to a question about a picture."""
    parts = [{"type": "image", "image": scene.picture}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": parts}]
    return "".join(piece.text for piece in model.stream(messages, max_tokens=24, temp=0)).strip()


def evaluate(model: Model, count: int) -> dict:
    """Right answers of all by category, and the wrong ones."""
    rng, right, wrong = random.Random(SEED), Counter(), []
    for scene in itertools.islice(scenes(SEED), count):
        for category, (ways, answer) in questions(scene).items():
            question = rng.choice(ways)
            said = asked(model, scene, question)
            right[category] += said == answer
            if said != answer:
                wrong.append({"asked": question, "said": said, "wanted": answer})
    return {"pictures": count, "right": dict(right), "share": sum(right.values()) / count / len(right), "wrong": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=200, help="to ask four questions about")
    parser.add_argument("--mmproj", type=Path, default=HERE / "mmproj-scout-tiny.gguf")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    with Model.load(HERE / "scout-tiny.gguf", threads=args.threads, ctx=256, mmproj=args.mmproj) as model:
        found = evaluate(model, args.pictures)
    (HERE / "sight.json").write_text(json.dumps(found, indent=1) + "\n")
    shown = ", ".join(f"{category} {n}" for category, n in found["right"].items())
    print(f"{100 * found['share']:.1f} % of {args.pictures} pictures x 4 questions ({shown})")


if __name__ == "__main__":
    main()
