"""`Piece`, a part of an answer as it streams, and `Stats`, the tokens and seconds that an answer took.

It imports no NumPy: a client of a server (client/) needs nothing else of a session.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from llamacli.device import IoStats


class Piece(NamedTuple):
    """A part of an answer. `text` may be empty; `finish_reason` is set on the last piece only.

    "stop": a stop token or string; "length": max_tokens; "context": no room left; "interrupt": Ctrl-C (then KeyboardInterrupt).
    """

    text: str
    id: int | None
    finish_reason: str | None = None
    logprobs: tuple[float, list[tuple[int, float]]] | None = None  # of `id`, and of the likeliest tokens (Sampler.chosen)


@dataclass
class Stats:
    """What the latest `stream` did, tokens and seconds; the rates are None where nothing was measured."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    decoded: int = 0  # tokens evaluated after the prompt; the first sampled token needs none
    proposed: int = 0  # tokens that were guessed, and those of them that were right
    accepted: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    prefill_io: "IoStats | None" = None  # what was read for the prompt, and after it, if experts are in slots
    decode_io: "IoStats | None" = None

    @property
    def prefill_tps(self) -> float | None:
        """Prompt tokens evaluated per second, without those reused."""
        return (self.prompt_tokens - self.cached_tokens) / self.prefill_s if self.prefill_s else None

    @property
    def decode_tps(self) -> float | None:
        """Tokens evaluated per second after the prompt, with sampling, without the time that the caller takes between
        pieces.
        """
        return self.decoded / self.decode_s if self.decoded and self.decode_s else None
