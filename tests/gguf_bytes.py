"""Builds GGUF files byte by byte, so that tests can make files that no library writes."""

import struct

import gguf
from checkpoint import byte_alphabet

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


def changer(path):
    """change(key, kind, content): the bytes of a file that gguf-py wrote, with another value of a key; and its keys."""
    raw, reader = path.read_bytes(), gguf.GGUFReader(path)
    places = {
        key: (field.offset, field.offset + sum(part.nbytes for part in field.parts))
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.")
    }
    end = max(t.field.offset + sum(part.nbytes for part in t.field.parts) for t in reader.tensors)

    def change(key, kind, content):
        start, after = places[key]
        head = raw[:start] + pair(key, kind, content) + raw[after:end]
        return head + bytes(-len(head) % 32) + raw[end + -end % 32 :]

    return change, list(places)


def llama4(added=(), merges=("a b",)):
    """A small header with all fields that Config and Tokenizer read, and one tensor, so that mutations pass the first checks.
    `added`: more tokens, which are user-defined.
    """
    counts = {"block_count": 4, "embedding_length": 32, "attention.head_count": 4, "attention.head_count_kv": 2,
              "feed_forward_length": 64, "expert_feed_forward_length": 32, "expert_count": 4, "expert_used_count": 1,
              "interleave_moe_layer_step": 1, "context_length": 1024}  # fmt: skip
    tokens = [*byte_alphabet(), "ab", "<|begin_of_text|>", "<|eot|>", *added]
    kinds = [1] * (len(tokens) - 2 - len(added)) + [3, 3] + [4] * len(added)
    pairs = [
        pair("general.architecture", "string", "llama4"),
        *(pair(f"llama4.{key}", "u32", count) for key, count in counts.items()),
        pair("llama4.attention.layer_norm_rms_epsilon", "f32", 1e-5),
        pair("tokenizer.ggml.model", "string", "gpt2"),
        pair("tokenizer.ggml.tokens", "array", ("string", tokens)),
        pair("tokenizer.ggml.token_type", "array", ("i32", kinds)),
        pair("tokenizer.ggml.merges", "array", ("string", merges)),
        pair("tokenizer.ggml.bos_token_id", "u32", tokens.index("<|begin_of_text|>")),
    ]
    return file(pairs, [info("token_embd.weight", (32, len(tokens)), kind=1)], bytes(64 * len(tokens)))
