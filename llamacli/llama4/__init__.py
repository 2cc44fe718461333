"""Llama 4, defined once: its sizes, its tensors, and the order of operations of its layers."""
