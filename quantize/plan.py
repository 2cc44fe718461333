"""The whole file before a byte of it is written: every tensor's type, size and place.

In: named rows, their types, metadata. Out: `Plan`. Knows nothing of disks.
"""

from typing import NamedTuple

from llamacli.ggml import TensorType
from quantize.sources import Rows
from quantize.writer import ALIGNMENT, header


class Planned(NamedTuple):
    """One tensor of the file. `offset` counts from the start of the data."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    nbytes: int
    offset: int
    source: Rows

    @property
    def n_weights(self) -> int:
        """How many numbers it holds."""
        return self.nbytes // self.type.nbytes * self.type.block


class Plan(NamedTuple):
    """The file: `head` is everything before the data, `nbytes` the size of the whole."""

    head: bytes
    tensors: list[Planned]
    nbytes: int


def make_plan(metadata: dict[str, object], rows: dict[str, Rows], types: dict[str, TensorType]) -> Plan:
    """Lay tensors out one after the other, each at an aligned offset."""
    tensors, offset = [], 0
    for name, source in rows.items():
        kind = types[name]
        nbytes = kind.row_bytes(source.shape[-1])
        for n in source.shape[:-1]:
            nbytes *= n
        tensors.append(Planned(name, kind, source.shape, nbytes, offset, source))
        offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
    head = header(metadata, [(t.name, t.type, t.shape, t.offset) for t in tensors])
    return Plan(head, tensors, len(head) + offset)
