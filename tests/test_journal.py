"""Conversions that are killed: no half file under the final name, taken up where they stopped, the same bytes in the end."""

import fcntl
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import checkpoint
import numpy as np
import pytest

from llamacli import Model
from llamacli.errors import OutputError
from llamacli.gguf import open_gguf
from quantize.convert import convert

ROOT = Path(__file__).resolve().parent.parent
SLOWLY = """
import sys, time
from quantize.convert import convert
convert(sys.argv[1], sys.argv[2], sys.argv[3], progress=lambda *_: time.sleep(0.02))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("scout") / "hf"
    checkpoint.write(path)
    return path


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out.gguf"
    convert(folder, out, "Q8_0")
    return out.read_bytes()


def start(folder, out, recipe="Q8_0"):
    """A conversion in a process of its own, and that process once it has begun to write."""
    child = subprocess.Popen([sys.executable, "-c", SLOWLY, folder, out, recipe], cwd=ROOT, stderr=subprocess.PIPE)
    log = out.with_name(out.name + ".part.log")
    while child.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > 1):
        time.sleep(0.005)
    return child


def stopped(folder, out, recipe="Q8_0", sent=signal.SIGKILL, after=0.1):
    child = start(folder, out, recipe)
    time.sleep(after)
    child.send_signal(sent)
    child.communicate(timeout=60)
    return child.returncode


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_killed_at_ten_moments_the_file_is_that_of_an_uninterrupted_run(folder, whole, tmp_path):
    out, rng, killed = tmp_path / "out.gguf", random.Random(5), 0
    for _ in range(10):
        killed += stopped(folder, out, after=rng.uniform(0, 0.25)) == -signal.SIGKILL
        if out.exists():
            break
        assert names(tmp_path) == {"out.gguf.part", "out.gguf.part.log"}
    assert killed > 2
    convert(folder, out, "Q8_0", force=out.exists())
    assert out.read_bytes() == whole
    assert names(tmp_path) == {"out.gguf"}


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_what_was_finished_is_not_made_again(folder, whole, tmp_path, sent):
    out = tmp_path / "out.gguf"
    stopped(folder, out, sent=sent)
    report = convert(folder, out, "Q8_0")
    assert report["resumed_bytes"] > 0
    assert out.read_bytes() == whole
    fresh = convert(folder, tmp_path / "fresh.gguf", "Q8_0")
    assert fresh["resumed_bytes"] == 0
    assert [t["rmse"] for t in fresh["tensors"]] == [t["rmse"] for t in report["tensors"]]


def test_a_part_that_was_damaged_meanwhile_is_made_again_from_there(folder, whole, tmp_path):
    out, part = tmp_path / "out.gguf", tmp_path / "out.gguf.part"
    stopped(folder, out)
    data = bytearray(part.read_bytes())
    head = len(whole) - sum(-(-t.nbytes // 32) * 32 for t in opened(whole, tmp_path).tensors.values())
    data[head + 3] ^= 1
    part.write_bytes(data)
    assert convert(folder, out, "Q8_0")["resumed_bytes"] == 0
    assert out.read_bytes() == whole


def opened(data, tmp_path):
    (tmp_path / "copy.gguf").write_bytes(data)
    found = open_gguf(tmp_path / "copy.gguf")
    (tmp_path / "copy.gguf").unlink()
    return found


@pytest.mark.parametrize("damage", [b"", b"no log", b"\n\n\n", b"\xff\t\t\n", b"\0" * 100])
def test_a_log_that_makes_no_sense_begins_anew(folder, whole, tmp_path, damage):
    out = tmp_path / "out.gguf"
    stopped(folder, out)
    (tmp_path / "out.gguf.part.log").write_bytes(damage)
    assert convert(folder, out, "Q8_0")["resumed_bytes"] == 0
    assert out.read_bytes() == whole


def test_a_log_cut_in_a_line_counts_the_lines_before(folder, whole, tmp_path):
    out, log = tmp_path / "out.gguf", tmp_path / "out.gguf.part.log"
    stopped(folder, out)
    log.write_bytes(log.read_bytes()[:-5])
    convert(folder, out, "Q8_0")
    assert out.read_bytes() == whole


def test_another_type_or_a_changed_source_begins_anew(folder, tmp_path):
    out = tmp_path / "out.gguf"
    stopped(folder, out)
    assert convert(folder, out, "F16")["resumed_bytes"] == 0
    out.unlink()
    stopped(folder, out)
    shard = next(folder.glob("*.safetensors"))
    shard.touch()
    assert convert(folder, out, "Q8_0")["resumed_bytes"] == 0


def test_two_at_once_are_one_too_many(folder, tmp_path):
    out = tmp_path / "out.gguf"
    with (tmp_path / "out.gguf.part.log").open("wb") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another llamacli"):
            convert(folder, out, "Q8_0")
        assert names(tmp_path) == {"out.gguf.part.log"}


def test_a_file_is_not_written_onto_its_source(folder, tmp_path):
    out = tmp_path / "out.gguf"
    convert(folder, out, "F16")
    with pytest.raises(OutputError, match="source itself"):
        convert(out, out, "Q8_0", force=True)


def test_a_split_model_is_the_whole_one_in_parts(folder, whole, tmp_path):
    size = len(whole) // 3
    report = convert(folder, tmp_path / "out.gguf", "Q8_0", split_max_size=size)
    files = [Path(name) for name in report["files"]]
    assert len(files) > 3
    assert names(tmp_path) == {path.name for path in files}
    assert files[0].name == f"out-00001-of-{len(files):05d}.gguf"
    one, parts = opened(whole, tmp_path), open_gguf(files[0])
    assert list(parts.tensors) == list(one.tensors)
    for name, tensor in one.tensors.items():
        np.testing.assert_array_equal(parts.tensors[name].data, tensor.data)
    assert [key for key in parts.metadata if not key.startswith("split.")] == list(one.metadata)
    for path in files:
        assert path.stat().st_size <= size or len(open_one(path).tensors) == 1
    again = convert(files[0], tmp_path / "joined.gguf", "Q8_0")
    assert again["resumed_bytes"] == 0
    assert opened((tmp_path / "joined.gguf").read_bytes(), tmp_path).tensors.keys() == one.tensors.keys()


def open_one(path):
    """One part by itself, as the format has it."""
    from gguf import GGUFReader

    return GGUFReader(path)


def test_parts_of_a_split_are_not_overwritten_unasked(folder, whole, tmp_path):
    size = len(whole) // 3
    files = convert(folder, tmp_path / "out.gguf", "Q8_0", split_max_size=size)["files"]
    Path(files[0]).unlink()
    with pytest.raises(OutputError, match="--force"):
        convert(folder, tmp_path / "out.gguf", "Q8_0", split_max_size=size)
    assert not Path(files[0]).exists()


def test_a_split_model_answers_as_the_whole_one(folder, whole, tmp_path):
    (tmp_path / "whole.gguf").write_bytes(whole)
    files = convert(folder, tmp_path / "out.gguf", "Q8_0", split_max_size=len(whole) // 3)["files"]
    one, parts = (Model.load(path, threads=1, ctx=32).logits([1, 2, 3]) for path in (tmp_path / "whole.gguf", files[0]))
    np.testing.assert_array_equal(one, parts)
