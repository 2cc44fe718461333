"""How many threads are used, on machines made of files: cores of several kinds, hardware threads, quotas of cgroups, macOS."""

import ctypes
import os
import sys

import pytest

from llamacli.cpu.kernels import cores
from llamacli.cpu.kernels.cores import default_threads, usable_cpus


@pytest.fixture
def linux(monkeypatch, tmp_path):
    """`linux(cpus, capacities=..., siblings=..., fast=..., allowed=...)`; capacity None: one that Linux does not know."""

    def have(n, *, capacities=(), siblings=(), fast=None, allowed=None):
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(n)) if allowed is None else allowed, raising=False)
        for cpu in range(n):
            folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}"
            (folder / "topology").mkdir(parents=True)
            if capacities:
                (folder / "cpu_capacity").write_text(f"{capacities[cpu]}\n")
            if siblings:
                (folder / "topology/thread_siblings_list").write_text(f"{siblings[cpu]}\n")
        if fast:
            (tmp_path / "sys/devices/cpu_core").mkdir(parents=True)
            (tmp_path / "sys/devices/cpu_core/cpus").write_text(f"{fast}\n")
        return tmp_path

    return have


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


@pytest.mark.parametrize(
    ("capacities", "threads"),
    [
        ([], 8),
        ([1024] * 8, 8),
        ([446, 446, 446, 446, 1024, 1024, 1024, 1024], 4),
        ([250, 250, 250, 250, 870, 870, 870, 1024], 4),
    ],
)
def test_linux_works_on_the_fast_cores(capacities, threads, linux):
    assert default_threads(linux(8, capacities=capacities)) == threads


@pytest.mark.parametrize(("allowed", "threads"), [({0, 1, 2}, 1), ({0, 1}, 2)])
def test_only_cores_that_this_process_may_use_count(allowed, threads, linux):
    assert default_threads(linux(4, capacities=[446, 446, 1024, 1024], allowed=allowed)) == threads


@pytest.mark.parametrize(
    ("siblings", "allowed", "threads"),
    [
        (["0,4", "1,5", "2,6", "3,7"] * 2, None, 4),
        (["0-1", "0-1", "2-3", "2-3"], None, 2),
        (["0-1", "0-1", "2-3", "2-3"], {0, 2, 3}, 2),
        (["0-1", "0-1", "2-3", "2-3"], {1}, 1),
        (["0", "1"], None, 2),
    ],
)
def test_hardware_threads_of_one_core_count_once(siblings, allowed, threads, linux):
    assert default_threads(linux(len(siblings), siblings=siblings, allowed=allowed)) == threads


def test_of_a_hybrid_x86_the_performance_cores_count(linux):
    """Two with two hardware threads each, four for efficiency."""
    assert default_threads(linux(8, siblings=["0-1", "0-1", "2-3", "2-3", *"4567"], fast="0-3")) == 2


def test_a_process_that_is_bound_to_efficiency_cores_uses_those(linux):
    assert default_threads(linux(8, siblings=["0-1", "0-1", "2-3", "2-3", *"4567"], fast="0-3", allowed={5, 6, 7})) == 3


@pytest.mark.parametrize(
    ("inner", "outer", "threads"),
    [
        ("max 100000", "max 100000", 8),
        ("200000 100000", "max 100000", 2),
        ("max 100000", "250000 100000", 3),
        ("400000 100000", "50000 50000", 1),
        ("1000 100000", "max 100000", 1),
        ("1600000 100000", "nonsense", 8),
    ],
)
def test_a_quota_of_a_cgroup_is_the_limit_rounded_up_wherever_it_is_set(inner, outer, threads, linux):
    root = linux(8)
    write(root / "proc/self/cgroup", "0::/pod/job")
    write(root / "sys/fs/cgroup/pod/job/cpu.max", inner)
    write(root / "sys/fs/cgroup/pod/cpu.max", outer)
    assert default_threads(root) == threads
    assert usable_cpus(root) == threads


@pytest.mark.parametrize(("quota", "threads"), [(-1, 8), (150_000, 2), (100_000, 1)])
def test_a_quota_of_a_cgroup_of_version_1_is_a_limit_too(quota, threads, linux):
    root = linux(8)
    write(root / "proc/self/cgroup", "7:memory:/job\n4:cpu,cpuacct:/job\n0::/")
    write(root / "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us", quota)
    write(root / "sys/fs/cgroup/cpu/job/cpu.cfs_period_us", 100_000)
    assert default_threads(root) == threads


def test_in_a_container_whose_path_only_the_host_sees_the_quota_at_the_top_counts(linux):
    root = linux(64)
    write(root / "proc/self/cgroup", "0::/docker/0123")
    write(root / "sys/fs/cgroup/cpu.max", "200000 100000")
    assert default_threads(root) == 2


def test_conversion_uses_hardware_threads_and_slow_cores_too(linux):
    assert usable_cpus(linux(4, siblings=["0-1", "0-1", "2", "3"], fast="0-1")) == 4


def test_a_system_that_reports_nothing_has_as_many_cores_as_python_finds(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "freebsd")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert default_threads(tmp_path) == 6


@pytest.fixture
def mac(monkeypatch):
    """macOS that answers sysctl from the dictionary that the test receives."""
    told = {}

    def sysctl(name, value):
        if name in told:
            value.value = told[name].encode() if isinstance(value, ctypes.Array) else told[name]
        return name in told

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(cores, "_sysctl", sysctl)
    return told


@pytest.mark.parametrize(
    ("levels", "threads"),
    [
        ([("Performance", 4), ("Efficiency", 6)], 4),
        ([("Super", 6), ("Performance", 12)], 18),
        ([("Super", 4), ("Performance", 2), ("Efficiency", 6)], 6),
        ([("Performance", 12)], 12),
    ],
)
def test_a_mac_works_on_all_cores_but_those_for_efficiency(levels, threads, mac, tmp_path):
    mac["hw.nperflevels"] = len(levels)
    for k, (name, n) in enumerate(levels):
        mac |= {f"hw.perflevel{k}.name": name, f"hw.perflevel{k}.physicalcpu": n}
    assert default_threads(tmp_path) == threads


def test_before_macos_12_levels_have_no_names_or_do_not_exist(mac, tmp_path):
    mac |= {"hw.nperflevels": 2, "hw.perflevel0.physicalcpu": 4, "hw.perflevel1.physicalcpu": 4, "hw.physicalcpu": 8}
    assert default_threads(tmp_path) == 4
    del mac["hw.nperflevels"], mac["hw.perflevel0.physicalcpu"]
    assert default_threads(tmp_path) == 8
