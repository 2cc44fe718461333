"""End to end: the small model from the command line and from Python, in processes with their own streams and signals."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pexpect
import pytest
from fakes import write_gguf

import llamacli
from llamacli import environment
from llamacli.cli import main

ROOT = Path(__file__).resolve().parent.parent
SMALL = environment.SMALL_MODEL
LLAMACLI = f"{sys.executable} -c 'import sys; from llamacli.cli import main; sys.exit(main())'"
ASK = "What is the capital of France?"


def shell(script, **env):
    """A line of bash with `llamacli` in it, the small model chosen by default."""
    settings = {name: value for name, value in os.environ.items() if name != "LLAMACLI_MODEL"} | env
    script = f'llamacli() {{ {LLAMACLI} "$@"; }}; {script}'
    return subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=settings, stdin=subprocess.DEVNULL, capture_output=True, timeout=300
    )


@pytest.fixture(scope="module")
def answer():
    """The small model's greedy answer."""
    done = shell(f"llamacli run --temp 0 -n 48 '{ASK}'")
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout


def test_the_small_model_answers_with_one_final_newline(answer):
    assert len(answer) > 2
    assert answer.endswith(b"\n")
    assert not answer.endswith(b"\n\n")


def test_a_file_gets_the_same_bytes_and_stderr_can_go_nowhere(answer, tmp_path):
    done = shell(f"llamacli run -v --color always --temp 0 -n 48 '{ASK}' > {tmp_path}/file 2>/dev/null")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert (tmp_path / "file").read_bytes() == answer


def test_the_readme_can_be_summarized_into_a_pipe_that_closes_early():
    done = shell("cat README.md | llamacli run -n 24 Summarize | head -1; echo ${PIPESTATUS[*]} >&2", NO_COLOR="1")
    codes = done.stderr.decode().split()
    assert codes[0] == codes[2] == "0"
    assert codes[1] in ("0", "141")
    assert done.stdout.count(b"\n") == 1
    assert b"\x1b" not in done.stdout


SAID_AT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
def telling(real):
    def told(*args, **more):
        os.write(1, b".")
        return real(*args, **more)
    return told
"""
MOMENTS = {
    "before the first line": "os.write(1, b'.')",
    "while the model is opened": "from llamacli.files import gguf; gguf.open_gguf = telling(gguf.open_gguf)",
    "while the tokenizer is made": (
        "from llamacli.text.tokenizer import Tokenizer; Tokenizer.from_gguf = telling(Tokenizer.from_gguf)"
    ),
    "while the prompt is evaluated": "from llamacli.engine import Engine; Engine.forward = telling(Engine.forward)",
    "while it answers": "",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_at_any_moment_ends_the_process_and_no_traceback(moment):
    """The program prints a full stop, or the first letter of its answer, when it is to be interrupted."""
    command = [sys.executable, "-c", f"{SAID_AT}{MOMENTS[moment]}\nfrom llamacli.__main__ import start; start()"]
    args = ["run", "-m", str(SMALL), "--raw", "-n", "4000", "--ignore-eos", "one two three four five six " * 1000]
    with subprocess.Popen(command + args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        said = process.stdout.read(1)
        assert said and (said == b".") == bool(MOMENTS[moment])
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b""
        process.stdout.read()
    assert process.returncode == -signal.SIGINT


@pytest.mark.slow
def test_after_warmup_nothing_is_compiled(tmp_path):
    """Half a minute: the folder of compiled code is new."""

    def files():
        return sorted(path for path in tmp_path.rglob("*") if path.is_file())

    done = shell("llamacli warmup", LLAMACLI_CACHE=str(tmp_path))
    assert re.fullmatch(rb"compiled \d+ kernels in [\d.]+ s into \S+\n", done.stdout)
    compiled = files()
    done = shell(
        f"llamacli warmup && llamacli run -n 4 --seed 1 '{ASK}' && llamacli bench -p 20 -n 2 -r 1 --profile"
        f" && llamacli quantize models/scout-tiny/hf {tmp_path}.gguf --type q8_0",
        LLAMACLI_CACHE=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"all ")
    assert files() == compiled


def test_a_warm_start_needs_no_compiler(answer):
    """The import of Numba takes as long as the rest of the start."""
    code = "import sys; from llamacli.cli import main; main(sys.argv[1:]); sys.exit('numba' in sys.modules)"
    args = "run", "--no-stdin", "-n", "1", "Hello"
    assert subprocess.run([sys.executable, "-c", code, *args], capture_output=True).returncode == 0


def test_a_model_answers_from_python(answer):
    model = llamacli.Model.load(SMALL, threads=2, ctx=512)
    ids = model.tokenizer.encode("text and more text", bos=True, special=False)
    logits = model.logits(ids)
    assert logits.shape == (len(ids), model.config.n_vocab)
    assert logits.dtype == np.float32
    session = model.session()
    session.eval(ids[:2])
    assert np.allclose(session.eval(ids[2:]), logits[-1], atol=1e-3)
    assert np.allclose(session.sync(ids[:3]), logits[2], atol=1e-3)
    messages = [{"role": "user", "content": ASK}]
    assert "".join(piece.text for piece in model.stream(messages, max_tokens=48, temp=0)).encode() + b"\n" == answer
    first, again, other = ("".join(p.text for p in model.stream(messages, max_tokens=24, temp=2, seed=s)) for s in (7, 7, 8))
    assert first == again != other


def test_chat_with_the_small_model_at_a_terminal(answer, tmp_path):
    env = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "dumb"}
    command = [
        "-c",
        "import sys; from llamacli.cli import main; sys.exit(main())",
        "chat",
        "-m",
        str(SMALL),
        "--temp",
        "0",
        "-n",
        "48",
    ]
    child = pexpect.spawn(sys.executable, command, env=env, timeout=300, encoding="utf-8", dimensions=(40, 400))
    child.expect("> ")
    child.sendline(ASK)
    child.expect_exact(answer.decode().strip().splitlines()[0])
    child.expect("> ")
    child.sendline("/stats")
    child.expect(r"context +\d+ of \d+ tokens")
    child.sendline("/exit")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_tokenize_prints_ids_as_json(capfd):
    def ids(*args):
        assert main(["tokenize", "-m", str(SMALL), *args]) == 0
        return json.loads(capfd.readouterr().out)

    plain, special = ids("a<|eot|>b"), ids("--special", "a<|eot|>b")
    assert len(special) < len(plain)
    assert ids("--no-bos", "a<|eot|>b") == plain[1:]


def test_tokenize_shows_pieces_counts_and_goes_back(capfd, monkeypatch):
    def said(*args, code=0):
        assert main(["tokenize", "-m", str(SMALL), *args]) == code
        return capfd.readouterr()

    text = "Größe:\n 漢 <|eot|>"
    ids = json.loads(said(text).out)
    assert said("--count", text).out == f"{len(ids)}\n"
    lines = [line.strip().split("  ", 1) for line in said("--pieces", text).out.splitlines()]
    assert [int(id) for id, _ in lines] == ids
    found = json.loads(said("--pieces", "--json", text).out)
    assert [each["id"] for each in found] == ids
    assert [each["piece"] for each in found] == [json.loads(piece) for _, piece in lines]
    assert found[0]["piece"] == "<|begin_of_text|>"
    assert bytes(byte for each in found[1:] for byte in each["bytes"]).decode() == text
    assert "<0xC3>" in [each["piece"] for each in found]
    assert said("--decode", json.dumps(ids)).out == text + "\n"
    assert said("--decode", " ".join(map(str, ids)), "--special").out == f"<|begin_of_text|>{text}\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(json.dumps(ids).encode())))
    assert json.loads(said("--decode", "-", "--json").out) == text
    for wrong in (
        ["--decode", "1,x"],
        ["--decode", ""],
        ["--decode", "[]"],
        ["--pieces", "--count", "a"],
        ["--decode", "1", "a"],
    ):
        assert said(*wrong, code=2).err.count("\n") == 1
    assert "expected token ids from 0 to" in said("--decode", "999999999", code=1).err


def test_inspect_knows_what_the_small_model_needs(capfd):
    assert main(["inspect", "--json", str(SMALL)]) == 0
    record = json.loads(capfd.readouterr().out)
    assert record["runnable"] is True
    assert (record["experts"], record["experts_used"]) == (16, 1)
    assert record["parameters_active"] < record["parameters"]
    assert record["memory"]["weights_bytes"] <= record["file_bytes"]
    assert main(["inspect", str(SMALL)]) == 0
    assert "llama4" in capfd.readouterr().out


CARD = ["--type", "q4_0", "--tensor-type", "^(token_embd|output)=Q8_0"]  # the command in the model card


def test_quantize_makes_the_small_model_from_its_checkpoint_to_the_byte(tmp_path, capfd):
    folder, out = str(SMALL.parent / "hf"), str(tmp_path / "out.gguf")
    assert main(["quantize", folder, out, *CARD, "--dry-run"]) == 0
    assert "token_embd.weight" in capfd.readouterr().out
    assert not Path(out).exists()
    assert main(["quantize", folder, out, *CARD, "--json"]) == 0
    printed = capfd.readouterr()
    assert json.loads(printed.out)["written"] is True
    assert printed.err == ""
    assert Path(out).read_bytes() == SMALL.read_bytes()
    assert main(["quantize", folder, out, "--type", "q4_0"]) == 1
    assert "--force" in capfd.readouterr().err
    assert main(["quantize", folder, out, "--type", "Q9_X"]) == 2


@pytest.mark.parametrize(
    "spoil", ["empty", "cut in the header", "cut in the weights", "no gguf", "a folder", "absent", "mamba"]
)
def test_a_bad_file_is_one_line_and_exit_1(spoil, tmp_path, capfd):
    path, whole = tmp_path / "bad.gguf", SMALL.read_bytes()
    if spoil == "a folder":
        path.mkdir()
    elif spoil == "mamba":
        write_gguf(path, "mamba")
    elif spoil != "absent":
        path.write_bytes(
            {"empty": b"", "no gguf": b"hello " * 100}.get(spoil, whole[: 4000 if "header" in spoil else len(whole) - 5000])
        )
    for command in (["run", "--no-stdin", "-m", str(path), "hi"], ["bench", "-m", str(path)]):
        assert main(command) == 1
        out, err = capfd.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert str(path) in err


@pytest.mark.parametrize("wrong", [{"threads": 0}, {"threads": -1}, {"ctx": 0}, {"ctx": -1}])
def test_calls_from_python_refuse_counts_below_1(wrong):
    with pytest.raises(llamacli.UsageError, match="expected at least 1"):
        llamacli.Model.load(SMALL, **wrong)
