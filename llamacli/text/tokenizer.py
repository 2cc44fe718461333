"""Text to token ids and back: Llama 4's byte-level BPE, built from a GGUF's fields.

In: a GGUF's `tokenizer.ggml.*` metadata. Out: `Tokenizer`, and a `StreamDecoder` that holds back a character until all of its
bytes have come.

There are two kinds of tokens outside the BPE. Special (control) tokens shape a conversation: text becomes one only where the
caller asks for it. Added (user-defined) tokens are ordinary words of a fine-tune: they are found in any text, before the BPE,
as `tokenizers` finds them. A piece that is a token as it stands is taken whole, as tiktoken does.

That library cuts text into words. Words are merged by kernels (cpu/kernels/ops/bpe.py), which are ready in a fifth of the time;
only for a long text all is the library's, since it lets other threads run meanwhile.
"""

import codecs
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as _Library

from llamacli.cpu.kernels.ops import bpe
from llamacli.errors import ModelFileError, PromptError, UnsupportedModelError
from llamacli.files.gguf import GGUF, text_of, zero_ended
from llamacli.llama4.tensors import TOKEN_EMBD
from llamacli.llama4.vocabulary import BYTE, BYTE_LETTERS, NORMAL, SPLIT, SUFFIX, UNKNOWN, UNUSED, USER_DEFINED

_LLAMA3 = rf"{SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {"llama4": SPLIT, "gpt-4o": SPLIT, "default": SPLIT, "llama-bpe": _LLAMA3}  # "default" is Ollama's name

_LONGEST_NAME = 512  # characters
_LONG = 1 << 16  # characters of a text whose encoding takes more than some hundredths of a second
_SPECIAL_NAME = re.compile(r"<\|\w+\|>")
_NEVER_SAID = re.compile(  # reserved rows, padding, and tokens around turns and pictures
    r"<\|(begin_of_text|fim_\w+|header_start|header_end|start_header_id|end_header_id|\w*reserved\w*|\w*pad(_id)?"
    r"|image\w*|patch|tile_\w+|vision\w*)\|>"
)
_STOPS = ("<|eot|>", "<|eom|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>")  # Llama 4, Llama 3, ChatML
_BYTES = {letter: byte for byte, letter in enumerate(BYTE_LETTERS)}
_ALPHABET = frozenset(BYTE_LETTERS)
_PLAIN = {ord(letter): byte for letter, byte in _BYTES.items()}
_NEEDED = frozenset(c for c, b in _BYTES.items() if b not in (0xC0, 0xC1) and b < 0xF5)  # bytes that occur in UTF-8


class Names:
    """Finds tokens by name in text: leftmost first, of several at one place the longest, as `tokenizers` does.

    Time grows with the text and the logarithm of the number of names. Names over 512 characters are not searched for.
    """

    def __init__(self, ids: dict[str, int]):
        self.ids = {name: id for name, id in ids.items() if 0 < len(name) <= _LONGEST_NAME}
        self._sorted = sorted(self.ids)
        self._prefix: list[int] = []  # for each name the index of the longest other name that begins it, -1 if none
        chain: list[int] = []
        for i, name in enumerate(self._sorted):
            while chain and not name.startswith(self._sorted[chain[-1]]):
                chain.pop()
            self._prefix.append(chain[-1] if chain else -1)
            chain.append(i)
        self._longest = max(map(len, self.ids), default=0)
        firsts, seconds = {name[0] for name in self.ids}, {name[1:2] for name in self.ids}
        ahead = "" if "" in seconds else f"(?={_one_of(seconds)})"
        self._start = re.compile(_one_of(firsts) + ahead) if firsts else None

    def find(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Start, end and id of each name in `text`."""
        done = 0
        for match in self._start.finditer(text) if self._start else ():
            if (start := match.start()) >= done and (name := self._longest_at(text, start)):
                done = start + len(name)
                yield start, done, self.ids[name]

    def split(self, text: str) -> list[str | int]:
        """The text split at the names: these as ids, the text between them unchanged, nothing empty."""
        parts: list[str | int] = []
        done = 0
        for start, end, id in self.find(text):
            parts += [text[done:start], id]
            done = end
        return [part for part in (*parts, text[done:]) if part != ""]

    def _longest_at(self, text: str, start: int) -> str | None:
        ahead = text[start : start + self._longest]
        at = bisect_right(self._sorted, ahead) - 1  # every name that begins `ahead` begins this one too
        while at >= 0 and not ahead.startswith(self._sorted[at]):
            at = self._prefix[at]
        return self._sorted[at] if at >= 0 else None


def _one_of(characters: Iterable[str]) -> str:
    return f"[{''.join(map(re.escape, sorted(characters)))}]"


class Tokenizer:
    """Encodes and decodes. Ids run from 0 to `n_vocab` - 1.

    `bos`, `eos`, `padding`: ids, None where the file has none. `stop_ids`: ids that end an answer. `hidden_ids`: int64 array of
    ids that must never be sampled: reserved, padding, unused and image tokens and those that stand around turns.
    `visible_ids`: special tokens that a model may say inside an answer, such as <|python_start|>; they are decoded to their
    names, so that a history contains the whole answer. `special_names`: the names of all special tokens. `warning`: None, or
    one line for the user.
    """

    def __init__(
        self,
        texts: list[str],
        merges: bytes,
        special: Iterable[int],
        added: Iterable[int] = (),
        unused: Iterable[int] = (),
        pattern: str = SPLIT,
    ):
        """`texts`: the token of each id; `merges` in order, each two tokens with a space between and a zero byte after them;
        `special`, `added` and `unused`: ids that BPE never yields (but for added words that merges name too).

        ValueError if they do not fit together.
        """
        self._texts = texts
        self._ids = dict(zip(texts, range(len(texts)), strict=True))
        if len(self._ids) != len(texts):
            raise ValueError("a token occurs twice")
        self._special, self._added, self._unused = frozenset(special), frozenset(added), frozenset(unused)
        self._merges = merges
        self._as_written = self._added - self._known_to_bpe()  # their texts are not in the byte alphabet
        self._apart = self._special | self._unused | self._as_written
        if missing := sum((id := self._ids.get(letter)) is None or id in self._apart for letter in _NEEDED):
            raise ValueError(f"{missing} of 256 bytes have no token")
        vocabulary = texts.copy()
        for id in self._apart:
            vocabulary[id] = ""
        joined = "\0".join([*vocabulary, ""])
        if joined.count("\0") > len(texts):  # no word has a zero byte in it
            joined = "\0".join(["" if "\0" in text else text for text in vocabulary] + [""])
        self._words = bpe.Merges(joined.encode(), merges)
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._cut = pre_tokenizers.Sequence([split, letters])
        self.n_vocab = len(texts)
        self.bos: int | None = None
        self.eos: int | None = None
        self.padding: int | None = None
        self.stop_ids: frozenset[int] = frozenset()
        self.visible_ids: frozenset[int] = frozenset()
        self.hidden_ids = np.empty(0, np.int64)
        self.warning: str | None = None

    def _known_to_bpe(self) -> set[int]:
        """The added tokens that BPE needs, too: byte characters, and words that merges name."""
        ids = [id for id in self._added if "\0" not in self._texts[id]]
        merged = bpe.named("".join(self._texts[id] + "\0" for id in ids).encode(), self._merges) if ids else []
        return {ids[k] for k in merged} | {id for id in ids if self._texts[id] in _NEEDED}

    def _pairs(self) -> list[tuple[str, ...]]:
        return [tuple(merge.split(" ")) for merge in self._merges.decode("utf-8", "replace").split("\0")[:-1]]

    @classmethod
    def from_gguf(cls, gguf: GGUF) -> "Tokenizer":
        """Build from the metadata; ModelFileError if they are missing, malformed or contradict one another."""
        return _Fields(gguf).tokenizer()

    def token_id(self, text: str) -> int | None:
        """The id of the token that is written `text` in the file, special tokens included."""
        return self._ids.get(text)

    def encode(self, text: str, bos: bool = True, special: bool = False) -> list[int]:
        """Ids of `text`. With `special`, names of special tokens become these tokens; else they are text like any other.

        With `bos` the ids begin with exactly one `bos`. PromptError for text that is not Unicode (lone surrogates).
        """
        ids = []
        for part in self.special_names.split(text) if special else [text]:
            ids += [part] if isinstance(part, int) else self._encoded(part)
        if bos and self.bos is not None:
            while ids[:1] == [self.bos]:
                del ids[0]
            ids.insert(0, self.bos)
        return ids

    def _encoded(self, text: str) -> list[int]:
        ids = []
        for part in self._added_names.split(text):
            if isinstance(part, int):
                ids.append(part)
                continue
            try:
                ids += self._bpe(part)
            except (TypeError, UnicodeEncodeError):
                raise PromptError("expected text in UTF-8, found bytes that are not; convert it first") from None
        return ids

    def _bpe(self, text: str) -> list[int]:
        """Ids of a text without names. The library's `pre_tokenize_str` holds the interpreter's lock, so that Ctrl-C has no
        effect during a long text; `encode_batch_fast` releases it, but uses threads.
        """
        if len(text) < _LONG:
            words = [word for word, _ in self._cut.pre_tokenize_str(text)]
            if max(map(len, words), default=0) <= bpe.LONGEST:
                return self._words.encode(words)
        return self._library.encode_batch_fast([text], add_special_tokens=False)[0].ids

    @cached_property
    def _library(self) -> _Library:
        """The library's form of this tokenizer, which takes a third of a second to build."""
        vocabulary = {text: id for text, id in self._ids.items() if id not in self._apart}
        library = _Library(models.BPE(vocabulary, self._pairs(), ignore_merges=True))
        library.pre_tokenizer = self._cut
        return library

    @cached_property
    def special_names(self) -> Names:
        return self._named(self._special)

    @cached_property
    def visible_names(self) -> Names:
        """The names of `visible_ids`."""
        return self._named(self.visible_ids)

    @cached_property
    def _added_names(self) -> Names:
        return self._named(self._added)

    def _named(self, ids: Iterable[int]) -> Names:
        return Names({self._texts[id]: id for id in ids})

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """Text of `ids`. Of special tokens, `visible_ids` appear by name, the others only with `special`.

        Broken UTF-8 becomes U+FFFD.
        """
        return b"".join(self.token_bytes(id, special) for id in ids).decode("utf-8", "replace")

    def token_bytes(self, id: int, special: bool = False) -> bytes:
        """The bytes that one token stands for; none for a special token that is not shown. PromptError for an unknown id."""
        if not 0 <= id < self.n_vocab:
            raise PromptError(f"expected token ids from 0 to {self.n_vocab - 1}, found {id}")
        if id >= len(self._texts):
            return b""
        text = self._texts[id]
        if id in self._special or id in self._unused:
            return text.encode() if special or id in self.visible_ids else b""
        if id in self._as_written:
            return text.encode()
        return b"".join(_BYTES[c].to_bytes() if c in _BYTES else c.encode() for c in text)

    def byte_table(self) -> tuple[list[bytes], list[int]]:
        """The bytes of each of the n_vocab ids, and which ids are special. Ids that are never sampled have none."""
        table = [text.translate(_PLAIN).encode("latin-1", "replace") for text in self._texts]
        own = {id for id, text in enumerate(self._texts) if not _ALPHABET.issuperset(text)}
        for id in own | self._special | self._as_written:
            table[id] = self.token_bytes(id, special=True)
        for id in self._unused:
            table[id] = b""
        return table + [b""] * (self.n_vocab - len(table)), sorted(self._special)

    @cached_property
    def most_bytes(self) -> int:
        """The most bytes of text of any token."""
        return max(len(text) if id not in self._as_written else len(text.encode()) for id, text in enumerate(self._texts))

    def ids_with(self, texts: Iterable[str]) -> list[int]:
        """Ids of the ordinary tokens whose text has one of `texts` in it."""
        wanted = ["".join(BYTE_LETTERS[byte] for byte in text.encode()) for text in texts if text]
        ordinary = (id for id in range(len(self._texts)) if id not in self._special and id not in self._unused)
        return [id for id in ordinary if any(text in self._texts[id] for text in wanted)]

    def stream(self, special: bool = False) -> "StreamDecoder":
        """A decoder for a stream of ids."""
        return StreamDecoder(self, special)


class StreamDecoder:
    """Takes ids one by one and returns text as soon as its characters are complete. All pieces and the flush together are
    `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, special: bool = False):
        self._tokenizer, self._special = tokenizer, special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that this token completes, maybe none."""
        return self._utf8.decode(self._tokenizer.token_bytes(id, self._special))

    def flush(self) -> str:
        """The text held back: U+FFFD for an incomplete character. Afterwards the decoder can be used for another text."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class _Fields:
    """Reads and checks `tokenizer.ggml.*`."""

    def __init__(self, gguf: GGUF):
        self._path, self._metadata = gguf.path, gguf.metadata
        embedding = gguf.tensors.get(TOKEN_EMBD)
        self._rows = embedding.shape[0] if embedding is not None and len(embedding.shape) == 2 else None

    def tokenizer(self) -> Tokenizer:
        if text_of(self._metadata, "tokenizer.ggml.model") != "gpt2":
            model = self._metadata.get("tokenizer.ggml.model")
            expected = f"{self._path}: expected tokenizer.ggml.model gpt2"
            raise UnsupportedModelError(f"{expected}, found {model!r:.60}; use a Llama 4 file")
        texts, merges = self._strings(), self._merges()
        if not merges:
            raise self._wrong("merges", "a list of strings", "none")
        if self._rows is not None and len(texts) > self._rows:
            raise self._wrong("tokens", f"at most {self._rows}, the height of {TOKEN_EMBD}", f"{len(texts)}")
        types = self._types(len(texts))
        bos, eos, *ends = (self._id(name, len(texts)) for name in ("bos", "eos", "eot", "eom"))
        ends += self._more_ends(len(texts))
        special = self._special(texts, types, {bos, eos, *ends} - {None})
        added, unused = (set(np.flatnonzero(types == kind).tolist()) - special for kind in (USER_DEFINED, UNUSED))
        pre = self._metadata.get("tokenizer.ggml.pre", "default")
        pattern = _PATTERNS.get(pre) if isinstance(pre, str) else None
        try:
            tokenizer = Tokenizer(texts, merges, special, added, unused, pattern or SPLIT)
        except ValueError as error:
            raise self._wrong("tokens and merges", "of one vocabulary", f"that {error}") from None
        if pattern is None:
            tokenizer.warning = f"{self._path}: tokenizer.ggml.pre {pre!r:.60} is not known; splitting text as Llama 4 does"
        tokenizer.bos = tokenizer.token_id("<|begin_of_text|>") if bos is None else bos
        tokenizer.eos = tokenizer.token_id("<|eot|>") if eos is None else eos
        tokenizer.stop_ids = frozenset({tokenizer.eos, *ends, *map(tokenizer.token_id, _STOPS)} - {None})
        tokenizer.n_vocab = self._rows or len(texts)
        tokenizer.padding = self._id("padding", len(texts))
        never = {tokenizer.bos, tokenizer.padding}
        hidden = special - tokenizer.stop_ids
        hidden = {i for i in hidden if i in never or types[i] == UNKNOWN or _NEVER_SAID.fullmatch(texts[i])}
        tokenizer.visible_ids = special - tokenizer.stop_ids - hidden
        tokenizer.hidden_ids = np.array([*sorted(hidden.union(unused)), *range(len(texts), tokenizer.n_vocab)], np.int64)
        return tokenizer

    def _strings(self) -> list[str]:
        value = self._metadata.get("tokenizer.ggml.tokens")
        if not isinstance(value, list) or not value:
            raise self._wrong("tokens", "a list of strings", "none" if value is None else type(value).__name__)
        return value

    def _merges(self) -> bytes:
        try:
            return zero_ended(self._metadata, "tokenizer.ggml.merges")
        except ValueError:
            raise self._wrong("merges", "pairs of tokens", "a zero byte in one") from None

    def _types(self, n: int) -> np.ndarray:
        value = self._metadata.get("tokenizer.ggml.token_type")
        if value is None:
            return np.full(n, NORMAL)
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or len(value) != n:
            raise self._wrong("token_type", f"{n} numbers, one a token", "something else")
        return value

    def _special(self, texts: list[str], types: np.ndarray, named: set[int]) -> frozenset[int]:
        """Ids that text must not become. Some files give special tokens the normal type, so names and uses count, too."""
        by_type = np.flatnonzero(~np.isin(types, (NORMAL, USER_DEFINED, UNUSED, BYTE))).tolist()
        by_name = [id for id, text in enumerate(texts) if text[:2] == "<|" and _SPECIAL_NAME.fullmatch(text)]
        return frozenset({*by_type, *by_name, *named})

    def _id(self, name: str, n: int) -> int | None:
        value = self._metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None and (type(value) is not int or not 0 <= value < n):
            raise self._wrong(f"{name}_token_id", f"an id from 0 to {n - 1}", f"{value!r:.60}")
        return value

    def _more_ends(self, n: int) -> list[int]:
        """The ids of Ollama's list of ends of an answer."""
        value = self._metadata.get("tokenizer.ggml.eos_token_ids", np.empty(0, np.int32))
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or ((value < 0) | (value >= n)).any():
            raise self._wrong("eos_token_ids", f"ids from 0 to {n - 1}", "something else")
        return value.tolist()

    def _wrong(self, key: str, expected: str, found: str) -> ModelFileError:
        message = f"{self._path}: expected tokenizer.ggml.{key} to be {expected}, found {found}"
        return ModelFileError(f"{message}; the file is damaged")
