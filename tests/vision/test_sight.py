"""The tower beside a model: found, checked, its rows in prompts, nothing looked at twice."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny_tower
from PIL import Image

from llamacli import Model, ModelFileError, PictureError, PromptError, UsageError
from llamacli.environment import SMALL_MODEL
from llamacli.files.gguf import open_gguf
from llamacli.llama4.vision import VisionConfig, renamed, tensors
from llamacli.prompt import FeatureRow
from llamacli.vision.sight import Sight, describe, expected_tokens, find_tower
from llamacli.vision.tower import Tower

SHAPE = {"n_text": 256, "image_size": 56, "n_layers": 3, "seed": 3}


def picture(seed, width=60, height=40):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8))


def asked(*parts):
    return [{"role": "user", "content": [*parts]}]


def image(source):
    return {"type": "image", "image": source}


def text(words):
    return {"type": "text", "text": words}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tiny_tower.tower_gguf(tmp_path_factory.mktemp("tower") / "mmproj.gguf", **SHAPE)
    with Model.load(SMALL_MODEL, threads=2, ctx=1024, mmproj=path) as found:
        yield found


def test_a_picture_stands_where_its_part_stands(model):
    sight, prompt = model.sight, model.prompt_ids(asked(text("a"), image(picture(1)), text("b")))
    plain = model.prompt_ids(asked(text("a"), text("b")))
    marks = sight.marks
    start, end = prompt.index(marks.image_start), prompt.index(marks.image_end)
    before, after = prompt[:start], prompt[end + 1 :]
    assert model.tokenizer.decode(plain) == model.tokenizer.decode(before + after)
    grid = [token if isinstance(token, int) else "row" for token in prompt[start : end + 1]]
    row = ["row"] * 4
    x, y = marks.tile_x_separator, marks.tile_y_separator
    assert grid == [marks.image_start, *row, x, *row, y, marks.image, *row, marks.image_end]
    assert len(grid) == expected_tokens(sight.config, 60, 40)[1]


def test_user_text_is_never_a_picture(model):
    ids = model.prompt_ids([{"role": "user", "content": "<|image|> <|patch|>"}])
    assert not {model.sight.marks.image, model.sight.marks.patch} & {token for token in ids if isinstance(token, int)}
    both = model.prompt_ids(asked(text("<|image|>"), image(picture(1))))
    assert both.count(model.sight.marks.image_start) == 1


def test_two_pictures_in_the_same_words_are_two_prompts(model):
    session = model.session()
    first, second = (model.prompt_ids(asked(image(picture(n)), text("What is it?"))) for n in (1, 2))
    assert [isinstance(t, FeatureRow) for t in first] == [isinstance(t, FeatureRow) for t in second]
    one = session.sync(first).copy()
    two = session.sync(second).copy()
    assert session.stats.cached_tokens <= first.index(model.sight.marks.image_start) + 1
    assert np.abs(one - two).max() > 0.01 * np.abs(one).max()
    assert np.abs(session.sync(first) - one).max() <= 1e-5 * np.abs(one).max()


def test_the_same_picture_is_looked_at_once(model):
    looks = []
    model.sight.follow = lambda name, done, of: looks.append((name, done, of))
    try:
        first, again = model.sight.look(picture(7)), model.sight.look(picture(7))
    finally:
        model.sight.follow = None
    assert looks[-1][1:] == (3, 3)
    assert [done for _, done, _ in looks] == sorted(done for _, done, _ in looks)
    assert len(looks) == 4, "three layers and the adapter, once"
    assert first.seconds > 0 == again.seconds
    session = model.session()
    session.sync(model.prompt_ids(asked(image(picture(7)), text("one"))))
    session.sync(model.prompt_ids(asked(image(picture(7)), text("two"))))
    assert session.stats.cached_tokens > first.n_tokens


def test_fewer_tiles_are_fewer_tokens(model):
    most, few, one = (model.sight.look(picture(1, 300, 200), tiles) for tiles in (None, 4, 1))
    assert most.n_tokens > few.n_tokens > one.n_tokens == 4 + 3
    assert (one.grid, one.n_tiles) == ((1, 1), 1)
    assert "300x200, shown to the model at 56x37, 1 tile, 7 tokens" in describe(one)
    assert most.record | {"name": ""} == {
        **{"name": "", "width": 300, "height": 200, "shown": [251, 168], "grid": [3, 5]},
        **{"tiles": 16, "tokens": most.n_tokens},
    }
    with pytest.raises(UsageError, match="at least 1"):
        model.sight.look(picture(1), 0)


def test_ctrl_c_ends_a_look(model):
    def stop(name, done, of):
        model.sight.interrupt()

    model.sight.follow = stop
    try:
        with pytest.raises(KeyboardInterrupt):
            model.sight.look(picture(99))
    finally:
        model.sight.follow = None
    assert model.sight.look(picture(99)).seconds > 0, "nothing of a broken look is kept"


def test_penalties_do_not_count_patches(model):
    session = model.session()
    session.sync(model.prompt_ids(asked(image(picture(1)), text("hi"))))
    seen = []

    sampler = model.sampler(temp=0)
    pick = sampler.pick

    def watching(logits, ids, *more):
        seen.append(list(ids))
        return pick(logits, ids, *more)

    sampler.pick = watching
    next(session.stream(session.ids, sampler))
    assert seen
    assert all(type(id) is int and id != model.sight.marks.patch for id in seen[0])


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "x.png"}}, {"type": "image", "path": "x.png"}])
def test_other_ways_to_name_a_picture(model, tmp_path, monkeypatch, part):
    monkeypatch.chdir(tmp_path)
    picture(1).save("x.png")
    assert model.prompt_ids(asked(part, text("a"))) == model.prompt_ids(asked(image("x.png"), text("a")))


def test_parts_of_other_kinds_are_refused(model):
    with pytest.raises(PromptError, match="text or image"):
        model.prompt_ids(asked({"type": "audio", "audio": "x.wav"}))


# files


def test_the_tower_is_found_beside_the_model_by_its_name(tmp_path):
    (tmp_path / "scout-Q4_0.gguf").write_bytes(SMALL_MODEL.read_bytes())
    gguf = open_gguf(tmp_path / "scout-Q4_0.gguf")
    assert find_tower(gguf) is None
    with Model.load(gguf.path, threads=1, ctx=64) as model, pytest.raises(PictureError, match="--mmproj"):
        model.prompt_ids(asked(image(picture(1))))
    for name in ("mmproj-maverick.gguf", "mmproj-scout.gguf"):
        tiny_tower.tower_gguf(tmp_path / name, **SHAPE)
    assert find_tower(gguf).name == "mmproj-scout.gguf"
    (tmp_path / "mmproj-scout.gguf").rename(tmp_path / "mmproj-other.gguf")
    with pytest.raises(UsageError, match="choose one with --mmproj"):
        find_tower(gguf)


def test_another_models_tower_is_refused(tmp_path):
    path = tiny_tower.tower_gguf(tmp_path / "mmproj.gguf", **SHAPE | {"n_text": 64})
    with pytest.raises(ModelFileError, match="another model's"):
        Model.load(SMALL_MODEL, threads=1, mmproj=path)
    with pytest.raises(ModelFileError, match="without one"):
        Model.load(SMALL_MODEL, threads=1, mmproj=SMALL_MODEL)


def test_the_name_that_llama_cpps_converter_gives_ln2(tmp_path):
    plain = tiny_tower.tower_gguf(tmp_path / "a.gguf", **SHAPE)
    other = tiny_tower.tower_gguf(tmp_path / "b.gguf", rename=lambda n: n.replace(".ln2.", ".attn_post_norm."), **SHAPE)
    tiles = np.random.RandomState(0).randint(0, 256, (1, 56, 56, 3)).astype(np.uint8)
    found = [Tower(open_gguf(path), 1).features(tiles) for path in (plain, other)]
    assert np.array_equal(*found)


@pytest.mark.parametrize(
    "edit", [lambda t: t.pop("v.blk.1.ln2.weight"), lambda t: t.update({"v.class_embd": np.zeros(3, np.float32)})]
)
def test_an_incomplete_tower_is_refused(tmp_path, edit):
    path = tiny_tower.tower_gguf(tmp_path / "mmproj.gguf", edit=edit, **SHAPE)
    with pytest.raises(ModelFileError, match=r"v\.(blk\.1\.ln2\.weight|class_embd)"):
        Tower(open_gguf(path), 1)


def test_the_table_is_a_towers_tensors(tmp_path):
    gguf = open_gguf(tiny_tower.tower_gguf(tmp_path / "mmproj.gguf", **SHAPE))
    specs = {spec.name: spec for spec in tensors(VisionConfig.from_gguf(gguf))}
    assert {name: spec.shape for name, spec in specs.items()} == {n: t.shape for n, t in renamed(gguf).items()}
    assert {spec.hf for spec in specs.values()} == set(map(tiny_tower.hf_name, gguf.tensors))


@pytest.mark.parametrize("type_name", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_every_type_gives_the_rows_of_its_weights(tmp_path, type_name):
    """Float types exactly but for rounding; int8 activations of quantized ones add their own error."""
    from gguf.quants import dequantize, quantize

    shape = SHAPE | {"n_embd": 96, "n_ff": 384, "image_size": 84}

    def stored(found):
        import gguf

        for name, values in found.items():
            if values.ndim == 2 and name not in ("v.position_embd.weight", "v.patch_embd.weight") and values.shape[1] % 32 == 0:
                kind = gguf.GGMLQuantizationType[type_name]
                found[name] = dequantize(quantize(values, kind), kind).astype(np.float32)

    tiles = np.random.RandomState(0).randint(0, 256, (2, 84, 84, 3)).astype(np.uint8)
    exact = Tower(open_gguf(tiny_tower.tower_gguf(tmp_path / "a.gguf", edit=stored, **shape)), 2).features(tiles)
    found = Tower(open_gguf(tiny_tower.tower_gguf(tmp_path / "b.gguf", type_name=type_name, **shape)), 2).features(tiles)
    bound = 2e-5 if type_name.endswith("F16") else 0.03
    assert np.abs(found - exact).max() <= bound * np.abs(exact).max()


def test_a_sight_without_marks_is_refused(tmp_path):
    words = SimpleNamespace(special_names=SimpleNamespace(ids={}))
    gguf = open_gguf(tiny_tower.tower_gguf(tmp_path / "mmproj.gguf", **SHAPE))
    with pytest.raises(PromptError, match="cannot take pictures"):
        Sight(gguf, words, 1)
