"""Measures the speed of the vision tower beside llama.cpp's. Run by hand, on a quiet machine.

    python tests/tower_speed.py LLAMA-MTMD-CLI [--layers N] [--type TYPE,...] [--threads N] [--rounds N] [--text MODEL]

In: the path of llama.cpp's program. Out: for each type, the seconds of a tile and of a screenshot of 1920x1080 pixels, the
median of some rounds in which both sides take turns, and the ratio (above 1: llamacli is faster). Both read the same file: a
random tower with the real one's widths, 8 of its 34 layers unless told otherwise, that fits scout-tiny. A picture of one
tile is the same work for both. llama.cpp makes fewer tiles of the screenshot, so the seconds per tile are shown, too.
LLAMACLI_SIMD=avx2 limits llamacli to the instructions of a peer that was built for AVX2.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import tiny_tower
from PIL import Image

from llamacli.cpu.kernels.cores import default_threads
from llamacli.cpu.kernels.jit.loader import chosen_target
from llamacli.environment import SMALL_MODEL
from llamacli.files.gguf import open_gguf
from llamacli.vision.pictures import read_picture
from llamacli.vision.tiles import cut
from llamacli.vision.tower import Tower

REAL = {"n_embd": 1408, "heads": 16, "n_ff": 5632, "image_size": 336, "n_mlp": 4096, "n_out": 4096}
SIZES = {"tile": (336, 336), "1080p": (1920, 1080)}


def pictures(folder: Path) -> dict[str, Path]:
    """Noise on a gradient, as files."""
    random, found = np.random.RandomState(0), {}
    for name, (width, height) in SIZES.items():
        values = np.linspace(0, 200, width)[None, :, None] + random.randint(0, 56, (height, width, 3))
        found[name] = folder / f"{name}.png"
        Image.fromarray(values.astype(np.uint8)).save(found[name])
    return found


def ours(tower: Tower, picture: Path) -> tuple[float, int]:
    """Seconds and tiles of a picture in llamacli."""
    tiles = cut(read_picture(picture).image, tower.config.image_size, tower.config.most_tiles).tiles
    began = time.perf_counter()
    tower.features(tiles)
    return time.perf_counter() - began, len(tiles)


def theirs(program: str, text: Path, mmproj: Path, picture: Path, threads: int) -> tuple[float, int]:
    """The same in llama.cpp, from its own output."""
    command = [program, "-m", text, "--mmproj", mmproj, "--image", picture, "-p", "hi", "-n", 1, "-t", threads, "--temp", 0]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    said = re.findall(r"(?:slice encoded in|batch encoding done in) (\d+) ms", done.stdout + done.stderr)
    found = [int(ms) / 1000 for ms in said]
    if not found:
        sys.exit(f"{program}: expected the time of a slice, found: {(done.stderr.splitlines() or ['nothing'])[-1]}")
    return sum(found), len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("program", help="llama-mtmd-cli")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--type", default="Q8_0,F16")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--text", type=Path, default=SMALL_MODEL, help="the language model that llama.cpp loads beside it")
    asked = parser.parse_args()
    n_text = open_gguf(asked.text).metadata["llama4.embedding_length"]
    print(f"{asked.layers} layers, {asked.threads} threads, ours with {chosen_target().name}, {asked.rounds} rounds")
    with tempfile.TemporaryDirectory() as folder:
        shown = pictures(Path(folder))
        for type_name in asked.type.split(","):
            shape = REAL | {"n_layers": asked.layers, "n_text": n_text}
            path = tiny_tower.tower_gguf(Path(folder) / f"mmproj-{type_name}.gguf", type_name=type_name, **shape)
            tower = Tower(open_gguf(path), asked.threads)
            ours(tower, shown["tile"])  # compiles, and reads the file
            for name, picture in shown.items():
                rounds = [
                    (*ours(tower, picture), *theirs(asked.program, asked.text, path, picture, asked.threads))
                    for _ in range(asked.rounds)
                ]
                (mine, n, other, m), ratio = map(median, zip(*rounds, strict=True)), median(r[2] / r[0] for r in rounds)
                each = median((r[2] / r[3]) / (r[0] / r[1]) for r in rounds)
                print(
                    f"{type_name} {name}: ours {mine:.2f} s ({n:.0f} tiles), llama.cpp {other:.2f} s ({m:.0f} tiles), "
                    f"ratio {ratio:.2f}, a tile {mine / n:.3f} and {other / m:.3f} s, ratio {each:.2f}"
                )
            tower.close()
            path.unlink()


if __name__ == "__main__":
    main()
