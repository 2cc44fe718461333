"""Features of this machine's processor by LLVM's names.

On x86, LLVM detects them. On ARM it detects nothing on macOS, and on Linux neither of the two that matter here (LLVM 22), so
this module asks the operating system.
"""

import ctypes
import sys

import llvmlite.binding as llvm

from llamacli.cpu.kernels.cores import sysctl

AT_HWCAP, AT_HWCAP2 = 16, 26  # linux/auxvec.h
HWCAP_ASIMDDP, HWCAP2_I8MM = 1 << 20, 1 << 13  # asm/hwcap.h of aarch64


def features() -> dict[str, bool]:
    """Features of this CPU by LLVM's names."""
    found = dict(llvm.get_host_cpu_features())
    if not llvm.get_process_triple().startswith(("aarch64", "arm64")):
        return found
    # of fixed width, the microkernels gain nothing from SVE, which a CPU's name implies and a virtual machine may hide
    found |= {name: False for name in found if name.startswith("sve")} | {"neon": True, "sve": False}
    if sys.platform == "darwin":
        dotprod, i8mm = (sysctl(f"hw.optional.arm.FEAT_{name}") for name in ("DotProd", "I8MM"))
    else:
        dotprod, i8mm = _auxval(AT_HWCAP) & HWCAP_ASIMDDP, _auxval(AT_HWCAP2) & HWCAP2_I8MM
    return found | {"dotprod": bool(dotprod), "i8mm": bool(i8mm)}


def _auxval(kind: int) -> int:
    """An entry of the auxiliary vector, in which the Linux kernel describes the processor."""
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.argtypes, getauxval.restype = [ctypes.c_ulong], ctypes.c_ulong
    return getauxval(kind)
