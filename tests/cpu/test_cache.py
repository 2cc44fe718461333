"""Compiled code and the folder that keeps it: what importing does, what a start does."""

import errno
import json
import os
import pwd
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llamacli import environment
from llamacli.cli import inputs, main
from llamacli.cpu import kernels
from llamacli.cpu.kernels.jit import loader
from llamacli.cpu.kernels.jit.intrinsics import compiled
from llamacli.cpu.kernels.ops import vectors

ROOT = Path(__file__).resolve().parent.parent.parent
IMPORTING = """
import importlib.util, json, os, sys
from pathlib import Path

absent = ("llamacli.bench.peer", "llamacli.bench.plot") + (() if importlib.util.find_spec("mlx") else ("llamacli.mlx.",))
before = dict(os.environ)
for source in sorted(Path("llamacli").rglob("*.py")):
    name = ".".join(source.with_suffix("").parts)
    if not name.endswith("__main__") and not name.startswith(absent):
        importlib.import_module(name.removesuffix(".__init__"))
import llvmlite.binding as llvm
from llamacli.cpu.kernels.jit import loader
try:
    llvm.Target.from_default_triple()
    ready = True
except RuntimeError:
    ready = False
print(json.dumps([before == dict(os.environ), ready, loader.chosen_target.cache_info().currsize]))
"""


def test_importing_makes_no_folder_sets_no_variable_and_starts_no_compiler(tmp_path):
    env = {**os.environ, "LLAMACLI_CACHE": str(tmp_path / "kernels"), "LLAMACLI_SIMD": "no such variant"}
    done = subprocess.run([sys.executable, "-c", IMPORTING], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    unchanged, compiler_ready, variants_chosen = json.loads(done.stdout)
    assert unchanged
    assert not compiler_ready
    assert variants_chosen == 0
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def cache_folder(monkeypatch, tmp_path):
    """`cache_folder()` as the first call of a process with LLAMACLI_CACHE below tmp_path; nothing is noted or loaded yet."""
    monkeypatch.setenv("LLAMACLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kernels, "_noted", False)
    monkeypatch.setattr(kernels, "notices", [])
    monkeypatch.setattr(loader, "_libraries", {})
    monkeypatch.setattr(loader, "cache_folder", kernels.cache_folder.__wrapped__)
    monkeypatch.setattr("llamacli.cpu.kernels.jit.compiler.cache_folder", kernels.cache_folder.__wrapped__)
    return kernels.cache_folder.__wrapped__


def load_microkernels():
    return loader.load("fresh", vectors.build(32), vectors.SYMBOLS)


def doubled():
    """A new function that Numba compiles, of the kind that `quantize` has."""

    @compiled()
    def twice(values):
        return 2 * values

    return twice


@pytest.fixture
def read_only(monkeypatch):
    """`read_only()`: from then on nothing can be written or removed, as on a read-only file system, not even by root."""

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def from_now_on():
        for name in ("write_bytes", "unlink", "replace"):
            monkeypatch.setattr(Path, name, refuse)
        for name in ("unlink", "replace"):
            monkeypatch.setattr(os, name, refuse)
        monkeypatch.setattr("tempfile.TemporaryFile", refuse)
        monkeypatch.setattr("tempfile.mkdtemp", refuse)

    return from_now_on


def test_where_no_folder_can_be_made_code_is_compiled_in_memory_with_one_note(cache_folder, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file in the way")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    assert cache_folder() is None
    assert load_microkernels().keys() == set(vectors.SYMBOLS)
    assert doubled()(np.arange(3)).tolist() == [0, 2, 4]
    (notice,) = kernels.notices
    assert f"{tmp_path / 'cache'}: " in notice
    assert "LLAMACLI_CACHE" in notice
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_cache_that_became_read_only_is_used_and_what_it_lacks_is_compiled_in_memory(cache_folder, read_only, monkeypatch):
    load_microkernels()
    (kept,) = cache_folder().glob("*.o")
    monkeypatch.setattr(loader, "_libraries", {})
    read_only()
    assert load_microkernels().keys() == set(vectors.SYMBOLS)
    assert kernels.notices == []
    assert loader.load("another", vectors.build(64), vectors.SYMBOLS).keys() == set(vectors.SYMBOLS)
    assert doubled()(np.arange(3)).tolist() == [0, 2, 4]
    assert list(cache_folder().glob("*.o")) == [kept]
    assert len(kernels.notices) == 1


def test_numba_failing_to_write_a_function_does_not_fail_the_call(cache_folder, monkeypatch):
    """A full disk shows when the code is written, long after the folder was found usable."""
    from numba.core import caching

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(caching.IndexDataCacheFile, "save", full)
    twice = doubled()
    assert twice(np.arange(3)).tolist() == [0, 2, 4]
    assert twice(np.ones(2)).tolist() == [2, 2]
    (notice,) = kernels.notices
    assert "No space left" in notice


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
@pytest.mark.parametrize("left", [0, 30])
def test_a_function_whose_cache_file_is_cut_is_compiled_again(cache_folder, kind, left):
    assert doubled()(np.arange(3)).tolist() == [0, 2, 4]
    (file,) = cache_folder().rglob(f"*.{kind}")
    whole = file.stat().st_size
    os.truncate(file, left)
    assert doubled()(np.arange(3)).tolist() == [0, 2, 4]
    assert doubled()(np.arange(3)).tolist() == [0, 2, 4]  # as the next process
    assert file.stat().st_size > whole // 2
    assert kernels.notices == []


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_folder_that_others_can_write_to_is_not_trusted(cache_folder, mode):
    folder = cache_folder()
    folder.chmod(mode)
    assert cache_folder() is None
    assert "chmod go-w" in kernels.notices[0]


@pytest.mark.parametrize(("mode", "trusted"), [(0o775, False), (0o777, False), (0o1777, True), (0o755, True)])
def test_a_folder_is_trusted_only_if_others_cannot_replace_it_in_its_parent(cache_folder, mode, trusted):
    cache_folder().parent.chmod(mode)
    assert (cache_folder() is not None) == trusted


def test_a_folder_of_another_user_is_not_trusted(cache_folder, monkeypatch):
    cache_folder()
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert (cache_folder() is None) == (owner != 0)  # what root made, everyone may use
    stat = Path.stat
    someone = lambda path, **more: os.stat_result((*stat(path, **more)[:4], 54321, *stat(path, **more)[5:10]))
    monkeypatch.setattr(Path, "stat", someone)
    assert cache_folder() is None
    assert "another user" in kernels.notices[0]


def test_a_new_folder_is_the_users_alone_whatever_the_umask(cache_folder):
    before = os.umask(0)
    try:
        folder = cache_folder()
    finally:
        os.umask(before)
    assert folder is not None
    assert [path.stat().st_mode & 0o777 for path in (folder, folder.parent)] == [0o700, 0o700]


def test_a_user_without_home_and_name_has_folders_that_are_the_same_at_each_start(cache_folder, monkeypatch, tmp_path):
    def unknown(_):
        raise KeyError

    for name in ("HOME", "LLAMACLI_CACHE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    own = tmp_path / f"llamacli-{os.getuid()}"
    assert cache_folder() == cache_folder()
    files = environment.config_file(), environment.conversations_file(), environment.model_folders()[1], cache_folder()
    assert all(path.is_relative_to(own) for path in files)
    own.chmod(0o777)
    assert cache_folder() is not None  # the folder below is what counts, and it is still ours


def test_code_of_another_version_is_not_used(tmp_path, monkeypatch):
    """Some installations have no sources: bytecode alone, or an archive, where nothing can be read but the version."""
    source, found = tmp_path / "a" / "kernel.py", []
    source.parent.mkdir()
    for name, text in (("kernel.py", b"1"), ("kernel.py", b"2"), ("kernel.pyc", b"3"), ("kernel.pyc", b"4")):
        for other in source.parent.iterdir():
            other.unlink()
        source.with_name(name).write_bytes(text)
        found.append(kernels.sources_digest(tmp_path))
    found.append(kernels.sources_digest(tmp_path / "nothing"))
    monkeypatch.setattr(kernels, "__version__", "another")
    found.append(kernels.sources_digest(tmp_path / "nothing"))
    assert len(set(found)) == len(found)


def test_the_note_is_shown_once_and_warmup_ends_with_an_error(cache_folder, capfd, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file in the way")
    monkeypatch.setattr(kernels, "cache_folder", cache_folder)
    assert main(["warmup"]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    kernels.notices.append("compiled kernels are not kept")
    said = []
    console = type("", (), {"note": staticmethod(said.append)})
    inputs.show_kernel_notices(console)
    inputs.show_kernel_notices(console)
    assert said == ["compiled kernels are not kept"]


def test_folders_of_other_versions_are_removed_but_the_newest(cache_folder, tmp_path):
    current, root = cache_folder(), tmp_path / "cache"
    names = [f"kernels-{n:016x}" for n in range(8)]
    others = ["kernels-0123", "kernels-0123456789abcdef.gguf", "conversations"]
    now = time.time()
    for days, name in enumerate([*names, *others]):
        (root / name).mkdir()
        (root / name / "matmul.o").write_bytes(b"code")
        os.utime(root / name, (now - 1e5 * days, now - 1e5 * days))
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (root / "kernels-ffffffffffffffff").symlink_to(outside)
    os.utime(current, (0, 0))
    assert cache_folder() == current
    assert {path.name for path in root.iterdir()} == {current.name, *names[:3], *others, "kernels-ffffffffffffffff"}
    assert current.stat().st_mtime > now - 60


def test_folders_used_today_stay_for_processes_that_still_run(cache_folder, tmp_path):
    cache_folder()
    for n in range(8):
        (tmp_path / "cache" / f"kernels-{n:016x}").mkdir()
    cache_folder()
    assert len(list((tmp_path / "cache").iterdir())) == 9


FIRST_START = """
import sys
from llamacli.cpu.kernels.jit.loader import load
from llamacli.cpu.kernels.ops import vectors
sys.stdin.read(1)
load("fresh", vectors.build(32), vectors.SYMBOLS)
"""


def test_two_first_starts_at_once_leave_one_whole_file(tmp_path):
    env = {**os.environ, "LLAMACLI_CACHE": str(tmp_path / "cache")}
    started = [subprocess.Popen([sys.executable, "-c", FIRST_START], cwd=ROOT, env=env, stdin=subprocess.PIPE) for _ in "12"]
    for process in started:
        process.stdin.close()
    assert [process.wait(300) for process in started] == [0, 0]
    (folder,) = (tmp_path / "cache").iterdir()
    (file,) = folder.iterdir()
    assert loader._read(file) is not None
