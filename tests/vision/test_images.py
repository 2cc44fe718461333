"""Pictures against transformers: geometry, bytes, ids, the tower's rows and logits, stored in tests/golden/images.npz."""

import json
import operator
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_tower

from llamacli.engine import Engine
from llamacli.files.gguf import open_gguf
from llamacli.llama4.config import Config
from llamacli.prompt import tokens
from llamacli.vision.pictures import read_picture
from llamacli.vision.sight import Marks, segments
from llamacli.vision.tiles import cut, layout
from llamacli.vision.tower import Tower

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
import make_images  # noqa: E402

TOWER_BOUND, LOGITS_BOUND = 2e-5, 1e-3  # of the largest value; the cache's float16 is most of the second


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "images.npz") as stored:
        return {name: stored[name] for name in stored.files}


def rows_of(path, tiles):
    tower = Tower(open_gguf(path), 2)
    try:
        return tower.features(tiles)
    finally:
        tower.close()


def write(path, case, **more):
    return tiny_tower.tower_gguf(path, **case, **more)


def test_grid_and_size_of_600_pictures_are_those_of_transformers(golden):
    assert len(golden["sizes"]) == 600
    found = [sum(layout(int(h), int(w), 336, 16), ()) for h, w in golden["sizes"]]
    assert np.array_equal(found, golden["geometry"])


def test_bytes_of_tiles_differ_by_one_in_at_most_3_percent(golden):
    """torchvision's own kernel rounds a few otherwise, where a picture grows; in a single picture of 5 % at most."""
    shares = []
    for name in make_images.PICTURES:
        made = cut(read_picture(make_images.picture(name)).image, make_images.TILE, 16)
        expected = golden[f"tiles.{name}"]
        assert made.grid == tuple(golden[f"grid.{name}"])
        assert made.tiles.shape == expected.shape
        off = np.abs(made.tiles.astype(int) - expected)
        assert off.max() <= 1
        shares.append((off > 0).mean())
    assert np.mean(shares) <= 0.03
    assert max(shares) <= 0.05


@pytest.mark.parametrize("name", make_images.TOWERS)
def test_rows_of_the_tower_are_those_of_transformers(golden, tmp_path, name):
    case = make_images.TOWERS[name]
    expected = golden[f"rows.{name}"]
    found = rows_of(write(tmp_path / "mmproj.gguf", case), make_images.tower_tiles(name))
    assert np.abs(found - expected).max() <= TOWER_BOUND * np.abs(expected).max()


@pytest.mark.parametrize("name", make_images.PROMPTS)
def test_logits_after_pictures_are_those_of_transformers(golden, tmp_path, name):
    case, parts = json.loads(str(golden["prompts"]))[name]
    marks, random, prompt = Marks(*make_images.MARKS), np.random.RandomState(case["seed"]), []
    tower = write(tmp_path / "mmproj.gguf", make_images.TOWERS["plain"])
    for part in parts:
        if isinstance(part, int):
            prompt.append(random.randint(0, 257, part).tolist())
        else:
            tiles, grid = golden[f"tiles.{part}"], tuple(golden[f"grid.{part}"])
            prompt += segments(grid, rows_of(tower, tiles), part.encode(), marks)
    found = tokens(prompt)
    assert list(map(operator.index, found)) == golden[f"ids.{name}"].tolist()
    shape = {key: value for key, value in case.items() if key != "seed"}
    assert len(found) > shape["chunk"], "the prompt crosses the edge of a chunk"
    file = open_gguf(tiny.tiny_gguf(tmp_path / "tiny.gguf", seed=case["seed"], **shape))
    engine, expected = Engine(file, Config.from_gguf(file), threads=2), golden[f"logits.{name}"]
    logits = engine.forward(found, engine.new_cache(len(found)), all_logits=True)[-make_images.LAST :]
    assert np.abs(logits - expected).max() <= LOGITS_BOUND * np.abs(expected).max()


@pytest.mark.train
def test_with_new_pictures_and_weights_the_results_are_those_of_transformers(tmp_path):
    """Fresh sizes, pictures and weights."""
    if find_spec("torchvision") is None:  # not imported here: make_images declares what its build may miss
        pytest.skip("needs torchvision")
    random = np.random.default_rng()
    pairs = [(int(h), int(w)) for h, w in np.exp(random.uniform(0, 8.3, (600, 2)))]
    found = [sum(layout(h, w, 336, 16), ()) for h, w in pairs]
    assert np.array_equal(found, make_images.geometry(pairs))
    case = make_images.TOWERS["heads-of-88"] | {"seed": int(random.integers(1 << 30))}
    tiles = random.integers(0, 256, (5, 84, 84, 3), np.uint8)
    expected = make_images.tower(case)(tiles)
    rows = rows_of(write(tmp_path / "mmproj.gguf", case), tiles)
    assert np.abs(rows - expected).max() <= TOWER_BOUND * np.abs(expected).max()
