"""Byte-pair encoding: finds tokens by their bytes, checks the merges and keeps their ranks, merges the letters of words.

In: the texts of tokens and the merges, each followed by a zero byte; words likewise. Out: `Merges`, whose `encode` gives ids.
Words are merged as `tokenizers` does it: of all neighbours that merges name, those of the earliest merge first, from the left;
a word that is a token is taken whole. Building takes a fifth of that library's time and runs without the interpreter's lock.

A vocabulary is three tables: the texts; `slots`, int64 [mask + 1], each some bits of a hash, where the text begins, and its id
plus 1; `pairs`, int64 [pair_mask + 1, 2], left << 32 | right, plus 1, and what they become, rank << 32 | id. The last two are
hashed, at most two thirds full.

A text's hash is a polynomial modulo a prime at a base that is drawn anew for each vocabulary (Carter and Wegman 1979): the
author of a file cannot choose texts that collide, and the time of every call depends on the size of its input alone.
"""

import secrets
from typing import NamedTuple

import numpy as np
from numpy import int64, uint8

from llamacli.cpu.kernels.jit.intrinsics import Address, Count, Kernel, device_function, kernel, pointer

LONGEST = 512  # letters of a word that `encode` takes; its time grows with their square
_BITS = 31
_PRIME = (1 << _BITS) - 1  # products of two hashes stay within int64
_SPREAD = -7046029254386353131  # odd: its multiples fill the upper bits evenly (Knuth)
_ID, _BEGIN, _TAG = 23, 28, 13  # bits of a slot, the lowest first
_NOTHING = (1 << 63) - 1  # a pair that no merge names
_FINE, _UNFIT = range(2)  # results: a text is not in the vocabulary


@device_function
def _place(seeds, key, mask):
    key *= pointer(seeds, int64)[1]
    key ^= (key >> 32) & 0xFFFFFFFF
    return ((key * _SPREAD) >> 32) & mask


@device_function
def _longer(seeds, hash, letter):
    """The hash of `hash`'s text and one byte more."""
    hash = hash * pointer(seeds, int64)[0] + int64(letter)
    hash = (hash & _PRIME) + (hash >> _BITS)
    return hash - _PRIME if hash >= _PRIME else hash


@device_function
def _hash(seeds, hash, at, end):
    """The hash of `hash`'s text and of the bytes from address `at` to `end`."""
    text = pointer(at, uint8)
    for i in range(end - at):
        hash = _longer(seeds, hash, text[i])
    return hash


@device_function
def _tag(hash):
    return hash & ((1 << _TAG) - 1)


@device_function
def _find(texts, slots, mask, seeds, hash, at, middle, end):
    """The id of the text between two addresses, without the byte at `middle` if that lies there; -1 if there is none."""
    slot, place, tag, size = pointer(slots, int64), _place(seeds, hash, mask), _tag(hash), end - at
    if middle < end:
        size -= 1
    other = pointer(at, uint8)
    while True:
        found = slot[place]
        if found == 0:
            return int64(-1)
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


@device_function
def _pair_place(pairs, mask, seeds, key):
    """The place of a pair in the table, or the free place where it belongs."""
    table, place = pointer(pairs, int64), _place(seeds, key, mask)
    while table[2 * place] != 0 and table[2 * place] != key:
        place = (place + 1) & mask
    return place


@device_function
def _merged(pairs, mask, seeds, left, right):
    """What two neighbours become, rank << 32 | id."""
    key = ((left << 32) | right) + 1
    table, place = pointer(pairs, int64), _pair_place(pairs, mask, seeds, key)
    return table[2 * place + 1] if table[2 * place] != 0 else int64(_NOTHING)


@device_function
def _named(texts, slots, mask, seeds, at):
    """The ids of the left side, the right side and the joined text of the merge at this address, -1 for none; and its end."""
    begin, middle, spaces = at, at, int64(0)
    while pointer(at, uint8)[0] != 0:
        if pointer(at, uint8)[0] == 32:
            middle, spaces = at, spaces + 1
        at += 1
    if spaces != 1:
        return int64(-1), int64(-1), int64(-1), at
    hash = _hash(seeds, int64(0), begin, middle)
    left = _find(texts, slots, mask, seeds, hash, begin, middle, middle)
    right = _find(texts, slots, mask, seeds, _hash(seeds, int64(0), middle + 1, at), middle + 1, at, at)
    whole = _find(texts, slots, mask, seeds, _hash(seeds, hash, middle + 1, at), begin, middle, at)
    return left, right, whole, at


class _IndexArguments(NamedTuple):
    n: Count
    texts: Address
    slots: Address
    mask: Count
    seeds: Address  # int64 [2]: the base of the polynomial; an odd factor
    result: Address


@kernel(_IndexArguments)
def _index(a, thread, threads):
    """Enter the texts that are not empty."""
    byte, slots, at = pointer(a.texts, uint8), pointer(a.slots, int64), int64(0)
    for id in range(a.n):
        begin, hash = at, int64(0)
        while byte[at] != 0:
            hash = _longer(a.seeds, hash, byte[at])
            at += 1
        if at > begin:
            place = _place(a.seeds, hash, a.mask)
            while slots[place] != 0:
                place = (place + 1) & a.mask
            slots[place] = (_tag(hash) << (_ID + _BEGIN)) | (begin << _ID) | (id + 1)
        at += 1


class _RankArguments(NamedTuple):
    n: Count
    merges: Address
    texts: Address
    slots: Address
    mask: Count
    seeds: Address
    pairs: Address
    pair_mask: Count
    result: Address


@kernel(_RankArguments)
def _rank(a, thread, threads):
    """Enter the merges in order, of equal ones the last; result = (a result, the merge where it ended)."""
    result, table, at = pointer(a.result, int64), pointer(a.pairs, int64), a.merges
    for rank in range(a.n):
        left, right, whole, at = _named(a.texts, a.slots, a.mask, a.seeds, at)
        result[1] = rank
        if left < 0 or right < 0 or whole < 0:
            result[0] = _UNFIT
            return
        key = ((left << 32) | right) + 1
        place = _pair_place(a.pairs, a.pair_mask, a.seeds, key)
        table[2 * place], table[2 * place + 1] = key, (rank << 32) | whole
        at += 1


class _MarkArguments(NamedTuple):
    n: Count
    merges: Address
    texts: Address
    slots: Address
    mask: Count
    seeds: Address
    marks: Address  # uint8, one for each text
    result: Address


@kernel(_MarkArguments)
def _mark(a, thread, threads):
    """marks = 1 for each text that a merge names."""
    marks, at = pointer(a.marks, uint8), a.merges
    for _ in range(a.n):
        left, right, whole, at = _named(a.texts, a.slots, a.mask, a.seeds, at)
        if left >= 0:
            marks[left] = 1
        if right >= 0:
            marks[right] = 1
        if whole >= 0:
            marks[whole] = 1
        at += 1


class _EncodeArguments(NamedTuple):
    n: Count
    words: Address
    texts: Address
    slots: Address
    mask: Count
    seeds: Address
    pairs: Address
    pair_mask: Count
    scratch: Address  # int64 [2, LONGEST]
    ids: Address
    result: Address


@kernel(_EncodeArguments)
def _encode(a, thread, threads):
    """ids = those of all words; result = (a result, their number)."""
    texts, slots, mask, seeds, pairs, pair_mask = a.texts, a.slots, a.mask, a.seeds, a.pairs, a.pair_mask
    ids, result, at, count = pointer(a.ids, int64), pointer(a.result, int64), a.words, int64(0)
    part, pair = pointer(a.scratch, int64), pointer(a.scratch + 8 * LONGEST, int64)
    for _ in range(a.n):
        begin, size = at, int64(0)
        while pointer(at, uint8)[0] != 0:
            at += 1
        whole = _find(texts, slots, mask, seeds, _hash(seeds, int64(0), begin, at), begin, at, at)
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
            id = _find(texts, slots, mask, seeds, _hash(seeds, int64(0), letter, end), letter, end, end)
            if id < 0 or size == LONGEST:
                result[0] = _UNFIT
                return
            part[size] = id
            size += 1
            letter = end
        for i in range(size - 1):
            pair[i] = _merged(pairs, pair_mask, seeds, part[i], part[i + 1])
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
                pair[where - 1] = _merged(pairs, pair_mask, seeds, part[where - 1], part[where])
            if where < size - 1:
                pair[where] = _merged(pairs, pair_mask, seeds, part[where], part[where + 1])
        for i in range(size):
            ids[count] = part[i]
            count += 1
        at += 1
    result[1] = count


class Merges:
    """A vocabulary and its merges. Threads may share it."""

    def __init__(self, texts: bytes, merges: bytes):
        """`texts`: the texts of ids 0, 1, ..., a zero byte after each; empty for an id that must not be found. `merges`:
        likewise pairs with a space between, the earliest first.

        ValueError if they do not fit together.
        """
        n_merges = merges.count(0)
        self._texts, self._slots, self._seeds = _indexed(texts)
        self._pairs = np.zeros((_room(n_merges), 2), np.int64)
        self._tables = *_addresses(self._texts, self._slots, self._seeds), self._pairs.ctypes.data, len(self._pairs) - 1
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


def named(texts: bytes, merges: bytes) -> list[int]:
    """The numbers of the `texts` that a merge names: a side of it, or both together. In: as for Merges; each text once."""
    tables, marks = _indexed(texts), np.zeros(texts.count(0), np.uint8)
    kept = np.frombuffer(merges, np.uint8)
    _run(_mark, merges.count(0), kept.ctypes.data, *_addresses(*tables), marks.ctypes.data)
    return np.flatnonzero(marks).tolist()


def _indexed(texts: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The texts, their slots, and the seeds of these."""
    n = texts.count(0)
    if n >= 1 << (_ID - 1) or len(texts) >= 1 << _BEGIN:
        raise ValueError(f"{n} tokens of {len(texts)} bytes are too many")
    found = np.frombuffer(texts, np.uint8), np.zeros(_room(n), np.int64), np.frombuffer(secrets.token_bytes(16), np.int64) | 1
    found[2][0] = 256 + secrets.randbelow(_PRIME - 256)
    _run(_index, n, *_addresses(*found))
    return found


def _addresses(texts: np.ndarray, slots: np.ndarray, seeds: np.ndarray) -> tuple[int, int, int, int]:
    """Addresses and mask, in the order of the drivers' arguments."""
    return texts.ctypes.data, slots.ctypes.data, len(slots) - 1, seeds.ctypes.data


def _room(n: int) -> int:
    """Places of a table for `n` entries: a power of two."""
    return 1 << max(4, (n * 3 // 2).bit_length())


class _UnfitError(ValueError):
    """A text is not in the vocabulary."""

    def __init__(self, at: int):
        super().__init__("a letter is no token")
        self.at = at


def _run(driver: Kernel, *arguments: int) -> int:
    result = np.zeros(2, np.int64)
    packed = driver.pack(driver.arguments(*arguments, result.ctypes.data))
    driver(packed.ctypes.data, 0, 1)
    code, at = result.tolist()
    if code == _UNFIT:
        raise _UnfitError(at)
    return at
