"""Byte-pair encoding in kernels: the ids of `tokenizers` for any merges, and errors for vocabularies that are unsound."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from llamacli.cpu.kernels.ops import bpe

LETTERS = "abĠé€🦙"  # of one byte to four


def zero_ended(texts):
    return "".join(text + "\0" for text in texts).encode()


@st.composite
def vocabularies(draw):
    """Tokens and merges that fit together: each merge joins two tokens that are there by then; some merges come twice."""
    tokens, merges = list(LETTERS), []
    for _ in range(draw(st.integers(0, 20))):
        left, right = draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))
        merges.append((left, right))
        if left + right not in tokens:
            tokens.append(left + right)
    if merges:
        merges += draw(st.lists(st.sampled_from(merges), max_size=3))
    whole = [text for text in ("bbbbb", "aĠbéa", "ééé") if text not in tokens]  # that no merge makes
    return tokens + whole[: draw(st.integers(0, len(whole)))], merges


@given(vocabularies(), st.lists(st.text(LETTERS, min_size=1, max_size=40), max_size=5))
def test_words_get_the_ids_of_the_library(vocabulary, words):
    tokens, merges = vocabulary
    library = Tokenizer(models.BPE({text: id for id, text in enumerate(tokens)}, merges, ignore_merges=True))
    ours = bpe.Merges(zero_ended(tokens), zero_ended(map(" ".join, merges)))
    assert ours.encode(words) == [id for word in words for id in library.encode(word).ids]


def test_a_word_of_the_longest_length_is_merged_whole():
    ours = bpe.Merges(zero_ended(["a", "aa", "aaaa"]), zero_ended(["a a", "aa aa"]))
    assert ours.encode(["a" * bpe.LONGEST, "a" * 5]) == [2] * (bpe.LONGEST // 4) + [2, 0]


def test_an_empty_text_is_no_token():
    ours = bpe.Merges(zero_ended(["a", "", "b", ""]), b"")
    assert ours.encode(["ab"]) == [0, 2]


@pytest.mark.parametrize("merge", ["a", "a b c", "a  b", " a", "a ", "", "a x", "x a", "b a"], ids=ascii)
def test_a_merge_that_does_not_fit_is_named(merge):
    with pytest.raises(ValueError, match="merge 1 does not fit"):
        bpe.Merges(zero_ended(["a", "b", "ab"]), zero_ended(["a b", merge]))


def test_a_letter_that_is_no_token_is_refused():
    with pytest.raises(ValueError, match="letter"):
        bpe.Merges(zero_ended(["a"]), b"").encode(["aé"])


@given(vocabularies(), st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=9, unique=True))
def test_the_texts_that_merges_name_are_sides_or_both_together(vocabulary, others):
    tokens, merges = vocabulary
    texts = list(dict.fromkeys([*others, *tokens[::2]]))
    expected = {text for merge in merges for text in (*merge, "".join(merge))}
    found = bpe.named(zero_ended(texts), zero_ended(map(" ".join, merges)))
    assert [texts[k] for k in found] == [text for text in texts if text in expected]


def test_merges_without_one_space_name_nothing():
    assert bpe.named(zero_ended(["a", "b", "", "ab"]), zero_ended(["a b b", "ab", "", " a"])) == [0]
    assert bpe.named(zero_ended(["a", "b", "", "ab"]), b"") == []


def test_texts_that_collide_under_a_known_hash_get_their_ids_in_the_usual_time():
    """1,100 texts in ASCII that all belong into one place of a table of 2,048 by FNV-1a, spread."""
    letters = np.random.default_rng(0).integers(1, 128, (6_000_000, 8), np.uint8)
    hashes = np.full(len(letters), 0xCBF29CE484222325, np.uint64)
    for column in letters.T:
        hashes = (hashes ^ column) * np.uint64(0x100000001B3)
    spread = (hashes * np.uint64(0x9E3779B97F4A7C15)).view(np.int64) >> 40
    chosen = [row.tobytes().decode("ascii") for row in letters[spread & 2047 == 7][:1100]]
    assert len(chosen) == 1100
    assert bpe.Merges(zero_ended(chosen), b"").encode(chosen) == list(range(1100))
