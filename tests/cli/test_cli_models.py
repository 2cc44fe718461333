"""`llamacli models` from the command line, over a hub on this machine."""

import json
import os

import gguf
import gguf_bytes
import pytest
import tiny
from fake_hub import FakeHub

from llamacli.cli import main
from llamacli.cli.inputs import model_names
from llamacli.library import http


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMACLI_MODELS", str(tmp_path / "own"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(http.time, "sleep", lambda seconds: None)
    return tmp_path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny-F32.gguf").read_bytes()


@pytest.fixture
def hub(model, monkeypatch):
    with FakeHub({"tiny-F32.gguf": model}) as made:
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        yield made


def said(capfd, *args, code=0):
    assert main(["models", *args]) == code
    return capfd.readouterr()


def test_a_pulled_model_runs_by_its_name(hub, capfd, folders):
    hub.faults = [("cut", 100_000), ("status", 429, {"Retry-After": "3"})]
    out = said(capfd, "pull", "-v", "me/model:F32")
    path = folders / "own" / "me" / "model" / "tiny-F32.gguf"
    assert out.out == f"{path}\n"
    assert "free on the disk" in out.err and "it fits into memory" in out.err and "too many requests; again in 3 s" in out.err
    assert hub.sent == len(hub.files["tiny-F32.gguf"])
    assert "tiny-F32" in model_names()
    for name in ("tiny-F32", "me/model:F32", "me/model"):
        assert main(["run", "-m", name, "-n", "2", "--no-stdin", "hi"]) == 0
    capfd.readouterr()
    before = hub.sent
    assert said(capfd, "pull", "me/model").out == f"{path}\n"
    assert hub.sent == before


def damage(path, keep_time=True):
    """Turn one bit; as a disk does it, with the file's time as before."""
    data, before = bytearray(path.read_bytes()), path.stat()
    data[-100] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns if keep_time else before.st_mtime_ns + 1))


def test_a_file_of_the_right_size_with_other_bytes_is_not_taken_for_the_model(hub, capfd, folders):
    said(capfd, "pull", "me/model")
    path = folders / "own" / "me" / "model" / "tiny-F32.gguf"
    damage(path, keep_time=False)
    refused = said(capfd, "pull", "me/model", code=1).err
    assert "expected SHA-256" in refused and "models remove tiny-F32" in refused and refused.count("\n") == 1
    path.write_bytes(hub.files["tiny-F32.gguf"])  # copied by hand, without a note
    assert said(capfd, "pull", "me/model").out == f"{path}\n"
    said(capfd, "remove", "tiny-F32")
    assert not any((folders / "own").rglob("*.*"))


def test_a_newer_file_of_the_hub_is_not_taken_for_the_one_that_is_here(hub, capfd, folders):
    said(capfd, "pull", "me/model")
    hub.files["tiny-F32.gguf"] = hub.files["tiny-F32.gguf"][:-1] + b"!"
    assert "the hub has a newer one" in said(capfd, "pull", "me/model", code=1).err


def test_check_reads_what_was_pulled_again(hub, model, capfd, folders, tmp_path):
    said(capfd, "pull", "me/model")
    path = folders / "own" / "me" / "model" / "tiny-F32.gguf"
    assert said(capfd, "check").out == said(capfd, "check", "tiny-F32").out == f"{path}: whole\n"
    damage(path)
    found = said(capfd, "check", code=1)
    assert found.out.startswith(f"{path}: expected SHA-256 ") and "remove the model" in found.err
    (tmp_path / "mine.gguf").write_bytes(model)
    said(capfd, "add", str(tmp_path / "mine.gguf"))
    assert said(capfd, "check", "mine").out.endswith("mine.gguf: no checksum is known\n")


def test_a_split_model_is_pulled_with_all_its_parts(hub, model, tmp_path, capfd, monkeypatch):
    (tmp_path / "in.gguf").write_bytes(model)
    assert (
        main(
            ["quantize", str(tmp_path / "in.gguf"), str(tmp_path / "s-Q8_0.gguf"), "--type", "Q8_0", "--split-max-size", "200K"]
        )
        == 0
    )
    parts = sorted(tmp_path.glob("s-Q8_0-*.gguf"))
    assert len(parts) > 1
    hub.files = {f"Q8_0/{part.name}": part.read_bytes() for part in parts}
    hub.faults = [("cut", 1000)] * 3
    capfd.readouterr()
    assert said(capfd, "pull", "me/model").out.endswith(f"{parts[0].name}\n")
    assert hub.sent == sum(map(len, hub.files.values()))
    assert main(["run", "-m", "s-Q8_0", "-n", "2", "--no-stdin", "hi"]) == 0


def test_a_model_that_cannot_run_is_refused_before_its_weights_are_fetched(hub, capfd, folders):
    refused = said(capfd, "pull", "me/model", "--memory", "1M", code=1)
    assert "expected at least" in refused.err and "--force" in refused.err and refused.err.count("\n") == 1
    assert not list((folders / "own").rglob("*.gguf*"))
    writer = gguf.GGUFWriter(folders / "other.gguf", "qwen3")
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.close):
        step()
    hub.files = {"tiny-F32.gguf": (folders / "other.gguf").read_bytes()}
    assert "llama4, found 'qwen3'" in said(capfd, "pull", "me/model", code=1).err
    hub.files = {"tiny-F32.gguf": b"<html>" * 100}
    assert "expected a GGUF file, found one that starts with" in said(capfd, "pull", "me/model", code=1).err
    assert not list((folders / "own").rglob("*.gguf"))


def test_a_full_disk_is_reported_before_anything_is_fetched(hub, capfd, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 10**9))
    err = said(capfd, "pull", "me/model", code=1).err
    assert "GB of room" in err and "LLAMACLI_MODELS" in err
    assert hub.sent == 0


def test_a_plan_alone_fetches_the_heads_alone(hub, capfd):
    plan = json.loads(said(capfd, "pull", "--dry-run", "--json", "me/model").out)
    assert plan["bytes"] == len(hub.files["tiny-F32.gguf"])
    assert plan["plan"]["mode"] == "mapped"


def test_a_plan_leaves_nothing_and_takes_nothing_away(hub, capfd, folders):
    assert "it fits into memory" in said(capfd, "pull", "--dry-run", "me/model").out
    assert not list((folders / "own").rglob("*.part"))
    hub.faults = [("cut", 100_000), *[("status", 503, {})] * 20]
    said(capfd, "pull", "me/model", code=1)
    hub.faults = []
    (part,) = (folders / "own").rglob("*.part")
    for more in (("--dry-run",), ("--memory", "1M")):
        said(capfd, "pull", "me/model", *more, code=int("--memory" in more))
        assert part.stat().st_size >= 100_000


def test_a_refusal_of_the_hub_is_a_one_line_error(hub, capfd, monkeypatch):
    assert "check the spelling" in said(capfd, "pull", "me/other", code=1).err
    hub.token = "right"
    assert "set HF_TOKEN" in said(capfd, "pull", "me/model", code=1).err
    monkeypatch.setenv("HF_TOKEN", "right")
    hub.faults = [("status", 403, {})]
    assert "accept its licence" in said(capfd, "pull", "me/model", code=1).err
    assert "expected USER/REPO" in said(capfd, "pull", "model", code=2).err
    assert "found F32" in said(capfd, "pull", "me/model:Q9", code=2).err


def test_a_download_that_ends_is_listed_and_removed(hub, capfd, folders):
    hub.faults = [("cut", 100_000), *[("status", 503, {})] * 20]
    assert "8 tries in a row" in said(capfd, "pull", "me/model", code=1).err
    assert "cut off at" in said(capfd).out
    said(capfd, "remove", "tiny-F32")
    assert "tiny-F32" not in said(capfd).out
    assert os.listdir(folders / "own") == []


def test_a_file_is_added_by_a_name_and_its_link_removed(capfd, folders, model):
    file = folders / "elsewhere.gguf"
    file.write_bytes(model)
    said(capfd, "add", str(file), "mine")
    assert json.loads(said(capfd, "--json").out)[-1]["name"] == "mine"
    assert "architecture  llama4" in said(capfd, "show", "mine").out
    assert "expected a new name" in said(capfd, "add", str(file), "mine", code=2).err
    assert "without slashes" in said(capfd, "add", str(file), "../x", code=2).err
    said(capfd, "remove", "mine")
    assert file.read_bytes() == model
    assert "expected the name of a model, found none" in said(capfd, "remove", "mine", code=2).err
    (folders / "bad.gguf").write_bytes(b"no")
    assert "expected a GGUF" in said(capfd, "add", str(folders / "bad.gguf"), code=1).err


def test_models_of_other_programs_are_never_removed(capfd):
    assert "part of llamacli; nothing removes it" in said(capfd, "remove", "scout-tiny", code=2).err


def test_other_architectures_of_other_programs_are_left_out(capfd, folders):
    blob = folders / "ollama" / "blobs" / ("sha256-" + "a" * 64)
    blob.parent.mkdir(parents=True)
    blob.write_bytes(gguf_bytes.file([gguf_bytes.pair("general.architecture", "string", "qwen3")]))
    manifest = folders / "ollama" / "manifests" / "registry.ollama.ai" / "library" / "qwen3" / "8b"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(
        json.dumps({"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:" + "a" * 64}]})
    )
    listed = said(capfd, "-v")
    assert "qwen3" not in listed.out and "1 more of other architectures" in listed.err
    assert "qwen3:8b" in said(capfd, "--all").out
    assert main(["run", "-m", "qwen3:8b", "--no-stdin", "hi"]) == 1
    assert "found 'qwen3'" in capfd.readouterr().err


@pytest.mark.parametrize("args", [["list", "x"], ["show"], ["add"], ["remove"], ["pull", "a/b", "c/d"], ["fetch"]])
def test_wrong_usage_is_one_line(args, capfd):
    err = said(capfd, *args, code=2).err
    assert "expected" in err and err.count("\n") == 1
