"""The routing log: the engine logs the oracle's choices, a written log is read back, hit rates are those of a simulated cache,
and `inspect --routing` shows them.
"""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
from tiny import MAVERICK, SCOUT, tiny_gguf

from llamacli.bench import plot, routing, routing_log
from llamacli.bench.routing_log import Routing, RoutingLog
from llamacli.cli import main
from llamacli.cli.console import Console
from llamacli.cpu.experts import HALF_LIFE
from llamacli.engine import Engine
from llamacli.errors import OutputError, PromptError, UsageError
from llamacli.files.gguf import open_gguf
from llamacli.llama4.config import Config

HEAD = '{"routing":1,"model":"m","layers":[0,2],"experts":4,"used":1}\n'


def log_of(chosen, n_experts=4, positions=None):
    """A log of experts [n_tokens, n_layers] or [n_tokens, n_layers, used]."""
    chosen = np.asarray(chosen, np.int16)
    chosen = chosen[..., None] if chosen.ndim == 2 else chosen
    positions = np.arange(len(chosen)) if positions is None else np.asarray(positions)
    return Routing("m", list(range(chosen.shape[1])), n_experts, positions, chosen)


# the engine


def oracles_choice(path, ids, monkeypatch):
    """Experts by the oracle: [n_tokens, layers with experts, used]."""
    seen, experts = [], oracle.experts

    def watched(h, w, used):
        seen.append(np.argsort(-(h @ w["ffn_gate_inp.weight"].T), axis=1, kind="stable")[:, :used])
        return experts(h, w, used)

    monkeypatch.setattr(oracle, "experts", watched)
    oracle.logits(path, ids, np.float16)
    return np.stack(seen, 1)


@pytest.mark.parametrize("slots", [0, 5])
@pytest.mark.parametrize("shape", [SCOUT, MAVERICK, SCOUT | {"used": 2}])
def test_every_layers_choice_is_logged_prompt_and_single_tokens_alike(tmp_path, monkeypatch, shape, slots):
    path, ids = tiny_gguf(tmp_path / "tiny.gguf", **shape), [int(i) for i in np.random.RandomState(0).randint(0, 256, 24)]
    gguf = open_gguf(path)
    config = Config.from_gguf(gguf)
    engine = Engine(gguf, config, 2, slots)
    engine.follow_routing = RoutingLog(tmp_path / "r.log", "tiny.gguf", config)
    cache = engine.new_cache(64)
    engine.forward(ids[:21], cache)
    for token in ids[21:]:
        engine.forward([token], cache)
    log = routing_log.read(tmp_path / "r.log")
    assert log.layers == [i for i in range(config.n_layers) if config.is_moe(i)]
    assert log.positions.tolist() == list(range(24))
    assert (log.chosen == oracles_choice(path, ids, monkeypatch)).all()
    batches = (tmp_path / "r.log").read_text().splitlines()[1:]
    assert [json.loads(line)["pos"] for line in batches] == [0, 8, 16, 21, 22, 23]  # a batch ends at a chunk's edge


def test_logging_changes_no_logit(tmp_path):
    gguf = open_gguf(tiny_gguf(tmp_path / "tiny.gguf"))
    engine = Engine(gguf, Config.from_gguf(gguf), 1)
    before = engine.forward([1, 2, 3], engine.new_cache(8)).copy()
    engine.follow_routing = RoutingLog(tmp_path / "r.log", "tiny.gguf", engine.config)
    assert (engine.forward([1, 2, 3], engine.new_cache(8)) == before).all()
    engine.follow_routing = None
    engine.forward([1, 2, 3], engine.new_cache(8))
    assert len((tmp_path / "r.log").read_text().splitlines()) == 2


# the file


@pytest.fixture
def config(tmp_path):
    return Config.from_gguf(open_gguf(tiny_gguf(tmp_path / "tiny.gguf", **MAVERICK, used=2)))


def test_what_is_written_is_read_back(tmp_path, config):
    log, random = RoutingLog(tmp_path / "r.log", "tiny.gguf", config), np.random.RandomState(0)
    batches = [(position, random.randint(0, 8, (4, n, 2))) for position, n in ((0, 5), (5, 1), (3, 1))]
    for position, experts in batches:
        log(position, experts.reshape(4, -1))
    found = routing_log.read(tmp_path / "r.log")  # the writer is still there: every line is in the file at once
    assert (found.model, found.layers, found.n_experts) == ("tiny.gguf", [1, 3], 8)
    assert found.positions.tolist() == [0, 1, 2, 3, 4, 5, 3]
    assert (found.chosen == np.concatenate([experts[[1, 3]].swapaxes(0, 1) for _, experts in batches])).all()


def test_a_last_line_that_was_cut_is_passed_over(tmp_path):
    (tmp_path / "r.log").write_text(HEAD + '{"pos":0,"experts":[[1,2]]}\n{"pos":1,"expe')
    assert routing_log.read(tmp_path / "r.log").chosen.tolist() == [[[1], [2]]]


def test_no_file_is_overwritten(tmp_path, config):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(OutputError, match="found one"):
        RoutingLog(tmp_path / "mine", "m", config)
    with pytest.raises(OutputError, match="routing log"):
        RoutingLog(tmp_path / "no" / "folder", "m", config)
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_model_without_experts_is_refused(tmp_path):
    with pytest.raises(UsageError, match="with experts"):
        RoutingLog(tmp_path / "r.log", "m", SimpleNamespace(n_layers=2, is_moe=lambda i: False))
    assert not (tmp_path / "r.log").exists()


@pytest.mark.parametrize(
    "text, line",
    [
        ("GGUF\0\1\n", 1),
        ("[]\n", 1),
        ("{}\n", 1),
        ('{"routing":2,"model":"m","layers":[0],"experts":4,"used":1}\n', 1),
        ('{"routing":1,"model":"m","layers":[],"experts":4,"used":1}\n', 1),
        ('{"routing":1,"model":"m","layers":[0],"experts":4,"used":5}\n', 1),
        ('{"routing":1,"model":"m","layers":[0],"experts":1e99,"used":1}\n', 1),
        ("[" * 100_000 + "\n", 1),
        (HEAD + "nonsense\n", 2),
        (HEAD + '{"pos":0}\n', 2),
        (HEAD + '{"pos":-1,"experts":[[0,0]]}\n', 2),
        (HEAD + '{"pos":0,"experts":[[0,0]]}\n{"pos":1,"experts":[[0,4]]}\n', 3),
        (HEAD + '{"pos":0,"experts":[[0,-1]]}\n', 2),
        (HEAD + '{"pos":0,"experts":[[0,1,2]]}\n', 2),
        (HEAD + '{"pos":0,"experts":[[0,1],[2]]}\n', 2),
        (HEAD + '{"pos":0,"experts":[["0","1"]]}\n', 2),
        (HEAD + '{"pos":0,"experts":[]}\n', 2),
        (HEAD + f'{{"pos":0,"experts":[[0,{10**30}]]}}\n', 2),
    ],
)
def test_a_file_that_is_not_a_log_is_refused_with_the_wrong_line(tmp_path, text, line):
    (tmp_path / "r.log").write_text(text)
    with pytest.raises(PromptError, match=f"r.log: expected .* in line {line} "):
        routing_log.read(tmp_path / "r.log")


def test_a_log_without_tokens_says_so(tmp_path):
    (tmp_path / "r.log").write_text(HEAD)
    with pytest.raises(PromptError, match="some tokens"):
        routing_log.read(tmp_path / "r.log")
    with pytest.raises(PromptError, match="readable"):
        routing_log.read(tmp_path / "missing")
    for text in ("", HEAD.rstrip()):  # stopped before the first line was whole
        (tmp_path / "r.log").write_text(text)
        with pytest.raises(PromptError, match="found no whole line"):
            routing_log.read(tmp_path / "r.log")


# what it tells


def test_use_counts_every_choice():
    assert routing.use(log_of([[0, 3], [0, 1], [2, 1]])).tolist() == [[2, 0, 1, 0], [0, 2, 0, 1]]


def test_repeats_look_only_at_tokens_that_follow_each_other():
    log = log_of([[0, 1], [0, 2], [0, 2], [0, 2]], positions=[0, 1, 0, 1])  # a second conversation begins in between
    assert routing.repeats(log).tolist() == [1.0, 0.5]
    assert np.isnan(routing.repeats(log_of([[0, 1]]))).all()


def test_of_two_experts_one_may_repeat():
    assert routing.repeats(log_of([[[0, 1]], [[1, 2]], [[2, 1]]])).tolist() == [0.75]


def cached(choices, slots):
    """The hit rate of a simulated cache that evicts the expert with the least decayed count of uses."""
    held, uses, hits = set(), Counter(), 0
    for now, expert in enumerate(choices):
        hits += expert in held
        uses[expert] += 2 ** (now / HALF_LIFE)
        if expert not in held and len(held) == slots:
            held.remove(min(held, key=uses.__getitem__))
        held.add(expert)
    return hits / len(choices)


@pytest.mark.parametrize("used", [1, 2])
def test_hit_rates_are_those_of_a_simulated_cache(used):
    random = np.random.RandomState(used)
    chosen = np.stack(
        [[random.choice(6, used, replace=False, p=(0.4, 0.3, 0.1, 0.1, 0.05, 0.05)) for _ in "abc"] for _ in range(200)]
    )
    rates = routing.hit_rates(log_of(chosen, 6))
    for layer in range(3):
        assert rates[layer] == pytest.approx([cached(chosen[:, layer].ravel().tolist(), s) for s in range(1, 7)])


def test_with_all_slots_only_first_uses_miss():
    assert routing.hit_rates(log_of([[0], [1], [0], [1], [3]]))[0].tolist() == [0, 0.4, 0.4, 0.4]


# commands


def test_a_run_writes_a_log_that_inspect_draws(tmp_path, capfd):
    model, log = str(tiny_gguf(tmp_path / "tiny.gguf", experts=8)), str(tmp_path / "r.log")
    args = ["run", "--raw", "--no-stdin", "-m", model, "-n", "6", "--temp", "0", "--routing-log", log, "hello"]
    assert main(args) == 0
    assert main(args) == 1  # the log is there
    assert "choose another name" in capfd.readouterr().err
    assert main(["inspect", "--routing", log]) == 0
    out = capfd.readouterr().out.splitlines()
    assert out[0].startswith("tiny.gguf: experts 0 to 7 across, layers down")
    assert [line.split()[0] for line in out[1:5]] == ["0", "1", "2", "3"]
    assert main(["inspect", "--routing", log, "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["tokens"] == routing_log.read(Path(log)).chosen.shape[0]
    assert len(said["layers"]) == 4
    assert all(sum(layer["use"]) == pytest.approx(1, abs=1e-3) for layer in said["layers"])
    assert said["hits"] == sorted(said["hits"])


@pytest.mark.parametrize(
    "args, code, words",
    [
        (["--routing", "/nonexistent"], 1, "readable routing log"),
        (["--routing", "r.log", "model.gguf"], 2, "a log alone"),
        (["--plot", "x.png", "model.gguf"], 2, "--routing LOG"),
    ],
)
def test_what_inspect_cannot_draw_is_refused_in_one_line(capfd, args, code, words):
    assert main(["inspect", *args]) == code
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert words in err


def test_shades_grow_with_the_number_and_colours_are_used_only_if_asked_for(capfd):
    Console("never").shades("title", [("0", [0.0, 0.25, 0.5, 0.75, 1.0]), ("10", [1.0] * 5)])
    assert capfd.readouterr().out == "title\n   0   ░░▒▒▓▓██\n  10 ██████████\n"
    Console("always").shades("title", [("0", [0.0, 1.0])])
    assert capfd.readouterr().out.count("\x1b[48;5;") == 2


def test_where_experts_are_more_than_columns_neighbours_share_a_cell(capfd):
    Console("never").shades("", [("0", [0.0] * 1023 + [1.0])])
    line = capfd.readouterr().out.splitlines()[1]
    assert len(line) <= 260
    assert line.endswith("█")


def test_the_picture_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    use, hits = np.full((2, 4), 0.25), np.linspace(0, 1, 8).reshape(2, 4)
    plot.draw_routing(use, hits, [1, 3], "title", tmp_path / "routing.png")
    assert (tmp_path / "routing.png").read_bytes()[1:4] == b"PNG"
    with pytest.raises(OutputError, match=r"routing\.png"):
        plot.draw_routing(use, hits, [1, 3], "title", tmp_path / "routing.nonsense")
