"""From LLVM IR to callable addresses: choose the CPU's variant, compile, keep the object code on disk, load it.

In: a name and a function that builds a module, with `simd.Simd` for microkernels, with compiler.py for drivers. Out: `{symbol:
address}`. Drivers call microkernels with `intrinsics.call(address, (a, b, ...))`, every argument an int64.
"""

import contextlib
import os
import sys
import threading
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import llvmlite
import llvmlite.binding as llvm

from llamacli.cpu.kernels import cache_folder, not_kept
from llamacli.cpu.kernels.cores import sysctl
from llamacli.cpu.kernels.jit.features import features
from llamacli.errors import UsageError


class Target(NamedTuple):
    """One way to compile the microkernels."""

    name: str
    triple: str
    cpu: str
    features: str
    width: int  # bytes of a vector register as the microkernels see it: 64 or 32
    dot: str  # instruction family of Simd.dot4: vnni, maddubs, usdot, sdot or plain
    half: bool  # the CPU converts between half and float itself
    tile: int  # tokens whose accumulators fit the registers of one tile
    tile_vectors: int  # registers of weight rows of one tile

    @property
    def lanes(self) -> int:
        """float32 or int32 lanes of a vector."""
        return self.width // 4

    @property
    def neon(self) -> bool:
        """The CPU is an ARM one: a register has 16 bytes, and there are 32."""
        return self.triple.startswith(("aarch64", "arm64"))

    @property
    def step(self) -> int:
        """Bytes of each row that one instruction of a tile multiplies: 8 where it multiplies small matrices, else 4."""
        return 8 if self.dot == "usdot" else 4


def targets(triple: str, cpu: str, features: dict[str, bool]) -> list[Target]:
    """Every variant that this CPU can run, best first."""
    has = {name for name, on in features.items() if on}
    flags = ",".join(("+" if on else "-") + name for name, on in sorted(features.items()))
    found = []
    if triple.startswith(("x86_64", "i686")):
        avx512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= has
        if avx512 and "avx512vnni" in has:
            found.append(Target("avx512vnni", triple, cpu, flags, 64, "vnni", True, 6, 2))
        if avx512:
            found.append(Target("avx512", triple, "skylake-avx512", "", 64, "maddubs", True, 6, 2))
        if {"avxvnni", "avx2", "fma", "f16c"} <= has and not avx512:  # where both are, AVX-512's registers are twice as wide
            found.append(Target("avxvnni", triple, cpu, flags, 32, "vnni", True, 4, 2))
        if {"avx2", "fma", "f16c"} <= has:
            found.append(Target("avx2", triple, "haswell", "", 32, "maddubs", True, 4, 2))
        found.append(Target("plain", triple, "x86-64", "", 32, "plain", False, 4, 1))
    elif triple.startswith(("aarch64", "arm64")):
        if "i8mm" in has:
            found.append(Target("i8mm", triple, cpu, flags, 32, "usdot", True, 4, 1))
        if "dotprod" in has:
            found.append(Target("dotprod", triple, cpu, flags, 32, "sdot", True, 4, 1))
        found.append(Target("plain", triple, "generic", "", 32, "plain", True, 4, 1))
    else:
        found.append(Target("plain", triple, "generic", "", 32, "plain", False, 4, 1))
    return found


def host_targets() -> list[Target]:
    """The variants this machine can run, best first."""
    return targets(llvm.get_process_triple(), llvm.get_host_cpu_name(), features())


@cache
def chosen_target() -> Target:
    """The variant that this process uses: the best, or the one that LLAMACLI_SIMD names (for tests and comparisons)."""
    found = {target.name: target for target in host_targets()}
    wanted = os.environ.get("LLAMACLI_SIMD") or next(iter(found))
    if wanted not in found:
        raise UsageError(f"LLAMACLI_SIMD: expected one of {', '.join(found)} on this machine, found {wanted}")
    return found[wanted]


def slow_variant() -> str | None:
    """A line for the user where the chosen variant is the plain one, which is several times slower; else None."""
    if chosen_target().name != "plain":
        return None
    if sys.platform == "darwin" and sysctl("sysctl.proc_translated") == 1:
        return "this Python runs under Rosetta, where only plain kernels work, which are slow; install Python for arm64"
    return "plain kernels are used, which are slow: x86 has fast ones for AVX2, FMA and F16C or newer, ARM for dot products"


_DIGEST = 16  # bytes of checksum at the head of a cache file
_libraries: dict[str, object] = {}  # code stays loaded as long as its tracker lives
_loading = threading.Lock()  # a second copy of a library would unload the first, whose code a thread may be running


@cache
def _initialize_llvm() -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()


def machine(target: Target):
    """The code generator for `target`."""
    _initialize_llvm()
    return llvm.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu, features=target.features, opt=3, reloc="pic", codemodel="small"
    )


def optimized(build, target: Target):
    """`build(target)`, an ir.Module or its text, parsed, verified and run through LLVM's passes; no automatic vectorizing,
    since the IR is vectorized.
    """
    generator = machine(target)  # first: it sets LLVM up
    parsed = llvm.parse_assembly(str(build(target)))
    parsed.triple = target.triple
    parsed.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    builder = llvm.create_pass_builder(generator, options)
    builder.getModulePassManager().run(parsed, builder)
    return parsed


def assembly(build, target: Target) -> str:
    """The assembly text of a module, for reading and for tests of targets that this machine cannot run."""
    return machine(target).emit_assembly(optimized(build, target))


def load(name: str, build, symbols, target: Target | None = None) -> dict[str, int]:
    """Addresses of `symbols` in the module that `build(target)` makes; compiled once, then read from the cache folder.

    `target` is the chosen one if it is not given.
    """
    target = target or chosen_target()
    version = f"llvm{'.'.join(map(str, llvm.llvm_version_info))}-{llvmlite.__version__}"
    tag = f"{name}-{target.name}-{target.cpu}-{crc32(f'{target.triple} {target.features}'.encode()):08x}-{version}"
    with _loading:
        if tag not in _libraries:
            folder = cache_folder()
            code = _read(folder / f"{tag}.o") if folder else None
            if code is None:
                code = machine(target).emit_object(optimized(build, target))
                if folder:
                    _keep(folder / f"{tag}.o", code)
            _libraries[tag] = _link(tag, code, symbols)
    return {symbol: _libraries[tag][symbol] for symbol in symbols}


def _read(path: Path) -> bytes | None:
    """The object code in a cache file, or None if there is none or it is not what was written: damaged code must not run."""
    try:
        raw = path.read_bytes()
    except OSError:
        return None
    digest, code = raw[:_DIGEST], raw[_DIGEST:]
    return code if blake2b(code, digest_size=_DIGEST).digest() == digest else None


def _keep(path: Path, code: bytes) -> None:
    """Write a cache file, whole or not at all. A failure only means that the next process compiles again."""
    part = path.with_suffix(f".{os.getpid()}-{os.urandom(4).hex()}.part")  # containers that share a cache share process ids
    try:
        part.write_bytes(blake2b(code, digest_size=_DIGEST).digest() + code)
        part.replace(path)
    except OSError as error:
        not_kept(error)
        with contextlib.suppress(OSError):  # a read-only file system refuses this as well
            part.unlink(missing_ok=True)


def _link(tag: str, code: bytes, symbols):
    """The loaded library; by RuntimeDyld, LLVM's older linker, where JITLink cannot be set up or refuses the code."""

    def link():
        builder = llvm.JITLibraryBuilder().add_object_img(code).add_current_process()
        for symbol in symbols:
            builder.export_symbol(symbol)
        return builder.link(_compiler(), tag)

    try:
        return link()
    except RuntimeError:
        _libraries["before"] = _libraries.get("jit")  # the code that it loaded lives as long as it does
        _libraries["jit"] = llvm.create_lljit_compiler(machine(chosen_target()), use_jit_link=False)
        return link()


def _compiler():
    if "jit" not in _libraries:
        _libraries["jit"] = llvm.create_lljit_compiler(machine(chosen_target()), use_jit_link=True)
    return _libraries["jit"]
