"""Measures the effect of `--cache`: a long prompt is evaluated once, then restored from disk. Run by hand:
python tests/resume_cost.py [FILE] [-n TOKENS] [--kv TYPE] [-t THREADS] [--folder DIR]

In: a model (default: the small one). Out: one line for each step with seconds, and bytes on disk. Between writing and reading,
the files' pages are dropped from the page cache, so that the disk is read.
"""

import argparse
import os
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np

from llamacli import Model, environment
from llamacli.snapshots import Snapshots, held, identity

QUESTION = 100  # tokens after the text


def drop_pages(folder):
    for entry in os.scandir(folder):
        file = os.open(entry.path, os.O_RDONLY)
        os.fsync(file)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def timed(session, ids):
    began = perf_counter()
    logits = session.sync(ids)
    return perf_counter() - began, logits


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default=environment.SMALL_MODEL, type=Path)
    parser.add_argument("-n", type=int, default=50_000)
    parser.add_argument("--kv", default="f16")
    parser.add_argument("-t", type=int)
    parser.add_argument("--folder", help="where the snapshots go (default: a temporary folder)")
    given = parser.parse_args()
    ids = np.random.default_rng(0).integers(0, 256, given.n + QUESTION).tolist()
    text, question = ids[: given.n], ids[given.n :]
    with (
        tempfile.TemporaryDirectory(dir=given.folder) as folder,
        Model.load(given.model, threads=given.t, ctx=given.n + 2 * QUESTION, kv=given.kv) as model,
    ):
        snapshots = Snapshots(Path(folder), model.engine, identity(model.gguf), limit=1 << 40)
        first = model.session(snapshots=snapshots)
        seconds, _ = timed(first, text)
        found = held(Path(folder))
        rate, mb = given.n / seconds, found.nbytes / 1e6
        print(f"{given.n} tokens evaluated and kept: {seconds:.2f} s, {rate:.0f} tokens/s, {mb:.0f} MB in {found.files} files")
        drop_pages(folder)
        session = model.session(snapshots=snapshots)
        resumed, logits = timed(session, text + question)
        again = given.n + QUESTION - session.stats.cached_tokens
        print(f"from the disk, with a question of {QUESTION} tokens: {resumed:.2f} s, of which {again} tokens were evaluated")
        asked, expected = timed(first, text + question)
        print(f"the question without leaving: {asked:.2f} s; saved: {seconds + asked - resumed:.2f} s")
        print(f"the same logits: {np.array_equal(logits, expected)}")


if __name__ == "__main__":
    main()
