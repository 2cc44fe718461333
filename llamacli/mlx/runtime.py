"""Starts MLX and describes the GPU that it found; lets threads take turns on it; translates its errors.

In: nothing. Out: a `Runtime`, or a UsageError that says in one line what is missing. `start` alone sets variables of the
process: MLX reads them once, on its first use, and with its defaults every adopted tensor would end a command buffer.
"""

import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

from llamacli import environment
from llamacli.errors import DeviceError, MemoryLimitError, UsageError

OLDEST = (0, 32, 1)  # the first that adopts memory of ours: mlx.core.asarray(copy=False)
COMMANDS = {"MLX_MAX_OPS_PER_BUFFER": "1000", "MLX_MAX_MB_PER_BUFFER": "1000000"}  # limits that end a command buffer
BACKEND = "" if sys.platform == "darwin" else " 'mlx[cuda13]' (or mlx[cpu], to look)"  # on macOS Metal comes with it
INSTALL = f"install it with pip install 'llamacli[mlx]'{BACKEND}, or use --device cpu"


class Runtime(NamedTuple):
    """MLX on this machine. `budget`: most bytes that the GPU should use, by its driver's advice; 0 without a GPU."""

    version: str
    gpu: str | None  # "Metal", "CUDA" or None
    name: str
    budget: int
    largest: int  # bytes of one buffer

    def __str__(self) -> str:
        return f"MLX {self.version}, {self.gpu or 'no GPU'}, {self.name}"


@cache
def start() -> Runtime:
    """Import MLX and look for a GPU. UsageError: MLX is absent, broken or too old."""
    for name, value in COMMANDS.items():
        os.environ.setdefault(name, value)
    try:
        import mlx.core as mx
    except ModuleNotFoundError:
        raise UsageError(f"--device mlx: expected the package mlx, found none; {INSTALL}") from None
    except ImportError as error:
        found = str(error).partition("\n")[0]
        raise UsageError(f"--device mlx: expected a working package mlx, found: {found}; {INSTALL}") from None
    found = tuple(int(part) for part in re.findall(r"\d+", mx.__version__)[:3])
    if found < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise UsageError(f"--device mlx: expected mlx {oldest} or newer, found {mx.__version__}; {INSTALL}")
    gpu = "Metal" if mx.metal.is_available() else "CUDA" if mx.cuda.is_available() else None
    info = mx.device_info(mx.gpu) if gpu else {}
    total = int(info.get("memory_size", info.get("total_memory", 0)))
    budget = int(info.get("max_recommended_working_set_size", info.get("free_memory", total)))
    largest = int(info.get("max_buffer_length", budget))
    if gpu == "Metal" and (wired := environment.wired_gigabytes()):
        mx.set_wired_limit(min(int(wired * 1e9), budget))
    return Runtime(mx.__version__, gpu, str(info.get("device_name", "CPU")), budget, largest)


_turn = threading.RLock()


@cache
def _stream(gpu: bool):
    """The stream of this process. MLX's usual ones belong to the thread that made them: no other may evaluate their arrays."""
    import mlx.core as mx

    return mx.new_thread_unsafe_stream(mx.gpu if gpu else mx.cpu)


@contextmanager
def working(path: object, gpu: bool) -> Iterator[None]:
    """Computations inside run on the one stream of this process, for one thread at a time. Errors: as for `translated`."""
    import mlx.core as mx

    with _turn, translated(path), mx.stream(_stream(gpu)):
        yield


@contextmanager
def translated(path: object) -> Iterator[None]:
    """Raise MLX's errors of the calls inside as llamacli's; `path` names the model in them.

    MemoryLimitError: the GPU's memory is full. DeviceError: anything else that the GPU or its driver reports.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        found = " ".join(str(error).split())[:200] or type(error).__name__
        if re.search(r"insufficient memory|out ?of ?memory|malloc|maximum allowed buffer", found, re.I):
            raise MemoryLimitError(
                f"{path}: expected more memory for the GPU, found: {found}; use a smaller -c or --gpu-layers"
            ) from None
        raise DeviceError(f"{path}: expected the GPU to compute, found: {found}; try again, or use --device cpu") from error
