"""`python -m llamacli`: the same as the command."""

from llamacli.cli import enter

enter()
