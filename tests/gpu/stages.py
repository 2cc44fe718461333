"""Models of the tests whose layers are on MLX, or some on MLX and some on the CPU, and how far two results are apart."""

import numpy as np

from llamacli.engine import Engine
from llamacli.files.gguf import open_gguf
from llamacli.llama4.config import Config

EXACT = 1e-5  # float32 throughout, against float64; found: below 1e-6
WIDENED = 2e-3  # long prompts through weights rounded to float16
MIXED = 1e-3  # layers on the CPU keep keys and values in float16
WIDE = {"n_embd": 256, "head_dim": 64, "n_ff": 512, "n_ff_exp": 256, "moe_step": 2}  # whole superblocks


def engine(path, gpu_layers=None, threads=2):
    """The last `gpu_layers` on MLX, None: all."""
    file = open_gguf(path)
    config = Config.from_gguf(file)
    return Engine(file, config, threads, gpu_layers=config.n_layers if gpu_layers is None else gpu_layers)


def tokens(n, seed=0):
    return np.random.RandomState(seed).randint(0, 257, n)


def one_pass(model, ids):
    return model.forward(ids, model.new_cache(len(ids)), all_logits=True)


def in_pieces(model, ids, size):
    cache = model.new_cache(len(ids))
    return np.concatenate([model.forward(ids[at : at + size], cache, all_logits=True) for at in range(0, len(ids), size)])


def hand_over(cache, copy):
    """Have a new cache hold what another holds."""
    copy.reserve(cache.pos)
    for layer in range(4):
        held = cache.held(layer)
        copy.restore(layer, held.start, *cache.export(layer, held.start, held.stop))
    copy.pos = cache.pos


def difference(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


def agreement(found, expected):
    """Mean KL divergence in nats, and the share of equal best tokens."""
    p, q = (a.astype(np.float64) - a.max(-1, keepdims=True) for a in (expected, found))
    p, q = (a - np.log(np.exp(a).sum(-1, keepdims=True)) for a in (p, q))
    return (np.exp(p) * (p - q)).sum(-1).mean(), (found.argmax(-1) == expected.argmax(-1)).mean()
