"""Routed experts in slots that the device reads: no copy between the read from disk and the product.

In: the experts' tensors, slots by layer. Out: matrices of experts as they become available. cpu/experts.py decides what is
cached and reads it; this module has the memory that it reads into. MLX does not see such writes. So whatever read a buffer must
have been evaluated before the buffer is filled again: `Fetch` waits for that, and a layer's experts are fetched only when all
that came before has been evaluated (the router's choice depends on it).
"""

import mmap
from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from llamacli.cpu.experts import DOWN, GATE, RING, UP, Slots
from llamacli.files.gguf import GGUF, Tensor
from llamacli.mlx import kernels, memory
from llamacli.mlx.matrix import Blocks, Wide


class Banks:
    """Memory that files are read into and the device reads."""

    def __init__(self, adopts: bool):
        self._adopts = adopts
        self._banks: list[tuple[int, int, memory.Window]] = []  # address, bytes

    def allocate(self, nbytes: int) -> mmap.mmap | memoryview:
        """Writable memory that begins at a page."""
        buffer, window = memory.bank(nbytes, self._adopts)
        self._banks.append((np.frombuffer(buffer, np.uint8).ctypes.data, nbytes, window))
        return buffer

    def find(self, address: int) -> tuple[memory.Window, bool]:
        """The window that begins at an address, and whether it belongs to the ring, which is allocated last."""
        for number, (start, nbytes, whole) in enumerate(self._banks):
            if start <= address < start + nbytes:
                offset = whole.offset + address - start
                return whole._replace(offset=offset), number >= len(self._banks) - RING
        raise ValueError(f"address {address} is in no bank")


class Experts:
    """The routed experts of a stage's layers."""

    def __init__(
        self,
        gguf: GGUF,
        layers: dict[int, tuple[Tensor, Tensor, Tensor]],
        n_experts: int,
        n_slots: dict[int, int],
        adopts: bool,
        blocks: bool,
    ):
        """`layers`: gate, up and down tensors by layer. `n_slots`: by layer, how many experts it caches. `blocks`: whether
        kernels read blocks here.
        """
        self._layers, self._banks, self._blocks = layers, Banks(adopts), blocks
        self.slots = Slots(layers, n_experts, n_slots, self._banks.allocate)

    def fetch(self, layer: int, chosen: Sequence[int]) -> "Fetch":
        """Start to read the experts in `chosen`. Products with the experts of earlier fetches must have been evaluated."""
        return Fetch(self, layer, chosen)

    def matrix(self, layer: int, part: int, expert: int) -> tuple[Blocks | Wide, bool]:
        """The matrix of an expert that has been read, over its bytes in memory, and whether these are in the ring."""
        tensor = self._layers[layer][part]
        n_experts, n_rows, n_cols = tensor.shape
        nbytes = tensor.nbytes // n_experts
        window, in_ring = self._banks.find(int(self.slots.address(layer, part, expert)))
        if self._blocks and kernels.fits(tensor.type.name, n_cols):
            return Blocks(window, tensor.type.name, 1, n_rows, n_cols, nbytes), in_ring
        return Wide.at(window, tensor.type.name, (n_rows, n_cols), nbytes), in_ring


class Fetch:
    """One layer's experts for a batch of tokens, each yielded with its matrices once they are in memory.

    The caller hands what it computed from them to `used` before it asks for the next expert.
    """

    def __init__(self, experts: Experts, layer: int, chosen: Sequence[int]):
        self._experts, self._layer = experts, layer
        self._fetch = experts.slots.fetch(layer, chosen, in_order=True)

    def gate_up(self) -> Iterator[tuple[int, Blocks | Wide, Blocks | Wide]]:
        """Yields (expert, gate, up); then starts to read what `down` needs."""
        for expert in self._fetch.gate_up:
            (gate, ring), (up, _) = (self._experts.matrix(self._layer, part, expert) for part in (GATE, UP))
            self._in_ring = ring
            yield expert, gate, up
        self._down = self._fetch.down()

    def down(self) -> Iterator[tuple[int, Blocks | Wide]]:
        """Yields (expert, down), after `gate_up`."""
        for expert in self._down:
            matrix, self._in_ring = self._experts.matrix(self._layer, DOWN, expert)
            yield expert, matrix

    def used(self, values: mx.array) -> None:
        """Say that `values` were computed from the expert yielded last.

        A slot keeps its expert until the layer's next fetch, a buffer of the ring until the next expert is asked for.
        """
        if self._in_ring:
            mx.eval(values)
        else:
            mx.async_eval(values)
