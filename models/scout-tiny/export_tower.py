"""Writes scout-tiny's vision tower as `mmproj-scout-tiny.gguf`: `python models/scout-tiny/export_tower.py`.

In: `tower.pt` of train_tower.py. Out: the file that llamacli finds beside the model, its matrices Q8_0.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from train_tower import CONFIG, HERE, HIDDEN

from llamacli.llama4.vision import VisionConfig, tensors
from quantize.encoders import encoder
from quantize.plan import make_plan
from quantize.sources import InMemory
from quantize.tower import DEFAULT, Tower
from quantize.writer import write_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / "scratch")
    parser.add_argument("--out", type=Path, default=HERE / "mmproj-scout-tiny.gguf")
    args = parser.parse_args()
    weights = torch.load(args.work / "tower.pt")
    config = VisionConfig(
        n_layers=CONFIG["num_hidden_layers"],
        n_embd=CONFIG["hidden_size"],
        n_heads=CONFIG["num_attention_heads"],
        n_ff=CONFIG["intermediate_size"],
        image_size=CONFIG["image_size"],
        patch_size=CONFIG["patch_size"],
        n_mlp=CONFIG["projector_input_dim"],
        n_out=CONFIG["projector_output_dim"],
        n_text=HIDDEN,
        most_tiles=1,
    )
    rows = {spec.name: InMemory(weights[spec.hf].float().numpy()) for spec in tensors(config)}
    tower = Tower(config, rows)
    plan = make_plan(tower.metadata("scout-tiny", DEFAULT), rows, tower.types(DEFAULT))

    def encoded(tensor) -> np.ndarray:
        values = np.empty((int(np.prod(tensor.shape[:-1])), tensor.shape[-1]), np.float32)
        tensor.source.read(0, 0, values)
        return memoryview(encoder(tensor.type.name).encode(values, None)).cast("B")

    write_file(args.out, plan.parts[0].head, ((t.name, t.nbytes, [encoded(t)]) for t in plan.tensors), force=True)
    print(f"{args.out}: {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
