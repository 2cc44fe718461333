"""Pictures against Meta's own code, stored in tests/golden/meta_images.npz (make_meta_images.py).

Meta and transformers differ in two things, and llamacli then follows transformers. A side that the grid limits is computed in
float64 by Meta, which may move it by a pixel. What a byte is for the tower is rounded once by Meta, step by step by
transformers.
"""

import ast
import operator
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_tower

from llamacli import Model
from llamacli.environment import SMALL_MODEL
from llamacli.files.gguf import open_gguf
from llamacli.vision.pictures import read_picture
from llamacli.vision.tiles import cut, layout
from llamacli.vision.tower import Tower

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
import make_images  # noqa: E402


def constant(name):
    """A constant of the script, which cannot be imported without Meta's code."""
    tree = ast.parse((GOLDEN / "make_meta_images.py").read_text())
    return next(
        ast.literal_eval(line.value) for line in tree.body if isinstance(line, ast.Assign) and line.targets[0].id == name
    )


TALKS, TOWERS = constant("TALKS"), constant("TOWERS")


@pytest.fixture(scope="module")
def meta():
    with np.load(GOLDEN / "meta_images.npz") as stored:
        return {name: stored[name] for name in stored.files}


def test_the_grid_of_600_pictures_is_metas_and_their_size_but_for_a_pixel_of_rounding(meta):
    found = np.array([sum(layout(int(h), int(w), 336, 16), ()) for h, w in make_images.sizes()])
    assert np.array_equal(found[:, :2], meta["geometry"][:, :2])
    off = meta["geometry"][:, 2:] - found[:, 2:]
    assert set(np.unique(off)) <= {-1, 0, 1}
    assert (off != 0).any(1).sum() <= 15, "of sizes that were chosen for it"
    with np.load(GOLDEN / "images.npz") as transformers:  # there transformers differs from Meta as we do
        assert np.array_equal(off, meta["geometry"][:, 2:] - transformers["geometry"][:, 2:])


@pytest.mark.parametrize("name", make_images.PICTURES)
def test_tiles_are_metas_to_the_byte(meta, name):
    made = cut(read_picture(make_images.picture(name)).image, make_images.TILE, 16)
    assert made.grid == tuple(meta[f"grid.{name}"])
    assert np.array_equal(made.tiles, meta[f"tiles.{name}"])


@pytest.mark.parametrize("name", TOWERS)
def test_rows_of_the_tower_are_metas(meta, tmp_path, name):
    tower = Tower(open_gguf(tiny_tower.tower_gguf(tmp_path / "mmproj.gguf", **make_images.TOWERS[name])), 2)
    found, expected = tower.features(make_images.tower_tiles(name)), meta[f"rows.{name}"]
    tower.close()
    assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tiny_tower.tower_gguf(tmp_path_factory.mktemp("tower") / "mmproj.gguf", n_text=256, **make_images.TOWERS["plain"])
    with Model.load(SMALL_MODEL, threads=2, ctx=4096, mmproj=path) as found:
        yield found


@pytest.mark.parametrize("name", TALKS)
def test_ids_of_conversations_with_pictures_are_metas(meta, model, name):
    def part(text):
        if text.startswith("["):
            return {"type": "image", "image": make_images.picture(text[1:-1])}
        return {"type": "text", "text": text}

    messages = [{"role": role, "content": [*map(part, parts)]} for role, parts in TALKS[name]]
    assert [*map(operator.index, model.prompt_ids(messages))] == meta[f"ids.{name}"].tolist()
