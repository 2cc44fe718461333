"""What this machine's processor can do, and how many of its cores suit our work.

LLVM knows the features of an x86 processor; of an ARM one it reports nothing on macOS, and on Linux neither of the two that
matter here (LLVM 22), so the system is asked. Knows nothing of what the features are used for.
"""

import ctypes
import os
import sys
from pathlib import Path

import llvmlite.binding as llvm

CORES = Path("/sys/devices/system/cpu")
FAST = (
    3 / 4
)  # of the fastest core's speed: products go to who is free, but all meet after each step, and slower ones would be waited for
AT_HWCAP, AT_HWCAP2 = 16, 26  # linux/auxvec.h
HWCAP_ASIMDDP, HWCAP2_I8MM = 1 << 20, 1 << 13  # asm/hwcap.h of aarch64


def features() -> dict[str, bool]:
    """Features of this CPU by LLVM's names."""
    found = dict(llvm.get_host_cpu_features())
    if not llvm.get_process_triple().startswith(("aarch64", "arm64")):
        return found
    # of fixed width, the leaves gain nothing from SVE, which a CPU's name implies and a virtual machine may hide
    found |= {name: False for name in found if name.startswith("sve")} | {"neon": True, "sve": False}
    if sys.platform == "darwin":
        dotprod, i8mm = (_sysctl(f"hw.optional.arm.FEAT_{name}") for name in ("DotProd", "I8MM"))
    else:
        dotprod, i8mm = _auxval(AT_HWCAP) & HWCAP_ASIMDDP, _auxval(AT_HWCAP2) & HWCAP2_I8MM
    return found | {"dotprod": bool(dotprod), "i8mm": bool(i8mm)}


def default_threads() -> int:
    """The cores this process may use; where they are of several kinds, the fast ones."""
    if sys.platform == "darwin":
        return _sysctl("hw.perflevel0.physicalcpu") or _sysctl("hw.physicalcpu") or os.cpu_count() or 1
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    speeds = [_capacity(core) for core in os.sched_getaffinity(0)]
    return sum(speed >= FAST * max(speeds) for speed in speeds)


def _capacity(core: int) -> int:
    """A core's speed as Linux sees it, 1024 for the fastest; also where it does not say."""
    try:
        return int((CORES / f"cpu{core}" / "cpu_capacity").read_text())
    except (OSError, ValueError):
        return 1024


def _sysctl(name: str) -> int:
    """A number that macOS knows by this name, or 0."""
    value, size = ctypes.c_int64(0), ctypes.c_size_t(8)
    failed = _libc().sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
    return 0 if failed else value.value


def _auxval(kind: int) -> int:
    """What the Linux kernel says of the processor."""
    getauxval = _libc().getauxval
    getauxval.argtypes, getauxval.restype = [ctypes.c_ulong], ctypes.c_ulong
    return getauxval(kind)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
