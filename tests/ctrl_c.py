"""Measures how soon Ctrl-C ends the program, at random moments. Run by hand, on a quiet machine with a model of real size.

    python tests/ctrl_c.py early [N] [SEED]              N starts (100), each interrupted within its first 0.4 s
    python tests/ctrl_c.py latency MODEL [N] [SEED]      N moments (20) of load, prompt, answer, quantize, imatrix, bench

In: the command that is installed beside this Python. Out: for each kind of moment the median and the longest time from the
signal to the end of the process. A finding is a process that does not die of the signal, or a traceback; the exit code is 1.
"""

import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

COMMAND = str(Path(sys.executable).parent / "llamacli")
EARLY = 0.4  # seconds in which a start is interrupted
LONGEST = 60.0  # seconds after which a process counts as hanging
TEXT = "Tell me why the sea is salt, and who first asked. " * 2000


def interrupted(args: list, wait, number=signal.SIGINT) -> tuple[float, str]:
    """Start a command, call `wait(process)`, interrupt it; returns the seconds to its end, and the fault or ""."""
    process = subprocess.Popen(args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait(process)
    ended = process.poll() is not None
    began = time.perf_counter()
    process.send_signal(number)
    try:
        _, errors = process.communicate(timeout=LONGEST)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return LONGEST, "hangs"
    seconds, errors = time.perf_counter() - began, errors.decode("utf-8", "replace")
    if "Traceback" in errors or "Exception ignored" in errors or "Fatal" in errors:
        return seconds, errors
    if ended:
        return 0.0, "over before it was interrupted"
    return seconds, "" if process.returncode == -number else f"returned {process.returncode}: {errors[-200:]}"


def early(n: str = "100", seed: str = "0") -> int:
    """Interrupt starts; on a busy machine a part of the time is the interpreter's own start, before llamacli's code runs."""
    draw, found = random.Random(int(seed)), {}
    for _ in range(int(n)):
        delay = draw.uniform(0, EARLY)
        _, wrong = interrupted([COMMAND, "run", "hi"], lambda process, delay=delay: time.sleep(delay))
        if wrong and not wrong.startswith("over"):
            found[delay] = wrong
            lines = wrong.strip().splitlines()
            ours = [line.strip() for line in lines if "llamacli" in line and "File" in line]
            print(
                f"after {delay:.3f} s: {lines[0]} ... {lines[-1]}, {len(lines)} lines; {ours[-1] if ours else 'none of ours'}"
            )
    print(f"{n} starts, {len(found)} tracebacks or other findings")
    return int(bool(found))


def latency(model: str, n: str = "20", seed: str = "0") -> int:
    """Interrupt each kind of work in turn until there are `n` moments."""
    draw, found, findings = random.Random(int(seed)), {}, 0
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text"
        text.write_text(TEXT)
        began = time.perf_counter()
        once = [COMMAND, "run", "--raw", "--no-stdin", "-m", model]
        subprocess.run([*once, "-n", "1", "hi"], check=True, capture_output=True)
        loaded = time.perf_counter() - began
        after = {
            "load": ([*once, "-n", "1", "hi"], 0.1, loaded),
            "prompt": ([*once, "-c", "40000", "-f", str(text)], loaded, loaded + 8),
            "answer": ([*once, "-n", "5000", "--ignore-eos", "hi"], None, 5),
            "quantize": ([COMMAND, "quantize", model, f"{folder}/out.gguf", "--type", "Q4_K_M", "--force"], 1, 8),
            "imatrix": (
                [COMMAND, "imatrix", "-m", model, "-f", str(text), "-o", f"{folder}/i.gguf", "--force"],
                loaded,
                loaded + 8,
            ),
            "bench": ([COMMAND, "bench", "-m", model, "-p", "512", "-n", "64"], loaded, loaded + 8),
        }
        for i in range(int(n)):
            kind = list(after)[i % len(after)]
            args, first, last = after[kind]

            def wait(process, first=first, last=last):
                if first is None:
                    process.stdout.read(1)
                time.sleep(draw.uniform(first or 0, last))

            seconds, wrong = interrupted(args, wait)
            if wrong:
                findings += 1
                print(f"{kind}: {wrong.strip()}")
            found.setdefault(kind, []).append(seconds)
            print(f"{kind} {seconds:.2f} s", flush=True)
    for kind, times in found.items():
        print(f"{kind}: median {median(times):.2f} s, longest {max(times):.2f} s")
    every = [seconds for times in found.values() for seconds in times]
    print(f"{len(every)} moments: median {median(every):.2f} s, longest {max(every):.2f} s, {findings} findings")
    return int(findings > 0)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell, and then by what we start
    sys.exit({"early": early, "latency": latency}[sys.argv[1]](*sys.argv[2:]))
