"""`llamacli tokenize`: text in, token ids as JSON on stdout. Needs the file's vocabulary only, no engine."""

import json
from typing import Annotated

import typer

from llamacli.cli.options import ModelName, Output, checked, find_model, option, read_stdin


def tokenize(
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="The text (default: all of stdin).")] = None,
    model: ModelName = None,
    special: Annotated[bool, option("--special", help="Read <|...|> in the text as special tokens.")] = False,
    no_bos: Annotated[bool, option("--no-bos", help="Leave out the token that begins every text.")] = False,
    output: Output = None,
) -> None:
    """Print the token ids of a text as a JSON list."""
    from llamacli.files.gguf import open_gguf
    from llamacli.text.tokenizer import Tokenizer

    console = output.console()
    text = read_stdin(console) if text is None else checked(text, "text")
    tokenizer = Tokenizer.from_gguf(open_gguf(find_model(model, console)))
    console.result(json.dumps([int(i) for i in tokenizer.encode(text, bos=not no_bos, special=special)]))
