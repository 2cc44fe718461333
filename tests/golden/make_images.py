"""Golden pictures: what transformers makes of them, step by step.

    python tests/golden/make_images.py        needs the `train` extra and torchvision; writes images.npz next to this file

The pictures and the weights are made by seed. Stored are, of the real processor at 336 pixels, the grid and the size shown of
some hundred sizes; of a processor with small tiles, the bytes of each picture's tiles; of small towers, the rows of some tiles;
of small models, ids and logits of prompts with pictures. PyPI's torchvision may be built for another torch: two operators that
it asks for are then declared here, and are not used.
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import make_transformers
import tiny
import tiny_tower

HERE = Path(__file__).resolve().parent
TILE = 56  # pixels of the small processor's tiles
TOWERS = {
    "plain": {"seed": 31},
    "heads-of-88": {"seed": 32, "n_embd": 176, "heads": 2, "n_ff": 704, "image_size": 84, "n_mlp": 96, "n_out": 96},
    "heads-of-12": {"seed": 33, "n_embd": 48, "heads": 4, "n_ff": 192, "image_size": 112, "n_layers": 4},
    "patches-of-28": {"seed": 34, "patch_size": 28, "image_size": 112, "n_embd": 128, "n_ff": 512},
}
MARKS = [280, 281, 282, 283, 284, 285]  # image_start, image, patch, tile_x_separator, tile_y_separator, image_end
SCOUT = {"seed": 41, "chunk": 32, "temperature_length": 20.0}
MAVERICK = {**tiny.MAVERICK, "seed": 42, "chunk": 24, "temperature_length": 20.0}
PROMPTS = {  # text lengths, and pictures between them
    "one": (SCOUT, [5, "wide", 9]),
    "two": (SCOUT, [3, "small", 0, "alpha", 7]),
    "five": (SCOUT, [1, "pixel", 2, "gray", 0, "small", 4, "tall", 1, "palette", 20]),
    "maverick": (MAVERICK, [4, "photo", 8]),
}
LAST = 24  # tokens of a prompt whose logits are stored


def picture(name):
    """A picture of Pillow's: smooth colours, some lines and a little noise."""
    sizes = {"small": (40, 31), "wide": (400, 90), "tall": (50, 260), "photo": (222, 170), "pixel": (1, 1), "line": (500, 1)}
    width, height = sizes.get(name, (120, 75))
    random = np.random.RandomState(sum(map(ord, name)))
    y, x = np.mgrid[:height, :width]
    waves = [128 + 100 * np.sin(x / (3 + k) + y / (9 - k) + k) for k in range(4)]
    values = (np.stack(waves, -1) + random.randint(-20, 20, (height, width, 4))).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(values, "RGBA")
    if name == "gray":
        return image.convert("L")
    if name == "palette":
        return image.convert("RGB").quantize(32)
    return image if name == "alpha" else image.convert("RGB")


PICTURES = ("small", "wide", "tall", "photo", "pixel", "line", "alpha", "gray", "palette")


def sizes():
    """600 (height, width): ordinary ones, ratios that the arithmetic is sensitive to, extremes."""
    random = np.random.RandomState(7)
    found = [(3108, 1332), (1332, 3108), (336, 336), (337, 337), (336, 337), (1, 1), (1, 5000), (5000, 1), (1080, 1920)]
    found += [(3508, 2480), (3024, 4032), (672, 672), (1344, 1344), (1345, 1344), (1008, 672), (5376, 336), (336, 5376)]
    found += [(a * 333, b * 333) for a in range(1, 12) for b in range(1, 12)]
    found += [(int(h), int(w)) for h, w in random.randint(1, 700, (200, 2))]
    found += [(int(h), int(w)) for h, w in np.exp(random.uniform(0, 8.6, (400, 2)))]
    return [(max(1, h), max(1, w)) for h, w in found][:600]


def declared():
    """Declares what a torchvision for another torch may miss; to be kept while torchvision is used."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        try:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:
            continue
    return library


def processor(size=336):
    """transformers' image processor."""
    import torch

    library = declared()
    from transformers.models.llama4.image_processing_llama4 import Llama4ImageProcessor

    class Watched(Llama4ImageProcessor):
        """Notes the sizes that are asked for; with `blank`, scales nothing."""

        blank = False

        def resize(self, image, size, **more):
            self.asked.append((int(size.height), int(size.width)))
            if self.blank:
                return torch.zeros((*image.shape[:-2], int(size.height), int(size.width)), dtype=image.dtype)
            return super().resize(image, size, **more)

    made = Watched(size={"height": size, "width": size})
    made.keep = library
    return made


def geometry(pairs):
    """int32 [n, 4]: rows and columns of the grid, height and width shown."""
    import torch

    made, found = processor(), []
    made.blank = True
    for height, width in pairs:
        made.asked = []
        out = made(images=[torch.zeros((3, height, width), dtype=torch.uint8)], return_tensors="pt", device="cpu")
        found.append((*out["aspect_ratios"][0].tolist(), *made.asked[0]))
    return np.array(found, np.int32)


def reference_tiles(image, size=TILE):
    """uint8 [n, size, size, 3]: the bytes before they become numbers."""
    made = processor(size)
    made.asked = []
    out = made(images=[image], return_tensors="pt", do_rescale=False, do_normalize=False)
    return out["pixel_values"].permute(0, 2, 3, 1).numpy().astype(np.uint8), tuple(out["aspect_ratios"][0].tolist())


def values_of(tiles):
    """The processor's numbers for these bytes, float32 [n, 3, size, size]."""
    import torch

    made = processor(tiles.shape[1])
    images = torch.from_numpy(tiles).permute(0, 3, 1, 2)
    return made.rescale_and_normalize(images, True, 1 / 255, True, [0.5] * 3, [0.5] * 3).float()


def tower_tiles(name):
    """Three tiles of noise for one of TOWERS."""
    case = TOWERS[name]
    shape = 3, *[case.get("image_size", 56)] * 2, 3
    return np.random.RandomState(case["seed"]).randint(0, 256, shape).astype(np.uint8)


def tower(case):
    """A function from tiles to rows, by transformers."""
    import torch
    from transformers import Llama4VisionConfig, Llama4VisionModel

    shape = {key: value for key, value in case.items() if key != "seed"}
    s = tiny_tower.Shape(**shape)
    config = Llama4VisionConfig(**tiny_tower.hf_config(s))
    config._attn_implementation = "eager"
    model = Llama4VisionModel(config).float().eval()
    weights = {tiny_tower.hf_name(name): torch.from_numpy(w) for name, w in tiny_tower.tensors(case["seed"], **shape).items()}
    projector = weights.pop("multi_modal_projector.linear_1.weight")
    model.load_state_dict({name.removeprefix("vision_model."): w for name, w in weights.items()})

    def rows(tiles):
        with torch.no_grad():
            return (model(values_of(tiles)).last_hidden_state @ projector.T).numpy()

    return rows


def expanded(parts, random, tiles_of, rows_of):
    """ids of a prompt, as Llama4Processor._prompt_split_image writes a picture; and the rows by position."""
    start, image, patch, across, down, end = MARKS
    ids, rows = [], {}

    def add(tile):
        for row in tile:
            rows[len(ids)] = row
            ids.append(patch)

    for part in parts:
        if isinstance(part, int):
            ids += random.randint(0, 257, part).tolist()
            continue
        tiles, (_, wide) = tiles_of(part)
        found = rows_of(tiles)
        ids.append(start)
        for n, tile in enumerate(found[:-1]):
            add(tile)
            ids.append(down if (n + 1) % wide == 0 else across)
        ids.append(image)
        add(found[-1])
        ids.append(end)
    return np.array(ids), rows


def main():
    pairs = sizes()
    stored = {"sizes": np.array(pairs, np.int32), "geometry": geometry(pairs)}
    stored["prompts"] = np.array(json.dumps(PROMPTS))
    tiles = {name: reference_tiles(picture(name)) for name in PICTURES}
    for name, (found, grid) in tiles.items():
        stored |= {f"tiles.{name}": found, f"grid.{name}": np.array(grid, np.int32)}
    for name, case in TOWERS.items():
        stored[f"rows.{name}"] = tower(case)(tower_tiles(name))
    rows_of = tower(TOWERS["plain"])
    for name, (case, parts) in PROMPTS.items():
        ids, rows = expanded(parts, np.random.RandomState(case["seed"]), tiles.get, rows_of)
        logits, margin = make_transformers.reference(case, ids, rows)
        stored |= {f"ids.{name}": ids.astype(np.int32), f"logits.{name}": logits[-LAST:]}
        print(f"{name}: {len(ids)} tokens, experts chosen by {margin:.4f} or more")
    np.savez_compressed(HERE / "images.npz", **stored)


if __name__ == "__main__":
    main()
