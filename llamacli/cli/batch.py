"""`run --batch FILE`: several prompts, a line each, answered in order; a run that was killed goes on where it stopped.

In: JSON lines, each a text or an object with `prompt` or `messages`, and if wanted `images` (before the prompt), `system`, `id`
and `params` (of a template). Out: a JSON line for each, in the same order: `line` (its number), `id`, `text`, `finish_reason`,
`usage` and, with pictures, `images`; or `error`; and `input`, a hash of the input line and of what
options add to it: results of another system prompt are not taken for those of this run. A result is written with one call, so
that a file ends in a whole line, or in one that was cut and is answered anew. A file is checked before the first answer,
without the pictures that it names; lines from a pipe are answered as they come.
"""

import fcntl
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llamacli.cli.binding import check_whole
from llamacli.cli.code import code_blocks
from llamacli.cli.console import Console
from llamacli.cli.images import Sights
from llamacli.cli.inputs import decoded, stdin_lines
from llamacli.errors import (
    ContextFullError,
    CutAnswerError,
    LlamacliError,
    MemoryLimitError,
    OutputError,
    PictureError,
    PromptError,
    UsageError,
)

WIDTH = 8  # most lines answered at a time without --parallel
MOST_WAITING = 512  # lines that may be asked before the first of them is answered
_KEYS = ("prompt", "messages", "images", "system", "id", "params")
_LONGEST = 16 << 20  # bytes of a line
_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}  # some readers treat these as line ends


@dataclass
class Request:
    """One line. Either `messages` or `prompt` is None."""

    line: int
    digest: str
    prompt: str | None = None
    messages: list | None = None
    system: str | None = None
    id: object = None
    params: dict[str, str] | None = None
    images: Sequence[str] = ()  # before the prompt

    @property
    def pictured(self) -> bool:
        """Whether the line names pictures."""
        return bool(self.images) or any(isinstance(message["content"], list) for message in self.messages or ())


def answer_all(
    name: str,
    out: Path | None,
    prompts,
    pictures: list,
    options,
    extract: bool,
    console: Console,
    parallel: int | None = None,
) -> None:
    """Answer each line of a batch that has no answer yet, `parallel` at a time. LlamacliError at the end if some failed.

    `parallel` None: as many, up to WIDTH, as give the bytes of one at a time and as memory holds beside the weights; of lines
    from a pipe one.

    `pictures`, read already, come before each prompt; the list is emptied when they have been seen.
    """
    total, pictured, added = 0, bool(pictures), prompts.added([picture.digest.hex() for picture in pictures])
    if name != "-" and not os.path.exists(name):
        raise PromptError(f"{name}: expected a file of JSON lines, found none; check the path")
    if os.path.isfile(name):  # a pipe can be read but once
        for request in _requests(name, added):
            total, pictured = total + 1, pictured or request.pictured
            _messages(request, prompts, name)
    elif (parallel or 1) > 1:
        raise UsageError(f"--parallel: expected a file of prompts, found {name}, whose lines are answered as they come")
    crew = None
    with Results(out, console) as results, console.progress("answering") as update:
        for n, request in enumerate(_requests(name, added)):
            if results.has(request):
                continue
            if crew is None:
                if n:
                    console.note(f"{out}: {n} answers are there; going on with line {request.line}")
                more = WIDTH - 1 if total and parallel is None else 0
                model = options.load(console, parallel or 1, pictured or request.pictured, more)
                folder = Path(name).parent if total else Path()
                sights = Sights(model, pictures, folder, options.image_tiles, console)
                pictures.clear()
                width = parallel or (min(model.sessions, model.engine.alike))
                crew = Crew(model, prompts, sights, options, extract, console, width)
            crew.begin(request, _messages(request, prompts, name))
            for done, found in crew.finished():
                results.add(done, found)
                if total:
                    update(n, total, f"answer {n + 1} of {total}")
        for done, found in crew.finished(wait=True) if crew else ():
            results.add(done, found)
        results.check_end()
    if crew and crew.failed:
        raise LlamacliError(
            f"{name}: expected an answer to each line, found {crew.failed} that failed; their lines have an error"
        )


class Crew:
    """Sessions that answer at the same time; results are returned in the order of the requests."""

    def __init__(self, model, prompts, sights, options, extract: bool, console: Console, width: int):
        from llamacli.together import Answers

        self._model, self._prompts, self._sights = model, prompts, sights
        self._options, self._extract, self._console = options, extract, console
        self._answers, self._free = Answers(), [options.session(model, exact=True) for _ in range(width)]
        self._asked: dict[int, _Asked] = {}  # by the number of their lines
        self.failed = 0

    def begin(self, request: Request, messages: list[dict]) -> None:
        """Read a prompt. A session must be free."""
        from llamacli.together import Request as Answering

        asked = self._asked[request.line] = _Asked(request)
        try:
            before = () if request.messages is not None else self._sights.before(request.images)
            messages, within = self._sights.within(messages)
            asked.views = (*before, *within)
            ids = self._prompts.ids(self._model, messages, before)
        except (ContextFullError, PictureError, PromptError) as error:
            asked.found = {"error": str(error)}
            return
        asked.sampler = self._options.sampler(self._model, self._console)
        asked.session, options = self._session_for(ids), self._options
        self._take(
            self._answers.begin(
                request.line, Answering(asked.session, ids, asked.sampler, options.max_tokens, options.stop or ())
            )
        )

    def _session_for(self, ids: list):
        """A free session for a prompt: the one that holds most of it, or a copy of a busy one that holds much more."""
        from llamacli.together import WORTH_COPYING

        free = max(self._free, key=lambda session: session.shares(ids))
        self._free.remove(free)
        busy = [asked.session for asked in self._asked.values() if asked.session and not asked.found]
        busy = max(busy, key=lambda session: session.shares(ids), default=free)
        if busy.shares(ids) < free.shares(ids) + WORTH_COPYING:
            return free
        self._answers.settle()
        return busy.fork()

    def finished(self, wait: bool = False) -> Iterator[tuple[Request, dict]]:
        """Wait for a free session; returns the results that are next in order. With `wait`: all results."""
        while self._answers and (wait or not self._free or self._held_up()):
            self._take(self._answers.step())
        while self._asked and (asked := next(iter(self._asked.values()))).found is not None:
            del self._asked[asked.request.line]
            self.failed += "error" in asked.found
            yield asked.request, asked.found

    def _held_up(self) -> bool:
        """Whether many finished results wait for that of an earlier line."""
        return len(self._asked) > MOST_WAITING and next(iter(self._asked.values())).found is None

    def _take(self, pieces) -> None:
        for line, piece in pieces:
            asked = self._asked[line]
            if isinstance(piece, Exception) and (isinstance(piece, MemoryLimitError) or not isinstance(piece, LlamacliError)):
                raise piece
            if isinstance(piece, LlamacliError):
                asked.found = {"error": str(piece)}
            else:
                asked.text += piece.text
                if piece.finish_reason:
                    asked.found = asked.whole(piece.finish_reason, self._extract)
            if asked.found is not None:
                self._free.append(asked.session)
                asked.session, asked.sampler, asked.views = None, None, ()  # results may wait long for a line before them


@dataclass
class _Asked:
    """A line that is being answered, and its result."""

    request: Request
    session: object = None
    sampler: object = None
    text: str = ""
    found: dict | None = None
    views: Sequence = ()

    def whole(self, reason: str, extract: bool) -> dict:
        """Make the result of an answer that ended."""
        text = next(iter(code_blocks(self.text)), self.text) if extract else self.text
        stats = self.session.stats
        usage = {"prompt_tokens": stats.prompt_tokens, "completion_tokens": stats.completion_tokens}
        found = {"text": text, "finish_reason": reason, "usage": usage}
        if self.views:
            found["images"] = [view.record for view in self.views]
        try:
            check_whole(self.sampler, reason)
        except CutAnswerError as error:
            found["error"] = str(error)
        return found


def _requests(name: str, added: bytes) -> Iterator[Request]:
    """The lines of a file or, for "-", of stdin. Empty lines are counted and skipped. PromptError names an invalid line."""
    if name == "-":
        yield from _parsed("stdin", stdin_lines(_LONGEST), added)
        return
    try:
        with open(name, "rb") as file:
            yield from _parsed(name, iter(lambda: file.readline(_LONGEST), b""), added)
    except (OSError, ValueError) as error:
        raise PromptError(f"{name}: expected a file of JSON lines, found: {getattr(error, 'strerror', error)}") from None


def _parsed(name: str, lines: Iterator[bytes], added: bytes) -> Iterator[Request]:
    for number, raw in enumerate(lines, 1):
        where = f"{name}, line {number}"
        if len(raw) >= _LONGEST:
            raise PromptError(f"{where}: expected less than {_LONGEST >> 20} MB, found more; shorten it")
        if not raw.strip():
            continue
        try:
            found = json.loads(decoded(raw, where), parse_float=_number, parse_constant=_number)
        except (ValueError, RecursionError) as error:
            raise PromptError(f"{where}: expected a text or an object as JSON, found: {error or 'too much nesting'}") from None
        digest = hashlib.sha256(raw.strip() + added).hexdigest()[:16]
        yield _request(where, number, digest, {"prompt": found} if isinstance(found, str) else found)


def _number(text: str) -> float:
    """ValueError for a constant that JSON does not have, such as NaN, and that could not be written."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text:.40}")
    return value


def _request(where: str, number: int, digest: str, found) -> Request:
    if not isinstance(found, dict):
        raise PromptError(f"{where}: expected a text or an object, found {type(found).__name__}")
    if unknown := next((key for key in found if key not in _KEYS), None):
        raise PromptError(f"{where}: expected {', '.join(_KEYS)}, found {unknown!r:.40}")
    prompt, messages, params = found.get("prompt"), found.get("messages"), found.get("params", {})
    images = found.get("images", [])
    if (prompt is None) == (messages is None):
        raise PromptError(f"{where}: expected either prompt or messages, found {'none' if prompt is None else 'both'}")
    if not isinstance(prompt, str | None) or not isinstance(found.get("system"), str | None):
        raise PromptError(f"{where}: expected prompt and system to be texts, found something else")
    if messages is not None and (not isinstance(messages, list) or not all(map(_is_message, messages)) or not messages):
        raise PromptError(
            f"{where}: expected messages to be a list of objects with role and content, a text or parts of text and image, "
            f"found something else"
        )
    if messages is not None and not {"images", "system", "params"}.isdisjoint(found):
        raise PromptError(
            f"{where}: expected messages without images, system and params, found one of them; put it into the messages"
        )
    if not isinstance(images, list) or not all(isinstance(image, str) and image for image in images):
        raise PromptError(f"{where}: expected images to be a list of paths and data: URLs, found something else")
    if not isinstance(params, dict) or not all(isinstance(value, str) for value in params.values()):
        raise PromptError(f"{where}: expected params to be an object of texts, found something else")
    return Request(number, digest, prompt, messages, found.get("system"), found.get("id"), params, images)


def _is_message(found) -> bool:
    if not isinstance(found, dict) or found.keys() != {"role", "content"} or not isinstance(found["role"], str):
        return False
    content = found["content"]
    return isinstance(content, str) or (isinstance(content, list) and bool(content) and all(map(_is_part, content)))


def _is_part(found) -> bool:
    from llamacli.text.template import picture_of  # late: help does not need it

    if not isinstance(found, dict) or found.get("type") not in ("text", "image", "image_url"):
        return False
    said = found.get("text") if found["type"] == "text" else picture_of(found)
    return isinstance(said, str) and (found["type"] == "text" or said != "")


def _messages(request: Request, prompts, name: str) -> list[dict]:
    try:
        if request.messages is not None:
            return prompts.of_messages(request.messages)
        return prompts.messages(request.prompt, request.system, request.params, bool(request.images))
    except UsageError as error:
        raise UsageError(f"{name}, line {request.line}: {error}") from None


class Results:
    """The output: stdout, or a file that grows by whole lines and may hold results of an earlier run."""

    def __init__(self, path: Path | None, console: Console):
        self._path, self._console, self._end = path, console, 0
        self._file, self._resuming = None, False

    def __enter__(self) -> "Results":
        """OutputError if the file cannot be written, or if another run writes to it."""
        if self._path is None:
            return self
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
        except OSError as error:
            raise OutputError(f"{self._path}: expected a file to write to, found: {error.strerror}; choose another") from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):  # a device may be read without end
            os.close(fd)
            raise OutputError(f"{self._path}: expected a file to write to, found a device or a pipe; leave -o out and redirect")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise OutputError(f"{self._path}: expected a file for this run alone, found another that writes to it") from None
        except OSError:  # a file system without locks
            pass
        self._file, self._resuming = open(fd, "rb"), True
        return self

    def __exit__(self, *_) -> None:
        if self._file is not None:
            self._file.close()

    def has(self, request: Request) -> bool:
        """Whether the file has this result; called in order of lines. OutputError if the file has something else there."""
        if not self._resuming:
            return False
        start = _head(request)
        raw = self._file.readline(len(start))
        if raw != start[: len(raw)]:  # an unrelated file may be one line of any length
            raise self._foreign(f"something else where its result {request.line} would be")
        raw += self._file.readline()
        if raw.endswith(b"\n"):
            self._check(raw, request)
            self._end += len(raw)
            return True
        os.truncate(self._file.fileno(), self._end)
        self._resuming = False
        return False

    def _check(self, raw: bytes, request: Request) -> None:
        try:
            found = json.loads(raw)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or (found.get("line"), found.get("input")) != (request.line, request.digest):
            raise self._foreign(f"for line {request.line} one to another text, picture, template or system prompt")

    def check_end(self) -> None:
        """OutputError if the file has more results than the batch has lines."""
        if self._resuming and self._file.read(1):
            raise self._foreign("more than it has lines")

    def _foreign(self, found: str) -> OutputError:
        return OutputError(f"{self._path}: expected the results of this batch, found {found}; choose another name")

    def add(self, request: Request, found: dict) -> None:
        """Write one result. In a file it is either complete and on the disk, or absent."""
        named = {} if request.id is None else {"id": request.id}
        record = {"line": request.line, **named, **found, "input": request.digest}
        text = json.dumps(record, ensure_ascii=False).translate(_ENDS)
        data = text.encode("utf-8", "backslashreplace")  # an id may hold a lone surrogate, which JSON escapes
        if self._file is None:
            self._console.result(data.decode())
            return
        data, at = data + b"\n", self._file.fileno()
        try:
            if (wrote := os.write(at, data)) != len(data):
                os.truncate(at, self._end)
                raise OutputError(f"{self._path}: expected to write {len(data)} bytes, found room for {wrote}; free some")
            os.fsync(at)
        except OSError as error:
            raise OutputError(f"{self._path}: expected to write a result, found: {error.strerror}; free some room") from None
        self._end += len(data)


def _head(request: Request) -> bytes:
    """The beginning of a result's line."""
    return f'{{"line": {request.line}, '.encode()
