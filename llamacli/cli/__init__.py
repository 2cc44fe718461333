"""Entry point of the command line: it runs one command, a module each, and turns every error into one line and an exit code.

In: sys.argv. Out: an exit code (0 answered, 1 failed, 2 wrong usage, 141 closed pipe), or death by the signal that ended the
command (a shell shows 129, 130 or 143). Everything else is imported late, so that `--help` stays fast.
"""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module

COMMANDS = (  # a module each
    "run",
    "chat",
    "serve",
    "cluster",
    "quantize",
    "inspect",
    "plan",
    "tokenize",
    "perplexity",
    "imatrix",
    "bench",
    "doctor",
    "warmup",
    "models",
    "history",
    "cache",
    "config",
    "completion",
)
MANY_FILES = 8192  # fewer than any system refuses
CLOSED_PIPE, HUNG_UP, INTERRUPTED, TERMINATED = 141, 129, 130, 143


def enter() -> None:
    """Run one command and end the process at once.

    No cleanup is needed, and freeing a vocabulary and unmapping gigabytes takes the interpreter a tenth of a second.
    """
    from llamacli.cli import signals

    try:
        _allow_files()
        code = main(started=signals.install)  # until then a signal ends the process at once, since there is nothing to keep
        if sys.stderr is not None:
            sys.stderr.flush()
        if code not in (HUNG_UP, INTERRUPTED, TERMINATED):
            os._exit(code)
    except KeyboardInterrupt:  # before main began, or after it returned
        code = INTERRUPTED
    except SystemExit as leaving:
        code = leaving.code
    signals.die(code - 128)


def _allow_files() -> None:
    """Raise the limit of open files: a split model takes two descriptors for each part, and macOS allows 256 by default."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, MANY_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):  # a sandbox may forbid it
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def main(args: list[str] | None = None, started: Callable[[], None] = lambda: None) -> int:
    """Run one command. Never raises, never shows a traceback unless LLAMACLI_DEBUG=1.

    `started` is called when the command is known and its module imported.
    """
    try:
        _occupy_standard_streams()
        return _flushed(_run(args, started))
    except KeyboardInterrupt:
        return _quietly(INTERRUPTED)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 1
    except BrokenPipeError:
        return _quietly(CLOSED_PIPE)
    except Exception as error:
        return _quietly(_report(error))


def _run(args: list[str] | None, started: Callable[[], None]) -> int:
    import click

    args = sys.argv[1:] if args is None else list(args)
    if len(args) > 1 and args[0] in ("-v", "--verbose", "-q", "--quiet"):  # a habit from other programs
        args = [args[1], args[0], *args[2:]]
    if args[:1] == ["help"]:
        args = [*args[1:2], "--help"]
    if args[:1] in (["-V"], ["--version"]):
        from llamacli import __version__
        from llamacli.cli.console import Console

        Console().result(f"llamacli {__version__}")
        return 0
    group = parser(started)
    if "_LLAMACLI_COMPLETE" in os.environ:
        group(prog_name="llamacli")  # a shell asks for completions; leaves by SystemExit
    try:
        with group.make_context("llamacli", args or ["--help"]) as context:
            group.invoke(context)
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    return 0


def parser(started: Callable[[], None] = lambda: None):
    """The click group of all commands; a command's module is imported when it is asked for. `started` as for `main`."""
    import click

    from llamacli.cli import grammar
    from llamacli.errors import UsageError

    class Program(click.Group):
        def list_commands(self, ctx):
            return list(COMMANDS)

        def get_command(self, ctx, name):
            return grammar.command(getattr(import_module(f"llamacli.cli.{name}"), name)) if name in COMMANDS else None

        def resolve_command(self, ctx, args):
            if args[0] not in COMMANDS and not ctx.resilient_parsing:
                if " " in args[0]:
                    raise UsageError(f"expected a command, found a text; `llamacli run {args[0]!r}` answers it")
                near = grammar.meant(args[0], COMMANDS) or f"; commands: {', '.join(COMMANDS)}"
                raise UsageError(f"expected a command, found {args[0]!r}{near} (see llamacli --help)")
            found = super().resolve_command(ctx, args)
            if not ctx.resilient_parsing:
                started()
            return found

    return Program(
        "llamacli",
        help="Llama 4 in the terminal: GGUF in, tokens out.",
        epilog='`llamacli run "What is the capital of France?"` answers once, `llamacli chat` starts a conversation, and '
        "`llamacli COMMAND --help` shows a command's options.",
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
        params=[click.Option(["-V", "--version"], is_flag=True, help="Show the version and leave.")],
    )


def _occupy_standard_streams() -> None:
    """Open /dev/null in place of a closed standard stream, since the next file opened would get its descriptor and our
    output.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _flushed(code: int) -> int:
    if sys.stdout is not None:
        sys.stdout.flush()  # help and completions are buffered; answers never are
    return code


def _quietly(code: int) -> int:
    """Discard what is still buffered for a broken stream, so that the interpreter does not raise an error when it ends."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
    return code


def _report(error: Exception) -> int:
    from click import ClickException

    from llamacli import environment
    from llamacli.cli.console import complain
    from llamacli.cli.grammar import explain
    from llamacli.errors import LlamacliError

    if environment.debug():
        import traceback

        traceback.print_exc()
    if isinstance(error, LlamacliError):
        message, code = str(error), error.exit_code
    elif isinstance(error, ClickException):
        message, code = explain(error), error.exit_code
    elif isinstance(error, MemoryError):
        message, code = f"out of memory: {error or 'an allocation failed'}; use a smaller -c or a smaller file", 1
    elif isinstance(error, OSError) and error.filename is not None:  # a name too long, for one
        message, code = f"{error.filename}: expected a path that can be used, found: {error.strerror}; check it", 1
    elif isinstance(error, OSError) and error.errno in (5, 28):  # of a buffered stream: help, completions
        message, code = f"stdout: expected to write, found: {error.strerror}; free some room or redirect elsewhere", 1
    else:
        bug = f"{type(error).__name__}: {error} (a bug, please report it; LLAMACLI_DEBUG=1 shows where)"
        message, code = _of_the_system(error) or bug, 1
    complain(message)
    return code


def _of_the_system(error: Exception) -> str | None:
    """A message for an error of this machine: no more threads, or a package that cannot be loaded; None for any other error."""
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return "expected to start a thread, found that the system gives no more; use fewer (-t), or raise its limit (ulimit -u)"
    own = isinstance(error, ImportError) and (error.name or "").partition(".")[0] in ("llamacli", "quantize")
    if own or not (isinstance(error, ImportError) or "load shared object" in str(error)):  # llvmlite's is an OSError
        return None
    cause = error.__cause__ if isinstance(error.__cause__, ImportError) else error  # NumPy wraps the cause in a long text
    return (
        f"expected llamacli's packages to load, found: {str(cause)[:300]}; install them again, in an environment of their own"
    )
