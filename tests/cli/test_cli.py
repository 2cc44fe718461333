"""The commands from a user's view: output streams, exit codes, pipes, signals.

All use the miniature model of fakes.py, whose answers and speed are known; test_end_to_end.py uses a real model.
"""

import contextlib
import io
import json
import math
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fakes import REPLY, FakeModel, Scripted, fake, prompt_of, start
from wcwidth import wcswidth

import llamacli
from llamacli import environment
from llamacli.cli import main, options, run, tokenize
from llamacli.cli.console import Console, one_line

# the package


def test_all_is_sorted_and_complete():
    assert llamacli.__all__ == sorted(llamacli.__all__)
    public = {name for name in vars(llamacli) if not name.startswith("_") and isinstance(getattr(llamacli, name), type)}
    assert public <= set(llamacli.__all__)


def test_help_imports_neither_numba_nor_numpy():
    code = "import sys; from llamacli.cli import main; main(['--help']); print({'numba', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("set()")


FEW_THREADS = """
import os, sys, threading
from llamacli.cli import main
left, name = [int(sys.argv[1])], "_start_joinable_thread" if sys.version_info >= (3, 13) else "_start_new_thread"
start = getattr(threading, name)

def start_new_thread(*arguments, **more):
    if not left[0]:
        raise RuntimeError("can't start new thread")
    left[0] -= 1
    return start(*arguments, **more)

setattr(threading, name, start_new_thread)
os._exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    "command", [["run", "-t", "2", "-n", "1", "Hi"], ["quantize", "-t", "2", str(environment.SMALL_MODEL), "OUT", "Q8_0"]]
)
@pytest.mark.parametrize("threads", [0, 1])
def test_no_more_threads_is_a_one_line_error(command, threads, tmp_path):
    """As in a container with --pids-limit."""
    words = [sys.executable, "-c", FEW_THREADS, str(threads), *command]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "found that the system gives no more; use fewer (-t)" in done.stderr.splitlines()[-1]
    assert "a bug" not in done.stderr


def test_prefetching_is_left_out_where_there_is_no_thread_for_it(tmp_path):
    words = [sys.executable, "-c", FEW_THREADS, "3", "run", "-t", "2", "-n", "1", "--temp", "0", "Hi"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "Hello\n"), done.stderr


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libllvmlite.so: failed to map segment from shared object"),
        ModuleNotFoundError("No module named 'tokenizers'", name="tokenizers"),
        OSError("Could not find/load shared object file 'libllvmlite.so' from resource location"),
    ],
)
def test_a_package_that_cannot_be_loaded_is_not_reported_as_a_bug(error, capfd, monkeypatch):
    def fails(*_):
        raise error

    monkeypatch.setattr("llamacli.cli._run", fails)
    assert main(["run"]) == 1
    assert capfd.readouterr().err.startswith(f"llamacli: error: expected llamacli's packages to load, found: {error}")
    error.name = "llamacli.nothing"
    assert main(["run"]) == 1
    assert ("a bug" in capfd.readouterr().err) == isinstance(error, ImportError)


def test_model_streams_messages_and_takes_the_files_sampling_values():
    model = FakeModel(Scripted("hello"))
    assert "".join(piece.text for piece in model.stream([{"role": "user", "content": "hi"}], max_tokens=4)) == "hell"
    assert llamacli.sampling_defaults({}) == {"temp": 0.6, "top_p": 0.9}
    odd = {"general.sampling.temp": 0.25, "general.sampling.top_p": 7.0, "general.sampling.top_k": 20}
    assert llamacli.sampling_defaults(odd) == {"temp": 0.25, "top_p": 0.9, "top_k": 20}
    more = {"penalty_repeat": 1.1, "penalty_last_n": 32, "min_p": 0.05, "top_k": 2.5, "temp": True, "xtc_threshold": "x"}
    assert llamacli.sampling_defaults({f"general.sampling.{name}": value for name, value in more.items()}) == {
        **{"temp": 0.6, "top_p": 0.9, "min_p": 0.05, "repeat_penalty": 1.1, "repeat_last_n": 32}
    }


def test_a_models_sampler_has_its_end_tokens_and_breakers():
    import small_vocab

    from llamacli.text.tokenizer import Tokenizer

    made = FakeModel(Scripted("x"))
    made.tokenizer = tokenizer = Tokenizer.from_gguf(small_vocab.in_memory())
    made.defaults = llamacli.sampling_defaults({})
    logits = np.zeros(tokenizer.n_vocab, np.float32)
    eot, line = tokenizer.eos, tokenizer.encode("\n", bos=False)[0]
    logits[[eot, 5]] = 9.0, 8.0

    def sampler(**settings):
        return llamacli.Model.sampler(made, temp=0, **settings)

    assert sampler().pick(logits) == eot
    assert sampler(ignore_eos=True).pick(logits) == 5
    history = [1, line, 2, 5, 1, line, 2]
    assert sampler(ignore_eos=True, dry_multiplier=4.0).pick(logits, history) == 5
    assert sampler(ignore_eos=True, dry_multiplier=9.0, dry_sequence_breakers=[]).pick(logits, history) != 5


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
    assert {name: value for name, value in model.settings.items() if value} == {"temp": 0.5, "top_k": 7, "seed": 3}


def test_run_passes_biases_the_order_of_steps_and_breakers(model):
    words = ["--logit-bias", "15+1.5", "-l", "16=-inf", "-l", "17-2", "--samplers", "top-k;temp,typical", "--mirostat", "2"]
    assert main(["run", *words, "--dry-sequence-breaker", "x", "--dry-sequence-breaker", "y", "hi"]) == 0
    assert model.settings["logit_bias"] == {15: 1.5, 16: float("-inf"), 17: -2.0}
    assert model.settings["samplers"] == ["top_k", "temperature", "typ_p"]
    assert list(model.settings["dry_sequence_breakers"]) == ["x", "y"]
    assert main(["run", "--dry-sequence-breaker", "none", "hi"]) == 0
    assert model.settings["dry_sequence_breakers"] == []


def test_json_has_log_probabilities_when_asked(model, capfd):
    assert main(["run", "--json", "--logprobs", "2", "-n", "3", "hi"]) == 0
    record = json.loads(capfd.readouterr().out)
    tokens = record["logprobs"]["content"]
    assert [token["token"] for token in tokens] == ["f", "i", "r"]
    best = 1 - math.log(math.e + 260)  # one logit of 261 is 1, the others are 0
    for token in tokens:
        assert token["logprob"] == pytest.approx(best, abs=1e-5)
        assert [each["logprob"] for each in token["top_logprobs"]] == pytest.approx([best, best - 1], abs=1e-5)
        assert token["top_logprobs"][0]["id"] == token["id"] == token["bytes"][0] == ord(token["token"])
    assert main(["run", "--json", "hi"]) == 0
    assert "logprobs" not in json.loads(capfd.readouterr().out)


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
        (["--image", "cat.png", "hi"], 1, "cat.png: expected a picture"),
        (["--raw", "-s", "x", "hi"], 2, "--raw"),
        (["--nonsense"], 2, "--nonsense"),
        (["-f", "/nonexistent", "hi"], 1, "/nonexistent"),
        (["broken \udcff"], 1, "UTF-8"),
        (["-s", "broken \udcff", "hi"], 1, "--system"),
        (["x" * 4095], 1, "4100 tokens, the context holds 4096: shorten it or use -c 5120"),
    ],
)
def test_wrong_arguments_are_one_line_on_stderr(model, capfd, args, code, words):
    assert main(["run", *args]) == code
    out, err = capfd.readouterr()
    assert out.strip() == ""
    assert err.startswith("llamacli: error: ")
    assert err.count("\n") == 1
    assert words in err


@pytest.mark.parametrize("name", ["a" * 300, "~nobody-of-this-name/x.gguf"], ids=["long", "no home"])
@pytest.mark.parametrize("command", [["inspect"], ["run", "--no-stdin", "hi", "-m"]], ids=["inspect", "run"])
def test_an_impossible_path_is_not_reported_as_a_bug(capfd, command, name):
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


def test_a_plain_table_is_aligned_by_the_columns_of_a_terminal(capfd):
    Console().table("", [("模型", "1"), ("model", "22")], ("name", "size"))
    assert [wcswidth(line) for line in capfd.readouterr().out.splitlines()] == [13, 13, 13]


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
    ours, own = tmp_path / "models", tmp_path / "data" / "llamacli" / "models"
    files = [ours / "tiny" / "tiny.gguf", own / "mine.gguf"]
    for file in files:
        file.parent.mkdir(parents=True)
        file.touch()
    monkeypatch.setattr(environment, "MODELS", ours)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert tokenize.find_model is options.find_model
    assert [options.find_model(name, options.Output().console()) for name in ("tiny", "mine")] == files
    assert main(["tokenize", "-m", "huge", "text"]) == 1
    assert "huge: expected a GGUF file or the name" in capfd.readouterr().err


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


@pytest.mark.parametrize("first", [b"", b"\xef\xbb\xbfHello, "], ids=["nothing yet", "a part"])
def test_a_pipe_that_does_not_wait_is_read_to_its_end(first, monkeypatch):
    """The rest is written while the command waits for it."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.write(writer, first)
    wait, waits = select.select, []

    def waited(*of):
        if not waits:
            os.write(writer, b"world")
            os.close(writer)
        waits.append(of)
        return wait(*of)

    monkeypatch.setattr(select, "select", waited)
    with os.fdopen(reader) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert options.read_stdin(options.Output().console()) == ("Hello, " if first else "") + "world"
    assert waits


def test_text_that_fills_any_context_is_refused_before_it_is_read_to_its_end():
    reader, writer = os.pipe()
    with start("run", "-c", "64", stdin=reader) as process:
        os.close(reader)
        wrote = 0
        with contextlib.suppress(BrokenPipeError):
            while wrote < 100 << 20:
                wrote += os.write(writer, b"y\n" * 8192)
        os.close(writer)
        assert b"stdin: expected at most 32768 bytes" in process.stderr.read()
    assert process.returncode == 1 and wrote < 1 << 20


@pytest.mark.parametrize("name", ["-f", "--system-file"])
@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="needs /dev/zero")
def test_a_file_without_end_is_refused_too(model, capfd, name):
    assert main(["run", name, "/dev/zero", "hi"]) == 1
    assert "/dev/zero: expected at most" in capfd.readouterr().err


def test_a_text_too_long_is_refused_before_it_becomes_tokens(model, capfd, monkeypatch):
    monkeypatch.setattr(model, "prompt_ids", None)
    assert main(["run", "y" * 5000]) == 1
    assert "5000 tokens or more, the context holds 4096" in capfd.readouterr().err


def test_a_stdin_that_cannot_be_read_counts_as_none():
    """As GNU nohup leaves it: /dev/null, open for writing only."""
    with open(os.devnull, "wb") as void:
        out, err = start("run", "hi", stdin=void).communicate(timeout=300)
    assert (out.decode(), err) == (REPLY + "\n", b"")


def test_no_stdin_leaves_stdin_to_the_loop_around():
    reader, writer = os.pipe()  # open, never written: reading it would hang
    with start("run", "--no-stdin", "hi", stdin=reader) as process:
        out, _ = process.communicate(timeout=300)
    os.close(reader)
    os.close(writer)
    assert out.decode() == REPLY + "\n"


def test_a_closed_pipe_ends_quietly():
    with start("run", "hi", reply="line\n" * 500, delay="0.01") as process:
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
        first = os.read(process.stdout.fileno(), 100).decode()
        process.kill()
    assert REPLY.startswith(first) and len(first) < len(REPLY)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_line_and_keeps_what_was_said(number):
    with start("run", "hi", reply=REPLY + "x" * 1000, delay="0.05") as process:
        said = process.stdout.read(5)
        process.send_signal(number)
        said += process.stdout.read()
        assert process.stderr.read() == b""
    assert process.returncode == -number
    assert said.startswith(b"first")
    assert said.endswith(b"\n")
    assert len(said) < 1000


def test_cluster_none_overrides_the_settings(monkeypatch, capfd, nobody):
    monkeypatch.setenv("LLAMACLI_CLUSTER", nobody)
    monkeypatch.setenv("LLAMACLI_CLUSTER_SECRET", "of this test")
    asked = ["run", "--no-stdin", "-t", "1", "-n", "2", "--temp", "0", "Hi"]
    assert main(asked) == 1
    assert f"{nobody}: expected a cluster, found" in capfd.readouterr().err
    assert main([*asked, "--cluster", "none"]) == 0
    alone = capfd.readouterr().out
    monkeypatch.setenv("LLAMACLI_CLUSTER", "none")
    assert main(asked) == 0
    assert alone and capfd.readouterr().out == alone
    assert main([*asked, "--cluster-layers", "2,2"]) == 2
    assert "expected --cluster with it, found none" in capfd.readouterr().err
    assert main(["cluster", "status"]) == 2
    assert "expected an address, found none" in capfd.readouterr().err
    monkeypatch.setenv("LLAMACLI_CLUSTER", nobody)
    assert main(["bench", "--profile"]) == 2
    assert "add --cluster none" in capfd.readouterr().err
    assert main(["cluster", "status"]) == 1
    assert f"{nobody}: expected a cluster, found" in capfd.readouterr().err
