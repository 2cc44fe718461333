"""Pictures on the command line: run --image, a picture on stdin, pictures in a chat. With a small random tower."""

import io
import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_tower

from llamacli import PictureError
from llamacli.cli import main
from llamacli.cli.chat.pictures import content, dropped, paths_in, read_again, reference
from llamacli.environment import SMALL_MODEL
from llamacli.vision.pictures import read_picture

Image = pytest.importorskip("PIL.Image")


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


def test_run_says_what_the_model_saw(model, photo, capfd):
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


def test_without_a_tower_one_line_says_what_is_missing(photo, tmp_path, capfd):
    alone = tmp_path / "alone.gguf"
    shutil.copy(SMALL_MODEL, alone)
    assert main(["run", "-m", str(alone), "--image", str(photo), "hi"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert "expected a vision tower" in line
    assert "--mmproj" in line
    assert main(["run", "-m", str(alone), "--mmproj", str(photo), "--image", str(photo), "hi"]) == 1
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_a_bomb_is_refused_before_the_model_is_loaded_and_within_little_memory(tmp_path):
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


def test_inspect_and_plan_say_what_the_tower_takes(model, capfd):
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
