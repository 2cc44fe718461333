"""Which layers go to which machine: within its memory, and so that a token takes the least time."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from llamacli.cli import main
from llamacli.cpu import kvcache
from llamacli.errors import MemoryLimitError, UsageError
from llamacli.llama4.tensors import tensors
from llamacli.plan.nodes import SECONDS_PER_HANDOVER, Machine, model, split
from quantize.recipe import choose_types, find_recipe
from quantize.shapes import SHAPES


def model_of(config, recipe="Q4_EXPERTS"):
    dims = {spec.name: spec.shape for spec in tensors(config) if spec.required}
    types, _ = choose_types(find_recipe(recipe), dims)
    return model(config, [(name, types[name].row_bytes(shape[-1]) * math.prod(shape[:-1])) for name, shape in dims.items()])


MAVERICK = model_of(SHAPES["maverick"])


def machine(gigabytes, bandwidth=100, disk=5, name="m"):
    return Machine(name, int(gigabytes * 1e9), bandwidth * 1e9, disk * 1e9, 8)


def layers(found):
    return [part.layers for part in found.parts]


def test_every_layer_is_on_one_machine_within_its_memory():
    for sizes in ([128, 128], [64] * 4, [128, 64, 32], [24, 200]):
        machines = [machine(size, name=str(k)) for k, size in enumerate(sizes)]
        found = split(MAVERICK, machines, 8192)
        assert [i for part in found.parts for i in part.layers] == list(range(48))
        for part in found.parts:
            assert part.placement.resident <= part.machine.memory


def test_equal_machines_get_equal_parts():
    assert layers(split(MAVERICK, [machine(128)] * 2, 8192)) == [range(24), range(24, 48)]
    assert [len(part) for part in layers(split(MAVERICK, [machine(64)] * 4, 8192))] == [12, 12, 12, 12]


def test_a_machine_with_faster_memory_gets_more_layers_and_one_with_a_slow_disk_fewer():
    fast, slow = layers(split(MAVERICK, [machine(200, 200), machine(200, 100)], 8192))
    assert len(fast) > len(slow)
    quick, late = layers(split(MAVERICK, [machine(80, disk=7), machine(80, disk=0.5)], 8192))
    assert len(quick) > len(late)


def test_a_model_that_a_machine_runs_as_fast_alone_goes_to_one():
    small = model_of(replace(SHAPES["scout"], n_layers=2, n_embd=256, n_ff_exp=256, n_ff=512, n_vocab=1000))
    assert layers(split(small, [machine(64)] * 3, 8192)) == [range(2)]


def test_a_hand_over_within_the_first_machine_needs_no_network():
    def network(machines, **how):
        return split(MAVERICK, machines, 8192, **how).network

    two = [machine(128)] * 2
    assert network([machine(300)] * 2, latency=1) == pytest.approx(2 * SECONDS_PER_HANDOVER)
    assert network(two, latency=1, network=1e30, layers=[24, 24]) == pytest.approx(2 + 3 * SECONDS_PER_HANDOVER)
    assert network(two, latency=0, network=4 * 5120, layers=[24, 24]) == pytest.approx(2 + 3 * SECONDS_PER_HANDOVER)


def test_every_sequence_that_is_held_takes_its_keys_and_values():
    one, four = (split(MAVERICK, [machine(128)] * 2, 131072, sessions=n) for n in (1, 4))
    kv = kvcache.nbytes(MAVERICK.config, 131072)
    assert sum(part.placement.resident for part in four.parts) < sum(part.placement.resident for part in one.parts)
    with pytest.raises(MemoryLimitError):
        split(MAVERICK, [machine(128)] * 2, 131072, sessions=int(256e9 // kv))


def test_no_way_is_better_than_the_one_chosen():
    """Against all ways of parting a model of 8 layers."""
    short = model_of(replace(SHAPES["maverick"], n_layers=8))
    machines = [machine(10, 50, 1), machine(20, 200, 3), machine(16, 100, 7)]
    best = split(short, machines, 8192).seconds
    for first in range(9):
        for second in range(first, 9):
            try:
                other = split(short, machines, 8192, layers=[first, second - first, 8 - second])
            except MemoryLimitError:
                continue
            assert best <= other.seconds * 1.02  # even parts are preferred a little


def test_what_does_not_fit_is_refused_with_the_memory_needed():
    with pytest.raises(MemoryLimitError, match=r"expected at least \d+\.\d+ GB on 2 nodes together"):
        split(MAVERICK, [machine(4)] * 2, 8192)


def test_layers_that_are_asked_for_are_checked():
    found = split(MAVERICK, [machine(200), machine(200)], 8192, layers=[40, 8])
    assert layers(found) == [range(40), range(40, 48)]
    for wrong in ([48], [24, 23], [-1, 49]):
        with pytest.raises(UsageError, match="expected 2 counts that add up to 48"):
            split(MAVERICK, [machine(200), machine(200)], 8192, layers=wrong)


def test_a_machine_gets_only_layers_that_its_file_has():
    whole, first, last = machine(128), machine(128)._replace(held=(range(30),)), machine(128)._replace(held=(range(20, 48),))
    found = layers(split(MAVERICK, [last, first], 8192))  # in the order of the layers, not of the machines
    assert found[0].start == 0 and 20 <= found[0].stop <= 30 and found[1].stop == 48
    assert layers(split(MAVERICK, [whole, last], 8192))[-1].start >= 20
    assert layers(split(MAVERICK, [whole, first], 8192))[0].stop <= 30
    with pytest.raises(MemoryLimitError, match=r"found layers 0-29, 0-29; copy the file, or other layers of it, to a node"):
        split(MAVERICK, [first, first], 8192)


def test_of_several_files_of_a_machine_the_best_is_chosen():
    either = machine(128)._replace(held=(range(20), range(16, 40), range(24, 48)))
    assert layers(split(MAVERICK, [machine(128)._replace(held=(range(24),)), either], 8192)) == [range(24), range(24, 48)]
    assert layers(split(MAVERICK, [either, machine(128)], 8192, layers=[20, 28])) == [range(20), range(20, 48)]
    with pytest.raises(MemoryLimitError, match="expected nodes that together have files of all layers"):
        split(MAVERICK, [either, either._replace(held=(range(16, 40),))], 8192)


def test_the_command_shows_who_gets_what(capfd):
    file = str(Path(__file__).resolve().parents[2] / "models" / "scout-tiny" / "scout-tiny.gguf")
    assert main(["plan", file, "--nodes", "2G,1G", "--network", "1,10", "--bandwidth", "20,10", "--disk", "2", "--json"]) == 0
    slow, fast = json.loads(capfd.readouterr().out)["plans"]
    assert sum(node["layers"] for node in slow["nodes"]) == 4
    assert slow["network_gbits"] == 1 and slow["tokens_per_second"] <= fast["tokens_per_second"]
    assert main(["plan", file, "--nodes", "2G,1G"]) == 0
    shown = capfd.readouterr().out
    assert "node 1" in shown and "10 Gbit/s" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "2G,1G", "--disk", "1,2,3"], "--disk: expected one value or one for each of 2 nodes, found 3"),
        (["--nodes", "2G,x"], "--nodes: expected"),
        (["--nodes", "2G", "--network", "fast"], "--network: expected speeds in Gbit/s"),
        (["--network", "10"], "--network: expected --nodes with it"),
        (["--nodes", "2G,1G", "--kv-file"], "--kv-file and --nodes exclude each other"),
        (["--nodes", "2G,1G", "--memory", "4G"], "--memory and --nodes exclude each other"),
        (["--nodes", "50M,50M"], "on 2 nodes together"),
    ],
)
def test_the_command_refuses_in_one_line(capfd, words, message):
    file = str(Path(__file__).resolve().parents[2] / "models" / "scout-tiny" / "scout-tiny.gguf")
    assert main(["plan", file, *words]) != 0
    said = capfd.readouterr().err
    assert message in said and said.count("\n") == 1
