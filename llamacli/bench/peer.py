"""Measures llama.cpp on the same file, through llama-cpp-python, to compare speeds.

`Peer` starts a worker process, which loads the file once and then runs one case after the other on request. Run as a script,
this module is that worker. It measures as llama-bench does: batches of 2048 in pieces of 512, no sampling, and a saved state to
return to a depth. Requests and answers are lines of JSON.
"""

import importlib.util
import json
import struct
import subprocess
import sys
import tempfile
from time import perf_counter

import numpy as np

from llamacli.errors import LlamacliError, UsageError
from llamacli.files.ggml import BY_NAME
from llamacli.plan.machine import resident_peak

BATCH, PIECE = 2048, 512


def check() -> None:
    """UsageError unless llama-cpp-python is installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise UsageError("--compare: expected llama-cpp-python to be installed, found none; use `pip install llama-cpp-python`")


class Peer:
    """llama.cpp in a worker process. `seconds(case)` runs one measure.Case; `close` ends the process."""

    def __init__(self, path, threads: int, ids: list[int], repack: bool, kv: int = BY_NAME["F16"].id, fill: int | None = None):
        """`kv`: the number of the tensor type of keys and values. `fill`: depths are filled with copies of the first tokens'
        keys and values; its value is the model's chunk size, 0 if it has none.
        """
        self.name, self.peak = "llama.cpp" if repack else "llama.cpp --repack 0", 0
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 closed by close
        command = [sys.executable, "-m", "llamacli.bench.peer"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._process = subprocess.Popen(command, text=True, **pipes)
        try:
            self._ask({"path": str(path), "threads": threads, "ids": ids, "repack": repack, "kv": kv, "fill": fill})
        except BaseException:
            self.close()
            raise

    def seconds(self, case) -> float:
        """Seconds of one run; `peak` is then the most bytes of memory that the worker held, without the saved state.
        LlamacliError: the worker died or reported an error.
        """
        seconds, self.peak = self._ask(case._asdict())
        return seconds

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _ask(self, request: dict):
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())
        except (OSError, ValueError):
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines() or ["nothing"]
            raise LlamacliError(
                f"{self.name}: expected a measurement, found {said[-1]:.300}; leave out --compare, or repair llama-cpp-python"
            ) from None


def _serve() -> None:
    first = json.loads(sys.stdin.readline())
    run = _load(**first)
    print("null", flush=True)
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)


def _load(path: str, threads: int, ids: list[int], repack: bool, kv: int, fill: int | None):
    """A function (n, depth, decode) -> (seconds of one run, peak of memory)."""
    import ctypes

    import llama_cpp as cpp

    silent = cpp.llama_log_callback(lambda *_: None)
    cpp.llama_log_set(silent, None)
    cpp.llama_backend_init()
    options = cpp.llama_model_default_params()
    options.use_extra_bufts = repack
    model = cpp.llama_model_load_from_file(path.encode(), options)
    if not model:
        raise SystemExit(f"{path}: llama.cpp cannot load it")
    options = cpp.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_ubatch = len(ids), BATCH, PIECE
    options.n_threads = options.n_threads_batch = threads
    options.swa_full = False
    options.type_k = options.type_v = kv
    if kv != BY_NAME["F16"].id or fill is not None:
        options.flash_attn_type = 1  # quantized values need flash attention; without it llama.cpp also stores values transposed
    context = cpp.llama_init_from_model(model, options)
    if not context:
        raise SystemExit(f"{path}: llama.cpp has no memory for {len(ids)} tokens")
    memory = cpp.llama_get_memory(context)
    array = (cpp.llama_token * len(ids))(*ids)
    states: dict[int, tuple] = {}
    one = ctypes.sizeof(cpp.llama_token)

    def evaluate(first: int, n: int, step: int) -> None:
        for at in range(first, first + n, step):
            count = min(step, first + n - at)
            here = ctypes.cast(ctypes.addressof(array) + one * at, ctypes.POINTER(cpp.llama_token))
            if cpp.llama_decode(context, cpp.llama_batch_get_one(here, count)):
                raise SystemExit(f"llama_decode failed at token {at}")
        cpp.llama_synchronize(context)

    def go_to(depth: int) -> None:
        cpp.llama_memory_clear(memory, False)
        if not depth:
            return
        if depth not in states:
            states.clear()  # cases are ordered by depth: an earlier one does not return
            first = depth if fill is None else min(PIECE, depth)
            evaluate(0, first, BATCH)
            size = cpp.llama_state_seq_get_size(context, 0)
            states[depth] = (ctypes.c_uint8 * size)(), size
            cpp.llama_state_seq_get_data(context, *states[depth], 0)
            if first == depth:
                return
            filled = repeated(bytes(states[depth][0]), first, depth, fill)
            states[depth] = (ctypes.c_uint8 * len(filled)).from_buffer(filled), len(filled)
            cpp.llama_memory_clear(memory, False)
        if not cpp.llama_state_seq_set_data(context, *states[depth], 0):
            raise SystemExit("llama.cpp cannot go back to a saved state")

    def run(n: int, depth: int, decode: bool) -> tuple[float, int]:
        go_to(depth)
        began = perf_counter()
        evaluate(depth, n, 1 if decode else BATCH)
        return perf_counter() - began, resident_peak() - sum(size for _, size in states.values())

    run.keep = silent  # llama.cpp calls it for as long as it lives
    return run


def repeated(state: bytes, held: int, depth: int, chunk: int) -> bytearray:
    """A saved state of llama.cpp for `held` tokens, extended to `depth` tokens by repeating their keys and values.

    It begins with a magic number and the number of the sequence. Then come the layers that see everything, then the chunked
    ones, which hold the last chunk only. Each part: the number of streams and of cells; position, number of sequences and
    sequence of each cell; whether values are transposed, the number of layers; for each layer type, bytes of a row and rows of
    keys; then those of values (llama-kv-cache.cpp). SystemExit for another layout.
    """
    out, at, first = bytearray(state[:8]), 8, 0
    try:
        while at < len(state):
            streams, cells = struct.unpack_from("<II", state, at)
            transposed, layers = struct.unpack_from("<II", state, at + 8 + 12 * cells)
            if (streams, cells, transposed) != (1, held, 0):
                raise ValueError
            at, n = at + 16 + 12 * cells, depth - first
            table = np.zeros((n, 3), "<i4")
            table[:, 0], table[:, 1] = range(first, depth), 1
            out += struct.pack("<II", 1, n) + table.tobytes() + struct.pack("<II", 0, layers)
            for _ in range(2 * layers):
                kind, row = struct.unpack_from("<iQ", state, at)
                rows, at = state[at + 12 : at + 12 + row * held], at + 12 + row * held
                out += struct.pack("<iQ", kind, row) + rows * (n // held) + rows[: row * (n % held)]
            first = (depth - 1) // chunk * chunk if chunk else 0
        if at != len(state):
            raise ValueError
    except (ValueError, struct.error):
        raise SystemExit("the saved state of this llama.cpp has another layout; leave out --fill") from None
    return out


if __name__ == "__main__":
    _serve()
