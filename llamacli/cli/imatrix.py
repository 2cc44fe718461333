"""`llamacli imatrix`: a model and a text to an importance matrix, which `quantize --imatrix` reads.

In: paths. Out: the file; progress and experts without input on stderr, with --json one object on stdout. The engine collects
the sums, the package quantize writes them.
"""

import json
import time
from pathlib import Path
from typing import Annotated

from llamacli.cli.options import (
    Json,
    ModelAndText,
    ModelName,
    Output,
    TextFile,
    Threads,
    Window,
    find_model,
    load_model,
    model_and_text,
    option,
    read_file,
)
from llamacli.errors import OutputError

EVERY = 30.0  # seconds between writings: the most work that an interrupt or a crash loses
MOST_PART = 20  # writing takes at most this part of the time


def imatrix(
    out: Annotated[str, option("-o", "--output", metavar="OUT", help="The file to write.")],
    words: ModelAndText = None,
    model: ModelName = None,
    file: TextFile = None,
    ctx: Window = 512,
    force: Annotated[bool, option("--force", help="Replace OUT if it exists.")] = False,
    threads: Threads = None,
    as_json: Json = False,
    output: Output = None,
) -> None:
    """Find out which columns of the weights matter on a text, for quantize --imatrix.

    The text should be varied and long enough for every expert to see some of it. OUT is written every half minute; Ctrl-C or an
    error leaves what was last written.

    Examples:
    llamacli imatrix -m scout-q8.gguf -f wiki.txt -o scout.imatrix.gguf
    llamacli quantize scout-f16.gguf --imatrix scout.imatrix.gguf --type Q4_K_M
    """
    from llamacli.bench.quality import windows
    from quantize.imatrix import size_of
    from quantize.writer import check_not_input, check_output, output_path

    model, file = model_and_text(words or [], model, file)
    console, path, source = output.console(), output_path(out), find_model(model, output.console())
    check_not_input(path, [Path(source), *([] if file == "-" else [Path(file)])])
    check_output(path, 0, force)
    text = read_file(file, console)
    loaded = load_model(source, threads, ctx, console)
    check_not_input(path, loaded.gguf.paths)  # the other parts of a split model
    ids = windows(loaded.tokenizer, text, ctx, file)
    keeper = _Keeper(path, loaded.engine.watch(), "stdin" if file == "-" else file, ids, force, console)
    check_output(path, size_of(keeper.inputs), force)
    cache = loaded.engine.new_cache(ctx)
    try:
        with console.progress("imatrix") as update:
            for i, window in enumerate(ids):
                update(i, len(ids))
                cache.truncate(0)
                loaded.engine.forward(window, cache)
                keeper.keep(i + 1)
        keeper.write(len(ids))
    except BaseException as error:
        if keeper.written:
            console.warn(f"{path}: kept, of the first {keeper.written} of {len(ids)} windows")
            if as_json and not isinstance(error, Exception):
                console.result(json.dumps(keeper.report() | {"interrupted": True}))
        raise
    unseen = keeper.report()["unseen"]
    if unseen:
        layers = ", ".join(f"{len(experts)} in {layer}" for layer, experts in unseen.items())
        console.warn(f"experts that saw no token: {layers}; more text, or more varied text, may reach them")
    if as_json:
        console.result(json.dumps(keeper.report()))
    console.note(f"wrote {path}: {len(keeper.matrix.entries)} tensors, from {ids.size} tokens in {len(ids)} windows")


class _Keeper:
    """Writes the sums after whole windows only: an interrupted window has added inputs to some layers and not to others."""

    def __init__(self, path: Path, inputs: list, dataset: str, ids, force: bool, console):
        """`inputs`: the engine's sums. `ids`: all windows. `force`: whether the first writing may replace a file."""
        self.path, self.inputs, self._dataset, self._ids, self._force, self._console = (
            path,
            inputs,
            dataset,
            ids,
            force,
            console,
        )
        self.written = 0  # windows in the file
        self.matrix = None
        self._due = time.monotonic() + EVERY

    def keep(self, n_windows: int) -> None:
        """Write the file if that is due. An error is a warning, since a full disk may have room again later."""
        began = time.monotonic()
        if n_windows == len(self._ids) or began < self._due:
            return
        try:
            self.write(n_windows)
        except OutputError as error:
            self._console.warn(f"{error}; going on, to be tried again")
        now = time.monotonic()
        self._due = now + max(EVERY, MOST_PART * (now - began))

    def write(self, n_windows: int) -> None:
        """Write the file from the sums of the first `n_windows`; OutputError if it cannot be."""
        from quantize.imatrix import collected, write_imatrix

        matrix = collected(self.path, self.inputs, self._dataset, n_windows, self._ids.shape[1])
        write_imatrix(matrix, self._force or self.written > 0)
        self.matrix, self.written = matrix, n_windows

    def report(self) -> dict:
        """The contents of the file, as a record fit for JSON."""
        from llamacli.llama4.tensors import find

        # a layer's gate, up and down see the same tokens
        unseen = {f"blk.{found[1]}": experts for name, experts in self.matrix.unseen.items() if (found := find(name))}
        n, ctx = self.written, self._ids.shape[1]
        tensors = len(self.matrix.entries)
        return {"out": str(self.path), "tensors": tensors, "windows": n, "ctx": ctx, "tokens": n * ctx, "unseen": unseen}
