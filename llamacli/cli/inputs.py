"""Finds and loads the model that the options name, and reads texts from files and stdin.

In: words of the command line. Out: a path, a loaded `Model`, text; errors name the option, variable or file that was wrong.
"""

import contextlib
import errno
import os
import re
import select
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from llamacli import environment
from llamacli.cli import settings, signals
from llamacli.cli.console import Console, amount, is_terminal
from llamacli.cli.grammar import meant
from llamacli.errors import ModelFileError, PromptError, UsageError

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?", re.ASCII)  # USER/REPO[:QUANT]
MOST_BYTES = 512  # most bytes of a token: four times Llama 4's longest
MOST_SENT = 64 << 20  # bytes of a text for a server


class Limit(NamedTuple):
    """The most bytes of a text that are read, and what to do about more."""

    nbytes: int
    advice: str = "shorten it"


def context_limit(ctx: int, served: bool, larger: str = "use a larger -c") -> Limit:
    """The number of bytes that fills a context of `ctx` tokens whatever the text; a server checks its own. `larger`: advice for
    a larger context.
    """
    if served:
        return Limit(MOST_SENT)
    return Limit(ctx * MOST_BYTES, f"so many fill a context of {ctx} tokens in any case: shorten it or {larger}")


def model_names(start: str = "") -> list[str]:
    """Names of models that are installed, for completion."""
    from llamacli.library.installed import installed

    return sorted({model.name for model in installed()})


def named_model(name: str) -> Path | None:
    """The file of a model's name, or of USER/REPO[:LABEL]; None if no model has that name."""
    from llamacli.library.installed import find

    found = find(name)
    return found and found.paths[0]


def is_model(word: str) -> bool:
    """Whether a word names a model: the name of one, or an existing .gguf file."""
    with contextlib.suppress(OSError, ValueError):  # a word need not be a valid path
        return (word.endswith(".gguf") and os.path.isfile(word)) or named_model(word) is not None
    return False


def one_model(given: str | None, model: str | None) -> str | None:
    """The model, by its argument or by -m; UsageError for both."""
    if given is not None and model is not None:
        raise UsageError(f"expected one model, found {given} and -m {model}; leave one of them out")
    return model if given is None else given


def model_and_text(words: list[str], model: str | None, file: str | None) -> tuple[str | None, str]:
    """The model and the file of a text, from words in any order or from -m and -f; a piped stdin is the text if no file is
    named.
    """
    for word in words:
        if is_model(word) or (word.endswith(".gguf") and model is None):
            model = one_model(word, model)
        elif file is not None:
            raise UsageError(f"expected one text, found {file} and {word}; leave one of them out")
        else:
            file = word
    if file is None:
        if not stdin_is_piped():
            raise UsageError("expected a text, found none; give -f/--file FILE, or pipe it in")
        file = "-"
    return model, file


def find_model(name: str | None, console: Console) -> Path:
    """The file that -m, else LLAMACLI_MODEL, else the settings file, else the project's own small model stands for."""
    where, chosen = getattr(name, "where", "the path after -m"), name
    if chosen is None:
        where, chosen = "LLAMACLI_MODEL", environment.model()
    if chosen is None:
        where, chosen = f"{settings.path()}: model", settings.model()
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
    if path.exists() or (len(path.parts) != 1 and chosen.endswith(".gguf")):
        return path
    found = named_model(chosen)
    if found is None:
        folders = " or ".join(map(str, environment.model_folders()))
        pull = f"; `llamacli models pull {chosen}` fetches it" if _REPOSITORY.fullmatch(chosen) else ""
        raise ModelFileError(
            f"{chosen}: expected a GGUF file or the name of one in {folders}, found neither"
            + (pull or meant(chosen, model_names()) or f"; check {where}")
        )
    return found


def load_model(path: Path, threads: int | None, ctx: int | None, console: Console, **more):
    """`Model.load` with notes: a progress line, a context beyond the model's own, slow tensor types."""
    from llamacli import Model
    from llamacli.cpu.kernels.jit.loader import slow_variant

    if more.get("cluster"):
        more["told"] = console.warn
    with console.waiting(lambda: _loading(path)), signals.at_once():
        model = Model.load(path, threads, ctx, **more)
    signals.interrupts(model.engine)
    if ctx and model.config.context_length and ctx > model.config.context_length:
        console.note(f"-c {ctx} is more than the {model.config.context_length} tokens that the model was made for")
    for notice in (slow_variant(), getattr(model.tokenizer, "warning", None), *getattr(model.engine, "notices", ())):
        if notice:
            console.note(notice)
    show_kernel_notices(console)
    return model


def show_kernel_notices(console: Console) -> None:
    """Note once in a process if compiled code cannot be kept."""
    from llamacli.cpu import kernels

    while kernels.notices:
        console.note(kernels.notices.pop(0))


def _loading(path: Path) -> str:
    """The text of the progress line: the compiler, which is imported only where kernels are missing, or the file."""
    if "numba" in sys.modules:
        return "compiling the kernels for this machine, once ..."
    return f"loading {path.name} ({amount(path.stat().st_size)}) ..."


@contextlib.contextmanager
def patience(console: Console, words: str, seconds: float = 3.0):
    """A context that shows `words` if it takes long."""
    timer = threading.Timer(seconds, console.note, [words])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def checked(text: str, where: str) -> str:
    """`text` from the command line; PromptError unless it is valid Unicode."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{where}: expected UTF-8, found an undecodable byte at character {error.start}; convert it with iconv"
        ) from None
    return text


def decoded(data: bytes, where: str) -> str:
    """`data` as text; PromptError unless it is UTF-8."""
    data = data.removeprefix(b"\xef\xbb\xbf")  # a byte order mark is not part of the text
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{where}: expected UTF-8, found byte 0x{data[error.start]:02x} at offset {error.start}; convert it with iconv"
        ) from None


def read_stdin(console: Console, limit: Limit | None = None) -> str:
    """All of stdin as text, exactly. PromptError for more than `limit`, which is not read."""
    return decoded(read_stdin_bytes(console, limit), "stdin")


def read_stdin_bytes(console: Console, limit: Limit | None = None, more: int = 0, hint: str = "") -> bytes:
    """All of stdin. A descriptor that cannot be read, such as under nohup, counts as empty.

    PromptError for more than `limit`, which is not read; a picture may have `more` bytes. `hint` is added to the note that is
    shown if reading takes long.
    """
    if not _readable(sys.stdin):
        return b""
    with patience(console, f"reading stdin until it ends (Ctrl-D){hint}", 1.0):
        first = _some(sys.stdin.buffer)
        if limit is not None and more and may_be_picture(first):
            limit = limit._replace(nbytes=max(limit.nbytes, more))
        parts = chain([first], iter(lambda: _some(sys.stdin.buffer), b"")) if first else iter(())
        return _all(lambda: next(parts, b""), limit, "stdin")


def may_be_picture(data: bytes) -> bool:
    """Whether bytes may be the beginning of a picture file."""
    return data[:1] in (b"\x89", b"\xff", b"G", b"R", b"I", b"M") or data[4:8] == b"ftyp"


def _all(read: Callable[[], bytes], limit: Limit | None, where: str) -> bytes:
    """All bytes that `read` returns until it returns none."""
    parts, size = [], 0
    while part := read():
        size += len(part)
        if limit is not None and size > limit.nbytes:
            raise PromptError(f"{where}: expected at most {limit.nbytes} bytes, found more; {limit.advice}")
        parts.append(part)
    return b"".join(parts)


def stdin_lines(longest: int) -> Iterator[bytes]:
    """The lines of stdin as they come, without their ends; one that is too long is cut, and is the last."""
    held = b""
    while len(held) < longest and (part := _some(sys.stdin.buffer)):
        *whole, held = (held + part).split(b"\n")
        yield from whole
    if held:
        yield held


def _some(stream) -> bytes:
    """The next bytes of a stream, b"" at its end; waits where the other side made it non-blocking.

    Reads the descriptor itself: BufferedReader.read1 returns b"" both at the end and where nothing has come yet.
    """
    try:
        fd = stream.fileno()
    except OSError:  # a stream without a descriptor, which a caller of main() put there
        return stream.read()
    while True:
        try:
            return os.read(fd, 1 << 20)
        except BlockingIOError:
            select.select([fd], [], [])


def _readable(stream) -> bool:
    """Whether a stream is open for reading; GNU nohup replaces a terminal by /dev/null opened for writing only."""
    if stream is None:
        return False
    try:
        os.read(stream.fileno(), 0)
    except BlockingIOError:
        return True
    except ValueError:  # closed; or a stream without a descriptor, which a caller of main() put there
        return not stream.closed
    except OSError as error:
        return error.errno != errno.EBADF
    return True


def stdin_is_piped() -> bool:
    """Whether stdin is open for reading and not a terminal."""
    return not is_terminal(sys.stdin) and _readable(sys.stdin)


def read_file(name: str, console: Console, limit: Limit | None = None) -> str:
    """A file's text, exactly but for a byte order mark; "-" is stdin. PromptError for more than `limit`."""
    if name == "-":
        return read_stdin(console, limit)
    try:
        with open(name, "rb") as file:
            return decoded(_all(lambda: file.read(1 << 20), limit, name), name)
    except (OSError, ValueError) as error:
        raise PromptError(
            f"{name}: expected a readable text file, found: {getattr(error, 'strerror', error)}; check the path"
        ) from None
