"""Intrinsics of drivers: calls by address, raw memory, atomics. And the decorators that declare a driver and its arguments.

A driver is a Python function `(arguments, thread, threads)`, declared with `@kernel(Arguments)`. `Arguments` is a NamedTuple
whose fields are int64 at run time; each field's annotation is one of the kinds below, and `Kernel.pack` checks names, count and
kinds when a program is built. A driver is compiled, or read from the cache, when its `address` is first needed; Numba is
imported only to compile. Functions of arrays, for which a call may cost more, are declared with `@compiled()`. The intrinsics
below are declarations; compiler.py implements them.
"""

import ctypes
import threading
from collections.abc import Callable
from functools import wraps
from typing import Annotated

import numpy as np

_ADDRESSES = range(1 << 12, 1 << 63)  # the first page is never mapped
Address = Annotated[int, _ADDRESSES]
Microkernel = Annotated[int, _ADDRESSES]  # the address of compiled code
OptionalAddress = Annotated[int, _ADDRESSES, 0]
OptionalMicrokernel = Annotated[int, _ADDRESSES, 0]
Count = Annotated[int, range(1 << 40)]  # also a size or stride in bytes; an address in its place is refused
Flag = Annotated[int, range(2)]


def call(address, arguments):
    """Call a microkernel: `call(address, (int64, ...))`, nothing returned."""


def atomic_load(address):
    """The int64 at `address`, sequentially consistent."""


def atomic_store(address, value):
    """Store an int64, sequentially consistent."""


def atomic_add(address, value):
    """Add to the int64 at `address`; returns what it was."""


def pause():
    """Tell the core that this is a spin loop."""


def pointer(address, dtype):
    """An address as a typed pointer: `pointer(address, float32)[i]` reads and writes without bounds."""


_making = threading.Lock()  # Numba is imported, and a function made, by one thread


def compiled(**options) -> Callable[[Callable], Callable]:
    """Decorator: a function of arrays that Numba compiles on the first call, or reads from the cache; Numba is imported then.

    It runs without the interpreter's lock. `options` are those of `numba.njit`.
    """

    def decorate(function: Callable) -> Callable:
        made = []

        @wraps(function)
        def run(*arguments):
            with _making:
                if not made:
                    from llamacli.cpu.kernels.jit.compiler import dispatcher

                    made.append(dispatcher(function, options))
            return made[0](*arguments)

        return run

    return decorate


KERNELS: list["Kernel"] = []  # all drivers, so that `warmup` can compile them


class Kernel:
    """A driver: compiled code that takes (address of its int64 arguments, thread, threads) and returns nothing."""

    def __init__(self, function: Callable, arguments: type | None):
        """`arguments`: the NamedTuple of the function's first parameter; None: it is a plain int64."""
        self.function, self.__name__, self.__doc__ = function, function.__name__, function.__doc__
        self.arguments = arguments
        self._address = 0
        KERNELS.append(self)

    def pack(self, arguments: tuple) -> np.ndarray:
        """The int64 array that the driver reads. TypeError for another kernel's arguments or a value of the wrong kind."""
        if type(arguments) is not self.arguments:
            expected = getattr(self.arguments, "__name__", "no arguments")
            raise TypeError(f"{self.__name__}: expected {expected}, found {type(arguments).__name__}")
        for (field, kind), value in zip(self.arguments.__annotations__.items(), arguments, strict=True):
            allowed, *others = kind.__metadata__
            if int(value) not in allowed and value not in others:
                raise TypeError(f"{self.__name__}: {field} is {value}, which is not in {allowed}")
        return np.array([int(value) for value in arguments], np.int64)

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

        return driver_ir(self.function, self.arguments)


def run(address: int, *arguments: int) -> None:
    """Call compiled code from Python, without the interpreter's lock."""
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * len(arguments))(address)(*arguments)


def kernel(arguments: type | None) -> Callable[[Callable], Kernel]:
    """Declare a driver with the NamedTuple of its arguments; None: its first parameter is an int64."""
    return lambda function: Kernel(function, arguments)


def device_function(function: Callable) -> Callable:
    """Mark a function that drivers call; it is compiled into them."""
    function.device_function = True
    return function
