"""The table of GGML tensor types: id in a GGUF file, name, weights per block, bytes per block.

Reading and writing take these numbers from here and from nowhere else. `dequantize` converts types for which llamacli has no
kernels to float32; it needs the package gguf. Source: the GGUF specification and ggml's public type list (ggml.h,
ggml-common.h); a test compares the table with gguf-py's.
"""

from typing import TYPE_CHECKING, NamedTuple

from llamacli.errors import UnsupportedModelError, UsageError

if TYPE_CHECKING:  # `--help` lists the types and must start without NumPy
    import numpy as np


class TensorType(NamedTuple):
    """One row of the table. A tensor row of `n` weights takes `n // block * nbytes` bytes."""

    id: int
    name: str
    block: int
    nbytes: int

    def row_bytes(self, n_cols: int) -> int:
        """Bytes of one row of `n_cols` weights; ValueError unless the row is a whole number of blocks."""
        if n_cols % self.block:
            raise ValueError(f"a row of {n_cols} weights is not a multiple of {self.name}'s block of {self.block}")
        return n_cols // self.block * self.nbytes


TYPES = tuple(
    TensorType(*row)
    for row in (
        (0, "F32", 1, 4),
        (1, "F16", 1, 2),
        (2, "Q4_0", 32, 18),
        (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34),
        (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210),
        (16, "IQ2_XXS", 256, 66),
        (17, "IQ2_XS", 256, 74),
        (18, "IQ3_XXS", 256, 98),
        (19, "IQ1_S", 256, 50),
        (20, "IQ4_NL", 32, 18),
        (21, "IQ3_S", 256, 110),
        (22, "IQ2_S", 256, 82),
        (23, "IQ4_XS", 256, 136),
        (29, "IQ1_M", 256, 56),
        (30, "BF16", 1, 2),
        (34, "TQ1_0", 256, 54),
        (35, "TQ2_0", 256, 66),
        (39, "MXFP4", 32, 17),
    )
)
BY_ID = {t.id: t for t in TYPES}
BY_NAME = {t.name: t for t in TYPES}


def dequantize(blocks: "np.ndarray", kind: TensorType, where: str) -> "np.ndarray":
    """Rows of blocks, uint8 [n_rows, row_bytes], as float32 [n_rows, n_cols], computed by gguf-py.

    `where` names file and tensor in messages. UsageError: gguf-py is not installed. UnsupportedModelError: gguf-py cannot read
    this type.
    """
    try:
        from gguf import GGMLQuantizationType, quants
    except ImportError:
        raise UsageError(
            f"{where}: expected the package gguf, which reads tensors of type {kind.name}, found none; use `pip install gguf`"
        ) from None
    try:
        return quants.dequantize(blocks, GGMLQuantizationType(kind.id))
    except (NotImplementedError, ValueError):
        raise UnsupportedModelError(
            f"{where}: expected a type that can be read back, found {kind.name}; use a file of another type"
        ) from None
