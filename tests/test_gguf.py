"""GGUF: what gguf-py writes is read back; whatever else is in a file, ModelFileError is the worst that happens."""

import os
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamacli.errors import ModelFileError, UnsupportedModelError
from llamacli.gguf import open_gguf

U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(key, kind, raw):
    return text(key) + struct.pack("<I", kind) + raw


def array(key, kind, count, raw):
    return value(key, ARRAY, struct.pack("<IQ", kind, count) + raw)


def info(name, dims, kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def build(values=(), infos=(), data=b"", version=3, magic=b"GGUF", counts=None, align=32):
    """A GGUF byte by byte, as the specification has it."""
    n_infos, n_values = counts or (len(infos), len(values))
    head = magic + struct.pack("<IQQ", version, n_infos, n_values) + b"".join([*values, *infos])
    return head + bytes(-len(head) % align) + data


SAMPLE = build(
    [
        value("general.architecture", STRING, text("llama4")),
        value("a.number", U32, struct.pack("<I", 7)),
        value("a.flag", BOOL, b"\1"),
        array("a.list", U32, 3, struct.pack("<3I", 1, 2, 3)),
        array("a.words", STRING, 2, text("Größe") + text("🦙")),
    ],
    [info("one", (32, 2)), info("two", (64,), 8, 256)],
    bytes(range(256)) + bytes(68),
)


@pytest.fixture
def save(tmp_path):
    def save(raw, name="model.gguf"):
        path = tmp_path / name
        path.write_bytes(raw)
        return path

    return save


def refused(path, *words, error=ModelFileError):
    with pytest.raises(error) as caught:
        found = open_gguf(path)
        list(found.metadata.values())
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path)) or "of-" in message
    for word in words:
        assert word in message
    return message


@pytest.mark.parametrize("version", [2, 3])
def test_the_sample_is_read(save, version):
    model = open_gguf(save(SAMPLE[:4] + struct.pack("<I", version) + SAMPLE[8:]))
    assert (model.version, model.nbytes) == (version, len(SAMPLE))
    assert model.metadata["general.architecture"] == "llama4"
    assert model.metadata["a.number"] == 7
    assert model.metadata["a.flag"] is True
    assert model.metadata["a.list"].tolist() == [1, 2, 3]
    assert model.metadata["a.words"] == ["Größe", "🦙"]
    assert list(model.metadata) == ["general.architecture", "a.number", "a.flag", "a.list", "a.words"]
    one, two = model.tensors["one"], model.tensors["two"]
    assert (one.shape, one.type.name, one.nbytes) == ((2, 32), "F32", 256)
    assert (two.shape, two.type.name, two.nbytes) == ((64,), "Q8_0", 68)
    assert bytes(one.data) == bytes(range(256))


def test_tensors_are_views_that_nobody_can_write(save):
    data = open_gguf(save(SAMPLE)).tensors["one"].data
    assert not data.flags.owndata
    with pytest.raises(ValueError):
        data[0] = 1


def test_what_gguf_py_writes_comes_back(tmp_path):
    path, rng = tmp_path / "written.gguf", np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama4")
    scalars = {"uint8": 200, "int8": -3, "uint16": 60000, "int16": -300, "uint32": 2**32 - 1, "int32": -(2**31)}
    scalars |= {"uint64": 2**64 - 1, "int64": -(2**63), "float32": 0.5, "float64": 1e300, "bool": True, "string": "Größe 🦙"}
    for kind, number in scalars.items():
        getattr(writer, f"add_{kind}")(f"x.{kind}", number)
    lists = {"ints": [1, -2, 3], "floats": [0.5, -1.0], "words": ["a", "", "🦙"], "flags": [True, False]}
    for name, items in lists.items():
        writer.add_array(f"x.{name}", items)
    weights = {"a": (3, 64), "b.weight": (2, 4, 32), "c": (5,)}
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in weights.items()}
    for name, weight in weights.items():
        writer.add_tensor(name, weight)
    writer.add_tensor(
        "q", gguf.quants.quantize(weights["a"], gguf.GGMLQuantizationType.Q4_0), raw_dtype=gguf.GGMLQuantizationType.Q4_0
    )
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    model = open_gguf(path)
    for kind, number in scalars.items():
        assert model.metadata[f"x.{kind}"] == number
    for name, items in lists.items():
        assert list(model.metadata[f"x.{name}"]) == items
    for name, weight in weights.items():
        tensor = model.tensors[name]
        assert tensor.shape == weight.shape
        assert (tensor.data.view(np.float32) == weight.ravel()).all()
    assert model.tensors["q"].shape == (3, 64)
    assert (model.tensors["q"].data == gguf.quants.quantize(weights["a"], gguf.GGMLQuantizationType.Q4_0).ravel()).all()


def test_a_given_alignment_is_kept(save):
    values = [value("general.alignment", U32, struct.pack("<I", 64))]
    model = open_gguf(save(build(values, [info("a", (4,)), info("b", (4,), 0, 64)], bytes(64) + b"\7" * 16, align=64)))
    assert bytes(model.tensors["b"].data) == b"\7" * 16


def test_a_file_cut_anywhere_is_refused(save):
    for cut in range(len(SAMPLE)):
        refused(save(SAMPLE[:cut]))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(SAMPLE) - 257), st.binary(min_size=1, max_size=8)), min_size=1, max_size=3))
def test_a_damaged_file_raises_nothing_else_and_costs_nothing(tmp_path, damages):
    raw = bytearray(SAMPLE)
    for at, patch in damages:
        raw[at : at + len(patch)] = patch
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        found = open_gguf(path)
        list(found.metadata.values())
        for tensor in found.tensors.values():
            tensor.data.sum()
    except ModelFileError as error:
        assert "\n" not in str(error)
        assert str(error).isprintable()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20


HUGE = 2**64 - 1
HOSTILE = {
    "wrong magic": (build(magic=b"GGML"), "GGML"),
    "version 1": (build(version=1), "version 1"),
    "version 4": (build(version=4), "version 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "empty": (b"", "24 bytes"),
    "text": (b"<!doctype html><html><body>Not found</body></html>", "<!do"),
    "2^64 tensors": (build(counts=(HUGE, 0)), str(HUGE)),
    "2^64 values": (build(counts=(0, HUGE)), str(HUGE)),
    "2^40 tensors": (build(counts=(1 << 40, 0), data=bytes(1000)), "cut short"),
    "a key of 2^63 bytes": (build([struct.pack("<Q", 1 << 63) + bytes(50)]), "key"),
    "a string of 2^64 bytes": (build([value("k", STRING, struct.pack("<Q", HUGE))]), "k"),
    "a list of 2^62 numbers": (build([array("k", U64, 1 << 62, bytes(64))]), "k"),
    "a list of 2^61 words": (build([array("k", STRING, 1 << 61, bytes(64))]), "k"),
    "a word of 2^64 bytes": (build([array("k", STRING, 1, struct.pack("<Q", HUGE))], data=bytes(64)), "k"),
    "a word of 2^63 bytes": (build([array("k", STRING, 2, struct.pack("<QQ", (1 << 63) - 8, 0))], data=bytes(64)), "k"),
    "words that are no UTF-8": (build([array("k", STRING, 1, text(b"\xff\xfe"))]), "UTF-8"),
    "a list of lists": (build([array("k", ARRAY, 1, bytes(64))]), "k"),
    "a value of type 13": (build([value("k", 13, bytes(64))]), "13"),
    "a key twice": (build([value("k", U8, b"\1"), value("k", U8, b"\2")]), "twice"),
    "a key that is no UTF-8": (build([value(b"\xff", U8, b"\1")]), "UTF-8"),
    "a tensor twice": (build([], [info("t", (4,)), info("t", (4,), 0, 32)], bytes(64)), "twice"),
    "tensors over one another": (build([], [info("t", (16,)), info("u", (16,), 0, 32)], bytes(96)), "overlapping"),
    "a misaligned tensor": (build([], [info("t", (4,), 0, 4)], bytes(64)), "multiple of 32"),
    "a tensor past the end": (build([], [info("t", (4,), 0, 1 << 40)], bytes(64)), "64 bytes"),
    "a tensor of 2^256 bytes": (build([], [info("t", (HUGE,) * 4)], bytes(64)), "64 bytes"),
    "a tensor of no dimension": (build([], [info("t", ())], bytes(64)), "dimensions"),
    "a tensor of five dimensions": (build([], [info("t", (1,) * 5)], bytes(64)), "dimensions"),
    "a tensor of 2^32 dimensions": (build([], [text("t") + struct.pack("<IQQ", 2**32 - 1, 1, 1)], bytes(64)), "dimensions"),
    "a tensor of nothing": (build([], [info("t", (32, 0))], bytes(64)), "shape"),
    "half a block": (build([], [info("t", (48,), 8)], bytes(64)), "Q8_0"),
    "alignment 0": (build([value("general.alignment", U32, bytes(4))]), "alignment"),
    "alignment 48": (build([value("general.alignment", U32, struct.pack("<I", 48))]), "alignment"),
    "alignment 2^31": (build([value("general.alignment", U32, struct.pack("<I", 1 << 31))]), "alignment"),
    "alignment in words": (build([value("general.alignment", STRING, text("32"))]), "alignment"),
    "escape codes in a name": (build([], [info("\x1b[2J\n", ())], bytes(64)), "dimensions"),
}


@pytest.mark.parametrize("raw, word", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused_at_no_cost(save, raw, word):
    path = save(raw)
    tracemalloc.start()
    try:
        message = refused(path, word)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert message.isprintable()
    assert peak < 1 << 20


def test_an_unknown_tensor_type_is_told_apart_from_damage(save):
    refused(save(build([], [info("t", (32,), 99)], bytes(64))), "99", "t", error=UnsupportedModelError)


def test_free_text_may_be_broken(save):
    assert "Gr" in open_gguf(save(build([value("k", STRING, text(b"Gr\xfc\xdfe"))]))).metadata["k"]


def test_what_is_no_file(tmp_path):
    refused(tmp_path, "folder")
    refused(tmp_path / "missing.gguf", "nothing")
    refused(tmp_path / "missing" / "model.gguf")
    os.mkfifo(tmp_path / "pipe.gguf")
    refused(tmp_path / "pipe.gguf", "not a file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(save):
    path = save(SAMPLE)
    path.chmod(0)
    refused(path, "permission")


class TestSplit:
    """A model in parts: the first is named, the others are found beside it."""

    def part(self, no, count, names, total=None, **more):
        values = [
            value("split.no", 2, struct.pack("<H", more.get("says", no))),
            value("split.count", 2, struct.pack("<H", count)),
            value("split.tensors.count", 5, struct.pack("<i", total if total is not None else count)),
        ]
        infos = [info(name, (4,), 0, 32 * i) for i, name in enumerate(names)]
        return build(values, infos, (bytes([no + 1]) * 16 + bytes(16)) * len(names))

    @pytest.fixture
    def parts(self, save):
        return lambda *raws: [save(raw, f"m-{i:05}-of-{len(raws):05}.gguf") for i, raw in enumerate(raws, 1)]

    def test_all_parts_are_one_model(self, parts):
        first, *rest = parts(self.part(0, 3, ["a"]), self.part(1, 3, ["b"]), self.part(2, 3, ["c"]))
        model = open_gguf(first)
        assert {name: tensor.data[0] for name, tensor in model.tensors.items()} == {"a": 1, "b": 2, "c": 3}
        assert model.nbytes == sum(path.stat().st_size for path in [first, *rest])
        assert len(model.maps) == 3

    def test_gguf_py_s_own_splits(self, tmp_path):
        writer = gguf.GGUFWriter(tmp_path / "w.gguf", "llama4", split_max_tensors=1)
        for name in "abc":
            writer.add_tensor(name, np.full(8, ord(name), np.float32))
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
            step()
        model = open_gguf(tmp_path / "w-00001-of-00003.gguf")
        assert {name: tensor.data.view(np.float32)[0] for name, tensor in model.tensors.items()} == {"a": 97, "b": 98, "c": 99}

    def test_a_missing_part_is_named(self, parts):
        first, second = parts(self.part(0, 2, ["a"]), self.part(1, 2, ["b"]))
        second.unlink()
        refused(first, "m-00002-of-00002.gguf")

    def test_another_part_points_to_the_first(self, parts):
        _, second = parts(self.part(0, 2, ["a"]), self.part(1, 2, ["b"]))
        refused(second, "m-00001-of-00002.gguf")

    def test_a_renamed_part(self, save):
        refused(save(self.part(0, 2, ["a"])), "-00001-of-00002.gguf")

    @pytest.mark.parametrize(
        "second",
        [
            lambda self: self.part(1, 2, ["a"]),
            lambda self: self.part(1, 2, ["b", "c"]),
            lambda self: self.part(1, 2, ["b"], says=0),
            lambda self: self.part(1, 3, ["b"], total=2),
            lambda self: build([], [info("b", (4,))], bytes(16)),
            lambda self: self.part(1, 2, ["b"])[:-17],
        ],
        ids=["same tensor", "too many tensors", "says it is the first", "of another count", "no part at all", "cut short"],
    )
    def test_parts_that_do_not_belong_together(self, parts, second):
        refused(parts(self.part(0, 2, ["a"]), second(self))[0])

    def test_an_absurd_count(self, save):
        raw = build([value("split.count", U32, struct.pack("<I", 1 << 30))])
        refused(save(raw, "m-00001-of-00002.gguf"), "99999")


def test_a_large_vocabulary_opens_without_reading_its_words(save):
    n = 100_000
    raw = build([array("tokenizer.ggml.tokens", STRING, n, b"".join(text(f"token {i}") for i in range(n)))])
    path = save(raw)
    tracemalloc.start()
    model = open_gguf(path)
    assert tracemalloc.get_traced_memory()[1] < len(raw) // 4
    tracemalloc.stop()
    assert model.metadata["tokenizer.ggml.tokens"][-1] == f"token {n - 1}"
    assert model.metadata["tokenizer.ggml.tokens"] is model.metadata["tokenizer.ggml.tokens"]
