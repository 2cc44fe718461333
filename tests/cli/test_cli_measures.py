"""`inspect`, `tokenize`, `bench`, `perplexity` and `imatrix` from a user's view, with the miniature model of fakes.py."""

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from fakes import FakeEngine, Sizes, start, write_gguf

from llamacli.cli import bench, imatrix, main, perplexity
from llamacli.cpu import kvcache
from llamacli.cpu.kvcache import KVCache
from quantize import shapes
from quantize.convert import convert
from quantize.imatrix import read_imatrix

TESTS = Path(__file__).parents[1]


# inspect, tokenize, bench


def test_inspect_shows_a_file_that_cannot_run_with_the_reason(tmp_path, capfd):
    path = write_gguf(tmp_path / "other.gguf", "mamba")
    assert main(["inspect", path]) == 0
    out = capfd.readouterr().out
    assert "mamba" in out
    assert "cannot be run" in out
    assert "\x1b" not in out
    assert main(["inspect", "--json", path]) == 0
    record = json.loads(capfd.readouterr().out)
    assert record["runnable"] is False
    assert record["parameters"] == 128
    assert record["tensors"]["by_type"] == [{"type": "F32", "count": 1, "parameters": 128, "bytes": 512}]


def test_a_model_in_more_parts_than_files_may_be_open_at_first(tmp_path):
    """macOS allows 256; each part is one file here, and two while experts are read."""
    parts = convert(tiny.tiny_gguf(tmp_path / "tiny.gguf"), tmp_path / "split.gguf", "F16", split_max_size=1)["files"]
    limited = ["bash", "-c", 'ulimit -S -n 24; exec "$@"', "bash", sys.executable, "-m", "llamacli", "inspect", parts[0]]
    done = subprocess.run(limited, capture_output=True, text=True, cwd=TESTS.parent)
    assert len(parts) > 24
    assert (done.returncode, done.stderr) == (0, "")


def test_kv_memory_is_what_the_cache_takes():
    sizes = {"n_layers": 8, "n_kv_heads": 2, "head_dim": 16, "chunk_size": 512, "kv_type": "F16", "kv_row_bytes": 32}
    config = Sizes(**sizes, uses_rope=lambda i: i % 4 != 3)
    for ctx in (256, 300, 512, 2000):
        cache = KVCache(config, ctx)
        cache.reserve(ctx)
        assert kvcache.nbytes(config, ctx) == cache.nbytes
    assert kvcache.nbytes(config, 1024) == kvcache.nbytes(config, 1024, chunked=False) * (6 * 512 + 2 * 1024) // (8 * 1024)


@pytest.fixture
def measured(model, monkeypatch):
    """`bench` measures the miniature model; the machine's limits are given."""
    monkeypatch.setattr("llamacli.bench.measure.limits", lambda threads: (12.5, 100.0, 100.0))
    monkeypatch.setattr(bench, "find_model", lambda name, console: name)
    monkeypatch.setattr(bench, "load_model", lambda path, threads, ctx, console, **more: model)
    return model


def test_bench_json_has_a_record_for_prefill_and_one_for_decode(measured, capfd):
    assert main(["bench", "-p", "16", "-n", "4", "-r", "2", "--json"]) == 0
    prefill, decode = json.loads(capfd.readouterr().out)
    assert (prefill["test"], decode["test"]) == ("pp16", "tg4")
    assert len(decode["runs"]) == 2
    assert min(decode["runs"]) <= decode["tokens_per_second"] <= max(decode["runs"])
    read = 1000 + 4 * 32 * 2.5  # weights, then 4 layers' keys and values of 32 bytes for 1 to 4 tokens
    assert decode["gbytes_per_second"] == pytest.approx(decode["tokens_per_second"] * read / 1e9, abs=1e-4)
    assert (decode["bandwidth_limit"], decode["compute_limit"]) == (12.5, 100)
    assert decode["share_of_limit"] == pytest.approx(decode["gbytes_per_second"] / 12.5, abs=1e-3)
    assert prefill["share_of_limit"] == pytest.approx(prefill["gops_per_second"] / 100, abs=1e-3)
    assert decode["peak_memory_bytes"] > 1e7
    assert [len(ids) for _, ids in measured.engine.calls] == [16] * 3 + [1] * 12


def test_bench_refuses_what_cannot_be_measured_in_one_line(measured, capfd, tmp_path, monkeypatch):
    (tmp_path / "old.json").write_text("[1]")
    monkeypatch.setattr("llamacli.plan.machine.memory_free", lambda: 10**6)
    for args, code, word in (
        (["-p", "0", "-n", "0"], 2, "nothing to measure"),
        (["-p", "12,x"], 2, "512,4096"),
        (["-p", "999999999"], 2, "numbers from 0"),
        (["-d", "4000000"], 2, "free; ask for less"),
        (["--against", str(tmp_path / "old.json")], 2, "llamacli bench --json"),
        (["--against", str(tmp_path / "absent.json")], 2, "llamacli bench --json"),
        (["--shape", "scout", "-m", "x.gguf"], 2, "exclude each other"),
        (["--shape", "scout", "-d", "8192"], 2, "multiple of 4"),
        (["--shape", "scout", "--compare"], 2, "--layers 4"),
        (["--shape", "gpt"], 2, "scout"),
    ):
        assert main(["bench", *args]) == code
        printed = capfd.readouterr()
        assert printed.out == ""
        assert printed.err.count("\n") == 1
        assert word in printed.err


def test_bench_tables_show_depths_profile_peers_and_the_version_before(measured, capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "_peers", lambda model, measure, longest, fill: [SlowPeer()])
    monkeypatch.setattr("llamacli.bench.peer.check", lambda: None)
    old = tmp_path / "old.json"
    old.write_text(json.dumps([{"test": "tg4@d8", "tokens_per_second": 1e-3}]))
    assert main(["bench", "-p", "8", "-n", "4", "-d", "0,8", "-r", "1", "--profile", "--compare", "--against", str(old)]) == 0
    out = capfd.readouterr().out
    assert SlowPeer.closed
    head, *rows = [line for line in out.splitlines() if line.startswith("  ")]
    assert "llama.cpp" in head
    assert "keys and values" in head
    assert "(3.00 GB)" in rows[0]
    assert head.split()[-3:] == ["ratio", "to", "earlier"]
    assert [row.split()[0] for row in rows[:4]] == ["pp8", "tg4", "pp8@d8", "tg4@d8"]
    assert "layer 1" in out
    assert "attention" in out
    assert "60.0 %" in out  # 3 of 5 seconds


class SlowPeer:
    name, closed, peak = "llama.cpp", False, 3_000_000_000

    def seconds(self, test):
        return 100.0

    def close(self):
        SlowPeer.closed = True


def test_bench_compare_says_how_to_get_llama_cpp(measured, capfd, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench", "-p", "8", "-n", "0", "--compare"]) == 2
    assert "pip install llama-cpp-python" in capfd.readouterr().err


def test_bench_of_a_shape_estimates_the_whole_model_and_removes_its_file(capfd, monkeypatch, tmp_path):
    small = replace(
        shapes.SHAPES["scout"],
        **{"n_layers": 8, "n_embd": 256, "n_heads": 2, "n_kv_heads": 1, "n_ff": 512, "n_ff_exp": 256, "n_experts": 4},
        n_vocab=300,
    )
    monkeypatch.setitem(shapes.SHAPES, "scout", small)
    monkeypatch.setattr("llamacli.cpu.kernels.cache_folder", lambda: tmp_path / "kernels")
    monkeypatch.setattr("llamacli.bench.measure.limits", lambda threads: (12.5, 100.0, 100.0))
    args = ["bench", "--shape", "scout", "-p", "8", "-n", "4", "-r", "1", "-t", "1"]
    assert main([*args, "--json"]) == 0
    assert list(tmp_path.iterdir()) == []
    for record in json.loads(capfd.readouterr().out):
        inside = sum(record["profile"]["layers"]) / sum(record["profile"]["operations"].values())
        whole = record["whole_model"]
        assert whole["layers"] == 8
        assert whole["weights_bytes"] == shapes.nbytes(small, 8)
        assert whole["tokens_per_second"] == pytest.approx(record["tokens_per_second"] / (1 + 3 * inside), rel=1e-3)
    assert main([*args, "--keep"]) == 0
    assert "What scout with 8 layers would do here" in capfd.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["scout-2-layers.gguf"]


# perplexity, imatrix


@pytest.fixture
def scored(model, monkeypatch, tmp_path):
    """The miniature model for perplexity and imatrix, in a folder with a text of 40 tokens."""
    for command in (perplexity, imatrix):
        monkeypatch.setattr(command, "find_model", lambda name, console: name or "miniature.gguf")
        monkeypatch.setattr(command, "load_model", lambda path, threads, ctx, console, **more: model)
    (tmp_path / "text").write_text("a" * 39)
    monkeypatch.chdir(tmp_path)
    return model


def test_perplexity_json_is_one_object(scored, capfd):
    assert main(["perplexity", "-f", "text", "-c", "10", "--json"]) == 0
    out, err = capfd.readouterr()
    record = json.loads(out)
    assert err == ""
    assert (record["windows"], record["tokens"], record["ctx"]) == (4, 16, 10)
    assert "kl_mean" not in record
    assert [len(ids) for _, ids in scored.engine.calls] == [10] * 4


def test_perplexity_shows_a_table_and_with_a_reference_the_distance(scored, capfd):
    assert main(["perplexity", "-f", "text", "-c", "10"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "miniature.gguf on text" in out
    assert "16 scored in 4 windows of 10" in out
    assert "KL" not in out
    assert main(["perplexity", "-f", "text", "-c", "10", "--reference", "other.gguf"]) == 0
    out = capfd.readouterr().out
    assert "mean KL divergence" in out
    assert "100.00 %" in out


def test_perplexity_reads_stdin(scored, monkeypatch, capfd):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a" * 19)))
    assert main(["perplexity", "-f", "-", "-c", "10", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["windows"] == 2


@pytest.mark.parametrize("command", [["perplexity"], ["imatrix", "-o", "out.gguf"]], ids=lambda c: c[0])
def test_a_text_that_cannot_be_used_is_one_line(scored, command, capfd, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    (tmp_path / "empty").write_text("")
    (tmp_path / "latin").write_bytes(b"\xe4" * 100)
    for arguments, code, word in (
        (["-f", "empty"], 1, "empty: expected at least one window of 512 tokens, found 1"),
        (["-f", "text"], 1, "found 40"),
        (["-f", "latin"], 1, "UTF-8"),
        (["-f", "absent"], 1, "absent"),
        (["-f", "text", "-c", "7"], 2, "8"),
        ([], 2, "--file"),
    ):
        assert main([*command, *arguments]) == code
        out, err = capfd.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert word in err
    assert not (tmp_path / "out.gguf").exists()


def test_imatrix_writes_a_file_and_names_the_layers_whose_experts_saw_nothing(scored, capfd):
    assert main(["imatrix", "-f", "text", "-o", "out.gguf", "-c", "10"]) == 0
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "llamacli: experts that saw no token: 1 in blk.0; more text, or more varied text, may reach them\n"
    assert [len(ids) for _, ids in scored.engine.calls] == [10] * 4
    found = read_imatrix("out.gguf")
    assert found.entries.keys() == {"blk.0.attn_q.weight", "blk.0.ffn_gate_exps.weight"}
    assert found[2:] == (["text"], 4, 10)


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take UTF-8 only")
def test_an_imatrix_of_a_text_whose_name_is_no_utf_8_is_not_lost_at_the_end(scored, capfd):
    name = os.fsdecode(b"t\xff")
    Path(name).write_bytes(Path("text").read_bytes())
    assert main(["imatrix", "-f", name, "-o", "out.gguf", "-c", "10"]) == 0
    assert read_imatrix("out.gguf").datasets == ["t\ufffd"]


def test_imatrix_json_is_one_object(scored, capfd):
    assert main(["imatrix", "-f", "text", "-o", "out.gguf", "-c", "10", "--json"]) == 0
    record = {"out": "out.gguf", "tensors": 2, "windows": 4, "ctx": 10, "tokens": 40, "unseen": {"blk.0": [1]}}
    assert json.loads(capfd.readouterr().out) == record


def test_imatrix_never_overwrites_unasked_and_says_so_before_the_work(scored, capfd, tmp_path):
    (tmp_path / "out.gguf").write_text("precious")
    command = ["imatrix", "-f", "text", "-o", "out.gguf", "-c", "10"]
    assert main(command) == 1
    assert "--force" in capfd.readouterr().err
    assert scored.engine.calls == []
    assert (tmp_path / "out.gguf").read_text() == "precious"
    assert main([*command, "--force"]) == 0
    assert main([*command[:-1], "10", "-o", "no/such/folder"]) == 1


# Ctrl-C and full disks


@pytest.fixture
def ends_early(scored, measured):
    """Ctrl-C comes in the engine's third call."""

    def forward(ids, cache, **more):
        if len(scored.engine.calls) == 2:
            raise KeyboardInterrupt
        return FakeEngine.forward(scored.engine, ids, cache, **more)

    scored.engine.forward = forward
    return scored


def test_an_interrupted_perplexity_shows_the_windows_it_has(ends_early, capfd):
    assert main(["perplexity", "-f", "text", "-c", "10"]) == 130
    out = capfd.readouterr().out
    assert "miniature.gguf on text, interrupted" in out
    assert "8 scored in 2 of 4 windows of 10" in out
    ends_early.engine.calls.clear()
    assert main(["perplexity", "-f", "text", "-c", "10", "--json"]) == 130
    record = json.loads(capfd.readouterr().out)
    assert (record["windows"], record["tokens"], record["interrupted"]) == (2, 8, True)


def test_an_interrupted_bench_shows_the_tests_it_has(ends_early, capfd):
    assert main(["bench", "-p", "8,16", "-n", "0", "-r", "1"]) == 130
    out = capfd.readouterr().out
    assert "miniature.gguf, 1 threads, interrupted" in out
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  ")] == ["test", "pp8"]
    ends_early.engine.calls.clear()
    assert main(["bench", "-p", "8,16", "-n", "0", "-r", "1", "--json"]) == 130
    (record,) = json.loads(capfd.readouterr().out)
    assert (record["test"], record["interrupted"]) == ("pp8", True)


def test_an_interrupted_imatrix_keeps_what_was_written_last(ends_early, capfd, monkeypatch):
    monkeypatch.setattr(imatrix, "EVERY", 0)
    monkeypatch.setattr(imatrix, "MOST_PART", 0)
    command = ["imatrix", "-f", "text", "-o", "out.gguf", "-c", "10"]
    assert main(command) == 130
    assert capfd.readouterr().err == "llamacli: out.gguf: kept, of the first 2 of 4 windows\n"
    assert read_imatrix("out.gguf").chunk_count == 2
    ends_early.engine.calls.clear()
    assert main([*command, "--force", "--json"]) == 130
    record = json.loads(capfd.readouterr().out)
    assert (record["windows"], record["tokens"], record["interrupted"]) == (2, 20, True)


def test_an_imatrix_is_written_from_time_to_time(scored, monkeypatch):
    """And never over a file that is not its own."""
    clock, found = iter(range(0, 1000, 20)), []
    monkeypatch.setattr(imatrix, "time", SimpleNamespace(monotonic=lambda: next(clock)))

    def forward(ids, cache, **more):
        found.append(read_imatrix("out.gguf").chunk_count if Path("out.gguf").exists() else None)
        return FakeEngine.forward(scored.engine, ids, cache, **more)

    scored.engine.forward = forward
    Path("text").write_text("a" * 69)
    assert main(["imatrix", "-f", "text", "-o", "out.gguf", "-c", "10"]) == 0
    assert found[0] is None
    assert sorted(set(found[1:]) - {None}) == [2]  # once in 30 seconds, and no more than one part in 20 of the time
    assert read_imatrix("out.gguf").chunk_count == 7


def test_a_full_disk_while_an_imatrix_grows_is_a_warning_and_at_the_end_an_error(scored, capfd, monkeypatch):
    monkeypatch.setattr(imatrix, "EVERY", 0)
    monkeypatch.setattr(imatrix, "MOST_PART", 0)
    real, asked = os.fsync, []

    def full(file):
        asked.append(file)
        if len(asked) != 3:  # the third writing alone works
            raise OSError(28, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", full)
    assert main(["imatrix", "-f", "text", "-o", "out.gguf", "-c", "10"]) == 1
    printed = capfd.readouterr().err
    assert "going on, to be tried again" in printed
    assert read_imatrix("out.gguf").chunk_count == 3
    assert "out.gguf: kept, of the first 3 of 4 windows" in printed
    assert "the file of that name is as it was" in printed


@pytest.mark.parametrize("command", [["perplexity", "-v"], ["imatrix", "-o", "out.gguf", "-v"]], ids=lambda c: c[0])
def test_ctrl_c_ends_a_long_measurement_quietly(command, tmp_path):
    (tmp_path / "text").write_text("a" * 4000)
    env = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    process = start(*command, "-f", "text", "-c", "100", delay="0.005", stderr=subprocess.PIPE, cwd=tmp_path, env=env)
    process.stderr.readline()  # progress: the measurement has begun
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGINT
    assert not out or b"interrupted" in out  # a window may be complete
    assert b"Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
