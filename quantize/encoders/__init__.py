"""Encoders: float32 rows to the bytes of one GGUF type, one file a type, the same two names in each.

    encode(x)   float32 (rows, row length), finite -> uint8 (rows, bytes of a row), bit for bit what ggml's reference code makes
    LIMIT       the largest magnitude that the type can hold

Compiled with Numba, without the interpreter's lock: threads encode ranges of rows side by side. Knows nothing of files or
names. Importing llamacli.kernels first decides where compiled code is cached.
"""

from importlib import import_module
from types import ModuleType

import llamacli.kernels  # noqa: F401


def encoder(type_name: str) -> ModuleType:
    """The module that encodes F32, F16, BF16, Q8_0 or Q4_0."""
    return import_module(f"quantize.encoders.{type_name.lower()}")
