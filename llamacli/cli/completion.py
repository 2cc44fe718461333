"""`llamacli completion`: the script by which a shell completes commands, options and their values."""

from typing import Annotated

from llamacli.cli.grammar import argument
from llamacli.cli.options import Output
from llamacli.errors import UsageError

SHELLS = ("bash", "zsh", "fish")


def completion(
    shell: Annotated[str, argument("SHELL", "bash, zsh or fish.", complete=lambda start: SHELLS)] = ...,
    output: Output = None,
) -> None:
    """Print the script that completes commands, options and values in a shell.

    Put the line of your shell into its start-up file.

    Examples:
    eval "$(llamacli completion bash)"           # in ~/.bashrc
    eval "$(llamacli completion zsh)"            # in ~/.zshrc, after compinit
    llamacli completion fish | source            # in ~/.config/fish/config.fish
    """
    from click.shell_completion import get_completion_class

    from llamacli.cli import parser

    if shell not in SHELLS:
        raise UsageError(f"SHELL: expected bash, zsh or fish, found {shell!r}")
    script = get_completion_class(shell)(parser(), {}, "llamacli", "_LLAMACLI_COMPLETE").source()
    output.console().result(script.strip())
