"""Builds GGUF files byte by byte, so that tests can make files that no writer would write."""

import struct

KINDS = {"u8": "B", "i8": "b", "u16": "H", "i16": "h", "u32": "I", "i32": "i", "f32": "f", "bool": "?",
         "string": "", "array": "", "u64": "Q", "i64": "q", "f64": "d"}  # fmt: skip
CODE = {name: code for code, name in enumerate(KINDS)}


def string(text):
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(kind, content):
    """A value without its type; for an array `content` is (kind of the items, items)."""
    if kind == "string":
        return string(content)
    if kind == "array":
        inner, items = content
        return struct.pack("<IQ", CODE[inner], len(items)) + b"".join(value(inner, item) for item in items)
    return struct.pack("<" + KINDS[kind], content)


def pair(key, kind, content):
    return string(key) + struct.pack("<I", CODE[kind]) + value(kind, content)


def info(name, dims, kind=0, offset=0):
    """`dims` in the file's order, row length first."""
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file(pairs=(), infos=(), data=b"", version=3, magic=b"GGUF", alignment=32):
    head = magic + struct.pack("<IQQ", version, len(infos), len(pairs)) + b"".join([*pairs, *infos])
    padding = -len(head) % alignment if infos else 0
    return head + bytes(padding) + data
