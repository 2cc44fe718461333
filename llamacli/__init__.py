"""llamacli: Llama 4 GGUF files in the terminal and from Python.

In: the path of a GGUF. Out: `Model`, with text, logits and sessions. The engine and Numba are imported by `Model.load`, never
here, so that help and completion stay fast.

    from llamacli import Model
    model = Model.load("file.gguf", threads=2, ctx=4096)
    for piece in model.stream(messages=[{"role": "user", "content": "Hello"}], max_tokens=64, temp=0):
        print(piece.text, end="")
"""

from __future__ import annotations

from llamacli.errors import (
    CheckpointError,
    ContextFullError,
    DeviceError,
    DownloadError,
    LlamacliError,
    MemoryLimitError,
    ModelFileError,
    OutputError,
    PictureError,
    PromptError,
    UnsupportedModelError,
    UsageError,
)

TYPE_CHECKING = False  # as type checkers know it; importing `typing` would delay the handling of Ctrl-C (__main__.py)
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from os import PathLike

    import numpy as np

    from llamacli.files.gguf import GGUF
    from llamacli.session import Piece, Session
    from llamacli.snapshots import Snapshots
    from llamacli.text.constraint import Constraint
    from llamacli.tools.loop import Toolbox
    from llamacli.vision.sight import Sight

__all__ = [
    "CheckpointError",
    "ContextFullError",
    "DeviceError",
    "DownloadError",
    "LlamacliError",
    "MemoryLimitError",
    "Model",
    "ModelFileError",
    "OutputError",
    "PictureError",
    "PromptError",
    "UnsupportedModelError",
    "UsageError",
]
__version__ = "0.1.0"

DRY_BREAKERS = ("\n", ":", '"', "*")
FILE_SAMPLING = {  # general.sampling.* to keywords of Sampler
    **{name: name for name in ("temp", "top_k", "top_p", "min_p", "xtc_probability", "xtc_threshold")},
    **{"penalty_last_n": "repeat_last_n", "penalty_repeat": "repeat_penalty"},
    **{"mirostat_tau": "mirostat_tau", "mirostat_eta": "mirostat_eta"},
}
KV_TYPES = ("F16", "Q8_0", "Q4_0")
DEFAULT_CTX = 8192  # tokens; a file's own limit may be 10 million, too many for any memory


class Model:
    """A loaded model. Threads may share it: calls of the engine wait for each other; a session belongs to one thread at a time.

    `tokenizer` and `config` are the file's; `ctx` is the limit of a session's tokens; `defaults` are the sampling values that
    the file asks for, else Llama 4's own (temp 0.6, top_p 0.9).
    """

    _made_grammars = None
    sessions = 1  # that may hold a full context at a time

    def __init__(
        self,
        gguf,
        config,
        tokenizer,
        engine,
        ctx: int,
        nbytes: int = 0,
        mmproj: GGUF | None = None,
        room: int | None = None,
    ):
        """`nbytes`: the most bytes that the model may hold; models that are loaded later must leave them free. `mmproj`: its
        vision tower, whose bytes `nbytes` includes. A tower that is opened later takes its bytes from `room` (None: no limit)
        and from slots.
        """
        from threading import Lock

        from llamacli.plan.machine import reserve

        self._releases, self._room, self._opening = [reserve(engine, nbytes)], room, Lock()
        self.gguf, self.config, self.tokenizer, self.engine, self.ctx = gguf, config, tokenizer, engine, ctx
        self.defaults = sampling_defaults(gguf.metadata)
        self._mmproj, self._sight = mmproj, None

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        threads: int | None = None,
        ctx: int | None = None,
        memory: int | None = None,
        experts: str = "auto",
        logits_rows: int = 0,
        device: str = "cpu",
        gpu_layers: int | None = None,
        kv: str = "f16",
        mmproj: str | PathLike[str] | bool = False,
        sessions: int = 1,
        kv_file: str | PathLike[str] | None = None,
        cluster: str | None = None,
        cluster_layers: Sequence[int] = (),
        told=None,
        more_sessions: int = 0,
    ) -> Model:
        """Open a GGUF (of a split one, the first part). `threads` None: as many as suit the machine. `ctx` None: 8192 at most.

        `memory`: bytes that the process will stay below (None: what the machine has free, less a reserve). `experts`: "mapped",
        used where they lie in the file; "slots", some of them kept in memory and the others read when they are needed; "auto",
        slots if the model does not fit into the memory. `logits_rows`: rows of logits that the caller keeps at a time; they
        count as the model's memory. `device`: "cpu"; "mlx", layers on a GPU through MLX; "auto", the same where Metal is, else
        the CPU. `gpu_layers`: how many of the last layers go there, None: as many as its memory holds. `kv`: type of keys and
        values, "f16", "q8_0" or "q4_0"; on a GPU the first only. `mmproj`: the file of the vision tower, or True for the one
        beside the model; memory is kept for it. False: the one beside the model is opened with the first picture, and takes its
        memory from what is left, then from slots; MemoryLimitError if that is too little. `sessions`: how many will hold a full
        context at a time; the memory is planned for them. `kv_file`: a folder, or the path of a file that does not exist, for
        the keys and values that memory does not hold; nothing is left there. `cluster`: the address of a cluster whose nodes
        hold the layers (docs/cluster.md); `memory` and `threads` are then each node's. `cluster_layers`: how many each node
        gets, empty: chosen by memory and speed. `told`: called with a line when a node is left out or lost. `more_sessions`:
        the most sessions beyond `sessions`. They only take memory that is left when all weights are in memory; they change
        nothing else in the plan. The attribute `sessions` is the total.

        UsageError for counts below 1, ModelFileError if the file is damaged, UnsupportedModelError if the engine cannot run a
        sound file, MemoryLimitError if the memory cannot hold the weights that every token uses.
        """
        from concurrent.futures import ThreadPoolExecutor
        from dataclasses import replace
        from pathlib import Path

        from llamacli.files.gguf import open_gguf
        from llamacli.llama4.config import Config

        for name, value in (("threads", threads), ("ctx", ctx), ("memory", memory)):
            if value is not None and value < 1:
                raise UsageError(f"{name}: expected at least 1, found {value}; None chooses for you")
        gguf = open_gguf(path)
        if kv.upper() not in KV_TYPES:
            raise UsageError(f"kv: expected {', '.join(KV_TYPES).lower()}, found {kv}")
        config = replace(Config.from_gguf(gguf), kv_type=kv.upper())
        ctx = ctx or default_ctx(config)
        if cluster:
            if kv_file is not None:
                raise UsageError(
                    "--kv-file: expected a model on this machine alone, found a cluster, whose nodes keep keys and values in "
                    "memory; leave one of them out, or add --cluster none"
                )
            where = cluster, tuple(cluster_layers)
            held = sessions, more_sessions
            return cls._load_on_cluster(gguf, config, ctx, where, threads, memory, experts, device, told, mmproj, held)
        with ThreadPoolExecutor(1) as beside:  # a large vocabulary takes a second, about as long as the compiled kernels
            tokenizer = beside.submit(_tokenizer, gguf)
            from llamacli.cpu import kvcache, kvfile
            from llamacli.engine import Engine
            from llamacli.plan.offload import plan_offload
            from llamacli.plan.placement import plan_more_contexts, plan_residency

            beside, files = 4 * logits_rows * config.n_vocab, 0
            if kv_file is None:
                beside += (sessions - 1) * kvcache.nbytes(config, ctx)
            else:
                kvfile.check(Path(kv_file))
                files = sessions
            tower, tower_nbytes = _tower(gguf, config, mmproj, threads) if mmproj else (None, 0)
            offload = plan_offload(gguf, config, ctx, device, gpu_layers, experts, memory)
            asked = gguf, config, ctx, threads, memory, experts
            held = plan_residency(*asked, beside + tower_nbytes, offload, files)
            if more_sessions and experts == "auto" and not (held.slots or files or offload.layers):
                more, held = plan_more_contexts(held, more_sessions, *asked, beside + tower_nbytes)
                sessions += more
            file = kvfile.KVFile(Path(kv_file), held.window) if files else None
            engine = Engine(gguf, config, threads, held.slots, held.batch, gpu_layers=offload.layers, kv_file=file)
            model = cls(gguf, config, tokenizer.result(), engine, ctx, held.nbytes, tower, held.room)
            model.sessions = sessions
            return model

    @classmethod
    def _load_on_cluster(cls, gguf, config, ctx, where, threads, memory, experts, device, told, mmproj, held) -> Model:
        if device == "mlx":
            raise UsageError("--device: expected cpu with a cluster, found mlx; leave one of them out, or add --cluster none")
        from llamacli.cluster.placing import open_engine

        tower, nbytes = _tower(gguf, config, mmproj, threads) if mmproj else (None, 0)
        address, layers = where
        told = told or (lambda words: None)
        engine, sessions = open_engine(gguf, config, address, ctx, threads, memory, experts, told, layers, *held)
        model = cls(gguf, config, _tokenizer(gguf), engine, ctx, nbytes, tower)
        model.sessions = sessions
        return model

    def close(self) -> None:
        """Give back threads and memory; the model and its sessions cannot be used afterwards. `with` does it by itself."""
        self.engine.close()
        if self._sight is not None:
            self._sight.close()
        for release in self._releases:
            release()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def session(self, ctx: int | None = None, snapshots: Snapshots | None = None, exact: bool = False) -> Session:
        """A new, empty conversation of at most `ctx` tokens (default: the model's). `exact`: as for Session."""
        from llamacli.session import Session

        return Session(self.engine, self.tokenizer, ctx or self.ctx, snapshots, exact)

    def snapshots(self, limit: int | None = None, exact: bool = True) -> Snapshots:
        """Where a session reads the beginnings of prompts from and keeps them (llamacli/snapshots.py).

        `limit`: bytes of all models' snapshots; None: half of the sum of the disk's free bytes and their bytes. `exact`:
        answers have the same bytes as without snapshots; else the answers of a conversation are kept, too. ModelFileError if
        the model's file no longer exists.
        """
        if hasattr(self.engine.stages[0], "places"):
            raise UsageError(
                "--cache: expected a model on this machine alone, found a cluster; leave one of them out, or add --cluster none"
            )
        from llamacli.environment import snapshots_folder
        from llamacli.snapshots import Snapshots, identity

        try:
            return Snapshots(snapshots_folder(), self.engine, identity(self.gguf), limit, exact)
        except OSError as error:
            raise ModelFileError(
                f"{error.filename}: expected the model's file, found: {error.strerror}; load it again"
            ) from None

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Every token's logits in a fresh context, float32 [len(ids), n_vocab]."""
        return self.engine.forward(ids, self.engine.new_cache(self.ctx), all_logits=True)

    @property
    def sight(self) -> Sight:
        """The vision tower, opened on first use. PictureError if the model has none, MemoryLimitError if there is no room."""
        with self._opening:
            if self._sight is None:
                from llamacli.vision.sight import Sight

                if self._mmproj is None:
                    tower, nbytes = _tower(self.gguf, self.config, True, self.engine.threads)
                    self._take_room(tower.path, nbytes)
                    self._mmproj = tower
                self._sight = Sight(self._mmproj, self.tokenizer, self.engine.threads)
            return self._sight

    def _take_room(self, path, nbytes: int) -> None:
        """Count bytes that were not planned for; slots are given back where too little memory is left."""
        from llamacli.plan.machine import reserve

        given = 0
        if self._room is not None:
            given = self.engine.shrink(max(0, nbytes - self._room))
            self._room += given
            if self._room < nbytes:
                raise MemoryLimitError(
                    f"{path}: expected {nbytes / 1e9:.2f} GB of memory to see pictures, found {self._room / 1e9:.2f} GB left; "
                    f"start with --mmproj, which plans for it, or use a larger --memory"
                )
            self._room -= nbytes
        self._releases.append(reserve(self.engine, nbytes - given))

    def prompt_ids(
        self,
        messages: Sequence[dict],
        image_tiles: int | None = None,
        tools: Sequence[dict] = (),
        limit: int | None = None,
    ) -> list:
        """The tokens of a conversation ({"role": ..., "content": ...}) up to where the assistant's answer begins.

        A content may be a list of parts, {"type": "text", "text": ...} or {"type": "image", "image": ...} with a path, bytes, a
        `data:` URL, a picture of Pillow or a View of `sight`. Rows of pictures are prompt.FeatureRow. `image_tiles`: the most
        tiles of a picture's grid, fewer being faster and coarser. `tools`: definitions of functions that the model may call, as
        text/template.py has them. PictureError for data that is not a picture, or that the tower cannot encode. `limit`:
        ContextFullError if there are more tokens, before the tower encodes any picture.
        """
        ids, found = self._rendered(messages, tools)
        if limit is not None:
            from llamacli.session import check_length

            check_length(self._count(ids, found, image_tiles), limit)
        if not found:
            return ids
        from llamacli.prompt import tokens
        from llamacli.vision.sight import View

        views = [source if isinstance(source, View) else self.sight.look(source, image_tiles) for source in found]
        return tokens(self.sight.prompt(ids, views))

    def count_tokens(self, messages: Sequence[dict], image_tiles: int | None = None, tools: Sequence[dict] = ()) -> int:
        """How many tokens `prompt_ids` makes. Pictures count by their sizes: the tower does not run."""
        return self._count(*self._rendered(messages, tools), image_tiles)

    def _rendered(self, messages: Sequence[dict], tools: Sequence[dict]) -> tuple[list[int], list]:
        """The ids of a conversation, and its pictures, for each of which there is one id."""
        from llamacli.text.template import pictures, render

        messages = list(messages)
        ids = render(self.tokenizer, messages, self.gguf.metadata.get("tokenizer.chat_template"), tools=tools)
        return ids, pictures(messages)

    def _count(self, ids: list[int], found: list, image_tiles: int | None) -> int:
        return len(ids) + sum(self.sight.n_tokens(source, image_tiles) - 1 for source in found)

    def sampler(
        self,
        *,
        ignore_eos: bool = False,
        dry_sequence_breakers: Sequence[str] | None = None,
        schema: str | dict | bool | None = None,
        grammar: str | None = None,
        choice: Sequence[str] | None = None,
        **settings,
    ):
        """A Sampler; `settings` as for `Sampler`, None means the model's default.

        `ignore_eos`: the tokens that end an answer are never picked. `dry_sequence_breakers`: texts that end a repetition, as
        does every token with one of them in it (default: line break, colon, quotation mark, star). `schema`, `grammar`,
        `choice`: what the answer is bound to (text/constraint.py); a finish reason other than "stop" then means that it is cut.
        """
        from llamacli.text.sampler import Sampler

        if (schema, grammar, choice) != (None, None, None):
            if ignore_eos:
                raise UsageError("ignore_eos: expected none with a schema, a grammar or a choice, which end the answer")
            settings["constraint"] = self.constraint(schema, grammar, choice)
        chosen = {**self.defaults, **{name: value for name, value in settings.items() if value is not None}}
        if chosen.get("dry_multiplier"):
            breakers = DRY_BREAKERS if dry_sequence_breakers is None else dry_sequence_breakers
            chosen["dry_breakers"] = self.tokenizer.ids_with(breakers)
        hidden = self.tokenizer.hidden_ids
        if ignore_eos:
            hidden = [*hidden, *self.tokenizer.stop_ids]
        return Sampler(**chosen, hidden_ids=hidden)

    def constraint(
        self, schema: str | dict | bool | None = None, grammar: str | None = None, choice: Sequence[str] | None = None
    ) -> Constraint:
        """What an answer is bound to, as a sampler takes it (text/constraint.py): by exactly one of the three."""
        return self._grammars.constraint(schema, grammar, choice)

    @property
    def _grammars(self):
        with self._opening:
            if self._made_grammars is None:
                from llamacli.text.constraint import Grammars

                self._made_grammars = Grammars(self.tokenizer)
            return self._made_grammars

    def stream(
        self,
        messages: Sequence[dict],
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        image_tiles: int | None = None,
        tools: Sequence = (),
        **settings,
    ) -> Iterator[Piece]:
        """Answer a conversation (`prompt_ids`) in a fresh session, piece by piece. `settings` as for `sampler`.

        `tools`: as for `chat`.
        """
        if tools:
            return self.chat(messages, tools, max_tokens=max_tokens, stop=stop, image_tiles=image_tiles, **settings)
        ids = self.prompt_ids(messages, image_tiles, limit=self.ctx)
        return self.session().stream(ids, self.sampler(**settings), max_tokens, stop)

    def chat(
        self,
        messages: Sequence[dict],
        tools: Sequence | Toolbox,
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        image_tiles: int | None = None,
        **settings,
    ) -> Iterator[Piece]:
        """Answer a conversation with tools that the model may call, piece by piece. The pieces do not contain the calls.

        `tools`: Python functions, whose annotations and docstrings describe them, or a tools.loop.Toolbox, which can also ask
        before each call and limit rounds and time. The last piece's reason is one of Session's, or one of tools.loop.answer's.
        """
        from llamacli.tools.loop import Toolbox, answer

        box = tools if isinstance(tools, Toolbox) else Toolbox(tools)
        return answer(self, self.session(), self.sampler(**settings), messages, box, max_tokens, stop, image_tiles)


def default_ctx(config) -> int:
    """The context length, in tokens, where the caller gives none: the file's own, at most DEFAULT_CTX."""
    return min(DEFAULT_CTX, config.context_length or DEFAULT_CTX)


def sampling_defaults(metadata) -> dict[str, float]:
    """Sampling values from a file's metadata, whose keys are llama.cpp's; Llama 4's own where a value is missing or invalid."""
    from llamacli.text.settings import SETTINGS, checked

    values = {name: SETTINGS[name][0] for name in ("temp", "top_p")}
    for key, name in FILE_SAMPLING.items():
        value = metadata.get(f"general.sampling.{key}")
        try:
            if value is not None and not (name == "temp" and value > 5):
                values[name] = checked(name, value)
        except (UsageError, TypeError):
            continue
    return values


def _tokenizer(gguf):
    from llamacli.text.tokenizer import Tokenizer

    return Tokenizer.from_gguf(gguf)


def _tower(gguf, config, path, threads: int | None) -> tuple[GGUF, int]:
    """The file of a vision tower, and the bytes of its weights and buffers."""
    from pathlib import Path

    from llamacli.cpu.kernels.cores import default_threads
    from llamacli.vision.sight import open_tower, tower_bytes

    tower = open_tower(gguf, config.n_embd, None if path is True else Path(path))
    return tower, tower_bytes(tower, threads or default_threads())
