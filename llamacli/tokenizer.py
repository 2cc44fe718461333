"""Text to token ids and back: the byte-level BPE of a GGUF, merged in Rust, with special tokens kept apart.

In: the `tokenizer.ggml.*` metadata of an open GGUF. Out: `Tokenizer` and, for text that grows token by token, `StreamDecoder`.
Special tokens are not in the BPE's vocabulary at all, so plain text cannot become one, whatever it says. A vocabulary that
makes no sense is a ModelFileError. Knows nothing of messages or templates.
"""

import codecs
import re
from collections import Counter
from collections.abc import Iterable

import numpy as np
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from llamacli.errors import ModelFileError, PromptError
from llamacli.gguf import GGUF

_END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA4 = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_END}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_END}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {"llama-bpe": _LLAMA3}  # by tokenizer.ggml.pre; all else is llama4, gpt-4o or Ollama's "default"

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_STOPS = ("<|end_of_text|>", "<|eom|>", "<|eot|>", "<|eom_id|>", "<|eot_id|>")
_STRUCTURE = ("<|begin_of_text|>", "<|header_start|>", "<|header_end|>", "<|start_header_id|>", "<|end_header_id|>")
_WRITABLE = re.compile(r"<\|(python_start|python_end|python_tag|step|.*thinking.*)\|>")  # control tokens that a model may write


def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in a byte-level vocabulary: itself where it is visible, else one from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF = _byte_letters()
_NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}


class Tokenizer:
    """A vocabulary. Made by `from_gguf`; safe to share between threads.

    `bos` and `eos` are ids or None; `stop_ids` end an answer; `hidden_ids` (int64, ascending) must never be sampled.
    """

    bos: int | None
    eos: int | None
    stop_ids: frozenset[int]
    hidden_ids: np.ndarray
    n_vocab: int

    def __init__(
        self, tokens: list[str], kinds: np.ndarray, merges: list[tuple[str, str]], pattern: str, named: dict[str, int]
    ):
        """`kinds`: GGUF token types, int [n_vocab]; `named`: ids by role ("bos", "eos", "eot", "eom"). See `from_gguf`."""
        self._tokens, self._kinds, self.n_vocab = tokens, kinds, len(tokens)
        apart = np.flatnonzero(np.isin(kinds, (_CONTROL, _USER_DEFINED))).tolist()
        left_out = set(np.flatnonzero(~np.isin(kinds, (_NORMAL, _BYTE))).tolist())
        vocab = {token: i for i, token in enumerate(tokens)}
        for text in (*_STOPS, *_STRUCTURE):  # special even where a converter forgot to say so
            if text in vocab and vocab[text] not in left_out:
                apart.append(vocab[text])
                left_out.add(vocab[text])
        apart += sorted(set(named.values()) - left_out)
        left_out.update(named.values())
        self._special = {tokens[i]: i for i in apart if tokens[i]}
        self._controls = frozenset(left_out - set(np.flatnonzero(kinds == _USER_DEFINED).tolist()))
        self._special_pattern: re.Pattern | None = None
        self.bos = named.get("bos", self._special.get("<|begin_of_text|>"))
        stops = {self._special[text] for text in _STOPS if text in self._special}
        self.stop_ids = frozenset(stops | {i for role, i in named.items() if role != "bos"})
        self.eos = named.get("eos", min(stops, default=None))
        hidden = {i for i in self._controls if not _WRITABLE.fullmatch(tokens[i]) or kinds[i] == _UNUSED}
        hidden.update(i for i in apart if "reserved_special_token" in tokens[i])
        self.hidden_ids = np.array(sorted(hidden - self.stop_ids), np.int64)
        for i in left_out:
            del vocab[tokens[i]]
        self._plain = vocab
        self._rust = RustTokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
        self._rust.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    @classmethod
    def from_gguf(cls, gguf: GGUF) -> "Tokenizer":
        """Build it from the metadata; 200,000 tokens take about a second. ModelFileError if they make no sense."""
        read = _Reader(gguf)
        tokens, kinds = read.tokens()
        named = {}
        for role in ("bos", "eos", "eot", "eom"):
            if (i := read.id(role, len(tokens))) is not None:
                named[role] = i
        pattern = _PATTERNS.get(read.text("pre", "default"), _LLAMA4)
        merges = read.merges()
        try:
            return cls(tokens, kinds, merges, pattern, named)
        except Exception as error:  # the Rust side names what is missing, as a bare Exception
            raise read.error("merges that join tokens of the vocabulary", " ".join(str(error).split())[:200]) from None

    def encode(self, text: str, bos: bool = True, special: bool = False) -> list[int]:
        """The ids of a text, after BOS if `bos` (once, also where `special` text begins with it).

        `special`: `<|...|>` in the text that are special tokens become them; else they are plain text like any other.
        PromptError if the text is not Unicode (lone surrogates).
        """
        ids = self._encode_special(text) if special else self._encode_plain(text)
        if bos and self.bos is not None and not (special and ids[:1] == [self.bos]):
            ids.insert(0, self.bos)
        return ids

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of ids; bytes that are not UTF-8 show as U+FFFD. `special`: special tokens are shown as their names."""
        return b"".join(self.bytes_of(i, special) for i in ids).decode("utf-8", "replace")

    def bytes_of(self, token: int, special: bool = False) -> bytes:
        """The bytes of one token: none for a control token (unless `special`) and for ids past the vocabulary."""
        token = int(token)
        if not 0 <= token < self.n_vocab or (token in self._controls and not special):
            return b""
        text = self._tokens[token]
        if text in self._special or token in self._controls:
            return text.encode()
        try:
            return bytes(map(_BYTE_OF.__getitem__, text))
        except KeyError:  # not a letter of the byte alphabet: the token says itself
            return text.encode()

    def token_id(self, text: str) -> int | None:
        """The id of a special token by its text, else of a vocabulary entry as it is written in the file."""
        return self._special.get(text, self._plain.get(text))

    def split(self, text: str) -> list[str | int]:
        """The text cut at its special tokens: these as ids, what is between them as it stands, nothing empty."""
        if self._special_pattern is None:
            longest_first = sorted(self._special, key=len, reverse=True)
            self._special_pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")" if longest_first else "(?!)")
        parts = self._special_pattern.split(text)
        return [self._special[part] if i % 2 else part for i, part in enumerate(parts) if part]

    @property
    def special_tokens(self) -> list[str]:
        """The texts of all special tokens."""
        return list(self._special)

    def stream(self) -> "StreamDecoder":
        """A decoder for tokens that come one by one."""
        return StreamDecoder(self)

    def _encode_plain(self, text: str) -> list[int]:
        try:
            return self._rust.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError):
            raise PromptError("the text is not valid Unicode: expected no lone surrogates, found one; remove it") from None

    def _encode_special(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self.split(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._encode_plain(part)
        return ids


class StreamDecoder:
    """Text of tokens as they come; the bytes of an unfinished character wait for the next token."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._utf8 = tokenizer, codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that is complete with this token; may be empty."""
        return self._utf8.decode(self._tokenizer.bytes_of(token))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never got finished, else nothing."""
        text = self._utf8.decode(b"", True)
        self._utf8.reset()
        return text


class _Reader:
    """The `tokenizer.ggml.*` metadata, checked."""

    def __init__(self, gguf: GGUF):
        self._gguf = gguf
        if (model := self.text("model", "gpt2")) != "gpt2":
            raise self.error("model gpt2 (byte-level BPE)", repr(model))

    def error(self, expected: str, found: str) -> ModelFileError:
        return ModelFileError(
            f"{self._gguf.path}: expected in tokenizer.ggml.* {expected}, found {found}; the vocabulary is damaged or missing"
        )

    def get(self, key: str):
        return self._gguf.metadata.get("tokenizer.ggml." + key)

    def text(self, key: str, default: str) -> str:
        value = self.get(key)
        return value if isinstance(value, str) else default

    def strings(self, key: str) -> list[str]:
        value = self.get(key)
        if not isinstance(value, list):
            raise self.error(f"a list of strings {key}", "none" if value is None else type(value).__name__)
        return value

    def id(self, role: str, n_vocab: int) -> int | None:
        value = self.get(role + "_token_id")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < n_vocab:
            raise self.error(f"{role}_token_id from 0 to {n_vocab - 1}", repr(value)[:80])
        return value

    def tokens(self) -> tuple[list[str], np.ndarray]:
        tokens, kinds = self.strings("tokens"), self.get("token_type")
        if not isinstance(kinds, np.ndarray) or kinds.dtype.kind not in "iu" or len(kinds) != len(tokens) or not tokens:
            found = f"{len(kinds)} of {kinds.dtype}" if isinstance(kinds, np.ndarray) else "none"
            raise self.error(f"one whole number in token_type for each of {len(tokens)} tokens, at least one", found)
        if len(set(tokens)) != len(tokens):
            raise self.error("each token once", f"{Counter(tokens).most_common(1)[0][0]!r:.80} twice")
        known = set(tokens)
        if lost := [byte for letter, byte in _BYTE_OF.items() if letter not in known and byte not in _NEVER_IN_UTF8]:
            raise self.error("a token for every byte of UTF-8", f"none for byte 0x{min(lost):02x}")
        return tokens, kinds

    def merges(self) -> list[tuple[str, str]]:
        merges = [tuple(merge.split(" ")) for merge in self.strings("merges")]
        if any(len(merge) != 2 for merge in merges):
            wrong = next(i for i, merge in enumerate(merges) if len(merge) != 2)
            raise self.error("two tokens and one space in each of merges", f"{len(merges[wrong])} parts in number {wrong}")
        return merges
