"""A miniature model for tests of everything above the engine: real sessions and commands, without weights and compiled code.

Tokens are UTF-8 bytes and five special ids. `FakeEngine`'s logits are a fingerprint of all tokens that a chunked cache holds,
so that a wrong cache gives a wrong next token; `Scripted` answers with a given text instead. As a script, it is the command
line with such a model: `python fakes.py REPLY DELAY ARGUMENTS...`.
"""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

if __name__ == "__main__":  # as `enter` does, before anything slow is imported
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np

from llamacli import Model
from llamacli.errors import ContextFullError, PictureError
from llamacli.text.sampler import Sampler

REPLY = "first line\nsecond line"
BOS, EOT, EOM, HEADER, RESERVED = 256, 257, 258, 259, 260
N_VOCAB = 261


class Sizes(SimpleNamespace):
    """Some fields of a Config; hashable, as that is."""

    __hash__ = object.__hash__


CONFIG = Sizes(
    **{
        "kv_type": "F16",
        "kv_row_bytes": 16,
        "n_vocab": N_VOCAB,
        "context_length": 4096,
        "n_embd": 4,
        "n_layers": 4,
        "n_heads": 2,
        "n_kv_heads": 1,
        "head_dim": 8,
    },
    chunk_size=8,
    uses_rope=lambda i: i != 3,
)


class FakeTokenizer:
    bos, eos, n_vocab, most_bytes = BOS, EOT, N_VOCAB, 1
    stop_ids = frozenset({EOT, EOM})
    hidden_ids = np.array([BOS, HEADER, RESERVED])

    def encode(self, text, bos=True, special=False):
        return [BOS] * bos + list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def token_bytes(self, id, special=False):
        return bytes([id]) if id < 256 else b""

    def stream(self):
        return FakeDecoder()


class FakeDecoder:
    def __init__(self):
        self.held = b""

    def push(self, token):
        self.held += bytes([token]) if token < 256 else b""
        for end in range(len(self.held), max(-1, len(self.held) - 4), -1):
            try:
                text, self.held = self.held[:end].decode(), self.held[end:]
                return text
            except UnicodeDecodeError:
                continue
        return ""

    def flush(self):
        text, self.held = self.held.decode(errors="replace"), b""
        return text


class FakeCache:
    """A cache: a ring of `chunk` slots, which chunked layers see, and all tokens, which global layers see."""

    nbytes = 1000

    def __init__(self, ctx, chunk):
        self.ctx, self.chunk, self.pos = ctx, chunk, 0
        self.ring, self.all = [-1] * chunk, [-1] * ctx

    def truncate(self, pos):
        pos = max(0, min(pos, self.pos))
        if pos < self.pos and (self.pos - 1) // self.chunk != pos // self.chunk:
            pos = pos // self.chunk * self.chunk
        self.pos = pos
        return pos

    def copy_to(self, other):
        other.pos, other.ring[:], other.all[:] = self.pos, self.ring, self.all


class FakeEngine:
    threads, bytes_per_token, products_per_token, gpu_layers, fetches, alike, depth = 1, 1000, 2000, 0, False, 16, 1

    def take_io_stats(self):
        return None

    def __init__(self, chunk=8, delay=0.0):
        self.chunk, self.delay = chunk, delay
        self.calls = []  # (position, ids) of every call
        self.widths = []  # sequences of every call for several
        self.interrupted = False
        self.follow_progress = None
        self.break_after = None  # raise KeyboardInterrupt after this many tokens of a call are written

    def close(self):
        pass

    def new_cache(self, ctx):
        return FakeCache(ctx, self.chunk)

    def watch(self):
        """Fixed sums; the second of three experts has seen no token."""
        gate, dense = "blk.0.ffn_gate_exps.weight", "blk.0.attn_q.weight"
        counts = np.array([5, 0, 3])
        return [((dense,), np.ones((1, 4)), counts[:1]), ((gate,), np.ones((3, 4)), counts)]

    def batch_of(self, pos):
        """A prompt is one batch; later batches end with their chunk."""
        return range(0, 1 << 30) if pos == 0 else range(pos // self.chunk * self.chunk, (pos // self.chunk + 1) * self.chunk)

    def forward(self, ids, cache, all_logits=False, first=0, alone=False):
        if cache.pos + len(ids) > cache.ctx:
            raise ContextFullError("full")
        self.calls.append((cache.pos, list(ids)))
        self.interrupted, rows = False, []
        for n, token in enumerate(ids):
            if n == self.break_after or self.interrupted:
                self.break_after = None
                raise KeyboardInterrupt
            if self.follow_progress:
                self.follow_progress(n, len(ids))
            time.sleep(self.delay)
            pos = cache.pos + n
            cache.ring[pos % self.chunk] = cache.all[pos] = token
            seen = cache.ring[: pos % self.chunk + 1], cache.all[: pos + 1]
            rows.append(self.logits(*seen))
        cache.pos += len(ids)
        return np.stack(rows[first:]) if all_logits else rows[-1]

    def steady_end(self, n):
        """0: no position has the same bits in another prompt, so an exact session reuses none."""
        return 0

    def may_begin(self, pos, n):
        return pos == 0

    def forward_each(self, ids, caches):
        self.widths.append(len(ids))
        return np.array([self.forward(some, cache) for some, cache in zip(ids, caches, strict=True)])

    def interrupt(self):
        """Make a running forward end at its next token."""
        self.interrupted = True

    def profile(self, ids, cache):
        self.forward(ids, cache)
        return [
            (None, "embedding", 0.5),
            (0, "attention", 2.0),
            (1, "experts", 1.0),
            (1, "attention", 1.0),
            (None, "output", 0.5),
        ]

    def logits(self, chunk, everything):
        mixed = 0
        for token in [*chunk, *everything]:
            mixed = (mixed * 31 + token + 7) % 1_000_003
        return one_hot(97 + mixed % 26)


class Scripted(FakeEngine):
    """Answers with `reply` after the assistant's header, then <|eot|>."""

    def __init__(self, reply, **how):
        super().__init__(**how)
        self.reply = [*reply.encode(), EOT]

    def logits(self, chunk, everything):
        said = everything[::-1].index(HEADER) if HEADER in everything else len(everything) - 1
        return one_hot(self.reply[min(said, len(self.reply) - 1)])


def one_hot(token):
    logits = np.zeros(N_VOCAB, np.float32)
    logits[token] = 1
    return logits


def Greedy(logprobs=None):
    return Sampler(temp=0, logprobs=logprobs)


class Answers(FakeEngine):
    """Answers with the next of `replies` each time, then <|eot|>."""

    def __init__(self, *replies, **how):
        super().__init__(chunk=64, **how)
        self.replies, self.begun = [[*reply.encode(), EOT] for reply in replies], {}

    def logits(self, chunk, everything):
        if HEADER not in everything:
            return one_hot(0)
        said = everything[::-1].index(HEADER)
        reply = self.replies[self.begun.setdefault(len(everything) - said, len(self.begun))]
        return one_hot(reply[min(said, len(reply) - 1)])


class FakeModel(Model):
    def __init__(self, engine, ctx=None):
        gguf = SimpleNamespace(metadata={}, path=Path("miniature.gguf"), paths=[Path("miniature.gguf")], tensors={})
        super().__init__(gguf, CONFIG, FakeTokenizer(), engine, ctx or 4096)

    @property
    def sight(self):
        raise PictureError("/secret/miniature.gguf: expected a vision tower, found none")

    def prompt_ids(self, messages, image_tiles=None, tools=(), limit=None):
        self.asked, self.offered = list(messages), tools
        ids = [BOS]
        for message in messages:
            ids += [*message["role"][:1].encode(), 10, *message["content"].encode(), EOT]
        return [*ids, HEADER]

    def count_tokens(self, messages, image_tiles=None, tools=()):
        return len(self.prompt_ids(messages, image_tiles, tools))

    def sampler(self, **settings):
        self.settings = settings
        return Greedy(settings.get("logprobs"))


def write_gguf(path, architecture, rows=4):
    """A valid GGUF with one tensor and a name that contains a terminal escape; returns its path."""
    import gguf  # late: its import takes longer than the rest of this module

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("small\x1b[31m")
    writer.add_tensor("token_embd.weight", np.zeros((rows, 32), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return str(path)


def fake(*args, reply=REPLY, delay="0"):
    """The command line of a process that uses the miniature model."""
    return [sys.executable, __file__, reply, delay, *args]


def start(*args, **how):
    """Start such a process with piped output."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    fakes = {name: how.pop(name) for name in ("reply", "delay") if name in how}
    return subprocess.Popen(fake(*args, **fakes), **{**pipes, **how})


def sleeps(process, seconds=300):
    """Wait until the main thread of a process sleeps, if the system shows that: it then waits, for example for input."""
    stat, until = Path(f"/proc/{process.pid}/task/{process.pid}/stat"), time.monotonic() + seconds
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "S":
        assert time.monotonic() < until, "it works on"
        time.sleep(0.01)


class Preloaded:
    """Processes with the miniature model that start quickly: forks of one that has imported the modules of a chat."""

    def __init__(self):
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(300)
        command = [sys.executable, __file__, "--serve", str(theirs.fileno())]
        self._server = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()

    def start(self, command, tty, env):
        """The `start` of a `Terminal`; `command` is one that `fake` returned."""
        socket.send_fds(self._socket, [json.dumps([command[2:], env]).encode()], [tty])
        return Fork(self, int(self._socket.recv(64)))

    def status(self, pid):
        """The exit code of a fork, minus its signal, or None while it runs."""
        self._socket.send(str(pid).encode())
        return json.loads(self._socket.recv(64))

    def close(self):
        self._socket.close()
        self._server.wait(300)


class Fork:
    """The part of subprocess.Popen that tests need."""

    def __init__(self, server, pid):
        self._server, self.pid, self.returncode = server, pid, None

    def wait(self, timeout):
        until = time.monotonic() + timeout
        while self.returncode is None:
            self.returncode = self._server.status(self.pid)
            if self.returncode is None:
                if time.monotonic() > until:
                    raise subprocess.TimeoutExpired("fork", timeout)
                time.sleep(0.005)
        return self.returncode

    def send_signal(self, number):
        if self.returncode is None:
            os.kill(self.pid, number)


def serve(connection):
    """Fork for every request: the arguments of this script and an environment, with a terminal; or the number of a fork."""
    no_model_is_looked_for()
    from llamacli.cli.chat import live, loop, markdown, prompt  # noqa: F401  the modules of a chat

    while data := socket.recv_fds(connection, 1 << 18, 1):
        message, fds, *_ = data
        if not message:
            return
        if not fds:
            pid, status = os.waitpid(int(message), os.WNOHANG)
            connection.send(json.dumps(os.waitstatus_to_exitcode(status) if pid else None).encode())
            continue
        pid = os.fork()
        if pid == 0:
            connection.close()
            arguments, env = json.loads(message)
            os.setsid()
            fcntl.ioctl(fds[0], termios.TIOCSCTTY, 0)
            for fd in range(3):
                os.dup2(fds[0], fd)
            os.close(fds[0])
            os.environ.clear()
            os.environ.update(env)
            sys.stdin, sys.stdout = os.fdopen(0, encoding="utf-8"), os.fdopen(1, "w", encoding="utf-8")
            sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace")
            answer(arguments)
        os.close(fds[0])
        connection.send(str(pid).encode())


def answer(arguments):
    """REPLY DELAY and the command line; does not return."""
    from llamacli.cli import enter, options

    reply, delay = arguments[0], float(arguments[1])
    options.load_model = lambda path, threads, ctx, console, **more: FakeModel(Scripted(reply, chunk=64, delay=delay), ctx)
    no_model_is_looked_for()
    sys.argv[1:] = arguments[2:]
    enter()


def no_model_is_looked_for():
    from llamacli.cli import options

    options.find_model = lambda name, console: name or "miniature.gguf"


def prompt_of(model):
    """The prompt that the engine saw, as text."""
    return bytes(t for t in model.engine.calls[0][1] if t < 256).decode()


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(socket.socket(fileno=int(sys.argv[2])))
    else:
        answer(sys.argv[1:])
