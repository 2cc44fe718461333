"""`llamacli plan` from a user's view: a folder with config.json alone, a file, sizes and speeds, refusals."""

import json

import checkpoint
import pytest
from checkpoint import SCOUT as REAL
from tiny import tiny_gguf

from llamacli.cli import main, plan
from llamacli.errors import UsageError
from llamacli.llama4.tensors import tensors
from llamacli.plan import machine
from quantize import names
from quantize.hf_config import read_config
from quantize.safetensors import open_checkpoint

MAVERICK = REAL | {"num_local_experts": 128, "interleave_moe_layer_step": 2, "use_qk_norm": False}


@pytest.fixture
def folder(tmp_path):
    """folder(**changes): one that holds nothing but config.json."""

    def make(**changes):
        (tmp_path / "hf").mkdir(exist_ok=True)
        (tmp_path / "hf" / "config.json").write_text(json.dumps(checkpoint.CONFIG | changes))
        return str(tmp_path / "hf")

    return make


@pytest.fixture
def limits(monkeypatch):
    """The machine reads 20 GB/s from memory, 1 GB/s from disk, and multiplies at 500 Gop/s."""
    monkeypatch.setattr(plan, "_limits", lambda threads: (20.0, 500.0))
    monkeypatch.setattr(machine, "disk_read_speed", lambda path: 1e9)


def run(capfd, *args, code=0):
    assert main(["plan", *args]) == code
    return capfd.readouterr()


def record(capfd, *args):
    return json.loads(run(capfd, *args, "--json").out)


def test_config_json_alone_tells_the_sizes_of_the_finished_file(folder, capfd):
    said = record(capfd, folder(**REAL), "--memory", "128G")
    assert said["weights_bytes"] == pytest.approx(63.5e9, rel=1e-3)
    assert said["parameters"] == pytest.approx(107.8e9, rel=1e-3)
    assert said["experts"] == {"layers": 48, "each": 16, "bytes": 3 * 5120 * 8192 * 144 // 256}
    said = record(capfd, folder(**MAVERICK), "--memory", "192G")
    assert said["weights_bytes"] == pytest.approx(229.1e9, rel=1e-3)
    assert said["parameters"] == pytest.approx(400.7e9, rel=1e-3)


def test_the_type_decides_about_the_sizes(folder, capfd):
    sizes = [record(capfd, folder(**REAL), "--memory", "300G", "--type", t)["weights_bytes"] for t in ("Q8_0", "Q2_K")]
    assert sizes[0] / sizes[1] == pytest.approx(8.5 / 2.94, rel=0.01)


@pytest.mark.parametrize("changes", [{}, {"interleave_moe_layer_step": 2}, {"tie_word_embeddings": True}])
def test_shapes_by_config_json_are_those_of_the_checkpoint(tmp_path, changes):
    checkpoint.write(tmp_path / "hf", **changes)
    config = read_config(tmp_path / "hf")
    rows, _ = names.match(tmp_path / "hf", open_checkpoint(tmp_path / "hf"), config)
    shapes = {spec.name: spec.shape for spec in tensors(config.model) if spec.required}
    assert shapes == {name: tuple(r.shape) for name, r in rows.items()}
    assert list(shapes) == list(rows)


def test_slots_and_speed_follow_memory_and_disk(folder, capfd):
    said = record(capfd, folder(**REAL), "--memory", "32G,64G,128G", "--disk", "1,7", "--bandwidth", "120")
    plans = said["plans"]
    assert [(p["memory_bytes"] // 10**9, p["disk_gbps"]) for p in plans] == [(m, d) for m in (32, 64, 128) for d in (1, 7)]
    assert [p["mode"] for p in plans] == ["slots"] * 4 + ["mapped"] * 2
    assert plans[0]["slots"] < plans[2]["slots"] < plans[4]["slots"] == 16
    assert plans[0]["tokens_per_second"] < plans[1]["tokens_per_second"] < plans[3]["tokens_per_second"]
    assert plans[4]["tokens_per_second"] == plans[5]["tokens_per_second"]
    assert all(p["resident_bytes"] <= p["memory_bytes"] for p in plans)


def test_several_memories_give_one_table_and_say_which_do_not_fit(folder, capfd):
    out = run(capfd, folder(**REAL), "--memory", "8G,32G", "--disk", "1,7").out
    assert "does not fit" in out
    assert "disk 7 GB/s" in out


def test_the_table_can_be_drawn(folder, capfd, tmp_path):
    pytest.importorskip("matplotlib")
    image = tmp_path / "plan.png"
    args = ["--memory", "8G,32G,64G", "--disk", "1,7", "--bandwidth", "20,120", "--plot"]
    run(capfd, folder(**REAL), *args, str(image))
    assert image.read_bytes()[1:4] == b"PNG"
    assert "plan.png" in run(capfd, folder(**REAL), *args, str(tmp_path / "plan.nonsense"), code=1).err


def test_assumed_and_given_speeds_are_labelled(folder, capfd):
    out = run(capfd, folder(**REAL), "--memory", "32G", "--disk", "7").out
    assert "7.0 GB/s, given" in out
    assert "GB/s, assumed" in out
    assert "at least" in out  # a prompt's arithmetic is unknown


def test_a_context_that_does_not_fit_is_trimmed_with_the_reason(folder, capfd):
    said = run(capfd, folder(**REAL), "--memory", "24G", "--ctx", "1M", "--json")
    fits = json.loads(said.out)
    assert fits["ctx_asked"] == 1 << 20
    assert fits["plans"][0]["ctx"] < 1 << 20
    assert f"trimmed from 1048576 to {fits['plans'][0]['ctx']} tokens" in said.err
    assert said.err.count("\n") == 1


def test_with_a_file_for_keys_and_values_no_context_is_trimmed(folder, capfd):
    args = ["--memory", "24G", "--ctx", "10M", "--kv", "q4_0", "--kv-file", "--disk", "3"]
    (p,) = record(capfd, folder(**REAL), *args)["plans"]
    assert p["ctx"] == 10 << 20
    assert p["resident_bytes"] <= 24e9
    positions = 10 * (1 << 20) - p["kv_window"]
    assert p["kv_file_bytes"] == p["kv_read_per_token_bytes"] == positions * 12 * 2 * 8 * 128 * 18 // 32
    assert p["full_tokens_per_second"] == pytest.approx(3e9 / p["kv_file_bytes"], rel=0.05)
    assert "KV file" in run(capfd, folder(**REAL), *args).out
    assert "when the context is full" in run(capfd, folder(**REAL), *args[:-1], "1,3").out


def test_a_model_that_cannot_fit_is_refused_in_one_line(folder, capfd):
    said = run(capfd, folder(**REAL), "--memory", "8G", code=1)
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert "expected at least" in said.err
    assert "--memory" in said.err


def test_a_file_is_planned_with_what_is_measured(tmp_path, capfd, limits):
    path = str(tiny_gguf(tmp_path / "tiny.gguf"))
    said = record(capfd, path)
    assert said["speeds"] == {
        "disk": {"values": [1.0], "from": "measured"},
        "bandwidth": {"values": [20.0], "from": "measured"},
        "compute": {"values": [500.0], "from": "measured"},
    }
    (planned,) = said["plans"]
    assert planned["mode"] == "mapped"
    assert planned["ctx"] == 8192
    assert "GB/s, measured" in run(capfd, path).out


def test_types_that_become_half_precision_are_counted_so(tmp_path, capfd, limits):
    path = tiny_gguf(tmp_path / "t.gguf", types=lambda name: "IQ3_S" if "_exps" in name else "F32", n_embd=256, n_ff_exp=256)
    said = run(capfd, str(path), "--json", "-v")
    assert json.loads(said.out)["weights"]["routed experts"] == 4 * 4 * 3 * 256 * 256 * 2
    assert "counted as F16" in said.err


@pytest.mark.parametrize(
    "args, words",
    [
        (["--memory", "much"], "--memory: expected a size"),
        (["--memory", "1G,"], "--memory: expected a size"),
        (["--ctx", "1G"], "--ctx: expected a number of tokens"),
        (["--ctx", "0"], "--ctx: expected a number of tokens"),
        (["--disk", "0"], "--disk: expected speeds"),
        (["--bandwidth", "nan"], "--bandwidth: expected speeds"),
        (["--disk", ",".join("1" * 17)], "at most 16 values"),
        (["--type", "Q9"], "--type: expected one of"),
    ],
)
def test_an_invalid_number_is_a_one_line_error(folder, capfd, args, words):
    said = run(capfd, folder(**REAL), *args, *(["--memory", "14G"] if "--memory" not in args else []), code=2)
    assert words in said.err
    assert said.err.count("\n") == 1


def test_each_of_many_nodes_may_have_its_own_speeds(folder, capfd):
    said = record(capfd, folder(), "--nodes", ",".join(["8G"] * 20), "--disk", ",".join("3" * 20), "--bandwidth", "50")
    assert len(said["plans"]) == 3


@pytest.mark.parametrize(
    "args",
    [["stop", "--host", "10.0.0.5"], ["status", "--host", "10.0.0.5"], ["start", "-m", "x"], ["join", "10.0.0.5", "--json"]],
)
def test_what_a_command_of_the_cluster_does_not_use_is_refused(capfd, args):
    assert main(["cluster", *args]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and f"found {args[0]}" in err


def test_a_type_is_for_folders(tmp_path, capfd):
    said = run(capfd, str(tiny_gguf(tmp_path / "tiny.gguf")), "--type", "Q8_0", code=2)
    assert "--type" in said.err


def test_a_folder_without_config_json_is_one_line(tmp_path, capfd):
    assert "config.json" in run(capfd, str(tmp_path), code=1).err


def test_a_number_of_tokens_may_be_short():
    from llamacli.cli.options import token_count

    assert [token_count(text, "") for text in ("8192", "128K", "1M", " 1m ")] == [8192, 131072, 1048576, 1048576]
    with pytest.raises(UsageError):
        token_count("1.5M", "--ctx")


def test_a_gpus_part_is_planned_from_what_it_may_hold(folder, capfd, limits):
    gpu = ("--memory", "96G", "--type", "Q4_K_M")
    assert "gpu" not in record(capfd, folder(**REAL), *gpu)
    whole = record(capfd, folder(**REAL), *gpu, "--gpu-memory", "72G")
    assert whole["gpu"]["layers"] == 48
    assert whole["gpu"]["budget_bytes"] == 72 * 10**9
    embedding = whole["weights"]["embedding"]
    assert whole["gpu"]["weights_bytes"] == pytest.approx(whole["weights_bytes"] - embedding, rel=1e-3)
    some = record(capfd, folder(**REAL), *gpu, "--gpu-memory", "48G")["gpu"]
    assert 30 < some["layers"] < 40
    assert some["weights_bytes"] + some["kv_bytes"] + some["working_bytes"] <= 48 * 10**9
    assert record(capfd, folder(**REAL), *gpu, "--gpu-memory", "48G", "--gpu-layers", "8")["gpu"]["layers"] == 8


def test_more_layers_than_a_gpu_holds_are_refused(folder, capfd, limits):
    code = main(["plan", folder(**REAL), "--memory", "96G", "--gpu-memory", "48G", "--gpu-layers", "all"])
    assert code == 1
    assert "for 48 layers on the GPU" in capfd.readouterr().err
