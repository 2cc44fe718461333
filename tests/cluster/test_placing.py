"""Nodes with all of a file, some layers or nothing; and the advice for each."""

import shutil
from pathlib import Path

import pytest
from fakes import write_gguf

from llamacli import Model
from llamacli.cluster import copies, host
from llamacli.cluster.control import named
from llamacli.cluster.placing import Placing
from llamacli.cpu import kvcache
from llamacli.errors import DeviceError, ModelFileError
from llamacli.files.gguf import open_gguf
from llamacli.llama4.config import Config
from quantize.convert import convert

TINY = Path(__file__).resolve().parents[2] / "models" / "scout-tiny" / "scout-tiny.gguf"
SECRET = "of this test"


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A node's models folder."""
    monkeypatch.setenv("LLAMACLI_MODELS", str(tmp_path))
    return tmp_path


def test_a_node_finds_the_file_or_some_layers_of_it_by_its_name(models):
    elsewhere = "/of/another/machine/scout-tiny.gguf"
    assert copies.own_copies(elsewhere) == {} and copies.own_copy(elsewhere) is None
    first, some = models / "scout-tiny-layers-0-0.gguf", models / "scout-tiny-layers-2-3.gguf"
    convert(TINY, first, "F32", layers=range(1))
    convert(TINY, some, "F32", layers=range(2, 4))
    assert copies.own_copies(elsewhere) == {str(first): range(1), str(some): range(2, 4)}
    assert copies.own_copy(elsewhere) is None  # some layers are no source of a conversion
    assert copies.own_copies(str(TINY)).keys() == {str(first), str(some)}
    first.write_bytes(b"no GGUF")
    assert copies.own_copies(elsewhere) == {str(some): range(2, 4)}
    some.write_bytes(b"no GGUF")
    assert copies.own_copies(elsewhere) == {str(first): None, str(some): None}  # reported when they are opened
    shutil.copy(TINY, models)
    whole = models / TINY.name
    assert copies.own_copies(elsewhere) == {str(whole): range(4)} and copies.own_copy(elsewhere) == whole
    without = write_gguf(models / "no-layers.gguf", "llama4")
    assert copies.own_copies(without) == {without: None}


def test_of_several_files_a_node_opens_the_one_that_has_its_layers():
    gguf, asked = open_gguf(TINY), {}
    cluster = Facts(copies={"/m/x-layers-0-0.gguf": [0, 1], "/m/x-layers-1-3.gguf": [1, 4]})
    cluster.nodes["a"]["copies"] = {"/m/x-layers-0-1.gguf": [0, 2], "/m/x-layers-3-3.gguf": [3, 4]}
    cluster.open = lambda name, **how: asked.update({name: (how["copy"], how["first"], how["end"])})
    with pytest.raises(DeviceError):
        Placing(cluster, gguf, Config.from_gguf(gguf), 512, 1, None, False)(losses={})
    (one, first, end), (other, begin, last) = asked["a"], asked["b"]
    assert (one, first, other, last) == ("/m/x-layers-0-1.gguf", 0, "/m/x-layers-1-3.gguf", 4)
    assert end == begin in (1, 2)


def test_a_file_of_some_layers_is_named_where_all_are_needed(models):
    some = models / "scout-tiny-layers-2-3.gguf"
    convert(TINY, some, "F32", layers=range(2, 4))
    for how in ({}, {"cluster": "127.0.0.1:1"}):
        with pytest.raises(ModelFileError, match=r"expected layers 0 to 3, found 2 to 3 only; .*give the whole file"):
            Model.load(some, **how)


def test_layers_alone_are_opened_where_they_are_the_same_and_no_others(models):
    some, node = models / "scout-tiny-layers-2-3.gguf", host.Host(SECRET)
    convert(TINY, some, "F32", layers=range(2, 4))
    gguf = open_gguf(TINY)
    config = Config.from_gguf(gguf)
    asked = {"copy": str(some), "kv": "F16", "threads": 1, "slots": 0, "batch": 64, "host": "127.0.0.1"}
    opened = node.open(first=2, end=4, digest=copies.digest(gguf, config, range(2, 4)), **asked)
    assert opened["batch"] == 64
    for first, end, right in ((1, 3, range(1, 3)), (2, 4, range(2, 3))):
        with pytest.raises(ModelFileError, match="expected the same file as here, found another"):
            node.open(first=first, end=end, digest=copies.digest(gguf, config, right), **asked)
    node.close()


class Facts:
    """Simulates a cluster of two nodes by facts about them."""

    latency = 0.0

    def __init__(self, **second):
        known = {"version": host.version(), "memory": 8 << 30, "threads": 1, "bandwidth": 1e9, "disk": 1e9, "models": "/m"} | {
            "address": "127.0.0.1"
        }
        self.nodes = {"a": known | {"copies": {"/m/x.gguf": [0, 4]}}, "b": known | second}
        self.dropped = []

    def describe(self, path, threads, skip):
        return {name: facts for name, facts in self.nodes.items() if name not in skip}

    def reached(self):
        return self.nodes, {}

    def drop(self, name):
        self.dropped.append(name)

    def open(self, name, **how):
        return how

    def gather(self, asked):
        return {name: DeviceError("enough of this test") for name in asked}


def told(**second):
    """Lines about nodes that are left out."""
    gguf, said = open_gguf(TINY), []
    placing = Placing(Facts(**second), gguf, Config.from_gguf(gguf), 512, 1, None, False)
    placing.left_out = said.append
    with pytest.raises(DeviceError):
        placing(losses={})
    return said


def test_a_node_without_the_file_is_told_how_to_get_the_layers_that_it_would_have():
    (without, _) = told(copies={}, bandwidth=1e14)
    assert "node b is left out: expected a copy of scout-tiny.gguf in /m or at the same path as here, found none" in without
    assert without.endswith("or what `llamacli quantize scout-tiny.gguf --layers 0-3` makes here")


def test_nodes_that_had_no_answer_or_were_lost_twice_are_there_again_and_those_left_out_are_not():
    gguf, cluster = open_gguf(TINY), Facts(copies={})
    placing = Placing(cluster, gguf, Config.from_gguf(gguf), 512, 1, None, False)
    with pytest.raises(DeviceError):
        placing(losses={})  # both answered: one has no copy, the other fails to open
    assert placing.there_again({}) == []
    cluster.nodes["b"]["error"] = "its cable is cut"
    with pytest.raises(DeviceError):
        placing(losses={})
    assert placing.there_again({}) == ["b"]
    with pytest.raises(DeviceError):
        placing(losses={"a": 2})
    assert placing.there_again({"a": 2}) == ["b"] and placing.there_again({"a": 1}) == ["a", "b"]


def test_more_contexts_are_planned_where_every_node_has_room_for_them():
    gguf = open_gguf(TINY)
    config, ctx = Config.from_gguf(gguf), 100_000
    found = []
    for memory in (300_000_000, 400_000_000, 8 << 30):
        cluster = Facts(copies={"/m/x.gguf": [0, 4]}, memory=memory)
        cluster.nodes["a"]["memory"] = memory
        placing = Placing(cluster, gguf, config, ctx, 1, None, False, more_sessions=7)
        with pytest.raises(DeviceError):
            placing(losses={})
        found.append(placing.sessions)
        assert placing.sessions * kvcache.nbytes(config, ctx) + TINY.stat().st_size < memory
    assert found[0] == 1 < found[1] < found[2] == 8
    reading = Placing(cluster, gguf, config, ctx, 1, None, True, more_sessions=7)  # experts in slots
    with pytest.raises(DeviceError):
        reading(losses={})
    assert reading.sessions == 1


def test_where_a_node_does_not_open_contexts_are_planned_anew_for_those_that_are_left():
    gguf = open_gguf(TINY)
    cluster = Facts(copies={"/m/x.gguf": [0, 4]}, memory=300_000_000)
    cluster.nodes["a"]["bandwidth"] = 1e14  # it alone would have all layers, and room for eight contexts
    facts = {"address": ("127.0.0.1", 1), "notices": [], "bytes_per_token": 1, "products_per_token": 1}
    opened = facts | {"pid": 1, "batch": 1, "alike": 1}
    cluster.gather = lambda asked: {name: DeviceError("no disk") if name == "a" else opened for name in asked}
    placing = Placing(cluster, gguf, Config.from_gguf(gguf), 100_000, 1, None, False, more_sessions=7)
    (place,) = placing(losses={})
    assert place.name == "b" and place.layers == range(4) and not place.fetches
    assert placing.sessions == 1
    assert cluster.dropped == ["a"]


def test_a_node_that_would_have_no_layers_is_told_to_copy_the_file():
    (without, _) = told(copies={}, bandwidth=1.0)
    assert without.endswith("found none; copy the file there")


def test_where_all_nodes_were_lost_twice_the_line_says_so():
    gguf = open_gguf(TINY)
    placing = Placing(Facts(copies={"/m/x.gguf": [0, 4]}), gguf, Config.from_gguf(gguf), 512, 1, None, False)
    with pytest.raises(DeviceError, match="node a: lost twice, not used for some minutes; node b: lost twice"):
        placing(losses={"a": 2, "b": 3})


def test_a_node_in_use_keeps_its_name_when_another_of_that_name_comes_or_goes():
    one, two, other = ({"NodeManagerHostname": name, "NodeID": id} for name, id in (("m", "1" * 9), ("m", "2" * 9), ("n", "3")))
    assert named([one, two, other], {}) == {"m/111111": one, "m/222222": two, "n": other}
    assert named([two], {"2" * 9: "m/222222"}) == {"m/222222": two}
    assert named([one, two], {"1" * 9: "m"}) == {"m": one, "m/222222": two}
    assert named([two], {}) == {"m": two}  # a program that has no process there
