"""The tower beside a model: found, checked, its rows in prompts, each picture encoded once."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_tower
from PIL import Image

from llamacli import ContextFullError, MemoryLimitError, Model, ModelFileError, PictureError, PromptError, UsageError
from llamacli.environment import SMALL_MODEL
from llamacli.files.gguf import open_gguf
from llamacli.llama4.vision import VisionConfig, renamed, tensors
from llamacli.plan import machine
from llamacli.prompt import FeatureRow
from llamacli.vision import sight
from llamacli.vision.pictures import picture_size
from llamacli.vision.sight import NAMES, Sight, describe, expected_tokens, find_tower, tower_bytes
from llamacli.vision.tower import Tower
from quantize import shapes

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


def test_the_same_picture_is_encoded_once(model):
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
def test_pictures_can_be_named_in_other_ways(model, tmp_path, monkeypatch, part):
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


def test_the_name_that_llama_cpps_converter_gives_ln2_is_read(tmp_path):
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


def test_tiles_that_would_take_all_memory_are_refused(tmp_path):
    """The canvas of a picture is as large as all of its tiles."""
    path = tiny_tower.tower_gguf(tmp_path / "mmproj.gguf", image_size=2048, patch_size=256, most_tiles=64)
    with pytest.raises(ModelFileError, match="tiles of at most 33554432 pixels in all, found 268435456"):
        VisionConfig.from_gguf(open_gguf(path))


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


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (1, 1), (300, 20), (20, 300), (224, 224), (57, 113), (1000, 999)])
def test_tokens_are_counted_by_sizes_alone(model, monkeypatch, size):
    messages = asked(text("a"), image(picture(1, *size)), image(picture(2)), text("b"))
    expected = len(model.prompt_ids(messages))
    monkeypatch.setattr(model.sight._tower, "features", None)
    monkeypatch.setattr(model.sight, "_known", {})
    assert model.count_tokens(messages) == expected
    with pytest.raises(ContextFullError, match=f"{expected} tokens"):
        model.prompt_ids(messages, limit=expected - 1)
    with pytest.raises(ContextFullError):
        model.stream(asked(*[image(picture(1))] * 80))


def test_a_picture_that_is_to_be_turned_has_as_many_tokens(model, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    picture(3, 200, 50).save(tmp_path / "turned.jpg", exif=exif)
    view = model.sight.look(tmp_path / "turned.jpg")
    assert view.size == (50, 200)
    assert model.sight.n_tokens(tmp_path / "turned.jpg") == model.sight.n_tokens(view) == view.n_tokens


def test_a_size_needs_no_pixels(tmp_path):
    picture(1, 70, 30).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    assert picture_size(data) == picture_size(data[:200]) == picture_size(tmp_path / "whole.png") == (70, 30)
    with pytest.raises(PictureError):
        picture_size(b"GIF89a")


# memory


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """A model with its tower beside it."""
    folder = tmp_path_factory.mktemp("beside")
    (folder / "m.gguf").write_bytes(SMALL_MODEL.read_bytes())
    tiny_tower.tower_gguf(folder / "mmproj-m.gguf", **SHAPE)
    return folder / "m.gguf"


def test_a_tower_that_is_named_is_planned_for(beside, no_other_model):
    needed, others, found = tower_bytes(open_gguf(beside.with_name("mmproj-m.gguf")), 1), machine.reserved(), []
    for mmproj in (False, True):
        with Model.load(beside, threads=1, ctx=256, mmproj=mmproj):
            found.append(machine.reserved())
    assert found[1] - found[0] == needed
    assert machine.reserved() == others


def test_the_memory_that_is_advised_holds_model_and_tower(beside, no_other_model):
    with pytest.raises(MemoryLimitError, match=r"beside the model 0\.1. GB.* --memory") as caught:
        Model.load(beside, threads=1, ctx=256, memory=200_000_000, mmproj=True)
    advised = float(re.search(r"--memory ([\d.]+)G", str(caught.value))[1]) * 1e9
    with Model.load(beside, threads=1, ctx=256, memory=int(advised), mmproj=True):
        pass


def test_a_tower_that_is_opened_later_takes_slots_for_its_memory(beside, monkeypatch, no_other_model):
    monkeypatch.setattr(sight, "tower_bytes", lambda *_: 3_000_000)
    others, left = machine.reserved(), []
    whole = 1 << 40
    for _ in range(6):  # less memory, smaller buffers, until there is just enough for all experts
        with Model.load(beside, threads=1, ctx=256, memory=whole, experts="slots"):
            whole = machine.reserved()
    for opened in (False, True):
        with Model.load(beside, threads=1, ctx=256, memory=whole, experts="slots") as model:
            if opened:
                model.prompt_ids(asked(image(picture(1)), text("a")))
                assert machine.reserved() <= whole
            left.append(model.engine.shrink(1 << 40))
    assert 2_900_000 <= left[0] - left[1] < 3_500_000
    assert machine.reserved() == others


def test_without_room_a_picture_is_refused_and_the_model_goes_on(beside, no_other_model):
    with Model.load(beside, threads=1, ctx=256, memory=210_000_000) as model:
        for _ in range(2):
            with pytest.raises(MemoryLimitError, match=r"mmproj-m\.gguf: expected 0\.1. GB of memory to see pictures"):
                model.prompt_ids(asked(image(picture(1)), text("a")))
        assert np.isfinite(model.logits([1, 2, 3])).all()


def test_no_more_rows_are_cached_than_are_planned_for(model, monkeypatch):
    rows = model.sight.look(picture(20)).segments[1].rows.nbytes * 3  # of a grid of 1 x 2, and the whole
    monkeypatch.setattr(sight, "_kept_bytes", lambda c: 2 * rows)
    for seed in (20, 21, 22):
        model.sight.look(picture(seed))
    assert [model.sight.look(picture(seed)).seconds > 0 for seed in (21, 22, 20)] == [False, False, True]


MODEL = {"n_embd": 1024, "n_heads": 8, "n_kv_heads": 2, "n_ff": 2048, "n_ff_exp": 2048, "n_vocab": 512}
REAL = {"n_layers": 1, "n_embd": 1408, "heads": 16, "n_ff": 5632, "image_size": 336, "n_mlp": 4096, "n_out": 4096}
PROMPTED = """
import re, sys
from pathlib import Path
from llamacli.cli import main
code = main(sys.argv[1:])
print(1024 * int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
@pytest.mark.parametrize("way", ["run", "batch", "chat"])
def test_pictures_stay_within_the_memory_that_is_allowed(tmp_path, monkeypatch, way):
    """A tower of the real one's width, three pictures of 16 tiles, experts that do not fit: all of it below --memory."""
    words, names = shapes._metadata, (*NAMES, "header_start", "header_end")

    def with_marks(shape):
        found = words(shape)
        found["tokenizer.ggml.tokens"][-len(names) :] = [f"<|{name}|>" for name in names]
        found["tokenizer.ggml.token_type"][-len(names) :] = 3
        return found

    monkeypatch.setattr(shapes, "_metadata", with_marks)
    shapes.write(replace(shapes.SCOUT, **MODEL), 8, tmp_path / "m.gguf")
    tower = tiny_tower.tower_gguf(tmp_path / "mmproj-m.gguf", type_name="Q8_0", n_text=1024, **REAL)
    for n in range(3):
        picture(n, 1920, 1080).save(tmp_path / f"{n}.png")
    needed = tower_bytes(open_gguf(tower), 2)
    limit = needed + 480_000_000
    assert (tmp_path / "m.gguf").stat().st_size + needed > limit
    names, said = [str(tmp_path / f"{n}.png") for n in range(3)], "Wait! " * 400
    lines = [json.dumps({"prompt": said, "images": [name]}) for name in names]
    (tmp_path / "in").write_text("\n".join(lines))
    asking = {
        "run": ["run", "--no-stdin", *(arg for name in names for arg in ("--image", name)), said],
        "batch": ["run", "--batch", str(tmp_path / "in")],
        "chat": ["chat", "--no-save"],
    }[way]
    more = [
        "-m",
        str(tmp_path / "m.gguf"),
        "--memory",
        f"{limit // 10**6}M",
        "-c",
        "16384",
        "-t",
        "2",
        "-n",
        "2",
        "--temp",
        "0",
    ]
    more += ["--experts", "slots", "-v"]
    done = subprocess.run(
        [sys.executable, "-c", PROMPTED, *asking, *more],
        input=f"{said}\n" + "".join(f"/image {name}\nhi\n" for name in names),  # the load did not name the tower
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stderr.splitlines()[-1])
    print(f"{way}: at most {peak / 1e9:.2f} GB of {limit / 1e9:.2f}, of which the tower and pictures {needed / 1e9:.2f}")
    assert peak <= limit
