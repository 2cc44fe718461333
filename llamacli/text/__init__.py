"""Text and token ids: the tokenizer, the chat template, and the choice of the next token from logits."""
