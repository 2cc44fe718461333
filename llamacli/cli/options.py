"""The options that commands share, and their checks. inputs.py loads the models and texts that they name.

In: what the parser found. Out: dataclasses, or a UsageError.
"""

import dataclasses
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from llamacli import DEFAULT_CTX
from llamacli.cli.binding import binding
from llamacli.cli.console import Console
from llamacli.cli.grammar import OTHER, Given, argument, byte_count, kind_of, option, size, token_count, typed
from llamacli.cli.inputs import (
    Limit,
    checked,
    context_limit,
    decoded,
    find_model,
    is_model,
    load_model,
    model_and_text,
    model_names,
    one_model,
    patience,
    read_file,
    read_stdin,
    stdin_is_piped,
)
from llamacli.cli.keeping import KV, Keeping, KvFile, KvType
from llamacli.cli.nodes import OnCluster
from llamacli.cli.sampling import Sampling
from llamacli.errors import UsageError

__all__ = [  # names that commands import from here, some defined in other modules
    "KV",
    "Context",
    "DeviceName",
    "Experts",
    "Generation",
    "Given",
    "GpuLayers",
    "Json",
    "KvFile",
    "KvType",
    "Memory",
    "ModelAndText",
    "ModelName",
    "Output",
    "TextFile",
    "Threads",
    "Tower",
    "Window",
    "argument",
    "byte_count",
    "checked",
    "decoded",
    "find_model",
    "is_model",
    "load_model",
    "memory_bytes",
    "model_and_text",
    "model_names",
    "one_model",
    "option",
    "patience",
    "placement",
    "read_file",
    "read_stdin",
    "stdin_is_piped",
    "token_count",
]


class Color(StrEnum):
    """When to colour."""

    auto = "auto"
    always = "always"
    never = "never"


class Placing(StrEnum):
    """Where routed experts are kept."""

    auto = "auto"
    mapped = "mapped"
    slots = "slots"


class Device(StrEnum):
    """The device that runs layers."""

    cpu = "cpu"
    mlx = "mlx"
    auto = "auto"


HERE = (  # parameters that concern a model in this process
    *("mmproj", "image_tiles", "ctx", "threads", "memory", "device", "gpu_layers", "experts", "kv", "cache", "cache_limit"),
    *("kv_file", "cluster", "cluster_layers", "speculate", "routing_log", "dry_sequence_breaker", "logprobs", "batch"),
    *("parallel", "tool_choice", "bind_tools"),
)
ALL_LAYERS = 1 << 20  # more than any model has


def _layer_count(text: str, where: str) -> int:
    """N or "all"."""
    if text.strip().lower() == "all":
        return ALL_LAYERS
    if not re.fullmatch(r"\d{1,6}", text.strip()):
        raise UsageError(f"{where}: expected a number of layers or all, found {text!r}")
    return int(text)


ModelName = Annotated[
    str | None,
    option(
        "-m",
        "--model",
        metavar="FILE|NAME",
        group="Model",
        complete=lambda start: model_names(),
        help="A GGUF file (of a split one, the first part), or a model's name; else LLAMACLI_MODEL, else the small one.",
    ),
]
Threads = Annotated[
    int | None,
    option(
        "-t",
        "--threads",
        metavar="N",
        group="Model",
        least=1,
        most=1024,
        setting=True,
        help="Threads (default: what suits the machine).",
    ),
]
Memory = Annotated[
    str | None,
    option(
        "--memory",
        metavar="SIZE",
        group="Model",
        setting=True,
        check=size,
        help="Memory to stay below, such as 24G or 22GiB (default: what is free). G is 10^9 bytes, Gi is 2^30.",
    ),
]
DeviceName = Annotated[
    Device | None,
    option(
        "--device",
        group="Model",
        setting=True,
        help="What runs the layers: cpu (default), mlx (a GPU, through MLX), auto (a Mac's GPU where there is one).",
    ),
]
GpuLayers = Annotated[
    int | None,
    option(
        "--gpu-layers",
        metavar="N|all",
        group="Model",
        aliases=("-ngl", "--n-gpu-layers"),
        setting=True,
        check=_layer_count,
        help="How many of the last layers the GPU runs (default: what fits); without --device it implies --device mlx.",
    ),
]
Context = Annotated[
    int | None,
    option(
        "-c",
        "--ctx",
        metavar="N",
        group="Model",
        aliases=("--ctx-size",),
        tokens=True,
        setting=True,
        help=f"Context limit in tokens, such as 8192 or 128K (default: the model's, {DEFAULT_CTX} at most).",
    ),
]
Experts = Annotated[
    Placing,
    option(
        "--experts",
        metavar="HOW",
        group="Model",
        setting=True,
        help="Routed experts: mapped (used where the file lies), slots (read when needed), auto (default).",
    ),
]
Tower = Annotated[
    str | None,
    option(
        "--mmproj",
        metavar="FILE",
        group="Model",
        aliases=("-mm",),
        help="The vision tower's file (default: mmproj*.gguf beside the model).",
    ),
]
Json = Annotated[bool, option("--json", group=OTHER, help="Print JSON.")]
TextFile = Annotated[str | None, option("-f", "--file", metavar="FILE", group="Text", help="The text, UTF-8; - is stdin.")]
ModelAndText = Annotated[
    list[str] | None, argument("[MODEL] [TEXTFILE]", "The model and the text, as after -m and -f.", complete="file")
]
Window = Annotated[
    int, option("-c", "--ctx", metavar="N", aliases=("--ctx-size",), least=8, tokens=True, help="Tokens of a window (512).")
]


@dataclasses.dataclass
class Output:
    """How to show things."""

    color: Annotated[
        Color, option("--color", group=OTHER, setting=True, help="When to colour (default: auto, on a terminal).")
    ] = Color.auto
    verbose: Annotated[
        bool, option("-v", "--verbose", group=OTHER, setting=True, help="Notes and speed on stderr even if it is no terminal.")
    ] = False
    quiet: Annotated[bool, option("-q", "--quiet", group=OTHER, setting=True, help="No notes on stderr, errors only.")] = False

    def console(self) -> Console:
        return Console(self.color, self.verbose and not self.quiet, self.quiet)


@dataclasses.dataclass
class Generation(Sampling, Keeping, OnCluster):
    """The options of an answer, the same for `run` and `chat`."""

    model: ModelName = None
    server: Annotated[
        str | None,
        option(
            "--server",
            metavar="URL",
            group="Model",
            setting=True,
            help="Ask a server, such as a llamacli serve, instead of loading a model; -m is its name there; none: load one.",
        ),
    ] = None
    system: Annotated[
        str | None,
        option(
            "-s",
            "--system",
            metavar="TEXT",
            group="Text",
            aliases=("-sys", "--system-prompt"),
            empty=True,
            setting=True,
            help="System prompt.",
        ),
    ] = None
    system_file: Annotated[
        str | None,
        option(
            "--system-file", metavar="FILE", group="Text", aliases=("-sysf",), help="System prompt from a file; - is stdin."
        ),
    ] = None
    image: Annotated[
        list[str] | None,
        option("--image", metavar="FILE", group="Text", help="A picture before the prompt; repeatable, - is stdin."),
    ] = None
    image_tiles: Annotated[
        int | None,
        option(
            "--image-tiles",
            metavar="N",
            group="Text",
            least=1,
            setting=True,
            help="Tiles of a picture, at most; fewer are faster and coarser (default: the model's, 16).",
        ),
    ] = None
    mmproj: Tower = None
    max_tokens: Annotated[
        int | None,
        option(
            "-n",
            "--max-tokens",
            metavar="N",
            group="Answer",
            aliases=("--n-predict", "--predict"),
            least=1,
            unlimited=True,
            setting=True,
            help="Longest answer, in tokens (default: no limit but the context's).",
        ),
    ] = None
    ctx: Context = None
    threads: Threads = None
    memory: Memory = None
    device: DeviceName = None
    gpu_layers: GpuLayers = None
    experts: Experts = Placing.auto
    stop: Annotated[
        list[str] | None,
        option(
            "--stop",
            metavar="TEXT",
            group="Answer",
            aliases=("-r", "--reverse-prompt"),
            help="End the answer before TEXT; repeatable.",
        ),
    ] = None
    schema: Annotated[
        str | None,
        option(
            "--schema",
            metavar="FILE|JSON",
            group="Answer",
            aliases=("--json-schema",),
            complete="file",
            help="Bind the answer to a JSON schema; - is stdin.",
        ),
    ] = None
    grammar: Annotated[
        str | None,
        option(
            "--grammar",
            metavar="FILE",
            group="Answer",
            aliases=("--grammar-file",),
            help="Bind it to a grammar: Lark, GBNF or a regular expression.",
        ),
    ] = None
    choice: Annotated[
        str | None,
        option(
            "--choice",
            metavar="A,B,C",
            group="Answer",
            help="Bind it to one of these texts; as a JSON list if one has a comma.",
        ),
    ] = None
    routing_log: Annotated[
        Path | None,
        option("--routing-log", metavar="FILE", group=OTHER, help="Log which experts are chosen; see inspect --routing."),
    ] = None

    def __post_init__(self) -> None:
        self.server = None if self.server == "none" else self.server
        if self.server is not None and (here := typed(HERE)):
            raise UsageError(
                f"{here[0]} and {getattr(self.server, 'where', '--server')} exclude each other: the first is for a model that "
                f"is loaded here; leave it out, or add --server none"
            )
        super().__post_init__()
        if self.memory is not None and self.experts is Placing.mapped:
            if getattr(self.memory, "typed", True):
                raise UsageError(
                    "--memory: expected --experts slots or auto with it, found mapped, whose memory the system decides about; "
                    "leave one of the two out"
                )
            self.memory = None
        if self.system_file is not None:
            if getattr(self.system, "typed", self.system is not None):
                raise UsageError("--system-file and --system exclude each other; leave one of the two out")
            self.system = read_file(self.system_file, Console(), self.limit)
        for name, texts in (("--system", [self.system or ""]), ("--stop", self.stop or ())):
            for text in texts:
                checked(text, name)
        self.bound = binding(self.schema, self.grammar, self.choice, bool(self.stop), self.ignore_eos, self.server is None)

    @property
    def limit(self) -> Limit:
        """The number of bytes of text that surely fills the context, or that a server accepts."""
        return context_limit(self.ctx or DEFAULT_CTX, self.server is not None)

    def load(self, console: Console, sessions: int = 1, pictured: bool = False, more_sessions: int = 0):
        """The model, with a note when loading takes long; with --routing-log its choices of experts are logged.

        `sessions`, `more_sessions`: as for Model.load. `pictured`: the vision tower is needed even if --image names no picture.
        With --server the model is the server's (client/remote.py).
        """
        if isinstance(self.system, Given) and self.system.typed and re.fullmatch(r"-?\d+", self.system):
            console.note(f"the system prompt is the number {self.system}; --seed {self.system} sets the seed")
        if self.server is not None:
            return self._connect(console)
        from llamacli.bench.routing_log import RoutingLog, check_new

        if self.routing_log is not None:
            check_new(self.routing_log)
        model = load_model(
            find_model(self.model, console),
            self.threads,
            self.ctx,
            console,
            memory=memory_bytes(self.memory),
            experts=self.experts.value,
            kv=self.kv.value,
            kv_file=self.kv_file,
            sessions=sessions,
            **self.on_cluster,
            more_sessions=more_sessions,
            **placement(self.device, self.gpu_layers),
            mmproj=self.mmproj or pictured or bool(self.image),
        )
        if self.routing_log is not None:
            model.engine.follow_routing = RoutingLog(self.routing_log, model.gguf.path.name, model.config)
        return model

    def _connect(self, console: Console):
        from llamacli import environment
        from llamacli.client.remote import connect

        remote = connect(self.server, environment.api_key(), self.model if getattr(self.model, "typed", False) else None)
        if remote.server.in_clear:
            console.warn(f"{remote.server.url}: the key and all that is said go there without encryption; https:// has it")
        return remote

    def sampler(self, model, console: Console, logprobs: int | None = None):
        """The sampler of the options and the model's defaults, with its constraint if any. `logprobs`: as for Sampler."""
        return super().sampler(model, console, logprobs, **self.bound)


def _setting_kinds() -> dict[str, tuple[type, object]]:
    """The kind and Spec of each setting by its key."""
    found: dict[str, tuple[type, object]] = {"model": (str, ModelName.__metadata__[0])}
    for field in (*dataclasses.fields(Generation), *dataclasses.fields(Output)):
        kind, spec, _ = kind_of(field.type)
        if spec.setting:
            found[spec.names[-1][2:]] = kind, spec
    return found


SETTINGS = _setting_kinds()


def placement(device: Device | None, gpu_layers: int | None) -> dict:
    """--device and --gpu-layers as Model.load takes them."""
    if device is None:
        device = Device.mlx if gpu_layers else Device.cpu
    if device is Device.cpu and gpu_layers:
        raise UsageError("--gpu-layers: expected --device mlx or auto with it, found cpu; leave one of the two out")
    return {"device": device.value, "gpu_layers": gpu_layers}


def memory_bytes(memory: str | None) -> int | None:
    """--memory in bytes."""
    return None if memory is None else byte_count(memory, getattr(memory, "where", "--memory"))
