"""Drivers to LLVM IR, through Numba, and the implementation of their intrinsics. Imported only when something must be compiled.

In: a Python function that uses intrinsics.py. Out: of a driver, the text of an LLVM module with one function of three int64,
named like it; of a function of arrays, Numba's dispatcher. Numba's own function of a driver returns a status and takes pointers
to a result and an exception. Drivers have neither, so a wrapper drops them; the code does not call Python.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FunctionType

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from llamacli.cpu.kernels import cache_folder, not_kept
from llamacli.cpu.kernels.jit import intrinsics
from llamacli.cpu.kernels.jit.loader import chosen_target

_i64 = ir.IntType(64)
_FAST = {"contract", "reassoc", "nsz", "arcp"}  # sums may be reordered; NaN and infinity keep their meaning


def dispatcher(function: FunctionType, options: dict) -> Callable:
    """What intrinsics.compiled calls: Numba's form of the function, compiled on the first call or read from our cache folder.

    Where the folder cannot be used, or what it has is damaged, the function is compiled in memory.
    """
    function = _implemented(function)
    plain = njit(nogil=True, **options)(function)  # compiles nothing before the first call
    made = [_with_cache(function, options) or plain]

    def run(*arguments):
        if made[0] is plain:
            return plain(*arguments)
        try:
            return made[0](*arguments)
        except OSError as error:  # Numba could not write its cache: functions of arrays open no files
            not_kept(error)
        except Exception:  # Numba reads its cache without checks: a power cut leaves empty files
            _forget(made[0])
        made[0] = plain
        return plain(*arguments)

    return run


def _forget(made) -> None:
    """Have the next process compile a dispatcher's function again."""
    with suppress(Exception):  # Numba has no public name for it
        made._cache.flush()


def _with_cache(function: Callable, options: dict):
    """A dispatcher that keeps its code in our cache folder, or None if Numba cannot write there.

    Numba asks for its cache folder once, when a dispatcher is made, so the setting is ours only for that moment and the host
    program keeps its own. If it cannot write there, it takes the sources' folder or the home's.
    """
    folder = cache_folder()
    if folder is None:
        return None
    before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(folder)
    try:
        made = njit(nogil=True, cache=True, **options)(function)
        if Path(made.stats.cache_path).is_relative_to(folder):
            return made
    except (OSError, RuntimeError):  # RuntimeError: Numba found no folder at all
        pass
    finally:
        numba.config.CACHE_DIR = before
    not_kept(OSError(0, "it cannot be written", str(folder)))
    return None


def driver_ir(function: FunctionType, arguments: type | None) -> str:
    """The LLVM module of a driver whose first parameter is the NamedTuple `arguments`, or an int64."""
    signature = types.void(types.int64, types.int64, types.int64)
    entry = _implemented(function)
    if arguments is not None:
        entry = _entry(entry, arguments)
    compiled = njit(signature, error_model="numpy", fastmath=_FAST)(entry).overloads[signature.args]
    module = llvm.parse_assembly(compiled.library.get_llvm_str())
    module.link_in(llvm.parse_assembly(str(_wrapper(function.__name__, compiled.fndesc.llvm_func_name, module.triple))))
    for other in module.functions:
        if not other.is_declaration and other.name != function.__name__:
            other.linkage = "internal"  # so that what is not called is dropped
    return str(module)


def _entry(function: FunctionType, arguments: type) -> FunctionType:
    """A function of the arguments' address that loads them and calls `function`."""
    body, load = njit(error_model="numpy", fastmath=_FAST)(function), _loader(arguments)

    def entry(at, thread, threads):
        body(load(at), thread, threads)

    return entry


def _loader(arguments: type):
    """An intrinsic that loads the int64 fields of a NamedTuple from an address."""
    result = types.NamedUniTuple(types.int64, len(arguments._fields), arguments)

    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, signature, values):
            base = builder.inttoptr(values[0], _i64.as_pointer())
            loaded = [builder.load(builder.gep(base, [_i64(k)])) for k in range(len(arguments._fields))]
            return context.make_tuple(builder, result, loaded)

        return result(types.int64), codegen

    return load


def _wrapper(name: str, native: str, triple: str) -> ir.Module:
    module, byte = ir.Module("driver"), ir.IntType(8).as_pointer()
    module.triple = triple
    callee = ir.Function(
        module, ir.FunctionType(ir.IntType(32), [byte.as_pointer(), byte.as_pointer(), _i64, _i64, _i64]), native
    )
    fn = ir.Function(module, ir.FunctionType(ir.VoidType(), [_i64] * 3), name)
    builder = ir.IRBuilder(fn.append_basic_block())
    builder.call(callee, [builder.alloca(byte), builder.alloca(byte), *fn.args])
    builder.ret_void()
    return module


def _implemented(function: FunctionType) -> FunctionType:
    """The function with the intrinsics and device functions that it names replaced by their compiled forms."""
    known = function.__globals__
    names = {name: _implementation(known[name]) for name in function.__code__.co_names if name in known}
    return FunctionType(function.__code__, {**known, **names}, function.__name__, function.__defaults__)


def _implementation(value):
    try:
        if value in _INTRINSICS:
            return _INTRINSICS[value]
    except TypeError:  # cannot be hashed: no intrinsic
        return value
    if getattr(value, "device_function", False):
        return njit(error_model="numpy", fastmath=_FAST)(_implemented(value))
    return value


@intrinsic
def call(typingctx, address, arguments):
    """intrinsics.call, also for Numba functions elsewhere."""
    sig = types.void(types.int64, arguments)

    def codegen(context, builder, signature, values):
        n = len(arguments)
        unpacked = [builder.extract_value(values[1], k) for k in range(n)]
        fn = builder.inttoptr(values[0], ir.FunctionType(ir.VoidType(), [_i64] * n).as_pointer())
        builder.call(fn, unpacked)
        return context.get_dummy_value()

    return sig, codegen


@intrinsic
def _atomic_load(typingctx, address):
    def codegen(context, builder, signature, values):
        return builder.load_atomic(builder.inttoptr(values[0], _i64.as_pointer()), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _atomic_store(typingctx, address, value):
    def codegen(context, builder, signature, values):
        builder.store_atomic(values[1], builder.inttoptr(values[0], _i64.as_pointer()), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _atomic_add(typingctx, address, value):
    def codegen(context, builder, signature, values):
        return builder.atomic_rmw("add", builder.inttoptr(values[0], _i64.as_pointer()), values[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _pause(typingctx):
    def codegen(context, builder, signature, values):
        triple = chosen_target().triple
        if triple.startswith("x86_64"):
            fn = builder.module.declare_intrinsic("llvm.x86.sse2.pause", (), ir.FunctionType(ir.VoidType(), []))
            builder.call(fn, [])
        elif triple.startswith(("aarch64", "arm64")):  # `yield` does nothing there, `isb` waits for the pipeline to be empty
            fn = builder.module.declare_intrinsic("llvm.aarch64.isb", (), ir.FunctionType(ir.VoidType(), [ir.IntType(32)]))
            builder.call(fn, [ir.IntType(32)(15)])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _pointer(typingctx, address, dtype):
    target = types.CPointer(dtype.dtype if isinstance(dtype, types.NumberClass) else dtype)

    def codegen(context, builder, signature, values):
        return builder.inttoptr(values[0], context.get_value_type(target))

    return target(types.int64, dtype), codegen


_INTRINSICS = {
    intrinsics.call: call,
    intrinsics.atomic_load: _atomic_load,
    intrinsics.atomic_store: _atomic_store,
    intrinsics.atomic_add: _atomic_add,
    intrinsics.pause: _pause,
    intrinsics.pointer: _pointer,
}
