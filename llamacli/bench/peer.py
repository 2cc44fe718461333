"""Measures llama.cpp on the same file, through llama-cpp-python, to compare speeds.

`Peer` starts a worker process, which loads the file once and then runs one case after the other on request. Run as a script,
this module is that worker. It measures as llama-bench does: batches of 2048 in pieces of 512, no sampling, and a saved state to
return to a depth. Requests and answers are lines of JSON.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from time import perf_counter

from llamacli.errors import LlamacliError, UsageError
from llamacli.files.ggml import BY_NAME

BATCH, PIECE = 2048, 512


def check() -> None:
    """UsageError unless llama-cpp-python is installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise UsageError("--compare: expected llama-cpp-python to be installed, found none; use `pip install llama-cpp-python`")


class Peer:
    """llama.cpp in a worker process. `seconds(case)` runs one measure.Case; `close` ends the process."""

    def __init__(self, path, threads: int, ids: list[int], repack: bool, kv: int = BY_NAME["F16"].id):
        """`kv`: the number of the tensor type of keys and values."""
        self.name = "llama.cpp" if repack else "llama.cpp --repack 0"
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 closed by close
        command = [sys.executable, "-m", "llamacli.bench.peer"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        self._process = subprocess.Popen(command, text=True, **pipes)
        try:
            self._ask({"path": str(path), "threads": threads, "ids": ids, "repack": repack, "kv": kv})
        except BaseException:
            self.close()
            raise

    def seconds(self, case) -> float:
        """Seconds of one run. LlamacliError: the worker died or reported an error."""
        return self._ask(case._asdict())

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


def _load(path: str, threads: int, ids: list[int], repack: bool, kv: int):
    """A function (n, depth, decode) -> seconds of one run."""
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
    if kv != BY_NAME["F16"].id:
        options.type_k = options.type_v = kv
        options.flash_attn_type = 1  # llama.cpp multiplies values in blocks in no other way
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
            evaluate(0, depth, BATCH)
            size = cpp.llama_state_seq_get_size(context, 0)
            states[depth] = (ctypes.c_uint8 * size)(), size
            cpp.llama_state_seq_get_data(context, *states[depth], 0)
        elif not cpp.llama_state_seq_set_data(context, *states[depth], 0):
            raise SystemExit("llama.cpp cannot go back to a saved state")

    def run(n: int, depth: int, decode: bool) -> float:
        go_to(depth)
        began = perf_counter()
        evaluate(depth, n, 1 if decode else BATCH)
        return perf_counter() - began

    run.keep = silent  # llama.cpp calls it for as long as it lives
    return run


if __name__ == "__main__":
    _serve()
