"""Which features the processor is found to have, on machines that we do not have."""

import sys
from types import SimpleNamespace

import pytest

from llamacli.cpu.kernels.jit import features as cpu
from llamacli.cpu.kernels.jit import loader
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
    monkeypatch.setattr(cpu, "sysctl", lambda name: numbers.get(name, 0))
    return numbers


MAC, LINUX = "arm64-apple-darwin24.0.0", "aarch64-unknown-linux-gnu"


@pytest.mark.parametrize(("i8mm", "best"), [(0, "dotprod"), (1, "i8mm")])
def test_macos_is_asked_since_llvm_reports_nothing(i8mm, best, machine, sysctl):
    machine("darwin", MAC, {})
    sysctl |= {"hw.optional.arm.FEAT_DotProd": 1, "hw.optional.arm.FEAT_I8MM": i8mm}
    assert targets(MAC, "apple-m2", cpu.features())[0].name == best


@pytest.mark.parametrize(
    ("hwcap", "hwcap2", "best"), [(0, 1 << 9, "plain"), (1 << 20, 0, "dotprod"), (1 << 20, 1 << 13, "i8mm")]
)
def test_linux_on_arm_is_asked_since_llvm_does_not_report_all(hwcap, hwcap2, best, machine, monkeypatch):
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


def test_on_x86_the_features_are_those_of_llvm(machine):
    machine("linux", "x86_64-unknown-linux-gnu", {"avx2": True, "fma": False})
    assert cpu.features() == {"avx2": True, "fma": False}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux's libc")
def test_linux_tells_an_entry_of_the_auxiliary_vector():
    page_size = 6  # AT_PAGESZ
    assert cpu._auxval(page_size) in (4096, 16384, 65536)


@pytest.mark.parametrize(
    ("platform", "translated", "name", "said"),
    [
        ("linux", 0, "avx2", None),
        ("linux", 0, "plain", "AVX2"),
        ("darwin", 0, "plain", "AVX2"),
        ("darwin", 1, "plain", "install Python for arm64"),
    ],
)
def test_the_slow_variant_is_reported_with_what_to_do(platform, translated, name, said, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(loader, "sysctl", {"sysctl.proc_translated": translated}.get)
    monkeypatch.setattr(loader, "chosen_target", lambda: SimpleNamespace(name=name))
    found = loader.slow_variant()
    assert found is None if said is None else said in found
