"""The one list of options that commands share, their checks, and what they stand for: a model, a prompt.

In: what the parser found. Out: dataclasses, paths, text, a loaded `Model`, or a UsageError. Knows nothing of decoding or of
output.
"""

import dataclasses
import inspect
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from llamacli import environment
from llamacli.cli.console import Console, is_terminal
from llamacli.errors import ModelFileError, PromptError, UsageError


class Color(StrEnum):
    """When to colour."""

    auto = "auto"
    always = "always"
    never = "never"


class Placing(StrEnum):
    """Where routed experts are."""

    auto = "auto"
    mapped = "mapped"
    slots = "slots"


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number.")
    return value


def option(*names: str, help: str, **more):
    return typer.Option(*names, help=help, show_default=False, **more)


ModelName = Annotated[
    str | None,
    option("-m", "--model", metavar="FILE|NAME", help="A GGUF file (of a split one, the first part), or a model's name."),
]
Threads = Annotated[
    int | None, option("-t", "--threads", metavar="N", min=1, max=1024, help="Threads (default: what suits the machine).")
]
Json = Annotated[bool, option("--json", help="Print JSON.")]
TextFile = Annotated[str, option("-f", "--file", metavar="FILE", help="The text, UTF-8; - is stdin.")]
Window = Annotated[int, option("-c", "--ctx", metavar="N", min=8, help="Tokens of a window of the text (512).")]


@dataclasses.dataclass
class Output:
    """How to show things."""

    color: Annotated[Color, option("--color", metavar="WHEN", help="Colour: auto (default), always or never.")] = Color.auto
    verbose: Annotated[bool, option("-v", "--verbose", help="Notes and speed on stderr even if it is no terminal.")] = False

    def console(self) -> Console:
        return Console(self.color, self.verbose)


@dataclasses.dataclass
class Generation:
    """What decides about an answer; the same for `run` and `chat`."""

    model: ModelName = None
    system: Annotated[str | None, option("-s", "--system", metavar="TEXT", help="System prompt.")] = None
    image: Annotated[list[str] | None, option("--image", metavar="FILE", help="An image (not supported yet).")] = None
    max_tokens: Annotated[int | None, option("-n", "--max-tokens", metavar="N", min=1, help="Longest answer, in tokens.")] = (
        None
    )
    ctx: Annotated[
        int | None, option("-c", "--ctx", metavar="N", min=1, help="Context limit in tokens (default: 8192 at most).")
    ] = None
    threads: Threads = None
    memory: Annotated[
        str | None, option("--memory", metavar="SIZE", help="Memory to stay below, such as 24G (default: what is free).")
    ] = None
    experts: Annotated[
        Placing, option("--experts", metavar="HOW", help="Routed experts: mapped, slots (read when needed), auto (default).")
    ] = Placing.auto
    temp: Annotated[
        float | None, option("--temp", metavar="N", min=0, callback=_finite, help="Temperature; 0 takes the likeliest (0.6).")
    ] = None
    top_k: Annotated[int | None, option("--top-k", metavar="N", min=0, help="Sample among the K likeliest; 0 is off (0).")] = (
        None
    )
    top_p: Annotated[
        float | None, option("--top-p", metavar="N", min=0, max=1, callback=_finite, help="Nucleus sampling; 1 is off (0.9).")
    ] = None
    min_p: Annotated[
        float | None,
        option("--min-p", metavar="N", min=0, max=1, callback=_finite, help="Least share of the best; 0 is off (0)."),
    ] = None
    repeat_penalty: Annotated[
        float | None,
        option("--repeat-penalty", metavar="N", min=0.01, callback=_finite, help="Penalty on repetition; 1 is off (1)."),
    ] = None
    seed: Annotated[
        int | None, option("--seed", metavar="N", min=0, help="Same seed, same text (default: a new one each time).")
    ] = None
    routing_log: Annotated[
        Path | None, option("--routing-log", metavar="FILE", help="Write down which experts are chosen; see inspect --routing.")
    ] = None
    stop: Annotated[list[str] | None, option("--stop", metavar="TEXT", help="End the answer before TEXT; repeatable.")] = None

    def __post_init__(self) -> None:
        if self.image:
            raise UsageError(
                "--image: this version cannot see images yet; leave the option out and describe the picture in words"
            )
        if any(not text for text in self.stop or ()):
            raise UsageError("--stop: expected some text, found none")
        for name, texts in (("--system", [self.system or ""]), ("--stop", self.stop or ())):
            for text in texts:
                checked(text, name)

    def load(self, console: Console):
        """The model, with a note when it takes long; if a log is asked for, it is told every choice of experts."""
        from llamacli.bench.routing import RoutingLog, check_new

        if self.routing_log is not None:
            check_new(self.routing_log)
        memory = None if self.memory is None else byte_count(self.memory, "--memory")
        model = load_model(
            find_model(self.model, console), self.threads, self.ctx, console, memory=memory, experts=self.experts.value
        )
        if self.routing_log is not None:
            model.engine.follow_routing = RoutingLog(self.routing_log, model.gguf.path.name, model.config)
        return model

    def sampler(self, model, console: Console):
        """The sampler that the options and the model's defaults ask for."""
        seed = time.time_ns() % (1 << 32) if self.seed is None else self.seed
        if console.verbose:
            console.note(f"seed {seed}")
        names = ("temp", "top_k", "top_p", "min_p", "repeat_penalty")
        return model.sampler(**{name: getattr(self, name) for name in names}, seed=seed)


def flat(command: Callable) -> Callable:
    """`command` as the parser wants it: its dataclass parameters spread out into one flat list of options."""
    parameters, groups = [], {}
    for p in inspect.signature(command).parameters.values():
        if dataclasses.is_dataclass(p.annotation):
            groups[p.name] = p.annotation
            parameters += [
                p.replace(name=f.name, annotation=f.type, default=f.default) for f in dataclasses.fields(p.annotation)
            ]
        else:
            parameters.append(p)
    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]

    def call(**values):
        for name, group in groups.items():
            values[name] = group(**{f.name: values.pop(f.name) for f in dataclasses.fields(group)})
        return command(**values)

    call.__name__, call.__doc__ = command.__name__, command.__doc__
    call.__signature__ = inspect.Signature(parameters)
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call


def find_model(name: str | None, console: Console) -> Path:
    """The file that -m, else LLAMACLI_MODEL, else the project's own small model stands for."""
    chosen = name or environment.model()
    if chosen is None:
        if not environment.SMALL_MODEL.exists():
            raise UsageError(
                "no model: expected -m FILE or the variable LLAMACLI_MODEL, and the small model is not installed here"
            )
        console.note(
            f"model: {environment.SMALL_MODEL.name}, the small one that comes with llamacli (choose with -m or LLAMACLI_MODEL)"
        )
        return environment.SMALL_MODEL
    path = Path(os.path.expanduser(chosen))  # Path's own raises for an unknown user
    if path.exists() or len(path.parts) != 1:
        return path
    folders = environment.model_folders()
    known = [folder / inner for folder in folders for inner in (f"{chosen}.gguf", f"{chosen}/{chosen}.gguf")]
    found = next((candidate for candidate in known if candidate.exists()), None)
    if found is None:
        raise ModelFileError(
            f"{chosen}: expected a GGUF file or the name of one in {' or '.join(map(str, folders))}, found neither; "
            "check the path after -m"
        )
    return found


def load_model(path: Path, threads: int | None, ctx: int | None, console: Console, **more):
    """`Model.load` with words for a wait, a limit beyond the model's, and slow tensor types."""
    from llamacli import Model

    words = "loading; the very first start compiles the kernels, which takes a while ..."
    with patience(console, words), leave_at_once():
        model = Model.load(path, threads, ctx, **more)
    if ctx and model.config.context_length and ctx > model.config.context_length:
        console.note(f"-c {ctx} is more than the {model.config.context_length} tokens that the model was made for")
    for notice in (getattr(model.tokenizer, "warning", None), *getattr(model.engine, "notices", ())):
        if notice:
            console.note(notice)
    return model


@contextmanager
def leave_at_once():
    """Let Ctrl-C end the process itself while compiled code is loaded.

    The compiler calls back into Python where an exception cannot travel on: it would be printed, and the interrupt lost.
    Nothing has been said yet, so there is nothing to keep.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def patience(console: Console, words: str, seconds: float = 3.0):
    """Say `words` if what is done inside takes long."""
    timer = threading.Timer(seconds, console.note, [words])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


_UNITS = {
    "": 1,
    **{unit: 1000**n for n, unit in enumerate("KMGT", 1)},
    **{f"{unit}I": 1024**n for n, unit in enumerate("KMGT", 1)},
}


def byte_count(text: str, where: str) -> int:
    """A size such as 48G, 500 MB or 2GiB in bytes; UsageError else."""
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]{1,18})?) ?([KMGT]?I?)B?", text.strip().upper())
    size = int(float(found[1]) * _UNITS[found[2]]) if found and found[2] in _UNITS else 0
    if size <= 0:
        raise UsageError(f"{where}: expected a size like 48G, 500M or 2GiB, found {text!r}")
    return size


def token_count(text: str, where: str) -> int:
    """A number of tokens such as 8192, 128K or 1M, which is 1,048,576; UsageError else."""
    found = re.fullmatch(r"([0-9]{1,12})([KM]?)", text.strip().upper())
    count = int(found[1]) * {"": 1, "K": 1 << 10, "M": 1 << 20}[found[2]] if found else 0
    if count <= 0:
        raise UsageError(f"{where}: expected a number of tokens like 8192, 128K or 1M, found {text!r}")
    return count


def checked(text: str, where: str) -> str:
    """`text` from the command line if it is sound Unicode; PromptError else."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{where}: expected UTF-8, found an undecodable byte at character {error.start}; convert it with iconv"
        ) from None
    return text


def decoded(data: bytes, where: str) -> str:
    """`data` as text; PromptError unless it is UTF-8."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{where}: expected UTF-8, found byte 0x{data[error.start]:02x} at offset {error.start}; convert it with iconv"
        ) from None


def read_stdin(console: Console) -> str:
    """All of stdin, exactly."""
    if sys.stdin is None:
        return ""
    with patience(console, "reading stdin until it ends (Ctrl-D); --no-stdin leaves it alone"):
        return decoded(sys.stdin.buffer.read(), "stdin")


def stdin_is_piped() -> bool:
    """Whether stdin is there and no terminal."""
    return sys.stdin is not None and not is_terminal(sys.stdin)


def read_file(name: str, console: Console) -> str:
    """A file's text, exactly; "-" is stdin."""
    if name == "-":
        return read_stdin(console)
    try:
        return decoded(Path(name).read_bytes(), name)
    except OSError as error:
        raise PromptError(f"{name}: expected a readable text file, found: {error.strerror}") from None
