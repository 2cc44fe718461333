"""What a Mac would load: every module as a Mach-O object, linked by this machine's own JIT linker, which takes the format from
the object. Relocations, stubs, unwind tables and names are checked by the code that a Mac uses; nothing is run.
"""

import re

import llvmlite.binding as llvm
import pytest

import llamacli.engine  # noqa: F401  declares the drivers
from llamacli.bench import limits
from llamacli.cpu.kernels.formats import dots, floats, layout
from llamacli.cpu.kernels.jit import loader
from llamacli.cpu.kernels.jit.intrinsics import KERNELS
from llamacli.cpu.kernels.ops import vectors
from llamacli.cpu.kernels.runtime import faults

X86 = {name: True for name in ("avx2", "fma", "f16c", "sse4.2", "popcnt", "bmi", "bmi2", "lzcnt")} | {"avx512f": False}
TARGETS = {
    "m4": ("arm64-apple-macosx14.0.0", "apple-m4", {"neon": True, "sve": False, "dotprod": True, "i8mm": True}),
    "m1": ("arm64-apple-macosx14.0.0", "apple-m1", {"neon": True, "sve": False, "dotprod": True, "i8mm": False}),
    "intel": ("x86_64-apple-macosx13.0.0", "haswell", X86),
}
# all that the modules take from a Mac's libSystem; the linker gets addresses that are never called
SYSTEM = {"mmap", "signal", "bzero", "__bzero", "memset", "memcpy", "memmove", "expf", "log", "__sincos_stret"}


def modules():
    """Every module of microkernels, with its symbols."""
    yield "faults", faults.build, ("rescue", "state")
    yield "limits", limits.build, limits.SYMBOLS
    yield "vectors-128", vectors.build(128), vectors.SYMBOLS
    for name in layout.QUANTIZED:
        yield name, lambda target, name=name: dots.quantized(name, target), dots.SYMBOLS
    for name in layout.FLOATS:
        yield name, lambda target, name=name: floats.floats(name, target), floats.SYMBOLS


def driver(kernel):
    """A driver's module without what Numba says of this machine's CPU."""
    text = kernel._ir(loader.chosen_target())
    return re.sub(r'target datalayout = "[^"]*"\n', "", re.sub(r'"target-(cpu|features)"="[^"]*"', "", text))


def undefined(target, build):
    """The names that an object takes from elsewhere, and the object."""
    module = loader.optimized(build, target)
    names = {f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")}
    return names, loader.machine(target).emit_object(module)


def link(tag, code, symbols):
    builder = llvm.JITLibraryBuilder().add_object_img(code)
    for number, name in enumerate(sorted(SYSTEM)):
        builder.import_symbol("_" + name, 0x7F00_0000_0000 + 4096 * number)
    for symbol in symbols:
        builder.export_symbol("_" + symbol)
    return builder.link(loader._compiler(), tag)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_every_module_links_as_a_mac_would_link_it(name):
    triple, cpu, features = TARGETS[name]
    target, kept = loader.targets(triple, cpu, features)[0], []
    for module, build, symbols in modules():
        names, code = undefined(target, build)
        assert code[:4] == bytes.fromhex("cffaedfe"), "expected a 64-bit Mach-O object"
        assert names <= SYSTEM, module
        kept.append(link(f"{name}-{module}", code, symbols))
    assert all(kept)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_every_driver_links_for_an_intel_mac(kernel):
    """Numba writes drivers for this machine's architecture; on an Intel Mac they differ in the object format alone."""
    if not loader.chosen_target().triple.startswith("x86_64"):
        pytest.skip("drivers are written for this machine, which is no x86")
    target = loader.targets(*TARGETS["intel"])[0]
    _, code = undefined(target, lambda _: driver(kernel))
    assert link(f"mac-{kernel.function.__module__}-{kernel.__name__}", code, [kernel.__name__])
