"""Tokenizer: the ids of an independent reference, special tokens only on request, text that survives the round trip."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import small_vocab as vocab
import tokenizers
from gguf_bytes import llama4
from hypothesis import given
from hypothesis import strategies as st

from llamacli.errors import ModelFileError, PromptError
from llamacli.files.gguf import open_gguf, zero_ended
from llamacli.text.tokenizer import Names, Tokenizer

TEXTS = [
    "",
    " ",
    "The quick brown fox",
    "They're HTTPServer's and I'LL",
    "Größe ÜBERmut Straße",
    "e\u0301te\u0301 हिन्दी भाषा",  # combining marks belong to their letter
    "ПРИВЕТ Привет",
    "你好世界",
    "1234567 89",
    "a  b   \n\n  c\r\n\td   ",
    "path//to/\n/x",
    "🦙🏽 👩‍👩‍👧 🇩🇪",
    "\x00\x7f\u2028\ufeff",
    "<|eot|> <|header_start|>",
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_gguf(vocab.in_memory())


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_plain_text_gives_the_reference_s_ids(tokenizer, text):
    assert tokenizer.encode(text, bos=False) == vocab.trained().encode(text).ids


@given(st.text(max_size=60))
def test_any_text_gives_the_reference_s_ids_and_comes_back(text):
    tokenizer = _shared()
    ids = tokenizer.encode(text, bos=False)
    assert ids == vocab.trained().encode(text).ids
    assert tokenizer.decode(ids) == text


def test_a_long_text_gives_the_reference_s_ids_and_other_threads_run_meanwhile(tokenizer):
    """Another thread can so handle Ctrl-C."""
    text, ticks, over = "The sea is salt, é🦙 and 12345 who asked? " * 20_000, [], threading.Event()

    def tick():
        while not over.wait(0.001):
            ticks.append(1)

    other = threading.Thread(target=tick)
    other.start()
    before = len(ticks)
    ids = tokenizer.encode(text, bos=False)
    ticked = len(ticks) - before
    over.set()
    other.join()
    assert ids == vocab.trained().encode(text).ids
    assert ticked > 5


@given(st.text(alphabet=st.sampled_from("<|>eothadr_sinfx🦙 \n"), max_size=60) | st.sampled_from(TEXTS))
def test_plain_text_never_becomes_a_special_token(text):
    tokenizer = _shared()
    ids = tokenizer.encode(text + "<|eot|>" + text, bos=False)
    assert not set(ids) & set(tokenizer.special_names.ids.values())
    assert tokenizer.decode(ids) == text + "<|eot|>" + text


def test_the_reference_stands_apart_from_a_pattern_without_marks_and_case():
    """This shows that the comparison above can fail: the other pattern splits the samples differently."""
    llama3 = Tokenizer.from_gguf(vocab.in_memory(pre="llama-bpe"))
    assert any(llama3.encode(text, bos=False) != vocab.trained().encode(text).ids for text in TEXTS)


@pytest.mark.parametrize("pre", ["llama4", "gpt-4o", "default", "anything", None])
def test_dialects_share_llama4_s_pattern(tokenizer, pre):
    other = Tokenizer.from_gguf(vocab.in_memory(pre=pre))
    assert all(other.encode(text) == tokenizer.encode(text) for text in TEXTS)


def test_a_whole_piece_of_the_vocabulary_is_taken_without_merging():
    tokens, kinds, merges = vocab.lists()
    tokenizer = Tokenizer.from_gguf(vocab.in_memory([*tokens, "zqzq"], [*kinds, 1], merges))
    assert tokenizer.encode("zqzq", bos=False) == [len(tokens)]


def test_a_special_token_that_looks_like_a_word_is_not_taken_whole():
    tokens, kinds, merges = vocab.lists()
    tokenizer = Tokenizer.from_gguf(vocab.in_memory([*tokens, "zqzq"], [*kinds, 3], merges))
    assert tokenizer.encode("zqzq", bos=False) == tokenizer.encode("zq", bos=False) * 2
    assert tokenizer.encode("zqzq", bos=False, special=True) == [len(tokens)]


def test_merges_that_end_in_a_special_token_are_refused():
    tokens, kinds, merges = vocab.lists()
    with pytest.raises(ModelFileError):
        Tokenizer.from_gguf(vocab.in_memory([*tokens, "qq"], [*kinds, 3], [*merges, "q q"]))


def test_a_merge_with_a_zero_byte_is_refused_and_is_not_two_merges(tmp_path):
    path = tmp_path / "zero.gguf"
    path.write_bytes(llama4(merges=["a b\0a b"]))
    for metadata in (open_gguf(path).metadata, {"tokenizer.ggml.merges": ["a b\0a b"]}):
        with pytest.raises(ValueError, match="zero byte"):
            zero_ended(metadata, "tokenizer.ggml.merges")
    with pytest.raises(ModelFileError, match="merges to be pairs of tokens, found a zero byte"):
        Tokenizer.from_gguf(open_gguf(path))


def test_special_tokens_on_request(tokenizer):
    eot, header = tokenizer.token_id("<|eot|>"), tokenizer.token_id("<|header_start|>")
    assert tokenizer.encode("<|header_start|>the<|eot|>", special=True) == [
        tokenizer.bos,
        header,
        *tokenizer.encode("the", bos=False),
        eot,
    ]
    assert tokenizer.encode("<|eot|><|eot|>", bos=False, special=True) == [eot, eot]
    assert tokenizer.encode("<|eot", bos=False, special=True) == tokenizer.encode("<|eot", bos=False)


def added(tokens, kind=4):
    texts, kinds, merges = vocab.lists()
    return Tokenizer.from_gguf(vocab.in_memory([*texts, *tokens], [*kinds, *[kind] * len(tokens)], merges))


WORDS = ["Lutetia", "statin", "<think>", "</think>", " Paris", "  ", "thequ", "thequick", "né", "a\u0301", "🦙🦙", "<tool"]


@given(st.lists(st.sampled_from([*WORDS, " ", "x", "the ", "<", "🦙", "é", "<|eot|>", "quick"]), max_size=12).map("".join))
def test_added_words_are_found_in_text_as_the_reference_finds_them(text):
    """They are user-defined, not special: in the fine-tune's training each was one token, wherever it occurred."""
    reference = tokenizers.Tokenizer.from_str(vocab.trained().to_str())
    reference.add_tokens([tokenizers.AddedToken(word, normalized=True) for word in WORDS])
    expected = [reference.id_to_token(i) for i in reference.encode(text).ids]
    mine = added(WORDS)
    ids = mine.encode(text, bos=False)
    assert [mine.token_id(token) for token in expected] == ids
    assert mine.decode(ids) == text


def test_an_added_word_is_shown_and_may_be_sampled():
    mine = added(WORDS)
    ids = [mine.token_id(word) for word in WORDS]
    assert mine.decode(ids) == "".join(WORDS)
    stream = mine.stream()
    assert "".join(map(stream.push, ids)) == "".join(WORDS)
    assert not set(ids) & set(mine.hidden_ids.tolist())


def test_an_added_word_that_bpe_knew_before_keeps_its_merges():
    texts, kinds, merges = vocab.lists()
    word = "".join(merges[0].split(" "))
    kinds = [4 if text == word else kind for text, kind in zip(texts, kinds, strict=True)]
    mine = Tokenizer.from_gguf(vocab.in_memory(texts, kinds, merges))
    assert all(mine.decode(mine.encode(text)) == text for text in TEXTS)
    assert mine.encode(word, bos=False) == [texts.index(word)]


def test_unused_tokens_are_neither_found_nor_sampled_nor_shown():
    mine = added(["[PAD999]"], kind=5)
    id = mine.token_id("[PAD999]")
    assert id not in mine.encode("[PAD999]", special=True)
    assert id in mine.hidden_ids
    assert mine.decode([id]) == ""


@pytest.mark.parametrize("count", [20_000, 200_000])
def test_many_special_names_are_searched_for_in_linear_time(count):
    """Some 0.3 s for 200,000; a pattern of all names took 26 s."""
    names = Names({f"{'<[('[i % 3]}name {i}{'>])'[i % 3]}": i for i in range(count)})
    text = "a <name 3> b [name 4](name 5)<name 3" * 1000
    assert [id for _, _, id in names.find(text)] == [3, 4, 5] * 1000


@given(st.lists(st.text("ab<", min_size=1, max_size=4), max_size=8), st.text("ab<", max_size=30))
def test_names_are_found_leftmost_and_longest(names, text):
    found, at = [], 0
    while at < len(text):
        match = max((name for name in names if text.startswith(name, at)), key=len, default="")
        found += [(at, at + len(match), names.index(match))] if match else []
        at += len(match) or 1
    assert list(Names({name: names.index(name) for name in names}).find(text)) == found


def test_names_that_begin_each_other_do_not_slow_the_search():
    names = Names({"a" * n: n for n in range(1, 500)})
    assert [id for _, _, id in names.find("a" * 1250)] == [499, 499, 252]


def test_names_that_are_no_tokens_stay_in_one_run_of_text(tokenizer):
    eot = tokenizer.token_id("<|eot|>")
    assert tokenizer.special_names.split("a<|nothing|>b<|x<|eot|><|eot|><|eot|") == ["a<|nothing|>b<|x", eot, eot, "<|eot|"]
    assert tokenizer.special_names.split("") == []


def test_bos_exactly_once(tokenizer):
    assert tokenizer.encode("x").count(tokenizer.bos) == 1
    assert tokenizer.encode("<|begin_of_text|>x", special=True).count(tokenizer.bos) == 1
    assert tokenizer.encode("<|begin_of_text|>x").count(tokenizer.bos) == 1  # as text it is no token
    assert tokenizer.encode("") == [tokenizer.bos]


def test_special_tokens_are_shown_on_request_only(tokenizer):
    ids = tokenizer.encode("<|header_start|>ab<|eot|>", special=True)
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, special=True) == "<|begin_of_text|><|header_start|>ab<|eot|>"


def test_a_text_of_control_type_normal_is_special_all_the_same():
    """A converter that marks <|eot|> as a normal token must not let users write it."""
    tokens, kinds, merges = vocab.lists()
    kinds = [1 if token == "<|eot|>" else kind for token, kind in zip(tokens, kinds, strict=True)]
    tokenizer = Tokenizer.from_gguf(vocab.in_memory(tokens, kinds, merges))
    assert "<|eot|>" in tokenizer.special_names.ids
    assert tokens.index("<|eot|>") not in tokenizer.encode("<|eot|>")
    assert tokens.index("<|eot|>") in tokenizer.stop_ids


def test_stop_tokens_by_text_and_by_metadata(tokenizer):
    tokens, _, _ = vocab.lists()
    assert tokenizer.stop_ids == {tokens.index(text) for text in ("<|end_of_text|>", "<|eom|>", "<|eot|>")}
    more = Tokenizer.from_gguf(vocab.in_memory(eos_token_id=tokens.index("<|step|>")))
    assert more.stop_ids == tokenizer.stop_ids | {tokens.index("<|step|>")}
    assert more.eos == tokens.index("<|step|>")
    ollama = Tokenizer.from_gguf(vocab.in_memory(eos_token_ids=np.array([tokens.index("<|step|>")])))
    assert ollama.stop_ids == more.stop_ids


def test_hidden_are_reserved_padding_and_structure_but_nothing_a_model_may_write(tokenizer):
    hidden = {vocab.lists()[0][i] for i in tokenizer.hidden_ids}
    assert hidden >= {
        "<|begin_of_text|>",
        "<|header_start|>",
        "<|header_end|>",
        "<|finetune_right_pad|>",
        "<|patch|>",
        "[PAD0]",
    }
    assert "<|text_post_train_reserved_special_token_0|>" in hidden
    assert not hidden & {
        "<|eot|>",
        "<|eom|>",
        "<|end_of_text|>",
        "<|python_start|>",
        "<|step|>",
        "<|reasoning_thinking_start|>",
    }
    assert all(text.startswith("<|") or text == "[PAD0]" for text in hidden)
    assert tokenizer.hidden_ids.dtype == np.int64


def test_tokens_that_may_be_said_are_shown_by_name(tokenizer):
    """So that the history of a conversation and the parser of tool calls have the whole answer."""
    tokens = vocab.lists()[0]
    said = {tokens[i] for i in tokenizer.visible_ids}
    assert said == {
        f"<|{n}|>" for n in ("step", "python_start", "python_end", "reasoning_thinking_start", "reasoning_thinking_end")
    }
    ids = tokenizer.encode("<|python_start|>f()<|python_end|><|eom|>", bos=False, special=True)
    assert tokenizer.decode(ids) == "<|python_start|>f()<|python_end|>"


def test_a_control_token_of_a_fine_tune_may_be_sampled_and_ends_the_answer_where_the_file_says_so():
    texts, kinds, merges = vocab.lists()
    id = len(texts)
    texts, kinds = [*texts, "[STOP]", "<|im_end|>"], [*kinds, 3, 3]
    mine = Tokenizer.from_gguf(vocab.in_memory(texts, kinds, merges))
    assert id not in mine.hidden_ids
    assert mine.decode([id]) == "[STOP]"
    assert id + 1 in mine.stop_ids
    ended = Tokenizer.from_gguf(vocab.in_memory(texts, kinds, merges, eos_token_ids=np.array([id])))
    assert id in ended.stop_ids
    assert ended.decode([id]) == ""
    padded = Tokenizer.from_gguf(vocab.in_memory(texts, kinds, merges, padding_token_id=id))
    assert id in padded.hidden_ids


def test_ids_with_a_text_are_those_of_ordinary_tokens(tokenizer):
    tokens = vocab.lists()[0]
    assert {tokens[i] for i in tokenizer.ids_with(["\n"])} == {token for token in tokens if "Ċ" in token}
    spaced = tokenizer.ids_with([" t", "|"])
    assert {tokens[i] for i in spaced} == {
        t for t in tokens if "Ġt" in t or ("|" in t and t not in tokenizer.special_names.ids)
    }
    assert tokenizer.ids_with([""]) == []


def test_token_id(tokenizer):
    assert tokenizer.token_id("<|eot|>") == vocab.lists()[0].index("<|eot|>")
    assert tokenizer.token_id("a") == vocab.trained().token_to_id("a")
    assert tokenizer.token_id("<|no such token|>") is None


@given(st.text(max_size=30))
def test_streamed_text_is_the_whole_text(text):
    tokenizer = _shared()
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in tokenizer.encode(text)]
    assert "".join(pieces) + stream.flush() == text


def test_a_character_over_several_tokens_comes_whole(tokenizer):
    ids = tokenizer.encode("🏽", bos=False)
    assert len(ids) > 1
    stream = tokenizer.stream()
    assert [stream.push(i) for i in ids] == [""] * (len(ids) - 1) + ["🏽"]
    assert stream.push(ids[0]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_broken_utf8_shows_as_replacement_and_does_not_swallow_what_follows(tokenizer):
    ids = [*tokenizer.encode("🏽", bos=False)[:1], *tokenizer.encode("ok", bos=False)]
    assert tokenizer.decode(ids) == "\ufffdok"
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) == "\ufffdok"


@pytest.mark.parametrize("wrong", [-1, 10**9])
def test_ids_outside_of_the_vocabulary_are_refused(tokenizer, wrong):
    with pytest.raises(PromptError):
        tokenizer.decode([wrong])


def test_rows_of_the_embedding_without_a_token_are_hidden_and_have_no_text(tmp_path):
    tokenizer = Tokenizer.from_gguf(vocab.opened(tmp_path))
    n = len(vocab.lists()[0])
    assert tokenizer.n_vocab == n + 3
    assert {n, n + 1, n + 2} <= set(tokenizer.hidden_ids.tolist())
    assert tokenizer.decode([n, n + 2]) == ""


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(PromptError):
        tokenizer.encode("a\ud800")


def test_from_a_file(tmp_path, tokenizer):
    read = Tokenizer.from_gguf(vocab.opened(tmp_path, bos_token_id=tokenizer.bos, eos_token_id=tokenizer.token_id("<|eot|>")))
    assert all(read.encode(text) == tokenizer.encode(text) for text in TEXTS)
    assert read.bos == tokenizer.bos


def malformed():
    tokens, kinds, merges = vocab.lists()
    yield "no tokens", {}, {"drop": "tokens"}
    yield "tokens are numbers", {}, {"tokens": np.arange(5)}
    yield "tokens are a string", {}, {"tokens": "abc"}
    yield "no merges", {}, {"drop": "merges"}
    yield "too few types", {"kinds": kinds[:-1]}, {}
    yield "types are fractions", {}, {"token_type": np.ones(len(tokens), np.float32)}
    yield "a token twice", {"tokens": [*tokens[:-1], tokens[0]]}, {}
    yield "a byte is missing", {"tokens": ["Q!" if token == "!" else token for token in tokens]}, {}
    yield "a merge of one part", {"merges": [*merges, "ab"]}, {}
    yield "a merge of three parts", {"merges": [*merges, "a b c"]}, {}
    yield "a merge of an unknown token", {"merges": [*merges, "a nosuchtoken"]}, {}
    yield "a merge into an unknown token", {"merges": [*merges, "Q Q"]}, {}
    yield "empty", {"tokens": [], "kinds": []}, {}
    yield "bos too large", {}, {"bos_token_id": len(tokens)}
    yield "eos negative", {}, {"eos_token_id": -1}
    yield "eos a string", {}, {"eos_token_id": "2"}
    yield "padding too large", {}, {"padding_token_id": len(tokens)}
    yield "an end out of range", {}, {"eos_token_ids": np.array([len(tokens)])}
    yield "ends are strings", {}, {"eos_token_ids": ["2"]}
    yield "another kind of vocabulary", {}, {"model": "llama"}


@pytest.mark.parametrize("lists, values", [case[1:] for case in malformed()], ids=[case[0] for case in malformed()])
def test_a_malformed_vocabulary_is_one_line_of_error(lists, values):
    with pytest.raises(ModelFileError) as caught:
        Tokenizer.from_gguf(vocab.in_memory(**{**lists, **values}))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("small.gguf: expected")


SMALL_MODEL = Path(__file__).parents[2] / "models/scout-tiny/hf/tokenizer.json"


@pytest.mark.skipif(not SMALL_MODEL.exists(), reason="the small model's tokenizer is not here")
def test_scout_tiny_s_tokenizer_gives_the_library_s_ids():
    reference, model = tokenizers.Tokenizer.from_file(str(SMALL_MODEL)), json.loads(SMALL_MODEL.read_text())
    texts = dict(sorted((i, text) for text, i in reference.get_vocab(with_added_tokens=True).items()))
    assert list(texts) == list(range(len(texts)))
    added = {token["id"] for token in model["added_tokens"]}
    merges = [" ".join(merge) for merge in model["model"]["merges"]]
    tokenizer = Tokenizer.from_gguf(vocab.in_memory([*texts.values()], [3 if i in added else 1 for i in texts], merges))
    for text in [*TEXTS[:-1], *vocab.CORPUS[:-1]]:
        assert tokenizer.encode(text, bos=False) == reference.encode(text, add_special_tokens=False).ids
    marked = "<|header_start|>user<|header_end|>\n\nHi 🦙<|eot|>"
    assert tokenizer.encode(marked, special=True) == reference.encode(marked).ids


def _shared(made=[]):  # noqa: B006 - hypothesis takes no module fixtures
    if not made:
        made.append(Tokenizer.from_gguf(vocab.in_memory()))
    return made[0]
