"""Text to token ids and back: Llama 4's byte-level BPE, built from a GGUF's fields through the `tokenizers` library.

In: a GGUF's `tokenizer.ggml.*` metadata. Out: `Tokenizer`, and a `StreamDecoder` that holds back characters until all their
bytes have come. Special tokens stand beside the BPE, not in it: ordinary text cannot become one whatever it says, and merges
that name one are refused. A piece that is a token as it stands is taken whole, as tiktoken does. Knows nothing of messages
or templates.
"""

import codecs
import re
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as _Pieces

from llamacli.errors import ModelFileError, PromptError, UnsupportedModelError
from llamacli.files.gguf import GGUF
from llamacli.llama4.vocabulary import BYTE, BYTE_LETTERS, NORMAL, SPLIT, SUFFIX, UNKNOWN, UNUSED, USER_DEFINED

_LLAMA3 = rf"{SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {"llama4": SPLIT, "gpt-4o": SPLIT, "default": SPLIT, "llama-bpe": _LLAMA3}  # "default" is Ollama's word

_SPECIAL_NAME = re.compile(r"<\|\w+\|>")
_SAID = re.compile(r"<\|(step|(python|\w*thinking|think)_(start|end))\|>")  # control tokens that belong into answers
_STOPS = ("<|eot|>", "<|eom|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")  # Llama 4's, then Llama 3's names
_BYTES = {letter: byte for byte, letter in enumerate(BYTE_LETTERS)}
_NEEDED = frozenset(c for c, b in _BYTES.items() if b not in (0xC0, 0xC1) and b < 0xF5)  # bytes that occur in UTF-8


class Tokenizer:
    """Encodes and decodes. Ids run from 0 to `n_vocab` - 1.

    `bos`, `eos`: ids, None where the file has none. `stop_ids`: ids that end an answer. `hidden_ids`: int64 array of ids
    never to be sampled: reserved, padding, unused and image tokens, and control tokens that neither end an answer nor belong
    into one. `warning`: None, or one line for the user.
    """

    def __init__(self, texts: list[str], merges: list[tuple[str, str]], special: Iterable[int], pattern: str = SPLIT):
        """`texts`: the token of each id; `merges` in order; `special`: ids that BPE never yields.

        ValueError if they do not fit together.
        """
        self._texts = texts
        self._ids = {text: id for id, text in enumerate(texts)}
        if len(self._ids) != len(texts):
            raise ValueError("a token occurs twice")
        self._special = frozenset(special)
        vocabulary = self._ids.copy()
        for id in self._special:
            del vocabulary[texts[id]]
        if missing := _NEEDED - vocabulary.keys():
            raise ValueError(f"{len(missing)} of 256 bytes have no token")
        if wrong := next((merge for merge in merges if len(merge) != 2), None):
            raise ValueError(f"a merge has {len(wrong)} parts, not 2")
        try:
            self._pieces = _Pieces(models.BPE(vocabulary, merges, ignore_merges=True))
        except Exception as error:  # the library raises no narrower class
            raise ValueError(f"merges do not fit the tokens ({' '.join(str(error).split())[:200]})") from None
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._pieces.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
        self.n_vocab = len(texts)
        self.bos: int | None = None
        self.eos: int | None = None
        self.stop_ids: frozenset[int] = frozenset()
        self.hidden_ids = np.empty(0, np.int64)
        self.warning: str | None = None

    @classmethod
    def from_gguf(cls, gguf: GGUF) -> "Tokenizer":
        """Build from the metadata; ModelFileError if they are missing, malformed or contradict one another."""
        return _Fields(gguf).tokenizer()

    def token_id(self, text: str) -> int | None:
        """The id of the token that is written `text` in the file, special tokens included."""
        return self._ids.get(text)

    def encode(self, text: str, bos: bool = True, special: bool = False) -> list[int]:
        """Ids of `text`. With `special`, names of special tokens become these tokens; else they are text like any other.

        With `bos` the ids begin with exactly one `bos`. PromptError for text that is no Unicode (lone surrogates).
        """
        ids = []
        for part in self.split(text) if special else [text]:
            if isinstance(part, int):
                ids.append(part)
            elif part:
                try:
                    ids += self._pieces.encode(part, add_special_tokens=False).ids
                except (TypeError, UnicodeEncodeError):
                    raise PromptError("expected text in UTF-8, found bytes that are not; convert it first") from None
        if bos and self.bos is not None:
            while ids[:1] == [self.bos]:
                del ids[0]
            ids.insert(0, self.bos)
        return ids

    def split(self, text: str) -> list[str | int]:
        """The text cut at the names of special tokens: these as ids, what is between them as it stands, nothing empty."""
        parts: list[str | int] = []
        done = 0
        for match in self._names.finditer(text):
            if (id := self._ids.get(match[0])) in self._special:
                parts += [text[done : match.start()], id]
                done = match.end()
        return [part for part in (*parts, text[done:]) if part != ""]

    @property
    def special_tokens(self) -> list[str]:
        """The names of all special tokens."""
        return [self._texts[id] for id in sorted(self._special)]

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """Text of `ids`; special tokens appear by name with `special`, else not at all. Broken UTF-8 becomes U+FFFD."""
        return b"".join(self.token_bytes(id, special) for id in ids).decode("utf-8", "replace")

    def token_bytes(self, id: int, special: bool = False) -> bytes:
        """The bytes that one token stands for, nothing for a special one unless asked."""
        if not 0 <= id < self.n_vocab:
            raise PromptError(f"expected token ids from 0 to {self.n_vocab - 1}, found {id}")
        if id >= len(self._texts) or (id in self._special and not special):
            return b""
        text = self._texts[id]
        if id in self._special:
            return text.encode()
        return b"".join(_BYTES[c].to_bytes() if c in _BYTES else c.encode() for c in text)

    def stream(self, special: bool = False) -> "StreamDecoder":
        """A decoder for ids that come one by one."""
        return StreamDecoder(self, special)

    @cached_property
    def _names(self) -> re.Pattern:
        """Finds what may be a special token's name. Llama 4 has a thousand, all of one form: compiling each takes a while."""
        others = sorted((name for name in self.special_tokens if name and not _SPECIAL_NAME.fullmatch(name)), key=len)
        return re.compile("|".join([_SPECIAL_NAME.pattern, *map(re.escape, reversed(others))]))


class StreamDecoder:
    """Ids in one by one, text out as soon as it is whole; all pieces and the flush make up `decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer, special: bool = False):
        self._tokenizer, self._special = tokenizer, special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The text that this token completes, maybe none."""
        return self._utf8.decode(self._tokenizer.token_bytes(id, self._special))

    def flush(self) -> str:
        """What was held back: U+FFFD for a character whose end never came. The decoder is as new afterwards."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class _Fields:
    """Reads and checks `tokenizer.ggml.*`."""

    def __init__(self, gguf: GGUF):
        self._path, self._metadata = gguf.path, gguf.metadata
        embedding = gguf.tensors.get("token_embd.weight")
        self._rows = embedding.shape[0] if embedding is not None and len(embedding.shape) == 2 else None

    def tokenizer(self) -> Tokenizer:
        model = self._metadata.get("tokenizer.ggml.model")
        if model != "gpt2":
            expected = f"{self._path}: expected tokenizer.ggml.model gpt2"
            raise UnsupportedModelError(f"{expected}, found {model!r:.60}; use a Llama 4 file")
        texts, merges = self._strings("tokens"), self._strings("merges")
        if self._rows is not None and len(texts) > self._rows:
            raise self._wrong("tokens", f"at most {self._rows}, the height of token_embd.weight", f"{len(texts)}")
        types = self._types(len(texts))
        bos, eos, *ends = (self._id(name, len(texts)) for name in ("bos", "eos", "eot", "eom"))
        ends += self._more_ends(len(texts))
        special = self._special(texts, types, {bos, eos, *ends} - {None})
        pre = self._metadata.get("tokenizer.ggml.pre", "default")
        pattern = _PATTERNS.get(pre) if isinstance(pre, str) else None
        try:
            tokenizer = Tokenizer(texts, [tuple(m.split(" ")) for m in merges], special, pattern or SPLIT)
        except ValueError as error:
            raise self._wrong("tokens and merges", "of one vocabulary", f"that {error}") from None
        if pattern is None:
            tokenizer.warning = f"{self._path}: tokenizer.ggml.pre {pre!r:.60} is not known; splitting text as Llama 4 does"
        tokenizer.bos = tokenizer.token_id("<|begin_of_text|>") if bos is None else bos
        tokenizer.eos = tokenizer.token_id("<|eot|>") if eos is None else eos
        tokenizer.stop_ids = frozenset({tokenizer.eos, *ends, *map(tokenizer.token_id, _STOPS)} - {None})
        tokenizer.n_vocab = self._rows or len(texts)
        hidden = [id for id in special if id not in tokenizer.stop_ids and not self._sampled(texts[id], types[id])]
        tokenizer.hidden_ids = np.array([*hidden, *range(len(texts), tokenizer.n_vocab)], np.int64)
        return tokenizer

    def _strings(self, name: str) -> list[str]:
        value = self._metadata.get(f"tokenizer.ggml.{name}")
        if not isinstance(value, list) or not value:
            raise self._wrong(name, "a list of strings", "none" if value is None else type(value).__name__)
        return value

    def _types(self, n: int) -> Sequence[int]:
        value = self._metadata.get("tokenizer.ggml.token_type")
        if value is None:
            return [NORMAL] * n
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or len(value) != n:
            raise self._wrong("token_type", f"{n} numbers, one a token", "something else")
        return value.tolist()

    def _special(self, texts: list[str], types: Sequence[int], named: set[int]) -> list[int]:
        """Ids that text must not become. Files that call their special tokens normal exist, so names and uses count too."""
        by_type = [id for id, kind in enumerate(types) if kind not in (NORMAL, BYTE)]
        by_name = [id for id, text in enumerate(texts) if text[:2] == "<|" and _SPECIAL_NAME.fullmatch(text)]
        return sorted({*by_type, *by_name, *named})

    @staticmethod
    def _sampled(text: str, kind: int) -> bool:
        """Whether a special token that does not stop may be sampled."""
        if kind in (UNKNOWN, UNUSED):
            return False
        return bool(_SAID.fullmatch(text)) or (kind == USER_DEFINED and not _SPECIAL_NAME.fullmatch(text))

    def _id(self, name: str, n: int) -> int | None:
        value = self._metadata.get(f"tokenizer.ggml.{name}_token_id")
        if value is not None and (type(value) is not int or not 0 <= value < n):
            raise self._wrong(f"{name}_token_id", f"an id from 0 to {n - 1}", f"{value!r:.60}")
        return value

    def _more_ends(self, n: int) -> list[int]:
        """Ollama's list of ids that end an answer."""
        value = self._metadata.get("tokenizer.ggml.eos_token_ids", np.empty(0, np.int32))
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or ((value < 0) | (value >= n)).any():
            raise self._wrong("eos_token_ids", f"ids from 0 to {n - 1}", "something else")
        return value.tolist()

    def _wrong(self, key: str, expected: str, found: str) -> ModelFileError:
        message = f"{self._path}: expected tokenizer.ggml.{key} to be {expected}, found {found}"
        return ModelFileError(f"{message}; the file is damaged")
