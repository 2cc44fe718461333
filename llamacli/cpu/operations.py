"""The CPU's operations: each call of llama4/layers.py appends compiled steps over fixed buffers to a program.

In: the bound weights, buffers, slots if experts are fetched. Out: a sealed program, the steps at which it can be cut: after
each layer, and within a layer wherever experts may have to be waited for. A value is the name of the buffer that holds it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llamacli.cpu.buffers import Buffers, matmul_scratch
from llamacli.cpu.experts import DOWN, GATE, UP, Slots
from llamacli.cpu.kernels.jit.loader import chosen_target, load
from llamacli.cpu.kernels.ops import attention, elementwise, kv, matmul, vectors
from llamacli.cpu.kernels.ops.matmul import Matrix
from llamacli.cpu.kernels.runtime.program import Program
from llamacli.cpu.weights import Dense, Experts, Layer, Weights
from llamacli.llama4 import layers as llama4
from llamacli.llama4.config import Config
from llamacli.llama4.tensors import Role, role_of
from llamacli.positions import segment


class Inputs(NamedTuple):
    """Sums of squares of the inputs of products that share their input, by matrix (of a tensor of experts) and column."""

    names: tuple[str, ...]  # the tensors
    square_sums: np.ndarray  # float64 [n_matrices, n_cols]
    counts: np.ndarray  # int64 [n_matrices], inputs that each has seen


class ExpertCuts(NamedTuple):
    """Where the steps of a layer with fetched experts can be cut: the number of the step after each part."""

    guessed: int  # the router has run on the hidden state before attention, for the prefetch
    routed: int  # the experts are chosen
    shared: int  # the shared expert's gate and up are done
    multiplied: int  # a routed expert's gate and up, for the experts in `window`
    joined: int  # the shared expert's down
    end: int  # a routed expert's down, for the experts in `window`


class Recorder:
    """Operations that record themselves. `program` is complete after `compose`.

    `layer_ends`: the step after each layer's last; `embedded`: after the embedding, if there are no layers. `expert_cuts`: by
    layer, if there are slots. `over_blocks`: the layer of each step of attention that is run by `reach`, several times.
    """

    def __init__(
        self,
        weights: Weights,
        config: Config,
        layers: range,
        buffers: Buffers,
        stop: int,
        slots: Slots | None = None,
        watched: dict[tuple[str, ...], Inputs] | None = None,
        reach: int = 0,
    ):
        """`stop`: the address of an int64 that another thread sets to end a run early. `watched`: if not None, steps
        that sum the squares of every product's input are recorded, and the sums kept here. `reach`: the address of
        attention's int64 [6], if keys and values may be in a file.
        """
        self.program, self.layer_ends, self.expert_cuts = Program(), [], {}
        self.embedded, self.over_blocks = 0, {}
        self._reach = reach
        self._weights, self._config, self._layers, self._buffers = weights, config, layers, buffers
        self._slots, self._watched = slots, watched
        c = config
        self._microkernels = load(f"vectors-{c.head_dim}", vectors.build(c.head_dim), vectors.SYMBOLS)
        self._unit = kv.unit_of(c.n_heads // c.n_kv_heads)
        name, build = f"kv-{c.kv_type}-{c.head_dim}-{self._unit}", kv.build(c.kv_type, c.head_dim, self._unit)
        self._microkernels |= load(name, build, kv.SYMBOLS)
        name, build = f"kv-F16-{c.head_dim}-{self._unit}", kv.build("F16", c.head_dim, self._unit)
        self._halves = load(name, build, kv.SYMBOLS) if segment(c) else {}
        if c.kv_type == "F16":
            self._microkernels["rotate"] = 0
        self._floats = np.array(
            [1.0, c.rms_eps, c.head_dim**-0.5, c.temperature_length or 1.0, c.temperature_scale], np.float32
        )
        self._frequencies = c.frequencies(weights.rope_freqs)
        self._state, self._stop = buffers.address("state"), stop
        self._scratch = matmul_scratch(c, layers, len(buffers["x"]), "logits" in buffers)
        assert self._scratch.end == buffers["scratch"].shape[1], "the buffers were made for other products"
        self._layer: int | None = None  # the one that is being recorded
        self._fetching, self._cuts = False, {}  # whether its experts are fetched, and its cuts so far

    def compose(self, embeds: bool, heads: bool) -> Program:
        """Record the stage: the embedding if it has one, its layers, the head if it has one."""
        if embeds:
            self._embed()
        if self._layers:
            self._angles()
        else:
            self.embedded = self.program.barrier()
        for i in self._layers:
            self._layer, self._cuts = i, {}
            weights = self._weights.layers[i - self._layers.start]
            self._fetching = self._slots is not None and isinstance(weights.ffn, Experts)
            if self._fetching:
                self._guess(weights)
            llama4.layer(self, self._config, i, weights, "x")
            self.layer_ends.append(self.program.barrier())
            if self._fetching:
                self.expert_cuts[i] = ExpertCuts(**self._cuts)
        self._layer, self._fetching = None, False
        if heads:
            self._head()
        return self.program.seal()

    # llama4/layers.py's operations

    def norm(self, x: str, w: np.ndarray) -> str:
        source, out = self._buffers.rows(x), self._buffers.rows("h")
        arguments = elementwise.NormArguments(
            x=source.address,
            x_stride=source.stride,
            weight=w.ctypes.data,
            n_cols=self._config.n_embd,
            out=out.address,
            out_stride=out.stride,
            codes=out.codes,
            codes_stride=out.codes_stride,
            quantize=self._microkernels["quantize"],
            eps=self._float(attention.EPS),
            state=self._state,
        )
        self._add(elementwise.norm, arguments, {x}, {"h"}, "norms")
        return "h"

    def qkv(self, h: str, w: Layer) -> tuple[str, str, str]:
        self._watch((w.attn_q, w.attn_k, w.attn_v), h)
        for matrix, out in zip((w.attn_q, w.attn_k, w.attn_v), ("q", "k", "v"), strict=True):
            self._matmul(matrix, h, out)
        return "q", "k", "v"

    def attend(self, i: int, q: str, k: str, v: str, *, rotate: bool, norm: bool, temperature: bool, chunk: int) -> str:
        c, b, row = self._config, self._buffers, i - self._layers.start
        queries, keys, out = b.rows(q), b.rows(k), b.rows("attended")
        heads = {"n_heads": c.n_heads, "n_kv_heads": c.n_kv_heads, "head_dim": c.head_dim, "chunk": chunk, "layer": row}
        heads |= {"row_bytes": c.kv_row_bytes, "rotate": self._microkernels["rotate"]}
        tokens = {"positions": b.address("positions"), "tables": b.address("tables"), "state": self._state}
        prepare = attention.PrepareHeadsArguments(
            q=queries.address,
            q_stride=queries.stride,
            k=keys.address,
            v=b.address(v),
            kv_stride=keys.stride,
            angles=b.address("angles") if rotate else 0,
            use_norm=norm,
            use_temperature=temperature,
            write=self._microkernels["write"],
            floats=self._float(0),
            **heads,
            **tokens,
        )
        self._add(attention.prepare_heads, prepare, {k, v, "angles"}, {q, k, v, "cache"}, "attention")
        in_file = self._reach and not chunk
        scratch, layout = b["attention_scratch"], attention.Scratch.of(c.head_dim, segment(c))
        rows = {"k": keys.address, "v": b.address(v), "kv_stride": keys.stride, "write_half": self._halves.get("write", 0)}
        rows |= {"segment": segment(c), "blocks": b.address("blocks")}
        assert layout.end == scratch.shape[1]
        attend = attention.AttendArguments(
            q=queries.address,
            q_stride=queries.stride,
            out=out.address,
            out_stride=out.stride,
            **{name: self._microkernels[name] for name in ("dots", "softmax", "weigh", "transpose_keys", "widen", "product")},
            unit=self._unit,
            span=kv.span(c.head_dim, chosen_target()),
            tall=chosen_target().tile,
            floats=self._float(0),
            **{f"{name}_half": self._halves.get(name, 0) for name in ("dots", "weigh", "transpose_keys", "widen")},
            stop=self._stop,
            scratch=scratch.ctypes.data,
            scratch_stride=scratch.strides[0],
            **{f"{name}_offset": offset for name, offset in layout._asdict().items() if name != "end"},
            reach=self._reach if in_file else 0,
            carried=b.address("carried") if in_file else 0,
            **heads,
            **rows,
            **tokens,
        )
        if in_file:
            self.over_blocks[self.program.barrier()] = i
        self._add(attention.attend, attend, {q, k, v, "cache"}, {"attended"}, "attention")
        if in_file:
            self.program.barrier()
        if segment(c):
            keep = attention.KeepSegmentsArguments(n_kv_heads=c.n_kv_heads, head_dim=c.head_dim, layer=row, **rows, **tokens)
            self._add(attention.keep_segments, keep, {k, v}, {"cache"}, "attention")
        quantize = elementwise.QuantizeArguments(
            x=out.address,
            x_stride=out.stride,
            n_cols=c.n_q,
            codes=out.codes,
            codes_stride=out.codes_stride,
            quantize=self._microkernels["quantize"],
            state=self._state,
        )
        self._add(elementwise.quantize_rows, quantize, {"attended"}, {"attended"}, "attention")
        return "attended"

    def add_matmul(self, x: str, h: str, w: Matrix) -> str:
        self._watch((w,), h)
        self._matmul(w, h, x, add=True)
        return x

    def gate_up(self, h: str, w: Dense) -> str:
        self._watch((w.gate, w.up), h)
        self._matmul(w.gate, h, "gate")
        self._matmul(w.up, h, "up")
        self._swiglu("gate", "up", w.gate)
        return "gate"

    def route(self, h: str, w: Matrix) -> str:
        self._watch((w,), h)
        self._matmul(w, h, "router")
        self._route("scores", self._buffers["chosen"][self._layer - self._layers.start].ctypes.data, "moe")
        self._cut("routed")
        return "moe"

    def expert_gate_up(self, h: str, w: Dense, routed: str) -> str:
        self._watch((w.gate, w.up), h, routed, scored=True)
        self._cut("shared")  # what follows is repeated for each expert that is fetched
        used = self._config.n_experts_used
        self._matmul(w.gate, h, "gate_exps", routed, x_div=used, part=GATE)
        self._matmul(w.up, h, "up_exps", routed, x_div=used, part=UP)
        self._cut("multiplied")
        self._swiglu("gate_exps", "up_exps", w.gate, scored=True)
        return "gate_exps"

    def add_expert_matmul(self, x: str, h: str, w: Matrix, routed: str) -> str:
        self._watch((w,), h, routed)
        self._cut("joined")
        self._matmul(w, h, x, routed, add=True, out_div=self._config.n_experts_used, part=DOWN)
        self._cut("end")
        return x

    # around the layers

    def _embed(self) -> None:
        e, out, b = self._weights.token_embd, self._buffers.rows("x"), self._buffers
        arguments = elementwise.EmbedArguments(
            weights=e.address,
            row_bytes=e.row_bytes,
            n_cols=e.n_cols,
            dequantize=matmul.microkernels(e.type_name).dequantize,
            out=out.address,
            out_stride=out.stride,
            ids=b.address("ids"),
            rows=b.address("rows"),
            state=self._state,
        )
        self._add(elementwise.embed, arguments, (), {"x"}, "embedding")

    def _angles(self) -> None:
        arguments = attention.AnglesArguments(
            frequencies=self._frequencies.ctypes.data,
            pairs=self._config.n_rot,
            angles=self._buffers.address("angles"),
            positions=self._buffers.address("positions"),
            state=self._state,
        )
        self._add(attention.angles, arguments, (), {"angles"}, "attention")

    def _head(self) -> None:
        h = self.norm("x", self._weights.output_norm)
        self._matmul(self._weights.output, h, "logits")

    def _guess(self, w: Layer) -> None:
        """Run the router on the hidden state before attention; its choice is prefetched while attention is computed."""
        self._matmul(w.ffn.gate_inp, self.norm("x", w.ffn_norm), "router")
        self._route("scores", self._buffers.address("guess"), "guess_table")
        self._cut("guessed")

    # steps

    def _add(self, kernel, arguments, reads, writes, purpose: str) -> None:
        self.program.add(kernel, arguments, reads, writes, (self._layer, purpose))

    def _cut(self, name: str) -> None:
        """Mark a step at which the program can stop to wait for experts: a field of ExpertCuts."""
        if self._fetching:
            self._cuts[name] = self.program.barrier()

    def _float(self, slot: int) -> int:
        return self._floats[slot:].ctypes.data

    def _matmul(
        self, m: Matrix, h: str, out: str, table: str = "dense", *, add=False, x_div=1, out_div=1, part: int | None = None
    ) -> None:
        """out (+)= h times m; `part`: GATE, UP or DOWN for experts, whose addresses come from the slots if there are any."""
        fetched = part is not None and self._fetching
        arguments = matmul.arguments(
            m,
            self._buffers.rows(h),
            self._buffers.rows(out),
            self._buffers.address(table),
            self._buffers["scratch"],
            self._scratch,
            self.program.counter(),
            self._stop,
            self._state + 8 * elementwise.ALONE,
            add=add,
            x_div=x_div,
            out_div=out_div,
            addresses=self._slots.addresses(self._layer, part) if fetched else 0,
            window=self._buffers.address("window") if fetched else 0,
        )
        self._add(matmul.matmul, arguments, {h, table} | ({out} if add else set()), {out}, _purpose(m))

    def _swiglu(self, gate: str, up: str, w: Matrix, scored: bool = False) -> None:
        rows = self._buffers.rows(gate)
        arguments = elementwise.SwigluArguments(
            gate=rows.address,
            up=self._buffers.address(up),
            stride=rows.stride,
            n_cols=w.n_rows,
            codes=rows.codes,
            codes_stride=rows.codes_stride,
            quantize=self._microkernels["quantize"],
            swiglu=self._microkernels["swiglu"],
            scores=self._buffers.address("scores") if scored else 0,
            one=self._float(attention.ONE),
            per_token=self._config.n_experts_used if scored else 1,
            state=self._state,
        )
        self._add(elementwise.swiglu, arguments, {gate, up} | ({"scores"} if scored else set()), {gate, up}, _purpose(w))

    def _route(self, scores: str, chosen: int, table: str) -> None:
        logits = self._buffers.rows("router")
        arguments = elementwise.RouteArguments(
            logits=logits.address,
            stride=logits.stride,
            n_experts=self._config.n_experts,
            n_used=self._config.n_experts_used,
            scores=self._buffers.address(scores),
            chosen=chosen,
            table=self._buffers.address(table),
            state=self._state,
        )
        self._add(elementwise.route, arguments, {"router"}, {scores, table}, "router")

    def _watch(self, matrices: Sequence[Matrix], h: str, table: str = "dense", scored: bool = False) -> None:
        """If sums are collected (CpuStage.watch), record a step that adds up the squares of the input of `matrices`."""
        if self._watched is None:
            return
        names, m, rows = tuple(m.name for m in matrices), matrices[0], self._buffers.rows(h)
        fresh = Inputs(names, np.zeros((m.n_groups, m.n_cols)), np.zeros(m.n_groups, np.int64))
        _, sums, counts = self._watched.setdefault(names, fresh)  # a later program, for more tokens, adds to the same sums
        arguments = elementwise.SquareSumsArguments(
            x=rows.address,
            x_stride=rows.stride,
            n_cols=m.n_cols,
            n_groups=m.n_groups,
            table=self._buffers.address(table),
            x_div=self._config.n_experts_used if scored else 1,
            scores=self._buffers.address("scores") if scored else 0,
            sums=sums.ctypes.data,
            counts=counts.ctypes.data,
        )
        reads = {h, table} | ({"scores"} if scored else set())
        self._add(elementwise.square_sums, arguments, reads, {names}, "imatrix")


def _purpose(m: Matrix) -> str:
    """What a product with this matrix is called in a profile: the tensor's role."""
    role = role_of(m.name)
    return {Role.ATTENTION: "projections", Role.EMBEDDING: Role.OUTPUT.value}.get(role, role.value)  # a tied embedding
