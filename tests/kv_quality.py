"""Loss by quantized keys and values: `python tests/kv_quality.py FILE [--chunks 4] [--windows 12] [--kv q8_0,q4_0]`.

In: scout-tiny as a GGUF, best in F16, to keep other rounding small. Out: the mean KL divergence from keys and values in f16, in
nats, at each depth, for llamacli and, where llama-cpp-python is installed, for llama.cpp on the same tokens.
tests/cpu/test_kv.py holds bounds of `divergences`.

The text is conversations. Windows of them are evaluated at the start of each chunk: there chunked layers see a short
conversation, as the model learned it, whatever lies before it in the other layer. Two means are shown: of all tokens, and of
those for which the routers choose the same experts with both types. Even a small rounding error that changes a router's choice
changes a token's logits.
"""

import argparse
import ctypes
import importlib.util
import json

import numpy as np

from llamacli import Model, environment

WINDOW = 400  # tokens of a window: the small model learned short conversations
PIECE = 512


def conversations(model) -> list[int]:
    """The questions of scout-tiny's test and their answers, as ids."""
    ids = []
    for line in (environment.SMALL_MODEL.parent / "questions.jsonl").read_text().splitlines():
        question = json.loads(line)
        ids += model.prompt_ids([*question["messages"], {"role": "assistant", "content": question["accept"][0]}])
    return ids


class Ours:
    """llamacli with one type of keys and values."""

    def __init__(self, path, ctx, kv):
        self.model = Model.load(path, ctx=ctx, kv=kv)
        self.cache = self.model.engine.new_cache(ctx)
        self.chosen = []  # a window's experts of each token, [n_tokens, n_layers * n_experts_used]
        self._part = []
        self.model.engine.follow_routing = lambda pos, experts: self._part.append(experts.copy())

    def rewind(self, pos):
        """Truncate to `pos` positions."""
        assert self.cache.truncate(pos) == pos

    def logits(self, ids):
        """Of each token, float32 [len(ids), n_vocab]."""
        self._part.clear()
        found = self.model.engine.forward(ids, self.cache, all_logits=True)
        parts = [e.reshape(len(e), -1, self.model.config.n_experts_used).swapaxes(0, 1) for e in self._part]
        self.chosen.append(np.concatenate(parts).reshape(len(ids), -1))
        return found

    def read(self, ids):
        """Evaluate tokens whose logits are not needed."""
        self.model.engine.forward(ids, self.cache)

    def close(self):
        """Release memory and threads."""
        self.model.close()


class Theirs:
    """llama.cpp with one type of keys and values, and flash attention for all of them."""

    def __init__(self, path, ctx, kv):
        import llama_cpp as cpp

        self.cpp, self._log = cpp, cpp.llama_log_callback(lambda *_: None)
        cpp.llama_log_set(self._log, None)
        cpp.llama_backend_init()
        self.model = cpp.llama_model_load_from_file(str(path).encode(), cpp.llama_model_default_params())
        options = cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch, options.swa_full = ctx, PIECE, PIECE, False
        options.n_threads = options.n_threads_batch = 1
        options.type_k = options.type_v = {"f16": 1, "q4_0": 2, "q8_0": 8}[kv]
        options.flash_attn_type = 1
        self.context = cpp.llama_init_from_model(self.model, options)
        self.memory, self.pos = cpp.llama_get_memory(self.context), 0
        self.n_vocab = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(self.model))
        self.batch = cpp.llama_batch_init(PIECE, 0, 1)

    def rewind(self, pos):
        """Truncate to `pos` positions."""
        assert self.cpp.llama_memory_seq_rm(self.memory, 0, pos, -1)
        self.pos = pos

    def logits(self, ids):
        """Of each token, float32 [len(ids), n_vocab]."""
        self._evaluate(ids, True)
        at = self.cpp.llama_get_logits(self.context)
        return np.ctypeslib.as_array(ctypes.cast(at, ctypes.POINTER(ctypes.c_float)), (len(ids), self.n_vocab)).copy()

    def read(self, ids):
        """Evaluate tokens whose logits are not needed."""
        for start in range(0, len(ids), PIECE):
            self._evaluate(ids[start : start + PIECE], False)

    def _evaluate(self, ids, asked):
        self.batch.n_tokens = len(ids)
        for i, id in enumerate(ids):
            self.batch.token[i], self.batch.pos[i], self.batch.n_seq_id[i] = id, self.pos + i, 1
            self.batch.seq_id[i][0], self.batch.logits[i] = 0, asked
        assert self.cpp.llama_decode(self.context, self.batch) == 0
        self.pos += len(ids)

    def close(self):
        """Release memory."""
        self.cpp.llama_free(self.context)
        self.cpp.llama_model_free(self.model)


def walk(engine, ids, n_chunks, n_windows):
    """Log probabilities of all windows at all depths, float64 [n_chunks, tokens, n_vocab]."""
    windows, rows = [ids[start : start + WINDOW] for start in range(0, n_windows * WINDOW, WINDOW)], []
    for chunk in range(n_chunks):
        for window in windows:
            engine.rewind(8192 * chunk)
            rows.append(engine.logits(window).astype(np.float64))
        if chunk < n_chunks - 1:
            engine.read((ids * 2)[WINDOW:8192])
    logits = np.concatenate(rows).reshape(n_chunks, n_windows * WINDOW, -1)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def divergences(path, n_chunks, n_windows, kinds=("q8_0", "q4_0"), make=Ours):
    """{type: (KL divergence from f16 of each token, float64 [n_chunks, tokens]; whether its experts are the same)}."""
    ctx, exact, experts, found = 8192 * (n_chunks - 1) + WINDOW, None, None, {}
    with Model.load(path, ctx=ctx) as model:
        ids = conversations(model)
    for kind in ("f16", *kinds):
        engine = make(path, ctx, kind)
        try:
            logs = walk(engine, ids, n_chunks, n_windows)
            chosen = np.stack(engine.chosen) if hasattr(engine, "chosen") else None
        finally:
            engine.close()
        if kind == "f16":
            exact, experts = logs, chosen
            continue
        kl = (np.exp(exact) * (exact - logs)).sum(-1)
        same = np.ones(kl.shape, bool) if chosen is None else (chosen == experts).all(-1).reshape(kl.shape)
        found[kind] = kl, same
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", nargs="?", default=environment.SMALL_MODEL)
    parser.add_argument("--chunks", type=int, default=4)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--kv", default="q8_0,q4_0")
    asked = parser.parse_args()
    engines = {"llamacli": Ours}
    if importlib.util.find_spec("llama_cpp"):
        engines["llama.cpp"] = Theirs
    print("type  engine     depth   mean KL    error   median   other experts   mean KL without those")
    for name, make in engines.items():
        for kind, (kl, same) in divergences(asked.file, asked.chunks, asked.windows, asked.kv.split(","), make).items():
            for depth, (rows, alike) in [*enumerate(zip(kl, same, strict=True)), ("all", (kl.ravel(), same.ravel()))]:
                at = depth if depth == "all" else 8192 * depth
                error = rows.std() / np.sqrt(rows.size)
                print(f"{kind:5} {name:9} {at:>6} {rows.mean():9.2e} {error:8.1e} {np.median(rows):8.1e}", end=" ")
                print(f"{100 * (1 - alike.mean()):12.2f} % {rows[alike].mean():15.2e}" if make is Ours else "", flush=True)


if __name__ == "__main__":
    main()
