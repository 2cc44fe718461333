"""Options of sessions: the type of keys and values, their files on disk, speculation.

In: what the parser found. Out: a session.
"""

import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from llamacli.cli.grammar import byte_count, option, refuse, size


class KV(StrEnum):
    """Type of keys and values."""

    f16 = "f16"
    q8_0 = "q8_0"
    q4_0 = "q4_0"


KvType = Annotated[
    KV,
    option(
        "--kv",
        metavar="TYPE",
        group="Model",
        aliases=("-ctk", "-ctv", "--cache-type-k", "--cache-type-v"),
        setting=True,
        help="Keys and values: f16 (default), or q8_0 and q4_0, which take half and a quarter of the memory.",
    ),
]

KvFile = Annotated[
    Path | None,
    option(
        "--kv-file",
        metavar="DIR|FILE",
        group="Model",
        complete="file",
        setting=True,
        help="Keys and values that memory does not hold go to a file there, which is gone when the program ends.",
    ),
]


@dataclasses.dataclass
class Storing:
    """The same for all commands that answer."""

    kv: KvType = KV.f16
    kv_file: KvFile = None
    cache: Annotated[
        bool,
        option(
            "--cache",
            group="Model",
            help="Keep keys and values of prompts on disk; a text with the same beginning is then read back.",
        ),
    ] = False
    cache_limit: Annotated[
        str | None,
        option(
            "--cache-limit",
            metavar="SIZE",
            group="Model",
            setting=True,
            check=size,
            help="Most bytes that --cache may take on disk, such as 50G (default: half of the free space).",
        ),
    ] = None

    def __post_init__(self) -> None:
        if not self.cache:
            refuse(("cache_limit",), "--cache with it, found none")

    def snapshots(self, model, exact: bool = False):
        """The snapshots that are asked for, or None."""
        if not self.cache:
            return None
        limit = None if self.cache_limit is None else byte_count(self.cache_limit, "--cache-limit")
        return model.snapshots(limit, exact)


@dataclasses.dataclass
class Keeping(Storing):
    """The same for `run` and `chat`."""

    speculate: Annotated[
        bool,
        option(
            "--speculate",
            group="Model",
            setting=True,
            help="Guess tokens that the text repeats and evaluate several at once: the same text, faster where it pays.",
        ),
    ] = False

    def session(self, model, ctx: int | None = None, exact: bool = False):
        """A session, with snapshots if they are asked for. `exact`: answers have the same bytes as without (snapshots.py)."""
        session = model.session(ctx, self.snapshots(model, exact), exact=exact and not self.cache)
        session.speculate = self.speculate
        return session
