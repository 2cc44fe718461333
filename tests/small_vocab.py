"""A small byte-level BPE, trained when needed, as a `tokenizers` object (the independent reference) and as its GGUF."""

import json
from functools import cache
from types import SimpleNamespace

import gguf
import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from llamacli.files.gguf import open_gguf

# Meta's published pattern, written out, so that an error in tokenizer.py is found.
LLAMA4_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = [
    "begin_of_text",
    "end_of_text",
    "fim_prefix",
    "header_start",
    "header_end",
    "eom",
    "eot",
    "step",
    "text_post_train_reserved_special_token_0",
    "python_start",
    "python_end",
    "finetune_right_pad",
    "image_start",
    "patch",
    "reasoning_thinking_start",
    "reasoning_thinking_end",
]
CORPUS = [
    "The quick brown fox jumps over the lazy dog. It doesn't matter; they're HTTPServer users, I'll say 12345 times.",
    "Größe, Übermut und Straße: ÄRGER. Ça va? naïve café, e\u0301te\u0301. Привет мир, ПРИВЕТ. 你好世界 こんにちは हिन्दी भाषा",
    "def main():\n    return 'x'\n\n\nfor i in range(10):\n\tprint(i)  # 🦙🦙 emoji 🦙\r\n",
    "the the the and and header quick brown quick brown 🦙 🦙 eot <|eot|> <|eot|>",
]


@cache
def trained() -> Tokenizer:
    """The reference, without special tokens."""
    reference = Tokenizer(models.BPE(ignore_merges=True))
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA4_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False, min_frequency=2)
    reference.train_from_iterator(CORPUS * 3, trainer)
    return reference


def lists() -> tuple[list[str], list[int], list[str]]:
    """Tokens, token types and merges in a GGUF's form: the BPE, special tokens, then one unused row."""

    model = json.loads(trained().to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    specials = [f"<|{name}|>" for name in SPECIALS]
    kinds = [1] * len(tokens) + [3] * len(specials) + [5]
    return [*tokens, *specials, "[PAD0]"], kinds, [" ".join(merge) for merge in model["merges"]]


def write(path, tokens=None, kinds=None, merges=None, pre="llama4", template=None, **ids):
    """A GGUF with a vocabulary only. `ids`: bos_token_id=...; a list given as () is left out."""
    tokens, kinds, merges = (
        mine if mine is not None else usual for mine, usual in zip((tokens, kinds, merges), lists(), strict=True)
    )
    writer = gguf.GGUFWriter(path, "llama4")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    if len(tokens):
        writer.add_array("tokenizer.ggml.tokens", list(tokens))
    if len(kinds):
        writer.add_array("tokenizer.ggml.token_type", list(kinds))
    if len(merges):
        writer.add_array("tokenizer.ggml.merges", list(merges))
    for name, value in ids.items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(f"tokenizer.ggml.{name}", value)
    if template:
        writer.add_chat_template(template)
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens) + 3, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def in_memory(tokens=None, kinds=None, merges=None, drop=None, **more):
    """The same as a substitute for an open GGUF, without a file."""
    tokens, kinds, merges = (
        mine if mine is not None else usual for mine, usual in zip((tokens, kinds, merges), lists(), strict=True)
    )
    values = {"model": "gpt2", "pre": "llama4", "tokens": tokens, "token_type": np.asarray(kinds, np.int32), "merges": merges}
    values |= more
    metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None and key != drop}
    return SimpleNamespace(path="small.gguf", metadata=metadata, tensors={})


def opened(folder, **changes):
    return open_gguf(write(folder / "vocab.gguf", **changes))
