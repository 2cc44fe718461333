"""The commands as a user meets them: what goes to which stream, exit codes, pipes, signals, a real pseudo-terminal.

All run over the miniature model of fakes.py, whose answers and pace are known; test_end_to_end.py starts the real thing.
"""

import io
import json
import os
import re
import readline
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import checkpoint
import pexpect
import pytest
from fakes import FakeModel, Scripted, write_gguf
from recipe_cases import CASES
from recipe_cases import shapes as case_shapes

import llamacli
from llamacli import environment, kvcache
from llamacli.cli import bench, chat, imatrix, main, options, perplexity, quantize, run, tokenize
from llamacli.cli.console import one_line
from llamacli.kvcache import KVCache
from quantize import shapes
from quantize.imatrix import read_imatrix
from quantize.recipe import RECIPES
from quantize.shapes import Shape

TESTS = Path(__file__).parent
REPLY = "first line\nsecond line"


def fake(*args, reply=REPLY, delay="0"):
    """The command line of a process over the miniature model."""
    return [sys.executable, str(TESTS / "fakes.py"), reply, delay, *args]


def start(*args, **how):
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    fakes = {name: how.pop(name) for name in ("reply", "delay") if name in how}
    return subprocess.Popen(fake(*args, **fakes), **{**pipes, **how})


@pytest.fixture
def model(monkeypatch):
    """Commands in this process answer from a miniature model that a test may look into; stdin is empty."""
    made = FakeModel(Scripted(REPLY, chunk=64))
    monkeypatch.setattr(options, "find_model", lambda name, console: name)
    monkeypatch.setattr(options, "load_model", lambda path, threads, ctx, console, **more: made)
    monkeypatch.setattr(run, "stdin_is_piped", lambda: False)
    return made


def prompt_of(model):
    """The prompt that the engine saw, as text."""
    return bytes(t for t in model.engine.calls[0][1] if t < 256).decode()


# the package


def test_all_is_sorted_and_complete():
    assert llamacli.__all__ == sorted(llamacli.__all__)
    public = {name for name in vars(llamacli) if not name.startswith("_") and isinstance(getattr(llamacli, name), type)}
    assert public <= set(llamacli.__all__)


def test_help_imports_neither_numba_nor_numpy():
    code = "import sys; from llamacli.cli import main; main(['--help']); print({'numba', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("set()")


def test_model_streams_messages_and_takes_the_files_sampling_values():
    model = FakeModel(Scripted("hello"))
    assert "".join(piece.text for piece in model.stream([{"role": "user", "content": "hi"}], max_tokens=4)) == "hell"
    assert llamacli.sampling_defaults({}) == {"temp": 0.6, "top_p": 0.9}
    odd = {"general.sampling.temp": 0.25, "general.sampling.top_p": 7.0, "general.sampling.top_k": 20}
    assert llamacli.sampling_defaults(odd) == {"temp": 0.25, "top_p": 0.9, "top_k": 20}


def test_model_logits_come_from_a_fresh_context():
    model = FakeModel(Scripted("hello"))
    assert model.logits([1, 2, 3]).shape == (3, model.tokenizer.n_vocab)
    model.logits([4])
    assert model.engine.calls[1] == (0, [4])


# run


def test_run_prints_the_answer_and_one_newline_and_nothing_else(model, capfd):
    assert main(["run", "hi"]) == 0
    assert capfd.readouterr() == (REPLY + "\n", "")


def test_run_adds_no_second_newline(model, capfd):
    model.engine.reply = [*b"text\n", 257]
    main(["run", "hi"])
    assert capfd.readouterr().out == "text\n"


def test_run_verbose_tells_speed_on_stderr(model, capfd):
    assert main(["run", "-v", "-n", "3", "hi"]) == 0
    out, err = capfd.readouterr()
    assert out == REPLY[:3] + "\n"
    assert "3 answered at" in err
    assert "-n limit" in err


def test_run_joins_words_and_sends_the_system_prompt_first(model):
    main(["run", "-s", "be kind", "two", "words"])
    assert prompt_of(model) == "s\nbe kindu\ntwo words"


def test_run_passes_sampling_options_and_leaves_the_others_to_the_model(model):
    main(["run", "--temp", "0.5", "--top-k", "7", "--seed", "3", "hi"])
    assert model.settings == {"temp": 0.5, "top_k": 7, "top_p": None, "min_p": None, "repeat_penalty": None, "seed": 3}


def test_run_json_is_one_object(model, capfd):
    main(["run", "--json", "-n", "5", "hi"])
    out, err = capfd.readouterr()
    record = json.loads(out)
    assert err == ""
    assert record["text"] == "first"
    assert record["finish_reason"] == "length"
    assert record["usage"] == {"prompt_tokens": 7, "completion_tokens": 5}
    assert {"load_s", "prefill_tps", "decode_tps"} <= set(record["timings"])


def test_run_stops_before_a_stop_string(model, capfd):
    assert main(["run", "--stop", "\nsec", "hi"]) == 0
    assert capfd.readouterr().out == "first line\n"


def test_run_raw_sends_the_text_alone(model):
    main(["run", "--raw", "once upon"])
    assert model.engine.calls[0][1] == [256, *b"once upon"]


def test_run_reads_files_in_order_and_keeps_their_bytes(model, tmp_path):
    (tmp_path / "a").write_bytes(b"one\r\n")
    (tmp_path / "b").write_bytes("zwei ü".encode())
    main(["run", "-f", str(tmp_path / "a"), "-f", str(tmp_path / "b"), "sum"])
    assert prompt_of(model) == "u\none\r\n\nzwei ü\n\nsum"


def test_run_at_a_full_context_says_so(model, capfd):
    model.ctx = 10
    assert main(["run", "--json", "hi"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["finish_reason"] == "context"
    assert "context of 10 tokens is full" in err


@pytest.mark.parametrize(
    "args, code, words",
    [
        ([], 2, "no prompt"),
        (["-c", "0", "hi"], 2, "-c"),
        (["-n", "-5", "hi"], 2, "-n"),
        (["-t", "0", "hi"], 2, "-t"),
        (["--temp", "-1", "hi"], 2, "--temp"),
        (["--temp", "nan", "hi"], 2, "--temp"),
        (["--top-p", "2", "hi"], 2, "--top-p"),
        (["--stop", "", "hi"], 2, "--stop"),
        (["--image", "cat.png", "hi"], 2, "images"),
        (["--raw", "-s", "x", "hi"], 2, "--raw"),
        (["--nonsense"], 2, "--nonsense"),
        (["-f", "/nonexistent", "hi"], 1, "/nonexistent"),
        (["broken \udcff"], 1, "UTF-8"),
        (["-s", "broken \udcff", "hi"], 1, "--system"),
        (["x" * 5000], 1, "5005 tokens, the context holds 4096: shorten it or use -c 6144"),
    ],
)
def test_what_cannot_be_obeyed_is_one_line_on_stderr(model, capfd, args, code, words):
    assert main(["run", *args]) == code
    out, err = capfd.readouterr()
    assert out.strip() == ""
    assert err.startswith("llamacli: error: ")
    assert err.count("\n") == 1
    assert words in err


@pytest.mark.parametrize("name", ["a" * 300, "~nobody-of-this-name/x.gguf"], ids=["long", "no home"])
@pytest.mark.parametrize("command", [["inspect"], ["run", "--no-stdin", "hi", "-m"]], ids=["inspect", "run"])
def test_an_impossible_path_is_no_bug(capfd, command, name):
    assert main([*command, name]) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and "expected" in err and "bug" not in err


@pytest.mark.parametrize("error, words", [(ZeroDivisionError("oops"), "LLAMACLI_DEBUG=1"), (MemoryError(), "out of memory")])
def test_an_unexpected_error_is_one_line_too(model, capfd, monkeypatch, error, words):
    def fail(*args):
        raise error

    monkeypatch.setattr(model.engine, "logits", fail)
    assert main(["run", "hi"]) == 1
    err = capfd.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    monkeypatch.setenv("LLAMACLI_DEBUG", "1")
    main(["run", "hi"])
    assert "Traceback" in capfd.readouterr().err


def test_text_from_a_file_cannot_steer_the_terminal():
    assert one_line("a\nb\x1b[31mc") == "a b\\x1b[31mc"


def test_no_arguments_show_help_and_version_its_number(capfd):
    assert main([]) == 0
    assert "Usage: llamacli" in capfd.readouterr().out
    assert main(["--version"]) == 0
    assert capfd.readouterr().out == f"llamacli {llamacli.__version__}\n"


# which model


def test_the_model_is_the_option_else_the_variable_else_the_small_one(monkeypatch, tmp_path, capfd):
    quiet, loud = options.Output().console(), options.Output(verbose=True).console()
    monkeypatch.setattr(environment, "SMALL_MODEL", tmp_path / "small.gguf")
    (tmp_path / "small.gguf").touch()
    monkeypatch.delenv("LLAMACLI_MODEL", raising=False)
    assert options.find_model(None, loud) == tmp_path / "small.gguf"
    assert "small.gguf" in capfd.readouterr().err
    options.find_model(None, quiet)
    assert capfd.readouterr().err == ""
    monkeypatch.setenv("LLAMACLI_MODEL", str(tmp_path / "mine.gguf"))
    assert options.find_model(None, quiet) == tmp_path / "mine.gguf"
    assert options.find_model("/else/where.gguf", quiet) == Path("/else/where.gguf")


def test_a_model_is_found_by_name_and_a_wrong_name_is_an_error(monkeypatch, tmp_path, capfd):
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "tiny" / "tiny.gguf").touch()
    monkeypatch.setattr(environment, "PROJECT", tmp_path)
    assert tokenize.find_model is options.find_model
    assert options.find_model("tiny", options.Output().console()) == tmp_path / "models" / "tiny" / "tiny.gguf"
    assert main(["tokenize", "-m", "huge", "text"]) == 1
    assert "huge: expected a GGUF file or the name" in capfd.readouterr().err


# inspect, tokenize, bench


def test_inspect_shows_what_cannot_be_run_and_says_so(tmp_path, capfd):
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


def test_kv_memory_is_what_the_cache_takes():
    config = SimpleNamespace(n_layers=8, n_kv_heads=2, head_dim=16, chunk_size=512, uses_rope=lambda i: i % 4 != 3)
    for ctx in (256, 300, 512, 2000):
        cache = KVCache(config, ctx)
        cache.reserve(ctx)
        assert kvcache.nbytes(config, ctx) == cache.nbytes
    assert kvcache.nbytes(config, 1024) == kvcache.nbytes(config, 1024, chunked=False) * (6 * 512 + 2 * 1024) // (8 * 1024)


@pytest.fixture
def measured(model, monkeypatch):
    """`bench` measures the miniature model; the machine's limits are given."""
    monkeypatch.setattr("llamacli.measure.limits", lambda threads: (12.5, 100.0))
    monkeypatch.setattr(bench, "find_model", lambda name, console: name)
    monkeypatch.setattr(bench, "load_model", lambda path, threads, ctx, console: model)
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
    monkeypatch.setattr(bench, "memory_free", lambda: 10**6)
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
    monkeypatch.setattr(bench, "_peers", lambda model, measure, longest: [SlowPeer()])
    monkeypatch.setattr("llamacli.peer.check", lambda: None)
    old = tmp_path / "old.json"
    old.write_text(json.dumps([{"test": "tg4@d8", "tokens_per_second": 1e-3}]))
    assert main(["bench", "-p", "8", "-n", "4", "-d", "0,8", "-r", "1", "--profile", "--compare", "--against", str(old)]) == 0
    out = capfd.readouterr().out
    assert SlowPeer.closed
    head, *rows = [line for line in out.splitlines() if line.startswith("  ")]
    assert "llama.cpp" in head
    assert head.split()[-3:] == ["ratio", "to", "earlier"]
    assert [row.split()[0] for row in rows[:4]] == ["pp8", "tg4", "pp8@d8", "tg4@d8"]
    assert "layer 1" in out
    assert "attention" in out
    assert "60.0 %" in out  # 3 of 5 seconds


class SlowPeer:
    name, closed = "llama.cpp", False

    def seconds(self, test):
        return 100.0

    def close(self):
        SlowPeer.closed = True


def test_bench_compare_says_how_to_get_llama_cpp(measured, capfd, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench", "-p", "8", "-n", "0", "--compare"]) == 2
    assert "pip install llama-cpp-python" in capfd.readouterr().err


def test_bench_of_a_shape_says_what_the_whole_model_would_do_and_leaves_no_file(capfd, monkeypatch, tmp_path):
    small = Shape("scout", 8, 256, 2, 1, 128, 512, 256, 4, 1, 300, True)
    monkeypatch.setitem(shapes.SHAPES, "scout", small)
    monkeypatch.setattr("llamacli.kernels.CACHE", tmp_path / "kernels")
    monkeypatch.setattr("llamacli.measure.limits", lambda threads: (12.5, 100.0))
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
        monkeypatch.setattr(command, "find_model", lambda name, console: name)
        monkeypatch.setattr(command, "load_model", lambda path, threads, ctx, console: model)
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
def test_a_text_that_cannot_be_used_is_one_line(scored, command, capfd, tmp_path):
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


@pytest.mark.parametrize("command", [["perplexity", "-v"], ["imatrix", "-o", "out.gguf", "-v"]], ids=lambda c: c[0])
def test_ctrl_c_ends_a_long_measurement_quietly(command, tmp_path):
    (tmp_path / "text").write_text("a" * 4000)
    env = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    process = start(*command, "-f", "text", "-c", "100", delay="0.005", stderr=subprocess.PIPE, cwd=tmp_path, env=env)
    process.stderr.readline()  # progress: the measurement has begun
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, b"")
    assert b"Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


# processes: pipes and signals


def test_piped_text_comes_before_the_prompt(model, monkeypatch):
    monkeypatch.setattr(run, "stdin_is_piped", lambda: True)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("größe\n".encode())))
    main(["run", "sum", "up"])
    assert prompt_of(model) == "u\ngröße\n\nsum up"


def test_text_from_stdin_can_stand_among_the_files(model, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"middle")))
    (tmp_path / "a").write_text("first")
    main(["run", "-f", str(tmp_path / "a"), "-f", "-", "last"])
    assert prompt_of(model) == "u\nfirst\n\nmiddle\n\nlast"


def test_empty_stdin_without_a_prompt_is_a_usage_error_and_invalid_bytes_an_error():
    done = subprocess.run(fake("run"), input=b"", capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"")
    done = subprocess.run(fake("run"), input=b"caf\xe9", capture_output=True)
    assert done.returncode == 1
    assert done.stderr == b"llamacli: error: stdin: expected UTF-8, found byte 0xe9 at offset 3; convert it with iconv\n"


def test_no_stdin_leaves_stdin_to_the_loop_around():
    reader, writer = os.pipe()  # open, never written: reading it would hang
    with start("run", "--no-stdin", "hi", stdin=reader) as process:
        out, _ = process.communicate(timeout=20)
    os.close(reader)
    os.close(writer)
    assert out.decode() == REPLY + "\n"


def test_a_closed_pipe_ends_quietly():
    with start("run", "hi", reply="line\n" * 500, delay="0.001") as process:
        assert process.stdout.readline() == b"line\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize("args", [["run", "hi"], ["--help"], ["run", "--json", "hi"]])
def test_a_pipe_closed_from_the_start_ends_quietly(args):
    reader, writer = os.pipe()
    os.close(reader)
    with start(*args, stdout=writer) as process:
        os.close(writer)
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line():
    with open("/dev/full", "wb") as full, start("run", "hi", stdout=full) as process:
        err = process.stderr.read().decode()
    assert process.returncode == 1
    assert err.count("\n") == 1
    assert "No space left" in err


def test_pieces_arrive_as_they_are_made():
    with start("run", "hi", delay="0.05") as process:
        assert os.read(process.stdout.fileno(), 100) == b"f"
        process.kill()


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_line_and_keeps_what_was_said(number, code):
    with start("run", "hi", delay="0.05") as process:
        said = process.stdout.read(5)
        process.send_signal(number)
        said += process.stdout.read()
        assert process.stderr.read() == b""
    assert process.returncode == code
    assert said.startswith(b"first")
    assert said.endswith(b"\n")
    assert len(said) < len(REPLY)


def test_ctrl_c_before_the_first_token_leaves_no_output():
    with start("run", "a long prompt " * 50, delay="0.05") as process:
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        assert (process.stdout.read(), process.stderr.read()) == (b"", b"")
    assert process.returncode == 130


# quantize


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint whose rows fit every type."""
    path = tmp_path_factory.mktemp("checkpoints") / "small-llama"
    checkpoint.write(path, hidden_size=256, intermediate_size=256, intermediate_size_mlp=256, num_attention_heads=8)
    (path / "README.md").write_text("---\nlicense: mit\n---\n")  # without a licence there would be a warning
    return path


def test_quantize_help_lists_every_type_with_its_bits(capfd):
    assert main(["quantize", "--help"]) == 0
    text = capfd.readouterr().out
    for recipe in RECIPES.values():
        assert re.search(rf"^  {recipe.name} +{recipe.bits:.2f}  {re.escape(recipe.purpose)}$", text, re.M), recipe.name
    assert max(map(len, text.splitlines())) <= 80


def test_quantize_dry_run_prints_the_plan_and_what_it_needs_and_writes_nothing(folder, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["quantize", str(folder), "--dry-run"]) == 0
    out, err = capfd.readouterr()
    assert (err, list(tmp_path.iterdir())) == ("", [])
    assert "as Q4_EXPERTS" in out
    assert re.search(r"blk\.2\.ffn_up_exps\.weight +Q4_K +3 x 256 x 256 +110\.59 kB +4\.50\n", out)
    assert re.search(r"\n  Q6_K +\d+ +\S+ M +\S+ MB +6\.56\n", out)
    assert re.search(r"all +\d+ +\S+ M +\S+ MB", out)
    for need in ("to write", "memory to make it", "memory to run it", "llamacli inspect"):
        assert need in out


def test_quantize_dry_run_as_json_is_one_object_with_the_same(folder, capfd):
    assert main(["quantize", str(folder), "--type", "q4_k", "--tensor-type", "attn_q=F16", "--dry-run", "--json"]) == 0
    out, err = capfd.readouterr()
    report = json.loads(out)
    assert (out.count("\n"), err) == (1, "")
    assert (report["type"], report["written"]) == ("Q4_K_M", False)
    assert Path(report["out"]).name == "small-llama-Q4_K_M.gguf"
    tensors = {t["name"]: t for t in report["tensors"]}
    assert tensors["blk.0.attn_q.weight"]["type"] == "F16"
    assert tensors["blk.0.ffn_down_exps.weight"] == {
        "name": "blk.0.ffn_down_exps.weight",
        "type": "Q4_K",
        "shape": [3, 256, 256],
        "weights": 3 << 16,
        "nbytes": 3 * 256 * 144,
        "rmse": None,
        "energy": None,
    }
    for parts in (report["by_type"], report["groups"]):
        assert sum(part["nbytes"] for part in parts) == sum(t["nbytes"] for t in tensors.values())
        assert sum(part["weights"] for part in parts) == report["n_weights"]
    assert report["weights_nbytes"] == sum(t["nbytes"] for t in tensors.values())
    assert report["memory"] > 0


@pytest.mark.parametrize(
    "args, words",
    [
        (["--type", "Q9_Z"], "found 'Q9_Z'"),
        (["--tensor-type", "attn_q"], "expected REGEX=TYPE"),
        (["--tensor-type", "=Q8_0"], "expected REGEX=TYPE"),
        (["--tensor-type", "attn_q="], "expected REGEX=TYPE"),
        (["--tensor-type", "(=Q8_0"], "found '('"),
        (["--tensor-type", "attn_q=Q9_Z"], "found 'Q9_Z'"),
        (["--split-max-size", "much"], "found 'much'"),
        (["--split-max-size", ""], "found ''"),
    ],
)
def test_quantize_options_that_make_no_sense_are_usage_errors_that_name_them(folder, tmp_path, capfd, args, words):
    assert main(["quantize", str(folder), str(tmp_path / "out.gguf"), *args]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert args[0] in err
    assert words in err
    assert list(tmp_path.iterdir()) == []


def test_quantize_takes_an_equals_sign_within_the_expression(folder, capfd):
    assert main(["quantize", str(folder), "--tensor-type", "(?=attn_v)=F16", "--dry-run"]) == 0
    assert re.search(r"attn_v\.weight +F16", capfd.readouterr().out)


def test_quantize_notes_an_expression_that_matches_nothing(folder, capfd):
    assert main(["quantize", str(folder), "--tensor-type", "attn_x=F16", "--dry-run", "-v"]) == 0
    assert "nothing to be quantized matches 'attn_x'" in capfd.readouterr().err


SIZES = {"48G": 48 * 10**9, "500M": 5 * 10**8, "2GiB": 2 << 30, "1.5 kb": 1500, "7": 7, "3TB": 3 * 10**12, " 1Mi ": 1 << 20}


@pytest.mark.parametrize("text", SIZES)
def test_sizes_as_people_write_them(text):
    assert options.byte_count(text, "--split-max-size") == SIZES[text]


@pytest.mark.parametrize("text", ["", "G", "0", "-1G", "1X", "1GB2", "1e9", "0.1", "inf", "٣G", "9" * 99 + "T"])
def test_sizes_that_are_none(text):
    with pytest.raises(llamacli.errors.UsageError, match="--split-max-size: expected a size like 48G"):
        options.byte_count(text, "--split-max-size")


def test_quantize_tells_in_a_pipe_no_more_than_warnings_and_the_table(folder, tmp_path, capfd):
    command = ["quantize", str(folder), str(tmp_path / "out.gguf"), "--force"]
    assert main([*command, "--type", "Q8_0"]) == 0
    out, err = capfd.readouterr()
    assert (out, "\x1b" in err, "%," in err) == ("", False, False)
    first, *table, last = err.splitlines()
    assert first.split() == ["tensors", "type", "size", "bits", "error"]
    assert last.startswith("wrote ")
    assert [line[2:].split("  ")[0] for line in table] == [*(g for g in quantize.GROUPS if g != "dense FFN"), "all"]
    assert main([*command, "--type", "Q8_0", "--tensor-type", "attn_x=F16"]) == 0
    assert capfd.readouterr().err.startswith("llamacli: --tensor-type: nothing to be quantized matches 'attn_x'\n  tensors ")


def test_quantize_as_json_in_a_pipe_tells_warnings_alone_beside_it(folder, tmp_path, capfd):
    command = ["quantize", str(folder), str(tmp_path / "out.gguf"), "--type", "Q8_0", "--tensor-type", "attn_x=F16", "--json"]
    assert main(command) == 0
    out, err = capfd.readouterr()
    report = json.loads(out, parse_constant=lambda name: pytest.fail(name))
    assert err == f"llamacli: {report['notices'][0]}\n"
    energies = [t["energy"] for t in report["tensors"]]
    assert all(energy > 0 for energy in energies)
    assert sum(group["weights"] for group in report["groups"]) == report["n_weights"]


def test_quantize_of_a_gguf_has_an_error_for_every_group_and_for_all(folder, tmp_path, capfd):
    assert main(["quantize", str(folder), str(tmp_path / "f16.gguf"), "--type", "F16"]) == 0
    capfd.readouterr()
    assert main(["quantize", str(tmp_path / "f16.gguf"), str(tmp_path / "q.gguf"), "--type", "Q4_0"]) == 0
    *groups, everything, _ = capfd.readouterr().err.splitlines()[1:]
    assert all(re.search(r"(\d %|exact)$", line) for line in groups)
    assert re.search(r"all .* \d+(\.\d+)? %$", everything)


def test_quantize_verbose_tells_plain_lines_and_a_table_by_groups(folder, tmp_path, capfd):
    assert main(["quantize", str(folder), str(tmp_path / "out.gguf"), "--type", "Q8_0", "-v"]) == 0
    out, err = capfd.readouterr()
    assert out == ""
    assert "\x1b" not in err
    assert "\r" not in err
    told = re.findall(r"^quantize: (\d+) %, \S+", err, re.M)
    assert 5 <= len(told) <= 10
    assert re.search(r"experts, gate +Q8_0 +\S+ kB +8\.50 +0\.\d+ %\n", err)
    assert re.search(r"norms, routers +F32 +\S+ kB +32\.00 +exact\n", err)
    assert re.search(r"wrote \S+out\.gguf: \S+ MB in 0:0\d", err)


def at_a_terminal(folder, out, columns, **env):
    """All that `quantize` says on a pseudo-terminal."""
    script = "import sys; from llamacli.cli import console, main; console.DRAW_EVERY = 0; sys.exit(main())"
    args = ["-c", script, "quantize", str(folder), str(out), "--type", "F32"]
    env = {**os.environ, "TERM": "xterm", "NO_COLOR": "", "PYTHONPATH": str(TESTS.parent), "PYTHONUTF8": "1", **env}
    child = pexpect.spawn(sys.executable, args, env=env, timeout=30, encoding="utf-8", dimensions=(24, columns))
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    return child.before


def table_lines(text):
    """All but remarks, which the terminal breaks."""
    return [line for line in text.split("\r\n") if "wrote" not in line and "licence" not in line]


@pytest.mark.parametrize("columns", [40, 80])
def test_quantize_draws_a_bar_at_a_terminal_and_takes_it_away(folder, tmp_path, columns):
    said = at_a_terminal(folder, tmp_path / "out.gguf", columns)
    drawn, after = said.rsplit("\r\x1b[K", 1)
    lines = [re.sub(r"\x1b\[[0-9;]*[mK]", "", line) for line in drawn.split("\r")]
    assert any(" %" in line for line in lines)
    assert all(len(line) < columns for line in lines)
    assert "\x1b[36m━" in drawn or columns == 40
    assert "experts, gate" in after
    assert all(len(re.sub(r"\x1b\[[0-9;]*m", "", line)) <= columns for line in table_lines(after))


def test_quantize_has_no_colour_where_none_is_wanted_and_no_bar_where_it_cannot_be_drawn(folder, tmp_path):
    said = at_a_terminal(folder, tmp_path / "plain.gguf", 80, NO_COLOR="1")
    assert "━" in said
    assert set(re.findall(r"\x1b\[.*?[A-Za-z]", said)) == {"\x1b[K"}
    said = at_a_terminal(folder, tmp_path / "dumb.gguf", 80, TERM="dumb")
    assert "\x1b" not in said
    assert re.search(r"quantize: \d+ %, blk", said)


def test_every_tensor_counts_in_one_group():
    groups = {quantize.group_of(name) for case in ("Scout", "Maverick") for name in case_shapes(CASES[case])}
    assert groups == set(quantize.GROUPS)
    for name, group in {
        "blk.3.ffn_gate_inp.weight": "norms, routers",
        "blk.3.attn_norm.weight": "norms, routers",
        "output_norm.weight": "norms, routers",
        "rope_freqs.weight": "norms, routers",
        "blk.3.attn_output.weight": "attention",
        "blk.3.ffn_gate_exps.weight": "experts, gate",
        "blk.3.ffn_gate_shexp.weight": "shared experts",
        "blk.3.ffn_gate.weight": "dense FFN",
        "output.weight": "output",
    }.items():
        assert quantize.group_of(name) == group


def test_the_error_of_a_group_is_that_of_all_its_weights_in_one():
    def tensor(name, kind, weights, nbytes, x, off):
        wrong, whole = (sum(v * v for v in values) for values in (off, x))
        rmse = (wrong / whole) ** 0.5 if whole else None
        return {"name": name, "type": kind, "weights": weights, "nbytes": nbytes, "rmse": rmse, "energy": whole}

    tensors = [
        tensor("a", "Q4_K", 300, 1, [3.0, 4.0], [0.1, 0.2]),
        tensor("a", "Q6_K", 100, 2, [300.0], [0.5]),  # few weights, and nearly all of the energy
        tensor("a", "Q6_K", 7, 0, [0.0], [0.0]),
        tensor("b", "Q6_K", 100, 2, [0.0], [0.0]),
        tensor("c", "Q6_K", 100, 2, [1.0], [0.5]) | {"rmse": None, "energy": None},
    ]
    a, b, c = quantize.summary(tensors, lambda t: t["name"])
    assert a["rmse"] == pytest.approx(((0.01 + 0.04 + 0.25) / (9 + 16 + 90000)) ** 0.5)
    assert (a["types"], a["count"], a["weights"], a["nbytes"]) == (["Q4_K", "Q6_K"], 3, 407, 3)
    assert b["rmse"] is None
    assert c["rmse"] is None


# chat


def talk(text, **how):
    done = subprocess.run(fake("chat", **how), input=text.encode(), capture_output=True, timeout=30)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_chat_takes_piped_lines_as_turns():
    assert talk("one\n\ntwo\n", reply="ok") == (0, "ok\nok\n", "")


def test_chat_commands_work_in_a_pipe_and_speak_on_stderr():
    code, out, err = talk("hi\n/regen\n/stats\n/system be kind\n/system\n/nonsense\n/exit\nnever\n", reply="ok")
    assert (code, out) == (0, "ok\nok\n")
    assert "context: " in err
    assert "be kind" in err
    assert "unknown command /nonsense; /help lists them" in err


def test_chat_reads_blocks_in_three_quotes_as_one_turn():
    text = '"""\nline one\nline two\n"""\n'
    code, out, _ = talk(text, reply="ok")
    assert (code, out) == (0, "ok\n")


def conversation(reply="ok"):
    model = FakeModel(Scripted(reply, chunk=64))
    return chat.Conversation(model, model.sampler(), None, None, [])


def test_a_conversation_remembers_undoes_and_answers_again():
    c = conversation()
    assert "".join(c.ask("one")) == "ok"
    assert "".join(c.ask("two")) == "ok"
    assert [m["content"] for m in c.messages] == ["one", "ok", "two", "ok"]
    assert "".join(c.regenerate()) == "ok"
    assert [m["content"] for m in c.messages] == ["one", "ok", "two", "ok"]
    c.undo()
    assert [m["content"] for m in c.messages] == ["one", "ok"]
    c.clear()
    with pytest.raises(llamacli.PromptError):
        list(c.regenerate())


def test_a_broken_off_answer_stays_as_the_turn():
    c = conversation("hello")
    answer = c.ask("one")
    assert next(answer) + next(answer) == "he"
    answer.close()
    assert c.messages[-1] == {"role": "assistant", "content": "he"}
    assert "".join(c.ask("two")) == "hello"


def test_a_turn_too_long_is_taken_back():
    c = conversation()
    list(c.ask("one"))
    with pytest.raises(llamacli.ContextFullError):
        list(c.ask("x" * 5000))
    assert [m["content"] for m in c.messages] == ["one", "ok"]


def test_chat_at_a_terminal(tmp_path):
    """Streaming, Ctrl-C during an answer and at the prompt, commands, Ctrl-D: on a real pseudo-terminal."""
    env = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "dumb", "PYTHONPATH": str(TESTS.parent)}
    command, *args = fake("chat", reply="a rather long answer", delay="0.02")
    child = pexpect.spawn(command, args, env=env, timeout=20, encoding="utf-8")
    child.expect("/help lists the commands")
    child.expect("> ")
    child.sendline("hello")
    child.expect("a rather")
    child.sendintr()
    child.expect("stopped by Ctrl-C")
    child.expect("> ")
    child.sendline("/regen")
    child.expect("a rather long answer\r\n")
    child.expect("> ")
    child.sendline('"""')
    child.expect(r"\.\.\. ")
    child.sendline('two lines"""')
    child.expect("a rather long answer\r\n")
    child.expect("> ")
    child.sendintr()
    child.expect("Ctrl-D or /exit leaves")
    child.expect("> ")
    child.sendline("/help")
    child.expect("/regen")
    child.expect("> ")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    history = tmp_path / "llamacli" / "history"
    assert history.stat().st_mode & 0o777 == 0o600
    assert "hello" in history.read_text()


@pytest.mark.skipif("GNU" not in getattr(readline, "__doc__", ""), reason="only GNU readline knows bracketed paste")
def test_pasted_lines_are_one_turn(tmp_path):
    env = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm"}
    command, *args = fake("chat", "--color", "never", reply="ok")
    child = pexpect.spawn(command, args, env=env, timeout=20, encoding="utf-8")
    child.expect("> ")
    child.send("\x1b[200~one\ntwo\x1b[201~\r")
    child.expect("ok")
    child.expect("> ")
    child.sendline("/stats")
    child.expect("12 prompt tokens")  # with the special ones around one\ntwo
    child.expect("> ")  # an end of input sent before the prompt is up is lost: the terminal is between its modes
    child.sendeof()
    child.expect(pexpect.EOF)


def test_chat_leaves_with_130_at_the_second_ctrl_c_in_a_row(tmp_path):
    env = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "dumb"}
    command, *args = fake("chat")
    child = pexpect.spawn(command, args, env=env, timeout=20, encoding="utf-8")
    child.expect("> ")
    child.sendintr()
    child.expect("Ctrl-C twice")
    child.expect("> ")
    child.sendintr()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 130


def test_colour_only_where_it_is_wanted(tmp_path):
    def colours(*args, **env):
        command, *rest = fake("run", *args, "hi")
        child = pexpect.spawn(
            command, rest, env={**os.environ, "TERM": "xterm", "NO_COLOR": "", **env}, timeout=20, encoding="utf-8"
        )
        child.expect(pexpect.EOF)
        return "\x1b[" in child.before

    assert colours()
    assert not colours(NO_COLOR="1")
    assert not colours(TERM="dumb")
    assert not colours("--color", "never")
    assert colours("--color", "always", NO_COLOR="1")
