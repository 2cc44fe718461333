"""Conversions that are killed: no half file under the final name, taken up where they stopped, the same bytes in the end."""

import contextlib
import errno
import fcntl
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import checkpoint
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamacli import Model
from llamacli.errors import OutputError
from llamacli.files.gguf import open_gguf
from quantize import journal
from quantize.convert import convert
from quantize.journal import MAGIC, File, Maker, write_files

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
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("scout") / "hf"
    checkpoint.write(path)
    return path


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out.gguf"
    convert(folder, out, "Q8_0")
    return out.read_bytes()


def finished(out):
    """How many tensors the log calls finished."""
    log = out.with_name(out.name + ".part.log")
    return log.read_bytes().count(b"\n") - 1 if log.exists() else 0


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


def interrupted(folder, out, recipe="Q8_0", at=0.6, **options):
    """A conversion in this process that ends as by Ctrl-C once `at` of it is written."""

    def stop(done, total, name):
        if done > at * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(folder, out, recipe, progress=stop, **options)


def names(folder):
    return {path.name for path in folder.iterdir()}


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


def opened(data, tmp_path):
    (tmp_path / "copy.gguf").write_bytes(data)
    found = open_gguf(tmp_path / "copy.gguf")
    (tmp_path / "copy.gguf").unlink()
    return found


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


def test_an_output_among_the_sources_files_is_taken_up_too(tmp_path):
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
    """Until then those that have one are told apart from another's files of that name."""
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
    (tmp_path / "link.gguf").symlink_to(out)
    with pytest.raises(OutputError, match="source itself"):
        convert(out, tmp_path / "link.gguf", "Q8_0", force=True)


def test_nor_onto_a_shard_of_its_source(folder, tmp_path):
    with pytest.raises(OutputError, match="source itself"):
        convert(folder, folder / "model.safetensors", "Q8_0", force=True)


def test_nor_grows_it_over_a_source_named_like_its_part(folder, tmp_path):
    source = tmp_path / "out.gguf.part"
    convert(folder, source, "F16")
    before = source.read_bytes()
    with pytest.raises(OutputError, match="source itself"):
        convert(source, tmp_path / "out.gguf", "Q8_0")
    assert source.read_bytes() == before


def test_room_that_a_part_takes_already_is_not_asked_for_again(folder, whole, tmp_path, monkeypatch):
    out = tmp_path / "out.gguf"
    interrupted(folder, out)
    needed = len(whole) - (tmp_path / "out.gguf.part").stat().st_size
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(OutputError, match=f"expected {needed} bytes of room"):
        convert(folder, out, "Q8_0")
    assert names(tmp_path) == {"out.gguf.part", "out.gguf.part.log"}
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=needed))
    assert convert(folder, out, "Q8_0")["resumed_bytes"] > 0


def test_a_split_model_stopped_in_its_second_file_is_taken_up(folder, whole, tmp_path):
    options = {"split_max_size": len(whole) // 3}
    interrupted(folder, tmp_path / "out.gguf", **options)
    assert len(list(tmp_path.glob("*.part"))) > 1
    assert not list(tmp_path.glob("*.gguf"))
    report = convert(folder, tmp_path / "out.gguf", "Q8_0", **options)
    assert report["resumed_bytes"] > 0
    fresh = convert(folder, tmp_path / "fresh.gguf", "Q8_0", **options)
    for ours, theirs in zip(report["files"], fresh["files"], strict=True):
        assert Path(ours).read_bytes() == Path(theirs).read_bytes()


def test_parts_of_another_split_are_named_not_taken_up_and_not_removed(folder, whole, tmp_path):
    interrupted(folder, tmp_path / "out.gguf", split_max_size=len(whole) // 3)
    (tmp_path / "other-00001-of-00002.gguf.part").write_text("another's")
    left = names(tmp_path)
    report = convert(folder, tmp_path / "out.gguf", "Q8_0")
    (notice,) = (notice for notice in report["notices"] if "another number of files" in notice)
    assert set(notice.partition(": ")[2].split(", ")) == left - {"other-00001-of-00002.gguf.part"}
    assert names(tmp_path) == left | {"out.gguf"}


def test_a_folders_name_is_none_for_a_split_model(folder, tmp_path):
    with pytest.raises(OutputError, match="found a folder"):
        convert(folder, tmp_path, "Q8_0", split_max_size=1000)


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


# --- the writing alone, with tensors of random bytes


def job(folder, seed):
    """Two files of three tensors each, of sizes that need padding and that need none; and what makes them."""
    rng = np.random.default_rng(seed)
    sizes = [int(n) for n in rng.integers(0, 200, 6)]
    data = {f"tab\t{i}\nend": rng.bytes(n) for i, n in enumerate(sizes)}
    todo = [(name, len(raw)) for name, raw in data.items()]
    files = [File(folder / f"{i}.gguf", bytes([i]) * 64, todo[3 * i : 3 * i + 3]) for i in range(2)]
    expected = [file.head + b"".join(data[name] + bytes(-len(data[name]) % 32) for name, _ in file.tensors) for file in files]
    return files, data, expected


def attempt(files, data, made=None, skipped=None, chunks=None, force=False):
    """Write in chunks of 50 bytes, stop after `chunks` of them."""

    def make(name):
        nonlocal chunks
        if made is not None:
            made.append(name)
        for i in range(0, len(data[name]), 50):
            if chunks is not None and (chunks := chunks - 1) < 0:
                raise KeyboardInterrupt
            yield memoryview(data[name])[i : i + 50]

    def skip(name, note):
        assert note == f"note of {name}"
        if skipped is not None:
            skipped.append(name)

    write_files(files, "job", Maker(make, lambda name: f"note of {name}", skip), force)


@settings(max_examples=150)
@given(
    st.integers(0, 99), st.integers(0, 20), st.sampled_from(["part", "log", "cut part", "cut log", None]), st.floats(0, 0.999)
)
def test_whatever_is_damaged_where_the_files_come_out_right(seed, chunks, damaged, place):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files, data, expected = job(folder, seed)
        with contextlib.suppress(KeyboardInterrupt):
            attempt(files, data, chunks=chunks)
        victims = sorted(folder.glob("*.part") if damaged and "part" in damaged else folder.glob("*.log"))
        if damaged and victims:
            raw = bytearray(victims[-1].read_bytes())
            if damaged.startswith("cut"):
                del raw[int(place * len(raw)) :]
            elif raw:
                raw[int(place * len(raw))] ^= 4
            victims[-1].write_bytes(raw)
        if not files[0].path.exists():
            made, skipped, log, before = [], [], folder / "0.gguf.part.log", names(folder)
            ours = not log.exists() or log.read_bytes().startswith(MAGIC + b"job\n")
            try:
                attempt(files, data, made, skipped)
            except OutputError as error:  # the log of another job or program, as far as can be told
                assert not ours and "--force" in str(error)
                assert names(folder) == before
                attempt(files, data, made, skipped, force=True)
            assert sorted(made + skipped) == sorted(data)
        assert [file.path.read_bytes() for file in files] == expected
        assert names(folder) == {"0.gguf", "1.gguf"}


def test_finished_tensors_of_a_sound_part_are_all_kept(tmp_path):
    files, data, _ = job(tmp_path, 3)
    with pytest.raises(KeyboardInterrupt):
        attempt(files, data, chunks=sum(-(-len(raw) // 50) for raw in list(data.values())[:5]))
    made = []
    attempt(files, data, made)
    assert made == list(data)[5:]


def test_a_tensor_of_another_size_than_planned_is_refused_and_nothing_is_left(tmp_path):
    files, data, _ = job(tmp_path, 3)
    data[next(iter(data))] += b"x"
    with pytest.raises(OutputError, match="please report this"):
        attempt(files, data)
    assert names(tmp_path) == set()


def test_a_log_whose_holder_has_just_ended_is_no_lock(tmp_path, monkeypatch):
    files, data, _ = job(tmp_path, 3)
    log = tmp_path / "0.gguf.part.log"
    monkeypatch.setattr(fcntl, "flock", lambda *_: log.unlink())
    with pytest.raises(OutputError, match="another llamacli"):
        attempt(files, data)
    assert names(tmp_path) == set()


def test_a_file_system_without_locks_is_written_to_all_the_same(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    files, data, expected = job(tmp_path, 3)
    monkeypatch.setattr(fcntl, "flock", unsupported)
    attempt(files, data)
    assert [file.path.read_bytes() for file in files] == expected


def test_a_file_made_meanwhile_is_not_replaced_unasked(tmp_path):
    files, data, _ = job(tmp_path, 3)
    files[1].path.write_bytes(b"precious")
    with pytest.raises(OutputError, match=r"meanwhile.*6 of 6 tensors are kept in 0\.gguf\.part"):
        attempt(files, data)
    assert files[1].path.read_bytes() == b"precious"
    made = []
    attempt(files, data, made, force=True)
    assert made == []


@pytest.mark.parametrize(
    "error", [OutputError("x"), MemoryError("x"), ValueError("x"), OSError(errno.EROFS, "Read-only file system")]
)
def test_an_error_while_a_tensor_is_made_keeps_those_before(tmp_path, error):
    """It stays the error that it is: one of the maker's is none of the output."""
    files, data, expected = job(tmp_path, 3)
    names_, real = list(data), {}

    def make(name):
        if name == names_[4]:
            raise error
        real[name] = True
        yield memoryview(data[name])

    maker = Maker(make, lambda name: f"note of {name}", lambda name, note: None)
    with pytest.raises(type(error)) as caught:
        write_files(files, "job", maker, False)
    if isinstance(error, (OutputError, MemoryError)):
        assert "4 of 6 tensors are kept in 0.gguf.part, the same command continues there" in str(caught.value)
    else:
        assert str(caught.value) == str(error)
    made = []
    attempt(files, data, made)
    assert made == names_[4:]
    assert [file.path.read_bytes() for file in files] == expected


def test_before_the_first_tensor_is_finished_an_error_leaves_nothing(tmp_path):
    files, _, _ = job(tmp_path, 3)
    maker = Maker(lambda name: iter([memoryview(b"")] * (1 // 0)), str, lambda name, note: None)
    with pytest.raises(ZeroDivisionError):
        write_files(files, "job", maker, False)
    assert names(tmp_path) == set()


def test_another_jobs_work_is_not_lost_by_an_error_before_it_is_replaced(tmp_path, monkeypatch):
    files, data, _ = job(tmp_path, 3)
    with pytest.raises(KeyboardInterrupt):
        attempt(files, data, chunks=6)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="Permission denied"):
        patch.setattr(Path, "unlink", denied)
        write_files(files, "another job", Maker(lambda name: [], str, lambda name, note: None), True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_tensor_whose_source_changed_is_made_again_and_all_after_it(tmp_path):
    """A damaged shard is replaced: what came from the others stays."""
    files, data, expected = job(tmp_path, 3)
    order, versions = list(data), dict.fromkeys(data, "1")

    def run(stop=None):
        made = []

        def make(name):
            made.append(name)
            if name == stop:
                raise ValueError
            yield memoryview(data[name])

        write_files(files, "job", Maker(make, lambda name: "", lambda name, note: None, versions.get), False)
        return made

    with pytest.raises(ValueError):
        run(order[4])
    versions[order[4]] = "2"
    versions[order[1]] = "2"
    assert run() == [*order[1:3], *order[4:]]  # the second file is intact up to its fifth tensor
    assert [file.path.read_bytes() for file in files] == expected


def test_files_are_recognised_where_renaming_changes_their_inode_and_time(tmp_path, monkeypatch):
    """FAT and SMB; killed between two renames."""
    files, data, expected = job(tmp_path, 3)
    real = Path.replace

    def replace(old, new):
        if new == files[1].path:
            raise KeyboardInterrupt
        return real(old, new)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", replace)
        attempt(files, data)
    raw = files[0].path.read_bytes()
    (tmp_path / "copy").write_bytes(raw)
    real(tmp_path / "copy", files[0].path)
    made = []
    attempt(files, data, made)
    assert made == []
    assert [file.path.read_bytes() for file in files] == expected


def test_on_macos_data_reach_the_disk_and_not_only_its_cache(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda fd, command: called.append(command))
    files, data, _ = job(tmp_path, 3)
    attempt(files, data)
    assert called == [51] * 4  # two parts, the log, the folder


def test_a_file_system_without_full_sync_is_synced_as_it_can_be(tmp_path, monkeypatch):
    synced, real = [], os.fsync

    def unsupported(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", unsupported)
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), real(fd)))
    files, data, _ = job(tmp_path, 3)
    attempt(files, data)
    assert len(synced) == 4


@pytest.mark.parametrize("failing", [1, 2])
def test_a_disk_that_fails_while_later_tensors_are_made_is_said_and_the_same_command_goes_on(tmp_path, monkeypatch, failing):
    monkeypatch.setattr(journal, "SYNC", 1)  # each tensor begins to be synced when it is finished
    calls, real = [], os.fsync

    def fsync(fd):
        calls.append(fd)
        if len(calls) == failing:
            raise OSError(errno.EIO, "Input/output error")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    files, data, expected = job(tmp_path, 3)
    with pytest.raises(OutputError, match=r"Input/output error; . of 6 tensors are kept"):
        attempt(files, data)
    assert not any(file.path.exists() for file in files)
    attempt(files, data)
    assert [file.path.read_bytes() for file in files] == expected
