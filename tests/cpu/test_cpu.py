"""What the processor is said to be able to do, and how many of its cores are used, on machines that we do not have."""

import sys

import pytest

from llamacli.cpu.kernels.jit import features as cpu
from llamacli.cpu.kernels.jit.loader import targets


@pytest.fixture
def machine(monkeypatch):
    """`machine(platform, triple, what LLVM says of its features)`."""

    def be(platform, triple, features):
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setattr(cpu.llvm, "get_process_triple", lambda: triple)
        monkeypatch.setattr(cpu.llvm, "get_host_cpu_features", lambda: features)

    return be


@pytest.fixture
def sysctl(monkeypatch):
    """macOS's numbers by name."""
    numbers = {}
    monkeypatch.setattr(cpu, "_sysctl", lambda name: numbers.get(name, 0))
    return numbers


@pytest.fixture
def cores(monkeypatch, tmp_path):
    """`cores(capacities, allowed)`; a capacity None is one that Linux does not know."""

    def have(capacities, allowed=None):
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(cpu, "CORES", tmp_path)
        for core, capacity in enumerate(capacities):
            (tmp_path / f"cpu{core}").mkdir()
            if capacity is not None:
                (tmp_path / f"cpu{core}" / "cpu_capacity").write_text(f"{capacity}\n")
        allowed = set(range(len(capacities))) if allowed is None else allowed
        monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda pid: allowed, raising=False)

    return have


MAC, LINUX = "arm64-apple-darwin24.0.0", "aarch64-unknown-linux-gnu"


@pytest.mark.parametrize(("i8mm", "best"), [(0, "dotprod"), (1, "i8mm")])
def test_a_mac_is_asked_since_llvm_says_nothing(i8mm, best, machine, sysctl):
    machine("darwin", MAC, {})
    sysctl |= {"hw.optional.arm.FEAT_DotProd": 1, "hw.optional.arm.FEAT_I8MM": i8mm}
    assert targets(MAC, "apple-m2", cpu.features())[0].name == best


@pytest.mark.parametrize(
    ("hwcap", "hwcap2", "best"), [(0, 1 << 9, "plain"), (1 << 20, 0, "dotprod"), (1 << 20, 1 << 13, "i8mm")]
)
def test_linux_on_arm_is_asked_since_llvm_does_not_say_all(hwcap, hwcap2, best, machine, monkeypatch):
    machine("linux", LINUX, {"neon": True, "lse": True})
    monkeypatch.setattr(cpu, "_auxval", {cpu.AT_HWCAP: hwcap, cpu.AT_HWCAP2: hwcap2}.get)
    assert targets(LINUX, "neoverse-n1", cpu.features())[0].name == best


@pytest.mark.parametrize("said", [{}, {"sve": True, "sve2": True}])
def test_code_for_arm_never_uses_sve(said, machine, monkeypatch):
    """A CPU's name implies it, but a virtual machine may hide it."""
    machine("linux", LINUX, said)
    monkeypatch.setattr(cpu, "_auxval", lambda kind: -1)
    flags = targets(LINUX, "neoverse-v1", cpu.features())[0].features.split(",")
    assert {"-sve", "+i8mm", "+dotprod"} <= set(flags)
    assert not any(flag.startswith("+sve") for flag in flags)


def test_on_x86_llvm_is_believed(machine):
    machine("linux", "x86_64-unknown-linux-gnu", {"avx2": True, "fma": False})
    assert cpu.features() == {"avx2": True, "fma": False}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux's libc")
def test_the_kernel_answers():
    page_size = 6  # AT_PAGESZ
    assert cpu._auxval(page_size) in (4096, 16384, 65536)


def test_a_mac_works_on_its_performance_cores(sysctl, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    sysctl |= {"hw.perflevel0.physicalcpu": 4, "hw.physicalcpu": 10}
    assert cpu.default_threads() == 4
    del sysctl["hw.perflevel0.physicalcpu"]  # an Intel one, or one before macOS 12
    assert cpu.default_threads() == 10


@pytest.mark.parametrize(
    ("capacities", "threads"),
    [
        ([None] * 8, 8),
        ([1024] * 4, 4),
        ([446, 446, 446, 446, 1024, 1024, 1024, 1024], 4),
        ([250, 250, 250, 250, 870, 870, 870, 1024], 4),
    ],
)
def test_linux_works_on_the_fast_cores(capacities, threads, cores):
    cores(capacities)
    assert cpu.default_threads() == threads


@pytest.mark.parametrize(("allowed", "threads"), [({0, 1, 2}, 1), ({0, 1}, 2)])
def test_only_cores_that_this_process_may_use_count(allowed, threads, cores):
    cores([446, 446, 1024, 1024], allowed)
    assert cpu.default_threads() == threads
