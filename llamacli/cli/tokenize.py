"""`llamacli tokenize`: text in, token ids as JSON on stdout. Needs the file's vocabulary only, no engine."""

import json
from typing import Annotated

from llamacli.cli.grammar import argument, option
from llamacli.cli.options import (
    Json,
    ModelName,
    Output,
    checked,
    find_model,
    is_model,
    one_model,
    read_file,
    read_stdin,
)
from llamacli.errors import UsageError


def tokenize(
    text: Annotated[
        list[str] | None, argument("[TEXT]...", "The text; words are joined by spaces (default: all of stdin).", empty=True)
    ] = None,
    prompt: Annotated[str | None, option("-p", "--prompt", metavar="TEXT", hidden=True, empty=True, help="The text.")] = None,
    file: Annotated[
        str | None, option("-f", "--file", metavar="FILE", group="Text", help="The text, UTF-8; - is stdin.")
    ] = None,
    model: ModelName = None,
    special: Annotated[bool, option("--special", help="Read <|...|> in the text as special tokens.")] = False,
    no_bos: Annotated[bool, option("--no-bos", help="Leave out the token that begins every text.")] = False,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Print the token ids of a text as a JSON list.

    Examples:
    llamacli tokenize "How many tokens is this?"
    llamacli tokenize -m scout.gguf -f report.txt | jq length
    """
    from llamacli.files.gguf import open_gguf
    from llamacli.text.tokenizer import Tokenizer

    console = output.console()
    words = [*(text or [])]
    if model is None and len(words) + (prompt is not None or file is not None) > 1 and is_model(words[0]):
        model = one_model(words.pop(0), model)
    given = [words or None, prompt, file]
    if sum(each is not None for each in given) > 1:
        raise UsageError("expected one text, found several; give words, or -f FILE, or stdin")
    if file is not None:
        found = read_file(file, console)
    elif words or prompt is not None:
        found = checked(" ".join(words) if words else prompt, "text")
    else:
        found = read_stdin(console)
    tokenizer = Tokenizer.from_gguf(open_gguf(find_model(model, console)))
    console.result(json.dumps([int(i) for i in tokenizer.encode(found, bos=not no_bos, special=special)]))
