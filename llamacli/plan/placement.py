"""Plans what is resident within a memory limit, and how fast the model should then run. Nothing is read.

In: a Config, the bytes of the tensors by role, a memory limit, a context. Out: a frozen `Placement`, or a MemoryLimitError that
names what would fit; expected seconds from the speeds of disk and memory.

The weights that every token uses (attention, shared experts, routers, norms, output) and the KV cache are resident. Routed
experts are all mapped if everything fits. Otherwise each layer caches some experts in slots and reads the others when they are
needed. The embedding stays in the file too: a token touches one row of it and the pages around that row. A mapped file larger
than memory would run as well, but then the kernel decides what is resident, and we could not keep the limit. Keys and values
may be in a file as well (cpu/kvfile.py): then a window of them is resident, which gets half of what would be left for experts.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from llamacli.cpu import buffers, kvcache, kvfile
from llamacli.cpu.buffers import MAX_BATCH
from llamacli.cpu.experts import RING, slots_per_layer
from llamacli.cpu.kernels.cores import default_threads
from llamacli.cpu.weights import has_kernels, held_bytes
from llamacli.errors import MemoryLimitError, UsageError
from llamacli.llama4.config import Config
from llamacli.llama4.tensors import Role, find, role_of
from llamacli.plan import machine
from llamacli.plan.offload import NONE, Offload, remaining, remains

PROGRAM, TOKEN = 130_000_000, 1000  # bytes of Python, NumPy and compiled code; bytes of a vocabulary entry. Measured
LEAST_BATCH = 64  # the smallest batch of prompt tokens
LONG_CTX = 8192  # where a longer context is asked for, prompts are long:
LONG_BATCH = 8192  # experts are read once for so many tokens
AROUND = 64 << 10  # bytes that a page fault maps around the touched one, if they are in the page cache
CTX_STEP = 1024  # a context that is trimmed is a multiple of it
LAYER_SECONDS = 30e-6  # a token's least time in a layer: its steps, their barriers, Python around them; measured
REACHED_READING, REACHED_MULTIPLYING = 0.84, 0.54  # shares of the limits (bench/limits.py) that decode and prefill reach
COUNTED = (Role.EXPERTS, Role.SHARED, Role.ATTENTION, Role.DENSE, Role.EMBEDDING, Role.OUTPUT)
OTHERS = "norms and routers"  # every other tensor


class Sizes(NamedTuple):
    """Bytes of a model's weights. `kinds`: by role (COUNTED and OTHERS). `experts`: of one routed expert, for each layer with
    experts. `ring_buffer`: of one buffer of the ring through which prompts read experts (cpu/experts.py).
    """

    kinds: dict[str, int]
    experts: tuple[int, ...]
    n_experts: int
    ring_buffer: int

    @property
    def routed(self) -> int:
        """All routed experts."""
        return self.kinds[Role.EXPERTS]

    @property
    def one_per_layer(self) -> int:
        """One routed expert of every layer: one slot in each."""
        return sum(self.experts)

    @property
    def looked_up(self) -> int:
        """The embedding, unless it is tied to the output."""
        return self.kinds[Role.EMBEDDING] if self.kinds[Role.OUTPUT] else 0

    @property
    def always(self) -> int:
        """The weights that every token uses."""
        return sum(self.kinds.values()) - self.routed - self.looked_up


def size_by_kind(tensors: Iterable[tuple[str, int]], config: Config) -> Sizes:
    """The sizes of a model from its tensors' GGUF names and bytes.

    Experts of layers that the model does not have and vision tensors are never read, so they are not counted.
    """
    kinds, n = dict.fromkeys((*COUNTED, OTHERS), 0), max(1, config.n_experts)
    layers = {i: 0 for i in range(config.n_layers) if config.is_moe(i)}
    parts: Counter[tuple[int, bool]] = Counter()
    for name, nbytes in tensors:
        role = role_of(name)
        if role is Role.EXPERTS:
            row, i = find(name)
            if i not in layers:
                continue
            layers[i] += nbytes // n
            parts[i, row.kind == "ffn_down_exps"] += nbytes // n
        if role is not Role.VISION:
            kinds[role if role in COUNTED else OTHERS] += nbytes
    experts = tuple(layers.values()) if any(layers.values()) else ()
    return Sizes(kinds, experts, config.n_experts, max(parts.values(), default=0))


@dataclass(frozen=True)
class Placement:
    """What is resident. Sizes in bytes; `resident` is their sum, reached at the full context."""

    memory: int  # the limit
    ctx: int
    mode: str  # "mapped": all weights in memory as they lie in the file; "slots": some routed experts, the rest in the file
    n_slots: int  # of all layers; all experts if mapped
    weights: int  # always used; if mapped, all
    experts: int  # in slots
    kv: int  # at the full context
    working: int  # the engine's buffers and the program
    buffers: int  # for experts being read in prefill
    rows: int  # pages of the embedding that tokens touched
    batch: int  # tokens of a prompt that go through a layer together
    sizes: Sizes
    config: Config
    kv_files: int = 0  # sequences whose keys and values are in files as far as they do not fit; 0: all are in memory
    window: int = 0  # positions of each of these in memory

    @property
    def resident(self) -> int:
        """Memory held at the full context."""
        return self.weights + self.experts + self.kv + self.working + self.buffers + self.rows

    @property
    def slots(self) -> float:
        """Slots of a layer, on average."""
        return self.n_slots / max(1, len(self.sizes.experts))

    @property
    def miss(self) -> float:
        """The share of chosen experts that must be read from the file, if all are chosen equally often."""
        return 1 - self.slots / self.sizes.n_experts if self.sizes.experts else 0.0

    @property
    def read_per_token(self) -> float:
        """Bytes from the model's file for a decoded token."""
        return self.miss * self.config.n_experts_used * self.sizes.one_per_layer

    def kv_read_per_token(self, depth: int) -> int:
        """Bytes of keys and values from their file for a token decoded after `depth` others."""
        if not self.kv_files:
            return 0
        return kvfile.bytes_per_token(self.config, min(depth, self.ctx - 1), self.ctx, self.window, self.batch)

    @property
    def kv_disk(self) -> int:
        """Bytes of the files of keys and values at the full context."""
        return self.kv_files * kvfile.file_bytes(self.config, self.ctx, self.window, self.batch) if self.kv_files else 0


def place(
    config: Config,
    sizes: Sizes,
    memory: int,
    ctx: int,
    *,
    threads: int = 1,
    name: str = "the model",
    slots: bool = False,
    kv_files: int = 0,
    beside: int = 0,
) -> Placement:
    """Decide what is resident within `memory` bytes at a context of `ctx` tokens.

    `slots`: even if everything would fit. `kv_files`: so many sequences may keep keys and values in files. `beside`: bytes that
    `memory` leaves out, such as a vision tower's; messages count them. MemoryLimitError if that cannot hold the always-used
    weights, keys and values, and the experts of one token.
    """
    batch, everything = batch_within(config, memory, threads), sizes.always + sizes.looked_up + sizes.routed
    while True:
        kv, working = _kv(config, ctx, batch, kv_files), _program(config) + working_bytes(config, threads, batch, kv_files)
        if everything + kv + working <= memory and not (slots and sizes.experts):
            n_slots = sizes.n_experts * len(sizes.experts)
            window = _window(config, ctx, batch, kv_files, memory - everything - kv - working)
            kv = _kv(config, ctx, batch, kv_files, window)
            held = n_slots, everything, 0, kv, working, 0, 0, batch
            return Placement(memory, ctx, "mapped", *held, sizes, config, kv_files, window)
        least = sizes.always + kv + working + _least(config, sizes, batch, slots)
        if least <= memory or batch <= LEAST_BATCH:
            break
        batch //= 2  # with smaller batches a model that fits less memory always fits more memory, too
    if least > memory:
        fits = fit_ctx(config, sizes, memory, ctx, threads=threads, slots=slots, kv_files=kv_files)
        parts = f"weights of every token {_gb(sizes.always)}, KV cache of {ctx} tokens {_gb(kv)}, working memory {_gb(working)}"
        if beside:
            parts += f", beside the model {_gb(beside)}"
        other = f"--ctx {fits} or {'' if kv_files else '--kv-file DIR or '}" if fits else ""
        # Rounded up and down, so that the message never shows equal numbers.
        needed, found = -(-(least + beside) // 10**7) * 10**7, (memory + beside) // 10**7 * 10**7
        raise MemoryLimitError(
            f"{name}: expected at least {_gb(needed)} of memory ({parts}, the rest for experts), found {_gb(found)}; "
            f"use {other}--memory {-(-needed // 10**8) / 10:.1f}G"
        )
    if ctx > LONG_CTX and sizes.experts:
        larger = batch_within(config, memory, threads, LONG_BATCH)
        more = working_bytes(config, threads, larger, kv_files) - working_bytes(config, threads, batch, kv_files)
        more += _kv(config, ctx, larger, kv_files) - kv
        if sizes.always + kv + working + more + _least(config, sizes, larger, True) <= memory:
            batch, kv = larger, _kv(config, ctx, larger, kv_files)
            working = _program(config) + working_bytes(config, threads, batch, kv_files)
    window = 0
    if kv_files:
        spare = memory - sizes.always - kv - working - _least(config, sizes, batch, True)
        window = _window(config, ctx, batch, kv_files, spare // 2)
        kv = _kv(config, ctx, batch, kv_files, window)
    buffers, rows = RING * sizes.ring_buffer, _rows(config, sizes, batch)
    each, rest = divmod(memory - sizes.always - kv - working - rows - buffers, sizes.one_per_layer)
    more = bisect_right(list(accumulate(sizes.experts)), rest)
    n_slots = min(sizes.n_experts * len(sizes.experts), each * len(sizes.experts) + more)
    experts = sum(n * nbytes for n, nbytes in zip(slots_per_layer(n_slots, len(sizes.experts)), sizes.experts, strict=True))
    held = n_slots, sizes.always, experts, kv, working, buffers, rows, batch
    return Placement(memory, ctx, "slots", *held, sizes, config, kv_files, window)


def fit_ctx(
    config: Config,
    sizes: Sizes,
    memory: int,
    ctx: int,
    *,
    threads: int = 1,
    slots: bool = False,
    kv_files: int = 0,
) -> int:
    """The largest context up to `ctx` that `place` accepts, a multiple of CTX_STEP if it is less; 0 if there is none."""
    batch = LEAST_BATCH
    room = (
        memory
        - _program(config)
        - working_bytes(config, threads, batch, kv_files)
        - sizes.always
        - _least(config, sizes, batch, slots)
    )
    fits = bisect_right(range(ctx + 1), room, key=lambda n: _kv(config, n, batch, kv_files)) - 1
    return ctx if fits == ctx else max(0, fits) // CTX_STEP * CTX_STEP


def _kv(config: Config, ctx: int, batch: int, kv_files: int, window: int = 0) -> int:
    """Bytes of memory for keys and values, with those for reading them if they are in files."""
    if not kv_files:
        return kvcache.nbytes(config, ctx)
    return kv_files * kvfile.nbytes(config, ctx, window, batch) + kvfile.RING * kvfile.block_bytes(config)


def _window(config: Config, ctx: int, batch: int, kv_files: int, spare: int) -> int:
    """Positions that `spare` more bytes hold of each sequence, with those that there is room for in any case."""
    each = kv_files and kv_files * len(kvfile.seeing_all(config)) * kvfile.block_bytes(config)
    if not each:
        return 0
    blocks = kvfile.slots(ctx, 0, batch) + max(0, spare) // each
    return min(blocks, -(-ctx // kvfile.POSITIONS)) * kvfile.POSITIONS


def _program(config: Config) -> int:
    return PROGRAM + TOKEN * config.n_vocab


def _rows(config: Config, sizes: Sizes, batch: int) -> int:
    """Bytes of the embedding that a batch makes resident until they are dropped: a row and its pages for each token."""
    embedding = sizes.kinds[Role.EMBEDDING]
    return min(embedding, batch * (embedding // config.n_vocab + AROUND))


def _least(config: Config, sizes: Sizes, batch: int, slots: bool = False) -> int:
    """The least memory for routed experts and embedding: the experts of one token, the ring, and rows of the embedding.

    Without `slots` also their whole size, if that is smaller.
    """
    rest = sizes.routed + sizes.looked_up
    if not sizes.experts:
        return rest
    few = config.n_experts_used * sizes.one_per_layer + RING * sizes.ring_buffer + _rows(config, sizes, batch)
    return few if slots else min(few, rest)


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"


@lru_cache(1024)
def working_bytes(config: Config, threads: int, batch: int, kv_files: int = 0) -> int:
    """Bytes of the buffers of an engine whose `max_batch` is `batch`, for its longest batches."""
    fetched = {"slots": any(map(config.is_moe, range(config.n_layers))), "kv_file": kv_files > 0}
    return buffers.nbytes(buffers.shapes(config, range(config.n_layers), buffers.tokens(config, batch), threads, **fetched))


# expected speed


def decode_seconds(p: Placement, disk: float, bandwidth: float, depth: int = 0) -> float:
    """Expected seconds for a token after `depth` others. `disk` and `bandwidth` (of memory) are in bytes a second.

    Decoding reads each byte that the token needs from memory once, at REACHED_READING of the bandwidth. A missing expert is
    first read from the disk. That read begins after the layer's router and ends before the next layer, so it overlaps only with
    the products of the layer's shared and routed experts: the longer of the two counts, and all other times are added. All
    experts are assumed to be equally likely. Keys and values from a file are read while attention multiplies others, so of
    these two times, too, the longer one counts. LAYER_SECONDS is the overhead of a layer's steps; it matters for small models.
    """
    sizes, k, reached = p.sizes, p.config.n_experts_used, REACHED_READING * bandwidth
    attention = max(kvcache.nbytes(p.config, depth) / reached, p.kv_read_per_token(depth) / disk)
    before = (sizes.always - sizes.kinds[Role.SHARED]) / reached + attention
    beside = (sizes.kinds[Role.SHARED] + k * sizes.one_per_layer) / reached
    reading = k * sizes.one_per_layer / disk
    return before + (1 - p.miss) * beside + p.miss * max(beside, reading) + p.config.n_layers * LAYER_SECONDS


def prefill_seconds(p: Placement, tokens: int, disk: float, multiply: float | None) -> float:
    """Expected seconds for a prompt of `tokens` tokens: the time to read experts or the time to compute, whichever is longer.

    Each batch reads every expert that it uses once, or none if the experts are mapped. `multiply` is the machine's limit in
    operations a second, a multiply-add being two; None: reading alone. The products of attention with the context are not
    counted, so a long prompt takes longer.
    """
    passes, rest = divmod(tokens, p.batch)
    touched = passes * _touched(p, p.batch) + _touched(p, rest)
    reading = touched * p.sizes.routed / disk if p.mode == "slots" else 0.0
    computing = 2 * tokens * products_per_token(p.config) / (REACHED_MULTIPLYING * multiply) if multiply else 0.0
    return max(reading, computing)


def _touched(p: Placement, tokens: int) -> float:
    """The share of a layer's experts that at least one of `tokens` chooses."""
    return 1 - (1 - p.config.n_experts_used / p.sizes.n_experts) ** tokens if p.sizes.experts else 0.0


def products_per_token(config: Config) -> int:
    """Multiply-adds of weights for one token in all layers."""
    c = config
    attended = c.n_embd * 2 * (c.n_q + c.n_kv)
    mixture = c.n_experts + 3 * c.n_ff_exp * (1 + c.n_experts_used)
    return sum(attended + c.n_embd * (mixture if c.is_moe(i) else 3 * c.n_ff) for i in range(c.n_layers))


# at load


class Residency(NamedTuple):
    """What Engine and machine.reserve are told.

    `slots`: of all layers; 0: all experts are mapped. `batch`: the largest. `window`: positions of a kvfile.KVFile's. `nbytes`:
    to reserve. `room`: bytes of the memory that are left; None where no limit is kept.
    """

    slots: int
    batch: int
    window: int
    nbytes: int
    room: int | None


def plan_residency(
    gguf,
    config: Config,
    ctx: int,
    threads: int | None,
    memory: int | None,
    experts: str,
    beside: int = 0,
    offload: Offload = NONE,
    kv_files: int = 0,
) -> Residency:
    """How the model at hand is held.

    `memory`: bytes for all models of this process; None: what the machine has free, less a reserve. What other models have
    reserved is subtracted. `experts`: "mapped", "slots" or "auto". `beside`: bytes that its user will hold beside the model.
    `offload`: layers that are the GPU's; what it holds of them is held in the same memory. `kv_files`: as for `place`.
    """
    if experts not in ("mapped", "slots", "auto"):
        raise UsageError(f"experts: expected mapped, slots or auto, found {experts}")
    tensors = [t for t in gguf.tensors.values() if remains(t.name, config, offload)]
    config, beside, threads = remaining(config, offload), beside + offload.nbytes, threads or default_threads()
    sizes = size_by_kind(((t.name, held_bytes(t)) for t in tensors), config)
    if any(role_of(t.name) is Role.EMBEDDING and not has_kernels(t) for t in tensors):  # as float16 it cannot stay in the file
        sizes.kinds[OTHERS] += sizes.kinds[Role.EMBEDDING]
        sizes.kinds[Role.EMBEDDING] = 0
    if experts == "mapped" or (not config.n_experts and memory is None):
        _check_converted(gguf, tensors, (memory or machine.budget() + machine.private()) - machine.reserved() - beside)
        needed = sizes.always + sizes.looked_up + sizes.routed + _program(config) + beside
        needed += working_bytes(config, threads, MAX_BATCH, kv_files)
        kv = _kv(config, ctx, MAX_BATCH, kv_files)
        free = machine.budget() + machine.private() - machine.reserved() if kv_files else 0
        window = _window(config, ctx, MAX_BATCH, kv_files, free - needed - kv)
        return Residency(0, MAX_BATCH, window, needed + _kv(config, ctx, MAX_BATCH, kv_files, window), None)
    gone = machine.reserved() + beside
    memory = max(0, (memory or machine.budget() + machine.private()) - gone)
    if offload.streams:
        memory, experts = min(memory, offload.budget - offload.working), "slots"
    how = {"threads": threads, "name": str(gguf.path), "slots": experts == "slots", "kv_files": kv_files, "beside": gone}
    p = place(config, sizes, memory, ctx, **how)
    slots = p.n_slots if p.mode == "slots" else 0
    return Residency(slots, p.batch, p.window, p.resident + beside, memory - p.resident)


def _check_converted(gguf, tensors: Iterable, memory: int) -> None:
    """MemoryLimitError if tensors that become float16 do not fit: a file's own pages can be read again, these cannot."""
    converted = [t for t in tensors if not has_kernels(t)]
    if converted and (needed := sum(map(held_bytes, converted))) > memory:
        raise MemoryLimitError(
            f"{gguf.path}: expected {_gb(needed)} of memory for {len(converted)} tensors of types without fast kernels "
            f"({converted[0].type.name}), which become F16, found {_gb(max(0, memory))}; use a file of another type"
        )


def plan_more_contexts(held: Residency, most: int, *asked) -> tuple[int, Residency]:
    """How many contexts fit besides, up to `most`, with all weights mapped and the batch of `held`; and what is held then.

    `asked`: the arguments that plan_residency was called with, up to `beside`.
    """
    *asked, beside = asked
    for more in range(most, 0, -1):
        try:
            found = plan_residency(*asked, beside + more * kvcache.nbytes(asked[1], asked[2]))
        except MemoryLimitError:
            continue
        if not found.slots and found.batch == held.batch:
            return more, found
    return 0, held


def batch_within(config: Config, memory: int, threads: int, most: int = MAX_BATCH) -> int:
    """The batch size: the largest up to `most` whose buffers fit in a sixteenth of the memory.

    Larger batches read the experts less often, but their buffers leave less memory for slots.
    """
    batch = most
    while batch > LEAST_BATCH and working_bytes(config, threads, batch) > memory // 16:
        batch //= 2
    return batch
