"""`llamacli warmup`: compiles all kernels that this machine may need, so that no later start has to.

In: nothing. Out: one line on stdout; OutputError if the cache folder cannot keep the code. Compiles the microkernels of every
tensor type and of the usual head sizes, all drivers, the machine limits of `bench` and the encoders of `quantize`.
"""

import pkgutil
import time
from importlib import import_module

from llamacli.cli import signals
from llamacli.cli.options import Output, patience
from llamacli.errors import OutputError

HEAD_SIZES = (32, 64, 96, 128)  # Scout and Maverick have 128, and 5 heads of queries for each of keys


def warmup(output: Output = None) -> None:
    """Compile and keep every kernel that this machine will use."""
    console = output.console()
    began = time.perf_counter()
    with patience(console, "compiling kernels; this is done once ..."), signals.at_once():
        from llamacli.cpu import kernels

        folder = kernels.cache_folder()
        if folder is not None:
            before = _files(folder)
            _compile_all()
        if kernels.notices:
            raise OutputError(kernels.notices.pop())
        made, total, seconds = len(_files(folder) - before), len(_files(folder)), time.perf_counter() - began
    console.result(
        f"compiled {made} kernels in {seconds:.1f} s into {folder}"
        if made
        else f"all {total} kernels are compiled, in {folder}"
    )


def _files(folder) -> set[str]:
    """Object code of microkernels (.o) and of what Numba compiled (.nbc)."""
    return {path.name for path in folder.rglob("*") if path.suffix in (".o", ".nbc")}


def _compile_all() -> None:
    import llamacli.cpu.kernels.ops.masks  # these import the drivers, too
    import llamacli.engine  # noqa: F401
    from llamacli.bench import limits
    from llamacli.cpu.kernels.formats import layout as formats
    from llamacli.cpu.kernels.jit.intrinsics import KERNELS
    from llamacli.cpu.kernels.jit.loader import chosen_target, load
    from llamacli.cpu.kernels.ops import kv, matmul, vectors
    from llamacli.files.ggml import BY_NAME

    for driver in KERNELS:
        _ = driver.address
    for name in (*formats.QUANTIZED, *formats.FLOATS):
        matmul.microkernels(name)
    for size in HEAD_SIZES:
        if size % chosen_target().lanes == 0:
            load(f"vectors-{size}", vectors.build(size), vectors.SYMBOLS)
            for name in kv.TYPES:
                if size % BY_NAME[name].block == 0:
                    for unit in (5, 2) if size == 128 else (2,):
                        load(f"kv-{name}-{size}-{unit}", kv.build(name, size, unit), kv.SYMBOLS)
    limits.microkernels()
    _compile_conversion()


def _compile_conversion() -> None:
    """Compile the functions that `quantize` calls, for arrays like a checkpoint's, which are read-only."""
    import numpy as np

    import quantize.encoders
    from quantize.encoders import widen

    for found in pkgutil.iter_modules(quantize.encoders.__path__):
        module = import_module(f"quantize.encoders.{found.name}")
        if hasattr(module, "encode"):
            module.encode(np.zeros((1, 256), np.float32))
    stored, rows = np.zeros((64, 64), np.uint16), np.zeros((64, 64), np.float32)
    stored.flags.writeable = False
    widen.bf16(stored, rows.view(np.uint32))
    widen.f16(stored.view(np.int16), rows)
    for columns in (stored, stored[:, :32]):
        widen.bf16_transposed(columns, rows[: columns.shape[1]].view(np.uint32))
    widen.largest(rows.reshape(-1).view(np.uint32))
