"""Conversions that are killed: they leave no incomplete file under the final name, continue where they stopped, and give the
same bytes.
"""

import fcntl
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import checkpoint
import pytest
from conversions import finished, interrupted, names, opened, refusal

from llamacli.errors import CheckpointError, OutputError
from quantize.convert import convert

ROOT = Path(__file__).resolve().parents[2]
SLOWLY = """
import os, signal, sys, time
from pathlib import Path
from quantize.convert import convert

def slowly(folder, out, recipe):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as the command line has it
    log = Path(out + ".part.log")
    def lines():
        return log.read_bytes().count(b"\\n") if log.exists() else 1
    most = lines() + 4  # however late the signal comes, it is not over by then
    convert(folder, out, recipe, progress=lambda *_: time.sleep(0.02 if lines() < most else 1000))

for job in sys.stdin:  # a process for each, which has imported everything
    pid = os.fork()
    if not pid:
        try:
            slowly(*job.rstrip("\\n").split("\\t"))
        finally:
            os._exit(1)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def stopped():
    """Starts a conversion in a process of its own and sends it a signal, so many seconds after it has finished one more tensor.
    Returns its exit code.
    """
    command = [sys.executable, "-c", SLOWLY]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as server:

        def stop(folder, out, sent=signal.SIGKILL, after=0.1):
            before = finished(out)
            server.stdin.write(f"{folder}\t{out}\tQ8_0\n".encode())
            child = int(server.stdout.readline())
            while finished(out) <= before and not select.select([server.stdout], [], [], 0.005)[0]:
                pass
            time.sleep(after)
            os.kill(child, sent)
            return int(server.stdout.readline())

        yield stop
        server.stdin.close()


def test_killed_at_ten_moments_the_file_is_that_of_an_uninterrupted_run(folder, whole, stopped, tmp_path):
    out, rng, done = tmp_path / "out.gguf", random.Random(5), [0]
    for _ in range(10):
        assert stopped(folder, out, after=rng.uniform(0, 0.1)) == -signal.SIGKILL
        assert names(tmp_path) == {"out.gguf.part", "out.gguf.part.log"}
        done.append(finished(out))
    assert done == sorted(set(done))
    convert(folder, out, "Q8_0")
    assert out.read_bytes() == whole
    assert names(tmp_path) == {"out.gguf"}


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_what_was_finished_is_not_made_again(folder, whole, stopped, tmp_path, sent):
    out = tmp_path / "out.gguf"
    stopped(folder, out, sent=sent)
    calls = []
    report = convert(folder, out, "Q8_0", progress=lambda done, total, name: calls.append((done, name)))
    assert report["resumed_bytes"] > 0
    assert calls[0][0] > 0
    assert calls[0][0] <= calls[1][0]
    assert out.read_bytes() == whole
    fresh = convert(folder, tmp_path / "fresh.gguf", "Q8_0")
    assert fresh["resumed_bytes"] == 0
    assert [t["rmse"] for t in fresh["tensors"]] == [t["rmse"] for t in report["tensors"]]


def test_a_part_that_was_damaged_meanwhile_is_made_again_from_there(folder, whole, tmp_path):
    out, part = tmp_path / "out.gguf", tmp_path / "out.gguf.part"
    interrupted(folder, out)
    data = bytearray(part.read_bytes())
    head = len(whole) - sum(-(-t.nbytes // 32) * 32 for t in opened(whole, tmp_path).tensors.values())
    data[head + 3] ^= 1
    part.write_bytes(data)
    assert convert(folder, out, "Q8_0")["resumed_bytes"] == 0
    assert out.read_bytes() == whole


@pytest.mark.parametrize("damage", [b"", b"no log", b"\n\n\n", b"\xff\t\t\n", b"\0" * 100])
def test_a_log_that_makes_no_sense_is_not_taken_for_ours_and_with_force_begins_anew(folder, whole, tmp_path, damage):
    out, part, log = tmp_path / "out.gguf", tmp_path / "out.gguf.part", tmp_path / "out.gguf.part.log"
    interrupted(folder, out)
    log.write_bytes(damage)
    before = part.read_bytes()
    with pytest.raises(OutputError, match=r"out\.gguf\.part.*move it away or add --force"):
        convert(folder, out, "Q8_0")
    assert (part.read_bytes(), log.read_bytes()) == (before, damage)
    assert convert(folder, out, "Q8_0", force=True)["resumed_bytes"] == 0
    assert out.read_bytes() == whole


@pytest.mark.parametrize("taken", [["out.gguf.part"], ["out.gguf.part.log"], ["out.gguf.part", "out.gguf.part.log"]])
def test_files_of_others_with_the_names_of_part_and_log_stay_unless_forced(folder, whole, tmp_path, taken):
    out = tmp_path / "out.gguf"
    for name in taken:
        (tmp_path / name).write_text("precious")
    with pytest.raises(OutputError, match=r"out\.gguf\.part.*move it away or add --force"):
        convert(folder, out, "Q8_0")
    assert {name: (tmp_path / name).read_text() for name in names(tmp_path)} == dict.fromkeys(taken, "precious")
    convert(folder, out, "Q8_0", force=True)
    assert out.read_bytes() == whole
    assert names(tmp_path) == {"out.gguf"}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["out.gguf.part", "out.gguf.part.log"])
def test_no_link_and_no_pipe_is_written_through_under_their_names(folder, tmp_path, name, force):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    for make in (lambda path: path.symlink_to("precious"), os.mkfifo, os.mkdir):
        make(tmp_path / name)
        with pytest.raises(OutputError, match=f"{name}: .*move it away"):
            convert(folder, tmp_path / "out.gguf", "Q8_0", force=force)
        assert precious.read_text() == "precious"
        assert names(tmp_path) == {"precious", name}
        (tmp_path / name).rmdir() if (tmp_path / name).is_dir() else (tmp_path / name).unlink()


def test_a_part_that_became_a_link_is_not_followed(folder, tmp_path):
    interrupted(folder, tmp_path / "out.gguf")
    part = (tmp_path / "out.gguf.part").rename(tmp_path / "elsewhere")
    before = part.read_bytes()
    (tmp_path / "out.gguf.part").symlink_to("elsewhere")
    with pytest.raises(OutputError, match="found a link"):
        convert(folder, tmp_path / "out.gguf", "Q8_0")
    assert part.read_bytes() == before


def test_a_log_is_believed_up_to_its_first_damaged_line(folder, whole, tmp_path):
    out, log = tmp_path / "out.gguf", tmp_path / "out.gguf.part.log"
    interrupted(folder, out)
    job, first, second, *more = log.read_bytes().split(b"\n")
    assert len(more) > 3
    log.write_bytes(b"\n".join([job, first, second.replace(b'"note": "', b'"note": "x'), *more]))
    resumed = convert(folder, out, "Q8_0")["resumed_bytes"]
    assert resumed == next(iter(opened(whole, tmp_path).tensors.values())).nbytes
    assert out.read_bytes() == whole


def test_a_log_cut_in_a_line_counts_the_lines_before(folder, whole, tmp_path):
    out, log = tmp_path / "out.gguf", tmp_path / "out.gguf.part.log"
    interrupted(folder, out)
    log.write_bytes(log.read_bytes()[:-5])
    convert(folder, out, "Q8_0")
    assert out.read_bytes() == whole


def test_another_type_does_not_throw_away_what_is_finished_unless_forced(folder, whole, tmp_path):
    out = tmp_path / "out.gguf"
    interrupted(folder, out)
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(OutputError, match=r"out\.gguf\.part: .*found \d+ finished tensors of one with other options.*--force"):
        convert(folder, out, "F16")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == left
    assert convert(folder, out, "Q8_0")["resumed_bytes"] > 0
    assert out.read_bytes() == whole
    out.unlink()
    interrupted(folder, out)
    assert convert(folder, out, "F16", force=True)["resumed_bytes"] == 0


def test_a_changed_source_begins_anew(folder, tmp_path):
    out = tmp_path / "out.gguf"
    interrupted(folder, out)
    shard = next(folder.glob("*.safetensors"))
    shard.touch()
    assert convert(folder, out, "Q8_0")["resumed_bytes"] == 0


def changing(change, at=0.3):
    """A `progress` that calls `change` once `at` of the file is written."""
    left = [change]

    def progress(done, total, name):
        if left and done > at * total:
            left.pop()()

    return progress


def test_a_source_that_is_written_to_meanwhile_is_noticed(folder, tmp_path):
    """As by a download that goes on: part of the file would be of the old bytes, part of the new ones."""
    source, out = shutil.copytree(folder, tmp_path / "hf"), tmp_path / "out.gguf"
    shard = source / "model.safetensors"

    def write():
        with shard.open("r+b") as file:
            file.seek(-8, os.SEEK_END)
            file.write(bytes(8))
        os.utime(shard, ns=(1, 1))  # clocks of file systems may be coarse

    said = refusal(CheckpointError, source, out, "Q8_0", progress=changing(write))
    assert "model.safetensors: expected an unchanged file" in said
    convert(source, out, "Q8_0")
    convert(source, tmp_path / "again.gguf", "Q8_0")
    assert out.read_bytes() == (tmp_path / "again.gguf").read_bytes()


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_source_that_goes_meanwhile_is_read_to_its_end(folder, tmp_path, how):
    source, out = shutil.copytree(folder, tmp_path / "hf"), tmp_path / "out.gguf"
    shard = source / "model.safetensors"

    def go():
        shard.unlink()
        if how == "replaced":
            shard.write_bytes(b"another")

    convert(source, tmp_path / "before.gguf", "Q8_0")
    convert(source, out, "Q8_0", progress=changing(go, at=0.0))
    assert out.read_bytes() == (tmp_path / "before.gguf").read_bytes()


def test_a_source_without_a_usual_name_is_noticed_when_it_changes(folder, tmp_path):
    source, out = tmp_path / "sha256-0815", tmp_path / "out.gguf"
    convert(folder, source, "F16")
    interrupted(source, out)
    data = bytearray(source.read_bytes())
    data[-33] ^= 1
    source.write_bytes(data)
    assert convert(source, out, "Q8_0", force=True)["resumed_bytes"] == 0


def test_files_beside_the_source_that_are_not_read_change_nothing(tmp_path):
    source = tmp_path / "hf"
    checkpoint.write(source)
    (source / "nohup.out").write_text("a")
    interrupted(source, source / "out.bin")
    (source / "nohup.out").write_text("ab")
    assert convert(source, source / "out.bin", "Q8_0")["resumed_bytes"] > 0
    convert(source, source / "out.bin", "F16", force=True)  # an output, whatever its name, is no source
    (source / "nohup.out").write_text("abc")
    convert(source, source / "nohup.out", "F16", force=True)


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md", "chat_template.jinja"],
)
def test_every_file_that_is_read_counts_as_source(tmp_path, name):
    source = tmp_path / "hf"
    checkpoint.write(source)
    for text in ("README.md", "chat_template.jinja"):
        (source / text).write_text("x")
    with pytest.raises(OutputError, match="source itself"):
        convert(source, source / name, "Q8_0", force=True)
    interrupted(source, tmp_path / "out.gguf")
    (source / name).write_text((source / name).read_text() + "\n")
    assert convert(source, tmp_path / "out.gguf", "Q8_0", force=True)["resumed_bytes"] == 0


@pytest.mark.parametrize("odd", ["w.gguf", "w.part", "w.log", "w"])
def test_a_shard_counts_as_source_whatever_its_name(tmp_path, odd):
    source = tmp_path / "hf"
    weights = checkpoint.write(source)
    (source / "model.safetensors").rename(source / odd)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(weights, odd)}))
    before = (source / odd).read_bytes()
    with pytest.raises(OutputError, match="source itself"):
        convert(source, source / odd, "Q8_0", force=True)
    assert (source / odd).read_bytes() == before
    interrupted(source, tmp_path / "out.gguf")
    (source / odd).touch()
    assert convert(source, tmp_path / "out.gguf", "Q8_0")["resumed_bytes"] == 0


def test_neither_part_of_a_split_source_is_written_over(folder, whole, tmp_path):
    files = convert(folder, tmp_path / "src.gguf", "Q8_0", split_max_size=len(whole) // 2)["files"]
    for file in files:
        with pytest.raises(OutputError, match="source itself"):
            convert(files[0], file, "Q8_0", force=True)


def test_a_stopped_conversion_into_the_sources_folder_continues(tmp_path):
    source = tmp_path / "hf"
    checkpoint.write(source)
    (source / "dead").symlink_to("nowhere")
    interrupted(source, source / "out.gguf")
    assert convert(source, source / "out.gguf", "Q8_0")["resumed_bytes"] > 0
    assert convert(source, source / "out.gguf", "Q8_0", force=True)["resumed_bytes"] == 0


KILLED_NAMING = """
import os, signal, sys
from pathlib import Path
from quantize.convert import convert
replace = Path.replace
Path.replace = lambda old, new: (replace(old, new), os.kill(os.getpid(), signal.SIGKILL))
convert(sys.argv[1], sys.argv[2], "Q8_0", split_max_size=int(sys.argv[3]))
"""


@pytest.mark.parametrize("parts", [1, 3])
def test_killed_while_files_get_their_names_the_same_command_ends_it(folder, whole, tmp_path, parts):
    """Files that have their names already are told apart from files of others."""
    out, size = tmp_path / "out.gguf", len(whole) if parts == 1 else len(whole) // 3
    subprocess.run([sys.executable, "-c", KILLED_NAMING, folder, out, str(size)], cwd=ROOT)
    (named,) = tmp_path.glob("*.gguf")
    data = named.read_bytes()
    named.rename(tmp_path / "ours")
    named.write_bytes(b"another's")
    with pytest.raises(OutputError, match="--force"):
        convert(folder, out, "Q8_0", split_max_size=size)
    assert named.read_bytes() == b"another's"
    (tmp_path / "ours").replace(named)
    report = convert(folder, out, "Q8_0", split_max_size=size)
    assert report["resumed_bytes"] == sum(t["nbytes"] for t in report["tensors"])
    assert names(tmp_path) == {Path(name).name for name in report["files"]}
    assert named.read_bytes() == data


def test_a_second_conversion_to_the_same_file_is_refused(folder, tmp_path):
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
    (tmp_path / "link.gguf").symlink_to(out)
    with pytest.raises(OutputError, match="source itself"):
        convert(out, tmp_path / "link.gguf", "Q8_0", force=True)


def test_a_file_is_not_written_onto_a_shard_of_its_source(folder, tmp_path):
    with pytest.raises(OutputError, match="source itself"):
        convert(folder, folder / "model.safetensors", "Q8_0", force=True)


def test_a_part_is_not_written_over_a_source_of_its_name(folder, tmp_path):
    source = tmp_path / "out.gguf.part"
    convert(folder, source, "F16")
    before = source.read_bytes()
    with pytest.raises(OutputError, match="source itself"):
        convert(source, tmp_path / "out.gguf", "Q8_0")
    assert source.read_bytes() == before


def test_the_check_for_free_room_counts_what_a_part_holds_already(folder, whole, tmp_path, monkeypatch):
    out = tmp_path / "out.gguf"
    interrupted(folder, out)
    needed = len(whole) - (tmp_path / "out.gguf.part").stat().st_size
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(OutputError, match=f"expected {needed} bytes of room"):
        convert(folder, out, "Q8_0")
    assert names(tmp_path) == {"out.gguf.part", "out.gguf.part.log"}
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=needed))
    assert convert(folder, out, "Q8_0")["resumed_bytes"] > 0
