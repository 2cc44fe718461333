"""The vision tower on the CPU: tiles of a picture to rows of features, several tiles at a time.

In: a GGUF with a tower, threads. Out: float32 rows that stand in for embeddings of the text model. Weights are used in the
mapped file, in their own type: products use int8 activations for quantized weights, float32 for others. The stream between
layers, norms, attention and GELU are float32.

Source: transformers' `Llama4VisionModel` and `Llama4MultiModalProjector`.
"""

from collections.abc import Callable
from math import prod

import numpy as np

from llamacli.cpu.buffers import Buffers, Shapes
from llamacli.cpu.kernels.formats.layout import ACT_BYTES, FLOATS
from llamacli.cpu.kernels.jit.loader import chosen_target, load
from llamacli.cpu.kernels.ops import kv, matmul, vectors, vision
from llamacli.cpu.kernels.ops.matmul import Matrix
from llamacli.cpu.kernels.runtime.faults import Guard
from llamacli.cpu.kernels.runtime.pool import Pool
from llamacli.cpu.kernels.runtime.program import Program
from llamacli.cpu.weights import bind_matrix, in_map
from llamacli.errors import ModelFileError, UnsupportedModelError
from llamacli.files.gguf import GGUF, Tensor
from llamacli.llama4.tensors import check
from llamacli.llama4.vision import EPS, SHUFFLE, VisionConfig, renamed, tensors

MOST = 4  # tiles that go through a layer together: weights are read once for all of them

Weight = Matrix | np.ndarray


class Tower:
    """A bound tower. One caller at a time; `interrupt` may come from another thread."""

    def __init__(self, gguf: GGUF, threads: int):
        """ModelFileError or UnsupportedModelError if the file has no tower that can run."""
        self.config = c = VisionConfig.from_gguf(gguf)
        self._path, self._paths, self._guard = gguf.path, gguf.paths, Guard(gguf.maps)
        self._weights, self.notices, self._keep = _bind(gguf, c)
        self._pool, self._threads = Pool(threads), threads
        self._stop = np.zeros(8, np.int64)
        self._angles, self._values = _angles(c), byte_values()
        self._program: Program | None = None
        self._ends: list[int] = []
        self._tiles = 0

    def close(self) -> None:
        """Give back threads, buffers and the file."""
        self._pool.close()
        self._program = self._buffers = self._weights = self._keep = None

    def interrupt(self) -> None:
        """From another thread: make `features` end soon with a KeyboardInterrupt."""
        self._stop[0] = 1

    def features(self, tiles: np.ndarray, follow: Callable[[int, int], None] | None = None) -> np.ndarray:
        """Rows for uint8 tiles [n, image_size, image_size, 3]: float32 [n, n_rows, n_text].

        `follow(done, of)` is called after each layer with numbers of tiles, which may be fractions. ModelFileError if the file
        was truncated.
        """
        found = np.empty((len(tiles), self.config.n_rows, self.config.n_text), np.float32)
        self._stop[0] = 0
        for first in range(0, len(tiles), MOST):
            some = tiles[first : first + MOST]
            self._compose(min(MOST, len(tiles)))
            self._set_tiles(some)
            done = 0
            for layer, end in enumerate(self._ends):
                self._pool.run(self._program, done, end)
                if self._stop[0]:
                    raise KeyboardInterrupt
                done = end
                if follow:
                    follow(first + len(some) * (layer + 1) / len(self._ends), len(tiles))
            rows = len(some) * self.config.n_rows
            found[first : first + len(some)] = self._buffers["rows"][:rows, : self.config.n_text].reshape(
                len(some), self.config.n_rows, -1
            )
        if (part := self._guard.broken) is not None:
            raise ModelFileError(f"{self._paths[part]}: expected the file as it was opened, found it cut short; load it again")
        return found

    def _set_tiles(self, tiles: np.ndarray) -> None:
        """Fill in the patches of some tiles and the initial stream: embeddings of positions and of the class token."""
        c, b, n = self.config, self._buffers, len(tiles)
        values = self._values[tiles].reshape(n, c.side, c.patch_size, c.side, c.patch_size, 3)
        patches = b["patches"].reshape(-1, c.n_positions, b["patches"].shape[1])
        patches[:n, : c.n_patches, : c.n_pixels] = values.transpose(0, 1, 3, 5, 2, 4).reshape(n, c.n_patches, c.n_pixels)
        stream = b["x"].reshape(-1, c.n_positions, b["x"].shape[1])
        stream[:n, :, : c.n_embd] = self._weights["v.position_embd.weight"]
        stream[:n, -1, : c.n_embd] += self._weights["v.class_embd"][: c.n_embd]
        positions, rows = n * c.n_positions, n * c.n_rows
        b["counts"][:] = positions, rows
        b["positions_table"][1], b["rows_table"][1] = positions, rows

    def _compose(self, n: int) -> None:
        """Buffers and the program for up to `n` tiles at a time."""
        if n <= self._tiles:
            return
        self._program = self._buffers = None
        self._buffers = b = Buffers(shapes(self.config, n, self._threads))
        for name in ("positions_table", "rows_table"):
            b[name][2:] = np.arange(len(b[name]) - 2)
        self._program, self._ends = _Recorder(self.config, self._weights, self._angles, b, self._stop.ctypes.data).compose()
        self._tiles = n


def byte_values() -> np.ndarray:
    """The tower's input value for each byte of a picture, float32 [256]; transformers computes it in bfloat16, step by step."""

    def rounded(x: np.ndarray) -> np.ndarray:
        bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)

    scaled = rounded(np.arange(256, dtype=np.float32) * np.float32(1 / 255))
    return rounded(rounded(scaled - np.float32(0.5)) / np.float32(0.5))


def shapes(c: VisionConfig, n: int, threads: int) -> Shapes:
    """Every buffer for up to `n` tiles: name to (shape, type)."""
    positions, rows = n * c.n_positions, n * c.n_rows
    found: Shapes = {}

    def add(name: str, count: int, width: int, codes: bool = True) -> None:
        supers = -(-width // 256)
        found[name] = (count, supers * 256), np.float32
        if codes:
            found[name + ".codes"] = (count, supers * ACT_BYTES), np.int8

    for name, width, codes in (
        *(("patches", c.n_pixels, False), ("x", c.n_embd, False), ("h", c.n_embd, True), ("attended", c.n_embd, True)),
        *((name, c.n_embd, False) for name in "qkv"),
        ("up", c.n_ff, True),
    ):
        add(name, positions, width, codes)
    for name, width in (("joined", c.n_shuffled), ("mid", c.n_mlp), ("out", c.n_out)):
        add(name, rows, width)
    add("rows", rows, c.n_text, codes=False)
    found |= {"positions_table": ((positions + 2,), np.int64), "rows_table": ((rows + 2,), np.int64)}
    found["counts"] = (2,), np.int64
    found["scratch"] = (threads, matmul_scratch(c, n).end), np.uint8
    found["attention_scratch"] = (threads, vision.Scratch.of(c.n_positions, c.head_dim).end), np.uint8
    return found


def nbytes(c: VisionConfig, threads: int, n: int = MOST) -> int:
    """Bytes of the buffers for `n` tiles at a time."""
    return sum(prod(shape) * np.dtype(dtype).itemsize for shape, dtype in shapes(c, n, threads).values())


def matmul_scratch(c: VisionConfig, n: int) -> matmul.Scratch:
    """The layout of each thread's scratch for products."""
    tallest = max(c.n_embd, c.n_ff, c.n_mlp, c.n_out, c.n_text)
    widest = max(c.n_pixels, c.n_embd, c.n_ff, c.n_shuffled, c.n_mlp, c.n_out)
    return matmul.Scratch.of(n * c.n_positions, tallest, widest)


def _angles(c: VisionConfig) -> np.ndarray:
    """cos and sin of each position's angles, float32 [n_positions, head_dim / 2, 2]: the first half of the pairs turns with the
    column, the second with the row, both counted from 1; the class token does not turn.
    """
    half = c.head_dim // 4
    dims = np.arange(half, dtype=np.float32) * np.float32(2) / np.float32(c.head_dim // 2)
    frequencies = np.float32(1) / np.float32(c.rope_theta) ** dims
    place = np.arange(c.n_patches)
    angles = np.concatenate(
        [np.outer((at + 1).astype(np.float32), frequencies) for at in (place % c.side, place // c.side)], axis=1
    )
    angles = np.concatenate([angles, np.zeros((1, 2 * half), np.float32)])
    return np.ascontiguousarray(np.stack([np.cos(angles), np.sin(angles)], -1), np.float32)


def _bind(gguf: GGUF, c: VisionConfig) -> tuple[dict[str, Weight], list[str], list]:
    """Check and return the tensors by llama.cpp's names: matrices by address, others as float32, biases padded to
    superblocks.
    """
    stored = renamed(gguf)
    keep, converted, found = [gguf], [], {}
    for spec in check(gguf.path, {name: tensor.shape for name, tensor in stored.items()}, tensors(c)):
        tensor = stored[spec.name]
        if len(spec.shape) == 2 and spec.name != "v.position_embd.weight":
            found[spec.name] = bind_matrix(gguf, tensor, in_map, keep, converted)
        else:
            found[spec.name] = _floats(gguf, tensor)
    notices = [f"{len(converted)} tensors of the vision tower run as F16"] if converted else []
    return found, notices, keep


def _floats(gguf: GGUF, tensor: Tensor) -> np.ndarray:
    """A tensor as float32; a vector is padded with zeros to whole superblocks."""
    name, raw = tensor.type.name, tensor.data.reshape(-1)
    if name not in FLOATS:
        raise UnsupportedModelError(f"{gguf.path}: expected {tensor.name} as F32, found {name}; convert the tower again")
    if name == "BF16":
        values = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(raw, np.float32 if name == "F32" else np.float16).astype(np.float32)
    if not np.isfinite(values).all():
        raise ModelFileError(f"{gguf.path}: expected finite numbers in {tensor.name}, found others; the file is damaged")
    if len(tensor.shape) > 1:
        return values.reshape(tensor.shape)
    return np.concatenate([values, np.zeros(-len(values) % 256, np.float32)])


class _Recorder:
    """Records the tower's operations as a program; `compose` returns it and the steps after each part."""

    def __init__(self, c: VisionConfig, weights: dict[str, Weight], angles: np.ndarray, buffers: Buffers, stop: int):
        self._c, self._w, self._b, self._stop, self._program = c, weights, buffers, stop, Program()
        width = vision.padded(c.head_dim, vision.WIDTH)
        self._kernels = load(f"vectors-{width}", vectors.build(width), vectors.SYMBOLS)
        self._floats = np.array([EPS, c.head_dim**-0.5], np.float32)
        self._zeros = np.zeros(-(-max(c.n_mlp, c.n_out) // 256) * 256, np.float32)
        self._angles, self._together = angles, np.zeros(8, np.int64)
        self._scratch = matmul_scratch(c, len(buffers["x"]) // c.n_positions)
        self._program.keep(self._floats, self._zeros, self._together, angles)

    def compose(self) -> tuple[Program, list[int]]:
        """Record the whole tower."""
        c, ends = self._c, []
        self._matmul("v.patch_embd.weight", "patches", "x", add=True)
        self._norm("v.pre_ln", "x", "x")
        more = None
        for layer in range(c.n_layers):
            p = f"v.blk.{layer}."
            self._norm(p + "ln1", "x", "h", more)
            for part in "qkv":
                self._matmul(f"{p}attn_{part}.weight", "h", part)
            self._attend(p)
            self._matmul(p + "attn_out.weight", "attended", "x", add=True)
            self._norm(p + "ln2", "x", "h", p + "attn_out.bias")
            self._matmul(p + "ffn_up.weight", "h", "up")
            self._gelu("up", c.n_ff, p + "ffn_up.bias")
            self._matmul(p + "ffn_down.weight", "up", "x", add=True)
            more = p + "ffn_down.bias"
            ends.append(self._program.barrier())
        self._norm("v.post_ln", "x", "h", more, codes=False)
        self._join()
        self._matmul("mm.model.mlp.1.weight", "joined", "mid")
        self._gelu("mid", c.n_mlp)
        self._matmul("mm.model.mlp.2.weight", "mid", "out")
        self._gelu("out", c.n_out)
        self._matmul("mm.model.fc.weight", "out", "rows")
        ends.append(self._program.barrier())
        return self._program.seal(), ends

    def _count(self, name: str) -> int:
        """The address of the row count of a buffer."""
        return self._b.address("counts") + (8 if name in ("joined", "mid", "out", "rows") else 0)

    def _matmul(self, weight: str, h: str, out: str, add: bool = False) -> None:
        table = "rows_table" if out in ("mid", "out", "rows") else "positions_table"
        arguments = matmul.arguments(
            self._w[weight],
            self._b.rows(h),
            self._b.rows(out),
            self._b.address(table),
            self._b["scratch"],
            self._scratch,
            self._program.counter(),
            self._stop,
            self._together.ctypes.data,
            add=add,
        )
        self._program.add(matmul.matmul, arguments, {h} | ({out} if add else set()), {out}, weight)

    def _norm(self, norm: str, x: str, out: str, more: str | None = None, codes: bool = True) -> None:
        source, to = self._b.rows(x), self._b.rows(out)
        arguments = vision.LayerNormArguments(
            x=source.address,
            x_stride=source.stride,
            more=self._w[more].ctypes.data if more else 0,
            weight=self._w[norm + ".weight"].ctypes.data,
            bias=self._w[norm + ".bias"].ctypes.data,
            n_cols=self._c.n_embd,
            out=to.address,
            out_stride=to.stride,
            codes=to.codes if codes else 0,
            codes_stride=to.codes_stride,
            quantize=self._kernels["quantize"],
            eps=self._floats.ctypes.data,
            rows=self._count(x),
        )
        self._program.add(vision.layer_norm, arguments, {x}, {x, out}, norm)

    def _attend(self, p: str) -> None:
        b, c, scratch = self._b, self._c, self._b["attention_scratch"]
        offsets = vision.Scratch.of(c.n_positions, c.head_dim)
        width, out = vision.padded(c.head_dim, vision.WIDTH), self._b.rows("attended")
        arguments = vision.AttendTilesArguments(
            **{part: b.address(part) for part in "qkv"},
            stride=b.rows("q").stride,
            **{f"{part}_bias": self._w[f"{p}attn_{part}.bias"].ctypes.data for part in "qkv"},
            angles=self._angles.ctypes.data,
            out=out.address,
            out_stride=out.stride,
            n_heads=c.n_heads,
            head_dim=c.head_dim,
            width=width,
            n_positions=c.n_positions,
            keys_stride=4 * vision.padded(c.n_positions, vision.KEY_UNIT),
            softmax=self._kernels["softmax"],
            product=self._kernels["product"],
            span=kv.span(width, chosen_target()),
            scale=self._floats[1:].ctypes.data,
            rows=self._count("x"),
            stop=self._stop,
            scratch=scratch.ctypes.data,
            scratch_stride=scratch.strides[0],
            **{f"{name}_offset": offset for name, offset in offsets._asdict().items() if name != "end"},
        )
        self._program.add(vision.attend_tiles, arguments, set("qkv"), {"attended"}, "attention")
        quantize = vision.QuantizeTilesArguments(
            x=out.address,
            x_stride=out.stride,
            n_cols=c.n_embd,
            codes=out.codes,
            codes_stride=out.codes_stride,
            quantize=self._kernels["quantize"],
            rows=self._count("x"),
        )
        self._program.add(vision.quantize_tiles, quantize, {"attended"}, {"attended"}, "attention")

    def _gelu(self, x: str, n_cols: int, bias: str | None = None) -> None:
        rows = self._b.rows(x)
        arguments = vision.GeluArguments(
            x=rows.address,
            x_stride=rows.stride,
            n_cols=n_cols,
            bias=self._w[bias].ctypes.data if bias else self._zeros.ctypes.data,
            codes=rows.codes,
            codes_stride=rows.codes_stride,
            gelu=self._kernels["gelu"],
            quantize=self._kernels["quantize"],
            rows=self._count(x),
        )
        self._program.add(vision.gelu, arguments, {x}, {x}, "gelu")

    def _join(self) -> None:
        source, out = self._b.rows("h"), self._b.rows("joined")
        arguments = vision.JoinPatchesArguments(
            x=source.address,
            x_stride=source.stride,
            n_cols=self._c.n_embd,
            side=self._c.side,
            shuffle=SHUFFLE,
            out=out.address,
            out_stride=out.stride,
            codes=out.codes,
            codes_stride=out.codes_stride,
            quantize=self._kernels["quantize"],
            rows=self._count("joined"),
        )
        self._program.add(vision.join_patches, arguments, {"h"}, {"joined"}, "join")
