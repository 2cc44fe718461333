"""Bytes on disk: the table of tensor types, checked GGUF headers, mapped files, direct reads, memory pages."""
