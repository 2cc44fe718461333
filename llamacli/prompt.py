"""A prompt: segments of token ids, and of rows that stand in for embeddings, such as the features of a picture.

In: segments. Out: a list of tokens, one for each position: an int, or a `FeatureRow`. Two feature rows are the same token if
the same row of the same content made them, so prefix reuse never confuses two pictures.
"""

from collections.abc import Iterable, Sequence
from operator import index
from typing import NamedTuple, SupportsIndex

import numpy as np

from llamacli.errors import PromptError


class Features(NamedTuple):
    """A segment of rows."""

    id: int  # the token id that stands at each row's position, such as <|patch|>
    rows: np.ndarray  # float32 [n, n_embd]
    digest: bytes  # a hash of what the rows show


class FeatureRow:
    """One row of a `Features`, as a token. As an index or an int it is the id."""

    __slots__ = ("_key", "id", "row")

    def __init__(self, id: int, row: np.ndarray, key: tuple[bytes, int]):
        """`key`: the digest of the content and the row's number in it."""
        self.id, self.row, self._key = id, row, key

    def __index__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FeatureRow) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"FeatureRow({self.id}, {self._key[0].hex()[:8]}, {self._key[1]})"


Token = int | FeatureRow


def tokens(prompt: Iterable[int | FeatureRow | Features | Sequence[int]]) -> list[Token]:
    """A prompt, as ids or as segments, as a list with one token for each position.

    PromptError for anything else, and for features whose rows are not a matrix.
    """
    if isinstance(prompt, str | bytes):
        raise PromptError("expected token ids or features, found text: encode it first")
    found: list[Token] = []
    for part in prompt:
        if type(part) is int:  # the common case first: checking for a protocol takes microseconds
            found.append(part)
        elif isinstance(part, Features):
            if np.ndim(part.rows) != 2:
                raise PromptError(f"expected a matrix of features, found {np.ndim(part.rows)} dimensions")
            rows = np.ascontiguousarray(part.rows, np.float32)
            found += [FeatureRow(part.id, row, (part.digest, n)) for n, row in enumerate(rows)]
        elif isinstance(part, FeatureRow):
            found.append(part)
        elif isinstance(part, SupportsIndex) and not np.ndim(part):
            found.append(index(part))
        elif isinstance(part, Iterable) and not isinstance(part, str | bytes):
            found += map(index, part)
        else:
            raise PromptError(f"expected token ids or features, found {type(part).__name__}")
    return found
