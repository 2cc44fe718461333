"""Loading and closing models repeatedly leaks nothing: memory, threads and open files stay constant."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from llamacli import environment

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")

LIVES = """
import gc, json, os, sys, time
from llamacli import Model
from llamacli.plan.machine import resident

path, experts, count, first = sys.argv[1], sys.argv[2], int(sys.argv[3]), {}
for _ in range(count):
    with Model.load(path, threads=4, ctx=256, experts=experts) as model:
        session = model.session()
        "".join(piece.text for piece in session.stream(list(range(5, 40)), model.sampler(temp=0), 8))
    del model, session
    gc.collect()
    tasks = lambda: len(os.listdir("/proc/self/task"))
    for _ in range(1000):  # the system forgets a thread a moment after it was joined
        if tasks() == first.setdefault("tasks", tasks()):
            break
        time.sleep(0.01)
    print(json.dumps([resident(), tasks(), len(os.listdir("/proc/self/fd"))]))
"""


def lives(path, experts: str, count: int) -> list[tuple[int, int, int]]:
    """(resident bytes, threads, open files) of a process after each of `count` models that it loaded, used and closed."""
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}  # the library's own threads would stay
    command = [sys.executable, "-c", LIVES, str(path), experts, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True, env=env)
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def assert_flat(found: list[tuple[int, int, int]], settled: int) -> None:
    """From the `settled`th model on, threads and files are the same, and memory grows by less than 2 % of itself."""
    memory, threads, files = zip(*found[settled:], strict=True)
    assert (set(threads), set(files)) == ({threads[0]}, {files[0]})
    third = len(memory) // 3
    assert min(memory[-third:]) < 1.02 * max(memory[:third]), found


@pytest.mark.parametrize("experts", ["mapped", "slots"])
def test_thirty_models_leave_nothing_behind(experts, tmp_path):
    assert_flat(lives(tiny.tiny_gguf(tmp_path / "tiny.gguf"), experts, 30), 10)


@pytest.mark.slow
@pytest.mark.parametrize("experts", ["mapped", "slots"])
def test_a_hundred_models_leave_nothing_behind(experts):
    found = lives(environment.SMALL_MODEL, experts, 100)
    print(f"{experts}: resident MB, threads, files after 1, 20, 50 and 100 models:")
    print(*((f"{found[n - 1][0] / 1e6:.1f}", *found[n - 1][1:]) for n in (1, 20, 50, 100)))
    assert_flat(found, 20)
