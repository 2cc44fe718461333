"""Helpers for tests of batches: files of prompts, the results, and the prompts that the engine saw."""

import json
import subprocess
import sys

TINY_ARGS = ["run", "--no-stdin", "--seed", "1"]


def write(path, *lines):
    path.write_text("".join(line if isinstance(line, str) and line[:1] == "#" else json.dumps(line) + "\n" for line in lines))
    return str(path)


def records(text):
    return [json.loads(line) for line in text.splitlines()]


def prompts_of(model):
    """The prompts that the engine saw at the start of each answer."""
    return [bytes(t for t in ids if t < 256).decode() for _, ids in model.engine.calls if len(ids) > 1]


def small(*args, **how):
    return subprocess.run([sys.executable, "-m", "llamacli", *TINY_ARGS, *args], capture_output=True, text=True, **how)
