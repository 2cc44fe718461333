"""GGUF: files of all writers are read; hostile and damaged files are refused in one line, without large allocations."""

import errno
import io
import mmap
import os
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import checkpoint
import gguf
import numpy as np
import pytest
from gguf_bytes import file, info, llama4, pair, string
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupts import run_traced

from llamacli.errors import CheckpointError, ModelFileError, UnsupportedModelError
from llamacli.files import gguf as gguf_module
from llamacli.files.gguf import open_gguf
from llamacli.llama4.config import Config
from llamacli.text.tokenizer import Tokenizer
from quantize.safetensors import open_checkpoint

NUMBERS = {"u8": 255, "i8": -128, "u16": 65535, "i16": -32768, "u32": 2**32 - 1, "i32": -(2**31), "f32": 0.5, "bool": True,
           "u64": 2**64 - 1, "i64": -(2**63), "f64": 1e300}  # fmt: skip
PAIRS = [pair(kind, kind, number) for kind, number in NUMBERS.items()] + [
    pair("text", "string", "größe 🦙"),
    pair("words", "array", ("string", ["one", "", "zwei 🦙"])),
    pair("numbers", "array", ("i32", [1, -2, 3])),
    pair("flags", "array", ("bool", [True, False])),
    pair("nothing", "array", ("f32", [])),
]
INFOS = [info("a", (32, 2)), info("b", (64, 3), kind=8, offset=256)]  # F32 [2, 32], Q8_0 [3, 64]
DATA = bytes(range(256)) + bytes(204)
SOUND = file(PAIRS, INFOS, DATA)


@pytest.fixture
def opened(tmp_path):
    def write_and_open(raw, name="model.gguf"):
        path = tmp_path / name
        path.write_bytes(raw)
        return open_gguf(path)

    return write_and_open


@pytest.fixture
def refused(opened):
    """Opens bytes that must not open; returns the message."""

    def message(raw, name="model.gguf", error=ModelFileError):
        with pytest.raises(error) as caught:
            opened(raw, name)
        text = str(caught.value)
        assert "\n" not in text
        assert text.isprintable()
        assert len(text) < 700
        return text

    return message


class TestSoundFiles:
    @pytest.mark.parametrize("version", [2, 3])
    def test_every_kind_of_value_is_read(self, opened, version):
        found = opened(file(PAIRS, INFOS, DATA, version=version))
        assert found.version == version
        assert {kind: found.metadata[kind] for kind in NUMBERS} == NUMBERS
        assert type(found.metadata["bool"]) is bool
        assert found.metadata["text"] == "größe 🦙"
        assert found.metadata["words"] == ["one", "", "zwei 🦙"]
        assert found.metadata["numbers"].tolist() == [1, -2, 3]
        assert found.metadata["flags"].tolist() == [True, False]
        assert found.metadata["flags"].dtype == bool
        assert found.metadata["nothing"].dtype == np.float32
        assert len(found.metadata) == len(PAIRS)
        assert next(iter(found.metadata)) == "u8"
        assert found.metadata.get("absent") is None

    def test_tensors_are_views_in_numpy_s_order(self, opened):
        found = opened(SOUND)
        a, b = found.tensors["a"], found.tensors["b"]
        assert (a.name, a.type.name, a.shape, a.nbytes) == ("a", "F32", (2, 32), 256)
        assert (b.type.name, b.shape, b.nbytes) == ("Q8_0", (3, 64), 204)
        assert a.data.tobytes() == bytes(range(256))
        assert a.data.dtype == np.uint8 and a.data.ndim == 1
        assert not a.data.flags.writeable
        assert not a.data.flags.owndata
        assert found.nbytes == len(SOUND)

    def test_views_outlive_the_file_object(self, opened):
        data = opened(SOUND).tensors["a"].data
        assert data.tobytes() == bytes(range(256))

    def test_a_file_without_tensors_opens(self, opened):
        assert opened(file(PAIRS)).tensors == {}

    @pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
    def test_alignment_moves_the_data(self, opened, alignment):
        pairs = [pair("general.alignment", "u32", alignment)]
        found = opened(file(pairs, [info("a", (8,))], bytes(range(32)), alignment=alignment))
        assert found.tensors["a"].data.tobytes() == bytes(range(32))

    def test_a_file_of_gguf_py_is_read(self, tmp_path):
        path = tmp_path / "theirs.gguf"
        writer = gguf.GGUFWriter(path, "llama4")
        writer.add_block_count(3)
        writer.add_rope_freq_base(5e5)
        writer.add_token_list(["a", "b", "ü"])
        writer.add_array("scores", [0.5, 1.5])
        tensors = {f"t{n}": np.random.default_rng(n).normal(size=(n, 32)).astype(np.float32) for n in (1, 3, 5)}
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor)
        half = gguf.quantize(tensors["t3"], gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor("quantized", half, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
            write()
        found = open_gguf(path)
        assert found.metadata["general.architecture"] == "llama4"
        assert found.metadata["llama4.block_count"] == 3
        assert found.metadata["tokenizer.ggml.tokens"] == ["a", "b", "ü"]
        assert found.metadata["scores"].tolist() == [0.5, 1.5]
        for name, tensor in tensors.items():
            assert found.tensors[name].shape == tensor.shape
            assert found.tensors[name].data.tobytes() == tensor.tobytes()
        assert found.tensors["quantized"].shape == (3, 32)
        assert found.tensors["quantized"].data.tobytes() == half.tobytes()

    def test_text_that_is_no_utf8_does_not_stop_a_model(self, opened):
        assert opened(file([pair("general.author", "string", b"Jos\xe9")])).metadata["general.author"] == "Jos\ufffd"

    def test_text_that_is_no_utf8_can_be_written_again_as_it_was(self, opened):
        words = ["a", "größe".encode("latin-1")]
        metadata = opened(
            file(
                [pair("author", "string", b"Jos\xe9"), pair("mark", "string", "\ufffd"), pair("w", "array", ("string", words))]
            )
        ).metadata
        assert [metadata.typed(key) for key in ("author", "mark", "w")] == [b"Jos\xe9", "\ufffd", [b"a", words[1]]]

    @pytest.mark.parametrize("block", [1, 7, 64, 1000])
    def test_the_size_of_the_blocks_read_does_not_change_the_header(self, opened, monkeypatch, block):
        expected = opened(SOUND)
        monkeypatch.setattr(gguf_module, "_BLOCK", block)
        found = opened(SOUND)
        assert repr(dict(found.metadata)) == repr(dict(expected.metadata))
        assert found.tensors["b"].data.tobytes() == expected.tensors["b"].data.tobytes()

    @pytest.mark.parametrize("words", [["a", "", "zwei"], ["a\0b", ""], ["\0"], []])
    @pytest.mark.parametrize("loaded", [False, True])
    def test_compiled_or_not_a_list_of_strings_is_the_same(self, opened, monkeypatch, words, loaded):
        monkeypatch.setattr(gguf_module, "_COMPILED", "sys" if loaded else "no such module")
        assert opened(file([pair("words", "array", ("string", words))])).metadata["words"] == words

    def test_a_vocabulary_is_read_without_a_compiler(self, tmp_path):
        path = tmp_path / "model.gguf"
        path.write_bytes(LLAMA4)
        read = "import sys; from llamacli.files.gguf import open_gguf; print(len(open_gguf(sys.argv[1]).metadata[sys.argv[2]]))"
        code = read + "; assert not {'numba', 'llvmlite'} & set(sys.modules)"
        child = subprocess.run([sys.executable, "-c", code, path, "tokenizer.ggml.tokens"], capture_output=True, text=True)
        assert (child.returncode, child.stdout) == (0, "259\n"), child.stderr

    def test_a_tensor_can_be_read_without_its_map(self, opened):
        found = opened(SOUND)
        assert found.tensors["b"].read() == found.tensors["b"].data.tobytes()
        os.truncate(found.path, 0)
        with pytest.raises(ModelFileError, match="expected 204 bytes of b, found 0"):
            found.tensors["b"].read()

    def test_lists_of_strings_are_decoded_when_asked_for_and_once(self, opened):
        metadata = opened(SOUND).metadata
        assert metadata["words"] is metadata["words"]

    def test_a_large_vocabulary_is_read_in_a_few_steps_for_each_string(self, opened):
        """Llama 3's has 400,000 strings, in half a second."""
        tokens = [f"token{n}" for n in range(10_000)]
        merges = [f"left{n} right{n}" for n in range(20_000)]
        raw = file([pair("tokens", "array", ("string", tokens)), pair("merges", "array", ("string", merges))])
        found = []
        steps = run_traced(lambda: found.extend(map(opened(raw).metadata.get, ("tokens", "merges"))), gguf_module)
        assert found == [tokens, merges]
        assert steps < 8 * 30_000


class TestSplitFiles:
    @staticmethod
    def parts(count=3, **changed):
        """Bytes of the parts, one tensor each; `changed`: pairs in place of the usual ones of part 2."""
        for no in range(count):
            values = {"split.no": no, "split.count": count, "split.tensors.count": count} | (changed if no == 1 else {})
            pairs = [pair(key.replace("_", "."), "u16", number) for key, number in values.items()]
            pairs += [pair("name", "string", "first")] if no == 0 else []
            yield file(pairs, [info(f"t{no}", (32,))], bytes([no]) * 128)

    @staticmethod
    def write(folder, parts, stem="model", count=3):
        paths = [folder / f"{stem}-{no:05}-of-{count:05}.gguf" for no in range(1, count + 1)]
        for path, raw in zip(paths, parts, strict=True):
            path.write_bytes(raw)
        return paths

    def test_the_first_part_opens_all(self, tmp_path):
        paths = self.write(tmp_path, self.parts())
        found = open_gguf(paths[0])
        assert list(found.tensors) == ["t0", "t1", "t2"]
        assert found.tensors["t2"].data.tobytes() == bytes([2]) * 128
        assert found.metadata["name"] == "first"
        assert found.nbytes == sum(path.stat().st_size for path in paths)
        assert found.path == paths[0]

    def test_a_later_part_names_the_first(self, tmp_path):
        paths = self.write(tmp_path, self.parts())
        with pytest.raises(ModelFileError, match=r"part 2; open model-00001-of-00003\.gguf"):
            open_gguf(paths[1])

    def test_a_missing_part_is_named(self, tmp_path):
        paths = self.write(tmp_path, self.parts())
        paths[2].unlink()
        with pytest.raises(ModelFileError, match=r"model-00003-of-00003\.gguf: expected part 3 of a model of 3"):
            open_gguf(paths[0])

    def test_a_damaged_part_is_named(self, tmp_path):
        paths = self.write(tmp_path, self.parts())
        paths[1].write_bytes(paths[1].read_bytes()[:-1])
        with pytest.raises(ModelFileError, match=r"model-00002-of-00003\.gguf: .*cut short"):
            open_gguf(paths[0])

    def test_parts_with_other_names_are_refused(self, tmp_path):
        (tmp_path / "first.gguf").write_bytes(next(iter(self.parts())))
        with pytest.raises(ModelFileError, match=r"a name like model-00001-of-00003\.gguf"):
            open_gguf(tmp_path / "first.gguf")

    @pytest.mark.parametrize("changed", [{"split_no": 2}, {"split_count": 4}], ids=str)
    def test_a_part_of_another_model_is_refused(self, tmp_path, changed):
        changed = {key.replace("_", "."): number for key, number in changed.items()}
        paths = self.write(tmp_path, self.parts(**changed))
        with pytest.raises(ModelFileError, match=r"00002-of-00003\.gguf: expected split\.no 1 and split\.count 3"):
            open_gguf(paths[0])

    def test_a_tensor_in_two_parts_is_refused(self, tmp_path):
        first, second, _ = self.parts()
        paths = self.write(tmp_path, [first, second, second.replace(*[pair("split.no", "u16", n) for n in (1, 2)])])
        with pytest.raises(ModelFileError, match="found t1 in two"):
            open_gguf(paths[0])

    def test_a_wrong_number_of_tensors_is_refused(self, tmp_path):
        first, *others = self.parts()
        changed = first.replace(*[pair("split.tensors.count", "u16", n) for n in (3, 4)])
        paths = self.write(tmp_path, [changed, *others])
        with pytest.raises(ModelFileError, match="expected 4 tensors in all parts, found 3"):
            open_gguf(paths[0])

    @pytest.mark.parametrize(
        "key, kind, content",
        [
            ("split.count", "string", "3"),
            ("split.count", "array", ("u16", [3, 3])),
            ("split.count", "u64", 2**64 - 1),
            ("split.count", "u32", 100_000),
            ("split.no", "array", ("u16", [0, 0])),
            ("split.tensors.count", "f32", float("nan")),
        ],
        ids=str,
    )
    def test_absurd_numbers_are_refused(self, tmp_path, key, kind, content):
        first, *others = self.parts()
        usual = {"split.no": 0, "split.count": 3, "split.tensors.count": 3}
        changed = first.replace(pair(key, "u16", usual[key]), pair(key, kind, content))
        paths = self.write(tmp_path, [changed, *others])
        with pytest.raises(ModelFileError):
            open_gguf(paths[0])


class TestWhatIsNoModel:
    def test_files_of_other_formats_are_refused(self, refused):
        assert "starts with b'PK" in refused(b"PK\x03\x04" + bytes(100))
        assert "found 0" in refused(b"")
        assert "at least 24 bytes, found 4" in refused(b"GGUF")

    def test_a_missing_file_is_refused(self, tmp_path):
        with pytest.raises(ModelFileError, match="no file of that name"):
            open_gguf(tmp_path / "absent.gguf")

    def test_a_folder_is_refused(self, tmp_path):
        with pytest.raises(ModelFileError, match="found a folder"):
            open_gguf(tmp_path)

    def test_a_pipe_is_refused_without_waiting_for_it(self, tmp_path):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ModelFileError, match="not a file"):
            open_gguf(tmp_path / "pipe")

    def test_a_file_without_permission_is_refused(self, tmp_path, monkeypatch):
        def denied(*args, **kwargs):
            raise PermissionError(13, "Permission denied")

        (tmp_path / "model.gguf").write_bytes(SOUND)
        monkeypatch.setattr(Path, "open", denied)  # root may read everything, so that chmod proves nothing there
        with pytest.raises(ModelFileError, match="may not be read"):
            open_gguf(tmp_path / "model.gguf")

    @pytest.mark.parametrize("name", ["a\0b", "x" * 5000])
    def test_impossible_names_are_refused(self, name):
        with pytest.raises(ModelFileError):
            open_gguf(name)

    @pytest.mark.parametrize("version, found", [(1, "version 1"), (4, "version 4"), (3 << 24, "big-endian")])
    def test_other_versions_are_refused_by_name(self, refused, version, found):
        assert found in refused(file(version=version))


class TestDamagedFiles:
    @pytest.mark.parametrize("at", [0, 30, 200])
    def test_a_disk_that_fails_in_the_header_is_an_error(self, tmp_path, monkeypatch, at):
        class Failing(io.FileIO):
            def read(self, n):
                if self.tell() + n > at:
                    raise OSError(5, "Input/output error")
                return super().read(n)

        path = tmp_path / "model.gguf"
        path.write_bytes(SOUND)
        monkeypatch.setattr(gguf_module, "_BLOCK", 16)
        monkeypatch.setattr(Path, "open", lambda path, mode: Failing(path))
        with pytest.raises(ModelFileError, match=r"Input/output error.*the disk"):
            open_gguf(path)

    def test_a_file_cut_while_its_header_is_read(self, tmp_path, monkeypatch):
        class Cut(io.FileIO):
            def read(self, n):
                return super().read(n)[: n // 2]

        path = tmp_path / "model.gguf"
        path.write_bytes(SOUND)
        monkeypatch.setattr(Path, "open", lambda path, mode: Cut(path))
        with pytest.raises(ModelFileError, match="cut short"):
            open_gguf(path)

    @pytest.mark.parametrize(
        ("counts", "words"), [((0, 1 << 20), "16384 metadata values"), ((1 << 20, 0), "at most 65536 tensors")]
    )
    def test_more_entries_than_any_model_has_are_refused_before_they_are_read(self, refused, counts, words):
        """A million of one byte each took 18 seconds. These would be refused as well, for one name twice, if they were read."""
        raw = b"GGUF" + struct.pack("<IQQ", 3, *counts) + bytes(40 << 20)
        assert words in refused(raw)

    @pytest.mark.parametrize("length", [1, 1 << 20, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 8])
    def test_the_length_of_a_string_past_the_end_is_not_believed(self, refused, length):
        raw = file([string("words") + struct.pack("<IIQQQ", 9, 8, 2, 0, length)])
        assert "2 strings for words" in refused(raw)

    def test_a_list_of_more_strings_than_any_vocabulary_has_is_refused(self, refused):
        pairs = [string("words") + struct.pack("<IIQ", 9, 8, 1 << 23) + bytes(8 << 23)]
        assert "at most 4194304 strings" in refused(file(pairs))

    def test_metadata_larger_than_any_vocabulary_are_refused(self, refused, monkeypatch):
        monkeypatch.setattr(gguf_module, "_MAX_HEADER", 1 << 20)
        assert "at most 1 MB" in refused(file([pair("numbers", "array", ("i32", [0] * (1 << 18)))]))

    def test_a_file_cut_at_any_byte_is_refused(self, tmp_path):
        path = tmp_path / "cut.gguf"
        for length in range(len(SOUND)):
            path.write_bytes(SOUND[:length])
            with pytest.raises(ModelFileError):
                open_gguf(path)

    @pytest.mark.parametrize("kind", ["string", "i32"])
    def test_a_file_cut_in_its_last_list_is_refused(self, tmp_path, kind):
        raw = file([pair("list", "array", (kind, ["a", "bcd", ""] if kind == "string" else [1, 2, 3]))])
        path = tmp_path / "cut.gguf"
        path.write_bytes(raw)
        assert len(open_gguf(path).metadata["list"]) == 3
        for length in range(len(raw)):
            path.write_bytes(raw[:length])
            with pytest.raises(ModelFileError):
                open_gguf(path)

    @pytest.mark.parametrize("count", [2**64 - 1, 2**63, 2**32, 2**31 - 1, 10**7], ids=hex)
    def test_a_huge_number_anywhere_allocates_nothing(self, tmp_path, count):
        """The number replaces 8 bytes at each place of the header in turn: every count, length, offset and dimension."""
        path, header = tmp_path / "huge.gguf", len(SOUND) - len(DATA)
        for at in range(8, header - 8):
            path.write_bytes(SOUND[:at] + struct.pack("<Q", count) + SOUND[at + 8 :])
            assert peak_of(path) < 300_000

    @pytest.mark.parametrize(
        "pairs, infos, words",
        [
            ([pair("k", "u8", 1)] * 2, [], "metadata key k once"),
            ([string(b"\xff") + struct.pack("<IB", 0, 1)], [], "UTF-8 in a metadata key"),
            ([string("k" * 70_000) + struct.pack("<IB", 0, 1)], [], "at most 65536 bytes"),
            ([string("k") + struct.pack("<IQ", 13, 0)], [], "value type from 0 to 12 for k, found 13"),
            ([string("k") + struct.pack("<IIQ", 9, 9, 0)], [], "numbers or strings in the list k"),
            ([string("k") + struct.pack("<IIQ", 9, 77, 0)], [], "values of type 77"),
            ([pair("general.alignment", "u32", 24)], [], "power of two"),
            ([pair("general.alignment", "u32", 0)], [], "power of two"),
            ([pair("general.alignment", "string", "32")], [], "power of two"),
            ([pair("general.alignment", "bool", True)], [], "power of two"),
            ([pair("general.alignment", "array", ("u32", [32, 32]))], [], "power of two"),
            ([], [info("a", (32,)), info("a", (32,), offset=128)], "tensor a once"),
            ([], [info("a", (64,)), info("b", (32,), offset=128)], "overlapping"),
            ([], [info("a", (32,), offset=1)], "multiple of 32"),
            ([], [info("a", (32,), offset=2**64 - 32)], "cut short"),
            ([], [info("a", (2**62, 2**62))], "cut short"),
            ([], [info("a", (2**32, 2**32, 2**32, 2**32))], "cut short"),
            ([], [info("a", (0,))], "shape [0]"),
            ([], [info("a", (32, 0))], "shape [0, 32]"),
            ([], [info("a", ())], "1 to 4 dimensions for tensor a, found 0"),
            ([], [info("a", (1, 1, 1, 1, 1))], "found 5"),
            ([], [info("a", (33,), kind=8)], "whole Q8_0 blocks of 32"),
            ([], [info("a", (2,) * 4, kind=12)], "whole Q4_K blocks of 256"),
            ([], [info(b"\xfe", (32,))], "UTF-8 in a tensor's name"),
        ],
    )
    def test_the_message_names_what_is_wrong(self, refused, pairs, infos, words):
        assert words in refused(file(pairs, infos, bytes(1024)))

    def test_an_unknown_type_is_named(self, refused):
        message = refused(file([], [info("blk.0.x", (32,), kind=999)], bytes(1024)), error=UnsupportedModelError)
        assert "blk.0.x" in message and "999" in message

    def test_messages_escape_names_for_the_terminal(self, refused):
        refused(file([], [info("\x1b[2J\n\u202e", (32,), kind=999)], bytes(1024)))
        refused(file([pair("\x1b]0;x\x07", "u8", 1)] * 2))
        assert "..." in refused(file([], [info("x" * 60_000, (32,), kind=999)], bytes(1024)))

    def test_a_list_of_strings_that_is_no_utf8_is_refused(self, opened):
        metadata = opened(file([pair("words", "array", ("string", ["a", b"\xff"]))])).metadata
        with pytest.raises(ModelFileError, match="UTF-8 in words"):
            metadata["words"]


def peak_of(path):
    """Opens a file and reads all of it; only ModelFileError may come. Returns the most memory that this took."""
    tracemalloc.start()
    try:
        found = open_gguf(path)
        for key in found.metadata:
            found.metadata[key]
        for tensor in found.tensors.values():
            assert tensor.data.nbytes == tensor.nbytes <= found.nbytes
        Config.from_gguf(found)
        Tokenizer.from_gguf(found)
    except ModelFileError as error:
        assert "\n" not in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


LLAMA4 = llama4()
HEADER = len(LLAMA4) - 64 * 260


class TestFuzz:
    def test_the_file_to_be_mutated_is_sound(self, opened):
        found = opened(LLAMA4)
        assert Config.from_gguf(found).n_experts == 4
        assert Tokenizer.from_gguf(found).encode("ab") == [257, 256]

    @pytest.mark.parametrize("key", ["added", "merges"])
    def test_zero_bytes_in_a_vocabulary_take_the_memory_of_other_letters(self, tmp_path, key):
        path, lists = tmp_path / "zeros.gguf", {"added": ["x y"], "merges": ["a b"]}
        peaks = []
        for letter in "x\0":
            path.write_bytes(llama4(**lists | {key: [*lists[key], letter * 500_000]}))
            peaks.append(peak_of(path))
        assert peaks[1] < 1.2 * peaks[0]

    @settings(max_examples=400)
    @given(
        changes=st.lists(st.tuples(st.integers(4, HEADER - 1), st.binary(min_size=1, max_size=9)), min_size=1, max_size=4),
        length=st.just(len(LLAMA4)) | st.integers(0, len(LLAMA4)),
    )
    def test_any_mutation_is_read_or_refused(self, tmp_path_factory, changes, length):
        raw = bytearray(LLAMA4)
        for at, new in changes:
            raw[at : at + len(new)] = new
        path = tmp_path_factory.getbasetemp() / "mutant.gguf"
        path.write_bytes(raw[:length])
        assert peak_of(path) < 3_000_000

    @settings(max_examples=200)
    @given(junk=st.binary(max_size=400), counts=st.tuples(st.integers(0, 5), st.integers(0, 5)))
    def test_junk_behind_a_sound_start_is_read_or_refused(self, tmp_path_factory, junk, counts):
        path = tmp_path_factory.getbasetemp() / "junk.gguf"
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + junk)
        assert peak_of(path) < 300_000


@pytest.mark.parametrize(
    ("number", "advice"), [(errno.ENOMEM, "ulimit -v"), (errno.EMFILE, "ulimit -n"), (errno.EIO, "check the")]
)
def test_a_limit_of_the_process_is_told_from_a_file_that_is_damaged(tmp_path, monkeypatch, number, advice):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    (tmp_path / "model.gguf").write_bytes(SOUND)
    checkpoint.write_safetensors(tmp_path / "model.safetensors", {"x": ("F32", np.zeros(4, np.float32))})
    monkeypatch.setattr(mmap, "mmap", refuse)
    for open_it, kind in (
        (lambda: open_gguf(tmp_path / "model.gguf"), ModelFileError),
        (lambda: open_checkpoint(tmp_path), CheckpointError),
    ):
        with pytest.raises(kind, match=f"{os.strerror(number)}.*{advice}"):
            open_it()


def test_a_file_system_without_shared_maps_is_mapped_privately(tmp_path, monkeypatch):
    """As FUSE refuses them with direct_io."""
    true = mmap.mmap

    def private_only(*arguments, access=0, **more):
        if access == mmap.ACCESS_READ:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        return true(*arguments, **more)

    (tmp_path / "model.gguf").write_bytes(SOUND)
    checkpoint.write_safetensors(tmp_path / "model.safetensors", {"x": ("F32", np.arange(4, dtype=np.float32))})
    expected = open_gguf(tmp_path / "model.gguf").tensors["a"].data
    monkeypatch.setattr(mmap, "mmap", private_only)
    found = open_gguf(tmp_path / "model.gguf").tensors["a"].data
    assert (found == expected).all()
    assert not found.flags.writeable
    values = open_checkpoint(tmp_path)["x"].data
    assert values.tolist() == [0, 1, 2, 3]
    assert not values.flags.writeable
