"""Keys and values in a file: the bytes of a cache in memory, the reads that are counted, what a full or failing disk leaves."""

import errno
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import interrupts
import numpy as np
import oracle
import pytest
import tiny

from llamacli import Model
from llamacli.cpu import kvfile
from llamacli.cpu.kernels.ops import kv
from llamacli.cpu.kvfile import KVFile
from llamacli.engine import Engine
from llamacli.errors import OutputError, UsageError
from llamacli.files.gguf import open_gguf
from llamacli.llama4.config import Config

BLOCK, WINDOW, CTX, BATCH = 256, 768, 4096, 300
SHAPE = {"head_dim": 32, "n_embd": 64, "chunk": 512, "n_layers": 8}  # two layers of which see every position


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny.tiny_gguf(tmp_path_factory.mktemp("model") / "m.gguf", **SHAPE)


def engine(path, folder=None, kv_type="F16", **more):
    gguf = open_gguf(path)
    where = folder and KVFile(folder, WINDOW, BLOCK)
    return Engine(gguf, replace(Config.from_gguf(gguf), kv_type=kv_type), 2, max_batch=BATCH, kv_file=where, **more)


def text(n, seed=0):
    return np.random.RandomState(seed).randint(0, 257, n)


def conversation(model):
    """Logits of a prompt of several windows and of single tokens, and after going back to where memory holds nothing."""
    cache = model.new_cache(CTX)
    found = [model.forward(text(1700), cache, all_logits=True)]
    found += [model.forward([token], cache)[None] for token in text(100, 1)]
    for pos in (1750, 1690, 700, 512, 5):
        reached = cache.truncate(pos)
        found += [model.forward(text(pos - reached + 600, pos), cache, all_logits=True)]
        found += [model.forward([7], cache)[None]]
    return np.concatenate(found)


@pytest.mark.parametrize("kv_type", kv.TYPES)
def test_a_cache_in_a_file_gives_the_bytes_of_one_in_memory(kv_type, path, tmp_path):
    model = engine(path, tmp_path, kv_type)
    assert np.array_equal(conversation(model), conversation(engine(path, None, kv_type)))
    assert model.take_io_stats().kv_bytes > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", [{"slots": 8}, {"cuts": (2, 6)}, {"cuts": (4,)}], ids=["slots", "3 stages", "2 stages"])
def test_a_cache_in_a_file_gives_the_same_bytes_with_fetched_experts_and_in_stages(how, path, tmp_path):
    assert np.array_equal(conversation(engine(path, tmp_path, **how)), conversation(engine(path)))


def test_several_sequences_in_a_batch_have_a_file_each(path, tmp_path):
    found = []
    for model in (engine(path, tmp_path), engine(path)):
        caches = [model.new_cache(CTX) for _ in range(3)]
        rows = [model.forward_each([text(1000 + 200 * i, i) for i in range(3)], caches)]
        rows += [model.forward_each([[i], [i + 1], [i + 2]], caches) for i in range(5)]
        found.append(np.concatenate(rows))
    assert np.array_equal(*found)


def test_a_copy_goes_on_as_the_original_does(path, tmp_path):
    in_file, in_memory = engine(path, tmp_path), engine(path)
    cache, copies = in_file.new_cache(CTX), [model.new_cache(CTX) for model in (in_file, in_memory)]
    in_file.forward(text(1500), cache)
    for copy in copies:
        cache.copy_to(copy)
    right = in_file.forward([1, 2, 3], cache)
    assert np.array_equal(in_file.forward([1, 2, 3], copies[0]), right)
    assert np.array_equal(in_memory.forward([1, 2, 3], copies[1]), right)


@pytest.mark.parametrize("kv_type", kv.TYPES)
def test_a_token_reads_what_is_computed(kv_type, path, tmp_path):
    """By hand: two layers, two heads, keys and values, and each block that is older than the window."""
    model = engine(path, tmp_path, kv_type)
    cache, row = model.new_cache(CTX), {"F16": 64, "Q8_0": 34, "Q4_0": 18}[kv_type]
    block = -(-2 * 2 * BLOCK * row // 4096) * 4096
    for depth in (100, 767, 768, 1000, 1023, 1024, 2000, 1100):  # the last one goes back to what memory no longer holds
        reached = cache.truncate(depth)
        model.forward(text(depth - reached), cache)
        model.take_io_stats()
        model.forward([5], cache)
        cache.truncate(depth)
        read = model.take_io_stats().kv_bytes
        assert read == 2 * block * max(0, depth // BLOCK + 1 - WINDOW // BLOCK)
        assert read == kvfile.bytes_per_token(model.config, depth, CTX, WINDOW, BATCH, BLOCK)


def test_a_prompt_reads_each_block_once_a_batch(path, tmp_path):
    model = engine(path, tmp_path)
    cache = model.new_cache(CTX)
    model.forward(text(1024), cache)
    model.take_io_stats()
    model.forward(text(300), cache)  # memory holds three blocks: one that was begun, two before it
    assert model.take_io_stats().kv_bytes == 2 * 3 * kvfile.block_bytes(model.config, BLOCK)


def test_memory_and_disk_are_what_is_computed(path, tmp_path):
    model = engine(path, tmp_path)
    cache = model.new_cache(CTX)
    model.forward(text(CTX), cache)
    assert cache.nbytes == kvfile.nbytes(model.config, CTX, WINDOW, BATCH, BLOCK)
    if sys.platform == "linux":
        (size,) = open_files(tmp_path)
        assert size == kvfile.file_bytes(model.config, CTX, WINDOW, BATCH, BLOCK)
        del cache
        assert not open_files(tmp_path)


def open_files(folder):
    """Sizes of this process's open files that were made in a folder."""
    links = [entry for entry in Path("/proc/self/fd").iterdir() if os.path.lexists(entry)]
    return [link.stat().st_size for link in links if os.readlink(link).startswith(str(folder))]


def test_a_context_that_memory_holds_needs_no_file(path, tmp_path):
    model = engine(path, tmp_path)
    cache = model.new_cache(WINDOW)
    tmp_path.rmdir()
    model.forward(text(WINDOW), cache)
    assert model.take_io_stats().kv_bytes == 0


# what goes wrong


@contextmanager
def largest_file(nbytes):
    """As a full disk: no file may grow beyond `nbytes`."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def goes_on(model, cache, held, path):
    """Whether a cache that holds text(held) answers as one in memory does."""
    other = engine(path)
    right = other.new_cache(CTX)
    other.forward(text(held), right)
    return np.array_equal(model.forward([1, 2, 3], cache), other.forward([1, 2, 3], right))


def test_a_disk_without_room_is_found_before_a_prompt_is_evaluated(path, tmp_path):
    model = engine(path, tmp_path)
    cache, progress = model.new_cache(CTX), []
    model.forward(text(700), cache)
    with largest_file(2 * 2 * kvfile.block_bytes(model.config, BLOCK)):
        model.follow_progress = lambda *counts: progress.append(counts)
        with pytest.raises(OutputError, match=r"room for .* MB of keys and values, found: File too large; free some"):
            model.forward(text(3000), cache)
        model.follow_progress = None
        assert not progress
        assert goes_on(model, cache, 700, path)


def test_a_disk_that_is_full_at_a_token_leaves_what_was_held(path, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "somewhere that reserves nothing")
    model = engine(path, tmp_path)
    cache = model.new_cache(CTX)
    model.forward(text(1024), cache)
    with largest_file(2 * kvfile.block_bytes(model.config, BLOCK)):
        with pytest.raises(OutputError, match="File too large"):
            model.forward([1], cache)
        with pytest.raises(OutputError, match="File too large"):
            model.forward([1], cache)
    reached = cache.truncate(1000)
    model.forward(text(1024)[reached:], cache)
    assert goes_on(model, cache, 1024, path)


def test_a_failed_write_is_an_error_and_the_next_one_goes_on(path, tmp_path, monkeypatch):
    model = engine(path, tmp_path)
    cache = model.new_cache(CTX)
    model.forward(text(1000), cache)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(OutputError, match="expected to write keys and values, found: Input/output error"):
            model.forward(text(100), cache)
    reached = cache.truncate(1000)
    model.forward(text(1000)[reached:], cache)
    np.testing.assert_allclose(*(m.forward([1], c) for m, c in ((model, cache), held(engine(path), 1000))), atol=1e-3)


def held(model, n):
    cache = model.new_cache(CTX)
    model.forward(text(n), cache)
    return model, cache


def test_a_failed_read_is_an_error_and_the_next_one_goes_on(path, tmp_path, monkeypatch):
    model, cache = held(engine(path, tmp_path), 1500)
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        with pytest.raises(OutputError, match=r"keys and values as they were written, .*read error \(Input/output error\)"):
            model.forward([1], cache)
    assert goes_on(model, cache, 1500, path)


def test_a_file_system_without_direct_reads_is_used_all_the_same(path, tmp_path, monkeypatch):
    monkeypatch.setattr(kvfile, "make_direct", lambda file: False)
    model, cache = held(engine(path, tmp_path), 1500)
    assert goes_on(model, cache, 1500, path)


@pytest.mark.parametrize("kind", ["pwrite", "preadv"])
def test_a_file_system_that_refuses_direct_reads_late_is_used_all_the_same(kind, path, tmp_path, monkeypatch):
    """As some do: the file opens, and then the first direct call is refused."""
    real, refused = getattr(os, kind), []

    def call(file, *more):
        if not refused:
            refused.append(file)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(file, *more)

    monkeypatch.setattr(os, kind, call)
    monkeypatch.setattr(kvfile, "make_direct", lambda file: True)
    model, cache = held(engine(path, tmp_path), 1500)
    assert goes_on(model, cache, 1500, path)
    assert refused


@pytest.mark.parametrize("module", ["kvfile", "kvreads"])
def test_ctrl_c_at_any_line_leaves_what_was_held(module, path, tmp_path):
    import llamacli.cpu.kvreads

    traced = {"kvfile": kvfile, "kvreads": llamacli.cpu.kvreads}[module]
    model, (_, right) = engine(path, tmp_path), held(engine(path), 1020)
    answer = engine(path).forward([1] * 10, right)

    def at(number):
        cache = model.new_cache(CTX)
        model.forward(text(1020), cache)
        try:
            return interrupts.run_traced(lambda: model.forward([1] * 10, cache), traced, number)
        except KeyboardInterrupt:
            if (reached := cache.truncate(1020)) < 1020:
                model.forward(text(1020)[reached:], cache)
            assert np.array_equal(model.forward([1] * 10, cache), answer), f"wrong after an interrupt at event {number}"
            return None

    events = at(None)
    assert events > 50
    for number in range(1, events + 1, max(1, events // 10)):
        at(number)


KILLED = """
import os, signal, sys
from pathlib import Path
from llamacli import Model

model = Model.load(sys.argv[1], ctx=1 << 15, kv_file=sys.argv[2], memory=int(sys.argv[3]), experts="slots")
model.engine.forward([i % 250 for i in range(8000)], model.engine.new_cache(1 << 15))
assert model.engine.take_io_stats().kv_bytes > 0
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_no_file(path, tmp_path):
    from llamacli.plan import placement

    gguf = open_gguf(path)
    config = Config.from_gguf(gguf)
    sizes = placement.size_by_kind([(t.name, t.nbytes) for t in gguf.tensors.values()], config)
    least = next(
        n << 20
        for n in range(100, 400)
        if placement.fit_ctx(config, sizes, n << 20, 1 << 15, threads=2, slots=True, kv_files=1) == 1 << 15
    )
    done = subprocess.run([sys.executable, "-c", KILLED, path, tmp_path, str(least)], timeout=300, stderr=subprocess.PIPE)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert list(tmp_path.iterdir()) == []


def test_a_place_where_no_file_can_be_made_is_refused_at_once(path, tmp_path):
    there = tmp_path / "there"
    there.touch()
    for name in (there, tmp_path / "no folder" / "x"):
        with pytest.raises(UsageError, match=r"--kv-file .*: expected a folder, or a path where a new file can be made"):
            Model.load(path, kv_file=name)
    with Model.load(path, kv_file=tmp_path / "new") as model:
        assert model.logits([1, 2, 3]).shape == (3, 288)
    assert [entry.name for entry in tmp_path.iterdir()] == ["there"]


# a long text

LONG = {"heads": 1, "kv_heads": 1, "head_dim": 16, "n_embd": 32, "n_ff_exp": 32, "experts": 2, "chunk": 1024, "vocab": 288}
SAMPLED = 20


def check_a_long_text(folder, n, window):
    """Evaluate `n` tokens with `window` of them in memory; at SAMPLED positions logits are those of NumPy in float64, and a
    token reads what is computed: one layer, one head, keys and values of 16 halves.
    """
    path, ids = tiny.tiny_gguf(folder / "long.gguf", **LONG), text(n + 1)
    at = [*sorted(np.random.RandomState(1).choice(np.arange(window, n - 1), SAMPLED - 1, replace=False).tolist()), n - 1]
    gguf = open_gguf(path)
    where = KVFile(folder, window, BLOCK)
    model = Engine(gguf, Config.from_gguf(gguf), 2, max_batch=1024, kv_file=where)
    cache, rows, read = model.new_cache(n + 1), [], 0
    for p in at:
        rows.append(model.forward(ids[cache.pos : p + 1], cache))
        read += model.take_io_stats().kv_bytes
    model.forward(ids[n:], cache)
    io = model.take_io_stats()
    assert io.kv_bytes == (n // BLOCK + 1 - window // BLOCK) * BLOCK * 2 * 2 * 16
    assert io.kv_bytes == kvfile.bytes_per_token(model.config, n, n + 1, window, 1024, BLOCK)
    right = oracle.logits_at(path, ids[:n], at, kv=np.float16)
    error = np.abs(np.array(rows) - right).max() / np.abs(right).max()
    print(f"{n} tokens, {read / 1e9:.2f} GB read for them; one more reads {io.kv_bytes} bytes, as computed")
    print(f"largest error at {SAMPLED} positions: {error:.1e} of the largest logit")
    assert error < 1e-3
    assert np.array_equal(np.argmax(rows, -1), np.argmax(right, -1))


def test_a_text_longer_than_memory_has_the_logits_of_float64(tmp_path):
    check_a_long_text(tmp_path, 1 << 12, 2048)


@pytest.mark.slow
def test_a_text_of_a_million_tokens_has_the_logits_of_float64(tmp_path):
    check_a_long_text(tmp_path, 1 << 20, 1 << 16)
