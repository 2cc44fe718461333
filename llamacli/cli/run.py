"""`llamacli run`: one prompt, one answer on stdout.

In: words, files, stdin. Out: the answer's bytes and one newline, or one JSON object. On a terminal also the progress of the
prompt, until the first token.
"""

import json
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from llamacli.cli import signals
from llamacli.cli.batch import answer_all
from llamacli.cli.binding import check_whole, slowness
from llamacli.cli.code import code_blocks
from llamacli.cli.console import Console, is_terminal
from llamacli.cli.grammar import OTHER, Given, argument, option
from llamacli.cli.images import MOST_BYTES, look, picture_in, read_pictures
from llamacli.cli.inputs import read_stdin_bytes
from llamacli.cli.newfile import check_new, write_new
from llamacli.cli.options import Generation, Json, Output, checked, decoded, is_model, read_file, stdin_is_piped
from llamacli.cli.progress import Meter, clock_time
from llamacli.cli.prompts import Prompts, joined
from llamacli.cli.stats import describe
from llamacli.cli.templates import Template, names, parameters
from llamacli.cli.tooling import Tooling
from llamacli.errors import OutputError, UsageError

if TYPE_CHECKING:
    from llamacli.vision.pictures import Picture

SEVERAL = 8  # answers of --best-of at a time


def run(
    prompt: Annotated[list[str] | None, argument("[PROMPT]...", "The prompt; words are joined by spaces.", empty=True)] = None,
    prompt_option: Annotated[
        str | None, option("-p", "--prompt", metavar="TEXT", hidden=True, empty=True, help="The prompt.")
    ] = None,
    file: Annotated[
        list[str] | None,
        option("-f", "--file", metavar="FILE", group="Text", help="Text before the prompt; repeatable, - is stdin."),
    ] = None,
    raw: Annotated[bool, option("--raw", group="Text", help="Continue the text as it is: no chat template.")] = False,
    no_stdin: Annotated[bool, option("--no-stdin", group="Text", help="Do not read stdin (for ssh, cron and loops).")] = False,
    single_turn: Annotated[
        bool, option("-st", "--single-turn", hidden=True, help="Accepted; run always answers once.")
    ] = False,
    out: Annotated[
        str | None, option("-o", "--output", metavar="FILE", group=OTHER, help="Write the answer to a new file, not to stdout.")
    ] = None,
    no_stream: Annotated[
        bool, option("--no-stream", group=OTHER, help="Write the answer at its end, in one piece (for parallel runs).")
    ] = False,
    extract: Annotated[
        bool, option("-x", "--extract", group=OTHER, help="Write only the first block of code of the answer, if it has one.")
    ] = False,
    template: Annotated[
        str | None,
        option(
            "--template",
            metavar="NAME",
            group="Text",
            complete=lambda start: names(),
            help="Fill in a prompt template, by its name or its file; see docs/usage.md.",
        ),
    ] = None,
    param: Annotated[
        list[str] | None,
        option("--param", metavar="NAME=VALUE", group="Text", help="A value for a place of the template; repeatable."),
    ] = None,
    batch: Annotated[
        str | None,
        option(
            "--batch",
            metavar="FILE",
            group="Text",
            help="Answer a prompt a line, given as JSON lines; with -o FILE a run that was stopped goes on.",
        ),
    ] = None,
    parallel: Annotated[
        int | None,
        option(
            "--parallel",
            metavar="N",
            group="Text",
            aliases=("-np",),
            least=1,
            most=64,
            help="Prompts of --batch that are answered at a time; each holds a context (default: up to 8, as memory allows).",
        ),
    ] = None,
    best_of: Annotated[
        int | None,
        option(
            "--best-of",
            metavar="N",
            group="Sampling",
            least=1,
            most=64,
            help="Sample N answers, with the seeds from --seed on, and write the likeliest; with --json all.",
        ),
    ] = None,
    as_json: Json = False,
    logprobs: Annotated[
        int | None,
        option(
            "--logprobs",
            metavar="N",
            group=OTHER,
            least=0,
            most=1000,
            help="With --json: the log probability of each token and of the N likeliest in its place.",
        ),
    ] = None,
    tooling: Tooling = None,
    options: Generation = None,
    output: Output = None,
) -> None:
    """Answer one prompt; text piped in comes before it.

    The answer alone goes to stdout. Exit code: 0 answered (also at the -n limit), 1 failed, 2 wrong usage.

    Examples:
    llamacli run "What is the capital of France?"
    git diff | llamacli run "Write a commit message for this" -n 200
    llamacli run -m scout.gguf -f report.txt --temp 0 "Summarize in five points"
    llamacli run --json "Name three rivers" | jq -r .text
    llamacli run --choice yes,no "Is Rome in Italy?"
    llamacli run --best-of 8 --temp 1 "Write a limerick about compilers"
    llamacli run --batch questions.jsonl -o answers.jsonl --temp 0
    llamacli run -m scout.gguf --image receipt.jpg "What did this cost?"
    llamacli run -m scout.gguf --functions weather.py "Do I need an umbrella in Oslo?"
    """
    console = output.console()
    words = ([prompt_option] if prompt_option is not None else []) + [*(prompt or [])]
    if prompt_option is None and options.server is None:
        options.model, words = _model_first(options.model, words, bool(file) or (not no_stdin and stdin_is_piped()), console)
    if raw and getattr(options.system, "typed", options.system is not None):
        raise UsageError("--raw and --system exclude each other: without the chat template there is no system prompt")
    if logprobs is not None and not as_json:
        raise UsageError("--logprobs: expected --json with it, which is what shows them; add it or leave this out")
    if parallel is not None and batch is None:
        raise UsageError("--parallel: expected --batch with it, which has several prompts; add it or leave this out")
    if param and template is None:
        raise UsageError("--param: expected --template with it, which has the places; add it or leave this out")
    if tooling.asked and (raw or batch is not None or options.bound):
        other = "--raw" if raw else "--batch" if batch is not None else "--schema, --grammar and --choice"
        raise UsageError(f"tools and {other} exclude each other; leave one of them out")
    if best_of is not None and (tooling.asked or batch is not None or options.server is not None):
        other = "--batch" if batch is not None else "tools" if tooling.asked else "--server"
        raise UsageError(f"--best-of and {other} exclude each other; leave one of them out")
    if best_of is not None and options.temp == 0:
        raise UsageError("--best-of: expected --temp above 0, found 0, at which all answers are the same; raise it")
    text, pictures = _text(words, file or [], options.image or [], no_stdin or batch is not None, console, options)
    if raw and options.server is not None and pictures:
        raise UsageError("--raw, pictures and --server exclude each other: only a chat carries pictures; leave one of them out")
    form = Template.find(template, console) if template is not None else None
    prompts = Prompts(text, None if raw else options.system, form, parameters(param or []), raw, bool(pictures))
    if batch is not None:
        if logprobs is not None:
            raise UsageError("--batch and --logprobs exclude each other; leave one of them out")
        answer_all(batch, out and Path(out), prompts, pictures, options, extract, console, parallel)
        return
    if out is not None:
        check_new(Path(out))
    messages = prompts.messages()
    with tooling.box(console) as box:
        began = time.perf_counter()
        contexts = 1 if best_of is None else min(best_of, SEVERAL) + 1  # for the prompt, and for each answer under way
        model = options.load(console, contexts, pictured=bool(pictures))
        load_s = time.perf_counter() - began
        if options.server is None:
            views = look(model, pictures, options.image_tiles, console)
            pictures.clear()  # they are large, and have been seen
            ids = prompts.ids(model, messages, views)
        else:
            messages, views = prompts.seen(messages, pictures), ()
            ids = model.text(messages[-1]["content"]) if raw else model.prompt_ids(messages)
        how = console, load_s, as_json, Path(out) if out else None, no_stream or extract or best_of is not None, extract, box
        answer = Answer(*how)
        if best_of is not None:
            from llamacli.cli.best import BestAnswer

            answer = BestAnswer(best_of, *how)
        answer.take(model, ids, options, logprobs, views, prompts.seen(messages, views))


def _model_first(model: str | None, words: list[str], more: bool, console: Console) -> tuple[str | None, list[str]]:
    """`run MODEL PROMPT`, as in other programs: the first word is the model if it names one."""
    if model is not None or not words or not is_model(words[0]):
        return model, words
    name, rest = str(words[0]), words[1:]
    if not rest and not more:
        raise UsageError(
            f"expected a prompt, found {name} alone, which is a model; `llamacli chat -m {name}` talks with it, "
            f"`-p {name}` makes it the prompt"
        )
    console.note(f"model: {name}, by the first word (-m {name} says the same)")
    return Given(name, "PROMPT"), rest


def _text(
    words: list[str], files: list[str], images: list[str], no_stdin: bool, console: Console, options: Generation
) -> tuple[str, list["Picture | str"]]:
    """The text of stdin, the files and the words, with blank lines between; and the pictures. stdin may be a picture."""
    limit, send = options.limit, options.server is not None
    pictures = read_pictures(images, console, send)
    parts = [read_file(name, console, limit) for name in files]
    if "-" not in (*files, *images) and not no_stdin and stdin_is_piped():
        data = read_stdin_bytes(console, limit, MOST_BYTES, "; --no-stdin leaves it alone")
        if (picture := picture_in(data, send)) is not None:
            pictures.insert(0, picture)
            data = b""
        parts.insert(0, decoded(data, "stdin"))
        if parts[0] and words and is_terminal(sys.stderr) and is_terminal(sys.stdout):
            console.note(f"read {len(parts[0].encode())} bytes of stdin before the prompt; --no-stdin leaves it alone")
    return joined(*parts, checked(" ".join(words), "prompt")), pictures


class Answer:
    """Writes one answer to its destination as it streams, and reports how it ended."""

    def __init__(self, console: Console, load_s: float, as_json: bool, out: Path | None, whole: bool, extract: bool, box=None):
        """`box`: tools that the model may call (tools/loop.Toolbox)."""
        self._console, self._load_s, self._as_json, self._out, self._extract = console, load_s, as_json, out, extract
        self._held = as_json or whole or out is not None  # nothing is shown before the end
        self._text: list[str] = []
        self._logprobs: list[dict] | None = None
        self._views: Sequence = ()
        self._said, self._box = False, box

    def take(
        self,
        model,
        ids: list,
        options: Generation,
        logprobs: int | None = None,
        views: Sequence = (),
        messages: Sequence[dict] = (),
    ) -> None:
        """Answer `ids`, whose pictures are `views`; on Ctrl-C, SIGTERM and an error the text so far is kept.

        `logprobs`: as --logprobs. `messages`: the conversation that the ids are made of; with tools, it is answered instead of
        the ids.
        """
        self._views = views
        self._logprobs = None if logprobs is None else []
        session, sampler = options.session(model, exact=True), options.sampler(model, self._console, logprobs)
        console, reason = self._console, None
        wrap = None if self._held else console.wrap()
        with ExitStack() as stack:
            first = stack.enter_context(reading(console, model))
            stack.enter_context(signals.at_forced_end(lambda: self._end(session.stats, "interrupt")))
            try:
                for piece in self._pieces(model, session, sampler, ids, messages, options):
                    first()
                    self._text.append(piece.text)
                    if piece.logprobs and self._logprobs is not None:
                        self._logprobs.append(likely(model.tokenizer, piece))
                    reason = piece.finish_reason
                    if not self._held:
                        console.piece(wrap(piece.text))
            finally:  # also on Ctrl-C and SIGTERM
                first()
                broken = sys.exc_info()[0]
                if broken is None or broken in (KeyboardInterrupt, SystemExit):
                    self._end(session.stats, reason or "interrupt")
                    if broken is KeyboardInterrupt and session.stats.completion_tokens:
                        console.note(describe(session.stats, "interrupt", self._load_s))
                elif not self._held:
                    console.end(always=False)
                elif self._text and not issubclass(broken, OutputError | OSError):  # of these stdout may be the cause
                    self._end(session.stats, "error")
        for notice in session.snapshots.notices if session.snapshots else ():
            console.note(notice)
        if reason == "rounds":
            console.warn(f"the answer ends after {self._box.rounds} rounds of calls; --tool-rounds allows more")
        if reason == "context":
            larger = "use a larger -c" if options.server is None else "shorten the prompt, or ask a server with a larger one"
            console.warn(f"the context of {model.ctx} tokens is full, the answer ends here; {larger}")
        if console.verbose or reason not in ("stop", "tool_calls", None):
            console.note(describe(session.stats, reason, self._load_s))
        if slow := slowness(sampler, session.stats):
            console.note(slow)
        if self._box is None:  # a call that is cut is text
            check_whole(sampler, reason)

    def _pieces(self, model, session, sampler, ids: list, messages: Sequence[dict], options: Generation):
        limits = options.max_tokens, options.stop or ()
        if self._box is None:
            return session.stream(ids, sampler, *limits)
        from llamacli.tools.loop import answer

        return answer(model, session, sampler, messages, self._box, *limits)

    def _end(self, stats, reason: str) -> None:
        if self._said:
            return
        self._said, text = True, self._wanted("".join(self._text))
        if self._as_json:
            record = _record(text, reason, stats, self._load_s, self._views)
            if self._logprobs is not None:
                record["logprobs"] = {"content": self._logprobs}
            if self._box is not None:
                record["usage"], record["tool_calls"] = self._box.usage, self._box.record
            text = json.dumps(record | self._more(), ensure_ascii=False)
        elif self._box is not None and self._box.calls:  # no tool runs here: the calls are the answer
            calls = "".join(json.dumps(call, ensure_ascii=False) + "\n" for call in self._box.record if "result" not in call)
            self._show_calls(text, calls)
            return
        if self._out is not None:
            self._write(text)
        elif self._as_json:
            self._console.result(text)
        elif self._held:
            self._console.piece(text)
            self._console.end(always=reason != "interrupt")
        else:
            self._console.end(always=reason != "interrupt")

    def _wanted(self, text: str) -> str:
        """The part of an answer that is written."""
        return next(iter(code_blocks(text)), text) if self._extract else text

    def _more(self) -> dict:
        """Further fields of the JSON object."""
        return {}

    def _show_calls(self, text: str, calls: str) -> None:
        """Write the calls after the text, a line each."""
        if self._out is not None:
            self._write(f"{text}\n{calls}" if text.strip() else calls)
            return
        if self._held and text.strip():
            self._console.piece(text)
        self._console.end(always=False)
        self._console.piece(calls)

    def _write(self, text: str) -> None:
        """Write the answer to the file. If that fails, write it to stdout, since it may have taken long."""
        text = text if text.endswith("\n") else text + "\n"
        try:
            write_new(self._out, text)
        except OutputError as error:
            self._console.piece(text)
            raise OutputError(f"{error}; the answer went to stdout") from None


@contextmanager
def reading(console: Console, model):
    """A context that shows the progress of a prompt that takes more than a second. Yields a function to call at the first
    token.
    """
    began, signs, meter = time.monotonic(), console.signs(), None
    streams = any(getattr(stage, "slots", None) for stage in getattr(model.engine, "stages", ()))
    what = "reading the prompt and experts" if streams else "reading the prompt"

    def follow(done: int, total: int) -> None:
        nonlocal meter
        meter = meter or Meter(what)
        meter.update(done, total, f"{what}, {done:>{len(f'{total:,}')},} of {total:,} tokens")

    def words() -> str:
        if meter is None:
            return f"{what}, {clock_time(time.monotonic() - began)}"
        return meter.bar(console.width() - 1, *signs)

    with console.waiting(words) as stop:

        def first() -> None:
            model.engine.follow_progress = None
            stop()

        model.engine.follow_progress = follow
        try:
            yield first
        finally:
            model.engine.follow_progress = None


def _record(text: str, reason: str, stats, load_s: float, views: Sequence = ()) -> dict:
    timings = {"load_s": load_s} | {
        name: getattr(stats, name) for name in ("prefill_s", "decode_s", "prefill_tps", "decode_tps")
    }
    if views:
        timings["vision_s"] = sum(view.seconds for view in views)
    record = {
        "text": text,
        "finish_reason": reason,
        "usage": {"prompt_tokens": stats.prompt_tokens, "completion_tokens": stats.completion_tokens},
        "timings": {name: value if value is None else round(value, 4) for name, value in timings.items()},
    }
    return record | ({"images": [view.record for view in views]} if views else {})


def likely(tokenizer, piece) -> dict:
    """A token of the answer, its log probability and the likeliest in its place, named as in OpenAI's protocol."""

    def named(id: int, logprob: float) -> dict:
        data = tokenizer.token_bytes(id, special=True)
        return {"id": id, "token": data.decode("utf-8", "replace"), "bytes": [*data], "logprob": round(logprob, 6)}

    own, likeliest = piece.logprobs
    return named(piece.id, own) | {"top_logprobs": [named(id, logprob) for id, logprob in likeliest]}
