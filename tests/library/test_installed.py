"""Models that are found in place: of our own folders, of Ollama, of the hub's cache; hostile folders cost nothing."""

import json
import os

import gguf_bytes
import pytest

from llamacli import environment
from llamacli.library.installed import architecture, find, installed, label

GGUF = gguf_bytes.llama4()


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMACLI_MODELS", str(tmp_path / "own"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def put(path, data=GGUF):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def ollama(root, name, layers, host="registry.ollama.ai/library"):
    model, tag = name.split(":")
    put(root / "ollama" / "manifests" / host / model / tag, json.dumps({"layers": layers}).encode())


def layer(digest, kind="model"):
    return {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": digest, "size": 1}


def names():
    return [model.name for model in installed() if model.place != "llamacli"]


def test_a_model_of_our_folder_goes_by_its_file(folders):
    one = put(folders / "own" / "one.gguf")
    two = put(folders / "own" / "two" / "two.gguf")
    assert find("one").paths == [one]
    assert find("two").paths == [two]
    assert find("ONE").paths == [one]
    assert find("scout-tiny").paths == [environment.SMALL_MODEL]
    assert [find(name) for name in ("three", "", ".", "..", "../own/one", "/etc/passwd", "x" * 5000, "a\0b")] == [None] * 8


def test_what_was_pulled_goes_by_its_repository_too(folders):
    path = put(folders / "own" / "me" / "Scout-GGUF" / "Scout-UD-Q4_K_XL.gguf")
    other = put(folders / "own" / "me" / "Scout-GGUF" / "Scout-Q8_0.gguf")
    assert find("Scout-UD-Q4_K_XL").paths == find("me/Scout-GGUF:UD-Q4_K_XL").paths == [path]
    assert find("hf.co/me/Scout-GGUF:q8_0").paths == [other]
    assert find("me/Scout-GGUF") is not None
    assert find("me/Scout-GGUF:Q2_K") is None


def test_parts_of_a_split_model_are_one_model_and_missing_ones_are_reported(folders):
    parts = [put(folders / "own" / "m" / f"m-0000{n}-of-00003.gguf") for n in (1, 3)]
    assert (find("m").paths, find("m").lacks) == (parts, 1)
    assert find("m").nbytes == 2 * len(GGUF)


def test_models_of_ollama_are_found_by_their_tags(folders):
    digest = "a" * 64
    blob = put(folders / "ollama" / "blobs" / f"sha256-{digest}")
    ollama(folders, "llama4:scout", [layer(f"sha256:{digest}"), layer("sha256:" + "b" * 64, "template")])
    ollama(folders, "mine:latest", [layer(f"sha256:{digest}")], "registry.ollama.ai/me")
    ollama(folders, "Scout-GGUF:Q4_K_M", [layer(f"sha256:{digest}")], "hf.co/unsloth")
    assert names() == ["hf.co/unsloth/Scout-GGUF:Q4_K_M", "llama4:scout", "me/mine:latest"]
    assert find("llama4:scout").paths == find("me/mine").paths == find("hf.co/unsloth/Scout-GGUF:Q4_K_M").paths == [blob]


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"[" * 100_000,
        b"{}",
        b'{"layers": 3}',
        b"\xff\xfe",
        json.dumps({"layers": [layer("sha256:../../../secret")]}).encode(),
        json.dumps({"layers": [layer("sha256:" + "c" * 64)]}).encode(),  # its blob is not there
        json.dumps({"layers": [layer(7)]}).encode(),
        b'{"layers": ["' + b"x" * (2 << 20) + b'"]}',
    ],
)
def test_a_damaged_manifest_is_ignored(folders, manifest):
    put(folders / "secret")
    put(folders / "ollama" / "manifests" / "registry.ollama.ai" / "library" / "bad" / "latest", manifest)
    assert names() == []


def test_models_of_the_hubs_cache_are_found_at_the_main_branch(folders):
    commit, old = "1" * 40, "2" * 40
    repo = folders / "hub" / "models--me--Scout-GGUF"
    put(repo / "refs" / "main", commit.encode())
    blob = put(repo / "blobs" / "abc")
    for n in (1, 2):
        link = repo / "snapshots" / commit / "Q4_K_M" / f"Scout-Q4_K_M-0000{n}-of-00002.gguf"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    put(repo / "snapshots" / commit / "mmproj-F16.gguf")
    put(repo / "snapshots" / old / "Scout-Q2_K.gguf")
    put(repo / "snapshots" / commit / "x" / "..gguf")
    found = find("me/Scout-GGUF:Q4_K_M")
    assert [path.name for path in found.paths] == ["Scout-Q4_K_M-00001-of-00002.gguf", "Scout-Q4_K_M-00002-of-00002.gguf"]
    assert "Scout-Q2_K" not in names()
    put(repo / "refs" / "main", b"../../..")
    assert names()


def test_links_that_lead_nowhere_are_no_models(folders):
    (folders / "own").mkdir()
    (folders / "own" / "gone.gguf").symlink_to(folders / "nothing")
    os.mkfifo(folders / "own" / "pipe.gguf")
    assert names() == []


def test_the_architecture_is_read_from_the_first_bytes(folders):
    assert architecture(put(folders / "a.gguf")) == "llama4"
    assert architecture(put(folders / "b.gguf", GGUF[:40])) is None
    assert architecture(put(folders / "c.gguf", b"x" * 300)) is None
    assert architecture(folders / "none") is None


@pytest.mark.parametrize(
    "stem, expected",
    [
        ("Llama-4-Scout-17B-16E-Instruct-Q4_K_M", "Q4_K_M"),
        ("Llama-4-Scout-17B-16E-Instruct-UD-Q2_K_XL", "UD-Q2_K_XL"),
        ("scout.IQ4_XS", "IQ4_XS"),
        ("model-BF16", "BF16"),
        ("scout-tiny", "scout-tiny"),
        ("Q8_0", "Q8_0"),
    ],
)
def test_the_label_of_a_file_is_its_type(stem, expected):
    assert label(stem) == expected
