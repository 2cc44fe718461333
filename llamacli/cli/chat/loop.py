"""The chat's main loop: start, turns and end.

In: the options of `llamacli chat`. Out: answers on stdout, everything else on stderr.
"""

import contextlib
import sys
import time
from pathlib import Path

from llamacli import environment
from llamacli.cli import signals
from llamacli.cli.chat.commands import ALIASES, COMMANDS, Commands
from llamacli.cli.chat.lines import Lines
from llamacli.cli.chat.show import Screen
from llamacli.cli.chat.talk import Talk
from llamacli.cli.console import Console, is_gone, is_terminal
from llamacli.cli.options import Generation, checked, find_model
from llamacli.cli.tooling import Tooling
from llamacli.conversation import Conversation
from llamacli.errors import LlamacliError, OutputError, UsageError
from llamacli.store import Store

TWICE = 1.0  # most seconds between two Ctrl-C that leave the chat


def talk_at_length(
    options: Generation,
    tooling: Tooling,
    console: Console,
    question: str,
    files: list[Path],
    go_on: bool = False,
    resume: str | None = None,
    no_save: bool = False,
    plain: bool = False,
) -> None:
    """The whole chat. `go_on`: the latest conversation; `resume`: the one of this id or name."""
    typed = is_terminal(sys.stdin)
    if no_save and (go_on or resume is not None):
        raise UsageError("--no-save: expected a new conversation, found one to go on with; leave one of the two out")
    if go_on and resume is not None:
        raise UsageError("--continue and --resume exclude each other: the first means the latest conversation; leave one out")
    if no_save and options.cache:
        raise UsageError("--no-save and --cache exclude each other: the second keeps what was computed; leave one out")
    store = None if no_save else _store(console, required=go_on or resume is not None, wanted=typed)
    earlier = store.latest() if go_on else store.find(resume) if resume is not None else None
    if options.server is not None:
        name = str(options.server)
    else:
        if earlier and options.model is None and Path(earlier.model).exists():
            options.model = earlier.model
        name = options.model = str(find_model(options.model, console))
    conversation = Conversation.resume(store, earlier) if earlier else Conversation(store, name)
    if options.system is not None:
        conversation.system = options.system
    edits = typed and not environment.dumb_terminal() and (is_terminal(sys.stdout) or is_terminal(sys.stderr))
    screen = Screen(console, edits, plain)
    with tooling.box(console, screen.suspended) as box:
        if box and not box.runs_all:
            raise UsageError("chat: expected tools that run here, found definitions alone; give each a command, or use run")
        talk = Talk(options.load(console), options, console, conversation, box)
        if earlier:
            conversation.use(name)
        commands = Commands(talk, console, screen, store, typed)
        turns = _prompt(commands, store, console) if edits else Lines(console, typed)
        if typed:
            console.note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
        if earlier:
            commands.recall()
        for path in files:
            commands.attach(path)
        for name in options.image or ():
            talk.show(Path(name))
        with screen.quiet if edits else contextlib.nullcontext():
            loop(commands, turns, console, checked(question, "question"))


def _store(console: Console, required: bool, wanted: bool) -> Store | None:
    """The database of conversations, for a chat at a terminal or one that continues an earlier conversation. If it cannot be
    opened, the chat runs without it.
    """
    if not (required or wanted):
        return None
    try:
        return Store(environment.conversations_file())
    except LlamacliError as error:
        if required:
            raise
        console.warn(f"this conversation will not be kept: {error}")
        return None


def _prompt(commands: Commands, store: Store | None, console: Console):
    from llamacli.cli.chat.prompt import Prompt, Words

    names = {name: help for name, (_, help) in COMMANDS.items()} | {alias: f"as {name}" for alias, name in ALIASES.items()}
    return Prompt(store, Words(names, commands.arguments), commands.status, console.coloured())


def loop(commands: Commands, turns, console: Console, first: str) -> None:
    """Read and answer turns. Ctrl-C discards the typed text; twice in a row it leaves. At a terminal errors are shown and the
    chat continues.
    """
    interrupted, typed = float("-inf"), commands.typed
    while True:
        try:
            turns.type_ahead(commands.screen.quiet.take())
            text, first = first or turns.turn(commands.draft), ""
            commands.take(text)
        except EOFError:
            if typed and not commands.screen.edits:
                console.say("")
            return
        except KeyboardInterrupt:
            signals.obeyed()
            now = time.monotonic()
            if not commands.screen.edits and typed:
                console.say("")
            if now - interrupted < TWICE or not typed:
                raise
            interrupted = now
            commands.forget_draft()
            console.note("Ctrl-D or /exit leaves, Ctrl-C twice too")
        except (BrokenPipeError, OutputError) as error:
            if not typed or not _lasts(error):
                raise
            console.fail(str(error))
        except LlamacliError as error:
            if not typed:
                raise
            console.fail(str(error))
        except MemoryError as error:
            if not typed:
                raise
            console.fail(f"out of memory: {error or 'an allocation failed'}; /ctx with a smaller number needs less")
        except OSError as error:
            if not typed or is_gone(sys.stdin):  # a closed terminal fails at every turn
                raise
            console.fail(
                f"{error.filename or 'reading or writing'}: expected it to work, found: {error.strerror or error}; try again"
            )
        except Exception as error:
            if not typed or environment.debug() or is_gone(sys.stdin):
                raise
            console.fail(f"{type(error).__name__}: {error} (a bug, please report it; LLAMACLI_DEBUG=1 shows where)")


def _lasts(error: Exception) -> bool:
    """Whether stdout can still be written: the error may be about a file that /export wrote."""
    if isinstance(error, BrokenPipeError):
        return False
    with contextlib.suppress(OSError):
        return not str(error).startswith("stdout:")
    return False
