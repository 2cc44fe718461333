"""Writing a conversion's files, with tensors of random bytes: after damage, cuts and failures the files are complete."""

import contextlib
import errno
import fcntl
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from conversions import names
from hypothesis import given, settings
from hypothesis import strategies as st

from llamacli.errors import OutputError
from quantize import journal
from quantize.journal import MAGIC, File, Maker, write_files


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
def test_after_damage_at_any_place_the_files_are_complete(seed, chunks, damaged, place):
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
    """The maker's error is passed on unchanged, not reported as one of the output."""
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
def test_a_disk_that_fails_while_later_tensors_are_made_is_reported_and_the_command_can_continue(
    tmp_path, monkeypatch, failing
):
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
