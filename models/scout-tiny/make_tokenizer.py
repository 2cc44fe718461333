"""Trains scout-tiny's tokenizer, a byte-level BPE with Llama 4's split pattern and special token names.

In: 30,000 training documents of data.py. Out: `hf/tokenizer.json`, `tokenizer_config.json` (with the chat template)
and `generation_config.json`. Digits are never merged, so that 17 is two tokens. Ids: 256 bytes and the merges up to
1919, then the special tokens in Llama 4's order up to 2047.
"""

import itertools
import json
from pathlib import Path

from data import documents
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

HF = Path(__file__).with_name("hf")
N_VOCAB, N_BASE = 2048, 1920
LETTERS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
)
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLIT = LETTERS + r"\p{N}{1,3}" + REST
NAMED = [
    "begin_of_text",
    "end_of_text",
    "fim_prefix",
    "fim_middle",
    "fim_suffix",
    "header_start",
    "header_end",
    "eom",
    "eot",
    "step",
    *[f"text_post_train_reserved_special_token_{i}" for i in range(6)],
    "python_start",
    "python_end",
    "finetune_right_pad",
    "image_start",
    "image_end",
    "tile_x_separator",
    "tile_y_separator",
    "image",
    "patch",
]
STOPS = ["<|end_of_text|>", "<|eom|>", "<|eot|>"]
TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|header_start|>' + message['role'] + '<|header_end|>\\n\\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] }}"
    "{%- else %}"
    "{%- for part in message['content'] %}{%- if part['type'] == 'text' %}{{- part['text'] }}{%- endif %}{%- endfor %}"
    "{%- endif %}"
    "{{- '<|eot|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|header_start|>assistant<|header_end|>\\n\\n' }}{%- endif %}"
)


def specials() -> list[str]:
    """The special tokens in id order; reserved ones fill the vocabulary."""
    names = [f"<|{name}|>" for name in NAMED]
    return names + [f"<|reserved_special_token_{i}|>" for i in range(N_VOCAB - N_BASE - len(names))]


def pre_tokenizer(split: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


def corpus() -> list[str]:
    """The text that the merges are learned from, without special tokens."""
    docs = itertools.islice(documents(seed=1), 30_000)
    return [doc.text or "\n\n".join(["\n\n", *(part for message in doc.messages for part in message)]) for doc in docs]


def train() -> Tokenizer:
    """The finished tokenizer. Merges are learned with single digits; the pattern in the file is Llama 4's own."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizer(LETTERS + r"\p{N}" + REST)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=N_BASE, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    missing = N_BASE - tokenizer.get_vocab_size()
    if missing:
        raise SystemExit(f"the corpus gave {missing} merges too few")
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials()])
    tokenizer.pre_tokenizer = pre_tokenizer(SPLIT)
    tokenizer.decoder = decoders.ByteLevel()
    bos = "<|begin_of_text|>"
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
            ),
        ]
    )
    return tokenizer


def main() -> None:
    HF.mkdir(exist_ok=True)
    tokenizer = train()
    tokenizer.save(str(HF / "tokenizer.json"))
    ids = {name: tokenizer.token_to_id(name) for name in specials()}
    (HF / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<|begin_of_text|>",
                "eos_token": "<|eot|>",
                "pad_token": "<|finetune_right_pad|>",
                "clean_up_tokenization_spaces": False,
                "model_max_length": 8192,
                "model_input_names": ["input_ids", "attention_mask"],
                "chat_template": TEMPLATE,
            },
            indent=2,
        )
        + "\n"
    )
    (HF / "generation_config.json").write_text(
        json.dumps(
            {
                "bos_token_id": ids["<|begin_of_text|>"],
                "eos_token_id": [ids[name] for name in STOPS],
                "pad_token_id": ids["<|finetune_right_pad|>"],
                "do_sample": True,
                "temperature": 0.6,
                "top_p": 0.9,
            },
            indent=2,
        )
        + "\n"
    )
    print(f"{tokenizer.get_vocab_size()} tokens; BOS {ids['<|begin_of_text|>']}, <|eot|> {ids['<|eot|>']}")


if __name__ == "__main__":
    main()
