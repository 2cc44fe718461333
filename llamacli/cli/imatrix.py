"""`llamacli imatrix`: a model and a text to an importance matrix, which `quantize --imatrix` reads.

In: paths. Out: the file; progress and experts without input on stderr, with --json one object on stdout. The engine collects
the sums, the package quantize writes them.
"""

import json
from pathlib import Path
from typing import Annotated

from llamacli.cli.options import (
    Json,
    ModelName,
    Output,
    TextFile,
    Threads,
    Window,
    argument,
    find_model,
    load_model,
    model_and_text,
    option,
    read_file,
)


def imatrix(
    out: Annotated[str, option("-o", "--output", metavar="OUT", help="The file to write.")],
    words: Annotated[
        list[str] | None, argument("[MODEL] [TEXTFILE]", "The model and the text, as after -m and -f.", complete="file")
    ] = None,
    model: ModelName = None,
    file: TextFile = None,
    ctx: Window = 512,
    force: Annotated[bool, option("--force", help="Replace OUT if it exists.")] = False,
    threads: Threads = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Find out which columns of the weights matter on a text, for quantize --imatrix.

    The text should be varied and long enough for every expert to see some of it.

    Examples:
    llamacli imatrix -m scout-q8.gguf -f wiki.txt -o scout.imatrix
    llamacli quantize scout-f16.gguf --imatrix scout.imatrix --type Q4_K_M
    """
    from llamacli.bench.quality import windows
    from llamacli.llama4.tensors import find
    from quantize.imatrix import collected, write_imatrix
    from quantize.writer import check_not_input, check_output, output_path

    model, file = model_and_text(words or [], model, file)
    console, path, source = output.console(), output_path(out), find_model(model, output.console())
    check_not_input(path, [Path(source), *([] if file == "-" else [Path(file)])])
    check_output(path, 0, force)
    text = read_file(file, console)
    loaded = load_model(source, threads, ctx, console)
    check_not_input(path, loaded.gguf.paths)  # the other parts of a split model
    ids = windows(loaded.tokenizer, text, ctx, file)
    inputs = loaded.engine.watch()
    cache = loaded.engine.new_cache(ctx)
    with console.progress("imatrix") as update:
        for i, window in enumerate(ids):
            update(i, len(ids))
            cache.truncate(0)
            loaded.engine.forward(window, cache)
    matrix = collected(path, inputs, "stdin" if file == "-" else file, len(ids), ctx)
    write_imatrix(matrix, force)
    # a layer's gate, up and down see the same tokens
    unseen = {f"blk.{found[1]}": experts for name, experts in matrix.unseen.items() if (found := find(name))}
    if unseen:
        layers = ", ".join(f"{len(experts)} in {layer}" for layer, experts in unseen.items())
        console.warn(f"experts that saw no token: {layers}; more text, or more varied text, may reach them")
    if as_json:
        report = {"out": str(path), "tensors": len(matrix.entries), "windows": len(ids), "ctx": ctx, "tokens": ids.size}
        console.result(json.dumps(report | {"unseen": unseen}))
    console.note(f"wrote {path}: {len(matrix.entries)} tensors, from {ids.size} tokens in {len(ids)} windows")
