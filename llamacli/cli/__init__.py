"""The command line's two edges: arguments go in to one command a file, every error comes out as one line and an exit code.

In: sys.argv. Out: an exit code (0 answered, 1 could not, 2 usage, 130 Ctrl-C, 141 closed pipe, 143 SIGTERM). Everything else
is imported late, so that Ctrl-C and errors are caught from the first moment and `--help` stays fast. Knows nothing of models.
"""

import os
import signal
import sys
from importlib import import_module

COMMANDS = (
    "run",
    "chat",
    "quantize",
    "inspect",
    "plan",
    "tokenize",
    "perplexity",
    "imatrix",
    "bench",
    "warmup",
    "history",
)  # a module each
CLOSED_PIPE, INTERRUPTED, TERMINATED = 141, 130, 143


def enter() -> None:
    """The program's door: run one command and end the process at once.

    There is nothing to tidy up, and taking apart a vocabulary and a map of gigabytes takes the interpreter a tenth of a second.
    """
    code = main()
    if sys.stderr is not None:
        sys.stderr.flush()
    os._exit(code)


def main(args: list[str] | None = None) -> int:
    """Run one command. Never raises, never shows a traceback unless LLAMACLI_DEBUG=1."""
    try:
        signal.signal(signal.SIGTERM, _terminate)
        _occupy_standard_streams()
        return _flushed(_run(args))
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 1
    except BrokenPipeError:
        return _quietly(CLOSED_PIPE)
    except Exception as error:
        return _quietly(_report(error))
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is left is the interpreter's own end, nothing to interrupt


def _run(args: list[str] | None) -> int:
    import typer

    from llamacli.cli.options import flat

    app = typer.Typer(
        help="Llama 4 in the terminal: GGUF in, tokens out.",
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback(invoke_without_command=True)
    def top(
        context: typer.Context, version: bool = typer.Option(False, "--version", help="Show the version and leave.")
    ) -> None:
        if version:
            from llamacli import __version__

            typer.echo(f"llamacli {__version__}")
        elif context.invoked_subcommand is None:
            typer.echo(context.get_help())

    args = sys.argv[1:] if args is None else list(args)
    for name in args[:1] if args[:1] and args[0] in COMMANDS else COMMANDS:  # one is enough where one is asked for
        app.command()(flat(getattr(import_module(f"llamacli.cli.{name}"), name)))
    group = typer.main.get_command(app)
    if "_LLAMACLI_COMPLETE" in os.environ:
        group(prog_name="llamacli")  # a shell asks for completions; leaves by SystemExit
    try:
        with group.make_context("llamacli", args) as context:
            group.invoke(context)
    except typer.Exit as leaving:
        return leaving.exit_code
    return 0


def _terminate(signum, frame) -> None:
    raise SystemExit(TERMINATED)


def _occupy_standard_streams() -> None:
    """Give a closed standard stream to the void, or the next file opened would get its number and our output."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _flushed(code: int) -> int:
    if sys.stdout is not None:
        sys.stdout.flush()  # help and completions come through here; answers are never buffered
    return code


def _quietly(code: int) -> int:
    """Let what is still buffered for a dead stream fall into the void instead of raising at the interpreter's end."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        void = os.open(os.devnull, os.O_WRONLY)
        os.dup2(void, sys.stdout.fileno())
    return code


def _report(error: Exception) -> int:
    from llamacli import environment
    from llamacli.cli.console import complain
    from llamacli.errors import LlamacliError

    if environment.debug():
        import traceback

        traceback.print_exc()
    if isinstance(error, LlamacliError):
        message, code = str(error), error.exit_code
    elif hasattr(error, "format_message"):  # the parser's own errors, wherever this version of it keeps their class
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "llamacli"
        message, code = f"{error.format_message()} (see {where} --help)", getattr(error, "exit_code", 2)
    elif isinstance(error, MemoryError):
        message, code = f"out of memory: {error or 'an allocation failed'}; use a smaller -c or a smaller file", 1
    elif isinstance(error, OSError) and error.filename is not None:  # a name too long, for one
        message, code = f"{error.filename}: expected a path that can be used, found: {error.strerror}; check it", 1
    else:
        message, code = f"{type(error).__name__}: {error} (a bug, please report it; LLAMACLI_DEBUG=1 shows where)", 1
    complain(message)
    return code
