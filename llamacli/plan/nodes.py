"""Which layers go to which machine, and the speed to expect. Nothing is read.

In: the bytes of a model's tensors, and machines: memory, speeds of memory and disk. Out: a `Split`, or a MemoryLimitError. A
part of a model is planned as a model is (placement.py): its experts are mapped if they fit, else some are in slots and the
others are read from that machine's own disk.

A token visits the machines one after the other, so their times add up, and the sum is minimized. A small share of the sum of
squares is added to it, which prefers equal times: where several splits are equally fast for a token, equal parts are fastest
for prompts, whose batches are on several machines at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, islice, product
from typing import NamedTuple

from llamacli.cpu import kvcache
from llamacli.errors import MemoryLimitError, UsageError
from llamacli.llama4.config import Config
from llamacli.llama4.tensors import Role, find, role_of
from llamacli.plan.placement import COUNTED, OTHERS, Placement, Sizes, decode_seconds, place, size_by_kind

ASSUMED_DISK = 3e9  # bytes a second, of a disk that could not be measured
MOST_CHOICES = 256  # ways to choose a file of each machine that are tried
EVEN = 0.05  # weight of the squares
SECONDS_PER_HANDOVER = 650e-6  # of threads and system calls, beside the network; measured (docs/cluster.md)


class Machine(NamedTuple):
    """A machine: bytes that a model may take, bytes a second of its memory and of its disk, threads; the layers that each of
    its files has, none: all layers.
    """

    name: str
    memory: int
    bandwidth: float
    disk: float
    threads: int = 1
    held: tuple[range, ...] = ()


class Part(NamedTuple):
    """Layers on a machine. `seconds`: of a token in them."""

    machine: Machine
    layers: range
    placement: Placement
    seconds: float


class Split(NamedTuple):
    """Parts in the order of their layers; machines without layers are left out. `seconds`: of a token, all in all."""

    parts: tuple[Part, ...]
    head: float  # seconds of the head
    network: float  # seconds of the hand-overs

    @property
    def seconds(self) -> float:
        """Of a decoded token."""
        return sum(part.seconds for part in self.parts) + self.head + self.network


class Model(NamedTuple):
    """A model's layers: bytes of the head, and the Sizes of each layer. `planned`: the plans of parts so far."""

    config: Config
    head: int
    layers: tuple[Sizes, ...]
    planned: dict


def model(config: Config, tensors: Sequence[tuple[str, int]]) -> Model:
    """The Model of tensors given by GGUF name and bytes."""
    own: list[list] = [[] for _ in range(config.n_layers)]
    head = 0
    for name, nbytes in tensors:
        found = find(name)
        if found is None or role_of(name) is Role.VISION:
            continue
        row, layer = found
        if layer is not None and layer < config.n_layers:
            own[layer].append((name, nbytes))
        elif layer is None and (row.role is Role.OUTPUT or (config.tied and row.role is Role.EMBEDDING)):
            head += nbytes
    return Model(config, head, tuple(size_by_kind(some, config) for some in own), {})


def split(
    model: Model,
    machines: Sequence[Machine],
    ctx: int,
    *,
    network: float = 1.25e9,
    latency: float = 100e-6,
    slots: bool = False,
    layers: Sequence[int] = (),
    sessions: int = 1,
    name: str = "the model",
) -> Split:
    """Give each machine some consecutive layers so that a token takes the least time. The machines are in the given order, or
    in the order of the layers that they have. A machine with several files uses one of them.

    Embedding and head stay with the first machine, whose memory holds them. `network`: bytes a second; `latency`: seconds one
    way. `slots`: experts are read even if they would fit. `layers`: how many each machine gets, in place of the best way.
    `sessions`: how many hold `ctx` tokens at a time.
    MemoryLimitError if the machines together do not hold what every token needs.
    """
    how = {"network": network, "latency": latency, "slots": slots, "layers": layers, "sessions": sessions, "name": name}
    if any(len(machine.held) > 1 for machine in machines):
        return _best_files(model, machines, ctx, how)
    n, c = model.config.n_layers, model.config
    machines = [machines[0]._replace(memory=machines[0].memory - model.head), *machines[1:]]
    head, order = model.head / machines[0].bandwidth, list(range(len(machines)))
    if not layers:
        order.sort(key=lambda k: next((held.start + held.stop for held in machines[k].held), n))
    machines, home = [machines[k] for k in order], order.index(0)

    def part(k: int, first: int, end: int) -> Part | None:
        machine, layers = machines[k], range(first, end)
        if any(first < held.start or held.stop < end for held in machine.held):
            return None
        asked = ctx, slots, sessions
        key, shorter = (*machine[1:], first, end, *asked), (*machine[1:], first, end - 1, *asked)
        if key not in model.planned and model.planned.get(shorter, 0) is None:
            model.planned[key] = None  # where these layers do not fit without the last, they do not fit with it
        if key not in model.planned:
            try:
                placement = _place(model, machine, layers, *asked)
                model.planned[key] = placement, decode_seconds(placement, machine.disk, machine.bandwidth)
            except MemoryLimitError:
                model.planned[key] = None
        found = model.planned[key]
        return found and Part(machine, layers, *found)

    def hop(k: int) -> float:
        """Seconds to a machine, and back to the first, which runs the program."""
        return SECONDS_PER_HANDOVER + (latency + 4 * c.n_embd / network if k != home else 0)

    def cost(k: int, first: int, end: int) -> float | None:
        if (found := part(k, first, end)) is None:
            return None
        return hop(k) + (hop(k) if end == n else 0) + found.seconds + EVEN * found.seconds**2 / scale

    scale = sum(s.always + s.routed for s in model.layers) / sum(machine.bandwidth for machine in machines)
    best = _given(layers, n, len(machines), part) if layers else _shortest(n, len(machines), cost)
    if best is None and any(machine.held for machine in machines):
        have = ", ".join(f"{m.held[0].start}-{m.held[0].stop - 1}" if m.held else "all" for m in machines)
        raise MemoryLimitError(
            f"{name}: expected nodes that together have files of all layers, and memory for them, found layers {have}; "
            f"copy the file, or other layers of it, to a node"
        )
    if best is None:
        least = sum(s.always + c.n_experts_used * s.one_per_layer for s in model.layers) + sessions * kvcache.nbytes(c, ctx)
        least += model.head
        raise MemoryLimitError(
            f"{name}: expected at least {least / 1e9:.2f} GB on {len(machines)} nodes together, besides working memory, "
            f"found {sum(machine.memory for machine in machines) / 1e9:.2f} GB; use a smaller -c or add a node"
        )
    parts = tuple(part(k, first, end) for k, first, end in best)
    return Split(parts, head, sum(hop(k) for k, _, _ in best) + hop(best[-1][0]))


def more_contexts(model: Model, found: Split, ctx: int, most: int, sessions: int = 1) -> int:
    """How many contexts fit besides `sessions`, up to `most`, with the same layers, batches, and all weights in memory."""

    def fits(part: Part, n: int) -> bool:
        try:
            placed = _place(model, part.machine, part.layers, ctx, False, n)
        except MemoryLimitError:
            return False
        return placed.mode != "slots" and placed.batch == part.placement.batch

    if any(part.placement.mode == "slots" for part in found.parts):
        return 0
    return next((n for n in range(most, 0, -1) if all(fits(part, sessions + n) for part in found.parts)), 0)


def _best_files(model: Model, machines: Sequence[Machine], ctx: int, how: dict) -> Split:
    """The best split with one file of each machine."""
    found, error = [], None
    for files in islice(product(*(machine.held or [None] for machine in machines)), MOST_CHOICES):
        one = [m._replace(held=() if held is None else (held,)) for m, held in zip(machines, files, strict=True)]
        try:
            found.append(split(model, one, ctx, **how))
        except MemoryLimitError as last:
            error = last
    if not found:
        raise error
    return min(found, key=lambda one: one.seconds)


def _given(layers: Sequence[int], n: int, machines: int, part: Callable) -> list[tuple[int, int, int]] | None:
    """The same for counts of layers that were asked for."""
    if len(layers) != machines or sum(layers) != n or min(layers) < 0:
        raise UsageError(
            f"layers of nodes: expected {machines} counts that add up to {n}, found {','.join(map(str, layers))}; leave them "
            f"out to have them chosen"
        )
    ends = list(accumulate(layers))
    found = [(k, end - count, end) for k, (count, end) in enumerate(zip(layers, ends, strict=True)) if count]
    return found if all(part(*at) for at in found) else None


def _shortest(n: int, machines: int, cost: Callable[[int, int, int], float | None]) -> list[tuple[int, int, int]] | None:
    """(machine, first layer, end) of the cheapest way to part `n` layers; machines may get none. None if there is no way."""
    best: list[tuple[float, tuple] | None] = [(0.0, ())] + [None] * n  # of the layers before
    for k in range(machines):
        found = list(best)  # this machine gets none
        for end in range(1, n + 1):
            for first in range(end):
                if best[first] is None or (more := cost(k, first, end)) is None:
                    continue
                if found[end] is None or best[first][0] + more < found[end][0]:
                    found[end] = best[first][0] + more, (*best[first][1], (k, first, end))
        best = found
    return None if best[n] is None else list(best[n][1])


def _place(model: Model, machine: Machine, layers: range, ctx: int, slots: bool, sessions: int) -> Placement:
    """Plan some layers as a model with that number of layers, but with the keys and values of these layers."""
    c = replace(model.config, n_layers=len(layers))
    kv = kvcache.nbytes(replace(model.config, n_layers=layers.stop), ctx)
    kv -= kvcache.nbytes(replace(model.config, n_layers=layers.start), ctx)
    memory = machine.memory - sessions * kv + kvcache.nbytes(c, ctx)
    return place(c, _added(model.layers[layers.start : layers.stop]), memory, ctx, threads=machine.threads, slots=slots)


def _added(layers: Sequence[Sizes]) -> Sizes:
    kinds = {kind: sum(layer.kinds[kind] for layer in layers) for kind in (*COUNTED, OTHERS)}
    experts = tuple(nbytes for layer in layers for nbytes in layer.experts if nbytes)
    return Sizes(kinds, experts, layers[0].n_experts, max(layer.ring_buffer for layer in layers))
