"""Which experts a model chose for which tokens: a log of it, written while it answers, and what the log tells about caching.

In: positions and experts, batch by batch, or a log. Out: a text file, one JSON object a line; numbers over it. Knows nothing of
engines or terminals.

The first line says what follows: {"routing": 1, "model": NAME, "layers": [those with experts], "experts": how many there are in
a layer, "used": how many of them a token passes}. Then a line for each batch that went through the layers (a prompt's, or one
decoded token): {"pos": position of its first token, "experts": [[...], ...]}, a list a token, in it the chosen
experts, layer after layer, `used` numbers each. A last line without its end is passed over: the writer was killed.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llamacli.cpu.experts import HALF_LIFE
from llamacli.errors import OutputError, PromptError, UsageError
from llamacli.llama4.config import Config

VERSION = 1
MAX_LOG = 1 << 30  # bytes of a log that is read
MAX_LAYERS, MAX_EXPERTS = 1 << 10, 1 << 12  # what config.py allows


class Routing(NamedTuple):
    """A log read back. `positions` int64 [n_tokens], `chosen` int16 [n_tokens, n_layers, used]."""

    model: str
    layers: list[int]  # the model's numbers for them
    n_experts: int
    positions: np.ndarray
    chosen: np.ndarray


class RoutingLog:
    """Writes a log; an instance is what an engine's `follow_routing` may be."""

    def __init__(self, path: Path, model: str, config: Config):
        """OutputError if there is a file already; UsageError if the model has no experts to choose from."""
        layers = [i for i in range(config.n_layers) if config.is_moe(i)]
        if not layers:
            raise UsageError(f"--routing-log: expected a model with experts, found none in {model}; leave the option out")
        check_new(path)
        self._path, self._layers, self._used = path, layers, config.n_experts_used
        try:
            self._file = path.open("x", buffering=1)  # line by line, so that a kill loses one token at most
        except OSError as error:
            raise self._unwritable(error) from None
        sizes = {"layers": layers, "experts": config.n_experts, "used": self._used}
        self._write({"routing": VERSION, "model": model} | sizes)

    def __call__(self, position: int, experts: np.ndarray) -> None:
        """Note a batch: the first token's position, experts of all layers, [n_layers, n_tokens * used]."""
        by_token = experts[self._layers].reshape(len(self._layers), -1, self._used).swapaxes(0, 1)
        self._write({"pos": position, "experts": by_token.reshape(len(by_token), -1).tolist()})

    def _write(self, record: dict) -> None:
        try:
            self._file.write(json.dumps(record, separators=(",", ":")) + "\n")
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(f"{self._path}: expected to write the routing log, found: {error.strerror}; choose another place")


def check_new(path: Path) -> None:
    """OutputError if something is at `path`: better before a model is loaded than after it."""
    if path.exists():
        raise OutputError(f"{path}: expected no file for the routing log, found one; choose another name or remove it")


def read(path: Path) -> Routing:
    """Read and check a log; PromptError for what is none."""
    try:
        if path.stat().st_size > MAX_LOG:
            raise PromptError(f"{path}: expected a routing log of at most {MAX_LOG} bytes, found more; log fewer tokens")
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise PromptError(f"{path}: expected a readable routing log, found: {error.strerror}") from None
    number = 0
    try:
        head = json.loads(lines[0])
        layers, n_experts, used = _header(head)
        positions, chosen = [], [np.empty((0, len(layers), used), np.int16)]
        for line in lines[1:]:
            number += 1
            position, experts = _batch(json.loads(line), n_experts)
            positions.append(position + np.arange(len(experts)))
            chosen.append(experts.reshape(len(experts), len(layers), used).astype(np.int16))
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        reason = str(error).splitlines()[0][:80] if str(error) else type(error).__name__
        raise PromptError(
            f"{path}: expected a log that --routing-log wrote, found something else in line {number + 1} ({reason})"
        ) from None
    if not positions:
        raise PromptError(f"{path}: expected a routing log with some tokens, found none; let the model answer first")
    return Routing(str(head.get("model"))[:200], layers, n_experts, np.concatenate(positions), np.concatenate(chosen))


def _header(head: dict) -> tuple[list[int], int, int]:
    """Layers, experts, experts used; KeyError, TypeError or ValueError for a line that is no header."""
    layers, n_experts, used = head["layers"], head["experts"], head["used"]
    if head["routing"] != VERSION or not isinstance(layers, list) or not 1 <= len(layers) <= MAX_LAYERS:
        raise ValueError("no header of this version")
    if not all(type(n) is int for n in (n_experts, used, *layers)) or not 1 <= used <= n_experts <= MAX_EXPERTS:
        raise ValueError("sizes that make no sense")
    return layers, n_experts, used


def _batch(batch: dict, n_experts: int) -> tuple[int, np.ndarray]:
    """The first position, experts [n_tokens, all of a token]; KeyError, TypeError or ValueError for anything else."""
    position, experts = batch["pos"], np.array(batch["experts"])
    if type(position) is not int or not 0 <= position < 1 << 40 or experts.dtype != np.int64 or experts.ndim != 2:
        raise ValueError("a position and lists of numbers expected")
    if experts.min() < 0 or experts.max() >= n_experts:
        raise ValueError(f"experts from 0 to {n_experts - 1} expected")
    return position, experts


# what it tells


def use(routing: Routing) -> np.ndarray:
    """How often each expert was chosen: int64 [n_layers, n_experts]."""
    n_layers = routing.chosen.shape[1]
    counts = np.zeros((n_layers, routing.n_experts), np.int64)
    for layer in range(n_layers):
        counts[layer] = np.bincount(routing.chosen[:, layer].ravel(), minlength=routing.n_experts)
    return counts


def repeats(routing: Routing) -> np.ndarray:
    """The share of choices that the token before had made too: float64 [n_layers], NaN where no token follows another."""
    follows = np.flatnonzero(np.diff(routing.positions) == 1) + 1
    if not len(follows):
        return np.full(routing.chosen.shape[1], np.nan)
    now, before = routing.chosen[follows], routing.chosen[follows - 1]
    return (now[..., None] == before[..., None, :]).any(-1).mean((0, 2))


def hit_rates(routing: Routing) -> np.ndarray:
    """What slots would bring: float64 [n_layers, n_experts], in column s - 1 the share of choices found among s slots.

    A layer's slots are filled as experts.Slots fills them, wrong guesses apart: the least used of late gives way. All start
    empty, and every token counts, as if each had been decoded. Fewer slots always hold a part of what more slots hold, so each
    layer has one list of experts, the first s of which are in s slots (Mattson et al. 1970): who is asked for comes first, and
    each place after it, down to where that one was, keeps the more used of who was there and who was pushed out above.
    """
    n_tokens, n_layers, used = routing.chosen.shape
    hits, rows, places = np.zeros((n_layers, routing.n_experts), np.int64), np.arange(n_layers), np.arange(routing.n_experts)
    uses, order, seen = np.zeros(hits.shape), np.tile(places, (n_layers, 1)), np.zeros(hits.shape, bool)
    for experts in routing.chosen.transpose(0, 2, 1).reshape(n_tokens * used, n_layers):
        place = (order == experts[:, None]).argmax(1)
        warm = seen[rows, experts]
        hits[rows[warm], place[warm]] += 1
        uses *= 0.5 ** (1 / HALF_LIFE)
        uses[rows, experts] += 1
        seen[rows, experts] = True
        here = np.take_along_axis(uses, order, 1)
        moved = here < np.minimum.accumulate(np.pad(here, ((0, 0), (1, 0)), constant_values=np.inf), 1)[:, :-1]
        moved[rows, place] = True
        from_above = np.pad(np.maximum.accumulate(np.where(moved, places, 0), 1), ((0, 0), (1, 0)))[:, :-1]
        order = np.where(moved & (places <= place[:, None]), np.take_along_axis(order, from_above, 1), order)
        order[:, 0] = experts
    return hits.cumsum(1) / (n_tokens * used)
