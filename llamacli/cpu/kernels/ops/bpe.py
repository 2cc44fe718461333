"""Byte-pair encoding: finds tokens by their bytes, checks the merges and keeps their ranks, merges the letters of words.

In: the texts of tokens and the merges, each followed by a zero byte; words likewise. Out: `Merges`, whose `encode` gives ids.
Words are merged as `tokenizers` does it: of all neighbours that merges name, those of the earliest merge first, from the left;
a word that is a token is taken whole. Building takes a fifth of that library's time, and not the interpreter's lock.

A vocabulary is three tables: the texts; `slots`, int64 [mask + 1], each some bits of a hash, where the text begins, and its id
plus 1; `pairs`, int64 [pair_mask + 1, 2], left << 32 | right, plus 1, and what they become, rank << 32 | id. The last two are
hashed, at most two thirds full. MOST_PROBES taken places in a row, which only texts made for it have, are an error: the time of
every call grows with its input.
"""

from typing import NamedTuple

import numpy as np
from numpy import int64, uint8

from llamacli.cpu.kernels.jit.intrinsics import Address, Count, Kernel, device_function, kernel, pointer

LONGEST = 512  # letters of a word that `encode` takes; its time grows with their square
MOST_PROBES = 1024
_START, _PRIME = -3750763034362895579, 1099511628211  # of the hash FNV-1a, as int64
_SPREAD = -7046029254386353131  # odd: its multiples fill the upper bits evenly (Knuth)
_ID, _BEGIN, _TAG = 23, 28, 13  # bits of a slot, the lowest first
_NOTHING = (1 << 63) - 1  # a pair that no merge names
_FINE, _TAKEN, _UNFIT = range(3)  # results: too many places in a row are taken; a text is none of the vocabulary's


@device_function
def _place(hash, mask):
    return ((hash * _SPREAD) >> 40) & mask  # these bits depend on all of a pair's


@device_function
def _hash(hash, at, end):
    """The hash of `hash`'s text and of the bytes from address `at` to `end`."""
    text = pointer(at, uint8)
    for i in range(end - at):
        hash = (hash ^ int64(text[i])) * _PRIME
    return hash


@device_function
def _tag(hash):
    return (hash >> (64 - _TAG)) & ((1 << _TAG) - 1)


@device_function
def _find(texts, slots, mask, hash, at, middle, end):
    """The id of the text between two addresses, without the byte at `middle` if that lies there; -1 if there is none."""
    slot, place, tag, size = pointer(slots, int64), _place(hash, mask), _tag(hash), end - at
    if middle < end:
        size -= 1
    other = pointer(at, uint8)
    for _ in range(MOST_PROBES + 1):
        found = slot[place]
        if found == 0:
            break
        if (found >> (_ID + _BEGIN)) & ((1 << _TAG) - 1) == tag:
            own, same, skipped = pointer(texts + ((found >> _ID) & ((1 << _BEGIN) - 1)), uint8), True, int64(0)
            for i in range(size):
                if at + i == middle:
                    skipped = int64(1)
                if own[i] != other[i + skipped]:  # so the end of a shorter text is never passed
                    same = False
                    break
            if same and own[size] == 0:
                return (found & ((1 << _ID) - 1)) - 1
        place = (place + 1) & mask
    return int64(-1)


@device_function
def _pair_place(pairs, mask, key):
    """Where a pair stands, or may be entered; -1 if too many places are taken."""
    table, place = pointer(pairs, int64), _place(key, mask)
    for _ in range(MOST_PROBES):
        found = table[2 * place]
        if found == 0 or found == key:
            return place
        place = (place + 1) & mask
    return int64(-1)


@device_function
def _merged(pairs, mask, left, right):
    """What two neighbours become, rank << 32 | id."""
    key = ((left << 32) | right) + 1
    table, place = pointer(pairs, int64), _pair_place(pairs, mask, key)
    if place < 0 or table[2 * place] == 0:
        return int64(_NOTHING)
    return table[2 * place + 1]


class _IndexArguments(NamedTuple):
    n: Count
    texts: Address
    slots: Address
    mask: Count
    result: Address


@kernel(_IndexArguments)
def _index(a, thread, threads):
    """Enter the texts that are not empty; result = (a result, the id where it ended)."""
    n, mask, result = a.n, a.mask, pointer(a.result, int64)
    byte, slots, at = pointer(a.texts, uint8), pointer(a.slots, int64), int64(0)
    for id in range(n):
        begin, hash = at, int64(_START)
        while byte[at] != 0:
            hash = (hash ^ int64(byte[at])) * _PRIME
            at += 1
        if at > begin:
            place, probes = _place(hash, mask), int64(0)
            while slots[place] != 0:
                place = (place + 1) & mask
                probes += 1
                if probes == MOST_PROBES:
                    result[0], result[1] = _TAKEN, id
                    return
            slots[place] = (_tag(hash) << (_ID + _BEGIN)) | (begin << _ID) | (id + 1)
        at += 1


class _RankArguments(NamedTuple):
    n: Count
    merges: Address
    texts: Address
    slots: Address
    mask: Count
    pairs: Address
    pair_mask: Count
    result: Address


@kernel(_RankArguments)
def _rank(a, thread, threads):
    """Enter the merges in order, of equal ones the last; result = (a result, the merge where it ended)."""
    n, texts, slots, mask, result = a.n, a.texts, a.slots, a.mask, pointer(a.result, int64)
    pairs, pair_mask, table, at = a.pairs, a.pair_mask, pointer(a.pairs, int64), a.merges
    for rank in range(n):
        begin, middle, spaces = at, at, int64(0)
        while True:
            letter = pointer(at, uint8)[0]
            if letter == 0:
                break
            if letter == 32:
                middle, spaces = at, spaces + 1
            at += 1
        left_hash = _hash(int64(_START), begin, middle)
        left = _find(texts, slots, mask, left_hash, begin, middle, middle)
        right = _find(texts, slots, mask, _hash(int64(_START), middle + 1, at), middle + 1, at, at)
        whole = _find(texts, slots, mask, _hash(left_hash, middle + 1, at), begin, middle, at)
        result[1] = rank
        if spaces != 1 or left < 0 or right < 0 or whole < 0:
            result[0] = _UNFIT
            return
        key = ((left << 32) | right) + 1
        place = _pair_place(pairs, pair_mask, key)
        if place < 0:
            result[0] = _TAKEN
            return
        table[2 * place], table[2 * place + 1] = key, (rank << 32) | whole
        at += 1


class _EncodeArguments(NamedTuple):
    n: Count
    words: Address
    texts: Address
    slots: Address
    mask: Count
    pairs: Address
    pair_mask: Count
    scratch: Address  # int64 [2, LONGEST]
    ids: Address
    result: Address


@kernel(_EncodeArguments)
def _encode(a, thread, threads):
    """ids = those of all words; result = (a result, their number)."""
    n, texts, slots, mask, pairs, pair_mask = a.n, a.texts, a.slots, a.mask, a.pairs, a.pair_mask
    ids, result, at, count = pointer(a.ids, int64), pointer(a.result, int64), a.words, int64(0)
    part, pair = pointer(a.scratch, int64), pointer(a.scratch + 8 * LONGEST, int64)
    for _ in range(n):
        begin, size = at, int64(0)
        while pointer(at, uint8)[0] != 0:
            at += 1
        whole = _find(texts, slots, mask, _hash(int64(_START), begin, at), begin, at, at)
        if whole >= 0:
            ids[count] = whole
            count += 1
            at += 1
            continue
        letter = begin
        while letter < at:
            end = letter + 1
            while end < at and (pointer(end, uint8)[0] & 0xC0) == 0x80:
                end += 1
            id = _find(texts, slots, mask, _hash(int64(_START), letter, end), letter, end, end)
            if id < 0 or size == LONGEST:
                result[0] = _UNFIT
                return
            part[size] = id
            size += 1
            letter = end
        for i in range(size - 1):
            pair[i] = _merged(pairs, pair_mask, part[i], part[i + 1])
        while True:
            best, where = int64(_NOTHING), int64(0)
            for i in range(size - 1):
                if pair[i] < best:
                    best, where = pair[i], int64(i)
            if best == _NOTHING:
                break
            part[where] = best & 0xFFFFFFFF
            size -= 1
            for i in range(where + 1, size):
                part[i] = part[i + 1]
                pair[i] = pair[i + 1]
            if where > 0:
                pair[where - 1] = _merged(pairs, pair_mask, part[where - 1], part[where])
            if where < size - 1:
                pair[where] = _merged(pairs, pair_mask, part[where], part[where + 1])
        for i in range(size):
            ids[count] = part[i]
            count += 1
        at += 1
    result[1] = count


class Merges:
    """A vocabulary and its merges. Threads may share it."""

    def __init__(self, texts: bytes, merges: bytes):
        """`texts`: of the ids from 0 on, a zero byte after each; nothing for an id that is not to be found. `merges`: likewise
        pairs with a space between, the earliest first.

        ValueError if they do not fit together.
        """
        n, n_merges = texts.count(0), merges.count(0)
        if n >= 1 << (_ID - 1) or len(texts) >= 1 << _BEGIN:
            raise ValueError(f"{n} tokens of {len(texts)} bytes are too many")
        self._texts = np.frombuffer(texts, np.uint8)
        self._slots, self._pairs = np.zeros(_room(n), np.int64), np.zeros((_room(n_merges), 2), np.int64)
        vocabulary = self._texts.ctypes.data, self._slots.ctypes.data, len(self._slots) - 1
        self._tables = *vocabulary, self._pairs.ctypes.data, len(self._pairs) - 1
        _run(_index, n, *vocabulary)
        kept = np.frombuffer(merges, np.uint8)
        try:
            _run(_rank, n_merges, kept.ctypes.data, *self._tables)
        except _UnfitError as error:
            text = merges.split(b"\0", error.at + 1)[error.at].decode("utf-8", "replace")
            raise ValueError(f"merge {error.at} does not fit them: {text!r:.80}") from None

    def encode(self, words: list[str]) -> list[int]:
        """The ids of all words, of at most LONGEST letters each. ValueError for a letter that is no token."""
        if not words:
            return []
        text = np.frombuffer("\0".join([*words, ""]).encode(), np.uint8)
        ids, scratch = np.empty(len(text), np.int64), np.empty((2, LONGEST), np.int64)
        count = _run(_encode, len(words), text.ctypes.data, *self._tables, scratch.ctypes.data, ids.ctypes.data)
        return ids[:count].tolist()


def _room(n: int) -> int:
    """Places of a table for `n` entries: a power of two."""
    return 1 << max(4, (n * 3 // 2).bit_length())


class _UnfitError(ValueError):
    """A text is none of the vocabulary's."""

    def __init__(self, at: int):
        super().__init__("a letter is no token")
        self.at = at


def _run(driver: Kernel, *arguments: int) -> int:
    result = np.zeros(2, np.int64)
    packed = driver.pack(driver.arguments(*arguments, result.ctypes.data))
    driver(packed.ctypes.data, 0, 1)
    code, at = result.tolist()
    if code == _TAKEN:
        raise ValueError("they share too many hashes")
    if code == _UNFIT:
        raise _UnfitError(at)
    return at
