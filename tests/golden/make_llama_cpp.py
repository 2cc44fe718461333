"""Golden logits of llama.cpp for quantized files, and a table of how far the engine is from it.

    python tests/golden/make_llama_cpp.py [CASE ...]      needs llama-cpp-python; no CASE: all of llama_cpp_cases.py

A CASE may also be the path of any GGUF of the small model, llama-quantize's for instance: it is only compared.

Prints for each file the mean and median KL divergence and the share of positions with the same best token: the engine against
llama.cpp; llama.cpp with batches of 1 and flash attention against llama.cpp with batches of 512 and none; and how far both are
from the oracle, which computes exactly with the dequantized weights. Stores llama.cpp's most likely tokens in llama_cpp.npz:
`NAME.top`, `NAME.logprobs`, `NAME.ids` (all sequences), `NAME.lengths`, `NAME.checksum` of the file's tensors, and as (mean,
median, same) `NAME.itself`, of llama.cpp against itself, and `NAME.exact`, of llama.cpp against the oracle.
"""

import sys
import tempfile

import llama_cpp
import numpy as np
from llama_cpp_cases import CASES, HERE, available, checksum, compact, compare, divergence, engine_logits, exact_logits, write


def peer_logits(path, sequences, n_batch, flash):
    """llama.cpp's logits of every position of every sequence."""
    longest = max(map(len, sequences))
    threads = {"n_threads": 2, "n_threads_batch": 2}
    batches = {"n_batch": n_batch, "n_ubatch": n_batch, "flash_attn": flash}
    model = llama_cpp.Llama(str(path), n_ctx=longest, logits_all=True, verbose=False, **threads, **batches)
    found = []
    for ids in sequences:
        model.reset()
        model.eval([int(i) for i in ids])
        found.append(model.scores[: len(ids)].copy())
    return np.concatenate(found)


def row(name, against, figures):
    kl, same = figures
    print(f"{name:26} {against:22} {kl.mean():9.2e} {np.median(kl):9.2e} {same.mean():7.1%}", flush=True)
    return kl.mean(), np.median(kl), same.mean()


def main(names):
    stored_at = HERE / "llama_cpp.npz"
    stored = dict(np.load(stored_at)) if stored_at.exists() else {}
    print(f"{'file':26} {'what to what':22} {'mean KL':>9} {'median KL':>9} {'top-1':>7}")
    with tempfile.TemporaryDirectory() as folder:
        for name in names or filter(available, CASES):
            path, sequences = write(name, folder)
            peer, other = peer_logits(path, sequences, 512, False), peer_logits(path, sequences, 1, True)
            engine, exact = engine_logits(path, sequences), exact_logits(path, sequences)
            golden = compact(peer)
            row(name, "engine to llama.cpp", compare(golden, engine))
            itself = row(name, "llama.cpp to itself", compare(golden, other))
            row(name, "engine to exact", (divergence(exact, engine), exact.argmax(-1) == engine.argmax(-1)))
            exactly = row(name, "llama.cpp to exact", (divergence(exact, peer), exact.argmax(-1) == peer.argmax(-1)))
            if name not in CASES:
                continue
            parts = {"top": golden[0], "logprobs": golden[1], "checksum": checksum(path), "itself": itself, "exact": exactly}
            parts |= {"ids": np.concatenate(sequences).astype(np.int32), "lengths": [len(ids) for ids in sequences]}
            stored |= {f"{name}.{part}": np.array(values) for part, values in parts.items()}
    np.savez_compressed(stored_at, **stored)


if __name__ == "__main__":
    main(sys.argv[1:])
