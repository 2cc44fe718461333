"""Importance matrices: what the engine collects against the oracle's inputs, the file both ways, what is wrong with one."""

import os
import struct

import gguf
import numpy as np
import oracle
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamacli.engine import Engine
from llamacli.errors import LlamacliError, ModelFileError, OutputError, UsageError
from llamacli.files.gguf import open_gguf
from llamacli.llama4.config import Config
from quantize.imatrix import Imatrix, checked, collected, read_imatrix, write_imatrix

GATE = "blk.0.ffn_gate_exps.weight"


class Watched(np.ndarray):
    """A weight of the oracle's that writes down the inputs it is multiplied with."""

    def __array_finalize__(self, parent):
        self.name, self.expert, self.log = (getattr(parent, field, None) for field in ("name", "expert", "log"))

    def __getitem__(self, expert):
        found = super().__getitem__(expert)
        found.expert = int(expert)
        return found

    def __array_ufunc__(self, ufunc, method, *inputs, **how):
        plain = [np.asarray(x) for x in inputs]
        if ufunc is np.matmul:
            weight, x = inputs[1], np.atleast_2d(plain[0])
            sums, counts = weight.log[weight.name]
            sums[weight.expert or 0] += (x * x).sum(0)
            counts[weight.expert or 0] += len(x)
        return getattr(ufunc, method)(*plain, **how)


@pytest.fixture
def expected(monkeypatch):
    """expected(path, ids): {tensor: (sums, counts)} by the oracle."""
    plain = oracle._values

    def collect(path, ids):
        log = {}

        def values(tensor):
            found = plain(tensor)
            if not tensor.name.startswith("blk.") or found.ndim == 1:
                return found
            found = found.view(Watched)
            found.name, found.log = tensor.name, log
            n = len(found) if found.ndim == 3 else 1
            log[tensor.name] = np.zeros((n, found.shape[-1])), np.zeros(n)
            return found

        monkeypatch.setattr(oracle, "_values", values)
        oracle.logits(path, ids, kv=np.float16)
        return log

    return collect


def engine(path, threads=2, slots=0):
    file = open_gguf(path)
    return Engine(file, Config.from_gguf(file), threads=threads, slots=slots)


def tokens(n):
    return np.random.RandomState(0).randint(0, 257, n)


def by_name(inputs):
    return {name: (sums, counts) for names, sums, counts in inputs for name in names}


SHAPES = {
    "scout": tiny.SCOUT,
    "maverick": tiny.MAVERICK,
    "top-2 experts": {"used": 2},
    "one batch": {"chunk": 8192},  # more tokens than the first buffers hold
    "odd widths": {"n_embd": 72, "n_ff_exp": 40, "n_ff": 104, "moe_step": 2},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("threads", "slots"), [(1, 0), (3, 0), (2, 5)], ids=["1 thread", "3 threads", "experts fetched"])
def test_the_engine_adds_up_the_squares_of_what_every_weight_is_multiplied_with(tmp_path, expected, shape, threads, slots):
    path, ids = tiny.tiny_gguf(tmp_path / "tiny.gguf", seed=3, **shape), tokens(41)
    model = engine(path, threads, slots)
    inputs = by_name(model.watch())
    cache = model.new_cache(41)
    model.forward(ids[:7], cache)
    model.forward(ids[7:], cache)
    wanted = expected(path, ids)
    assert inputs.keys() == wanted.keys()
    for name, (sums, counts) in wanted.items():
        np.testing.assert_array_equal(inputs[name][1], counts, name)
        np.testing.assert_allclose(inputs[name][0], sums, 2e-3, 1e-4 * sums.max(), err_msg=name)


def test_quantized_weights_are_weighed_by_their_float_inputs(tmp_path, expected):
    path, ids = tiny.tiny_gguf(tmp_path / "tiny.gguf", types=lambda name: "Q8_0", experts=1, n_ff_exp=64), tokens(20)
    model = engine(path)
    inputs = by_name(model.watch())
    model.forward(ids, model.new_cache(20))
    for name, (sums, _) in expected(path, ids).items():
        assert np.abs(inputs[name][0] - sums).sum() / sums.sum() < 0.05, name  # what int8 activations cost


def test_watching_changes_no_logit_and_a_second_watch_begins_anew(tmp_path):
    model, ids = engine(tiny.tiny_gguf(tmp_path / "tiny.gguf")), tokens(20)
    before = model.forward(ids, model.new_cache(20), all_logits=True)
    first = by_name(model.watch())
    np.testing.assert_array_equal(model.forward(ids, model.new_cache(20), all_logits=True), before)
    second = by_name(model.watch())
    model.forward(ids, model.new_cache(20))
    for name, (sums, counts) in first.items():
        np.testing.assert_array_equal(second[name][0], sums)
        np.testing.assert_array_equal(second[name][1], counts)


# the file


def matrix(path):
    rng = np.random.default_rng(0)
    experts = (GATE, "blk.0.ffn_up_exps.weight"), rng.random((3, 8)), np.array([4, 0, 2])
    dense = ("blk.0.attn_q.weight",), rng.random((1, 8)), np.array([6])
    return collected(path, [experts, dense], "wiki.txt", 3, 512)


def test_what_is_written_is_read_again(tmp_path):
    made = matrix(tmp_path / "m.gguf")
    write_imatrix(made)
    found = read_imatrix(made.path)
    assert found[2:] == (["wiki.txt"], 3, 512)
    assert found.entries.keys() == made.entries.keys()
    for name, entry in made.entries.items():
        np.testing.assert_array_equal(found.entries[name].sums, entry.sums)
        np.testing.assert_array_equal(found.entries[name].counts, entry.counts)
    with pytest.raises(OutputError):
        write_imatrix(made)
    write_imatrix(made, force=True)


def test_the_file_has_the_fields_that_llama_quantize_asks_for(tmp_path):
    write_imatrix(matrix(tmp_path / "m.gguf"))
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert reader.get_field("general.type").contents() == "imatrix"
    assert reader.get_field("imatrix.datasets").contents() == ["wiki.txt"]
    for key, value in (("chunk_count", 3), ("chunk_size", 512)):
        field = reader.get_field("imatrix." + key)
        assert (field.contents(), field.types) == (value, [gguf.GGUFValueType.UINT32])
    shapes = {t.name: t.shape.tolist() for t in reader.tensors}
    assert shapes[GATE + ".in_sum2"] == [8, 3]
    assert shapes[GATE + ".counts"] == [1, 3]
    assert all(t.tensor_type == gguf.GGMLQuantizationType.F32 for t in reader.tensors)


def test_llama_imatrix_leaves_out_dimensions_of_one(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "")
    writer.add_type("imatrix")
    writer.add_tensor("blk.0.attn_q.weight.in_sum2", np.float32([2, 4, 6, 8]))
    writer.add_tensor("blk.0.attn_q.weight.counts", np.float32([2]))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    found = read_imatrix(tmp_path / "m.gguf")
    np.testing.assert_array_equal(found.weights("blk.0.attn_q.weight", (10, 4)), [[1, 2, 3, 4]])


def dat(*entries, tail=b""):
    raw = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        raw += struct.pack("<i", len(name)) + name.encode() + struct.pack(f"<ii{len(values)}f", calls, len(values), *values)
    return raw + tail


def test_the_older_dat_is_read_too(tmp_path):
    path = tmp_path / "m.dat"
    path.write_bytes(dat(("a", 2, [2.0, 4.0, 6.0, 8.0]), tail=struct.pack("<ii", 7, 4) + b"text"))
    found = read_imatrix(path)
    assert found[2:] == (["text"], 7, 0)
    np.testing.assert_array_equal(found.weights("a", (5, 4)), [[1, 2, 3, 4]])
    np.testing.assert_array_equal(found.weights("a", (2, 5, 2)), [[1, 2], [3, 4]])


# what an encoder asks for


def test_weights_are_mean_squares_and_unseen_experts_get_the_mean_of_the_others(tmp_path):
    made = matrix(tmp_path / "m.gguf")
    found = made.weights(GATE, (3, 16, 8))
    assert (found.dtype, found.shape) == (np.float32, (3, 8))
    sums = made.entries[GATE].sums
    np.testing.assert_allclose(found[[0, 2]], sums[[0, 2]] / [[4], [2]], 1e-6)
    np.testing.assert_allclose(found[1], (sums[0] / 4 + sums[2] / 2) / 2, 1e-6)
    assert made.unseen == {GATE: [1], "blk.0.ffn_up_exps.weight": [1]}
    assert made.weights("output.weight", (9, 8)) is None


def test_experts_of_which_none_was_seen_weigh_all_columns_alike(tmp_path):
    entry = checked(tmp_path, "a", np.zeros((2, 4)), np.zeros(2))
    made = Imatrix(tmp_path, {"a": entry}, [], 0, 0)
    np.testing.assert_array_equal(made.weights("a", (2, 3, 4)), np.ones((2, 4)))


@pytest.mark.parametrize("shape", [(3, 16, 9), (4, 16, 8), (16, 8), (2, 16, 12)])
def test_the_matrix_of_another_model_is_refused(tmp_path, shape):
    with pytest.raises(UsageError, match=rf"m\.gguf: expected .* {GATE}.*3 x 8"):
        matrix(tmp_path / "m.gguf").weights(GATE, shape)


# files that cannot be trusted


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
@pytest.mark.parametrize("where", ["sums", "counts"])
def test_numbers_that_cannot_be_sums_are_refused_on_reading_and_on_writing(tmp_path, value, where):
    made = matrix(tmp_path / "m.gguf")
    getattr(made.entries[GATE], where).flat[1] = value
    write_imatrix(made)
    with pytest.raises(ModelFileError, match="ffn_gate_exps"):
        read_imatrix(made.path)
    entry = made.entries[GATE]
    with pytest.raises(ModelFileError, match="ffn_gate_exps"):
        collected(made.path, [((GATE,), *entry)], "", 1, 1)


def test_sums_beyond_float32_are_refused(tmp_path):
    with pytest.raises(ModelFileError, match="ffn_gate_exps"):
        collected(tmp_path, [((GATE,), np.full((1, 4), 1e39), np.ones(1))], "", 1, 1)


@pytest.mark.parametrize(
    "fault, named",
    [
        (lambda t: t.pop(GATE + ".counts"), "counts"),
        (lambda t: t.pop(GATE + ".in_sum2"), "in_sum2"),
        (lambda t: t.update({GATE + ".counts": np.ones((4, 1), np.float32)}), "3 counts"),
        (lambda t: t.update({GATE + ".in_sum2": np.ones((3, 8), np.float16)}), "F16"),
        (lambda t: t.update({"blk.0.attn_q.weight": np.ones((3, 8), np.float32)}), "importance matrix"),
        (lambda t: t.clear(), "importance matrix"),
    ],
)
def test_what_is_no_importance_matrix_is_named(tmp_path, fault, named):
    tensors = {GATE + ".in_sum2": np.ones((3, 8), np.float32), GATE + ".counts": np.ones((3, 1), np.float32)}
    fault(tensors)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "")
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(ModelFileError) as error:
        read_imatrix(tmp_path / "m.gguf")
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    write_imatrix(matrix(tmp_path / "m.gguf"))
    whole = (tmp_path / "m.gguf").read_bytes()
    last = whole.rindex(np.float32([4, 0, 2]).tobytes())  # behind the counts of the last tensor there is only padding
    for end in {*range(0, last, 37), last + 11}:
        (tmp_path / "cut.gguf").write_bytes(whole[:end])
        with pytest.raises(ModelFileError):
            read_imatrix(tmp_path / "cut.gguf")


def test_a_dat_cut_anywhere_is_refused(tmp_path):
    whole = dat(("a", 2, [2.0, 4.0]), ("b", 1, [1.0]))
    for end in range(len(whole)):
        (tmp_path / "cut.dat").write_bytes(whole[:end])
        with pytest.raises(ModelFileError):
            read_imatrix(tmp_path / "cut.dat")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(tmp_path, raw):
    (tmp_path / "any").write_bytes(raw)
    try:
        read_imatrix(tmp_path / "any")
    except ModelFileError as error:
        assert "\n" not in str(error)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "nothing"):
        with pytest.raises(LlamacliError):
            read_imatrix(path)
