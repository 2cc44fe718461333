"""Keeps the process alive when a mapped file is truncated or its disk fails.

Touching a page of such a file raises SIGBUS. The handler is compiled code that does not call Python. It maps zero pages over
the rest of the mapping and marks the mapping as broken. The run then ends normally with a wrong result, and the caller discards
it because `Guard.broken` names the mapping. SIGBUS at any other address ends the process, as without this module.

Another library of the process, such as libclang, may have installed its handler in front of this one. On a fault it removes
itself and raises the signal again. That signal has no address, so this handler only returns: the access faults again, and the
second fault comes here with its address.
"""

import ctypes
import mmap
import signal
import sys
import threading
import weakref

import numpy as np
from llvmlite import ir

from llamacli.cpu.kernels.jit.loader import load

MOST = 4096  # mappings of a process that can be guarded
_SYMBOLS = ("rescue", "state")
_LINUX = sys.platform == "linux"
_ADDRESS = 16 if _LINUX else 24  # of the fault, in siginfo_t
_CODE, _FIRST_FAULT = 8, 1 if _LINUX else -(1 << 31)  # where it came from; below, the signal was raised (elsewhere: not told)
_SIGINFO = 4 if _LINUX else 0x40
_READ, _FIXED_PRIVATE_ANONYMOUS = 1, 0x32 if _LINUX else 0x1012
_i32, _i64, _pointer = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
_installed: list = []  # the table of mappings, kept as long as the process lives
_choosing = threading.Lock()  # without it two models that are loaded at once would take the same rows


class Guard:
    """Watches over mappings; a row of the table for each, as long as the guard lives."""

    def __init__(self, maps: list[mmap.mmap]):
        with _choosing:
            if not _installed:
                _install()
            state, table = _installed
            # Maps beyond MOST are not guarded: a fault there ends the process.
            free = np.flatnonzero(table[:, 1] == 0)[: len(maps)]
            self._table, self._rows = table, free
            for row, mapped in zip(free, maps, strict=False):
                start = np.frombuffer(mapped, np.uint8).ctypes.data
                table[row] = start, start + -(-len(mapped) // mmap.PAGESIZE) * mmap.PAGESIZE, 0
            state[0] = np.flatnonzero(table[:, 1]).max(initial=-1) + 1
        weakref.finalize(self, _release, table, free)

    @property
    def broken(self) -> int | None:
        """The number of the first mapping that could not be read, or None."""
        hits = self._table[self._rows, 2]
        return int(hits.argmax()) if hits.any() else None


def _release(table: np.ndarray, rows: np.ndarray) -> None:
    table[rows] = 0  # another mapping may get the same addresses


def build(target):
    """The module: `state`, the number of rows and their address; `rescue`, the handler."""
    module = ir.Module("faults")
    state = ir.GlobalVariable(module, ir.ArrayType(_i64, 2), "state")
    state.initializer = ir.Constant(state.value_type, [0, 0])
    fn = ir.Function(module, ir.FunctionType(ir.VoidType(), [_i32, _pointer, _pointer]), "rescue")
    remap = ir.Function(module, ir.FunctionType(_pointer, [_i64, _i64, _i32, _i32, _i32, _i64]), "mmap")
    default = ir.Function(module, ir.FunctionType(_pointer, [_i32, _pointer]), "signal")
    entry, head, body, found, following, lost, raised = (fn.append_basic_block() for _ in range(7))

    b = ir.IRBuilder(entry)
    code = b.load(b.bitcast(b.gep(fn.args[1], [_i64(_CODE)]), _i32.as_pointer()))
    fault = b.load(b.bitcast(b.gep(fn.args[1], [_i64(_ADDRESS)]), _i64.as_pointer()))
    count = b.load(b.gep(state, [_i64(0), _i64(0)]))
    rows = b.inttoptr(b.load(b.gep(state, [_i64(0), _i64(1)])), _i64.as_pointer())
    b.cbranch(b.icmp_signed("<", code, _i32(_FIRST_FAULT)), raised, head)

    b.position_at_end(head)
    k = b.phi(_i64)
    k.add_incoming(_i64(0), entry)
    b.cbranch(b.icmp_signed("<", k, count), body, lost)

    b.position_at_end(body)
    row = b.gep(rows, [b.mul(k, _i64(3))])
    start, end = b.load(row), b.load(b.gep(row, [_i64(1)]))
    inside = b.and_(b.icmp_unsigned(">=", fault, start), b.icmp_unsigned("<", fault, end))
    b.cbranch(inside, found, following)

    b.position_at_end(following)
    k.add_incoming(b.add(k, _i64(1)), following)
    b.branch(head)

    b.position_at_end(found)
    page = b.and_(fault, _i64(-mmap.PAGESIZE))
    b.store(_i64(1), b.gep(row, [_i64(2)]))
    b.call(remap, [page, b.sub(end, page), _i32(_READ), _i32(_FIXED_PRIVATE_ANONYMOUS), _i32(-1), _i64(0)])
    b.ret_void()

    b.position_at_end(lost)  # not ours: the same access faults again, and ends the process
    b.call(default, [fn.args[0], ir.Constant(_pointer, None)])
    b.ret_void()

    b.position_at_end(raised)
    b.ret_void()
    return module


def _install() -> None:
    found = load(f"faults-{mmap.PAGESIZE}", build, _SYMBOLS)
    state = np.frombuffer((ctypes.c_int64 * 2).from_address(found["state"]), np.int64)
    table = np.zeros((MOST, 3), np.int64)
    state[1] = table.ctypes.data
    mask = [("mask", ctypes.c_uint8 * 128)] if _LINUX else [("mask", ctypes.c_uint32)]
    fields = [("handler", ctypes.c_void_p), *mask, ("flags", ctypes.c_int), ("restorer", ctypes.c_void_p)]
    action = type("sigaction", (ctypes.Structure,), {"_fields_": fields})()
    action.handler, action.flags = found["rescue"], _SIGINFO
    ctypes.CDLL(None).sigaction(int(signal.SIGBUS), ctypes.byref(action), None)
    _installed.extend((state, table))
