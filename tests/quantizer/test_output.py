"""quantize: a file is complete or absent; finished tensors are kept, and existing files are replaced only if asked."""

import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import checkpoint
import pytest
from conversions import refusal

from llamacli.errors import CheckpointError, OutputError
from llamacli.files.gguf import open_gguf
from quantize.convert import convert


def test_an_existing_file_is_never_replaced_without_force(scout, tmp_path):
    out = tmp_path / "out.gguf"
    out.write_text("precious")
    work = []
    assert "--force" in refusal(OutputError, scout[0], out, "F32", progress=lambda *call: work.append(call))
    assert out.read_text() == "precious"
    assert not work
    convert(scout[0], out, "F32", force=True)
    assert open_gguf(out).metadata["general.architecture"] == "llama4"


def test_what_is_no_file_is_not_replaced_even_with_force(scout, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refusal(OutputError, scout[0], tmp_path / "pipe", "F32", force=True)
    assert (tmp_path / "pipe").is_fifo()
    refusal(OutputError, scout[0], "/dev/null", "F32", force=True)
    (tmp_path / "folder").mkdir()
    refusal(OutputError, scout[0], tmp_path / "folder", "F32", force=True)
    (tmp_path / "circle").symlink_to("circle")
    assert "in a circle" in refusal(OutputError, scout[0], tmp_path / "circle", "F32", force=True)
    assert "found: File name too long" in refusal(OutputError, scout[0], tmp_path / ("x" * 300), "F32", force=True)


@pytest.mark.parametrize("split", [None, 60_000])
def test_a_link_is_written_through(scout, tmp_path, split):
    (tmp_path / "disk").mkdir()
    names = [Path(name).name for name in convert(scout[0], tmp_path / "out.gguf", "Q8_0", split_max_size=split)["files"]]
    for name in names:
        (tmp_path / name).replace(tmp_path / "disk" / name)
        (tmp_path / name).symlink_to(f"disk/{name}")
    before = {name: (tmp_path / name).read_bytes() for name in names}
    assert "--force" in refusal(OutputError, scout[0], tmp_path / "out.gguf", "Q8_0", split_max_size=split)
    for name in names:
        (tmp_path / "disk" / name).write_text("old")
    (tmp_path / "disk" / names[0]).unlink()
    convert(scout[0], tmp_path / "out.gguf", "Q8_0", force=True, split_max_size=split)
    assert all((tmp_path / name).is_symlink() for name in names)
    assert {name: (tmp_path / "disk" / name).read_bytes() for name in names} == before


def test_places_that_cannot_be_written_are_refused(scout, tmp_path):
    refusal(OutputError, scout[0], tmp_path, "F32")
    refusal(OutputError, scout[0], tmp_path / "no" / "such" / "out.gguf", "F32")


def test_too_little_room_is_found_before_anything_is_written(scout, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "1000" in refusal(OutputError, scout[0], tmp_path / "out.gguf", "F32")
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_reports_no_free_room_is_written_to(scout, tmp_path, monkeypatch):
    """Some FUSE file systems always report 0 bytes."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    assert convert(scout[0], tmp_path / "out.gguf", "F32")["written"]


@pytest.mark.parametrize(("room", "kept"), [(20_000, False), (600_000, True)])
def test_a_disk_that_fills_up_costs_no_finished_tensor(scout, tmp_path, room, kept):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        message = refusal(OutputError, scout[0], tmp_path / "out.gguf", "F32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ("the same command continues" in message) is kept
    assert ("nothing was kept" in message) is not kept
    assert bool(list(tmp_path.iterdir())) is kept
    assert (convert(scout[0], tmp_path / "out.gguf", "F32")["resumed_bytes"] > 0) is kept


def test_a_tensor_that_cannot_be_converted_costs_no_finished_one_and_mending_its_shard_goes_on(tmp_path):
    checkpoint.write(tmp_path / "hf", shards=2)
    shard, good = tmp_path / "hf" / "model-00002-of-00002.safetensors", None
    good = shard.read_bytes()
    shard.write_bytes(good[:-2] + b"\xc0\x7f")  # the last weight is NaN
    message = refusal(CheckpointError, tmp_path / "hf", tmp_path / "out.gguf", "Q8_0")
    assert "NaN" in message and "tensors are kept in out.gguf.part" in message
    shard.write_bytes(good)
    assert convert(tmp_path / "hf", tmp_path / "out.gguf", "Q8_0")["resumed_bytes"] > 0
    convert(tmp_path / "hf", tmp_path / "fresh.gguf", "Q8_0")
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "fresh.gguf").read_bytes()


CUT = """
import os, sys
from quantize.convert import convert
def cut(done, total, name):
    if done > total // 2:
        os.truncate(sys.argv[3], os.path.getsize(sys.argv[3]) // 2)
convert(sys.argv[1], sys.argv[2], "Q8_0", threads=1, progress=cut)
"""


@pytest.mark.parametrize("kind", ["folder", "gguf", "same type"])
def test_a_source_cut_while_it_is_read_is_an_error_and_not_the_end_of_the_process(scout, tmp_path, kind):
    source = cut = tmp_path / "hf"
    if kind == "folder":
        checkpoint.write(source)
        cut = source / "model.safetensors"
    else:
        source = cut = tmp_path / "source.gguf"
        convert(scout[0], source, "F16" if kind == "gguf" else "Q8_0")
    child = subprocess.run([sys.executable, "-c", CUT, source, tmp_path / "out.gguf", cut], capture_output=True, text=True)
    assert child.returncode == 1, child.stderr
    error = child.stderr.splitlines()[-1]
    assert f"{cut}: expected an unchanged file" in error and "tensors are kept" in error
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("error", [ValueError, OSError])
def test_whatever_stops_it_an_older_file_stays_and_the_same_command_continues(scout, tmp_path, error):
    out = tmp_path / "out.gguf"
    out.write_text("precious")

    def stop(done, total, name):
        if done > total // 2:
            assert (tmp_path / "out.gguf.part").exists()
            raise error

    with pytest.raises(error):
        convert(scout[0], out, "F32", force=True, progress=stop)
    assert out.read_text() == "precious"
    assert convert(scout[0], out, "F32", force=True)["resumed_bytes"] > 0
