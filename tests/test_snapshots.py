"""Snapshots: with and without them the same bytes, at every edge; damaged or foreign files are never used."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import tiny

from llamacli import environment, snapshots
from llamacli.engine import Engine
from llamacli.files.gguf import open_gguf
from llamacli.llama4.config import Config
from llamacli.prompt import Features
from llamacli.session import Session
from llamacli.snapshots import Snapshots, held, identity

CHUNK, BLOCK, BATCH = 128, 32, 64
SIZES = {"n_embd": 256, "head_dim": 32, "n_ff": 256, "n_ff_exp": 256, "chunk": CHUNK}
BOOK = np.random.RandomState(1).randint(0, 250, 4 * CHUNK).tolist()
QUESTION = np.random.RandomState(2).randint(0, 250, 40).tolist()


def engine_of(path, batch=BATCH):
    gguf = open_gguf(path)
    return Engine(gguf, Config.from_gguf(gguf), 2, max_batch=batch)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A model in 4 bits, whose products take other paths for few tokens than for many."""
    folder = tmp_path_factory.mktemp("model")
    return tiny.tiny_gguf(folder / "m.gguf", types=lambda name: "F32" if "embd" in name else "Q4_0", **SIZES)


@pytest.fixture(scope="module")
def engine(path):
    return engine_of(path)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(snapshots, "BLOCK", BLOCK)


def snap(engine, folder, limit=1 << 30, exact=True, model=b"model"):
    return Snapshots(folder, engine, model, limit, exact)


def answer(engine, prompt, kept=None, n=3):
    """Logits after the prompt and after some further tokens; and how many tokens were read back."""
    session = Session(engine, None, 1024, kept)
    found = [session.sync(prompt)]
    cached = session.stats.cached_tokens
    for token in range(n):
        found.append(session.eval([token]))
    return np.array(found), cached


@pytest.mark.parametrize("shape", ["scout", "maverick", "no chunks"])
@pytest.mark.parametrize("batch", [64, 256])
def test_an_answer_has_the_same_bytes_with_and_without_at_every_edge(shape, batch, tmp_path):
    more = {"scout": {}, "maverick": tiny.MAVERICK, "no chunks": {"chunk": 0}}[shape]
    types = lambda name: "F32" if "embd" in name else "Q4_0"
    engine = engine_of(tiny.tiny_gguf(tmp_path / "m.gguf", types=types, **SIZES | more), batch)
    cold, _ = answer(engine, BOOK + QUESTION, snap(engine, tmp_path / "s"))
    assert np.array_equal(cold, answer(engine, BOOK + QUESTION)[0])
    read = []
    for common in sorted({edge + off for edge in range(0, len(BOOK) + 1, CHUNK) for off in (-1, 0, 1, 45)}):
        if not 0 <= common <= len(BOOK):
            continue
        for tail in (1, 40, 100):
            rest = np.random.RandomState(1000 * common + tail).randint(0, 250, tail - 1)
            prompt = [*BOOK[:common], 250 + tail % 7, *rest.tolist()]
            warm, cached = answer(engine, prompt, snap(engine, tmp_path / "s"), 1)
            assert np.array_equal(warm, answer(engine, prompt, n=1)[0]), f"{common} in common, {tail} after them"
            assert cached <= common
            read.append(cached)
            if shape != "no chunks" and tail == 40:
                assert cached >= common // CHUNK * CHUNK  # at most one chunk is evaluated again
    assert max(read) == len(BOOK)


@pytest.mark.parametrize("kv", ["Q8_0", "Q4_0"])
def test_keys_and_values_in_blocks_are_kept_as_they_are(kv, path, engine, tmp_path):
    gguf = open_gguf(path)
    blocks = Engine(gguf, replace(Config.from_gguf(gguf), kv_type=kv), 2, max_batch=BATCH)
    cold, _ = answer(blocks, BOOK + QUESTION, snap(blocks, tmp_path))
    warm, cached = answer(blocks, BOOK + QUESTION, snap(blocks, tmp_path))
    assert np.array_equal(warm, cold)
    assert cached == len(BOOK)
    assert answer(engine, BOOK + QUESTION, snap(engine, tmp_path))[1] == 0  # those of another type are not taken


def test_the_next_question_costs_little_more_than_itself(engine, tmp_path):
    answer(engine, BOOK + QUESTION, snap(engine, tmp_path))
    for common in (400, 450, 509, 512):
        _, cached = answer(engine, BOOK[:common] + QUESTION, snap(engine, tmp_path))
        assert cached == common // BLOCK * BLOCK


def test_shared_beginnings_are_stored_once(engine, tmp_path):
    answer(engine, BOOK + QUESTION, snap(engine, tmp_path))
    before = held(tmp_path)
    answer(engine, BOOK + QUESTION[::-1], snap(engine, tmp_path))
    assert held(tmp_path).files - before.files == 2  # the block of the question: its layers of both kinds
    answer(engine, BOOK + QUESTION, snap(engine, tmp_path))
    assert held(tmp_path).files - before.files == 2


def test_layers_that_see_their_chunk_are_kept_for_the_last_one_only(engine, tmp_path):
    answer(engine, BOOK[:350], snap(engine, tmp_path))
    names = [path.suffix for path in tmp_path.iterdir()]
    assert names.count(".all") == 350 // BLOCK
    assert names.count(".chunk") == 350 % CHUNK // BLOCK


def test_only_the_user_can_read_the_files(engine, tmp_path):
    answer(engine, BOOK, snap(engine, tmp_path / "new" / "folder"))
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "new" / "folder").iterdir()} == {0o600}


def test_another_model_another_arithmetic_other_pictures_are_not_taken_for_this_one(engine, path, tmp_path, monkeypatch):
    rows = np.random.RandomState(0).standard_normal((64, 256)).astype(np.float32)
    prompt = [*BOOK[:32], Features(7, rows, b"one"), *BOOK[:30]]
    kept = snap(engine, tmp_path)
    answer(engine, prompt, kept)
    assert answer(engine, prompt, kept)[1] == 96
    assert answer(engine, [*BOOK[:32], Features(7, rows + 1, b"one"), *BOOK[:30]], kept)[1] == 32
    assert answer(engine, [*BOOK[:32], *[7] * 64, *BOOK[:30]], kept)[1] == 32
    assert answer(engine, prompt, snap(engine, tmp_path, model=b"another"))[1] == 0
    assert answer(engine, prompt, snap(engine, tmp_path, exact=False))[1] == 0
    monkeypatch.setattr(snapshots, "VERSION", snapshots.VERSION + 1)
    assert answer(engine, prompt, snap(engine, tmp_path))[1] == 0


def test_a_models_identity_follows_its_bytes(path, tmp_path):
    raw = bytearray(path.read_bytes())
    copy = tmp_path / "m.gguf"
    copy.write_bytes(raw)
    time_of = path.stat().st_mtime_ns
    os.utime(copy, ns=(time_of, time_of))
    before = identity(open_gguf(copy))
    assert before == identity(open_gguf(path))
    tensor = open_gguf(copy).tensors["blk.2.attn_q.weight"]
    raw[tensor.offset + tensor.nbytes // 2] ^= 1
    copy.write_bytes(raw)
    os.utime(copy, ns=(time_of, time_of))
    assert identity(open_gguf(copy)) != before


DAMAGE = {
    "magic": lambda raw: raw[:3] + b"?" + raw[4:],
    "version": lambda raw: raw[:7] + b"2" + raw[8:],
    "size": lambda raw: raw[:8] + b"\xff" * 8 + raw[16:],
    "name": lambda raw: raw[:20] + bytes([raw[20] ^ 1]) + raw[21:],
    "first value": lambda raw: raw[:48] + bytes([raw[48] ^ 1]) + raw[49:],
    "a value": lambda raw: raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 128]) + raw[len(raw) // 2 + 1 :],
    "last value": lambda raw: raw[:-17] + bytes([raw[-17] ^ 1]) + raw[-16:],
    "checksum": lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]),
    "empty": lambda raw: b"",
    "cut in its head": lambda raw: raw[:30],
    "cut": lambda raw: raw[: len(raw) // 2],
    "one byte short": lambda raw: raw[:-1],
    "one byte long": lambda raw: raw + b"x",
    "zeros": lambda raw: bytes(len(raw)),
}


@pytest.mark.parametrize("kind", [".all", ".chunk"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_noticed_and_written_anew(damage, kind, engine, tmp_path):
    prompt = BOOK[:200]
    expected, _ = answer(engine, prompt, snap(engine, tmp_path))
    damaged = sorted(tmp_path.glob("*" + kind))[0]
    sound = damaged.read_bytes()
    damaged.write_bytes(DAMAGE[damage](sound))
    found, cached = answer(engine, prompt, snap(engine, tmp_path))
    assert np.array_equal(found, expected)
    assert cached < 192
    assert damaged.read_bytes() == sound
    assert answer(engine, prompt, snap(engine, tmp_path))[1] == 192


def test_a_file_of_another_block_is_noticed(engine, tmp_path):
    expected, _ = answer(engine, BOOK[:200], snap(engine, tmp_path))
    one, other = sorted(tmp_path.glob("*.all"))[:2]
    one.write_bytes(other.read_bytes())
    assert np.array_equal(answer(engine, BOOK[:200], snap(engine, tmp_path))[0], expected)


def test_the_least_recently_used_go_and_the_limit_holds(engine, tmp_path):
    answer(engine, BOOK[:256], snap(engine, tmp_path))
    one = held(tmp_path).nbytes
    limit = 2 * one + one // 2
    texts = [[n, *BOOK[:255]] for n in range(3)]
    for text in (BOOK[:256], texts[0], BOOK[:256], texts[1], texts[2]):  # BOOK's were used after those of the first text
        answer(engine, text, snap(engine, tmp_path, limit))
        assert held(tmp_path).nbytes <= limit
    cached = [answer(engine, text[:250] + [9] * 40, snap(engine, tmp_path))[1] for text in texts]
    assert cached[0] == 0
    assert cached[2] == 224


def test_what_does_not_fit_is_kept_in_part_from_its_start(engine, tmp_path):
    answer(engine, BOOK, snap(engine, tmp_path / "all"))
    kept = snap(engine, tmp_path / "part", held(tmp_path / "all").nbytes // 2)
    expected, _ = answer(engine, BOOK, kept)
    assert "limit" in kept.notices[0]
    found, cached = answer(engine, BOOK, snap(engine, tmp_path / "part"))
    assert 0 < cached < len(BOOK)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("how", ["writable", "theirs"])
def test_a_folder_of_others_is_neither_read_nor_written(engine, tmp_path, monkeypatch, how):
    """As in a cache that users share: they could put in what the model never computed."""
    folder = tmp_path / "kept"
    answer(engine, BOOK, snap(engine, folder))
    assert answer(engine, BOOK, snap(engine, folder))[1] > 0
    files = sorted(path.name for path in folder.iterdir())
    if how == "writable":
        folder.chmod(0o770)
    else:
        true = os.stat
        theirs = lambda path, **more: os.stat_result((*true(path, **more)[:4], 54321, *true(path, **more)[5:10]))
        monkeypatch.setattr(os, "stat", theirs)
    kept = snap(engine, folder)
    assert answer(engine, BOOK[7:], kept)[1] == answer(engine, BOOK, kept)[1] == 0
    assert sorted(entry.name for entry in os.scandir(folder)) == files
    assert {"writable": "chmod go-w", "theirs": "set LLAMACLI_CACHE"}[how] in kept.notices[0]


def test_a_folder_that_cannot_be_written_costs_a_notice_not_the_answer(engine, tmp_path):
    (tmp_path / "file").write_text("")
    kept = snap(engine, tmp_path / "file" / "below")
    assert np.array_equal(answer(engine, BOOK, kept)[0], answer(engine, BOOK)[0])
    assert "not kept" in kept.notices[0]


def test_what_was_evaluated_before_an_interrupt_is_kept(engine, tmp_path):
    def stop(done, total):
        if done == 2 * BATCH:
            raise KeyboardInterrupt

    engine.follow_progress = stop
    try:
        with pytest.raises(KeyboardInterrupt):
            answer(engine, BOOK, snap(engine, tmp_path))
    finally:
        engine.follow_progress = None
    found, cached = answer(engine, BOOK, snap(engine, tmp_path))
    assert cached == 2 * BATCH
    assert np.array_equal(found, answer(engine, BOOK)[0])


def test_an_interrupt_while_reading_leaves_the_session_usable(engine, tmp_path, monkeypatch):
    answer(engine, BOOK[:200], snap(engine, tmp_path))
    session = Session(engine, None, 1024, snap(engine, tmp_path))

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Snapshots, "_touch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.sync(BOOK[:200])
    assert np.array_equal(session.sync(BOOK[:199]), answer(engine, BOOK[:199])[0][0])


def test_a_conversation_goes_on_as_if_it_had_never_ended(tmp_path):
    """Token by token over two chunk edges, then read back, continued, and truncated."""
    engine = engine_of(tiny.tiny_gguf(tmp_path / "m.gguf", **SIZES))
    session = Session(engine, None, 1024, snap(engine, tmp_path, exact=False))
    session.sync(BOOK[:100])
    for token in BOOK[100:300]:
        session.eval([token])
    session.snapshots.keep(session.cache, session.ids, len(session.ids))
    later = Session(engine, None, 1024, snap(engine, tmp_path, exact=False))
    found = later.sync(BOOK[:301])
    assert later.stats.cached_tokens == 288
    expected = session.eval(BOOK[300:301])
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())
    for length in (290, 257, 256, 255, 130, 20):
        found, expected = later.sync(BOOK[:length]), answer(engine, BOOK[:length])[0][0]
        np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


WRITING = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_snapshots as t
t.snapshots.BLOCK = t.BLOCK
engine = t.engine_of(Path(sys.argv[2]))
print("ready", flush=True)
for n in range(1000):
    t.answer(engine, [n % 3, *t.BOOK], t.snap(engine, Path(sys.argv[3])), 0)
    if n % 3 == 2:
        t.snapshots.clear(Path(sys.argv[3]))
"""


def test_writers_that_are_killed_and_readers_at_the_same_time_never_meet_anything_wrong(path, engine, tmp_path):
    command = [sys.executable, "-c", WRITING, os.path.dirname(__file__), str(path), str(tmp_path)]
    expected = [answer(engine, [n, *BOOK], n=0)[0] for n in range(3)]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for writer in writers:
            assert writer.stdout.readline() == b"ready\n"
        read = 0
        for turn in range(100):
            if turn >= 5 and read:  # writers clear the folder, too, and may do so before each look
                break
            for n in range(3):
                found, cached = answer(engine, [n, *BOOK], snap(engine, tmp_path), 0)
                assert np.array_equal(found, expected[n])
                read += cached
    finally:
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
            writer.stdout.close()
    assert read
    for n in range(3):
        assert np.array_equal(answer(engine, [n, *BOOK], snap(engine, tmp_path), 0)[0], expected[n])


def test_what_a_killed_process_left_is_removed_once_it_is_old(engine, tmp_path):
    part = tmp_path / "0.all.1-2.part"
    part.write_bytes(b"half")
    answer(engine, BOOK, snap(engine, tmp_path))
    assert part.exists()
    os.utime(part, (0, 0))
    answer(engine, BOOK, snap(engine, tmp_path))
    assert not part.exists()


def test_the_folder_lies_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LLAMACLI_CACHE", str(tmp_path))
    assert environment.snapshots_folder() == tmp_path / "snapshots"


@pytest.mark.parametrize("held", [BLOCK + 8, CHUNK - 1])
def test_a_damaged_block_never_leaves_wrong_keys_and_values(held, engine, tmp_path):
    """The rings get the later chunk first; then a block of the earlier one, which the session uses, is found damaged."""
    prompt = BOOK[: CHUNK + 2 * BLOCK + 5]
    answer(engine, prompt, snap(engine, tmp_path, exact=False))
    session = Session(engine, None, 1024, snap(engine, tmp_path, exact=False))
    session.sync(prompt[:held])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.all")}
    block = sorted(before, key=before.get, reverse=True)[held // BLOCK]  # the first of them was used last
    block.write_bytes(b"damaged")
    found = session.sync(prompt)
    assert block.stat().st_size > len(b"damaged")  # it was met, and is kept anew
    right = Session(engine, None, 1024)
    right.sync(prompt[:held])
    assert np.allclose(found, right.sync(prompt), rtol=0, atol=1e-2)
