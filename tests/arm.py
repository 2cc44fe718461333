"""Compiles kernels for ARM and runs them under qemu, with the same arguments as the kernels of this machine.

In: a module builder and one of TARGETS. Out: `{symbol: Microkernel}`, as from jit.load. A call copies its arrays into the
emulated program and back; addresses of further arrays must be passed as `pointers(rows)`. Each variant runs on the smallest
emulated CPU that may choose it, so that an instruction the CPU lacks ends the program.
"""

import ctypes
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llamacli.cpu.kernels.jit import loader as jit

COMPILER, QEMU = "aarch64-linux-gnu-gcc", ("qemu-aarch64-static", "qemu-aarch64")
BASE = 0x10_0000_0000  # an address that the emulated program does not use
# the target of each variant, and the CPU that qemu emulates
CPUS = {"i8mm": ("neoverse-v1", "max,sve=off"), "dotprod": ("neoverse-n1", "cortex-a76"), "plain": ("generic", "cortex-a57")}


def _target(name: str) -> jit.Target:
    features = {"neon": True, "sve": False, "dotprod": name != "plain", "i8mm": name == "i8mm"}
    best = jit.targets("aarch64-unknown-linux-gnu", CPUS[name][0], features)[0]
    assert best.name == name
    return best._replace(name=f"arm-{name}")


TARGETS = {f"arm-{name}": _target(name) for name in CPUS}
_loaded: dict[tuple[str, str], dict] = {}


def missing() -> str | None:
    """The program that is missing to run ARM code here, or None."""
    if not hasattr(os, "memfd_create"):
        return "Linux"
    packages = {"qemu-user-static": _qemu(), "gcc-aarch64-linux-gnu": shutil.which(COMPILER)}
    absent = [package for package, found in packages.items() if not found]
    return f"{' and '.join(absent)} (apt-get install {' '.join(absent)})" if absent else None


class Pointers(np.ndarray):
    """A table of addresses that keeps its `rows`, so that they are copied too."""


def pointers(rows) -> Pointers:
    """The table of the rows' addresses that kernels take."""
    table = np.array([row.ctypes.data for row in rows], np.int64).view(Pointers)
    table.rows = rows
    return table


class Microkernel(NamedTuple):
    """A function of an emulated program."""

    program: Path
    cpu: str
    number: int

    def __call__(self, *args: int | np.ndarray) -> None:
        """Call it with arrays and int64 values; changes to arrays are copied back."""
        arrays = [a for a in args if isinstance(a, np.ndarray)]
        owners = {id(o): o for a in arrays for o in map(_owner, [a, *getattr(a, "rows", ())])}.values()
        places, size = [], 0
        for owner in owners:
            places.append((owner.ctypes.data, owner.nbytes, size, owner))
            size += -(-owner.nbytes // 64) * 64 + 64

        def there(address):
            return next(BASE + at + address - start for start, n, at, _ in places if start <= address < start + n)

        with tempfile.TemporaryFile() as file:
            file.truncate(size)
            with mmap.mmap(file.fileno(), size) as memory:
                for start, n, at, owner in places:
                    table = isinstance(owner, Pointers)
                    memory[at : at + n] = bytes(np.array([*map(there, owner)])) if table else ctypes.string_at(start, n)
                values = [there(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in args]
                command = [_qemu(), "-cpu", self.cpu, self.program, file.fileno(), BASE, size, self.number, *values]
                done = subprocess.run(list(map(str, command)), pass_fds=[file.fileno()], capture_output=True, text=True)
                assert done.returncode == 0, f"{self.program.name} on {self.cpu}: exit {done.returncode} {done.stderr}"
                for start, n, at, owner in places:
                    if not isinstance(owner, Pointers):
                        ctypes.memmove(start, memory[at : at + n], n)


def _owner(array):
    """The array whose memory this one is a view of."""
    while isinstance(array.base, np.ndarray) and not isinstance(array, Pointers):
        array = array.base
    assert array.flags.c_contiguous
    return array


def load(name: str, build, symbols: tuple[str, ...], target: jit.Target) -> dict[str, Microkernel]:
    """The kernels that `build(target)` makes, as functions of one emulated program."""
    if (name, target.name) not in _loaded:
        program = Path(_folder().name) / f"{name}-{target.name}"
        code = program.with_suffix(".o")
        code.write_bytes(jit.machine(target).emit_object(jit.optimized(build, target)))
        source = Path(__file__).with_name("arm_call.c")
        subprocess.run([COMPILER, "-static", f"-DMICROKERNELS={','.join(symbols)}", "-o", program, source, code], check=True)
        cpu = CPUS[target.name.removeprefix("arm-")][1]
        _loaded[name, target.name] = {symbol: Microkernel(program, cpu, k) for k, symbol in enumerate(symbols)}
    return _loaded[name, target.name]


@cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="llamacli-arm-")


@cache
def _qemu() -> str | None:
    return next(filter(None, map(shutil.which, QEMU)), None)


if __name__ == "__main__":
    sys.exit(missing() and f"make arm: expected {missing()}, found none")
