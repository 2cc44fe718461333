"""Checks this machine: what hardware and packages it has, and whether kernels and models give right results on it.

In: a model's path, an encoder by type. Out: `Finding`s, one after the other; one that cannot be made on this machine gives the
reason.
"""

import os
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from time import perf_counter
from typing import NamedTuple

import numpy as np

from llamacli import Model, __version__
from llamacli.cpu.kernels.cores import default_threads
from llamacli.cpu.kernels.jit.loader import chosen_target
from llamacli.errors import LlamacliError
from llamacli.files.gguf import open_gguf
from llamacli.mlx import runtime
from llamacli.plan import machine

OK, FAILED, SKIPPED = "ok", "failed", "not checked"
PACKAGES = ("numpy", "numba", "llvmlite", "tokenizers", "mlx", "gguf")
MEGABYTES = 256  # of weights for each speed
PRODUCT, WIDENED, LOGITS = 1e-5, 1e-3, 0.05  # largest errors; logits of int8 activations and of float16 differ by more
SLOTS = 1e-3  # the same arithmetic, but for sums in another order
ON_CPU, ON_MLX, IN_SLOTS = "model on the CPU", "model on MLX", "model on MLX, experts in slots"
WAYS = {ON_CPU: {"device": "cpu"}, ON_MLX: {"device": "mlx"}, IN_SLOTS: {"device": "mlx", "experts": "slots"}}
PROMPT, ANSWER, CTX = 128, 32, 256  # tokens
BY_HAND = (  # checks that take hours or gigabytes, or need variables set before the start
    ("a model of Scout's shape", "llamacli bench --shape scout --layers 4 --device mlx"),
    ("command buffers as MLX has them", "MLX_MAX_MB_PER_BUFFER=50 MLX_MAX_OPS_PER_BUFFER=50 llamacli bench --device mlx"),
    ("faster waits (Metal)", "MLX_METAL_FAST_SYNCH=1 llamacli bench --device mlx"),
    ("float16's range in a real model", "llamacli doctor scout.gguf, where logits must be finite"),
    (
        "the limit of memory, for an hour",
        "llamacli chat --device mlx with a model near the budget; with LLAMACLI_WIRED_GB, too",
    ),
)


class Finding(NamedTuple):
    """One check: its result in words, and its numbers."""

    check: str
    state: str
    text: str
    figures: dict


def examine(path: os.PathLike, encoder: Callable, megabytes: int = MEGABYTES) -> Iterator[Finding]:
    """All checks. `encoder(type name)` returns a function from float32 rows to blocks."""
    yield _machine()
    yield _packages()
    try:
        here = runtime.start()
    except LlamacliError as error:
        here = None
        yield Finding("MLX", SKIPPED, str(error), {})
    else:
        yield Finding("MLX", OK, str(here), here._asdict())
    yield from _gpu(here, encoder, megabytes)
    yield _pages(path, here)
    yield from _model(path, here)
    for what, command in BY_HAND:
        yield Finding(what, SKIPPED, f"by hand: {command}", {})


def _machine() -> Finding:
    target = chosen_target()
    figures = {
        "system": platform.platform(),
        "machine": platform.machine(),
        "kernels": target.name,
        "threads": default_threads(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "memory_free_bytes": machine.memory_free(),
        "page_bytes": os.sysconf("SC_PAGE_SIZE"),
    }
    gigabytes = f"{figures['memory_bytes'] / 1e9:.1f} GB of memory, {figures['memory_free_bytes'] / 1e9:.1f} GB free"
    text = f"{figures['system']}, kernels {target.name}, {figures['threads']} threads, {gigabytes}"
    return Finding("machine", OK, text, figures)


def _packages() -> Finding:
    found = {"llamacli": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return Finding("versions", OK, ", ".join(f"{name} {number}" for name, number in found.items()), found)


def _gpu(here: runtime.Runtime | None, encoder: Callable, megabytes: int) -> Iterator[Finding]:
    """Kernels, speeds and waits on the GPU."""
    names = ("kernels against the CPU", "MLX's own product", "a wait for the GPU")
    if here is not None:
        from llamacli.mlx import checks, kernels
    if here is None or kernels.dialect() is None:
        yield from (Finding(name, SKIPPED, "there is no GPU that MLX can use", {}) for name in names)
        return
    with runtime.working("doctor", here.gpu is not None):
        for one in checks.check_kernels(encoder, megabytes):
            right = one.error <= PRODUCT and one.widened_error <= WIDENED
            text = f"error {one.error:.1e}, widened {one.widened_error:.1e}, {one.rate / 1e9:.1f} GB/s"
            yield Finding(f"kernel {one.type_name}", OK if right else FAILED, text, one._asdict())
        rate, wait = checks.own_product_rate(megabytes), checks.wait_seconds()
    yield Finding(names[1], OK, f"{rate / 1e9:.1f} GB/s with 4 bits in groups of 32", {"rate": rate})
    yield Finding(names[2], OK, f"{1e6 * wait:.0f} us; a layer whose experts are fetched needs one", {"seconds": wait})


def _pages(path: os.PathLike, here: runtime.Runtime | None) -> Finding:
    """Whether the GPU reads the file where it is mapped, its last page too, and what that holds."""
    name = "the file's pages on the GPU"
    if here is None:
        return Finding(name, SKIPPED, "MLX is missing", {})
    from llamacli.mlx import checks

    try:
        with runtime.working(path, here.gpu is not None):
            before = machine.resident(), machine.wired()
            found = checks.check_pages(open_gguf(path), here.gpu == "Metal")
            after = machine.resident(), machine.wired()
    except LlamacliError as error:
        return Finding(name, FAILED, str(error), {})
    held = {
        "resident_bytes": after[0] - before[0],
        "wired_bytes": None if None in (before[1], after[1]) else after[1] - before[1],
    }
    text = (
        f"{found.adopted} of {found.tensors} tensors adopted, the others copied"
        if found.adopted
        else "copied: not adopted here"
    )
    text += f"; the last page {'among them' if found.last else 'copied'}" if found.adopted else ""
    text += f"; {held['resident_bytes'] / 1e6:.0f} MB more resident"
    text += "" if held["wired_bytes"] is None else f", {held['wired_bytes'] / 1e6:.0f} MB more wired"
    if found.different:
        text = f"other bytes on the GPU in {len(found.different)} tensors, such as {found.different[0]}"
    return Finding(name, FAILED if found.different else OK, text, found._asdict() | held)


def _model(path: os.PathLike, here: runtime.Runtime | None) -> Iterator[Finding]:
    """The model's speed on the CPU and on MLX, also with experts that are read, and how far apart their logits are."""
    rows = {}
    for name, how in WAYS.items():
        if how["device"] == "mlx" and here is None:
            yield Finding(name, SKIPPED, "MLX is missing", {})
            continue
        try:
            with Model.load(path, ctx=CTX, **how) as model:
                if "experts" in how and not any(map(model.config.is_moe, range(model.config.n_layers))):
                    continue
                found, rows[name] = _speed(model)
                notices = model.engine.notices
        except LlamacliError as error:
            yield Finding(name, FAILED, str(error), {})
            continue
        text = f"prompt {found['prompt_tokens_per_second']:.0f}, answer {found['tokens_per_second']:.1f} tokens/s"
        yield Finding(name, OK, "; ".join((text, *notices)), found | {"notices": notices})
    if ON_CPU in rows and ON_MLX in rows:
        yield _compared("logits of MLX and of the CPU", rows[ON_CPU], rows[ON_MLX], LOGITS)
    if ON_MLX in rows and IN_SLOTS in rows:
        yield _compared("logits of MLX with and without slots", rows[ON_MLX], rows[IN_SLOTS], SLOTS)


def _speed(model: Model) -> tuple[dict, np.ndarray]:
    """Tokens a second of a prompt and of an answer; logits of the prompt's second half, one token after the other."""
    ids = np.random.default_rng(0).integers(0, min(model.config.n_vocab, 10_000), PROMPT).tolist()
    engine = model.engine
    engine.forward(ids, engine.new_cache(CTX))  # compiles
    cache, began = engine.new_cache(CTX), perf_counter()
    engine.forward(ids[: PROMPT - ANSWER], cache)
    prompt = perf_counter() - began
    rows, began = [], perf_counter()
    for token in ids[PROMPT - ANSWER :]:
        rows.append(engine.forward([token], cache).copy())
    answer = perf_counter() - began
    figures = {
        "prompt_tokens_per_second": (PROMPT - ANSWER) / prompt,
        "tokens_per_second": ANSWER / answer,
        "gpu_layers": engine.gpu_layers,
        "resident_bytes": machine.resident(),
    }
    if engine.gpu_layers:
        from llamacli.mlx import checks

        figures["mlx_memory_bytes"] = checks.memory_held()
    return figures, np.array(rows)


def _compared(name: str, one: np.ndarray, other: np.ndarray, bound: float) -> Finding:
    """Logits of the same tokens; the median over tokens counts, as a near tie of two experts moves a token far."""
    finite = bool(np.isfinite(other).all())
    error = np.abs(other - one).max(-1) / np.abs(one).max()
    same = float((other.argmax(-1) == one.argmax(-1)).mean())
    figures = {"median": float(np.median(error)), "largest": float(error.max()), "same_best": same, "finite": finite}
    right = finite and figures["median"] <= bound
    text = (
        f"median difference {figures['median']:.1e}, largest {figures['largest']:.1e}, {100 * same:.0f} % the same best token"
    )
    return Finding(name, OK if right else FAILED, text, figures)
