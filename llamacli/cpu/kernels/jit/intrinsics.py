"""The words of a driver that Python has not: calling a leaf, raw memory, atomics. And the marks that make a function a driver.

A driver is a Python function of words and whole numbers, marked with `kernel`; it is compiled when its `address` is first
asked for, or read from the cache, and then neither Numba nor its half second of imports is needed. The words below are names
only; compiler.py gives them their meaning.
"""

import ctypes
from collections.abc import Callable


def call(address, arguments):
    """Call a leaf: `call(address, (int64, ...))`, nothing returned."""


def atomic_load(address):
    """The int64 at `address`, in acquire order."""


def atomic_store(address, value):
    """Store an int64, sequentially consistent."""


def atomic_add(address, value):
    """Add to the int64 at `address`; returns what it was."""


def pause():
    """Tell the core that this is a spin loop."""


def pointer(address, dtype):
    """An address as a typed pointer: `pointer(address, float32)[i]` reads and writes without bounds."""


def unpack(address, count):
    """The `count` (a literal) int64 values at `address` as a tuple: a step's arguments."""


KERNELS: list["Kernel"] = []  # all that are marked, for who wants them compiled beforehand


class Kernel:
    """A driver: compiled code that takes (address of its int64 arguments, thread, threads) and returns nothing."""

    def __init__(self, function: Callable):
        self.function, self.__name__, self.__doc__ = function, function.__name__, function.__doc__
        self._address = 0
        KERNELS.append(self)

    @property
    def address(self) -> int:
        """Where the code is; compiles it if it is not in the cache."""
        if not self._address:
            from llamacli.cpu.kernels.jit.loader import load

            name = self.__name__
            self._address = load(f"{self.function.__module__.rpartition('.')[2]}.{name}", self._ir, [name])[name]
        return self._address

    def __call__(self, at: int, thread: int, threads: int) -> None:
        """Run it on the calling thread, without the interpreter's lock."""
        run(self.address, at, thread, threads)

    def _ir(self, target) -> str:
        from llamacli.cpu.kernels.jit.compiler import driver_ir

        return driver_ir(self.function)


def run(address: int, *arguments: int) -> None:
    """Call compiled code from Python, without the interpreter's lock."""
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(arguments))(address)(*arguments)


def kernel(function: Callable) -> Kernel:
    """Mark a driver."""
    return Kernel(function)


def part(function: Callable) -> Callable:
    """Mark a function that drivers call."""
    function.part = True
    return function
