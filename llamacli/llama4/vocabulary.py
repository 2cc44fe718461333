"""What every Llama 4 vocabulary shares: GPT-2's byte alphabet, the pattern that splits text, GGUF's token types.

Tokens are stored as text in an alphabet that writes each byte as one visible character. Before merges, text is split by a
regular expression, which a GGUF only names (`tokenizer.ggml.pre`). Source: Meta's tokenizer of Llama 4; GPT-2's encoder.
"""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type

_VISIBLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_OTHERS = iter(range(256, 512))
BYTE_LETTERS = tuple(chr(b) if b in _VISIBLE else chr(next(_OTHERS)) for b in range(256))  # the letter of each byte

SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SPLIT = (  # tokenizer.ggml.pre = llama4
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{SUFFIX}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{SUFFIX}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
