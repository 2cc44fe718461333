"""Programs: tables of (kernel address, argument address, barrier) rows that a thread pool walks through in one compiled call.

`Program.add` appends a step with the buffers that it reads and writes. Threads do not wait for each other after every step: a
barrier is put only where a step touches a buffer that an earlier one, since the last barrier, has written, or writes one that
an earlier step reads. Steps between two barriers may run at the same time on different threads.
"""

from collections.abc import Hashable, Iterable

import numpy as np

from llamacli.cpu.kernels.jit.intrinsics import Kernel


class Program:
    """Steps for Pool.run. It keeps their argument arrays alive."""

    def __init__(self):
        self.labels: list = []  # of the steps, as the caller gave them
        self.table = np.zeros((0, 3), np.int64)
        self._rows: list[list[int]] = []
        self._kept: list[np.ndarray] = []
        self._read: set[Hashable] = set()  # since the last barrier
        self._written: set[Hashable] = set()

    def __len__(self) -> int:
        return len(self._rows)

    def add(
        self,
        kernel: Kernel,
        arguments: tuple,
        reads: Iterable[Hashable] = (),
        writes: Iterable[Hashable] = (),
        label: object = None,
    ) -> None:
        """Append a step. TypeError if `arguments` are not the kernel's; `reads` and `writes` name buffers."""
        reads, writes = set(reads), set(writes)
        if reads & self._written or writes & (self._written | self._read):
            self.barrier()
        self._read |= reads
        self._written |= writes
        packed = kernel.pack(arguments)
        self._kept.append(packed)
        self._rows.append([kernel.address, packed.ctypes.data, 0])
        self.labels.append(label)

    def barrier(self) -> int:
        """Let all threads meet after the last step; returns the number of steps so far, where a run may end."""
        if self._rows:
            self._rows[-1][2] = 1
        self._read, self._written = set(), set()
        return len(self._rows)

    def keep(self, *arrays: np.ndarray) -> None:
        """Keep arrays alive that steps read."""
        self._kept += arrays

    def counter(self) -> int:
        """The address of an int64 of the program's own, zero."""
        self._kept.append(np.zeros(8, np.int64))  # a cache line, so that steps do not share one
        return self._kept[-1].ctypes.data

    def seal(self) -> "Program":
        """End with a barrier and make the table; returns self."""
        self.barrier()
        self.table = np.array(self._rows, np.int64).reshape(-1, 3)
        return self
