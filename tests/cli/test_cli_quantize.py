"""`quantize` from a user's view: plan, tables, JSON, a progress bar on a real pseudo-terminal."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import checkpoint
import pexpect
import pytest
from recipe_cases import CASES
from recipe_cases import shapes as case_shapes

import llamacli
from llamacli.cli import main, options, quantize
from quantize.recipe import RECIPES

TESTS = Path(__file__).parents[1]


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


@pytest.mark.parametrize("out", ["x/", "-", "."])
def test_quantize_writes_no_file_under_a_name_that_can_only_be_a_mistake(folder, tmp_path, capfd, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    assert main(["quantize", str(folder), out]) == 1
    assert "expected the name of a file to write" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_quantize_names_the_first_part_of_a_split_and_counts_the_others(folder, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["quantize", str(folder), "z.gguf", "--type", "Q8_0", "--split-max-size", "1M"]) == 0
    first, *others = sorted(path.name for path in tmp_path.iterdir())
    assert f"wrote {first} and {len(others)} further parts: " in capfd.readouterr().err


@pytest.mark.parametrize("over", ["model", "text", "link to the model"])
def test_imatrix_does_not_write_over_what_it_reads(tmp_path, capfd, over):
    files = {"model": tmp_path / "own.gguf", "text": tmp_path / "text.txt", "link to the model": tmp_path / "link.gguf"}
    for name in ("model", "text"):
        files[name].write_text("precious")
    files["link to the model"].symlink_to("own.gguf")
    command = ["imatrix", "-f", str(files["text"]), "-m", str(files["model"]), "-o", str(files[over]), "--force"]
    assert main(command) == 1
    assert "found the source itself" in capfd.readouterr().err
    assert {path.read_text() for path in files.values()} == {"precious"}


def test_a_source_that_is_a_link_to_itself_is_refused_in_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "circle").symlink_to("circle")
    assert main(["quantize", "circle"]) == 1
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "circle: expected a" in error and "a bug" not in error


def test_a_missing_source_is_reported_before_the_compiler_is_imported():
    code = (
        "import sys; from llamacli.cli import main; code = main(['quantize', 'missing.gguf', 'out.gguf']);"
        "print(code, 'numba' in sys.modules)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=TESTS.parent)
    assert child.stdout == "1 False\n"
    assert child.stderr.count("\n") == 1
    assert "missing.gguf: expected a GGUF file, found no file of that name" in child.stderr


def test_help_without_docstrings():
    for command in ([], ["quantize"]):
        arguments = [sys.executable, "-OO", "-m", "llamacli", *command, "--help"]
        child = subprocess.run(arguments, capture_output=True, text=True, cwd=TESTS.parent)
        assert child.returncode == 0, child.stderr


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
        (["--tensor-type", "nomatch=Q8_0"], "found 'nomatch', which matches none"),
        (["--split-max-size", "much"], "found 'much'"),
        (["--split-max-size", ""], "found ''"),
        (["--split-max-size", "4"], "with its unit, found '4'"),
    ],
)
def test_quantize_options_that_make_no_sense_are_usage_errors_that_name_them(folder, tmp_path, capfd, args, words):
    assert main(["quantize", str(folder), str(tmp_path / "out.gguf"), *args]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert args[0] in err
    assert words in err
    assert list(tmp_path.iterdir()) == []


def test_quantize_copies_some_layers_under_a_name_that_says_which(folder, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["quantize", str(folder), "whole.gguf", "--type", "Q8_0"]) == 0
    assert main(["quantize", "whole.gguf", "--layers", "01-2"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"whole.gguf", "whole-layers-1-2.gguf"}
    capfd.readouterr()
    for words in (["--layers", "2"], ["--layers", "2-1"], ["--layers", "1-9"], ["--layers", "1-2", "--type", "Q8_0"]):
        assert main(["quantize", "whole.gguf", "no.gguf", *words]) == 2
        err = capfd.readouterr().err
        assert err.count("\n") == 1 and "--layers" in err
    assert main(["quantize", "whole.gguf", "Q8_0", "--layers", "1-2"]) == 2  # a type in place of OUT
    assert "Q8_0 and --layers exclude each other" in capfd.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"whole.gguf", "whole-layers-1-2.gguf"}


def test_quantize_takes_an_equals_sign_within_the_expression(folder, capfd):
    assert main(["quantize", str(folder), "--tensor-type", "(?=attn_v)=F16", "--dry-run"]) == 0
    assert re.search(r"attn_v\.weight +F16", capfd.readouterr().out)


SIZES = {"48G": 48 * 10**9, "500M": 5 * 10**8, "2GiB": 2 << 30, "1.5 kb": 1500, "3TB": 3 * 10**12, " 1Mi ": 1 << 20}


@pytest.mark.parametrize("text", SIZES)
def test_sizes_as_people_write_them(text):
    assert options.byte_count(text, "--split-max-size") == SIZES[text]


@pytest.mark.parametrize("text", ["", "G", "0", "7", "4 ", "-1G", "1X", "1GB2", "1e9", "0.1", "inf", "٣G", "9" * 99 + "T"])
def test_sizes_that_are_none(text):
    with pytest.raises(llamacli.errors.UsageError, match="--split-max-size: expected a size like 48G"):
        options.byte_count(text, "--split-max-size")


TWICE = "--tensor-type", "attn_v=F16", "--tensor-type", "attn_v=F32"  # the second one never counts, which is a warning


def test_quantize_tells_in_a_pipe_no_more_than_warnings_and_the_table(folder, tmp_path, capfd):
    command = ["quantize", str(folder), str(tmp_path / "out.gguf"), "--force"]
    assert main([*command, "--type", "Q8_0"]) == 0
    out, err = capfd.readouterr()
    assert (out, "\x1b" in err, "%," in err) == ("", False, False)
    first, *table, last = err.splitlines()
    assert first.split() == ["tensors", "type", "size", "bits", "error"]
    assert last.startswith("wrote ")
    assert [line[2:].split("  ")[0] for line in table] == [
        *(g for g in quantize.GROUPS if g not in ("dense FFN", "vision tower")),
        "all",
    ]
    assert main([*command, "--type", "Q8_0", *TWICE]) == 0
    assert re.match("llamacli: --tensor-type: all that 'attn_v' matches .*\n  tensors ", capfd.readouterr().err)


def test_quantize_as_json_in_a_pipe_tells_warnings_alone_beside_it(folder, tmp_path, capfd):
    command = ["quantize", str(folder), str(tmp_path / "out.gguf"), "--type", "Q8_0", *TWICE, "--json"]
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
    assert re.search(r"wrote \S+out\.gguf: \S+ MB in \d+:\d\d", err)


def at_a_terminal(folder, out, columns, **env):
    """All output of `quantize` on a pseudo-terminal."""
    script = "import sys; from llamacli.cli import console, main; console.DRAW_EVERY = 0; sys.exit(main())"
    args = ["-c", script, "quantize", str(folder), str(out), "--type", "F32"]
    env = {**os.environ, "TERM": "xterm", "NO_COLOR": "", "PYTHONPATH": str(TESTS.parent), "PYTHONUTF8": "1", **env}
    child = pexpect.spawn(sys.executable, args, env=env, timeout=300, encoding="utf-8", dimensions=(24, columns))
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    return child.before


def table_lines(text):
    """The lines of tables, without remarks, which the terminal wraps."""
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
    assert groups == set(quantize.GROUPS) - {"vision tower"}
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
        "v.blk.3.attn_q.weight": "vision tower",
        "mm.model.fc.weight": "vision tower",
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


def test_the_cluster_of_the_settings_is_asked_where_something_is_encoded(folder, tmp_path, monkeypatch, capfd, nobody):
    monkeypatch.setenv("LLAMACLI_CLUSTER", nobody)
    monkeypatch.setenv("LLAMACLI_CLUSTER_SECRET", "of this test")
    monkeypatch.chdir(tmp_path)
    assert main(["quantize", str(folder), "out.gguf"]) == 1
    assert f"{nobody}: expected a cluster, found" in capfd.readouterr().err
    assert main(["quantize", str(folder), "out.gguf", "--dry-run"]) == 0
    assert main(["quantize", str(folder), "out.gguf", "--dry-run", "--cluster", nobody]) == 2
    monkeypatch.delenv("LLAMACLI_CLUSTER")
    assert main(["quantize", str(folder), "out.gguf", "--type", "F32"]) == 0
    monkeypatch.setenv("LLAMACLI_CLUSTER", nobody)
    assert main(["quantize", "out.gguf", "some.gguf", "--layers", "0-0"]) == 0
    assert main(["quantize", "out.gguf", "other.gguf", "--layers", "0-0", "--cluster", nobody]) == 2
    for more in ([], ["--dry-run"], ["--layers", "0-0"]):
        assert main(["quantize", "out.gguf", "here.gguf", "--force", "--cluster", "none", *more]) == 0, more
