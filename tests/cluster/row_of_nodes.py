"""Two nodes in this process that share the layers of the small model, and the same model without them."""

import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from llamacli.cluster.node import Node
from llamacli.cluster.row import Place
from llamacli.cluster.stage import ClusterStage
from llamacli.cpu.buffers import MAX_BATCH
from llamacli.cpu.kernels.ops import matmul
from llamacli.cpu.stage import cpu_part
from llamacli.engine import Engine
from llamacli.errors import DeviceError
from llamacli.files.gguf import open_gguf
from llamacli.llama4.config import Config

TINY = Path(__file__).resolve().parents[2] / "models" / "scout-tiny" / "scout-tiny.gguf"
SECRET = b"of this test"
IDS = np.random.default_rng(0).integers(0, 200, 700).tolist()


class Nodes:
    """Two nodes in this process, opened again whenever they are asked for; and the same model without them."""

    def __init__(self, **changes):
        self.gguf = open_gguf(TINY)
        self.config = replace(Config.from_gguf(self.gguf), **changes)
        self.made: list[Node] = []
        self.said: list[str] = []
        self.losses = Counter()
        self.fail = False
        self.most = MAX_BATCH  # tokens that nodes which are opened now have the memory for
        self.alike = matmul.few_tokens() - 1  # sequences whose bits nodes that are opened now keep
        self.cuts = (self.config.n_layers // 2,)  # where those are divided
        self.waiting = []  # nodes that could be used and are not
        self.batches: list[int] = []  # tokens of each call of a stage
        local = cpu_part(self.gguf, self.config, range(0), 1, ends=True)
        stage = ClusterStage(local, self.config, self.open, SECRET, there_again=lambda losses: self.waiting)
        stage.lost = self.said.append
        self.engine, self.one = Engine(self.gguf, self.config, 1, cluster=stage), Engine(self.gguf, self.config, 1)
        self.caches = self.new_caches()

    def open(self, losses):
        self.losses = Counter(losses)
        if self.fail:
            raise DeviceError("no memory on any node")
        places = []
        for layers in map(range, (0, *self.cuts), (*self.cuts, self.config.n_layers)):
            stage = cpu_part(self.gguf, self.config, layers, 1)
            true = stage.forward
            stage.forward = lambda x, runs, true=true: (self.batches.append(len(x)), true(x, runs))[1]
            self.made.append(Node(stage, SECRET, "127.0.0.1", layers.stop == self.config.n_layers, self.most))
            how = {"batch": self.most, "seconds": 1.0, "alike": self.alike}
            places.append(Place(f"n{len(self.made)}", self.made[-1].address, layers, **how))
        return places

    def new_caches(self):
        return self.engine.new_cache(4096), self.one.new_cache(4096)

    def same(self, ids, caches=None, **how) -> bool:
        """Evaluate with and without nodes."""
        ours, theirs = caches or self.caches
        return np.array_equal(self.engine.forward(ids, ours, **how), self.one.forward(ids, theirs, **how))

    def close(self):
        self.engine.close()
        self.one.close()
        for node in self.made:
            node.close()


@contextmanager
def interrupting(engine, every):
    """A context with regular interrupts, this many seconds apart: one between two calls has no effect."""
    over = threading.Event()

    def interrupt():
        while not over.wait(every):
            engine.interrupt()

    other = threading.Thread(target=interrupt)
    other.start()
    try:
        yield
    finally:
        over.set()
        other.join()
