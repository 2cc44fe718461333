"""How many of a model's layers go to the GPU, and the bytes that they hold there. Nothing is read.

In: the bytes of the tensors, a Config, a context, the GPU's budget as its driver tells it. Out: `Offload`, or a
MemoryLimitError that names what would fit. Layers go from the last one on, and the head with them; the embedding stays on
the CPU, as single rows of it are looked up.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from math import prod
from typing import NamedTuple

from llamacli.cpu import kvcache
from llamacli.cpu.buffers import MAX_BATCH
from llamacli.cpu.weights import held_bytes
from llamacli.errors import MemoryLimitError, UsageError
from llamacli.llama4.config import Config
from llamacli.llama4.tensors import Role, find, role_of, tensors
from llamacli.mlx import runtime
from llamacli.plan import machine

DEVICES = ("cpu", "mlx", "auto")
HALF, FULL = 2, 4  # bytes of a float16 and of a float32
EXPERTS_AT_ONCE = 3  # matrices of experts that are widened for a prompt before they are released


class Offload(NamedTuple):
    """Layers on the GPU, and their bytes there.

    `budget`: what the GPU may hold. `streams`: all layers are on the GPU and read some experts when they are needed;
    placement.py then decides how many of them it caches, and `weights` and `kv` are 0.
    """

    layers: int
    weights: int
    kv: int
    working: int
    budget: int
    streams: bool = False

    @property
    def nbytes(self) -> int:
        """All that is held, at the full context."""
        return self.weights + self.kv + self.working


NONE = Offload(0, 0, 0, 0, 0)


def plan_offload(
    gguf,
    config: Config,
    ctx: int,
    device: str,
    gpu_layers: int | None = None,
    experts: str = "auto",
    memory: int | None = None,
) -> Offload:
    """What `device` and `gpu_layers` ask for on this machine. `gpu_layers` None: as many as fit.

    `device`: "cpu"; "mlx"; "auto": the GPU where Metal is, else the CPU. `experts`, `memory`: as for Model.load; if the memory
    does not hold the model, all layers are the GPU's and experts are read into slots. UsageError: another device, MLX is
    missing. MemoryLimitError: the layers do not fit.
    """
    if device not in DEVICES:
        raise UsageError(f"device: expected cpu, mlx or auto, found {device}")
    if gpu_layers is not None and gpu_layers < 0:
        raise UsageError(f"gpu_layers: expected at least 0, found {gpu_layers}; None chooses for you")
    if device == "cpu" or gpu_layers == 0:
        return NONE
    try:
        here = runtime.start()
    except UsageError:
        if device == "auto":
            return NONE
        raise
    if device == "auto" and here.gpu != "Metal":
        return NONE
    if here.gpu:
        sizes, budget = [(t.name, held_bytes(t)) for t in gguf.tensors.values()], here.budget
    else:  # weights are widened to float32, in the machine's memory
        sizes, budget = [(t.name, FULL * prod(t.shape)) for t in gguf.tensors.values()], machine.budget()
    every = gpu_layers is None or gpu_layers >= config.n_layers
    if every and any(map(config.is_moe, range(config.n_layers))) and experts != "mapped":
        least = sum(nbytes for _, nbytes in sizes) + kvcache.nbytes(config, ctx) + working_bytes(config)
        if experts == "slots" or (here.gpu and least > (memory or machine.budget())):
            return Offload(config.n_layers, 0, 0, working_bytes(config), budget, streams=True)
    return place_layers(config, sizes, ctx, budget, gpu_layers, needed=device == "mlx", name=str(gguf.path))


def place_layers(
    config: Config,
    sizes: Iterable[tuple[str, int]],
    ctx: int,
    budget: int,
    gpu_layers: int | None = None,
    *,
    needed: bool = True,
    name: str = "the model",
) -> Offload:
    """The Offload of `gpu_layers`, or of as many as fit into `budget` bytes. `sizes`: each tensor's name and bytes.

    MemoryLimitError: `gpu_layers` do not fit; or, with `needed`, no layer fits.
    """
    head, layers = _by_layer(config, sizes)
    working, kv = working_bytes(config), [_kv(config, ctx, i) for i in range(config.n_layers)]
    held, fits = head + working, 0
    for i in reversed(range(config.n_layers)):
        held += layers[i] + kv[i]
        if held > budget:
            break
        fits += 1
    wanted = fits if gpu_layers is None else min(gpu_layers, config.n_layers)
    if wanted > fits or (needed and not wanted):
        first = config.n_layers - max(1, wanted)
        need = head + working + sum(layers[i] + kv[i] for i in range(first, config.n_layers))
        raise MemoryLimitError(
            f"{name}: expected {need / 1e9:.2f} GB for {max(1, wanted)} layers on the GPU with a context of {ctx} tokens, "
            f"found a budget of {budget / 1e9:.2f} GB; use --gpu-layers {fits}" + (" or --device cpu" if not fits else "")
        )
    if not wanted:
        return NONE
    first = config.n_layers - wanted
    weights = head + sum(layers[i] for i in range(first, config.n_layers))
    return Offload(wanted, weights, sum(kv[first:]), working, budget)


def remaining(config: Config, offload: Offload) -> Config:
    """The model whose memory is to be planned: the CPU's layers and the embedding, or, if experts are read, all of it."""
    return replace(config, n_layers=config.n_layers - offload.layers) if offload.layers and not offload.streams else config


def remains(name: str, config: Config, offload: Offload) -> bool:
    """Whether a tensor is part of that model."""
    found = find(name)
    if not offload.layers or offload.streams or found is None:
        return True
    row, layer = found
    return row.role is Role.EMBEDDING if layer is None else layer < config.n_layers - offload.layers


def working_bytes(config: Config) -> int:
    """Bytes of what a prompt's longest batch holds on the GPU beside weights, keys and values."""
    used = config.n_experts_used if any(map(config.is_moe, range(config.n_layers))) else 0
    pairs = MAX_BATCH * max(1, used)
    rows = FULL * pairs * (4 * config.n_embd + 3 * max(config.n_ff, config.n_ff_exp) + 2 * config.n_q)
    always = Counter()
    for spec in tensors(config):
        if spec.layer is not None and spec.role in (Role.ATTENTION, Role.SHARED, Role.DENSE) and spec.required:
            always[spec.layer] += prod(spec.shape)
    expert = config.n_embd * config.n_ff_exp if used else 0
    return rows + HALF * (max(always.values()) + EXPERTS_AT_ONCE * expert)


def _by_layer(config: Config, sizes: Iterable[tuple[str, int]]) -> tuple[int, Counter]:
    """Bytes of the head, and of each layer."""
    head, layers = 0, Counter()
    for name, nbytes in sizes:
        found = find(name)
        if found is None or role_of(name) is Role.VISION:
            continue
        row, layer = found
        if layer is not None:
            layers[layer] += nbytes
        elif row.role is Role.OUTPUT or (config.tied and row.role is Role.EMBEDDING):
            head += nbytes
    return head, layers


def _kv(config: Config, ctx: int, i: int) -> int:
    """Bytes of layer i's keys and values at the full context."""
    return kvcache.nbytes(replace(config, n_layers=i + 1), ctx) - (kvcache.nbytes(replace(config, n_layers=i), ctx) if i else 0)
