"""Pictures on the command line: run --image, a picture on stdin, pictures in a chat. With a small random tower."""

import base64
import io
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_tower
from PIL import Image

from llamacli import Model, PictureError
from llamacli.cli import main
from llamacli.cli.chat.pictures import content, dropped, paths_in, read_again, reference
from llamacli.environment import SMALL_MODEL
from llamacli.prompt import tokens
from llamacli.vision.pictures import read_picture


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    shutil.copy(SMALL_MODEL, folder / "m.gguf")
    tiny_tower.tower_gguf(folder / "mmproj-m.gguf", n_text=256, seed=2)
    return str(folder / "m.gguf")


@pytest.fixture(autouse=True)
def nothing_on_stdin(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))


@pytest.fixture
def photo(tmp_path):
    return made(tmp_path / "my photo.png", 1)


def made(path, seed, size=(200, 100)):
    random = np.random.RandomState(seed)
    Image.fromarray(random.randint(0, 256, (*size[::-1], 3)).astype(np.uint8)).save(path)
    return path


def answer(capfd, model, *args):
    assert main(["run", "-m", model, "--temp", "0", "-n", "6", "--json", *map(str, args)]) == 0
    return json.loads(capfd.readouterr().out)


@pytest.mark.parametrize("size, more", [((200, 100), ["--image-tiles", "2"]), ((50, 50), []), ((224, 168), [])])
def test_tokenize_gives_the_ids_that_stand_for_a_picture_in_a_prompt(model, tmp_path, capfd, size, more):
    """The tower does not run for this."""
    path = made(tmp_path / "a.png", 1, size)

    def said(*args):
        assert main(["tokenize", "-m", model, "--image", str(path), *more, *args]) == 0
        return capfd.readouterr().out

    with Model.load(model, threads=2, ctx=512) as loaded:
        tiles = int(more[1]) if more else None
        expected = [int(token) for part in loaded.sight.look(path, tiles).segments for token in tokens([part])]
    assert json.loads(said()) == expected
    assert said("--count") == f"{len(expected)}\n"
    lines = [line.split() for line in said("--pieces").splitlines()]
    assert [int(id) for id, _ in lines] == expected
    assert (lines[0][1], lines[-2][1], lines[-1][1]) == ('"<|image_start|>"', '"<|patch|>"', '"<|image_end|>"')


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--image", "PHOTO", "text"], "expected one text or picture, found several"),
        (["--image", "PHOTO", "--no-bos"], "--no-bos: expected a text with it, found a picture"),
        (["--image-tiles", "2", "text"], "--image-tiles: expected --image with it"),
        (["--image", "/nowhere.png"], "/nowhere.png: expected a picture"),
    ],
)
def test_tokenize_refuses_wrong_options_with_a_picture(model, photo, capfd, words, expected):
    assert main(["tokenize", "-m", model, *(word.replace("PHOTO", str(photo)) for word in words)]) in (1, 2)
    out, err = capfd.readouterr()
    assert out == "" and expected in err and err.count("\n") == 1


def test_run_describes_the_encoded_picture(model, photo, capfd):
    found = answer(capfd, model, "--image", photo, "--image-tiles", 2, "What is it?")
    (image,) = found["images"]
    assert image == {
        **{"name": str(photo), "width": 200, "height": 100, "shown": [112, 56], "grid": [1, 2], "tiles": 3},
        "tokens": 3 * 4 + 3 + 2,
    }
    assert found["usage"]["prompt_tokens"] > image["tokens"]
    assert found["timings"]["vision_s"] > 0
    assert main(["run", "-m", model, "-n", "2", "-v", "--image", str(photo), "hi"]) == 0
    assert "200x100, 9 tiles" in capfd.readouterr().err


def test_two_pictures_give_two_answers_and_several_are_seen_in_order(model, photo, tmp_path, capfd):
    other = tmp_path / "other.png"
    Image.new("RGB", (50, 50), "white").save(other)
    seen = [answer(capfd, model, "--image", path, "What is it?")["text"] for path in (photo, other)]
    assert seen[0] != seen[1]
    both = answer(capfd, model, "--image", photo, "--image", other, "What?")
    assert [image["name"] for image in both["images"]] == [str(photo), str(other)]


def test_a_picture_on_stdin_is_a_picture(model, photo, capfd, monkeypatch):
    named = answer(capfd, model, "--image", photo, "What is it?")
    for more in ([], ["--image", "-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(photo.read_bytes())))
        piped = answer(capfd, model, *more, "What is it?")
        assert piped["text"] == named["text"]
        assert piped["images"][0]["name"] == "stdin"
    raw = answer(capfd, model, "--image", photo, "--raw", "What is it?")
    assert raw["usage"]["prompt_tokens"] < named["usage"]["prompt_tokens"]


def test_a_missing_tower_is_a_one_line_error(photo, tmp_path, capfd):
    alone = tmp_path / "alone.gguf"
    shutil.copy(SMALL_MODEL, alone)
    assert main(["run", "-m", str(alone), "--image", str(photo), "hi"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "expected a vision tower" in line
    assert "--mmproj" in line
    assert main(["run", "-m", str(alone), "--mmproj", str(photo), "--image", str(photo), "hi"]) == 1
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_a_decompression_bomb_is_refused_early_and_in_little_memory(tmp_path):
    bomb = tmp_path / "bomb.bmp"
    Image.new("1", (32, 32)).save(bomb)
    data = bytearray(bomb.read_bytes())
    data[18:26] = struct.pack("<ii", 65535, 65535)
    bomb.write_bytes(data)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (3 << 29, 3 << 29));"
        f"from llamacli.cli import main; sys.exit(main(['run', '--image', {str(bomb)!r}, 'hi']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "million pixels" in done.stderr


def test_inspect_and_plan_show_the_cost_of_the_tower(model, capfd):
    for command in (["inspect", "--json", model], ["plan", "--json", "--bandwidth", "10", "--disk", "1", model]):
        assert main(command) == 0
        vision = json.loads(capfd.readouterr().out)["vision"]
        assert Path(vision["file"]).name == "mmproj-m.gguf"
        assert vision["tile_tokens"] == 4
        assert vision["most_tokens"] == 17 * 4 + 3 + 16
    assert main(["inspect", str(Path(model).with_name("mmproj-m.gguf"))]) == 0
    assert "it is a vision tower" in capfd.readouterr().out


# chat


def chat(model, lines, *args):
    done = subprocess.run(
        [sys.executable, "-m", "llamacli", "chat", "-m", model, "--temp", "0", "-n", "6", "--no-save", "-v", *map(str, args)],
        input=lines.encode(),
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode(), done.stderr.decode()


def test_a_chat_sees_a_picture_and_keeps_it_in_its_context(model, photo, tmp_path):
    export = tmp_path / "chat.jsonl"
    out, err = chat(model, f"/image '{photo}'\nWhat is it?\nAnd now?\n/export {export}\n")
    assert f"{photo}: 200x100, 9 tiles" in err
    assert "kept from before" in err
    first = json.loads(export.read_text().splitlines()[0])["content"]
    assert first.splitlines()[0] == reference(read_picture(photo), photo)
    again, err = chat(model, f"/load {export}\n/regen\n")
    assert f"{photo}: 200x100" in err
    assert again.splitlines()[-1] == out.splitlines()[-1]
    made(photo, 5)
    failed = subprocess.run(
        [sys.executable, "-m", "llamacli", "chat", "-m", model, "--no-save"],
        input=f"/load {export}\n/regen\n".encode(),
        capture_output=True,
    )
    assert failed.returncode == 1
    assert b"expected the picture of this conversation, found another" in failed.stderr


def test_pictures_of_the_command_line_go_before_the_first_question(model, photo):
    _, err = chat(model, "What is it?\n", "--image", photo)
    assert f"{photo}: 200x100" in err


def test_dropped_files_are_found_as_terminals_write_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo, plain = made(tmp_path / "my photo.png", 1), made(tmp_path / "b.jpg", 2)
    url = photo.as_uri()
    assert "%20" in url
    escaped = str(photo).replace(" ", r"\ ")
    for text in (f"{escaped} what is it?", f"what is '{photo}' it?", f'what is it? "{photo}"', f"{url} what is it?"):
        paths, rest = dropped(text)
        assert paths == [photo]
        assert rest.split() == ["what", "is", "it?"]
    assert dropped("b.jpg") == ([Path("b.jpg")], "")
    assert dropped(f"{plain} {escaped}") == ([plain, photo], "")
    for text in ("what is missing.png?", "missing.png", "a b.jpg.txt c", "no picture at all", f"{tmp_path} here"):
        assert dropped(text) == ([], text)
    assert paths_in(f"{escaped} b.jpg '{photo}'") == [photo, Path("b.jpg"), photo]


def test_a_line_of_a_question_stands_for_a_picture(photo):
    line = reference(read_picture(photo), photo)
    seen = []
    found = content(f"before\n{line}\n\nWhat?", lambda *args: seen.append(args) or "view")
    assert found == [
        {"type": "text", "text": "before"},
        {"type": "image", "image": "view"},
        {"type": "text", "text": "What?"},
    ]
    assert seen == [(str(photo), read_picture(photo).digest.hex())]
    for text in ("no picture", f"inside {line} a line", "![1x1](x.png)"):
        assert content(text, None) == text
    made(photo, 8)
    with pytest.raises(PictureError, match="found another"):
        read_again(*seen[0])


# batches


def batch(capfd, model, lines, *args, code=0, folder):
    """The results of a batch that lies in a folder."""
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["run", "-m", model, "--temp", "0", "-n", "6", "--batch", str(folder / "in.jsonl"), *map(str, args)]
    assert main(command) == code
    out, err = capfd.readouterr()
    return [json.loads(line) for line in out.splitlines()], err


def shown(*sources, text="What is it?"):
    parts = [{"type": "image", "image": source} for source in sources]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]}


def test_lines_of_a_batch_name_pictures_beside_the_file_or_hold_them(model, photo, tmp_path, capfd):
    """Relative paths begin at the batch's folder, not where the program was started."""
    inside = "data:image/png;base64," + base64.b64encode(photo.read_bytes()).decode()
    url = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": inside}}]}]}
    lines = [
        *({"prompt": "What is it?", "images": [name]} for name in ("my photo.png", str(photo), inside)),
        *(shown(name) for name in ("my photo.png", str(photo), inside)),
        *({"prompt": "What is it?"}, url),
    ]
    found, _ = batch(capfd, model, lines, folder=tmp_path)
    alone = answer(capfd, model, "--image", photo, "What is it?")
    assert [r["text"] for r in found[:6]] == [alone["text"]] * 6
    assert [r["usage"]["prompt_tokens"] for r in found[:6]] == [alone["usage"]["prompt_tokens"]] * 6
    assert [len(r.get("images", ())) for r in found] == [1] * 6 + [0, 1]
    assert found[0]["images"] == [alone["images"][0] | {"name": "my photo.png"}]
    four, _ = batch(capfd, model, lines, "--parallel", "3", folder=tmp_path)
    assert [r["usage"] for r in four] == [r["usage"] for r in found]


def test_pictures_of_the_command_line_come_before_each_prompt_of_a_batch(model, photo, tmp_path, capfd):
    other = made(tmp_path / "other.png", 9)
    found, _ = batch(capfd, model, ["a", {"prompt": "b", "images": ["other.png"]}], "--image", photo, folder=tmp_path)
    assert [[image["name"] for image in r["images"]] for r in found] == [[str(photo)], [str(photo), "other.png"]]
    both = answer(capfd, model, "--image", photo, "--image", other, "b")
    assert found[1]["text"] == both["text"]
    _, err = batch(capfd, model, [shown("other.png")], "--image", photo, code=2, folder=tmp_path)
    assert "line 1: messages: expected no other text, picture" in err


def test_a_picture_that_cannot_be_seen_is_its_lines_error(model, photo, tmp_path, capfd):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:300])
    names = ["missing.png", "pipe.png", "cut.png", "/dev/zero", ".", "https://example.org/x.png", "-", "data:,x", "a\0b"]
    lines = [shown(name) if i % 2 else {"prompt": "a", "images": [name]} for i, name in enumerate(names)]
    found, err = batch(capfd, model, [*lines, shown("my photo.png")], code=1, folder=tmp_path)
    words = ["No such file", "no plain file", "damaged", "no plain file", "no plain file", "download it", "No such file"]
    for r, expected in zip(found, [*words, "found another format", "a?b"], strict=False):
        assert expected in r["error"]
        assert "\n" not in r["error"]
    assert "text" in found[-1]
    assert "9 that failed" in err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"prompt": "a", "images": "x.png"}, "images to be a list"),
        ({"prompt": "a", "images": [5]}, "images to be a list"),
        ({"images": ["x.png"]}, "either prompt or messages"),
        (shown("x.png") | {"images": ["x.png"]}, "put it into the messages"),
        (shown(5), "parts of text and image"),
        (shown(""), "parts of text and image"),
        ({"messages": [{"role": "user", "content": [{"type": "audio", "audio": "x"}]}]}, "parts of text and image"),
        ({"messages": [{"role": "user", "content": []}]}, "parts of text and image"),
    ],
)
def test_an_invalid_picture_of_a_line_is_named_before_the_first_answer(model, tmp_path, capfd, line, words):
    found, err = batch(capfd, model, ["a", line], code=1, folder=tmp_path)
    assert found == []
    assert f"line 2: expected {words}" in err or ("line 2" in err and words in err)


def test_pictures_of_lines_from_a_pipe_begin_at_the_working_folder(model, photo, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = json.dumps({"prompt": "", "images": [photo.name]}).encode() + b"\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(line)))
    assert main(["run", "-m", model, "-n", "3", "--batch", "-"]) == 0
    assert json.loads(capfd.readouterr().out)["images"][0]["name"] == photo.name
