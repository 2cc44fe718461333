"""The routing log: which experts the routers chose for which tokens. Writes it and reads it back.

The log is text, one JSON object a line. The first line is a header: {"routing": 1, "model": NAME, "layers": [numbers of the
layers with experts], "experts": experts in a layer, "used": experts used per token}. Then one line for each batch that went
through the layers (part of a prompt, or one decoded token): {"pos": position of its first token, "experts": [[...], ...]}, one
inner list per token with the chosen experts, layer after layer, `used` numbers each. An incomplete last line is ignored: the
writer was killed.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llamacli.errors import OutputError, PromptError, UsageError
from llamacli.llama4.config import BOUNDS, Config

VERSION = 1
MAX_LOG = 1 << 30  # bytes; larger logs are refused


class Routing(NamedTuple):
    """A log that was read. `positions` int64 [n_tokens], `chosen` int16 [n_tokens, n_layers, used]."""

    model: str
    layers: list[int]  # their numbers in the model
    n_experts: int
    positions: np.ndarray
    chosen: np.ndarray


class RoutingLog:
    """Writes a log. Assign an instance to an engine's `follow_routing`."""

    def __init__(self, path: Path, model: str, config: Config):
        """OutputError: the file exists already or cannot be written. UsageError: the model has no experts."""
        layers = [i for i in range(config.n_layers) if config.is_moe(i)]
        if not layers:
            raise UsageError(f"--routing-log: expected a model with experts, found none in {model}; leave the option out")
        check_new(path)
        self._path, self._layers, self._used = path, layers, config.n_experts_used
        try:
            self._file = path.open("x", buffering=1)  # line buffered: a kill loses at most one line
        except OSError as error:
            raise self._unwritable(error) from None
        sizes = {"layers": layers, "experts": config.n_experts, "used": self._used}
        self._write({"routing": VERSION, "model": model} | sizes)

    def __call__(self, position: int, experts: np.ndarray) -> None:
        """Log a batch: the position of its first token, the experts of all layers [n_layers, n_tokens * used]."""
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
    """OutputError if `path` exists. Called before the model is loaded, which may take long."""
    if path.exists():
        raise OutputError(f"{path}: expected no file for the routing log, found one; choose another name or remove it")


def read(path: Path) -> Routing:
    """Read and check a log; PromptError for a file that is not a routing log."""
    try:
        if path.stat().st_size > MAX_LOG:
            raise PromptError(f"{path}: expected a routing log of at most {MAX_LOG} bytes, found more; log fewer tokens")
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise PromptError(f"{path}: expected a readable routing log, found: {error.strerror}") from None
    if not lines:
        raise PromptError(f"{path}: expected a log that --routing-log wrote, found no whole line; let the model answer first")
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
    """(layers, experts, experts used); KeyError, TypeError or ValueError if the line is not a header."""
    layers, n_experts, used = head["layers"], head["experts"], head["used"]
    if head["routing"] != VERSION or not isinstance(layers, list) or not 1 <= len(layers) <= BOUNDS["n_layers"][1]:
        raise ValueError("not a header of this version")
    if not all(type(n) is int for n in (n_experts, used, *layers)) or not 1 <= used <= n_experts <= BOUNDS["n_experts"][1]:
        raise ValueError("impossible sizes")
    return layers, n_experts, used


def _batch(batch: dict, n_experts: int) -> tuple[int, np.ndarray]:
    """(first position, experts [n_tokens, n_layers * used]); KeyError, TypeError or ValueError if the line is not a batch."""
    position, experts = batch["pos"], np.array(batch["experts"])
    if type(position) is not int or not 0 <= position < 1 << 40 or experts.dtype != np.int64 or experts.ndim != 2:
        raise ValueError("a position and lists of numbers expected")
    if experts.min() < 0 or experts.max() >= n_experts:
        raise ValueError(f"experts from 0 to {n_experts - 1} expected")
    return position, experts
