"""Nodes in network namespaces of this machine, killed, stopped and cut off: slow, and only for root on Linux.

Run with -s to see what the user sees, and the seconds until an answer goes on.
"""

import os
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
from test_cluster_ray import ROOT, TINY, Two

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0 or not shutil.which("ip"), reason="needs root and ip"),
]

PORT = 6399


class Far(Two):
    """A cluster of nodes in namespaces of their own, each with a cable to every other."""

    def __init__(self, folder: Path, n: int):
        super().__init__(folder)
        self.address, self.spaces = f"10.77.0.1:{PORT}", [f"llamacli-{k}" for k in range(1, n + 1)]
        self._space = self.spaces[0]

    def open(self):
        """Make the namespaces and start a node in each."""
        for k, space in enumerate(self.spaces, 1):
            self._ip("netns", "add", space)
            self._ip("-n", space, "link", "set", "lo", "up")
            self._ip("-n", space, "addr", "add", f"10.77.0.{k}/32", "dev", "lo")
        for a, b in combinations(range(1, len(self.spaces) + 1), 2):
            near, far = self.spaces[a - 1], self.spaces[b - 1]
            self._ip("-n", near, "link", "add", f"to{b}", "type", "veth", "peer", "name", f"to{a}", "netns", far)
            for space, own, other in ((near, a, b), (far, b, a)):
                self._ip("-n", space, "link", "set", f"to{other}", "up")
                self._ip("-n", space, "route", "add", f"10.77.0.{other}/32", "dev", f"to{other}", "src", f"10.77.0.{own}")
        for k, space in enumerate(self.spaces):
            self._space = space
            words = ("start", "--port", str(PORT)) if k == 0 else ("join", self.address)
            done = self.llamacli("cluster", *words, "--host", f"10.77.0.{k + 1}", LLAMACLI_MODELS=str(self.models(k)))
            assert done.returncode == 0, done.stderr
        self._space = self.spaces[0]

    def close(self):
        self.llamacli("cluster", "stop")
        for space in self.spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)

    def llamacli(self, *args, **more):
        return self._run([sys.executable, "-m", "llamacli", *args], self.env | more)

    def python(self, code, *args):
        done = self._run([sys.executable, "-c", code, *args], self.env | {"ADDRESS": self.address, "FILE": str(TINY)})
        print(done.stdout, done.stderr)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    def _run(self, command, env):
        words = ["ip", "netns", "exec", self._space, *command]
        return subprocess.run(words, env=env, capture_output=True, text=True, timeout=280, cwd=ROOT)

    def _ip(self, *words):
        subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module", params=[2, 3])
def far(request, tmp_path_factory):
    cluster = Far(tmp_path_factory.mktemp("far"), request.param)
    try:
        cluster.open()
        yield cluster
    finally:
        cluster.close()


ANSWER = """
import os, signal, subprocess, sys, time
from llamacli import Model
one = Model.load(os.environ["FILE"], threads=1, ctx=1024)
ids = one.tokenizer.encode("Once upon a time there was a king who had three rivers and")
def answer(model, hurt=lambda n: None):
    text, waits, last = [], [], time.monotonic()
    for n, piece in enumerate(model.session().stream(ids, model.sampler(temp=0), max_tokens=40)):
        text.append(piece.text)
        waits.append(time.monotonic() - last)
        hurt(n)
        last = time.monotonic()
    return "".join(text), max(waits[1:])
alone, _ = answer(one)
nodes = int(sys.argv[1])
layers = {2: [2, 2], 3: [1, 1, 2]}[nodes]
def load():
    return Model.load(
        os.environ["FILE"], threads=1, ctx=1024, cluster=os.environ["ADDRESS"], cluster_layers=layers,
        told=lambda words: print("   ", words),
    )
"""

KILLED = (
    ANSWER
    + """
for how in ("SIGKILL", "SIGSTOP"):
    for node in range(nodes):
        for at in (1, 5, 9, 13, 17, 21, 25, 29, 33, 37) if how == "SIGKILL" else (11,):
            model = load()
            pid = model.engine.stages[0].places[node].pid
            text, wait = answer(model, lambda n: n == at and os.kill(pid, getattr(signal, how)))
            print(how, "node", node, "after token", at, "waited", round(wait, 2), "s", text == alone, flush=True)
            assert text == alone
            model.close()
print("same")
"""
)


def test_nodes_killed_and_stopped_at_many_moments_change_no_letter(far):
    assert far.python(KILLED, str(len(far.spaces))) == "same"


LOGITS = (
    ANSWER
    + """
import numpy as np
model = load()
ids = np.random.default_rng(0).integers(0, 200, 900).tolist()
a, b = one.engine.new_cache(1024), model.engine.new_cache(1024)
for part in (ids, *([i] for i in ids[:60])):
    assert np.array_equal(one.engine.forward(part, a), model.engine.forward(part, b))
def each(engine):
    cache, took = engine.new_cache(1024), []
    engine.forward(ids[:20], cache)
    for i in ids[:200]:
        began = time.perf_counter()
        engine.forward([i], cache)
        took.append(time.perf_counter() - began)
    return 1000 * sorted(took)[100]
two, alone = each(model.engine), each(one.engine)
hops = nodes + 1
print(f"{nodes} nodes: {two:.2f} ms a token, one process {alone:.2f}: {(two - alone) / hops:.2f} ms a hand-over")
model.close()
print("same")
"""
)


def test_logits_have_the_bytes_of_one_process(far):
    assert far.python(LOGITS, str(len(far.spaces))) == "same"


CUT = (
    ANSWER
    + """
model = load()
last = f"llamacli-{nodes}"
def hurt(n):
    for other in range(1, nodes) if n == 11 else ():
        subprocess.run(["ip", "-n", last, "link", "set", f"to{other}", "down"], check=True)
text, wait = answer(model, hurt)
print("cable cut, waited", round(wait, 2), "s", text == alone)
print("same" if text == alone else "another")
model.close()
"""
)


def test_a_cable_that_is_cut_in_the_middle_of_an_answer_changes_no_letter(far):
    """The last test: Ray forgets a node that it has not heard of."""
    assert "same" in far.python(CUT, str(len(far.spaces)))
