"""Perplexity of a model on a text, and its distance from a reference model: KL divergence and top-1 agreement.

In: loaded models, token ids in windows. Out: records ready for JSON. Each window starts with BOS in an empty context and its
second half is scored, as llama-perplexity does, so that the numbers can be compared. One window of logits per model is in
memory at a time.
"""

from time import perf_counter

import numpy as np

from llamacli.errors import ModelFileError, PromptError, UsageError

SHORTEST = 8  # tokens in a window: three of them are scored, enough for a standard error
BLOCK = 1 << 19  # logits converted to float64 at a time


def windows(tokenizer, text: str, ctx: int, where: str = "the text") -> np.ndarray:
    """The text's token ids in whole windows, BOS in the first place of each: int64 [n_windows, ctx].

    PromptError: the text is shorter than one window. UsageError: a window of fewer than 8 tokens.
    """
    if ctx < SHORTEST:
        raise UsageError(f"-c: expected windows of at least {SHORTEST} tokens, found {ctx}")
    ids = tokenizer.encode(text)
    if len(ids) < ctx:
        raise PromptError(f"{where}: expected at least one window of {ctx} tokens, found {len(ids)}; add text or lower -c")
    n = len(ids) // ctx
    found = np.array(ids[: n * ctx], np.int64).reshape(n, ctx)
    if tokenizer.bos is not None:
        found[:, 0] = tokenizer.bos
    return found


def rows_held(ctx: int) -> int:
    """Rows of logits that each model holds at a time (Model.load, `logits_rows`)."""
    return ctx - ctx // 2


class Scores:
    """The scores of the windows so far: `add` scores one more, `record` returns the results over all of them."""

    def __init__(self, model, n_windows: int, ctx: int, reference=None):
        """UsageError: `reference` has another vocabulary."""
        if reference is not None:
            _check_same_vocabulary(model, reference)
        self.model, self.reference, self.ctx, self.scored = model, reference, ctx, 0
        self._first = ctx // 2
        shape = n_windows, ctx - 1 - self._first
        self._losses, self._others, self._divergences = (np.empty(shape) for _ in range(3))
        self._same_top = np.empty(shape, bool)
        self._cache = model.engine.new_cache(ctx)
        self._other_cache = reference.engine.new_cache(ctx) if reference else None
        self._seconds = 0.0

    def add(self, window: np.ndarray) -> None:
        """Score the next window. After an exception it counts as not scored."""
        i, first, n_rows = self.scored, self._first, self._losses.shape[1]
        began = perf_counter()
        logits = _logits(self.model, window, self._cache, first)
        seconds = perf_counter() - began
        expected = None if self.reference is None else _logits(self.reference, window, self._other_cache, first)
        step = max(1, BLOCK // logits.shape[1])
        for at in range(0, n_rows, step):
            block = slice(at, min(at + step, n_rows))
            rows, targets = np.arange(block.stop - at), window[first + 1 :][block]
            log_q = _log_softmax(logits[block])
            self._losses[i, block] = -log_q[rows, targets]
            if expected is not None:
                log_p = _log_softmax(expected[block])
                self._others[i, block] = -log_p[rows, targets]
                self._divergences[i, block] = np.einsum("ij,ij->i", np.exp(log_p), log_p - log_q)
                self._same_top[i, block] = log_p.argmax(1) == log_q.argmax(1)
        self._seconds += seconds
        self.scored += 1

    @property
    def label(self) -> str:
        """The perplexity so far; empty before the first window."""
        return f"perplexity {np.exp(self._losses[: self.scored].mean()):.4g}" if self.scored else ""

    def record(self) -> dict:
        """The record of `perplexity` over the windows scored so far, at least one."""
        n = self.scored
        losses, others, divergences, same_top = (
            values[:n] for values in (self._losses, self._others, self._divergences, self._same_top)
        )
        value, error = _perplexity(losses)
        record = {"perplexity": value, "perplexity_error": error, "windows": n, "ctx": self.ctx, "tokens": losses.size}
        record["tokens_per_second"] = round(n * self.ctx / self._seconds, 3)
        if self.reference is not None:
            record["reference_perplexity"], record["reference_perplexity_error"] = _perplexity(others)
            record |= {
                "kl_mean": float(divergences.mean()),
                "kl_error": _standard_error(divergences),
                "kl_median": float(np.median(divergences)),
                "kl_p99": float(np.quantile(divergences, 0.99)),
                "kl_max": float(divergences.max()),
                "top1_agreement": float(same_top.mean()),
            }
        return record


def perplexity(model, ids: np.ndarray, reference=None) -> dict:
    """Score `ids` [n_windows, ctx]. UsageError: `reference` has another vocabulary.

    The record has perplexity, perplexity_error (standard error), windows, ctx, tokens (scored) and tokens_per_second
    (evaluated, by `model` alone). With a reference also reference_perplexity, reference_perplexity_error, kl_mean, kl_error,
    kl_median, kl_p99, kl_max (KL(reference || model) in nats, over the same positions) and top1_agreement (a share).
    """
    scores = Scores(model, *ids.shape, reference)
    for window in ids:
        scores.add(window)
    return scores.record()


def _logits(model, window: np.ndarray, cache, first: int) -> np.ndarray:
    """Logits of the positions from `first` on, float32 [ctx - first, n_vocab]."""
    cache.truncate(0)
    logits = model.engine.forward(window, cache, all_logits=True, first=first)
    if not np.isfinite(logits).all():
        raise ModelFileError(f"{model.gguf.path}: expected finite logits, found others; the weights are damaged")
    return logits


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    values = logits.astype(np.float64)
    values -= values.max(1, keepdims=True)
    values -= np.log(np.exp(values).sum(1, keepdims=True))
    return values


def _perplexity(losses: np.ndarray) -> tuple[float, float]:
    """exp of the mean loss, and its standard error, to first order from that of the mean."""
    value = float(np.exp(losses.mean()))
    return value, value * _standard_error(losses)


def _standard_error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / np.sqrt(values.size))


def _check_same_vocabulary(model, reference) -> None:
    key = "tokenizer.ggml.tokens"
    sizes = [(m.config.n_vocab, m.tokenizer.bos) for m in (model, reference)]
    if sizes[0] != sizes[1] or model.gguf.metadata.get(key) != reference.gguf.metadata.get(key):
        found = f"{sizes[0][0]} and {sizes[1][0]} tokens" if sizes[0][0] != sizes[1][0] else "different ones"
        raise UsageError(
            f"{reference.gguf.path}: expected the vocabulary of {model.gguf.path}, found {found}; "
            "compare two files of one model"
        )
