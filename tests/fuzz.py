"""Mutation fuzzing of every file format that the program reads, by hand: `python tests/fuzz.py gguf 10000 [SEED]`.

A kind is gguf, safetensors, config, tokenizer, imatrix (.dat) or imatrix-gguf. Each input is a small valid file with damage:
bits, integers, slices, cuts, repetitions; in JSON also values of other types. A finding is anything but success or a one-line
LlamacliError, an input that takes over 10 seconds, or memory over 1 GB (RLIMIT_AS, beside what the process has at the start).
Findings are written to fuzz-KIND-N in the working folder. The tests run a hundred inputs of each kind (test_fuzz.py).
"""

import copy
import json
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import checkpoint
import numpy as np
from gguf_bytes import llama4

from llamacli.cli.console import one_line
from llamacli.errors import LlamacliError
from llamacli.files.gguf import open_gguf
from llamacli.llama4.config import Config
from llamacli.text.tokenizer import Tokenizer
from quantize.convert import convert
from quantize.imatrix import Entry, Imatrix, read_imatrix, write_imatrix

SECONDS, MEMORY = 10, 1 << 30
NUMBERS = (0, 1, -1, 2, 127, 255, 1 << 15, 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 62, 1 << 63, (1 << 64) - 1)
VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    1.5,
    1e308,
    -0.0,
    float("nan"),
    1 << 70,
    "",
    "a",
    "\0",
    "\ud800",
    "<|eot|>",
    [],
    {},
    [[]],
)


class Kind:
    """A valid file, the path for a damaged one, and the function that reads it."""

    def __init__(self, folder: Path, raw: bytes, path: Path, read: Callable[[], object], is_json: bool = False):
        self.folder, self.raw, self.path, self.read, self.is_json = folder, raw, path, read, is_json

    def run(self, raw: bytes) -> bool:
        """Whether the input was read; False if it was refused in one line. Anything else is raised."""
        self.path.write_bytes(raw)
        try:
            self.read()
        except LlamacliError as error:
            line = one_line(str(error))
            assert "\n" not in str(error) and line.isprintable() and len(line) < 2000, f"not one short line: {error!s:.200}"
            return False
        return True


def kinds(folder: Path) -> dict[str, Callable[[], Kind]]:
    """How to set up each kind in an empty folder."""

    def folder_kind(name: str) -> Kind:
        checkpoint.write(folder / "hf")
        path = folder / "hf" / name
        read = lambda: convert(folder / "hf", folder / "out.gguf", "Q8_0", dry_run=True)
        return Kind(folder, path.read_bytes(), path, read, name.endswith(".json"))

    return {
        "gguf": lambda: Kind(folder, llama4(), folder / "x.gguf", lambda: read_model(folder / "x.gguf")),
        "imatrix": lambda: Kind(folder, imatrix(), folder / "x.imatrix", lambda: read_imatrix(folder / "x.imatrix")),
        "imatrix-gguf": lambda: Kind(
            folder, imatrix_gguf(folder / "s.gguf"), folder / "x.gguf", lambda: read_imatrix(folder / "x.gguf")
        ),
        "safetensors": lambda: folder_kind("model.safetensors"),
        "config": lambda: folder_kind("config.json"),
        "tokenizer": lambda: folder_kind("tokenizer.json"),
    }


def read_model(path: Path) -> None:
    """Everything that is read before a model runs: metadata, every tensor, sizes, vocabulary."""
    found = open_gguf(path)
    for key in found.metadata:
        found.metadata.typed(key)
    for tensor in found.tensors.values():
        assert len(tensor.read()) == tensor.nbytes
    Config.from_gguf(found)
    Tokenizer.from_gguf(found).encode("hello <|eot|> wörld", special=True)


def imatrix() -> bytes:
    """The older format; the newer one is a GGUF."""
    raw = struct.pack("<i", 2)
    for name in (b"blk.0.attn_q.weight", b"blk.0.ffn_up_exps.weight"):
        raw += struct.pack("<i", len(name)) + name + struct.pack("<ii8f", 3, 8, *range(8))
    return raw + struct.pack("<i", 5) + struct.pack("<i", 4) + b"text"


def imatrix_gguf(path: Path) -> bytes:
    """The format that llamacli writes."""
    entries = {f"blk.{i}.attn_q.weight": Entry(np.ones((2, 8), np.float32), np.ones(2, np.float32)) for i in range(3)}
    write_imatrix(Imatrix(path, entries, ["text"], 5, 512))
    return path.read_bytes()


def damaged(raw: bytes, rng: random.Random, head: int = 1 << 13) -> bytes:
    """Some mutations, most of them near the start, where headers are."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(max(1, len(data) if rng.random() < 0.2 else min(head, len(data))))
        match rng.randrange(7):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                data[at : at + 1] = bytes([(data[at] if at < len(data) else 0) ^ 1 << rng.randrange(8)])
            case 2:
                size = rng.choice((4, 8))
                data[at : at + size] = (rng.choice(NUMBERS) % (1 << 8 * size)).to_bytes(size, "little")
            case 3:
                del data[at : at + rng.randrange(1, 64)]
            case 4:
                start = rng.randrange(max(1, len(data)))
                data[at:at] = data[start : start + rng.randrange(1, 256)] * rng.choice((1, 2, 50))
            case 5:
                data[at:at] = rng.choice((b"\0" * 64, b"\xff" * 64, b"\xed\xa0\x80", b'"', b"[" * 2000, b"9" * 5000, b"1e999"))
            case 6 if rng.random() < 0.3:
                del data[at:]
    return bytes(data)


def other_value(raw: bytes, rng: random.Random) -> bytes:
    """JSON with a value somewhere in it replaced, removed or repeated."""
    tree = json.loads(raw)
    for _ in range(rng.choice((1, 1, 2, 4))):
        node = tree
        while True:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            if not keys:
                break
            key = rng.choice(keys)
            child = node[key]
            if isinstance(child, (dict, list)) and child and rng.random() < 0.7:
                node = child
                continue
            if rng.random() < 0.2 and isinstance(node, dict):
                node[rng.choice(("", "\ud800", "x" * 70_000, key + "2"))] = node.pop(key)
            else:
                value = rng.choice((*VALUES, str(child), [child], {"a": child}, rng.choice(NUMBERS), -rng.choice(NUMBERS)))
                node[key] = copy.deepcopy(value)  # a list of VALUES that is changed later could contain itself
            break
    return json.dumps(tree, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def inputs(kind: Kind, seed: int, first: int, count: int):
    """(number, bytes) of damaged inputs; each depends on its number and the seed alone."""
    for n in range(first, first + count):
        rng = random.Random(f"{seed} {n}")
        yield n, other_value(kind.raw, rng) if kind.is_json and rng.random() < 0.6 else damaged(kind.raw, rng)


def main(name: str, count: str, seed: str = "0", first: str = "0") -> int:
    """Run and report; returns 1 if there was a finding."""
    sys.stdout.reconfigure(errors="backslashreplace")
    with tempfile.TemporaryDirectory() as folder:
        kind, findings, read, slowest = kinds(Path(folder))[name](), 0, 0, 0.0
        assert kind.run(kind.raw), "the sound file must be read"
        vm = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (vm + MEMORY, resource.RLIM_INFINITY))
        signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError(f"over {SECONDS} s")))
        for n, raw in inputs(kind, int(seed), int(first), int(count)):
            began = time.perf_counter()
            signal.alarm(SECONDS)
            try:
                read += kind.run(raw)
            except Exception:
                findings += 1
                Path(f"fuzz-{name}-{n}").write_bytes(raw)
                print(f"{name} {n}:", traceback.format_exc(limit=-3), flush=True)
            finally:
                signal.alarm(0)
            slowest = max(slowest, time.perf_counter() - began)
        print(f"{name}: {count} inputs, {read} read, {findings} findings, slowest {slowest:.2f} s")
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
