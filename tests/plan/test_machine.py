"""What the machine has: cgroups of both kinds from a made-up /proc and /sys, this process's own memory, the disk."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from llamacli.plan import machine
from llamacli.plan.machine import budget, disk_read_speed, memory_free, memory_short, resident


@pytest.fixture
def linux(tmp_path, monkeypatch):
    """write(path, text) into the root of a machine that has 24,000,000 kB available."""
    monkeypatch.setattr(sys, "platform", "linux")

    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(str(text))

    write("proc/meminfo", "MemTotal:       32000000 kB\nMemFree: 1 kB\nMemAvailable:   24000000 kB\n")
    return write


def group(write, folder, most, held, active=0, inactive=0, v1=False):
    """A memory cgroup; `active` and `inactive` are pages of files in it."""
    kind = "total_" if v1 else ""
    write(f"{folder}/memory.limit_in_bytes" if v1 else f"{folder}/memory.max", most)
    write(f"{folder}/memory.usage_in_bytes" if v1 else f"{folder}/memory.current", held)
    write(f"{folder}/memory.stat", f"anon 7\n{kind}inactive_file {inactive}\n{kind}active_file {active}\nunevictable 5\n")


def test_without_a_cgroup_it_is_what_the_machine_has_available(linux, tmp_path):
    assert memory_free(tmp_path) == 24_000_000 * 1024


def test_a_cgroup_of_version_2_leaves_its_limit_less_what_it_holds_files_not_counted(linux, tmp_path):
    linux("proc/self/cgroup", "0::/user/job\n")
    group(linux, "sys/fs/cgroup/user/job", 2_500_000_000, 2_000_000_000, active=300_000_000, inactive=900_000_000)
    assert memory_free(tmp_path) == 1_700_000_000


def test_a_cgroup_of_version_1_leaves_its_limit_less_what_it_holds(linux, tmp_path):
    linux("proc/self/cgroup", "5:cpu:/\n4:memory:/job\n0::/\n")
    group(linux, "sys/fs/cgroup/memory/job", 2_500_000_000, 2_000_000_000, active=100_000_000, v1=True)
    assert memory_free(tmp_path) == 600_000_000


@pytest.mark.parametrize("outer, inner", [(1_000, 9_000), (9_000, 1_000)])
def test_of_nested_limits_the_tightest_counts(linux, tmp_path, outer, inner):
    linux("proc/self/cgroup", "0::/a/b/c\n")
    group(linux, "sys/fs/cgroup/a", outer, 100)
    group(linux, "sys/fs/cgroup/a/b", "max", 100)
    group(linux, "sys/fs/cgroup/a/b/c", inner, 100)
    assert memory_free(tmp_path) == 900


def test_a_limit_at_which_the_kernel_slows_a_group_down_counts_as_one(linux, tmp_path):
    linux("proc/self/cgroup", "0::/a\n")
    group(linux, "sys/fs/cgroup/a", "max", 100)
    linux("sys/fs/cgroup/a/memory.high", 700)
    assert memory_free(tmp_path) == 600


def test_in_a_container_whose_path_only_the_host_sees_the_top_counts(linux, tmp_path):
    linux("proc/self/cgroup", "0::/docker/0123\n")
    group(linux, "sys/fs/cgroup", 5_000, 1_000)
    assert memory_free(tmp_path) == 4_000


@pytest.mark.parametrize("held", [1_000, 2_000])
def test_a_full_group_leaves_nothing(linux, tmp_path, held):
    linux("proc/self/cgroup", "0::/a\n")
    group(linux, "sys/fs/cgroup/a", 1_000, held)
    assert memory_free(tmp_path) == 0


def test_short_is_what_a_lowered_limit_no_longer_allows(linux, tmp_path):
    assert memory_short(tmp_path) == 0
    linux("proc/self/cgroup", "0::/a\n")
    group(linux, "sys/fs/cgroup/a", "max", 2_000, active=300)
    assert memory_short(tmp_path) == 0
    linux("sys/fs/cgroup/a/memory.high", 1_500)
    assert memory_short(tmp_path) == 200
    linux("sys/fs/cgroup/a/memory.high", 1_700)
    assert memory_short(tmp_path) == 0


def test_files_without_sense_are_ignored(linux, tmp_path):
    linux("proc/self/cgroup", "\nx\n0::/a\n")
    group(linux, "sys/fs/cgroup/a", "a lot", "some")
    assert memory_free(tmp_path) == 24_000_000 * 1024


@pytest.mark.parametrize(
    ("more", "pages"),
    [
        ("", 135),
        ("File-backed pages:    20.\nAnonymous pages:    9000.\n", 121),
        ("File-backed pages:    4000.\nAnonymous pages:    9000.\n", 135),
    ],
)
def test_macos_counts_pages_that_are_free_or_can_be_read_again(more, pages, monkeypatch, tmp_path):
    """Inactive pages that belong to no file are other programs' memory: 14 of 34 in the second case."""
    told = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\nPages free:    100.\nPages active:    5000.\n"
        "Pages inactive:   30.\nPages speculative:   4.\nPages wired down:   7000.\nPages purgeable:   1.\n"
    )
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=told + more))
    assert memory_free(tmp_path) == pages * 16384


@pytest.mark.parametrize("ps", [None, "", "error"])
def test_where_neither_proc_nor_ps_answers_resident_memory_is_unknown_not_an_error(ps, monkeypatch, tmp_path):
    def run(*_, **__):
        if ps is None:
            raise FileNotFoundError("ps")
        return SimpleNamespace(stdout=ps)

    monkeypatch.setattr(machine.subprocess, "run", run)
    assert resident(tmp_path) == 0


def test_the_budget_leaves_a_twentieth_to_others_and_two_gigabytes_at_most(monkeypatch):
    for free, left in ((10_000, 9_500), (100 << 30, 98 << 30)):
        monkeypatch.setattr(machine, "memory_free", lambda free=free: free)
        assert budget() == left


def grown(code, *args):
    """How much `resident` grows by `code`, in a process where nothing else comes or goes: here, memory and threads of earlier
    tests may be given back in between.
    """
    code = f"import sys, numpy as np\nfrom llamacli.plan.machine import resident\nbefore = resident()\n{code}\n"
    return int(subprocess.run([sys.executable, "-c", code + "print(resident() - before)", *args], capture_output=True).stdout)


def test_resident_memory_grows_with_what_is_touched():
    """Half of it would do: the system's count may lag behind by some pages for each of many cores."""
    assert grown("held = np.ones(64 << 20, np.uint8)") > 32 << 20
    assert grown("held = np.empty(64 << 20, np.uint8)") < 32 << 20


def test_resident_memory_counts_the_touched_pages_of_a_mapped_file(tmp_path):
    (tmp_path / "file").write_bytes(bytes(64 << 20))
    assert grown("np.memmap(sys.argv[1], np.uint8, 'r')[::4096].sum()", tmp_path / "file") <= 32 << 20
    assert grown("held = np.memmap(sys.argv[1], np.uint8, 'r'); held[::4096].sum()", tmp_path / "file") > 32 << 20


def test_unknown_memory_is_not_shown_as_zero(monkeypatch):
    assert machine.resident_words().endswith(" GB resident")
    monkeypatch.setattr(machine, "resident", lambda: 0)
    assert machine.resident_words() == "resident memory unknown here"


def test_the_disk_is_measured_on_a_file_of_some_pieces_and_within_the_time(tmp_path):
    (tmp_path / "file").write_bytes(np.random.default_rng(0).bytes(32 << 20))
    speed = disk_read_speed(tmp_path / "file", 0.05)
    assert speed is None or 1e6 < speed < 1e12  # None: a file system without direct reads


def test_a_file_that_is_small_or_missing_gives_no_speed_of_the_disk(tmp_path):
    (tmp_path / "small").write_bytes(bytes(8 << 20))
    assert disk_read_speed(tmp_path / "small") is None
    assert disk_read_speed(tmp_path / "missing") is None


def test_the_peak_is_this_process_s_own_not_that_of_the_one_which_started_it():
    """getrusage of a process that was started by another counts what the other held."""
    held = np.ones(60 << 20)
    code = "from llamacli.plan.machine import resident_peak as f\na = f()\nx = b'x' * (200 << 20)\nprint(a, f())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, found.stdout.split())
    assert before < held.nbytes / 2 and 200 << 20 < after - before < 210 << 20
