"""Statistics of a routing log: how often each expert is used, how often by two tokens in a row, and hit rates of slots.

In: a `routing_log.Routing`. Out: arrays with one row for each layer.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from llamacli.bench.routing_log import Routing
from llamacli.cpu.experts import HALF_LIFE


def use(routing: Routing) -> np.ndarray:
    """How often each expert was chosen: int64 [n_layers, n_experts]."""
    n_layers = routing.chosen.shape[1]
    counts = np.zeros((n_layers, routing.n_experts), np.int64)
    for layer in range(n_layers):
        counts[layer] = np.bincount(routing.chosen[:, layer].ravel(), minlength=routing.n_experts)
    return counts


def repeats(routing: Routing) -> np.ndarray:
    """Share of choices that the previous token had made too: float64 [n_layers], NaN if no token follows another."""
    follows = np.flatnonzero(np.diff(routing.positions) == 1) + 1
    if not len(follows):
        return np.full(routing.chosen.shape[1], np.nan)
    now, before = routing.chosen[follows], routing.chosen[follows - 1]
    return (now[..., None] == before[..., None, :]).any(-1).mean((0, 2))


def hit_rates(routing: Routing) -> np.ndarray:
    """Hit rates of the slots: float64 [n_layers, n_experts]; column s - 1 is the share of choices that s slots would hold.

    Each layer's slots start empty and evict the least frequently used expert, a use counting half as much HALF_LIFE choices
    later, as experts.Slots does without its prefetches. Every token counts as if it had been decoded alone.
    """
    n_tokens, n_layers, used = routing.chosen.shape
    hits = np.zeros((n_layers, routing.n_experts), np.int64)
    for layer in range(n_layers):
        distances = [d for d in _stack_distances(routing.chosen[:, layer].ravel().tolist()) if d is not None]
        hits[layer] = np.bincount(distances, minlength=routing.n_experts)
    return hits.cumsum(1) / (n_tokens * used)


def _stack_distances(choices: Sequence[int]) -> Iterator[int | None]:
    """For each choice the largest number of slots that would miss it, or None if it is the expert's first use.

    A cache of s slots always holds a part of what s + 1 slots hold, so one ordered list describes all sizes: `stack[:s]` is the
    content of s slots (Mattson et al. 1970). The requested expert moves to the front. The expert that it displaces sinks until
    it meets one that was used less, takes that place, and that one sinks on, down to where the requested expert was.
    """
    stack: list[int] = []
    uses: dict[int, float] = {}
    worth = 1.0  # weight of the next use; it grows, so that the weights of earlier uses need not be scaled down
    for expert in choices:
        place = stack.index(expert) if expert in uses else None
        yield place
        uses[expert] = uses.get(expert, 0.0) + worth
        if place is not None:
            del stack[place]
        end, sinking = len(stack) if place is None else place, expert
        for i in range(end):
            if i == 0 or uses[stack[i]] < uses[sinking]:
                stack[i], sinking = sinking, stack[i]
        stack.insert(end, sinking)
        worth *= 2 ** (1 / HALF_LIFE)
        if worth > 1e100:
            uses = {e: n / worth for e, n in uses.items()}
            worth = 1.0
