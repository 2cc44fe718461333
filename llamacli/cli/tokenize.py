"""`llamacli tokenize`: a text or a picture to token ids, or ids to text. It reads a vocabulary and a tower's sizes only."""

import json
import re
from pathlib import Path
from typing import Annotated

from llamacli.cli.grammar import argument, option, refuse
from llamacli.cli.images import read_pictures
from llamacli.cli.options import (
    Json,
    ModelName,
    Output,
    Tower,
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
    image: Annotated[
        str | None,
        option("--image", metavar="FILE", group="Text", help="The tokens of a picture instead of a text; - is stdin."),
    ] = None,
    image_tiles: Annotated[
        int | None, option("--image-tiles", metavar="N", least=1, help="Most tiles of the picture, as for run (the model's).")
    ] = None,
    mmproj: Tower = None,
    special: Annotated[bool, option("--special", help="Read <|...|> in the text as special tokens.")] = False,
    no_bos: Annotated[bool, option("--no-bos", help="Omit the token that begins every text.")] = False,
    pieces: Annotated[bool, option("--pieces", help="A line for each token: its id, and its text as a JSON string.")] = False,
    count: Annotated[bool, option("--count", help="Print only the number of tokens.")] = False,
    decode: Annotated[
        str | None,
        option("--decode", metavar="IDS", help="The other way: the text of ids, such as 15,16 or a JSON list; - is stdin."),
    ] = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Print the token ids of a text or of a picture as a JSON list, or the text of ids.

    Examples:
    llamacli tokenize "How many tokens is this?"
    llamacli tokenize -m scout.gguf -f report.txt --count
    llamacli tokenize "Hello" | llamacli tokenize --decode -
    llamacli tokenize -m scout.gguf --image photo.jpg --count
    """
    from llamacli.files.gguf import open_gguf
    from llamacli.text.tokenizer import Tokenizer

    console = output.console()
    words = [*(text or [])]
    if model is None and len(words) + any(each is not None for each in (prompt, file, image)) > 1 and is_model(words[0]):
        model = one_model(words.pop(0), model)
    given = [words or None, prompt, file, decode, image]
    if sum(each is not None for each in given) > 1:
        raise UsageError("expected one text or picture, found several; give words, or -f FILE, or --image FILE, or stdin")
    if image is None:
        refuse(("image_tiles", "mmproj"), "--image with it, found none")
    if pieces and count:
        raise UsageError("expected --pieces or --count, found both; leave one of them out")
    if decode is not None:
        refuse(("pieces", "count", "no_bos"), "a text with it, found --decode")
        ids = _ids(read_stdin(console) if decode == "-" else decode)
        tokenizer = Tokenizer.from_gguf(open_gguf(find_model(model, console)))
        text = tokenizer.decode(ids, special)
        console.result(json.dumps(text, ensure_ascii=False) if as_json else text)
        return
    if image is not None:
        refuse(("special", "no_bos"), "a text with it, found a picture")
        gguf = open_gguf(find_model(model, console))
        tokenizer = Tokenizer.from_gguf(gguf)
        _print(tokenizer, _picture_ids(gguf, tokenizer, image, image_tiles, mmproj, console), pieces, count, as_json, console)
        return
    if file is not None:
        found = read_file(file, console)
    elif words or prompt is not None:
        found = checked(" ".join(words) if words else prompt, "text")
    else:
        found = read_stdin(console)
    tokenizer = Tokenizer.from_gguf(open_gguf(find_model(model, console)))
    ids = [int(id) for id in tokenizer.encode(found, bos=not no_bos, special=special)]
    _print(tokenizer, ids, pieces, count, as_json, console)


def _picture_ids(gguf, tokenizer, image: str, most_tiles: int | None, mmproj: str | None, console) -> list[int]:
    """The ids of a picture in a prompt. The tower's file gives the numbers of tiles and rows; the tower does not run."""
    from llamacli.llama4.config import Config
    from llamacli.llama4.vision import VisionConfig
    from llamacli.vision import sight

    (picture,) = read_pictures([image], console)
    tower = sight.open_tower(gguf, Config.from_gguf(gguf).n_embd, mmproj and Path(mmproj))
    return sight.picture_ids(VisionConfig.from_gguf(tower), sight.Marks.of(tokenizer), *picture.image.size, most_tiles)


def _print(tokenizer, ids: list[int], pieces: bool, count: bool, as_json: bool, console) -> None:
    if count:
        console.result(str(len(ids)))
    elif pieces and as_json:
        console.result(json.dumps([_piece(tokenizer, id) for id in ids], ensure_ascii=False))
    elif pieces:
        width = len(str(tokenizer.n_vocab))
        rows = ((id, json.dumps(_piece(tokenizer, id)["piece"], ensure_ascii=False)) for id in ids)
        console.result("\n".join(f"{id:>{width}}  {piece}" for id, piece in rows))
    else:
        console.result(json.dumps(ids))


def _piece(tokenizer, id: int) -> dict:
    """A line with a token's id and text; bytes that are not a whole character are written as <0xC3>."""
    data = tokenizer.token_bytes(id, special=True)
    try:
        piece = data.decode()
    except UnicodeDecodeError:
        piece = "".join(f"<0x{byte:02X}>" for byte in data)
    return {"id": id, "piece": piece, "bytes": [*data]}


def _ids(text: str) -> list[int]:
    """Ids with commas or blanks between them, in brackets or not. UsageError for anything else."""
    words = re.split(r"[,\s]+", text.strip().removeprefix("[").removesuffix("]").strip())
    wrong = next((word for word in words if not re.fullmatch(r"[0-9]{1,9}", word)), None)
    if wrong is not None:
        raise UsageError(f"--decode: expected ids with commas between them, such as 15,16, found {wrong!r:.40}")
    return [int(word) for word in words]
